#!/usr/bin/env bash
# Lint, types, tests. What CI runs.
#   scripts/test.sh [PYTEST ARGUMENTS...]          scripts/test.sh -n 0 -x tests/test_files.py
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/install.sh"
cd "$root"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# A worker for each core, with one thread: tiny models gain nothing from more.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n logical --maxprocesses 8 --dist worksteal "$@"
