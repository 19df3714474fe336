"""Captioner: fine-tuning on COCO captions at 384 px, 5 epochs.

Paper row: image captioning on COCO (BLIP, arXiv 2201.12086, table 7); also the captioner of CapFilt (vitb) and
CapFilt-L (vitl).
Command, with one of the arguments vitb and vitl:
  blip-jax train --config=configs/caption_coco.py:vitb --workdir=runs/caption_coco_vitb
Data: COCO, Karpathy's training split, 566,747 captions as JSON with image folder. Starts from runs/pretrain_vitb_14m or
runs/pretrain_vitl_129m; --config.train.init_from names another pre-trained workdir of the same sizes. Its position
table is resized to 384 px, and the text encoder, which a captioner has not, is left out.
Hardware: the paper's authors used 8 A100, a few hours, for ViT-B, 16 for ViT-L. Unverified here: no run of this size
was made.
Expected on the Karpathy test split with beam 3, BLEU@4 and CIDEr of the paper:
  vitb  38.0 and 127.8 after pre-training on 14M unfiltered pairs, 38.6 and 129.7 on the bootstrapped ones
  vitl  40.3 and 135.5 after pre-training on 129M unfiltered pairs, 40.4 and 136.7 on the bootstrapped ones
Differences: texts are padded to 40 tokens, the original's to the longest of the batch, so that with
loss.smoothing_over="all" padding has more weight in the smoothing term.
"""

from blip_jax.config import base, source

ARGUMENTS = ("vitb", "vitl")
EPOCHS = 5
EXAMPLES = 566_747


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/caption_coco.py has no run {argument!r}: give one of "
            f"{', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    c = base({"vitb": "base", "vitl": "large"}[argument])
    c.objective = "caption"
    c.model.img_size = 384
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    c.text.prompt = "a picture of "
    c.text.max_len = 40
    with c.data.unlocked():
        c.data.train.coco = source("json", "data/coco_karpathy_train.json", images="data/coco")
    c.data.epoch_examples = EXAMPLES
    c.data.crop_scale = (0.5, 1.0)
    c.loss.smoothing_over = "all"  # as the published runs
    c.optim.min_lr = 0.0
    c.optim.schedule = "epoch_cosine"
    c.optim.warmup_steps = 0
    c.train.batch = 256
    c.train.steps = EPOCHS * (EXAMPLES // c.train.batch)
    c.train.save_every = EXAMPLES // c.train.batch
    c.train.keep = EPOCHS

    if argument == "vitb":
        c.optim.lr = 1e-5
        c.train.init_from = "runs/pretrain_vitb_14m"
    else:
        c.optim.lr = 2e-6
        c.train.init_from = "runs/pretrain_vitl_129m"
        c.model.remat = "dots"
    return c
