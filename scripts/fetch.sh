#!/bin/sh
# Fetches the pinned files of scripts/pins.tsv into $DATA_DIR.
set -eu
cd "$(dirname "$0")/.."
. scripts/common.sh
find_python
exec "$PYTHON" scripts/fetch.py --data-dir "$DATA_DIR" "$@"
