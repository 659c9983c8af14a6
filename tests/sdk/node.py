"""A node of the tests' own, on a free port of 127.0.0.1 and with a data folder of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

READY_SECONDS_MAX = 180
STOP_SECONDS_MAX = 45


class Node:
    """A node with a fresh data folder whose fetched files are links to those of `fetched`."""

    def __init__(self, program, fetched):
        self.program = str(Path(program).resolve())
        self.data_dir = Path(tempfile.mkdtemp(prefix="lightcone-sdk-"))
        for part in ("bin", "lib", "models"):
            (self.data_dir / part).symlink_to((Path(fetched) / part).resolve())
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = (self.data_dir / "node.log").open("w+")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("LIGHTCONE_")}
        self.environment["LIGHTCONE_CONFIG"] = str(Path(__file__).with_name("node.toml"))
        self.process = None

    def start(self):
        command = [self.program, "serve", "--listen", self.url[len("http://") :], "--data-dir", str(self.data_dir)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=self.environment
        )
        deadline = time.monotonic() + READY_SECONDS_MAX
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return f"the node ended with {self.process.returncode} before it was ready"
            if is_ready(self.url):
                return None
            time.sleep(0.1)
        return f"the node was not ready after {READY_SECONDS_MAX} s"

    def key(self):
        return (self.data_dir / "dev-key").read_text().strip()

    def admin_key(self):
        return (self.data_dir / "admin-key").read_text().strip()

    def key_for(self, scopes):
        """A new key of the development tenant."""
        command = [self.program, "keys", "create", "--tenant", "ten_development", "--scopes", scopes]
        command += ["--data-dir", str(self.data_dir), "--output", "json"]
        made = subprocess.run(command, capture_output=True, text=True, timeout=60, env=self.environment, check=True)
        return json.loads(made.stdout)["key"]

    def verify_ledger(self):
        command = [self.program, "ledger", "verify", "--data-dir", str(self.data_dir), "--output", "json"]
        try:
            verify = subprocess.run(command, capture_output=True, text=True, timeout=60, env=self.environment)
        except subprocess.TimeoutExpired:
            return "`ledger verify` did not end"
        if verify.returncode != 0:
            return f"`ledger verify` ended with {verify.returncode}: {verify.stdout}{verify.stderr}".strip()
        imbalance = [value for key, value in walk(json.loads(verify.stdout)) if "imbalance" in key]
        return None if imbalance == [0] else f"imbalance {imbalance} in {verify.stdout.strip()}"

    def stop(self):
        """Ctrl-C, as a person would: the node must drain, end well, and leave no process behind."""
        if self.process.poll() is not None:
            return f"the node had ended by itself with {self.process.returncode}"
        children = children_of(self.process.pid)
        self.process.send_signal(signal.SIGINT)
        try:
            status = self.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"the node had not stopped {STOP_SECONDS_MAX} s after Ctrl-C"
        left = [pid for pid in children if is_alive(pid)]
        if left:
            return f"processes {left} of the node outlived it"
        return None if status == 0 else f"the node ended with {status}"

    def close(self, show_log):
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if show_log:
            self.log.seek(0)
            print("--- last lines of the node's log ---")
            print("".join(self.log.readlines()[-60:]), flush=True)
        self.log.close()
        shutil.rmtree(self.data_dir, ignore_errors=True)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_ready(url):
    try:
        with urllib.request.urlopen(url + "/readyz", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def children_of(pid):
    children = Path(f"/proc/{pid}/task")
    found = []
    for task in children.iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def is_alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def walk(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)
