"""First stage of BLIP-2's pre-training: the Q-Former with a frozen tower at 224 px, 129M images, 250k steps.

Paper rows: BLIP-2, arXiv 2301.12597, section 3.4 and table 5 (zero-shot numbers come after the second stage, table 1).
Command, with one of the arguments below:
  blip-jax train --config=configs/blip2_stage1.py:vitg --workdir=runs/blip2_stage1_vitg

  vitg    EVA-CLIP ViT-g/14, batch 1680
  vitl    CLIP ViT-L/14, batch 2320

Starts from the tower and from BERT-base, two files whose parameters add up: the second feed-forward of each layer, the
queries' own, starts as a copy of BERT's; cross-attention, queries and heads start random.
Data: COCO and Visual Genome captions as JSON with image folders; CC3M + CC12M + SBU as ArrayRecord shards and LAION's
115M as tar shards, with captions of CapFilt (`configs/capfilt.py`): the paper ranks ten captions of each web image by
CLIP ViT-L/14 and keeps the best two, one of which is drawn in a step.
Hardware: the paper's authors used 16 A100 40GB; ViT-g less than 6 days. Unverified here: no run of this size was made.
16 GB a chip are too few for 105 rows of ViT-g as they are (docs/plan.md): --config.model.remat=full keeps less.
Expected loss levels, of a public run with 4.6M pairs: 17.8 in the first step, 6.6 after 4,500 steps of 1,024, 5.2 after
ten epochs.
Hyper-parameters, the paper's: AdamW, beta 0.9 and 0.98, weight decay 0.05, peak 1e-4 after 2,000 linear steps, cosine;
random resized crop and flip. LAVIS's released settings differ: batch 1600, beta2 0.999, 5,000 steps of warm-up, 10
epochs with a rate constant within each: --config.optim.b2=0.999 --config.optim.schedule=epoch_cosine, ...
Differences: negatives and contrastive columns are of the whole batch, as in the original. The language modelling loss
is a mean over the tokens of the whole batch; the original averages each of 16 GPUs' means: --config.task.lm_group=105
(vitl 145). Negatives are drawn by LAVIS's rule since July 2023; the published checkpoints, of before, by the other:
--config.task.negatives=floored. Texts of the same image are not told apart, as in the original.
"""

from blip_jax.config import blip2, source
from blip_jax.tasks import blip2_stage1

ARGUMENTS = ("vitg", "vitl")
BATCH = {"vitg": 1680, "vitl": 2320}
TOWER = {"vitg": ("eva_g", "data/eva_vit_g.pth"), "vitl": ("clip_l", "data/clip_vit_L.pth")}
PAIRS = {"coco": 566_747, "vg": 769_000, "ccs": 12_660_000, "laion": 115_000_000}


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/blip2_stage1.py has no run {argument!r}: give one of "
            f"{', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    tower, weights = TOWER[argument]
    c = blip2(tower)
    c.task = blip2_stage1.leaves()
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    with c.data.unlocked():
        c.data.train.coco = source("json", "data/coco_karpathy_train.json", images="data/coco")
        c.data.train.vg = source("json", "data/vg_caption.json", images="data/vg")
        c.data.train.ccs = source("array_record", "data/ccs_capfilt/*.array_record")
        c.data.train.laion = source("array_record", "data/laion_capfilt/*.array_record")
    for name, pairs in PAIRS.items():
        c.data.train[name].weight = float(pairs)
    c.data.epoch_examples = sum(PAIRS.values())
    c.train.batch = BATCH[argument]
    c.train.steps = 250_000
    c.train.save_every = 5000
    c.train.init_from = f"{weights},data/bert-base-uncased"
    return c
