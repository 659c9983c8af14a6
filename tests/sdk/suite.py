"""Runs test modules by name and counts: `suite.py test_openai test_tzafon`. Started by clients.py."""

import sys
import unittest

HOSTS = (None, "", "127.0.0.1", "localhost", "::1")
strays = []


def loopback_alone(event, arguments):
    """Clients like to fetch price lists and to report home. Not from here, and not unseen."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in HOSTS:
        strays.append(host)
        raise PermissionError(f"the tests may not talk to {host}")


def main():
    sys.addaudithook(loopback_alone)
    suite = unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:])
    result = unittest.TextTestRunner(stream=sys.stdout, verbosity=2).run(suite)
    # A test with sub-tests may fail several times, and still is one test.
    failed = {str(getattr(test, "test_case", test)) for test, _ in result.failures + result.errors}
    failed.update(str(test) for test in result.unexpectedSuccesses)
    passed = result.testsRun - len(failed) - len(result.skipped)
    if strays:
        print(f"the client tried to talk to {', '.join(sorted(set(strays)))}")
    print(f"# passed {max(passed, 0)}\n# failed {len(failed) + bool(strays)}", flush=True)
    return bool(failed or strays)


if __name__ == "__main__":
    sys.exit(main())
