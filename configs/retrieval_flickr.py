"""Retrieval on Flickr30k at 384 px: fine-tuned on it, 6 epochs, or zero-shot by a model of COCO.

Paper rows: image-text retrieval on Flickr30k (BLIP, arXiv 2201.12086, table 5), and zero-shot (table 6).
Commands, with one of the arguments below:
  blip-jax train --config=configs/retrieval_flickr.py:vitb,129m,bootstrapped --workdir=runs/retrieval_flickr_vitb
  blip-jax evaluate --config=configs/retrieval_flickr.py:vitb,zero_shot --workdir=runs/flickr_zero_shot
  --checkpoint=runs/retrieval_coco_vitb/best
  blip-jax evaluate --config=configs/retrieval_flickr.py:vitl,zero_shot --workdir=runs/flickr_zero_shot_l
  --checkpoint=runs/retrieval_coco_vitl/best

  vitb,14m,bootstrapped   fine-tuned, validated at each epoch: BLIP, 14M
  vitb,129m,bootstrapped  fine-tuned: BLIP, 129M
  vitb,129m,capfilt_l     fine-tuned: BLIP CapFilt-L, 129M
  vitl,129m,capfilt_l     fine-tuned: BLIP ViT-L, 129M
  vitb,zero_shot          evaluated on the test split: the rows of ViT-B by --checkpoint
  vitl,zero_shot          evaluated on the test split

The paper's zero-shot model is the one that was fine-tuned on COCO (the same row of configs/retrieval_coco.py, or
--checkpoint=model_base_retrieval_coco.pth); --checkpoint=runs/pretrain_vitb_14m evaluates a pre-trained one, for which
the paper has no number. A fine-tuned one is evaluated on the test split the same way, --checkpoint its own best.
Data: BLIP's lists flickr30k_train.json, flickr30k_val.json, flickr30k_test.json, 29,000, 1000 and 1000 pictures of five
captions each, pictures in data/flickr30k/flickr30k-images; or Karpathy's dataset_flickr30k.json, with
--config.data.eval.flickr.kind=karpathy --config.data.eval.flickr.split=test and its path, whose pictures may lie in
flickr30k-images, flickr30k_images or `images` itself. Training starts from the workdir of pretrain.py that belongs to
the row (ARGUMENTS); --config.train.init_from names another one of the same sizes.
Hardware: the paper's authors used 8 A100 for ViT-B, 16 for ViT-L. Unverified here: no run of this size was made.
Expected on the test split, R@1, 5, 10:
  vitb,14m,bootstrapped   text 96.6 99.8 100.0, image 87.2 97.5 98.8; zero-shot 94.8 99.7 100.0, 84.9 96.7 98.3
  vitb,129m,bootstrapped  text 97.3 99.9 100.0, image 87.3 97.6 98.9; zero-shot 96.0 99.9 100.0, 85.0 96.8 98.6
  vitb,129m,capfilt_l     text 97.2 99.9 100.0, image 87.5 97.7 98.9; zero-shot 96.0 99.9 100.0, 85.5 96.8 98.7
  vitl,129m,capfilt_l     text 97.4 99.8 99.9, image 87.6 97.7 99.0; zero-shot 96.7 100.0 100.0, 86.7 97.3 98.7
Differences: none is known. Columns and hard negatives come from a group of 32 (ViT-L: 16) examples, as from one GPU's
of the original.
"""

from blip_jax.config import base, source

ARGUMENTS = {  # run -> what training starts from
    "vitb,14m,bootstrapped": "runs/pretrain_vitb_14m_bootstrapped",
    "vitb,129m,bootstrapped": "runs/pretrain_vitb_129m_bootstrapped",
    "vitb,129m,capfilt_l": "runs/pretrain_vitb_129m_capfilt_l",
    "vitl,129m,capfilt_l": "runs/pretrain_vitl_129m_capfilt_l",
    "vitb,zero_shot": "",
    "vitl,zero_shot": "",
}
EPOCHS = 6
EXAMPLES = 145_000


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/retrieval_flickr.py has no run {argument!r}: give one of "
            f"{', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    size, _, kind = argument.partition(",")
    c = base({"vitb": "base", "vitl": "large"}[size])
    c.objective = "retrieval"
    c.model.img_size = 384
    c.model.remat = "dots"
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    c.text.max_len = 35
    split = "test" if kind == "zero_shot" else "val"
    with c.data.unlocked():
        c.data.train.flickr = source("json", "data/flickr30k_train.json", images="data/flickr30k")
        c.data.eval.flickr = source("json", f"data/flickr30k_{split}.json", images="data/flickr30k")
    c.data.epoch_examples = EXAMPLES
    c.data.crop_scale = (0.5, 1.0)
    c.loss.alpha_ramp_epochs = 1.0
    c.loss.group_size = {"vitb": 32, "vitl": 16}[size]  # examples of one of the authors' GPUs
    c.optim.lr = {"vitb": 1e-5, "vitl": 5e-6}[size]
    c.optim.min_lr = 0.0
    c.optim.schedule = "epoch_cosine"
    c.optim.warmup_steps = 0
    c.train.batch = 256
    c.train.steps = EPOCHS * (EXAMPLES // c.train.batch)
    c.train.save_every = EXAMPLES // c.train.batch
    c.train.eval_every = EXAMPLES // c.train.batch
    c.train.keep_best = True
    c.train.init_from = ARGUMENTS[argument]
    c.eval.k = 128
    return c
