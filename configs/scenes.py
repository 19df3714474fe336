"""The paper in miniature on the built-in world: the pre-training that the demo runs once per corpus.

The world is blip_jax/data/scenes/world.py.
Data, drawn as needed, 48 px, four patches a cell of the world's grid: `human`, few pictures with five true captions
each, and `web`, many with one, most of them noise. No crop, flip or RandAugment. Negatives come from the batch alone.
What makes so small a model learn in minutes: wider initial weights, a position table as large as the patches, patches
small enough to tell a shape by, and the easy side of the world; on the whole world a captioner learns colours in this
time, but not yet places.
Commands: bash launch/demo.sh, or blip-jax demo --workdir=runs/demo: vocabulary, five pre-trainings, captioner and
          filter, CapFilt, report; with --quick two pre-trainings, of :quick, fewer steps on fewer pictures; the
          first pre-training by hand
          blip-jax vocab --scenes=20000 --size=318 --out=runs/scenes/vocab.txt
          blip-jax train --config=configs/scenes.py --workdir=runs/scenes --config.text.vocab=runs/scenes/vocab.txt
Hardware: 2 CPU cores, 1.5 min; the whole demo 11 min. What came out: docs/results.md.
"""

from blip_jax.config import base, source

ARGUMENTS = ("", "quick")


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(f"configs/scenes.py has no run {argument!r}: give one of :quick after it, or nothing")
    c = base("tiny")
    c.model.vit = dict(width=128, depth=2, heads=4, mlp=256, patch=8, pos_std=0.5)
    c.model.med = dict(width=96, layers=2, heads=4, mlp=192, positions=32, vocab_size=320)  # 318, [DEC] and [ENC]
    c.model.init_std = 0.06
    c.model.img_size = 48
    c.model.embed_dim = 128
    c.model.dropout = 0.0
    c.model.dtype = "float32"  # CPUs gain nothing from bfloat16
    c.text.max_len = 20
    with c.data.unlocked():
        c.data.train.human = source("scenes", count=500, captions=5, seed=2, size=48, easy=True, weight=500.0)
        c.data.train.web = source("scenes", count=8000, seed=3, size=48, easy=True, noise=0.8, weight=8000.0)
        c.data.eval.scenes = source("scenes", count=250, seed=1, size=48, easy=True)
    c.data.crop_scale = (1.0, 1.0)
    c.data.randaugment = False
    c.data.flip = False
    c.loss.momentum = False
    c.loss.queue = 0
    c.optim.lr = 1e-3
    c.optim.min_lr = 1e-5
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 200
    c.optim.b2 = 0.98
    c.optim.decay_mask = "kernels"
    c.optim.clip = 1.0
    c.train.batch = 16
    c.train.steps = 1050
    c.train.log_every = 100
    c.train.save_every = 500
    c.train.keep = 1
    # as in the paper a shortlist: of pairs far apart, which training never shows it, the matching head knows nothing
    c.eval.k = 32
    c.eval.loss_examples = 0  # a program more to compile
    if argument == "quick":
        c.data.train.web.count = 1500
        c.data.train.web.weight = 1500.0
        c.optim.warmup_steps = 100
        c.train.steps = 400
    return c
