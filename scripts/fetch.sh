#!/bin/sh
# Fetches the pinned files of scripts/pins.tsv into $DATA_DIR; with --tests, those of scripts/pins-test.tsv too.
set -eu
cd "$(dirname "$0")/.."
. scripts/common.sh
find_python
exec "$PYTHON" scripts/fetch.py --data-dir "$DATA_DIR" "$@"
