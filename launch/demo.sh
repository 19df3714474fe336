#!/usr/bin/env bash
# The paper in miniature on the built-in world: pre-training, captioner and filter, CapFilt, pre-training anew, an HTML report;
# needs only Python >= 3.11 and git.
# Outputs go to runs/demo; run again, it resumes. Arguments are passed on: bash launch/demo.sh --config.train.steps=100
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_project ""
cd "$root"
# glibc: keep large buffers between steps instead of returning them to the system and faulting them in again (a third faster).
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1000000000}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4000000000}"
echo "== blip-jax demo --workdir=runs/demo $*"
exec "$python" -m blip_jax demo --workdir=runs/demo "$@"
