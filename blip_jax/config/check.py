"""What is wrong with a config whatever its task: every problem with its remedy, before anything compiles."""

from __future__ import annotations

import importlib.util
import math
import pkgutil
import re

from ml_collections import ConfigDict

from blip_jax.config.sizes import ADDED, text_side

CHOICES = {
    "model.dtype": ("bfloat16", "float32"),
    "model.remat": ("none", "dots", "full"),
    "loss.smoothing_over": ("valid", "all"),
    "optim.schedule": ("epoch_decay", "epoch_cosine", "cosine", "constant"),
    "optim.decay_mask": ("all", "weights", "kernels"),
}
SOURCE_KINDS = ("scenes", "tsv")  # besides the modules of FORMATS
FORMATS = "blip_jax.data.formats"
RANGES = {  # leaf -> (least, most), both allowed
    **dict.fromkeys(
        (
            "train.batch",
            "train.steps",
            "train.log_every",
            "train.save_every",
            "train.keep",
            "optim.accumulate",
            "model.embed_dim",
            "model.vit.depth",
            "text.max_words",
            "text.bucket_window",
            "data.max_pixels",
            "data.threads",
            "data.prefetch",
            "eval.k",
            "eval.batch",
            "eval.rerank_texts",
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(
        (
            "train.eval_every",
            "train.keep_every",
            "eval.limit",
            "eval.loss_examples",
            "data.epoch_examples",
            "loss.queue",
            "loss.group_size",
            "loss.alpha_ramp_epochs",
            "optim.min_lr",
            "optim.warmup_steps",
            "optim.warmup_lr",
            "optim.weight_decay",
            "optim.clip",
            "seed",
        ),
        (0, math.inf),
    ),
    **dict.fromkeys(
        ("data.max_bad_share", "loss.ema", "loss.alpha", "loss.label_smoothing", "optim.decay_rate"), (0, 1)
    ),
    **dict.fromkeys(("model.dropout", "model.drop_path", "optim.b1", "optim.b2"), (0, math.nextafter(1, 0))),
    **dict.fromkeys(("optim.lr", "optim.eps", "model.init_std", "model.vit.pos_std"), (math.ulp(0), math.inf)),
    "text.max_len": (3, math.inf),  # [CLS], one token, [SEP]
}


def source_kinds() -> tuple[str, ...]:
    """Every kind of source there is."""
    folder = importlib.util.find_spec(FORMATS).submodule_search_locations
    return (*SOURCE_KINDS, *sorted(module.name for module in pkgutil.iter_modules(folder)))


def problems(
    cfg: ConfigDict,
    tokenizer_vocab_size: int | None = None,
    process_count: int = 1,
    device_count: int = 1,
    trained: bool = True,
) -> list[str]:
    """What is wrong with a resolved config whatever its task, each with its remedy.

    `tokenizer_vocab_size`: entries of the vocabulary with [DEC] and [ENC], or None where it is not read yet. `trained`:
    whether the task is trained at all; of others nothing is asked of `train` and `data.train`.
    """
    found = [*_values(cfg), *_sizes(cfg, tokenizer_vocab_size), *_sources(cfg, trained)]
    if not trained:
        found = [p for p in found if not p.startswith("train.")]
    if not any(p.startswith(("train.batch", "optim.accumulate")) for p in found):
        found += _mesh(cfg, device_count) or (_batch(cfg, process_count, device_count) if trained else [])
    return found


def refuse(problems: list[str]) -> None:
    """ValueError: there are problems, all of them listed."""
    if problems:
        raise ValueError(
            f"the config has {len(problems)} problem{'s' * (len(problems) > 1)}:\n"
            + "\n".join(f"  {p}" for p in problems)
        )


def _leaf(cfg, path: str):
    for name in path.split("."):
        cfg = cfg[name]
    return cfg


def _values(cfg) -> list[str]:
    out = [
        f"{path} is {_leaf(cfg, path)!r}: choose one of {', '.join(choices)}"
        for path, choices in CHOICES.items()
        if _leaf(cfg, path) not in choices
    ]
    for path, (least, most) in RANGES.items():
        value = _leaf(cfg, path)
        if not least <= value <= most:
            out.append(f"{path} is {value}: it must {_allowed(least, most)}")

    scale = tuple(cfg.data.crop_scale)
    if len(scale) != 2 or not all(map(_is_number, scale)) or not 0 < scale[0] <= scale[1] <= 1:
        out.append(f"data.crop_scale is {scale}: give two shares of the area, 0 < least <= most <= 1")
    return out + _kept(cfg) + _patterns(cfg) + _buckets(cfg)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kept(cfg) -> list[str]:
    """Whether the checkpoints that are to stay for good are written at all."""
    every, saved = cfg.train.keep_every, {"save_every": cfg.train.save_every, "eval_every": cfg.train.eval_every}
    if every <= 0 or any(n > 0 and every % n == 0 for n in saved.values()):
        return []
    return [
        f"train.keep_every is {every}: checkpoints are written every {saved['save_every']} steps (train.save_every): "
        f"give a multiple of that, as {nearest(every, saved['save_every'])}, or 0 to keep the newest alone"
    ]


def _allowed(least: float, most: float) -> str:
    """A row of RANGES in words, behind "it must"."""
    if most == math.inf:
        if least == 0:
            return "not be negative"
        return "be positive" if least < 1 else f"be at least {least}"
    return "lie between 0 and 1" if most == 1 else "be at least 0 and below 1"


def _patterns(cfg) -> list[str]:
    """What is wrong with the regular expressions that name parameters."""
    factors = tuple(cfg.optim.lr_factors)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str) for pair in factors):
        return [f"optim.lr_factors is {factors}: give (regex, factor) pairs"]

    out = []
    for leaf, patterns in (("freeze", cfg.optim.freeze), ("lr_factors", [pattern for pattern, _ in factors])):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as e:
                out.append(f"optim.{leaf} holds {pattern!r}, which is no regular expression: {e}")

    for pattern, factor in factors:
        of_layers = factor if isinstance(factor, (tuple, list)) else (factor,)
        if not all(_is_number(f) and f > 0 for f in of_layers):
            out.append(
                f"optim.lr_factors has {factor!r} for {pattern!r}: factors are positive numbers; to keep "
                "parameters as they are, name them in optim.freeze"
            )
    return out


def _buckets(cfg) -> list[str]:
    buckets, last = tuple(cfg.text.buckets), cfg.text.max_len
    if not buckets:
        return []

    whole = all(isinstance(T, int) for T in buckets)
    if whole and list(buckets) == sorted({*buckets}) and buckets[0] >= 3 and buckets[-1] == last:
        return []
    example = ", ".join(str(T) for T in (*(T for T in (12, 16, 20) if T < last), last))
    return [
        f"text.buckets is {buckets}: give ascending whole numbers of at least 3 positions, the last of them "
        f"text.max_len = {last}, as ({example}), or () for none"
    ]


def _sizes(cfg, tokenizer_vocab_size) -> list[str]:
    m, out = cfg.model, []
    if m.vit.patch < 1 or m.img_size < 1 or m.img_size % m.vit.patch:
        out.append(
            f"model.img_size is {m.img_size}: it must be a multiple of model.vit.patch = {m.vit.patch}, "
            f"as {nearest(m.img_size, m.vit.patch)}"
        )
    side = text_side(m)
    if side.sizes.layers < 1:
        out.append(f"model.{side.part}.layers is {side.sizes.layers}: it must be at least 1")
    for name, part in (("vit", m.vit), (side.part, side.sizes)):
        apart = "head_dim" in part  # T5's heads need not make up the width
        if part.heads < 1 or part.width < 1 or part.width % part.heads and not apart:
            out.append(
                f"model.{name}.width is {part.width}: it must be a multiple of model.{name}.heads = "
                f"{part.heads}, as {nearest(part.width, part.heads)}"
            )
    if side.positions < cfg.text.max_len:
        out.append(
            f"text.max_len is {cfg.text.max_len} but the text model has model.{side.part}.positions = "
            f"{side.positions}: lower the first to {side.positions} or raise the second"
        )
    if not cfg.text.vocab:
        out.append("text.vocab is empty: give a vocab.txt or tokenizer.json; `blip-jax vocab` trains one from captions")
    if tokenizer_vocab_size is None:
        return out
    if not side.added:
        if tokenizer_vocab_size > side.vocab_size:
            out.append(
                f"{cfg.text.vocab} has {tokenizer_vocab_size} entries, more than model.{side.part}.vocab_size = "
                f"{side.vocab_size}: give the language model's own tokenizer"
            )
        return out
    entries = tokenizer_vocab_size - len(ADDED) + len(side.added)
    if entries != side.vocab_size:
        out.append(
            f"model.{side.part}.vocab_size is {side.vocab_size}, but {cfg.text.vocab} has {entries} "
            f"entries with {' and '.join(side.added)}: set model.{side.part}.vocab_size={entries} or name another "
            "text.vocab"
        )
    return out


def _sources(cfg, trained: bool) -> list[str]:
    out = []
    if trained and not len(cfg.data.train):
        out.append("data.train is empty: add a source, c.data.train.name = source(kind, path)")
    for part in ("train", "eval"):
        for name, src in cfg.data[part].items():
            where = f"data.{part}.{name}"
            if src.kind not in (kinds := source_kinds()):
                out.append(f"{where}.kind is {src.kind!r}: choose one of {', '.join(kinds)}")
            elif src.kind == "scenes" and src.count < 1:
                out.append(f"{where}.count is {src.count}: a scenes source needs a number of records, at least 1")
            elif src.kind != "scenes" and not src.path:
                out.append(f"{where}.path is empty: a source of kind {src.kind} needs a file or a glob of shards")
            if not src.weight > 0:
                out.append(f"{where}.weight is {src.weight}: it must be positive; to leave the source out, delete it")
    return out


def _mesh(cfg, device_count: int) -> list[str]:
    """What does not divide the devices into the mesh."""
    axes = (cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    known = math.prod(a for a in axes if a > 0)
    if axes.count(-1) > 1 or any(a == 0 or a < -1 for a in axes):
        return [f"mesh (data, fsdp, tensor) is {axes}: axes are positive, at most one of them is -1 (the rest)"]
    if device_count % known or (-1 not in axes and known != device_count):
        return [
            f"mesh (data, fsdp, tensor) is {axes}, {known} devices{' or a multiple' if -1 in axes else ''}, but "
            f"{device_count} are here: the product must equal it, as ({device_count}, 1, 1) or (-1, 1, 1) does"
        ]
    return []


def _batch(cfg, process_count: int, device_count: int) -> list[str]:
    """What does not divide the batch into the devices, of a mesh that fits, and the processes."""
    batch, accumulate = cfg.train.batch, cfg.optim.accumulate
    known = math.prod(a for a in (cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor) if a > 0)
    tensor = cfg.mesh.tensor if cfg.mesh.tensor > 0 else device_count // known
    rows = device_count // tensor
    unit = math.lcm(rows, process_count) * accumulate
    if batch % unit == 0:
        return []
    return [
        f"train.batch is {batch}: it must be a multiple of {unit} ({rows} devices along data x fsdp, "
        f"{process_count} processes, optim.accumulate = {accumulate}), as {nearest(batch, unit)}"
    ]


def nearest(value: int, unit: int) -> str:
    """The multiples of `unit` on either side of `value`."""
    if unit < 1:
        return "a multiple of a positive number"
    below = value // unit * unit
    return f"{below} or {below + unit}" if below > 0 else f"{unit}"
