"""ViT-B/16, the second round on 129M images whose texts ViT-L captioned and filtered (CapFilt-L), 20 epochs.

Paper row: ViT-B, 129M, CapFilt with captioner and filter of ViT-L (BLIP, arXiv 2201.12086, table 1).
Command: blip-jax train --config=configs/pretrain_vitb_129m_capfilt_l.py --workdir=runs/pretrain_vitb_129m_capfilt_l
From the first model's parameters, with a new optimiser, instead of from scratch:
--config.train.init_from=runs/pretrain_vitb_129m
Data: COCO 567k and Visual Genome 769k captions as JSON with image folders; what `blip-jax capfilt` kept with the ViT-L
models of CC3M + CC12M + SBU in data/capfilt_14m_l, and of LAION in data/capfilt_laion_l (commands in capfilt_14m.py).
Every pair has the same weight but LAION's, of which an epoch reads a fifth, as in the paper: set the four numbers of
kept texts to those of each summary.json. The figures here stand in for them: three quarters of 13.86M and 115M, the
paper's share for nucleus captions; for web texts it names none.
Hardware: the paper's authors used 32 A100. Unverified here: no run of this size was made.
Expected after fine-tuning on COCO at 384 px, R@1 of the paper: 81.2 text, 64.1 image; captioning B@4 39.7, CIDEr 133.3.
Differences: as pretrain_vitb_129m.py; a fifth of LAION is drawn anew for every epoch, where the paper goes round five
parts.
"""

from blip_jax.config import base, source

EPOCHS = 20
PAIRS = {"coco": 566_747, "vg": 769_000}  # in one epoch
KEPT = {  # CapFilt run -> (its web texts, its synthetic captions, share of them in one epoch)
    "capfilt_14m_l": (10_400_000, 10_400_000, 1.0),
    "capfilt_laion_l": (86_250_000, 86_250_000, 0.2),
}


def get_config():
    c = base("base")
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    c.loss.group_size = 90  # columns and hard negatives within one of the authors' 32 GPUs
    c.loss.smoothing_over = "all"  # as the published runs
    with c.data.unlocked():
        c.data.train.coco = source("json", "data/coco_karpathy_train.json", images="data/coco", weight=PAIRS["coco"])
        c.data.train.vg = source("json", "data/vg_caption.json", images="data/vg", weight=PAIRS["vg"])
        for run, (web, synthetic, share) in KEPT.items():
            for kind, kept in (("web", web), ("synthetic", synthetic)):
                path = f"data/{run}/shards/*/{kind}.array_record"
                c.data.train[f"{run}_{kind}"] = source("array_record", path, weight=share * kept)
    c.data.epoch_examples = round(sum(s.weight for s in c.data.train.values()))
    c.train.batch = 2880
    c.train.steps = EPOCHS * (c.data.epoch_examples // c.train.batch)
    c.optim.lr = 3e-4
    return c
