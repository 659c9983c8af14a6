# Shared by the scripts of this folder; sourced, never run. Expects the repository's root as working folder.

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# The Python that runs our helpers: $PYTHON, else python3.
find_python() {
    PYTHON=${PYTHON:-python3}
    command -v "$PYTHON" >/dev/null 2>&1 || fail "$PYTHON is not on PATH (on Debian: apt-get install python3 python3-pip)"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 8))' || fail "$PYTHON is older than Python 3.8"
    export PYTHON
}

need_cargo() {
    command -v cargo >/dev/null 2>&1 || fail "cargo is not on PATH: install Rust 1.92 or newer"
}

need_compiler() {
    command -v cc >/dev/null 2>&1 || fail "no C compiler (cc) on PATH, Rust links with it (on Debian: apt-get install gcc libc6-dev)"
}

DATA_DIR=${DATA_DIR:-.lightcone}
