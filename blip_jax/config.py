"""Configuration: every leaf once, with its unit, and one `validate` that lists all failures before anything compiles.

A config file is a python module with `get_config() -> ConfigDict`; it starts from `base()` and changes leaves. On the command
line a leaf is overridden with `--config.optim.lr=2e-4`. Code reads `cfg.optim.lr`, never `.get`; a config is locked, so an
unknown key is an error. Batch sizes are global; durations are steps, epochs are derived from `data.epoch_examples`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

VIT_SIZES = {  # width, depth, heads, mlp, patch: reference ViT sizes (BLIP paper, section 4.1)
    "base": dict(width=768, depth=12, heads=12, mlp=3072, patch=16),
    "large": dict(width=1024, depth=24, heads=16, mlp=4096, patch=16),
    "small": dict(width=256, depth=4, heads=8, mlp=1024, patch=8),
    "tiny": dict(width=48, depth=2, heads=4, mlp=192, patch=8),
}
MED_SIZES = {  # BERT-base for both published sizes (BLIP paper, section 3.1)
    "base": dict(width=768, layers=12, heads=12, mlp=3072, positions=512, vocab_size=30524),
    "large": dict(width=768, layers=12, heads=12, mlp=3072, positions=512, vocab_size=30524),
    "small": dict(width=256, layers=4, heads=8, mlp=1024, positions=64, vocab_size=30524),
    "tiny": dict(width=32, layers=2, heads=4, mlp=64, positions=40, vocab_size=120),
}


def source(kind: str, path: str = "", **leaves) -> ConfigDict:
    """One source of records (blip_jax/data/records.py), with every leaf that any kind reads."""
    c = ConfigDict()
    c.kind = kind  # json | tar | array_record | tfds | scenes
    c.path = path  # file, or glob of shards; for tfds the name and split, as "coco_captions/train"
    c.images = ""  # json: root folder of the image paths, which may not leave it; tfds: data_dir
    c.weight = 1.0  # share of the mixture, relative to the other sources
    c.image_key = "image"  # json, tfds: field of the picture
    c.caption_key = "caption"  # json, tfds: field of the caption or captions ("captions/text" goes into a nested one)
    c.count = 0  # scenes: number of records
    c.seed = 0  # scenes: which world
    c.size = 64  # scenes: pixels, square
    c.noise = 0.0  # scenes: share of captions replaced by web noise
    unknown = sorted(set(leaves) - set(c))
    if unknown:
        raise ValueError(f"source() has no leaf {unknown}: it has {sorted(c)}")
    c.update(leaves)
    return c


def base(size: str = "base") -> ConfigDict:
    """Every leaf of a run with the values of the paper's ViT-B pre-training (`size`: base, large, small or tiny)."""
    if size not in VIT_SIZES:
        raise ValueError(f"model size {size!r} is unknown: choose one of {sorted(VIT_SIZES)}")
    c = ConfigDict()
    c.objective = "pretrain"  # which step of blip_jax.steps trains: pretrain | retrieval
    c.seed = 42  # root of every random stream: initialisation, dropout, negatives, data order, augmentation

    c.model = ConfigDict()
    c.model.vit = ConfigDict(VIT_SIZES[size])
    c.model.med = ConfigDict(MED_SIZES[size])
    c.model.img_size = 224  # pixels, square; a multiple of the patch
    c.model.embed_dim = 256  # E, width of the shared contrastive space
    c.model.drop_path = 0.1 if size == "large" else 0.0  # highest stochastic-depth rate of the ViT, linear over blocks
    c.model.dropout = 0.1  # MED: hidden states and attention probabilities
    c.model.dtype = "bfloat16"  # compute: bfloat16 | float32; parameters, softmax, layer norm and losses stay float32
    c.model.remat = "none"  # ViT blocks, what the backward pass recomputes: none | dots (keep matmul outputs) | full

    c.text = ConfigDict()
    c.text.vocab = ""  # vocab.txt or tokenizer.json; its size + [DEC] + [ENC] must equal model.med.vocab_size
    c.text.max_len = 30  # T, tokens, padded
    c.text.max_words = 30  # words kept by the original's cleaning

    c.data = ConfigDict()
    c.data.train = ConfigDict()  # name -> source(...); the weights mix them
    c.data.eval = ConfigDict()  # name -> source(...) for retrieval evaluation: every caption of every record counts
    c.data.epoch_examples = 0  # examples in one epoch for schedules and printing; 0: the sum over the sources
    c.data.crop_scale = (0.2, 1.0)  # area range of the random-resized crop
    c.data.randaugment = True  # the original's RandAugment(2, 5)
    c.data.flip = True  # horizontal flip with probability 0.5
    c.data.max_pixels = 89_478_485  # larger pictures are skipped as decompression bombs
    c.data.max_bad_share = 0.05  # more unusable records than this share of those read (100 at least): stop
    c.data.threads = 4  # decoding threads per process
    c.data.prefetch = 4  # batches decoded ahead

    c.loss = ConfigDict()
    c.loss.momentum = True  # momentum encoder with soft targets; False: negatives from the batch's own features, hard targets
    c.loss.queue = 57600  # K, feature queue length, a multiple of the batch; 0: none. Needs loss.momentum
    c.loss.ema = 0.995  # momentum m <- ema * m + (1 - ema) * p, once per step, before the momentum pass
    c.loss.alpha = 0.4  # weight of the soft targets after the ramp
    c.loss.alpha_ramp_epochs = 2.0  # linear ramp of alpha from 0
    c.loss.group_size = 0  # examples among which columns and hard negatives are drawn (one GPU's, originally); 0: all
    c.loss.label_smoothing = 0.1  # of the language modelling loss
    c.loss.smoothing_over = "valid"  # smoothing term averaged over: valid positions | all (torch 1.10, as published runs)

    c.optim = ConfigDict()
    c.optim.lr = 3e-4  # peak
    c.optim.min_lr = 1e-6
    c.optim.schedule = "epoch_decay"  # epoch_decay (lr * decay_rate^epoch) | epoch_cosine | cosine (per step) | constant
    c.optim.decay_rate = 0.9  # per epoch, for epoch_decay
    c.optim.warmup_steps = 3000  # linear from warmup_lr; in the epoch_* schedules only within epoch 0, as the original
    c.optim.warmup_lr = 1e-6
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.05
    c.optim.decay_mask = "all"  # all (the original: biases, norms, temperature too) | kernels (matrices only)
    c.optim.freeze = ()  # regexes on parameter paths, e.g. ("vit/.*",): no gradient, no update, no optimiser state
    c.optim.clip = 0.0  # global gradient norm; 0: off, as the original
    c.optim.accumulate = 1  # micro-batches per step; each is a batch of its own for ITC and ITM

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices on each axis; one may be -1: the rest
    c.mesh.fsdp = 1
    c.mesh.tensor = 1

    c.train = ConfigDict()
    c.train.batch = 2880  # global, examples
    c.train.steps = 0  # length of the run; must be > 0
    c.train.log_every = 50  # steps
    c.train.save_every = 1000  # steps; the last step is always saved
    c.train.eval_every = 0  # steps; 0: only at the end (if data.eval is not empty)
    c.train.keep = 3  # newest checkpoints kept
    c.train.init_from = ""  # workdir or checkpoint folder whose parameters start this run; "": random

    c.eval = ConfigDict()
    c.eval.k = 128  # candidates per query that the matching head re-ranks
    c.eval.batch = 64  # images or texts per encoder pass
    c.eval.rerank_texts = 16  # texts scored against one image per pass
    c.eval.limit = 0  # first n images only; 0: all
    return c.lock()
