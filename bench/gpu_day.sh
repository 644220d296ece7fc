#!/usr/bin/env bash
# A day with a GPU: `prepare DIR` on a machine with everything, then `parity`, `speed` and `chain` on one with a CUDA GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m bench.gpu_day "$@"
