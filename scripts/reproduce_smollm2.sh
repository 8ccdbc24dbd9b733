#!/usr/bin/env bash
# The README's table on SmolLM2-135M, written by table.py: metrics, and recipes with repair, allocation and permutation.
#   CALIB=pages.jsonl EVAL=wiki.jsonl scripts/reproduce_smollm2.sh FOLDER
# Both are files with a "text" column; without them the model writes its own. SEEDS (0,1,2) are calibration seeds,
# ONLY="best wanda_128" runs those sweeps alone.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:?a folder for the results}
seeds=${SEEDS:-0,1,2}
calib=(calib=self)
eval=(eval=self)
[ -z "${CALIB:-}" ] || calib=(calib=text "calib.path=$CALIB")
[ -z "${EVAL:-}" ] || eval=(eval=text "eval.path=$EVAL" eval.seq_len=1024 eval.max_windows=10)
prune() { # NAME OVERRIDES...: one sweep; finished ones are kept
    [[ " ${ONLY:-$1} " == *" $1 "* ]] || return 0
    [ -f "$out/$1/sweep.json" ] || "${ACE_PRUNE:-ace-prune}" -m model=smollm2 "${calib[@]}" "${eval[@]}" \
        calib.seed="$seeds" keep_checkpoint=false "output_dir=$out/$1" "${@:2}"
}
patterns='sparsity=0.5,0.6,2:4,4:8' three='sparsity=0.5,0.6,2:4' two='sparsity=0.5,2:4'
seeds=0 prune magnitude metric=magnitude "$patterns"
prune metrics metric=wanda,ria,varp,ria_varp,cosp,ace "$patterns"
prune literal metric=varp metric.norm=raw metric.form=poly,series "$two" # Equations 5 and 7
prune cosp_paper metric=cosp metric.mode=paper,paper_abs "$two"
prune wanda_128 metric=wanda "$patterns" calib.seq_len=128
prune wanda_1024 metric=wanda "$two" calib.n_samples=1024 # as many tokens, in windows of 16
prune written metric=varp,ace "$patterns" calib.continue_to=128 # windows of 16 that the model writes on
prune sparsegpt_128 metric=sparsegpt "$three" calib.seq_len=128 propagate=block
prune wanda_admm_128 metric=wanda repair=admm repair.iterations=20 repair.shrinkage=0.1 repair.polish=0 "$three" \
    calib.seq_len=128
prune best experiment=best "$three"
prune best_packed experiment=best "$three" calib.pack=512
prune best_atp experiment=best allocation=atp sparsity=0.5,0.6
prune best_permuted experiment=best sparsity=2:4 permute=ria
prune best_long experiment=best_long "$three"
prune best_long_untrained experiment=best_long recover=none calib.continue_to=256 "$three"
prune best_long_permuted experiment=best_long recover=none calib.continue_to=256 sparsity=2:4 permute=ria
prune packed metric=wanda,ria,varp,ria_varp,ace "$patterns" calib.pack=128 # the same tokens in rows of 128
prune ace_permuted metric=ace sparsity=2:4 permute=ria
prune ace_scores metric=ace metric.sweeps=0 "$patterns" # before the exchanges
prune swaps metric=varp repair=swaps "$patterns"
"${PYTHON:-python3}" "$root/scripts/table.py" "$out"
