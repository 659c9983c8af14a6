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
# The same for what operators ask, with their own key; last, for they suspend tenants and change prices.
ADMIN = "^/v1/(admin|organization)/"
ADMIN_CASES_MIN = 1000
# Names of versions repeat, cached tokens cost more than others, and so on.
ADMIN_SERVED_MIN = 0.1


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


def make_key(node):
    """The id of a key that operators may change as they like."""
    command = [node.program, "keys", "create", "--tenant", "ten_development", "--output", "json"]
    made = subprocess.run(
        [*command, "--data-dir", str(node.data_dir)], capture_output=True, check=True, env=node.environment
    )
    return json.loads(made.stdout)["id"]


def conform(node, key, paths, cases_min, served_min, examples, seed, seconds_max, tally):
    """`paths`: a regular expression, or nothing for all of them."""
    reports = node.data_dir / f"reports-{len(list(node.data_dir.glob('reports-*')))}"
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml"), "run",
        node.url + "/openapi.json", "--header", f"Authorization: Bearer {key}", "--checks", "all",
        "--phases", ",".join(PHASES), "--max-examples", str(examples), "--seed", str(seed), "--no-color",
        "--report", "junit,json", "--report-junit-path", str(reports / "junit.xml"),
        "--report-json-path", str(reports / "run.json"), *(["--include-path-regex", paths] if paths else []),
    ]  # fmt: skip
    reports.mkdir()
    environment = dict(os.environ, SCHEMATHESIS_HOOKS="hooks", PYTHONPATH=os.pathsep.join([str(HERE), *sys.path]))
    if paths == ADMIN:
        environment["LIGHTCONE_TEST_KEY"] = make_key(node)
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
            tally.check(f"{name} serves what is allowed", None if share >= served_min else f"only {share:.0%}")
    print(f"{generated} requests of {operations['tested']} operations, seed {seed}; {statuses}")
    wanted = operations["selected"] if paths else operations["total"]
    tally.check("every operation was tested", None if operations["tested"] == wanted > 0 else str(operations))
    skipped = [phase for phase, status in statuses.items() if status in ("skip", "interrupted", "error")]
    tally.check("every phase ran", f"not {skipped}" if skipped else None)
    tally.check("there were requests enough", None if generated >= cases_min else f"only {generated}")
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
            more = (arguments.examples, arguments.seed, arguments.seconds, tally)
            conform(node, node.key_for("chat,read"), None, CASES_MIN, SERVED_MIN, *more)
            admin_key = (node.data_dir / "admin-key").read_text().strip()
            conform(node, admin_key, ADMIN, ADMIN_CASES_MIN, ADMIN_SERVED_MIN, *more)
            tally.check("the ledger balances after all of it", node.verify_ledger())
            tally.check("Ctrl-C drains the node and leaves no process behind", node.stop())
    finally:
        node.close(show_log=tally.failed > 0)
    print(f"openapi: {tally.passed} passed, {tally.failed} failed")
    return tally.failed > 0


if __name__ == "__main__":
    sys.exit(main())
