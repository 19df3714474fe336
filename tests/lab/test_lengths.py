"""benchmarks/lengths.py: texts as long as COCO's, in buckets."""

import lengths
import numpy as np
import pytest

from blip_jax import config
from blip_jax.bench import train
from blip_jax.models import flops


def test_buckets_need_few_positions_on_texts_as_long_as_cocos():
    """The original's step at its 30 positions is the measure."""
    drawn = train.coco(np.random.default_rng(1), 20_000)
    assert drawn.min() >= 3 and drawn.max() <= 30 and drawn.mean() == pytest.approx(13.0, abs=0.1)
    cfg = config.base("base")
    cfg.loss.group_size = 75  # columns of one original GPU
    original = flops.pretrain_step(cfg, original=True)["step"]
    with cfg.unlocked():
        cfg.text.buckets = lengths.BUCKETS
    assert flops.pretrain_step(cfg)["step"] <= 1.03 * 252.4e9
    assert 195.1e9 < lengths.coco_step(cfg) <= 0.72 * original
    with cfg.unlocked():
        cfg.train.batch, cfg.text.bucket_window = 4, 3
    of = lambda T: flops.pretrain_step(cfg, T=T)["step"]
    # a window of 12 16 16, another of 12 30, and two texts too few for a third batch
    counted = [9, 13] * 6 + [30] + [9] * 9
    expected = (of(12) * 2 + of(16) * 2 + of(30)) / 5
    assert flops.bucketed_step(cfg, flops.pretrain_step, np.array(counted)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="3 lengths do not fill a batch of train.batch=4"):
        flops.bucketed_step(cfg, flops.pretrain_step, np.array([9] * 3))
