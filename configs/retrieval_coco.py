"""Retrieval, the filter of CapFilt: ITC and ITM fine-tuned on COCO at 384 px, 6 epochs.

Paper row: image-text retrieval on COCO (BLIP, arXiv 2201.12086, table 5); also the filter of CapFilt (vitb) and
CapFilt-L (vitl).
Command, with one of the arguments vitb and vitl:
  blip-jax train --config=configs/retrieval_coco.py:vitb --workdir=runs/retrieval_coco_vitb
Data: COCO, Karpathy's splits, 566,747 training captions and 5000 validation pictures as JSON with image folder. Starts
from runs/pretrain_vitb_14m or runs/pretrain_vitl_129m; --config.train.init_from names another pre-trained workdir of
the same sizes. Its position table is resized to 384 px, and the decoder, which retrieval has not, is left out.
Hardware: the paper's authors used 8 A100, a few hours, for ViT-B, 16 for ViT-L. Unverified here: no run of this size
was made.
Expected on the Karpathy test split, R@1, 5, 10 of the paper's table 5 (blip-jax evaluate with the same --config,
--workdir=runs/retrieval_coco_test --checkpoint=runs/retrieval_coco_vitb/best
--config.data.eval.coco.path=data/coco_karpathy_test.json):
  vitb, 14M bootstrapped  text 80.6 95.2 97.6, image 63.1 85.3 91.1
  vitb, 129M              text 81.9 95.4 97.8, image 64.3 85.7 91.5; from CapFilt-L 81.2 95.7 97.9, 64.1 85.8 91.6
  vitl, 129M              text 82.4 95.4 97.9, image 65.1 86.3 91.8
and R@1 of its table 1, after pre-training on unfiltered pairs: vitb 78.4, 60.7 (14M); vitl 80.6, 64.1 (129M).
Differences: ITC compares with the features of the whole batch and the queue, the original with one GPU's 32 and the
queue. The best epoch by the mean recall on the validation split, the paper's, stays in best/ of the workdir.
"""

from blip_jax.config import base, source

ARGUMENTS = ("vitb", "vitl")
EPOCHS = 6
EXAMPLES = 566_747


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/retrieval_coco.py has no run {argument!r}: give one of "
            f"{', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    c = base({"vitb": "base", "vitl": "large"}[argument])
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
    c.optim.min_lr = 0.0
    c.optim.schedule = "epoch_cosine"
    c.optim.warmup_steps = 0
    c.train.batch = 256

    if argument == "vitb":
        c.optim.lr = 1e-5
        c.train.init_from = "runs/pretrain_vitb_14m"
    else:
        c.optim.lr = 5e-6
        c.train.init_from = "runs/pretrain_vitl_129m"
    c.train.steps = EPOCHS * (EXAMPLES // c.train.batch)
    c.train.save_every = EXAMPLES // c.train.batch
    c.train.eval_every = EXAMPLES // c.train.batch
    c.train.keep_best = True
    c.eval.k = 256
    return c
