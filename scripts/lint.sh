#!/usr/bin/env bash
# Formatting, clippy with warnings denied, and what must not stand in the tree.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

need_cargo
need_compiler
cargo fmt --check || fail "run cargo fmt"

# Paths of one machine do not belong into the tree. The patterns are split so as not to find themselves.
paths="(^|[^[:alnum:]_.}/-])/(ro""ot/|ho""me/[a-z]|wo""rk/|tmp/d""l)"
if git grep --cached -nIE "$paths" -- . ':!Cargo.lock'; then
    fail "the lines above name a path of one machine"
fi
if git grep --cached -n '"resolved"' -- '*package-lock.json'; then
    fail "a lock file names download addresses; run npm there with the .npmrc of tests/sdk"
fi

cargo clippy --all-targets --locked -- -D warnings
