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

need_node() {
    command -v node >/dev/null && command -v npm >/dev/null ||
        fail "node and npm are needed for the client tests (on Debian: apt-get install nodejs npm)"
}

# Prints the folder of what a requirements file pins, after installing it there. The folder is named by what was
# asked for; no virtual environment is needed, and an interrupted install is never taken for a whole one.
python_packages() {
    local version folder
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    folder=$TOOLS/python-$version-$(sha256sum "$1" | cut -c1-16)
    if [ ! -d "$folder" ]; then
        echo "installing $1" >&2
        rm -rf "$folder.unfinished"
        PIP_REQUIRE_VIRTUALENV=0 PIP_ROOT_USER_ACTION=ignore "$PYTHON" -m pip install --quiet --no-input \
            --disable-pip-version-check --no-deps --no-compile --only-binary=:all: \
            --target "$folder.unfinished" --requirement "$1" </dev/null >&2 || fail "pip could not install $1"
        mv "$folder.unfinished" "$folder" || fail "$folder cannot be written"
    fi
    echo "$folder"
}

# The same for a folder with a package.json and its lock file.
npm_packages() {
    local folder
    folder=$TOOLS/npm-$(cat "$1/package.json" "$1/package-lock.json" | sha256sum | cut -c1-16)
    if [ ! -d "$folder" ]; then
        echo "installing $1/package-lock.json" >&2
        rm -rf "$folder.unfinished"
        mkdir -p "$folder.unfinished"
        cp "$1/package.json" "$1/package-lock.json" tests/sdk/.npmrc "$folder.unfinished"
        (cd "$folder.unfinished" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error </dev/null) >&2 ||
            fail "npm could not install $1/package-lock.json"
        mv "$folder.unfinished" "$folder" || fail "$folder cannot be written"
    fi
    echo "$folder"
}

DATA_DIR=${DATA_DIR:-.lightcone}
TARGET=${CARGO_TARGET_DIR:-target}
case $TARGET in /*) ;; *) TARGET=$PWD/$TARGET ;; esac
TOOLS=$TARGET/test-tools
