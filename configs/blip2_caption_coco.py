"""BLIP-2 fine-tuned for captions on COCO at 364 px, 5 epochs: tower and Q-Former are trained, the language model not.

Paper rows: BLIP-2, arXiv 2301.12597, table 3 (settings of table 6).
Command, with one of the arguments below:
  blip-jax train --config=configs/blip2_caption_coco.py:opt2.7b --workdir=runs/blip2_caption_opt2.7b
  blip-jax evaluate --config=configs/blip2_caption_coco.py:opt2.7b,nocaps --workdir=runs/nocaps
  --checkpoint=runs/blip2_caption_opt2.7b/best

  opt2.7b    OPT 2.7B       opt6.7b    OPT 6.7B, layer decay 0.95       flant5xl   FlanT5-XL
  opt2.7b,nocaps   opt6.7b,nocaps   flant5xl,nocaps   the same, evaluated on NoCaps' validation split by domain

Starts from a second stage with EVA ViT-g, its tower, whose position table is resized from 224 to 364 px, and the
language model. Every caption follows "a photo of", which is not learned.
Data: COCO's Karpathy training split as JSON, images in data/coco, 566,747 captions, and the validation split; NoCaps'
nocaps_val_4500_captions.json, pictures in data/nocaps/val.
Hardware: unknown; batch 256 is 16 on each of LAVIS's 16 GPUs. Unverified here: no run of this size was made.
Expected on COCO's test split, B@4 and CIDEr: opt2.7b 43.7, 145.8; opt6.7b 43.5, 145.2; flant5xl 42.4, 144.5; captioned
with 5 beams and 8 to 30 tokens, as LAVIS counts them. NoCaps, CIDEr in, near, out of domain, overall, and SPICE
overall: opt2.7b 123.0, 117.8, 123.4, 119.7, 15.4; opt6.7b 123.7, 119.2, 124.4, 121.0, 15.3; flant5xl 123.7, 120.2,
124.8, 121.6, 15.8. The best epoch, by CIDEr and BLEU@4 of the validation split with approximate tokens, stays in best/
of the workdir.
Differences: the loss is a mean over the tokens of the whole batch; the original averages each GPU's mean:
--config.loss.group_size=16. LAVIS's schedule ignores its layer decay: --config.optim.lr_factors='()'.
"""

from ml_collections import ConfigDict

from blip_jax.config import blip2, layer_decay, source

EPOCHS, EXAMPLES = 5, 566_747
MODELS = {
    "opt2.7b": ("opt_2.7b", "opt-2.7b"),
    "opt6.7b": ("opt_6.7b", "opt-6.7b"),
    "flant5xl": ("flant5_xl", "flan-t5-xl"),
}
ARGUMENTS = (*MODELS, *(f"{name},nocaps" for name in MODELS))


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/blip2_caption_coco.py has no run {argument!r}: give one of "
            f"{', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    argument, _, nocaps = argument.partition(",")
    size, folder = MODELS[argument]
    c = blip2("eva_g", llm=size)
    c.model.img_size = 364
    c.model.remat = "full"
    c.text.vocab = f"data/{folder}/" + ("spiece.model" if argument.startswith("flan") else "vocab.json")
    c.text.prompt = "a photo of"
    with c.data.unlocked():
        c.data.train.coco = source("json", "data/coco_karpathy_train.json", images="data/coco")
        c.data.eval.coco = source("json", "data/coco_karpathy_val.json", images="data/coco")
        if nocaps:
            captions = "data/nocaps/nocaps_val_4500_captions.json"
            c.data.eval = ConfigDict({"nocaps": source("nocaps", captions, images="data/nocaps")})
    c.data.epoch_examples = EXAMPLES
    c.optim.freeze = ("llm/.*",)
    c.optim.lr, c.optim.min_lr, c.optim.warmup_lr, c.optim.warmup_steps = 1e-5, 0.0, 1e-8, 1000
    c.optim.b2 = 0.999
    if argument == "opt6.7b":
        c.optim.lr_factors = layer_decay(0.95, c.model.vit.depth)
    c.train.batch = 256
    c.train.steps = EPOCHS * EXAMPLES // c.train.batch
    c.train.save_every = c.train.eval_every = EXAMPLES // c.train.batch
    c.train.keep_best = True
    c.train.init_from = f"data/blip2_pretrained_{argument}.pth,data/eva_vit_g.pth,data/{folder}"
    return c
