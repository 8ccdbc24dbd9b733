#!/usr/bin/env bash
# Lint, types, tests. What CI runs.
#   scripts/test.sh [PYTEST ARGUMENTS...]          scripts/test.sh -n 0 -x tests/test_files.py
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/install.sh"
cd "$root"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Types are checked beside the tests, on one core for a minute; what is found is said at the end.
found=$(mktemp)
trap 'rm -f "$found"' EXIT
.venv/bin/mypy >"$found" 2>&1 &
types=$!
# What is compiled is kept: otherwise each worker, and each process that a test starts, compiles all of it again.
export PYTHONDONTWRITEBYTECODE=
# A worker for each core, with one thread: tiny models gain nothing from more.
export OMP_NUM_THREADS=1
failed=0
.venv/bin/python -m pytest -n logical --maxprocesses 8 --dist worksteal "$@" || failed=$?
wait "$types" || failed=1
cat "$found"
exit "$failed"
