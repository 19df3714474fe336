"""Retrieval, the filter of CapFilt: ITC and ITM fine-tuned on COCO at 384 px, 6 epochs.

Paper rows: image-text retrieval on COCO (BLIP, arXiv 2201.12086, tables 5 and 1).
Command, with one of the arguments below, each a row:
  blip-jax train --config=configs/retrieval_coco.py:vitb --workdir=runs/retrieval_coco_vitb

  vitb, vitl              from pre-training without CapFilt (table 1): the filters of CapFilt and CapFilt-L
  vitb,14m,bootstrapped   table 5, BLIP, 14M
  vitb,129m,bootstrapped  table 5, BLIP, 129M
  vitb,129m,capfilt_l     table 5, BLIP CapFilt-L, 129M
  vitl,129m,capfilt_l     table 5, BLIP ViT-L, 129M

Data: COCO, Karpathy's splits, 566,747 training captions and 5000 validation pictures as JSON with image folder. Starts
from the workdir of pretrain.py that belongs to the row (ARGUMENTS); --config.train.init_from names another one of the
same sizes. Its position table is resized to 384 px, and the decoder, which retrieval has not, is left out.
Hardware: the paper's authors used 8 A100, a few hours, for ViT-B, 16 for ViT-L. Unverified here: no run of this size
was made.
Expected on the Karpathy test split, R@1, 5, 10 of the paper's table 5 (blip-jax evaluate with the same --config,
--workdir=runs/retrieval_coco_test --checkpoint=runs/retrieval_coco_vitb/best
--config.data.eval.coco.path=data/coco_karpathy_test.json):
  vitb,14m,bootstrapped   text 80.6 95.2 97.6, image 63.1 85.3 91.1
  vitb,129m,bootstrapped  text 81.9 95.4 97.8, image 64.3 85.7 91.5
  vitb,129m,capfilt_l     text 81.2 95.7 97.9, image 64.1 85.8 91.6
  vitl,129m,capfilt_l     text 82.4 95.4 97.9, image 65.1 86.3 91.8
and R@1 of its table 1, after pre-training on unfiltered pairs: vitb 78.4, 60.7 (14M); vitl 80.6, 64.1 (129M).
Differences: none is known. ITC compares with the features of a group of 32 (ViT-L: 16) and the queue, as on the
original's GPUs; hard negatives come from the whole batch. The best epoch by the mean recall on the validation split,
the paper's, stays in best/ of the workdir.
"""

from blip_jax.config import base, source

ARGUMENTS = {  # row -> what it starts from
    "vitb": "runs/pretrain_vitb_14m",
    "vitl": "runs/pretrain_vitl_129m",
    "vitb,14m,bootstrapped": "runs/pretrain_vitb_14m_bootstrapped",
    "vitb,129m,bootstrapped": "runs/pretrain_vitb_129m_bootstrapped",
    "vitb,129m,capfilt_l": "runs/pretrain_vitb_129m_capfilt_l",
    "vitl,129m,capfilt_l": "runs/pretrain_vitl_129m_capfilt_l",
}
EPOCHS = 6
EXAMPLES = 566_747


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/retrieval_coco.py has no run {argument!r}: give one of "
            f"{', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    size = argument.split(",")[0]
    c = base({"vitb": "base", "vitl": "large"}[size])
    c.objective = "retrieval"
    c.model.img_size = 384
    c.model.remat = "dots"
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    c.text.max_len = 35
    with c.data.unlocked():
        c.data.train.coco = source("json", "data/coco_karpathy_train.json", images="data/coco")
        c.data.eval.coco = source("json", "data/coco_karpathy_val.json", images="data/coco")
    c.data.epoch_examples = EXAMPLES
    c.data.crop_scale = (0.5, 1.0)
    c.loss.alpha_ramp_epochs = 1.0
    c.loss.group_size = {"vitb": 32, "vitl": 16}[size]  # examples of one of the authors' GPUs
    c.loss.negatives = "batch"
    c.optim.min_lr = 0.0
    c.optim.schedule = "epoch_cosine"
    c.optim.warmup_steps = 0
    c.optim.lr = {"vitb": 1e-5, "vitl": 5e-6}[size]
    c.train.batch = 256
    c.train.init_from = ARGUMENTS[argument]
    c.train.steps = EPOCHS * (EXAMPLES // c.train.batch)
    c.train.save_every = EXAMPLES // c.train.batch
    c.train.eval_every = EXAMPLES // c.train.batch
    c.train.keep_best = True
    c.eval.k = 256
    return c
