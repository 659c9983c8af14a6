#!/usr/bin/env python3
"""Holds a node against its own OpenAPI document, with schemathesis: what the document allows is served as it says,
what it forbids is refused as it says. Starts the node as tests/sdk/run.py does. Ends with `openapi: N passed, N failed`.

    conformance.py --node target/debug/lightcone --fetched .lightcone
    conformance.py --node … --examples 500 --seed 3        (longer, and elsewhere)
"""

import argparse
import json
import os
import subprocess
import sys
import urllib.request
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sdk"))

from run import Node, Tally  # noqa: E402

EXAMPLES = 12
SEED = 1
# Far below what comes of the examples above; a run with fewer has tested next to nothing.
CASES_MIN = 2000
# Of what the document allows, so much at least is served. The rest breaks rules that no schema says (hooks.py).
SERVED_MIN = 0.25
SECONDS_MAX = 600
PHASES = ("examples", "coverage", "fuzzing", "stateful")


def get(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


def is_openapi(document):
    from openapi_spec_validator import OpenAPIV31SpecValidator

    faults = [fault.message for fault in OpenAPIV31SpecValidator(document).iter_errors()]
    return "; ".join(faults) or None


def page_has_everything(document, page):
    paths = [path for path in document["paths"] if f">{path}</code>" not in page]
    if paths:
        return f"/docs lacks {paths}"
    fetched = [word for word in ("src=", "<script", "<link", "@import", "url(") if word in page]
    return f"/docs fetches something: {fetched}" if fetched else None


def conform(node, examples, seed, seconds_max, tally):
    reports = node.data_dir / "reports"
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml"), "run",
        node.url + "/openapi.json", "--header", f"Authorization: Bearer {node.key_for('chat,read,admin')}", "--checks", "all",
        "--phases", ",".join(PHASES), "--max-examples", str(examples), "--seed", str(seed), "--no-color",
        "--report", "junit,json", "--report-junit-path", str(reports / "junit.xml"),
        "--report-json-path", str(reports / "run.json"),
    ]  # fmt: skip
    reports.mkdir()
    environment = dict(os.environ, SCHEMATHESIS_HOOKS="hooks", PYTHONPATH=os.pathsep.join([str(HERE), *sys.path]))
    try:
        # What it leaves behind goes with the node's folder.
        done = subprocess.run(
            command, cwd=reports, env=environment, capture_output=True, text=True, timeout=seconds_max
        )
    except subprocess.TimeoutExpired:
        return tally.check("schemathesis", f"did not end in {seconds_max} s")
    try:
        told = json.loads((reports / "run.json").read_text())
        cases = ElementTree.parse(reports / "junit.xml").iter("testcase")
    except (OSError, ValueError, ElementTree.ParseError) as fault:
        print(done.stdout + done.stderr)
        return tally.check("schemathesis", f"ended with {done.returncode} and no report: {fault}")
    for case in cases:
        faults = [fault.text or fault.get("message") for fault in case if fault.tag in ("failure", "error")]
        tally.check(f"{case.get('name')} is as documented", "\n".join(faults) or None)
    generated, operations = told["test_cases"]["generated"], told["operations"]
    statuses = {phase: told["phases"][phase]["status"] for phase in PHASES}
    for name, phases in told["valid_rates"].items():
        served = sum(counts["accepted"] for counts in phases.values())
        refused = sum(counts["rejected"] for counts in phases.values())
        share = served / max(served + refused, 1)
        if served + refused:
            print(f"{name}: {served} of {served + refused} allowed requests were served")
            tally.check(f"{name} serves what is allowed", None if share >= SERVED_MIN else f"only {share:.0%}")
    print(f"{generated} requests of {operations['tested']} operations, seed {seed}; {statuses}")
    tally.check("every operation was tested", None if operations["tested"] == operations["total"] else str(operations))
    skipped = [phase for phase, status in statuses.items() if status in ("skip", "interrupted", "error")]
    tally.check("every phase ran", f"not {skipped}" if skipped else None)
    tally.check("there were requests enough", None if generated >= CASES_MIN else f"only {generated}")
    if done.returncode not in (0, 1):
        tally.check("schemathesis", f"ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def main():
    parser = argparse.ArgumentParser(description="Holds a node against its OpenAPI document.")
    parser.add_argument("--node", required=True, help="the lightcone program to start")
    parser.add_argument("--fetched", default=".lightcone", help="data folder that has lib, bin and models")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="generated requests an operation")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--seconds", type=int, default=SECONDS_MAX, help="how long it may take")
    arguments = parser.parse_args()
    tally = Tally()
    node = Node(arguments.node, arguments.fetched)
    node.environment["LIGHTCONE_CONFIG"] = str(HERE / "node.toml")
    try:
        fault = node.start()
        tally.check("a node starts and is ready", fault)
        if fault is None:
            document = json.loads(get(node.url + "/openapi.json"))
            tally.check("the document is OpenAPI 3.1", is_openapi(document))
            page = get(node.url + "/docs")
            tally.check("the page shows every path and fetches nothing", page_has_everything(document, page))
            conform(node, arguments.examples, arguments.seed, arguments.seconds, tally)
            tally.check("the ledger balances after all of it", node.verify_ledger())
            tally.check("Ctrl-C drains the node and leaves no process behind", node.stop())
    finally:
        node.close(show_log=tally.failed > 0)
    print(f"openapi: {tally.passed} passed, {tally.failed} failed")
    return tally.failed > 0


if __name__ == "__main__":
    sys.exit(main())
