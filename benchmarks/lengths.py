"""What text length buckets make of texts as long as COCO's: `python benchmarks/lengths.py`."""

from __future__ import annotations

import collections

import numpy as np

from blip_jax import config
from blip_jax.bench.train import coco
from blip_jax.data import windows
from blip_jax.models import flops

BUCKETS = (12, 16, 20, 30)  # of text.buckets


def coco_step(cfg, seed: int = 0) -> float:
    """FLOPs per pair of a pre-training step of `cfg`, with its text.buckets, on two windows of texts as long as
    COCO's."""
    return flops.bucketed_step(
        cfg, flops.pretrain_step, coco(np.random.default_rng(seed), 2 * cfg.text.bucket_window * cfg.train.batch)
    )


def main() -> None:
    """Prints FLOPs a pair of the two sizes, padded and in buckets."""
    for size in ("base", "large"):
        cfg = config.base(size)
        with cfg.unlocked():
            cfg.text.buckets = BUCKETS
        T = windows.cut(
            coco(np.random.default_rng(0), cfg.text.bucket_window * cfg.train.batch), cfg.train.batch, BUCKETS
        )[1]
        shares = ", ".join(
            f"{t} positions {100 * n / len(T):.0f} %" for t, n in sorted(collections.Counter(T.tolist()).items())
        )
        original, padded = (flops.pretrain_step(cfg, way)["step"] for way in (True, False))
        bucketed = coco_step(cfg)
        print(
            f"pre-training, ViT {size}, GFLOP a pair: original {original / 1e9:.1f}; ours at {cfg.text.max_len} "
            f"positions "
            f"{padded / 1e9:.1f} ({padded / original:.3f}); in buckets {bucketed / 1e9:.1f} "
            f"({bucketed / original:.3f}), of the batches "
            f"{shares}"
        )


if __name__ == "__main__":
    main()
