"""What a checkpoint of BLIP-2 shows of its model: its parts, their heads and settings; and parts put together.

LAVIS's files leave out what was frozen, so a model comes of several files. What a file does not have is named, and
taken for the published part of the width that the rest shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ml_collections import ConfigDict

from blip_jax import config
from blip_jax.config import LLM_SIZES, QFORMER_SIZES, TOWER_SIZES
from blip_jax.convert import towers
from blip_jax.convert.rules.blip2 import FAMILIES, INITIAL, WHOLE, WORDS
from blip_jax.convert.source import Source

HEAD_DIM = {"eva": 88, "clip": 64, "qformer": 64}  # of the released parts
PARTS = {"vit": "image encoder", "qformer": "Q-Former", "llm": "language model"}
TOWER_MARKS = {"eva": "blocks.0.attn.q_bias", "clip": "transformer.resblocks.0.attn.in_proj_weight"}


def kinds(family: str, names: Iterable[str]) -> dict[str, str]:
    """Part -> its kind, of those of "vit" (eva, clip) and "llm" (opt, t5) that tensors of these names have.

    "norm": of OPT, whether its layers have the norm before the residual ("pre") or behind ("post").
    """
    names, out = set(names), {}
    for kind, mark in TOWER_MARKS.items():
        if mark in names or f"visual_encoder.{mark}" in names:
            out["vit"] = kind
    llm = WHOLE.get(family, family if family in ("opt", "t5") else "")
    if llm and (family == llm or any(name.startswith(f"{llm}_model.") for name in names)):
        out["llm"] = llm
        out["norm"] = "pre" if any(name.endswith("model.decoder.final_layer_norm.weight") for name in names) else "post"
    return out


def family_of(cfg) -> str:
    """The family of a run of ours of `cfg`, "" of one of BLIP."""
    kind = cfg.model.llm.kind if cfg.model.get("llm") else ""
    families = {"blip2_stage1": "blip2", "blip2_stage2": f"blip2_{kind}", "blip2_vqa": f"instruct_{kind}"}
    return (families | {"language": kind}).get(cfg.objective, "")


def depth(tensors: Mapping) -> int:
    """Blocks that BLIP-2 takes of an image tower of a released width; 0: it has another."""
    kind, prefix = towers.find(tensors)
    name = prefix + {"eva": "cls_token", "clip": "class_embedding"}[kind]
    width = tensors[name].shape[-1] if tensors[name].shape else 0
    return next((s["depth"] for s in _published("vit", kind).values() if s["width"] == width), 0)


def t5_prefix(names: Iterable[str]) -> str | None:
    """What stands before the names of a T5; None where there is none."""
    names = list(names)
    return next((p for p in ("t5_model.", "") if any(re.match(re.escape(p) + _T5_BLOCK, n) for n in names)), None)


def refuse_half(tensors: Mapping) -> None:
    """ValueError: tensors of a T5 in float16."""
    half = [name for name, x in tensors.items() if str(x.dtype) == "float16" and name.startswith(_T5_NAMES)]
    if half:
        raise ValueError(
            f"{len(half)} tensors of T5 are float16, in which its layers overflow, such as {half[0]}: "
            "give it in float32 or bfloat16"
        )


_T5_BLOCK = r"(encoder|decoder)\.block\.\d"
_T5_NAMES = ("t5_model.", "shared.", "encoder.block.", "decoder.block.")


# --- heads ------------------------------------------------------------------------------------------------------------
def heads(
    origin: str,
    sizes: Mapping[str, int],
    found: Mapping[str, str],
    given: Mapping[str, int],
    said: Mapping[str, int],
    notes: list[str],
) -> dict[str, int]:
    """Part -> its number of heads.

    Args:
      found: of `kinds`. given: what the caller says, said: what settings beside the weights say.
    ValueError: the two differ, or neither says it and it is none of the released parts.
    """
    out = {}
    if "vit" in found:
        out["vit"] = _heads(origin, "vit", found["vit"], sizes.get("D"), given, said, notes)
    if "W" in sizes:
        out["qformer"] = _heads(origin, "qformer", "qformer", sizes["W"], given, said, notes)
    if found.get("llm") == "opt":
        out["llm"] = _heads(origin, "llm", "opt", sizes.get("C"), given, said, notes)
    elif found.get("llm") == "t5" and "A" in sizes:
        out["llm"] = sizes["A"]  # columns of the table of relative positions
        for who, n in (("it is given as", given.get("llm")), ("config.json says", said.get("llm"))):
            if n and n != out["llm"]:
                raise ValueError(f"{origin}: its T5 has {out['llm']} heads, but {who} {n}")
    return out


def _heads(origin, part: str, kind: str, width: int | None, given: Mapping, said: Mapping, notes: list[str]) -> int:
    asked, told = given.get(part, 0), said.get(part, 0)
    if asked and told and asked != told:
        raise ValueError(
            f"{origin}: its config.json says {told} heads of the {PARTS[part]}, not {asked}: leave out --{part}_heads, "
            f"or of a run set model.{part}.heads={told}"
        )
    if told or asked or width is None:
        return told or asked or 1
    published = {s["width"]: s["heads"] for s in _published(part, kind).values()}
    if width in published:
        return published[width]
    if kind not in HEAD_DIM or width % HEAD_DIM[kind]:
        raise ValueError(
            f"{origin}: the {PARTS[part]}'s width {width} is none of the released ones "
            f"({', '.join(map(str, sorted(published)))}): give the number of heads with --{part}_heads"
        )
    notes.append(
        f"the number of heads of the {PARTS[part]} is not said anywhere: {width // HEAD_DIM[kind]} taken, width / "
        f"{HEAD_DIM[kind]} as in the released models; --{part}_heads if it is another"
    )
    return width // HEAD_DIM[kind]


def _published(part: str, kind: str) -> dict[str, dict]:
    """Name -> sizes of the released parts of a kind; "": of any."""
    table = {"vit": TOWER_SIZES, "qformer": QFORMER_SIZES, "llm": LLM_SIZES}[part]
    return {
        name: sizes
        for name, sizes in table.items()
        if not name.endswith("tiny") and kind in ("", part, sizes.get("kind"))
    }


# --- settings ---------------------------------------------------------------------------------------------------------
def settings(
    family: str,
    sizes: Mapping[str, int],
    layers: Mapping[str, int],
    found: Mapping[str, str],
    heads: Mapping[str, int],
    llm_leaves: Mapping,
    notes: list[str],
) -> ConfigDict:
    """`config.blip2` with the sizes that tensors show. A part that is not there is the published one of the width that
    the rest of the model has, which `notes` say, or empty.

    llm_leaves: of `cfg.model.llm`, as settings beside the weights say them.
    """
    llm = WHOLE.get(family, found.get("llm", ""))
    c = config.blip2(llm={"opt": "opt_2.7b", "t5": "flant5_xl"}.get(llm, ""))
    with c.unlocked():
        model = c.model
        if "vit" in found:
            model.vit = ConfigDict(
                dict(
                    kind=found["vit"],
                    width=sizes["D"],
                    depth=layers["vit"],
                    heads=heads["vit"],
                    mlp=sizes["F"],
                    patch=sizes["p"],
                    pos_std=model.vit.pos_std,
                )
            )
            model.img_size = int((sizes["P"] - 1) ** 0.5) * sizes["p"]
        elif family in WHOLE:
            model.vit = _absent("vit", "", "width", sizes.get("D"), "ln_vision", notes)
        if "W" in sizes and family in WHOLE:
            model.qformer.update(width=sizes["W"], layers=layers["qformer"], heads=heads["qformer"])
            model.qformer.update(mlp=sizes["M"], queries=sizes["Q"])
            model.qformer.positions = sizes.get("T", model.qformer.positions)
            model.qformer.vocab_size = sizes.get("V", model.qformer.vocab_size)
        model.embed_dim = sizes.get("E", model.embed_dim)
        if "llm" in found:
            model.llm.update(_llm(found["llm"], sizes, layers, heads["llm"], found["norm"] == "pre") | dict(llm_leaves))
            if found["llm"] == "t5" and "max_distance" not in llm_leaves:
                notes.append(
                    f"the largest distance that T5 tells apart is not in the file: {model.llm.max_distance} taken, as "
                    "in the released models"
                )
        elif llm:
            width = sizes.get("J" if llm == "opt" else "C")
            model.llm = _absent("llm", llm, "embed_width" if llm == "opt" else "width", width, f"{llm}_proj", notes)
    return c


def _llm(kind: str, sizes: Mapping[str, int], layers: Mapping[str, int], heads: int, pre_norm: bool) -> dict:
    if kind == "opt":
        return dict(
            width=sizes["C"],
            layers=layers["llm"],
            heads=heads,
            mlp=sizes["G"],
            embed_width=sizes["J"],
            pre_norm=pre_norm,
            positions=sizes["S"] - 2,
            vocab_size=sizes["U"],
        )
    out = dict(width=sizes["C"], layers=layers["llm/encoder"], heads=heads, head_dim=sizes["I"] // heads)
    if layers["llm/decoder"] != layers["llm/encoder"]:
        out["decoder_layers"] = layers["llm/decoder"]
    return out | dict(mlp=sizes["G"], buckets=sizes["R"], vocab_size=sizes["U"])


def _absent(part: str, kind: str, field: str, width: int | None, shown: str, notes: list[str]) -> ConfigDict:
    """Settings of a part that the file does not have."""
    fitting = [name for name, sizes in _published(part, kind).items() if sizes[field] == width]
    what = f"the {PARTS[part]} is not in the file"
    if not fitting:
        notes.append(f"{what}, and no published one has the width {width} that {shown} shows: a run's config names it")
        return ConfigDict()
    notes.append(f"{what}: its settings are those of {fitting[0]}, which has the width {width} of {shown}")
    return ConfigDict(_published(part, kind)[fitting[0]])


# --- several files ----------------------------------------------------------------------------------------------------
def composed(named: Sequence[tuple[str, Source]]) -> Source:
    """One model of a BLIP-2 checkpoint and the parts that it lacks.

    ValueError: not exactly one of them is a BLIP-2, or a part that it has already, or that does not fit it.
    """
    whole = [(name, source) for name, source in named if source.family in WHOLE]
    if len(whole) != 1:
        held = ", ".join(f"{name} holds {WORDS.get(source.family, (source.family,))[0]}" for name, source in named)
        raise ValueError(
            f"of several files one must be a checkpoint of BLIP-2, and the others parts that it lacks: {held}"
        )
    origin, source = whole[0]
    state = {"params": dict(source.state["params"])}
    cfg, notes, vocab = source.cfg.copy_and_resolve_references(), list(source.notes), source.vocab
    for name, part in named:
        if part is source:
            continue
        if part.family not in INITIAL:
            raise ValueError(f"{name} holds {WORDS.get(part.family, (part.family,))[0]}, no part of a BLIP-2")
        (key,) = part.state["params"]
        if key in state["params"]:
            raise ValueError(f"{origin} has its {PARTS[key]} itself: leave out {name}")
        fits(origin, source, name, part)
        state["params"][key] = part.state["params"][key]
        with cfg.unlocked():
            cfg.model[key] = part.cfg.model[key]
            if key == "vit":
                cfg.model.img_size = part.cfg.model.img_size
        notes = [note for note in notes if f"the {PARTS[key]} is not in the file" not in note]
        notes += [f"{PARTS[key]} from {name}", *(f"{name}: {note}" for note in part.notes)]
        vocab = part.vocab or vocab
    return source._replace(state=state, cfg=cfg, notes=notes, vocab=vocab)


def fits(origin: str, source: Source, name: str, part: Source) -> None:
    """ValueError: a part is of another kind or width than the model that lacks it."""
    params, problem = source.state["params"], ""
    if "vit" in part.state["params"]:
        want, have = params["ln_vision"]["scale"].shape[0], part.cfg.model.vit.width
        if want != have:
            problem = f"its ln_vision is for an image encoder of width {want}, but {name} is {have} wide"
            problem += _named("vit", "", "width", want)
    else:
        want, have = params.get("llm_proj", {}).get("kernel"), part.family
        llm = WHOLE[source.family]
        width = part.cfg.model.llm.embed_width if have == "opt" else part.cfg.model.llm.width
        if not llm:
            problem = (
                f"{WORDS[source.family][0]} has no language model, and {name} is one: give a second-stage checkpoint"
            )
        elif llm != have:
            problem = f"its projection is {llm}_proj, for {llm.upper()}, but {name} is a language model {have.upper()}"
        elif want.shape[1] != width:
            problem = f"its {llm}_proj is for a language model of width {want.shape[1]}, but {name} is {width} wide"
            problem += _named("llm", llm, "embed_width" if llm == "opt" else "width", want.shape[1])
    if problem:
        raise ValueError(f"{origin}: {problem}")


def _named(part: str, kind: str, field: str, width: int) -> str:
    names = [name for name, sizes in _published(part, kind).items() if sizes[field] == width]
    return f": give that of {' or '.join(names)}" * bool(names)


def is_one(family: str) -> bool:
    return family in FAMILIES
