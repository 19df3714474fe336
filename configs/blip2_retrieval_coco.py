"""BLIP-2 fine-tuned for retrieval on COCO at 364 px, 5 epochs, tower trained.

Paper rows: BLIP-2, arXiv 2301.12597, table 5 (settings of table 8).
Command, with one of the arguments below:
  blip-jax train --config=configs/blip2_retrieval_coco.py:vitg --workdir=runs/blip2_retrieval_vitg
  blip-jax evaluate --config=configs/blip2_retrieval_coco.py:vitg --workdir=runs/blip2_retrieval_vitg

  vitg    EVA-CLIP ViT-g/14: rate 1e-5, beta2 0.999, layer decay 0.95
  vitl    CLIP ViT-L/14: rate 5e-6, beta2 0.98, no layer decay

Starts from a first stage and its tower, whose position table is resized from 224 to 364 px.
Data: COCO's Karpathy splits as JSON, images in data/coco; evaluation on its 5,000 validation images.
Flickr30K zero-shot: --config.data.eval.coco.path=data/flickr30k_test.json --config.data.eval.coco.images=data/flickr30k
Hardware: unknown; batch 224 is 14 on each of LAVIS's 16 GPUs. Unverified here: no run of this size was made.
Expected on COCO's test split, R@1 text, R@1 image: vitg 85.4, 68.3; vitl 83.5, 66.3. Flickr30K zero-shot: 97.6, 89.7;
96.9, 88.6.
Differences: LAVIS computes a layer decay that its schedule then ignores; here vitg has the paper's, and
--config.optim.lr_factors='()' LAVIS's. LAVIS draws a caption of the same image as a negative where a whole batch shows
one; here such a row is left out of ITM and counted (no_negative in the log). Keys and values of images in evaluation
are those of bfloat16 computation; LAVIS evaluates in float32: --config.model.dtype=float32.
"""

from blip_jax.config import blip2, layer_decay, source
from blip_jax.tasks import blip2_stage1

ARGUMENTS = ("vitg", "vitl")
EPOCHS = 5
EXAMPLES = 566_747
TOWER = {"vitg": "eva_g", "vitl": "clip_l"}


def get_config(argument=""):
    if argument not in ARGUMENTS:
        raise ValueError(
            f"configs/blip2_retrieval_coco.py has no run {argument!r}: give one of "
            f"{', '.join(f':{a}' for a in ARGUMENTS)} after it"
        )
    c = blip2(TOWER[argument])
    c.task = blip2_stage1.leaves()
    c.task.image_ids = True
    c.model.img_size = 364
    c.model.remat = "dots"
    c.text.vocab = "data/bert-base-uncased-vocab.txt"
    with c.data.unlocked():
        c.data.train.coco = source("json", "data/coco_karpathy_train.json", images="data/coco")
        c.data.eval.coco = source("json", "data/coco_karpathy_val.json", images="data/coco")
    c.data.epoch_examples = EXAMPLES
    c.optim.freeze = ()
    c.optim.schedule, c.optim.warmup_steps = "epoch_cosine", 1000
    c.optim.min_lr, c.optim.warmup_lr = 0.0, 1e-8
    if argument == "vitg":
        c.optim.lr, c.optim.b2 = 1e-5, 0.999
        c.optim.lr_factors = layer_decay(0.95, c.model.vit.depth)
    else:
        c.optim.lr, c.optim.b2 = 5e-6, 0.98
    c.train.batch = 224
    c.train.steps = EPOCHS * (EXAMPLES // c.train.batch)
    c.train.save_every = EXAMPLES // c.train.batch
    c.train.eval_every = EXAMPLES // c.train.batch
    c.train.keep_best = True
    c.train.init_from = f"runs/blip2_stage1_{argument}"
    c.eval.k = 128
    c.eval.batch = 32
    return c
