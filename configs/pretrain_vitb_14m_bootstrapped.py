"""ViT-B/16, the second round: 14M images with filtered web texts and filtered synthetic captions, 20 epochs.

Paper row: ViT-B, 14M, CapFilt with captioner and filter of ViT-B (BLIP, arXiv 2201.12086, table 1).
Command: blip-jax train --config=configs/pretrain_vitb_14m_bootstrapped.py --workdir=runs/pretrain_vitb_14m_bootstrapped
From the first model's parameters, with a new optimiser, instead of from scratch:
--config.train.init_from=runs/pretrain_vitb_14m
Data: COCO 567k and Visual Genome 769k captions as JSON with image folders; the web texts and the synthetic captions
that `blip-jax capfilt --config=configs/capfilt_14m.py` kept, which it wrote to data/capfilt_14m. Every pair has the
same
weight, as in the paper: set WEB and SYNTHETIC to the kept texts of data/capfilt_14m/summary.json. The figures here
stand
in for them: three quarters of 13.86M, the paper's share for nucleus captions; for web texts it names none.
Hardware: the paper's authors used 32 A100; 1.6 times the steps of the first round. Unverified here: no run of this
size was made.
Expected after fine-tuning on COCO at 384 px, R@1 of the paper: 80.6 text, 63.1 image; captioning B@4 38.6, CIDEr 129.7.
Differences: as pretrain_vitb_14m.py.
"""

from blip_jax.config import base, source

EPOCHS = 20
COCO, VG = 566_747, 769_000  # pairs
WEB, SYNTHETIC = 10_400_000, 10_400_000


def get_config():
    c = base("base")
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    c.loss.group_size = 90  # columns and hard negatives within one of the authors' 32 GPUs
    c.loss.smoothing_over = "all"  # as the published runs
    with c.data.unlocked():
        c.data.train.coco = source("json", "data/coco_karpathy_train.json", images="data/coco", weight=COCO)
        c.data.train.vg = source("json", "data/vg_caption.json", images="data/vg", weight=VG)
        c.data.train.web = source("array_record", "data/capfilt_14m/shards/*/web.array_record", weight=WEB)
        c.data.train.synthetic = source(
            "array_record", "data/capfilt_14m/shards/*/synthetic.array_record", weight=SYNTHETIC
        )
    c.data.epoch_examples = COCO + VG + WEB + SYNTHETIC
    c.train.batch = 2880
    c.train.steps = EPOCHS * (c.data.epoch_examples // c.train.batch)
    c.optim.lr = 3e-4
    return c
