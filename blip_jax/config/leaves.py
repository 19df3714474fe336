"""Configuration: every leaf once, with its unit.

A config file is a python module with `get_config() -> ConfigDict`, or `get_config(argument)` where one file has several
runs (`--config=configs/pretrain.py:vitl,129m`); it starts from `base()` and changes leaves. On the command line a leaf
is overridden with `--config.optim.lr=2e-4`. Code reads `cfg.optim.lr`, never `.get`; a config is locked, so an unknown
key is an error. Batch sizes are global; durations are steps, epochs are derived from `data.epoch_examples`. What
`objective` implies, such as which parts the model has, is no leaf; what a task asks of the leaves is checked by its own
module (blip_jax/tasks), what every run needs by blip_jax/config/check.py.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from blip_jax.config.sizes import LLM_SIZES, MED_SIZES, QFORMER_SIZES, TOWER_SIZES, VIT_SIZES


def source(kind: str, path: str = "", **leaves) -> ConfigDict:
    """One source of records (blip_jax/data/source.py), with every leaf that any kind reads."""
    c = ConfigDict()
    # json | csv | tsv | parquet | tar | array_record | tfds | scenes, or another module of blip_jax/data/formats
    c.kind = kind
    # file, or pattern of shards with *, ?, [0-9], {a,b} or {00000..00010}; for tfds the name and split, as
    # "coco_captions/train"
    c.path = path
    # tar on gs://: folder on this machine into which the shards are copied at the start; "": they are read by ranges
    c.cache = ""
    c.images = ""  # of lists: root folder of the image paths, which may not leave it; tfds: data_dir
    c.roots = ()  # of lists: further folders that links below `images` may lead into, as ("/disk/coco",)
    c.weight = 1.0  # share of the mixture, relative to the other sources
    # json, tables, tfds: field of the picture; of tables (csv, tsv, parquet) one of data/table.py's names by default;
    # tar: "image", or the extension that is meant
    c.image_key = "image"
    # json, tables, tfds: field of the caption or captions ("captions/text" goes into a nested one); tar: "caption" is
    # the .txt, else this field of the .json; another name, or "json/caption", the field of the .json alone; "txt" the
    # .txt alone
    c.caption_key = "caption"
    c.split = ""  # karpathy: train (COCO's with restval) | val | test
    c.count = 0  # scenes: number of records
    c.seed = 0  # scenes: which world
    c.size = 64  # scenes: pixels, square
    c.noise = 0.0  # scenes: share of captions replaced by web noise
    c.captions = 1  # scenes: captions of each record
    # scenes: one or two large objects of four shapes and six colours on a plain background, no word of places
    c.easy = False
    unknown = sorted(set(leaves) - set(c))
    if unknown:
        raise ValueError(f"source() has no leaf {unknown}: it has {sorted(c)}")
    if isinstance(leaves.get("roots"), str):
        leaves["roots"] = (leaves["roots"],)
    c.update(leaves)
    return c


def base(size: str = "base") -> ConfigDict:
    """Every leaf of a run with the values of the paper's ViT-B pre-training (`size`: base, large, small or tiny)."""
    if size not in VIT_SIZES:
        raise ValueError(f"model size {size!r} is unknown: choose one of {sorted(VIT_SIZES)}")
    c = ConfigDict()
    c.objective = "pretrain"  # the task, a module of blip_jax/tasks or what tasks.bring gave: model, loss, evaluation
    c.seed = 42  # root of every random stream: initialisation, dropout, negatives, data order, augmentation

    c.model = ConfigDict()
    c.model.vit = ConfigDict(VIT_SIZES[size])
    c.model.med = ConfigDict(MED_SIZES[size])
    c.model.img_size = 224  # pixels, square; a multiple of the patch
    c.model.embed_dim = 256  # E, width of the shared contrastive space
    # of kernels and embeddings at the start; narrow models learn sooner with about 0.6 / sqrt(width)
    c.model.init_std = 0.02
    c.model.drop_path = 0.1 if size == "large" else 0.0  # highest stochastic-depth rate of the ViT, linear over blocks
    c.model.dropout = 0.1  # MED: hidden states and attention probabilities
    c.model.dtype = "bfloat16"  # compute: bfloat16 | float32; parameters, softmax, layer norm and losses stay float32
    c.model.remat = "none"  # ViT blocks, what the backward pass recomputes: none | dots (keep matmul outputs) | full

    c.text = ConfigDict()
    # vocab.txt or tokenizer.json; its size + [DEC] + [ENC] must equal model.med.vocab_size. A language model has its
    # own, vocab.json or spiece.model, and behind a comma BERT's where the Q-Former reads questions.
    c.text.vocab = ""
    c.text.max_len = 30  # T, tokens, padded
    # Lengths T that a training batch may have, ascending, the last text.max_len, as (12, 16, 20, 30); (): all max_len.
    # Each batch then holds texts that fit its T, so negatives come from texts of about the same length. The published
    # runs padded all to 30. Sources must give captions without pictures: not tfds, array_record as `pack` writes it.
    c.text.buckets = ()
    # batches over which texts are ordered by length
    c.text.bucket_window = 32
    c.text.max_words = 30  # words kept by the original's cleaning
    c.text.prompt = ""  # caption: begins every training text, unscored, as "a picture of "; captioning starts from it

    c.data = ConfigDict()
    c.data.train = ConfigDict()  # name -> source(...); the weights mix them
    c.data.eval = ConfigDict()  # name -> source(...) for evaluation: every record counts, whatever the weights
    c.data.epoch_examples = 0  # examples in one epoch for schedules and printing; 0: the sum over the sources
    c.data.crop_scale = (0.2, 1.0)  # area range of the random-resized crop
    c.data.randaugment = True  # the original's RandAugment(2, 5)
    c.data.flip = True  # horizontal flip with probability 0.5
    c.data.max_pixels = 89_478_485  # larger pictures are skipped as decompression bombs
    c.data.upright = False  # pictures turned as their EXIF orientation says; False: as stored, as the original had them
    c.data.max_bad_share = 0.05  # more unusable records than this share of those read (100 at least): stop
    c.data.threads = 4  # decoding threads per process
    c.data.prefetch = 4  # batches decoded ahead

    c.task = ConfigDict()  # leaves that only this objective has: `leaves()` of its module, where it has some

    c.loss = ConfigDict()
    # up to alpha_ramp_epochs: of the contrastive loss; an objective without one (caption) does not read them
    c.loss.momentum = True  # momentum encoder and soft targets; False: hard targets, the batch's own features
    c.loss.queue = 57600  # K, feature queue length, a multiple of the batch; 0: none. Needs loss.momentum
    c.loss.ema = 0.995  # momentum m <- ema * m + (1 - ema) * p, once per step, before the momentum pass
    c.loss.alpha = 0.4  # weight of the soft targets after the ramp
    c.loss.alpha_ramp_epochs = 2.0  # linear ramp of alpha from 0
    c.loss.group_size = 0  # examples among which columns and hard negatives are drawn (one GPU's, originally); 0: all
    c.loss.negatives = "group"  # what retrieval's hard negatives are drawn from: group, the row's | batch, all of them
    c.loss.label_smoothing = 0.1  # of the language modelling loss; in BLIP-2's first stage of the contrastive one too
    c.loss.smoothing_over = "valid"  # mean of that term over: valid positions | all (torch 1.10, the published runs)

    c.optim = ConfigDict()
    c.optim.lr = 3e-4  # peak
    c.optim.min_lr = 1e-6
    c.optim.schedule = "epoch_decay"  # epoch_decay: lr * decay_rate^epoch | epoch_cosine | cosine (per step) | constant
    c.optim.decay_rate = 0.9  # per epoch, for epoch_decay
    c.optim.warmup_steps = 3000  # linear from warmup_lr; in the epoch_* schedules only within epoch 0, as the original
    c.optim.warmup_lr = 1e-6
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.05
    # all (the original: biases, norms, temperature too) | weights (LAVIS: all but biases and norms) | kernels (matrices
    # only)
    c.optim.decay_mask = "all"
    c.optim.freeze = ()  # regexes on parameter paths, e.g. ("vit/.*",): no gradient, no update, no optimiser state
    # (regex on parameter paths, factor) pairs, the first that matches in full counts; others: 1. The factor of the
    # learning rate, hence of the decay too, is a number above 0, or one for each layer of a stack: layer_decay makes
    # such pairs.
    c.optim.lr_factors = ()
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
    c.train.keep_every = 0  # steps: besides them, the checkpoints of every so many stay for good; 0: none
    # beside them, in best/ of the workdir, the one whose evaluation was the best by the task's rule (docs/tasks.md)
    c.train.keep_best = False
    # project of Weights & Biases, or ENTITY/PROJECT, that the log's rows go to as well; "": none. Needs the extra wandb
    c.train.wandb = ""
    # what starts this run: workdir, checkpoint folder, .pth, Hugging Face folder or name; or several with commas
    c.train.init_from = ""

    c.eval = ConfigDict()
    c.eval.k = 128  # candidates per query that the matching head re-ranks
    c.eval.batch = 64  # images or texts per encoder pass
    c.eval.rerank_texts = 16  # texts scored against one image per pass
    c.eval.limit = 0  # first n images only; 0: all
    # of a run's evaluations: examples of data.eval, drawn by the seed, that the training loss is measured on as well;
    # 0: none
    c.eval.loss_examples = 5000
    # NLVR2: exchange the pictures, and "left" and "right", of half of the sentences, as the original's evaluation does
    c.eval.exchange = False
    # how captions are made that evaluation scores: by beams; lengths are tokens, the prompt's counted
    c.eval.beams = 3
    c.eval.min_length = 5
    c.eval.max_length = 20
    c.eval.length_penalty = 1.0  # exponent of the length that divides a score
    c.eval.repetition_penalty = 1.0  # BLIP's of NoCaps: 1.1
    c.eval.spice = ""  # folder of CoreNLP 3.6.0, for SPICE of captions in `blip-jax evaluate`; "": without SPICE
    return c.lock()


def blip2(tower: str = "eva_g", qformer: str = "base", llm: str = "") -> ConfigDict:
    """Every leaf of a run of BLIP-2, with the paper's values for pre-training (BLIP-2 paper, section 3.4).

    tower, qformer, llm: keys of TOWER_SIZES, QFORMER_SIZES and LLM_SIZES; without `llm` the first stage, else the
    second. `cfg.model` has vit, qformer and llm (empty in the first stage) in place of vit and med.
    """
    c = base()
    with c.unlocked():
        c.objective = "blip2_stage2" if llm else "blip2_stage1"
        c.model = ConfigDict()
        c.model.vit = ConfigDict(TOWER_SIZES[tower])
        c.model.qformer = ConfigDict(QFORMER_SIZES[qformer])
        c.model.llm = ConfigDict(LLM_SIZES[llm] if llm else {})
        c.model.img_size = 224  # pixels, square; a multiple of the patch
        c.model.embed_dim = 256  # E, width of the shared contrastive space
        c.model.init_std = 0.02  # of kernels and embeddings that start random
        c.model.drop_path = 0.0  # highest stochastic-depth rate of the tower, where it is trained
        c.model.dropout = 0.1  # Q-Former: hidden states and attention probabilities
        c.model.llm_dropout = 0.1 if llm else 0.0  # of the frozen language model: the original runs it in training mode
        c.model.dtype = "bfloat16"
        # blocks of the tower, where it is trained, as in BLIP; full: layers of Q-Former and language model, too
        c.model.remat = "none"
        # epsilon of ln_vision: LAVIS's 1e-5, Hugging Face's conversions 1e-6
        c.model.vision_eps = 1e-5
        c.text.max_len = 32
        c.text.max_words = 50
        # what a Q-Former that reads questions is given: "{}" the question alone; "": all that the language model reads
        c.text.question = ""
        c.optim.freeze = ("vit/.*", "llm/.*") if llm else ("vit/.*",)
        c.optim.lr, c.optim.min_lr, c.optim.warmup_lr = 1e-4, 5e-5 if llm else 1e-5, 1e-6
        c.optim.schedule, c.optim.warmup_steps = "cosine", 2000
        c.optim.b2, c.optim.decay_mask = 0.98, "weights"
        c.data.crop_scale, c.data.randaugment = (0.5, 1.0), False
        c.loss.momentum, c.loss.queue, c.loss.alpha = False, 0, 0.0
        c.loss.smoothing_over = "valid"
        if llm:  # LAVIS's captions of 8 to 30 tokens; lengths are new tokens here, and LAVIS counts a start id, too
            c.eval.beams, c.eval.min_length = 5, 7
            c.eval.max_length = 29 if LLM_SIZES[llm]["kind"] == "opt" else 30
    return c.lock()


def capfilt() -> ConfigDict:
    """Every leaf of a CapFilt run (`blip-jax capfilt`) with the paper's values; the models bring their own settings."""
    c = ConfigDict()
    # of a model with a decoder or a language model: workdir, checkpoint folder, .pth, Hugging Face folder or name on
    # its hub; or several with commas, a BLIP-2 and the parts that its file lacks
    c.captioner = ""
    # likewise, of a model with an encoder and a matching head; its vocabulary must be the captioner's, if that is no
    # language model
    c.filter = ""
    c.dtype = ""  # compute of both models: bfloat16 | float32; "": as trained
    c.seed = 42  # root of the random streams; each picture has its own, from its key
    c.threshold = 0.5  # matching probability from which a text is kept
    c.device_batch = 64  # pictures per device and pass; scores may differ in the last bit between sizes
    c.shard_examples = 10_000  # records per output shard, the unit of work that is redone after a kill

    c.method = ConfigDict()  # how captions are made; lengths are tokens and count the prompt, but a language model's
    c.method.kind = "nucleus"  # nucleus | beam
    c.method.n = 1  # captions per picture; at most 256, with beam at most method.beams
    c.method.top_p = 0.9  # nucleus: probability that the drawn tokens come from
    c.method.top_k = 50  # nucleus: most probable tokens that are drawn from, the original's hidden default; 0: all
    c.method.temperature = 1.0  # nucleus
    c.method.repetition_penalty = 1.1  # the original: 1.1 with nucleus, 1.0 with beam
    c.method.min_length = 5
    c.method.max_length = 20
    c.method.beams = 3  # beam: width, at most 64
    c.method.length_penalty = 1.0  # beam: exponent, -10 to 10, of the length that divides a score

    c.mesh = ConfigDict()  # devices that share one copy of the parameters: 1 where a device holds them whole
    c.mesh.fsdp = 1  # over which parameters and pictures are split; scores may differ in the last bit between numbers
    c.mesh.tensor = 1  # over which heads, mlp and vocabulary are split, likewise

    c.text = ConfigDict()
    c.text.vocab = ""  # vocab.txt or tokenizer.json, for models that bring none
    c.text.captioner_vocab = ""  # the captioner's, where that is another, as of a language model; "": text.vocab
    c.text.prompt = "a picture of "  # what each caption continues, as the captioner was trained
    c.text.max_words = 30  # words kept by the original's cleaning

    c.data = ConfigDict()
    c.data.sources = ConfigDict()  # name -> source(...); all records of each, weights do not count
    c.data.max_pixels = 89_478_485  # larger pictures are listed as unreadable
    # pictures turned as their EXIF orientation says; False: as stored, which is how training sees them unless told
    c.data.upright = False
    c.data.max_bad_share = 0.05  # more unreadable records than this share of those read (100 at least): stop
    c.data.threads = 4  # decoding threads per process
    c.data.prefetch = 4  # batches decoded ahead
    return c.lock()


def layer_decay(rate: float, depth: int, tower: str = "vit") -> tuple:
    """optim.lr_factors that shrink by `rate` a layer from the last of `depth` blocks to the input.

    As BEiT does it (arXiv 2106.08254, appendix).

    The last block has rate, the first rate^depth, what comes before the blocks rate^(depth + 1), what comes after them
    1.
    """
    blocks = tuple(rate ** (depth - i) for i in range(depth))
    return (f"{tower}/blocks/.*", blocks), (f"{tower}/(patch_embed/.*|cls|pos_embed)", rate ** (depth + 1))
