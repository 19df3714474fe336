"""Captioner: fine-tuning on COCO captions at 384 px, 5 epochs.

Paper rows: image captioning on COCO (BLIP, arXiv 2201.12086, tables 7 and 1).
Command, with one of the arguments below, each a row:
  blip-jax train --config=configs/caption_coco.py:vitb --workdir=runs/caption_coco_vitb

  vitb, vitl              from pre-training without CapFilt (table 1): the captioners of CapFilt and CapFilt-L
  vitb,14m,bootstrapped   table 7, BLIP, 14M
  vitb,129m,bootstrapped  table 7, BLIP, 129M
  vitb,129m,capfilt_l     table 7, BLIP CapFilt-L, 129M
  vitl,129m,capfilt_l     table 7, BLIP ViT-L, 129M

and its scores, those of NoCaps (table 7, too) by domain, with one of vitb,nocaps and vitl,nocaps:
  blip-jax evaluate --config=configs/caption_coco.py:vitb --workdir=runs/caption_coco_test
  --checkpoint=runs/caption_coco_vitb/best --config.data.eval.coco.path=data/coco_karpathy_test.json
  blip-jax evaluate --config=configs/caption_coco.py:vitb,nocaps --workdir=runs/nocaps
  --checkpoint=runs/caption_coco_vitb/best
Data: COCO, Karpathy's splits, 566,747 training captions and 5000 validation pictures as JSON with image folder; NoCaps'
nocaps_val_4500_captions.json, pictures in data/nocaps/val, or nocaps_test_image_info.json for its server. Starts from
the workdir of pretrain.py that belongs to the row (ARGUMENTS); --config.train.init_from names another one of the same
sizes. Its position table is resized to 384 px, and the text encoder, which a captioner has not, is left out.
Hardware: the paper's authors used 8 A100, a few hours, for ViT-B, 16 for ViT-L. Unverified here: no run of this size
was made.
Expected on the Karpathy test split with beam 3, BLEU@4 and CIDEr of the paper's table 7, and on NoCaps' validation
split CIDEr / SPICE in, near, out of domain and overall, all times 100:
  vitb,14m,bootstrapped   38.6, 129.7; 111.3 / 15.1, 104.5 / 14.4, 102.4 / 13.7, 105.1 / 14.4
  vitb,129m,bootstrapped  39.4, 131.4; 109.1 / 14.8, 105.8 / 14.4, 105.7 / 13.7, 106.3 / 14.3
  vitb,129m,capfilt_l     39.7, 133.3; 111.8 / 14.9, 108.6 / 14.8, 111.5 / 14.2, 109.6 / 14.7
  vitl,129m,capfilt_l     40.4, 136.7; 114.9 / 15.2, 112.1 / 14.9, 115.3 / 14.4, 113.2 / 14.8
and of its table 1, after pre-training on unfiltered pairs: vitb 38.0 and 127.8 (14M), vitl 40.3 and 135.5 (129M).
The best epoch, by CIDEr and BLEU@4 of the validation split with approximate tokens, stays in best/ of the workdir.
NoCaps' captions are made with the repetition penalty 1.1, as by the original's program.
Differences: texts are padded to 40 tokens, the original's to the longest of the batch, so that with
loss.smoothing_over="all" padding has more weight in the smoothing term.
"""

from ml_collections import ConfigDict

from blip_jax.config import base, source

ARGUMENTS = {  # run -> what training starts from
    "vitb": "runs/pretrain_vitb_14m",
    "vitl": "runs/pretrain_vitl_129m",
    "vitb,14m,bootstrapped": "runs/pretrain_vitb_14m_bootstrapped",
    "vitb,129m,bootstrapped": "runs/pretrain_vitb_129m_bootstrapped",
    "vitb,129m,capfilt_l": "runs/pretrain_vitb_129m_capfilt_l",
    "vitl,129m,capfilt_l": "runs/pretrain_vitl_129m_capfilt_l",
    "vitb,nocaps": "",
    "vitl,nocaps": "",
}
EPOCHS = 5
EXAMPLES = 566_747


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/caption_coco.py has no run {argument!r}: give one of "
            f"{', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    size, _, kind = argument.partition(",")
    c = base({"vitb": "base", "vitl": "large"}[size])
    c.objective = "caption"
    c.model.img_size = 384
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    c.text.prompt = "a picture of "
    c.text.max_len = 40
    with c.data.unlocked():
        c.data.train.coco = source("json", "data/coco_karpathy_train.json", images="data/coco")
        c.data.eval.coco = source("json", "data/coco_karpathy_val.json", images="data/coco")
        if kind == "nocaps":
            captions = "data/nocaps/nocaps_val_4500_captions.json"
            c.data.eval = ConfigDict({"nocaps": source("nocaps", captions, images="data/nocaps")})
            c.eval.repetition_penalty = 1.1
    c.data.epoch_examples = EXAMPLES
    c.data.crop_scale = (0.5, 1.0)
    c.loss.smoothing_over = "all"  # as the published runs
    c.optim.min_lr = 0.0
    c.optim.schedule = "epoch_cosine"
    c.optim.warmup_steps = 0
    c.train.batch = 256
    c.train.steps = EPOCHS * (EXAMPLES // c.train.batch)
    c.train.save_every = EXAMPLES // c.train.batch
    c.train.eval_every = EXAMPLES // c.train.batch
    c.train.keep_best = True
    c.train.init_from = ARGUMENTS[argument]
    c.optim.lr = {"vitb": 1e-5, "vitl": 2e-6}[size]
    if size == "vitl":
        c.model.remat = "dots"
    return c
