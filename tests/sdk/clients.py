"""Runs the tests of one client library in a process of its own, with that client's packages and no others.

The process sees a bare environment in which every client's own reporting is off, and it may talk to this machine
alone: whatever tries another host fails, and so does the run.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CLIENT_SECONDS_MAX = 300

OPENAI = ("test_openai.py", "test_contract.py")
# Clients that are tested by files of this folder; the others bring their own in wide/NAME.
SHARED = {
    "python": (*OPENAI, "test_tzafon.py"),
    "npm": ("openai.test.mjs",),
    "tzafon": ("test_tzafon.py",),
    "openai-1": OPENAI,
    "openai-2": OPENAI,
    "openai-3": OPENAI,
    "npm-openai": ("openai.test.mjs",),
}

QUIET = {
    "ANONYMIZED_TELEMETRY": "false",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "OTEL_SDK_DISABLED": "true",
}


def run(name, packages, url, key, admin_key):
    """Prints what the tests print; gives (passed, failed)."""
    tests = [HERE / file for file in SHARED.get(name, ())] or sorted((HERE / "wide" / name).glob("*test*.*"))
    if not tests:
        print(f"no tests for the client {name}")
        return 0, 1
    with tempfile.TemporaryDirectory(prefix="lightcone-client-") as home:
        kept = {variable: os.environ[variable] for variable in ("PATH", "LANG", "TMPDIR") if variable in os.environ}
        environment = {**kept, **QUIET, "HOME": home, "SDK_TEST_URL": url, "SDK_TEST_KEY": key}
        environment["SDK_TEST_ADMIN_KEY"] = admin_key
        if tests[0].suffix == ".mjs":
            return npm_client(name, tests, Path(packages), environment)
        return python_client(name, tests, packages, environment)


def python_client(name, tests, packages, environment):
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(packages).resolve()), str(tests[0].parent)])
    # Without `site` there is nothing but the standard library and those packages.
    command = [sys.executable, "-S", str(HERE / "suite.py"), *(test.stem for test in tests)]
    said, status = output(command, environment)
    return counts(r"^# (passed|failed) (\d+)$", said, status)


def npm_client(name, tests, packages, environment):
    # Node.js looks for packages from where a file lies, so the tests are laid beside them.
    for test in tests:
        shutil.copy(test, packages / test.name)
    guard = (HERE / "loopback.mjs").as_uri()
    command = ["node", "--import", guard, "--test", "--test-reporter=tap", "--test-timeout=120000"]
    said, status = output([*command, *(test.name for test in tests)], environment, packages)
    return counts(r"^# (pass|fail|cancelled) (\d+)$", said, status)


def output(command, environment, folder=None):
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        streams = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": subprocess.STDOUT}
        try:
            status = ended(subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True, **streams))
        except OSError as fault:
            status = str(fault)
        said.seek(0)
        text = said.read()
    print(text, flush=True)
    return text, status


def ended(process):
    """A runner that starts runners of its own, as Node's does, is stopped with all of them."""
    try:
        return process.wait(CLIENT_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"nothing: they ran past {CLIENT_SECONDS_MAX} s"
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def counts(pattern, said, status):
    """A run that failed without counting a failure counts as one, and so does one that tested nothing."""
    found = {word: int(number) for word, number in re.findall(pattern, said, re.MULTILINE)}
    passed = found.pop("passed", 0) + found.pop("pass", 0)
    failed = sum(found.values())
    if failed == 0 and (status != 0 or passed == 0):
        print(f"the client's tests ended with {status}", flush=True)
        failed = 1
    return passed, failed
