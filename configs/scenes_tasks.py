"""Four tasks in miniature on the built-in world: the pre-training that the demo fine-tunes for each of them.

The world is blip_jax/data/scenes/crowd.py: one to three shapes, which may be alike, 48 px, one patch a cell of the
world's grid. Paper rows: BLIP, arXiv 2201.12086, tables 7 (captions), 8 (VQA, NLVR2) and 9 (dialogs), of which only
the tasks are the same.
Data: the files of COCO, VQA, NLVR2 and Visual Dialog, as the demo writes them of this world (data/scenes/official.py).
The seed is the world's, too. No crop, flip or RandAugment. Negatives come from the batch alone.
Command: bash launch/demo.sh tasks, or blip-jax demo tasks --workdir=runs/demo_tasks: files, vocabulary, pre-training on
         captions, the four fine-tunings, evaluation of unseen pictures, report. blip_jax/demo/tasks.py has the steps of
         each as shares of train.steps, which are the pre-training's. The pre-training by hand, once that wrote the
         files: blip-jax train --config=configs/scenes_tasks.py --workdir=runs/scenes_tasks
Hardware: 2 CPU cores. What came out, and in what time: docs/results.md.
"""

from blip_jax.config import base, source


def get_config():
    c = base("tiny")
    # dialogs ask for one width, as pictures and a caption's states are looked at side by side
    c.model.vit = dict(width=128, depth=2, heads=4, mlp=256, patch=16, pos_std=0.5)
    c.model.med = dict(width=128, layers=2, heads=4, mlp=256, positions=72, vocab_size=256)  # 254, [DEC] and [ENC]
    c.model.init_std = 0.06
    c.model.img_size = 48
    c.model.embed_dim = 128
    c.model.dropout = 0.0
    c.model.dtype = "float32"  # CPUs gain nothing from bfloat16
    c.text.vocab = "runs/demo_tasks/data/vocab.txt"
    c.text.max_len = 18
    with c.data.unlocked():
        coco = "runs/demo_tasks/data/coco"
        c.data.train.coco = source("json", f"{coco}/annotations/captions_train2014.json", images=f"{coco}/train2014")
    c.data.crop_scale = (1.0, 1.0)
    c.data.randaugment = False
    c.data.flip = False
    c.loss.momentum = False
    c.loss.queue = 0
    c.optim.lr = 5e-4  # with 1e-3 the fine-tunings learn less, or nothing
    c.optim.min_lr = 1e-5
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 100
    c.optim.b2 = 0.98
    c.optim.decay_mask = "kernels"
    c.optim.clip = 1.0
    c.train.batch = 64
    c.train.steps = 700
    c.train.log_every = 50
    c.train.save_every = 350
    c.train.keep = 1
    c.eval.batch = 100
    c.eval.loss_examples = 0  # a program more to compile for each stage
    return c
