"""ViT-B/16, 129M images, 20 epochs.

Paper row: ViT-B, 129M, without CapFilt (BLIP, arXiv 2201.12086).
Command: blip-jax train --config=configs/pretrain_vitb_129m.py --workdir=runs/pretrain_vitb_129m
Data: COCO 567k and Visual Genome 769k captions as JSON with image folders, CC3M + CC12M + SBU with their web
texts as ArrayRecord shards; LAION 115M pairs as tar shards. The paper reads a fifth of LAION per
epoch, so an epoch is 14M + 23M pairs. This is the first round, without CapFilt; pretrain_vitb_129m_capfilt_l.py is a
second one.
Hardware: the paper's authors used 32 A100, 8 to 9 days. Unverified here: no run of this size was made.
Expected after fine-tuning on COCO at 384 px, R@1 of the paper: 79.6 text, 62.0 image.
Differences: the paper starts the ViT from ImageNet weights and the text model from BERT-base; this starts from random
weights unless `train.init_from` names a checkpoint. The paper's text says decay 0.85 per epoch, its code 0.9, used
here.
"""

from blip_jax.config import base, source

EPOCHS = 20


def get_config():
    c = base("base")
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    c.loss.group_size = 90  # columns and hard negatives within one of the authors' 32 GPUs
    c.loss.smoothing_over = "all"  # as the published runs
    with c.data.unlocked():
        c.data.train.coco = source("json", "data/coco_karpathy_train.json", images="data/coco", weight=0.567)
        c.data.train.vg = source("json", "data/vg_caption.json", images="data/vg", weight=0.769)
        c.data.train.ccs = source("array_record", "data/ccs/*.array_record", weight=12.66)
        c.data.train.laion = source("tar", "data/laion/*.tar", weight=23.0)
    c.data.epoch_examples = 37_000_000
    c.train.batch = 2880
    c.train.steps = EPOCHS * (c.data.epoch_examples // c.train.batch)
    c.optim.lr = 3e-4
    return c
