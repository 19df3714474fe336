"""The paper in miniature on the built-in world (blip_jax/data/scenes.py): the pre-training that the demo runs once per corpus.

Data, drawn as needed, 48 px: `human`, few pictures with five true captions each, and `web`, many with one, most of them noise. No
crop, flip or RandAugment: places, sides and colours are what the captions speak of. Negatives come from the batch alone.
Commands: bash launch/demo.sh, or blip-jax demo --workdir=runs/demo: vocabulary, five pre-trainings, captioner and filter, CapFilt,
          report; the first pre-training by hand
          blip-jax vocab --scenes=20000 --size=256 --out=runs/scenes/vocab.txt
          blip-jax train --config=configs/scenes.py --workdir=runs/scenes --config.text.vocab=runs/scenes/vocab.txt
Hardware: 2 CPU cores.
"""
from blip_jax.config import base, source


def get_config():
    c = base("tiny")
    c.model.vit = dict(width=128, depth=2, heads=4, mlp=256, patch=8)
    c.model.med = dict(width=96, layers=2, heads=4, mlp=192, positions=32, vocab_size=258)  # 256, [DEC] and [ENC]
    c.model.img_size = 48
    c.model.embed_dim = 128
    c.model.dropout = 0.0
    c.model.dtype = "float32"  # CPUs gain nothing from bfloat16
    c.text.max_len = 24
    with c.data.unlocked():
        c.data.train.human = source("scenes", count=2000, captions=5, seed=2, size=48, objects=1, weight=2000.0)
        c.data.train.web = source("scenes", count=12_000, seed=3, size=48, objects=1, noise=0.6, weight=12_000.0)
        c.data.eval.scenes = source("scenes", count=250, seed=1, size=48, objects=1)
    c.data.crop_scale = (1.0, 1.0)
    c.data.randaugment = False
    c.data.flip = False
    c.loss.momentum = False
    c.loss.queue = 0
    c.optim.lr = 2e-3
    c.optim.min_lr = 1e-5
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 200
    c.optim.b2 = 0.98
    c.optim.decay_mask = "kernels"
    c.optim.clip = 1.0
    c.train.batch = 16
    c.train.steps = 2200
    c.train.log_every = 100
    c.train.save_every = 1000
    c.train.keep = 1
    c.eval.k = 250  # every pair: re-ranking does not depend on the shortlist
    return c
