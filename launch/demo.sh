#!/usr/bin/env bash
# A paper in miniature on the built-in world, with an HTML report at the end; needs only Python >= 3.11 and git.
#   bash launch/demo.sh          BLIP: pre-training, captioner and filter, CapFilt, pre-training anew; in runs/demo
#   bash launch/demo.sh blip2    BLIP-2: tower, language model, both stages, and without one; in runs/demo_blip2
# Run again, it resumes. Arguments are passed on: bash launch/demo.sh --config.train.steps=100
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_project ""
cd "$root"
# glibc: keep large buffers between steps instead of returning them to the system and faulting them in again (a third faster).
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1000000000}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4000000000}"
if [[ "${1:-}" == blip2 ]]; then
  shift
  set -- blip2 --workdir=runs/demo_blip2 "$@"
else
  set -- --workdir=runs/demo "$@"
fi
echo "== blip-jax demo $*"
exec "$python" -m blip_jax demo "$@"
