#!/usr/bin/env bash
# Does a wheel work away from the checkout? Builds it, unpacks it beside the installed dependencies, and runs it elsewhere.
#   ./scripts/check_wheel.sh          about half a minute; needs the packages of .venv and an index for hatchling
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work" "$root"
"$python" -m pip install --quiet --no-deps --target "$work/site" "$work"/*.whl
cd "$work"
run() { PYTHONPATH="$work/site" "$python" -P -m ace_cli "$@"; }
run --version
[ "$(PYTHONPATH="$work/site" "$python" -P -c 'import ace_cli; print(ace_cli.__file__)')" = "$work/site/ace_cli/__init__.py" ]
run preset=best --cfg job | grep -q 'repair=sparsegpt'
run model=smollm2 dry_run=true
ls "$work/site/bin"
echo "The wheel works."
