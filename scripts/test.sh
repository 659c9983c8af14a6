#!/usr/bin/env bash
# Every test: fetches what they need, runs `cargo test`, then the client libraries against a node of its own, then
# holds a node against its OpenAPI document.
# Ends with `N passed, N failed` alone on a line; the exit code is 0 only when none failed.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

LOG=$TARGET/test-logs
TESTS_SECONDS_MAX=900

main() {
    find_python
    need_cargo
    need_compiler
    need_node
    mkdir -p "$TOOLS" "$LOG"
    scripts/fetch.sh --tests
    LIGHTCONE_TEST_DATA_DIR=$(cd "$DATA_DIR" && pwd)
    export LIGHTCONE_TEST_DATA_DIR
    find_redis_server
    python_clients=$(python_packages tests/sdk/requirements.txt)
    npm_clients=$(npm_packages tests/sdk)
    openapi_tools=$(python_packages tests/openapi/requirements.txt)

    cargo test --locked --no-run
    # Where nobody can press Ctrl-C, a test that hangs ends by itself, and everything it started with it.
    local limit=()
    [ -t 0 ] || limit=(timeout --kill-after=10 "$TESTS_SECONDS_MAX")
    rust_status=0
    "${limit[@]}" cargo test --locked --no-fail-fast 2>&1 | tee "$LOG/cargo.log" || rust_status=$?
    sdk_status=0 openapi_status=0
    if [ -x "$TARGET/debug/lightcone" ]; then
        "$PYTHON" tests/sdk/run.py --node "$TARGET/debug/lightcone" --fetched "$DATA_DIR" \
            --client "python=$python_clients" --client "npm=$npm_clients" 2>&1 | tee "$LOG/sdk.log" || sdk_status=$?
        PYTHONPATH=$openapi_tools "$PYTHON" tests/openapi/conformance.py --node "$TARGET/debug/lightcone" \
            --fetched "$DATA_DIR" 2>&1 | tee "$LOG/openapi.log" || openapi_status=$?
    else
        echo "sdk: 0 passed, 1 failed" | tee "$LOG/sdk.log"
        echo "openapi: 0 passed, 1 failed" | tee "$LOG/openapi.log"
        sdk_status=1 openapi_status=1
    fi
    report
}

# The tests run against an ordinary Redis where one is to be had, and against the fetched Valkey otherwise.
# Debian's redis-tools carries the server's program (redis-check-rdb is the same file, and serves when it is
# called by the server's name) without starting a service on the user's machine, as redis-server would.
find_redis_server() {
    if [ -n "${LIGHTCONE_TEST_REDIS_SERVER:-}" ]; then
        [ -x "$LIGHTCONE_TEST_REDIS_SERVER" ] || fail "LIGHTCONE_TEST_REDIS_SERVER is not a program: $LIGHTCONE_TEST_REDIS_SERVER"
    elif command -v redis-server >/dev/null; then
        LIGHTCONE_TEST_REDIS_SERVER=$(command -v redis-server)
    elif redis_from_debian; then
        ln -sf "$(command -v redis-check-rdb)" "$TOOLS/redis-server"
        LIGHTCONE_TEST_REDIS_SERVER=$TOOLS/redis-server
    else
        LIGHTCONE_TEST_REDIS_SERVER=$LIGHTCONE_TEST_DATA_DIR/bin/valkey-server
        echo "no redis-server here, so the tests use the fetched Valkey (on Debian: apt-get install redis-server)"
    fi
    export LIGHTCONE_TEST_REDIS_SERVER
    echo "Redis for the tests: $("$LIGHTCONE_TEST_REDIS_SERVER" --version)"
}

redis_from_debian() {
    if ! command -v redis-check-rdb >/dev/null; then
        [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
        echo "installing Debian's redis-tools for the tests"
        { apt_install redis-tools || { apt-get update -qq && apt_install redis-tools; }; } >"$LOG/apt.log" 2>&1 || return 1
    fi
    ln -sf "$(command -v redis-check-rdb)" "$TOOLS/redis-server" && "$TOOLS/redis-server" --version >/dev/null 2>&1
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" </dev/null
}

# Adds up the runners; a runner that failed without counting a failure counts as one.
report() {
    local counts passed failed
    counts=$(awk -v rust="$rust_status" -v sdk="$sdk_status" -v openapi="$openapi_status" '
        FILENAME ~ /cargo.log$/ && /^test result:/ { passed += $4; failed += $6; rust_failed += $6 }
        FILENAME ~ /sdk.log$/ && /^sdk: / { passed += $2; failed += $4; sdk_failed += $4; sdk_seen = 1 }
        FILENAME ~ /openapi.log$/ && /^openapi: / { passed += $2; failed += $4; openapi_failed += $4; openapi_seen = 1 }
        END {
            if (rust != 0 && rust_failed == 0) failed++
            if ((sdk != 0 || !sdk_seen) && sdk_failed == 0) failed++
            if ((openapi != 0 || !openapi_seen) && openapi_failed == 0) failed++
            print passed + 0, failed + 0
        }' "$LOG/cargo.log" "$LOG/sdk.log" "$LOG/openapi.log")
    read -r passed failed <<<"$counts"
    echo "$passed passed, $failed failed"
    [ "$failed" = 0 ] && [ "$passed" -gt 0 ]
}

main "$@"; exit
