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
if git grep --cached -nIE "$paths" -- . ':!Cargo.lock' ':!tests/sdk/node_modules'; then
    fail "the lines above name a path of one machine"
fi
if grep -n '"resolved"' tests/sdk/package-lock.json; then
    fail "tests/sdk/package-lock.json names download addresses; run npm there with its .npmrc"
fi

cargo clippy --all-targets --locked -- -D warnings
