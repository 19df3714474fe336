"""A small model on 4100 photographs at 128 px with five captions each: a laptop learns real images in a quarter of an hour.

Data: BLIP's JSON layout, data/photos/train.json (3600 photographs) and data/photos/val.json (500), rows {"image",
"caption", "image_id"}, image paths relative to data/photos; --config.data.train.photos.path and .images point elsewhere.
Commands: blip-jax vocab --captions=data/photos/train.json --size=4000 --out=data/photos/vocab.txt
          blip-jax train --config=configs/photos.py --workdir=runs/photos
Hardware: 2 CPU cores, 15 minutes. Expected: losses fall, R@10 both ways far above chance (2 %). Unverified.
"""
from blip_jax.config import base, source


def get_config():
    c = base("small")
    c.model.img_size = 128
    c.model.vit.patch = 16
    c.model.med.vocab_size = 4002  # 4000, [DEC] and [ENC]
    c.model.embed_dim = 128
    c.model.dtype = "float32"  # CPUs gain nothing from bfloat16
    c.text.vocab = "data/photos/vocab.txt"
    c.text.max_len = 24
    with c.data.unlocked():
        c.data.train.photos = source("json", "data/photos/train.json", images="data/photos")
        c.data.eval.photos = source("json", "data/photos/val.json", images="data/photos")
    c.data.crop_scale = (0.5, 1.0)
    c.loss.queue = 2048
    c.train.batch = 64
    c.train.steps = 1200
    c.train.log_every = 20
    c.train.save_every = 200
    c.optim.lr = 5e-4
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 100
    return c
