#!/usr/bin/env bash
# For a machine with a CUDA GPU: the same masks as on the CPU, no waiting for the GPU inside a block, and the times.
#   scripts/check_cuda.sh [MODEL_FOLDER]     without a folder: the small embedded model
# Exit codes: 0 all is well, 1 a check failed, 2 no GPU here.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/install.sh"
exec "$root/.venv/bin/python" "$root/scripts/check_cuda.py" "$@"
