"""A tiny BLIP on the built-in world (blip_jax/data/scenes.py), the job of the demo: text finds pictures in minutes.

Data: drawn as needed, 48 px; a twentieth of the training captions is web noise. No crop, flip or RandAugment: places, sides
and colours are what the captions speak of. Negatives come from the batch alone; many small steps beat few large ones.
Commands: bash launch/demo.sh, or blip-jax demo --workdir=runs/demo: vocabulary, training, evaluation, table; by hand
          blip-jax vocab --scenes=20000 --size=256 --out=runs/scenes/vocab.txt
          blip-jax train --config=configs/scenes.py --workdir=runs/scenes --config.text.vocab=runs/scenes/vocab.txt
Hardware: 2 CPU cores, 6 min 27 s from a fresh clone, 316 images/s. Text to image R@1 47.0, R@5 90.5, R@10 99.0; image to text
51.0, 91.5, 99.5 (chance 0.5, 2.5, 5.0). A perfect reader of the captions has a text to image R@1 of 97.
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
        c.data.train.scenes = source("scenes", count=200_000, seed=0, size=48, noise=0.05)
        c.data.eval.scenes = source("scenes", count=200, seed=1, size=48)
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
    c.train.steps = 6500
    c.train.log_every = 250
    c.train.save_every = 2000
    c.eval.k = 64
    return c
