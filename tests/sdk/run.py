#!/usr/bin/env python3
"""Runs the client libraries against a node of its own, then asks the ledger whether it balances.

Starts the node and stops it by its pid. Every request is bounded, and nothing but that node is talked to. A client
is NAME=FOLDER: a name that clients.py knows or that lies in wide/, and where its packages are installed.
Ends with `sdk: N passed, N failed`.

    run.py --node target/debug/lightcone --fetched .lightcone --client python=FOLDER --client npm=FOLDER
    run.py --url http://127.0.0.1:8080 --key-file .lightcone/dev-key --client npm=FOLDER    (one that runs)
"""

import argparse
import sys
import time
from pathlib import Path

import clients
from node import Node


class Tally:
    def __init__(self):
        self.passed = self.failed = 0

    def check(self, name, fault):
        """Counts one check of the runner's own; `fault` is None when it holds."""
        self.passed += fault is None
        self.failed += fault is not None
        print(f"{name} ... {'ok' if fault is None else 'FAILED: ' + fault}", flush=True)


def client_tests(asked, url, key, admin_key, tally):
    table = []
    for name, _, packages in (client.partition("=") for client in asked):
        print(f"\n--- {name} ---", flush=True)
        began = time.monotonic()
        passed, failed = clients.run(name, packages, url, key, admin_key)
        tally.passed += passed
        tally.failed += failed
        table.append(f"{name:14} {passed:4} passed {failed:4} failed {time.monotonic() - began:6.1f} s")
    print("\n" + "\n".join(table), flush=True)


def main():
    parser = argparse.ArgumentParser(description="Runs the client libraries against a node.")
    parser.add_argument("--node", help="the lightcone program to start")
    parser.add_argument("--fetched", default=".lightcone", help="data folder that has lib, bin and models")
    parser.add_argument("--url", help="a node that runs already, instead of --node")
    parser.add_argument("--key-file", default=".lightcone/dev-key")
    parser.add_argument("--admin-key-file", default=".lightcone/admin-key")
    parser.add_argument("--client", action="append", required=True, metavar="NAME=FOLDER")
    arguments = parser.parse_args()
    tally = Tally()
    if arguments.url:
        key = Path(arguments.key_file).read_text().strip()
        admin_key = Path(arguments.admin_key_file).read_text().strip()
        client_tests(arguments.client, arguments.url.rstrip("/"), key, admin_key, tally)
    elif arguments.node:
        node = Node(arguments.node, arguments.fetched)
        try:
            fault = node.start()
            tally.check("a node starts and is ready", fault)
            if fault is None:
                client_tests(arguments.client, node.url, node.key(), node.admin_key(), tally)
                tally.check("the ledger balances after all of it", node.verify_ledger())
                tally.check("Ctrl-C drains the node and leaves no process behind", node.stop())
        finally:
            node.close(show_log=tally.failed > 0)
    else:
        parser.error("--node or --url is needed")
    print(f"sdk: {tally.passed} passed, {tally.failed} failed")
    return tally.failed > 0


if __name__ == "__main__":
    sys.exit(main())
