#!/usr/bin/env bash
# A first hour on a GPU in eight minutes: bash benchmarks/gpu.sh [PART...] [--out=DIR] [--seconds=440] [--rehearse]
# Parts: a card and goldens, b our step, c PyTorch's, d captions and filter, e ViT-L, g batch 256, h autotuned; all of
# them where none is named. Results, log and tables of kernels lie in DIR (benchmarks/README.md).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python3}" "$here/gpu/run.py" "$@"
