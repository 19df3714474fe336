"""Lengths of caption texts, and what text length buckets make of them: `python -m blip_jax.bench.lengths`.

COCO counts the positions that captions take in BERT's word pieces with [CLS] and [SEP], after the original's cleaning:
1151 captions of about 240 images of COCO's validation and test splits. 13.0 on average; half take at most 12, 1 in 70
more than 20.
"""

from __future__ import annotations

import collections

import numpy as np

from blip_jax import config
from blip_jax.data import windows
from blip_jax.models import flops

COCO = {
    9: 5,
    10: 127,
    11: 211,
    12: 234,
    13: 186,
    14: 148,
    15: 94,
    16: 59,
    17: 33,
    18: 18,
    19: 10,
    20: 10,
    21: 5,
    22: 1,
    23: 1,
    25: 4,
    26: 2,
    28: 1,
    29: 1,
    30: 1,
}  # positions -> captions
BUCKETS = (12, 16, 20, 30)  # of text.buckets


def coco(rng: np.random.Generator, n: int) -> np.ndarray:
    """i64[n]: lengths drawn from COCO."""
    counts = np.array(list(COCO.values()))
    return rng.choice(list(COCO), size=n, p=counts / counts.sum())


def coco_step(cfg, seed: int = 0) -> float:
    """FLOPs per pair of a step of `cfg`, with its text.buckets, on two windows of texts as long as COCO's."""
    return flops.bucketed_step(cfg, coco(np.random.default_rng(seed), 2 * cfg.text.bucket_window * cfg.train.batch))


def main() -> None:
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
            f"pre-training, ViT {size}, GFLOP a pair: original {original / 1e9:.1f}; ours at {cfg.text.max_len} positions "
            f"{padded / 1e9:.1f} ({padded / original:.3f}); in buckets {bucketed / 1e9:.1f} ({bucketed / original:.3f}), of the batches "
            f"{shares}"
        )


if __name__ == "__main__":
    main()
