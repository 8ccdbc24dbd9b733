#!/usr/bin/env bash
# A gate for a pipeline: prune, and stop it where the pruned model's perplexity is more than RATIO times the dense one's.
#   MODEL=smollm2 RATIO=1.5 scripts/ci_example.sh FOLDER [OVERRIDES...]
# Exits 0 if the model passes, 3 if it is worse (checkpoint and reports are in FOLDER all the same), 2 if the command is wrong.
set -uo pipefail
out=${1:?a folder for the result}
"${ACE_PRUNE:-ace-prune}" "model=${MODEL:-smollm2}" "gate.max_ppl_ratio=${RATIO:-1.5}" "output_dir=$out" "${@:2}"
code=$?
case $code in
    0) echo "passed: $out/report.html" ;;
    3) echo "too bad to ship: $out/report.html" >&2 ;;
    *) echo "not measured (exit code $code)" >&2 ;;
esac
exit $code
