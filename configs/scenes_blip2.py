"""BLIP-2 in miniature on the built-in world: its second stage, from which the demo derives all its runs.

The world is blip_jax/data/scenes/world.py, its easy side, as of configs/scenes.py. Paper rows: BLIP-2, arXiv
2301.12597, figure 5 and table 6, whose order the demo checks.
Data, drawn as needed, 48 px, four patches a cell of the world's grid: `world`, pictures with two true captions each.
The demo's language model learns from captions of other pictures, which it never sees. No crop, no flip.
Command: bash launch/demo.sh blip2, or blip-jax demo blip2 --workdir=runs/demo_blip2: two vocabularies, a BLIP, its
          tower and its words, from which the Q-Former starts, the language model, first stage with ITG and without,
          second stage with the first and without, captions, report. blip_jax/demo/blip2.py has the steps of each as
          shares of train.steps, which are the second stage's.
Learning rate and steps: those of the second stage were chosen so that it does not undo the first one, nor learns all
          by itself; the rate is the paper's, all before it has 1e-3.
Hardware: 2 CPU cores. What came out, in what time, and with which settings the paper's order is not there:
          docs/results.md.
"""

from blip_jax.config import blip2, source


def get_config():
    c = blip2("eva_tiny", "tiny", "opt_tiny")
    c.model.vit = dict(kind="vit", width=128, depth=2, heads=4, mlp=256, patch=8, pos_std=0.5)
    c.model.qformer = dict(width=96, layers=2, heads=4, mlp=192, positions=32, vocab_size=319, queries=8)
    c.model.llm = dict(
        kind="opt", width=96, layers=2, heads=4, mlp=192, embed_width=96, pre_norm=True, positions=50, vocab_size=384
    )
    c.model.init_std = 0.06
    c.model.img_size = 48
    c.model.embed_dim = 64
    c.model.dropout = c.model.llm_dropout = 0.0
    c.model.dtype = "float32"  # CPUs gain nothing from bfloat16
    c.text.max_len = 40  # true captions of this world have at most 37 tokens
    with c.data.unlocked():
        c.data.train.world = source("scenes", count=4000, captions=2, seed=2, size=48, easy=True)
    c.data.crop_scale = (1.0, 1.0)
    c.data.flip = False
    c.optim.lr = 1e-4  # of the second stage, as the paper
    c.optim.min_lr = 1e-5
    c.optim.warmup_steps = 100
    c.optim.decay_mask = "kernels"
    c.optim.clip = 1.0
    c.train.batch = 16
    c.train.steps = 300
    c.train.log_every = 100
    c.train.save_every = 300
    c.train.keep = 1
    c.eval.k = 32
    c.eval.loss_examples = 0  # a program more to compile for each stage
    return c
