"""The settings that a checkpoint of ours carries: checked before anything is built, as the file may be anybody's."""

from __future__ import annotations

import math
import pathlib

from ml_collections import ConfigDict

from blip_jax import config, trees

SIZES = {  # leaf -> (a parameter, the dimension of it that has this size)
    "model.embed_dim": ("vision_proj/kernel", 1),
    "model.vit.depth": ("vit/blocks/mlp/fc1/kernel", 0),
    "model.vit.width": ("vit/blocks/mlp/fc1/kernel", 1),
    "model.vit.mlp": ("vit/blocks/mlp/fc1/kernel", 2),
    "model.vit.heads": ("vit/blocks/attn/q/kernel", 2),
    "model.vit.patch": ("vit/patch_embed/kernel", 0),
    "model.med.layers": ("med/blocks/mlp/fc1/kernel", 0),
    "model.med.width": ("med/blocks/mlp/fc1/kernel", 1),
    "model.med.mlp": ("med/blocks/mlp/fc1/kernel", 2),
    "model.med.heads": ("med/blocks/cross_attn/q/kernel", 2),
    "model.med.positions": ("med/embed/pos/embedding", 0),
    "model.qformer.layers": ("qformer/blocks/query_mlp/fc1/kernel", 0),
    "model.qformer.width": ("qformer/blocks/query_mlp/fc1/kernel", 1),
    "model.qformer.mlp": ("qformer/blocks/query_mlp/fc1/kernel", 2),
    "model.qformer.heads": ("qformer/blocks/self_attn/q/kernel", 2),
    "model.qformer.positions": ("qformer/embed/pos/embedding", 0),
    "model.qformer.queries": ("query_tokens", 0),
}
_OF_OPT = {
    "model.llm.layers": ("llm/blocks/mlp/fc1/kernel", 0),
    "model.llm.width": ("llm/blocks/mlp/fc1/kernel", 1),
    "model.llm.mlp": ("llm/blocks/mlp/fc1/kernel", 2),
    "model.llm.heads": ("llm/blocks/attn/q/kernel", 2),
    "model.llm.embed_width": ("llm/embed/word/embedding", 1),
}
_OF_T5 = {
    "model.llm.layers": ("llm/encoder/blocks/mlp/wi_0/kernel", 0),
    "model.llm.width": ("llm/encoder/blocks/mlp/wi_0/kernel", 1),
    "model.llm.mlp": ("llm/encoder/blocks/mlp/wi_0/kernel", 2),
    "model.llm.heads": ("llm/encoder/blocks/attn/q/kernel", 2),
    "model.llm.head_dim": ("llm/encoder/blocks/attn/q/kernel", 3),
    "model.llm.buckets": ("llm/encoder/rel_bias/embedding", 0),
}
LLM_SIZES = {"opt": _OF_OPT, "t5": _OF_T5}
VOCABULARIES = ("model.med.vocab_size", "model.qformer.vocab_size", "model.llm.vocab_size", "model.llm.max_distance")
ALWAYS = ("model.img_size", "text.max_len", "text.max_words")


def base_of(model) -> ConfigDict:
    """`config.base()`, or `config.blip2()` with the kinds of parts that settings `model` have."""
    if not isinstance(model, dict) or "qformer" not in model:
        return config.base()
    part = lambda name: model.get(name) if isinstance(model.get(name), dict) else {}
    c = config.blip2(llm={"opt": "opt_2.7b", "t5": "flant5_xl"}.get(part("llm").get("kind"), ""))
    with c.unlocked():
        if not part("vit"):
            c.model.vit = ConfigDict()
        # leaves that only some models have
        for leaf, like in (("decoder_layers", 0), ("act", "")):
            if leaf in part("llm"):
                c.model.llm[leaf] = like
    return c


def settings(saved, folder: pathlib.Path) -> ConfigDict:
    """`config.base()`, or `config.blip2()`, with objective, model and texts as `saved` in the checkpoint `folder`.

    ValueError, in one line: no settings, or some that no model can have.
    """
    c = base_of(saved.get("model") if isinstance(saved, dict) else None)
    known = trees.flat({"objective": c.objective, "model": c.model.to_dict(), "text": c.text.to_dict()})
    if not isinstance(saved, dict):
        raise _refused(folder, [f"they are a {type(saved).__name__}, not settings"])
    parts = {name: saved[name] for name in ("objective", "model", "text") if name in saved}
    given = trees.flat(parts)
    sizes = [name for name in {**SIZES, **_OF_OPT, **_OF_T5, **dict.fromkeys(VOCABULARIES)} if name in known]
    whole = (*sizes, *ALWAYS)
    problems = [f"{name} is missing" for name in ("objective", *whole) if name not in given]
    for name in sorted(given.keys() & known.keys()):
        value, like = given[name], known[name]
        if not isinstance(value, _types(like)) or isinstance(value, bool) != isinstance(like, bool):
            problems.append(f"{name} is {value!r:.60}, not {_kind(like)}")
        elif name in whole and not 1 <= value < 2**31:
            problems.append(f"{name} is {value!r:.60}: it must be at least 1 and below 2**31")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name} is {value!r}")
    problems += [f"{name} is {given[name]!r:.60}, not settings" for name in ("model", "text") if name in given]
    if not problems:
        problems += [
            f"model.{part}.width = {given[f'model.{part}.width']} does not divide into model.{part}.heads = "
            f"{given[f'model.{part}.heads']}"
            for part in ("vit", "med", "qformer")
            if f"model.{part}.width" in known and given[f"model.{part}.width"] % given[f"model.{part}.heads"]
        ]
    if problems:
        raise _refused(folder, problems)
    with c.unlocked():
        for name in given.keys() & known.keys():
            node, leaf = c, name.split(".")
            for part in leaf[:-1]:
                node = node[part]
            node[leaf[-1]] = tuple(given[name]) if isinstance(known[name], tuple) else given[name]
    return c


def check_sizes(cfg, params: dict, folder: pathlib.Path) -> None:
    """ValueError, in one line: the settings of the checkpoint `folder` have other sizes than its parameters."""
    shapes, sizes = {path: x.shape for path, x in trees.paths(params)}, trees.flat({"model": cfg.model.to_dict()})
    kind = sizes.get("model.llm.kind", "")
    problems = [
        f"{name} is {sizes[name]}, but {path} is {list(shapes[path])}"
        for name, (path, axis) in (SIZES | LLM_SIZES.get(kind, {})).items()
        if path in shapes and name in sizes and (len(shapes[path]) <= axis or shapes[path][axis] != sizes[name])
    ]
    if problems:
        raise _refused(folder, problems)


def _types(like) -> tuple[type, ...]:
    kinds = {float: (float, int), tuple: (list, tuple)}
    return kinds.get(type(like), (type(like),))


def _kind(like) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}.get(type(like), "a list")


def _refused(folder: pathlib.Path, problems: list[str]) -> ValueError:
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return ValueError(
        f"the settings in checkpoint {folder} are not those of a model: {'; '.join(problems[:5])}{more}; they were "
        "changed or damaged: use another checkpoint"
    )
