#!/usr/bin/env bash
# A paper in miniature on the built-in world, with an HTML report at the end; needs only Python >= 3.11 and git.
#   bash launch/demo.sh          BLIP: pre-training, captioner and filter, CapFilt, pre-training anew; in runs/demo
#   bash launch/demo.sh --quick  the same in three minutes, without three of its five corpora; in runs/demo_quick
#   bash launch/demo.sh blip2    BLIP-2: tower, language model, both stages, and without one; in runs/demo_blip2
#   bash launch/demo.sh tasks    BLIP fine-tuned for captions, questions, pairs of pictures, dialogs; in runs/demo_tasks
# Run again, it resumes. Arguments are passed on: bash launch/demo.sh --config.train.steps=100
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
extra=""
case "${1:-}" in
  --quick) set -- --quick --workdir=runs/demo_quick "${@:2}" ;;
  blip2) set -- blip2 --workdir=runs/demo_blip2 "${@:2}" ;;
  tasks)
    extra="eval"  # captions are scored by the official programs
    set -- tasks --workdir=runs/demo_tasks "${@:2}"
    ;;
  *) set -- --workdir=runs/demo "$@" ;;
esac
install_project "$extra"
cd "$root"
# glibc: keep large buffers between steps instead of returning them to the system and faulting them in again (a third faster).
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1000000000}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4000000000}"
echo "== blip-jax demo $*"
exec "$python" -m blip_jax demo "$@"
