"""Pre-training at 224 px, 20 epochs, on 14M or 129M images as they are or on what CapFilt made of them.

Paper rows: BLIP, arXiv 2201.12086, tables 1 and 5 to 7.
Command, with one of the arguments below:
  blip-jax train --config=configs/pretrain.py:vitb,14m --workdir=runs/pretrain_vitb_14m

  vitb,14m                ViT-B/16, 14M, without CapFilt: the first round
  vitb,129m               ViT-B/16, 129M, without CapFilt: a first round
  vitl,129m               ViT-L/16, 129M, without CapFilt: captioner and filter of CapFilt-L start from it
  vitb,14m,bootstrapped   ViT-B/16, 14M with CapFilt by ViT-B (table 1): the second round
  vitb,129m,bootstrapped  ViT-B/16, 129M with CapFilt by ViT-B (table 1): a second round
  vitb,129m,capfilt_l     ViT-B/16, 129M with CapFilt by ViT-L (table 1): a second round
  vitl,129m,capfilt_l     ViT-L/16, 129M with CapFilt by ViT-L (table 1): a second round

Fine-tuning looks for them in runs/pretrain_ and the argument, _ for each comma.

From the first model's parameters, with a new optimiser, instead of from scratch:
--config.train.init_from=runs/pretrain_vitb_14m
Data: COCO 567k and Visual Genome 769k captions as JSON with image folders; CC3M + CC12M + SBU with their web texts as
ArrayRecord shards, which this makes of what img2dataset fetched (docs/data.md):
  blip-jax pack '{cc3m,cc12m,sbu}/*.tar' --out=data/ccs
For 129M LAION's 115M pairs as tar shards, of which the paper reads a fifth per epoch, so that an epoch is 14M + 23M
pairs. The second rounds read instead of web texts what `blip-jax capfilt` kept: with --config=configs/capfilt.py of
CC3M + CC12M + SBU in data/capfilt_14m and of LAION in data/capfilt_laion; with the ViT-L models in data/capfilt_14m_l
and data/capfilt_laion_l (commands in capfilt.py). Every pair has the same weight, as in the paper, but LAION's, of
which an epoch reads a fifth: set the numbers in KEPT to the kept texts of each summary.json. The figures here stand in
for them: three quarters of 13.86M and 115M, the paper's share for nucleus captions; for web texts it names none.
Hardware: the paper's authors used 32 A100, 3 to 4 days for vitb,14m, 1.6 times that for its second round, 8 to 9 days
for vitb,129m; ViT-L with gradient checkpointing. Unverified here: no run of this size was made.
Expected after fine-tuning on COCO at 384 px, the paper's R@1 text, R@1 image (and B@4, CIDEr of captioning):
  vitb,14m 78.4, 60.7;  vitb,129m 79.6, 62.0;  vitl,129m 80.6, 64.1;  vitb,14m,bootstrapped 80.6, 63.1 (38.6, 129.7);
  vitb,129m,bootstrapped 81.9, 64.3 (39.4, 131.4);  vitb,129m,capfilt_l 81.2, 64.1 (39.7, 133.3);
  vitl,129m,capfilt_l 82.4, 65.1 (40.4, 136.7)
Differences: the paper starts the ViT from ImageNet weights and the text model from BERT-base; this starts from random
weights unless `train.init_from` names a checkpoint. The paper's text says decay 0.85 per epoch, its code 0.9, used
here. In the second round a fifth of LAION is drawn anew for every epoch, where the paper goes round five parts.
"""

from blip_jax.config import base, source

ARGUMENTS = (
    "vitb,14m",
    "vitb,129m",
    "vitl,129m",
    "vitb,14m,bootstrapped",
    "vitb,129m,bootstrapped",
    "vitb,129m,capfilt_l",
    "vitl,129m,capfilt_l",
)
EPOCHS = 20
PAIRS = {"coco": 566_747, "vg": 769_000}  # of a second round, in one epoch
KEPT = {  # CapFilt run -> (its web texts, its synthetic captions, share of them in one epoch)
    "capfilt_14m": (10_400_000, 10_400_000, 1.0),
    "capfilt_14m_l": (10_400_000, 10_400_000, 1.0),
    "capfilt_laion": (86_250_000, 86_250_000, 0.2),
    "capfilt_laion_l": (86_250_000, 86_250_000, 0.2),
}


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/pretrain.py has no run {argument!r}: give one of {', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    size, images, *second_round = argument.split(",")
    c = base({"vitb": "base", "vitl": "large"}[size])
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    c.loss.smoothing_over = "all"  # as the published runs
    with c.data.unlocked():
        c.data.train.coco = source("json", "data/coco_karpathy_train.json", images="data/coco")
        c.data.train.vg = source("json", "data/vg_caption.json", images="data/vg")
        if second_round:
            by = "_l" * (second_round == ["capfilt_l"])
            kept(c, [f"capfilt_14m{by}"] + [f"capfilt_laion{by}"] * (images == "129m"))
        else:
            as_it_is(c, laion=images == "129m")

    # columns and hard negatives within one of the authors' 32 GPUs
    if size == "vitb":
        c.train.batch, c.loss.group_size = 2880, 90
        c.optim.lr = 3e-4
    else:
        c.train.batch, c.loss.group_size = 2400, 75
        c.optim.lr = 2e-4
        c.model.remat = "dots"
    c.train.steps = EPOCHS * (c.data.epoch_examples // c.train.batch)
    return c


def as_it_is(c, laion: bool) -> None:
    """The web with its own texts; weights are millions of pairs in one epoch."""
    c.data.train.coco.weight, c.data.train.vg.weight = 0.567, 0.769
    c.data.train.ccs = source("array_record", "data/ccs/*.array_record", weight=12.66)
    c.data.epoch_examples = 14_000_000
    if laion:
        c.data.train.laion = source("tar", "data/laion/*.tar", weight=23.0)
        c.data.epoch_examples = 37_000_000


def kept(c, runs: list[str]) -> None:
    """The texts that CapFilt runs kept; weights are pairs in one epoch."""
    c.data.train.coco.weight, c.data.train.vg.weight = PAIRS["coco"], PAIRS["vg"]
    for run in runs:
        web, synthetic, share = KEPT[run]
        for kind, texts in (("web", web), ("synthetic", synthetic)):
            path = f"data/{run}/shards/*/{kind}.array_record"
            c.data.train[f"{run}_{kind}"] = source("array_record", path, weight=share * texts)
    c.data.epoch_examples = round(sum(s.weight for s in c.data.train.values()))
