#!/usr/bin/env bash
# Compiles the plans of this folder that are missing and rewrites README.md and ../scaling.svg. Needs `pip install -e ".[tpu]"`, no TPU;
# for the plans of GPUs `pip install -e ".[cuda]"`, without which they are left out, and no GPU.
# One plan takes 4 to 9 minutes of a core and 6 GB. Two of these may run side by side, each takes the next that nobody has begun; the one that
# ends last leaves the whole table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
begun=${PLANS_BEGUN:-$(mktemp -d)}  # an empty folder, the same one for runs side by side

plan() { # name, flags
  local name=$1 out=benchmarks/plans/$1.json
  shift
  if [[ ! -f $out ]] && mkdir "$begun/$name" 2>/dev/null; then
    echo "== $name"
    blip-jax plan "$@" --out="$out"
  fi
}
train() { # name, argument of pretrain.py, "rows in all, queue, rows of a group" or "" for the config's own, flags
  local name=$1 config=--config=configs/pretrain.py:$2 rows queue group
  read -r rows queue group <<<"$3"
  shift 3
  if [[ $rows ]]; then
    set -- --config.train.batch="$rows" --config.loss.queue="$queue" --config.loss.group_size="$group" "$@"
  fi
  plan "$name" "$config" "$@"
}

# the configs as they are (2880 and 2400 rows), and where those do not divide or leave a chip idle, the nearest
train vitb_14m_v5e-4x8 vitb,14m "" --topology=v5e:4x8 --config.model.remat=full
train vitb_129m_v5e-4x8 vitb,129m "" --topology=v5e:4x8 --config.model.remat=full
train vitb_14m_v5p-4x4x4 vitb,14m "" --topology=v5p:4x4x4
train vitb_129m_v5p-4x4x4 vitb,129m "" --topology=v5p:4x4x4
train vitb_14m_v6e-16x16_64-a-chip vitb,14m "16384 65536 64" --topology=v6e:16x16
train vitb_129m_v6e-16x16_64-a-chip vitb,129m "16384 65536 64" --topology=v6e:16x16
train vitl_129m_v5e-4x8 vitl,129m "" --topology=v5e:4x8 --config.mesh.fsdp=8 --config.model.remat=full
train vitl_129m_v5e-16x16 vitl,129m "2560 56320 10" --topology=v5e:16x16
train vitl_129m_v6e-8x8_2-slices vitl,129m "2560 56320 20" --topology=v6e:8x8 --slices=2
train vitl_129m_v6e-8x8_2-slices_64-a-chip vitl,129m "8192 57344 64" --topology=v6e:8x8 --slices=2
train vitl_129m_v6e-4x8_2-slices_64-a-chip vitl,129m "4096 57344 64" --topology=v6e:4x8 --slices=2
train vitb_14m_v4-4x4x4 vitb,14m "" --topology=v4:4x4x4
train vitb_14m_v7x-2x4x4 vitb,14m "" --topology=v7x:2x4x4
plan capfilt_vitl_v5e-2x2 --config=configs/capfilt.py --captioner=configs/caption_coco.py:vitl --filter=configs/retrieval_coco.py:vitl \
  --topology=v5e:2x2

# BLIP-2; 1520 rows of the stages with FlanT5 divide neither 32 nor 64 chips
stage2=--config=configs/blip2_stage2.py:vitg
plan blip2_stage1_vitg_v5e-4x4 --config=configs/blip2_stage1.py:vitg --topology=v5e:4x4 --config.model.remat=full
plan blip2_stage2_vitg-opt2.7b_v5e-4x8 $stage2,opt2.7b --topology=v5e:4x8 --config.mesh.fsdp=8
plan blip2_stage2_vitg-flant5xl_v5e-4x8 $stage2,flant5xl --topology=v5e:4x8 --config.mesh.fsdp=8 --config.train.batch=1536
plan blip2_stage2_vitg-flant5xxl_v5p-4x4x4 $stage2,flant5xxl --topology=v5p:4x4x4 --config.train.batch=1536

# GPUs; vitb_14m is the program of vitb_129m, compiled once for both
if python -c 'from blip_jax.plan import gpus; raise SystemExit(not gpus.installed())'; then
  train vitb_14m_h100-8 vitb,14m "" --topology=h100:8 --config.model.remat=full
  train vitb_129m_h100-8 vitb,129m "" --topology=h100:8 --config.model.remat=full
  train vitl_129m_h100-8 vitl,129m "" --topology=h100:8 --config.model.remat=full
  train vitb_14m_h100-8_4-hosts vitb,14m "" --topology=h100:8 --hosts=4
  train vitb_129m_h100-8_4-hosts vitb,129m "" --topology=h100:8 --hosts=4
  train vitl_129m_h100-8_4-hosts vitl,129m "" --topology=h100:8 --hosts=4 --config.model.remat=dots
  plan blip2_stage2_vitg-flant5xxl_h100-8 $stage2,flant5xxl --topology=h100:8 --config.mesh.fsdp=8 --config.model.remat=full
fi

# ViT-B, 64 rows a chip
train scaling-v5e-64_a_chip-16 vitb,14m "1024 57344 64" --topology=v5e:4x4 --config.model.remat=dots
train scaling-v5e-64_a_chip-64 vitb,14m "4096 57344 64" --topology=v5e:8x8 --config.model.remat=dots
train scaling-v5e-64_a_chip-256 vitb,14m "16384 65536 64" --topology=v5e:16x16 --config.model.remat=dots
train scaling-v5p-64_a_chip-16 vitb,14m "1024 57344 64" --topology=v5p:2x2x4
train scaling-v5p-64_a_chip-64 vitb,14m "4096 57344 64" --topology=v5p:4x4x4
train scaling-v5p-64_a_chip-256 vitb,14m "16384 65536 64" --topology=v5p:4x8x8
train scaling-v5p-64_a_chip-1024 vitb,14m "65536 65536 64" --topology=v5p:8x8x16
train scaling-v5p-64_a_chip-4096 vitb,14m "262144 262144 64" --topology=v5p:16x16x16
train scaling-v6e-64_a_chip-16 vitb,14m "1024 57344 64" --topology=v6e:4x4
train scaling-v6e-64_a_chip-64 vitb,14m "4096 57344 64" --topology=v6e:8x8

# ViT-B, the paper's 2880 rows (or the nearest that divide) over more and more chips
train scaling-v5e-paper-64 vitb,14m "2880 57600 45" --topology=v5e:8x8 --config.model.remat=dots
train scaling-v5e-paper-128 vitb,14m "2816 56320 22" --topology=v5e:8x16
train scaling-v5e-paper-256 vitb,14m "2816 56320 11" --topology=v5e:16x16
train scaling-v5e-paper-512 vitb,14m "2560 56320 5" --topology=v5e:16x16 --slices=2
train scaling-v5p-paper-256 vitb,14m "2816 56320 11" --topology=v5p:4x8x8
train scaling-v5p-paper-1024 vitb,14m "3072 55296 3" --topology=v5p:8x8x16
train scaling-v6e-paper-64 vitb,14m "2880 57600 45" --topology=v6e:8x8
train scaling-v6e-paper-256 vitb,14m "2816 56320 11" --topology=v6e:16x16

cd benchmarks/plans
[[ ! -f vitb_14m_v6e-16x16_64-a-chip.json ]] || cp vitb_14m_v6e-16x16_64-a-chip.json scaling-v6e-64_a_chip-256.json  # one program
cd ../..
python benchmarks/plans.py benchmarks/plans
