#!/bin/sh
# Fetches, builds and becomes the node, so that Ctrl-C and signals reach it and nothing stands between.
# Arguments go to `lightcone serve`.
set -eu
cd "$(dirname "$0")/.."
. scripts/common.sh

if [ -n "${PORT:-}" ]; then
    case $PORT in
        *[!0-9]*) fail "PORT must be a number, not '$PORT'" ;;
    esac
    export LIGHTCONE_LISTEN="127.0.0.1:$PORT"
fi
need_cargo
need_compiler
scripts/fetch.sh
cargo build --release --locked
export LIGHTCONE_DATA_DIR="$DATA_DIR"
exec "${CARGO_TARGET_DIR:-target}/release/lightcone" serve "$@"
