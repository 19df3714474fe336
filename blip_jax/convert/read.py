"""Checkpoints of others, and ours, read as one kind of thing.

What comes of each: its family, parameters, settings and vocabulary.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from blip_jax import buckets, checkpoint, trees
from blip_jax.convert import (
    apply,
    bert,
    blip2,
    bucket,
    foreign,
    hf,
    hf_blip2,
    hf_blip2_config,
    hf_clip,
    hub,
    language_models,
    origins,
    saved,
    torch_io,
    vocabulary,
)
from blip_jax.convert.recognise import find_family, plain_names
from blip_jax.convert.rules.blip2 import MATCHING, READS_QUESTIONS, WHOLE
from blip_jax.convert.rules.families import FAMILIES, WORDS
from blip_jax.convert.source import POSITION_IDS, Source, dtype_notes, make_config
from blip_jax.convert.tied import words_and_head
from blip_jax.data.text.wordpiece import EXTRA
from blip_jax.models.vision.towers import resized

HEAD_DIM = 64  # of every released model
RELEASED = (768, 1024)  # their widths
NAMES = {"deit": "timm", "bert": "BERT", "clip": "CLIP"} | language_models.KINDS
TASKS = {  # family -> objective, tokens of a text, what captions continue
    "pretrain": ("pretrain", 30, ""),
    "retrieval": ("retrieval", 35, ""),
    "itm": ("retrieval", 35, ""),
    "features": ("retrieval", 35, ""),
    "caption": ("caption", 40, "a picture of "),
    "vqa": ("vqa", 35, ""),
    "nlvr": ("nlvr", 64, ""),
    "dialog": ("dialog", 256, ""),
    **dict.fromkeys(("deit", "augreg", "bert"), ("pretrain", 30, "")),
    **dict.fromkeys(("blip2", *MATCHING, "eva", "clip"), ("blip2_stage1", 32, "")),
    **dict.fromkeys(("blip2_opt", "blip2_t5", "opt", "t5"), ("blip2_stage2", 32, "")),
    # LAVIS cuts what this Q-Former reads to 128 tokens
    **dict.fromkeys(READS_QUESTIONS, ("blip2_vqa", 128, "")),
}


def locate(path) -> pathlib.Path:
    """What `read` reads: a file, a Hugging Face folder, or the newest checkpoint folder of our workdir.

    A folder named on the hub is fetched where need be, what is others' and on a bucket always.

    ValueError: no such file or folder, nor a name on the hub; no complete checkpoint in the workdir; no name at all.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path).strip():
        raise ValueError(
            f"{path!r} names no checkpoint: give a workdir, a file, a Hugging Face folder or a name on its hub; '.' is "
            "the current folder"
        )
    if buckets.is_bucket(path):
        found = buckets.of(path, "the checkpoint")
        return checkpoint.newest(found) if _is_ours(found) else bucket.copy(found)
    found = pathlib.Path(path).absolute() if pathlib.Path(path).exists() else hub.folder(str(path))
    return checkpoint.newest(found) if _is_ours(found) else found


def read(
    path,
    *,
    family: str = "",
    img_size: int = 0,
    heads: Mapping[str, int] | None = None,
    vocab: str | None = "",
    momentum: bool = True,
    drop_token_types: bool = False,
) -> Source:
    """A checkpoint of any kind, as one `Source`.

    An official or LAVIS .pth, a Hugging Face folder or name on its hub, initial weights, or a workdir of ours.

    Args:
      path: several names, separated by commas, are a checkpoint of BLIP-2 and the parts that it lacks.
      family: "" = as found; else it must be that, or a part of it (`rules.families.WORDS`): the rest is left out.
      img_size: pixels; resizes the position table as the originals do.
      heads: part -> its number of heads, {"vit": 12, "med": 12}, where neither the file nor a config.json beside it
        says; default: that of the released models of its width, else width / 64.
      vocab: vocab.txt or tokenizer.json, which must mean the same as one that came with the checkpoint; "": that one,
        else BERT's from the Hugging Face hub's cache. Two with a comma where a Q-Former reads questions: the language
        model's, and BERT's. None: those that came with it, or none, unchecked.
      momentum: False leaves the momentum encoder and queues of a workdir unread, where only the model is wanted.
      drop_token_types: of BERT, leaves out the row that it adds to every token of a single text, as the original BLIP
        does; False: it goes into the position table, so that the encoder starts as BERT.
    Raises: ValueError: it is none of these, not complete, of another family; no vocabulary, one of another size or of
      other tokens; settings beside the weights that contradict them or our models.
    """
    named = origins.names(path) if isinstance(path, str) else [path]
    if len(named) > 1:
        found = [(name, locate(name)) for name in named]
        source = blip2.composed(
            [(name, _open(x, "", (heads or {}) if x.is_file() else {}, False)) for name, x in found]
        )
        source = narrow(source, family or source.family, path)
    else:
        path = locate(path)
        source = _open(path, family, heads or {}, momentum, (), drop_token_types)
    if img_size and "vit" in source.state["params"]:
        _resize(source, img_size)
    return source if vocab is None else vocabulary.settled(source, vocab, str(path))


def frozen(folder: pathlib.Path, moved: Sequence[str] = (), via: tuple = ()) -> dict:
    """The frozen parameters of a checkpoint folder of ours, nested NumPy f32, from their origin; {} where it has none.

    Args:
      moved: where the origins lie now, if not where the checkpoint says.
      via: checkpoint folders whose frozen parameters led here.
    ValueError: an origin is missing, cannot be read, or holds other numbers than it did; checkpoints that refer to each
      other in a circle.
    """
    reference = checkpoint.load_data(folder).get("frozen")
    if not reference:
        return {}
    if folder in via:
        raise ValueError(
            "checkpoints refer to each other for their frozen parameters in a circle: "
            + " -> ".join(map(str, (*via[via.index(folder) :], folder)))
        )
    cfg, leaves = _settings(folder), reference["leaves"]
    places = list(moved) or [origins.place(origin, checkpoint.home(folder)) for origin in reference["origins"]]
    names = " + ".join(places) or f"the random numbers of seed {reference['random']['seed']}"
    try:
        sources = [(place, _open_origin(place, cfg, (*via, folder))) for place in places]
        params = origins.restored(reference, cfg, sources, names)
    except ValueError as e:
        raise ValueError(
            f"checkpoint {folder}: its frozen parameters ({origins.summary(leaves)}) cannot be restored from {names}: "
            f"{e}; {origins.REMEDY}"
        ) from None
    found = origins.described(params, leaves)
    if lines := origins.differences(leaves, found):
        raise ValueError(
            f"checkpoint {folder}: its frozen parameters came from {names}, which holds others now: expected "
            f"{origins.summary(leaves)}, found {origins.summary(found)}; they differ in\n  "
            + "\n  ".join(lines)
            + f"\n{origins.REMEDY}"
        )
    return params


def _open_origin(place: str, cfg, via: tuple) -> Source:
    path = locate(place)
    return _open(path, "", heads_of(cfg) if path.is_file() else {}, False, via)


def heads_of(cfg) -> dict[str, int]:
    """part -> its number of heads, of all parts that `cfg.model` has."""
    return {name: part.heads for name, part in cfg.model.items() if isinstance(part, ConfigDict) and "heads" in part}


def _open(
    path: pathlib.Path, family: str, heads: Mapping, momentum: bool, via: tuple = (), drop_token_types: bool = False
) -> Source:
    """What `locate` found, its vocabulary not looked at. The other arguments are those of `read` and `frozen`."""
    if family and family not in FAMILIES:
        raise ValueError(f"family is {family!r}: choose one of {', '.join(FAMILIES)}")
    if _is_ours(path):
        source = _read_ours(path, heads, momentum, via)
    elif path.is_dir():
        source = _read_folder(path, heads, drop_token_types)
    else:
        source = _read_file(path, family, heads, drop_token_types)
    if drop_token_types and (source.family != "bert" or _is_ours(path)):
        raise ValueError(
            f"{path} holds {WORDS[source.family][0]}, which has no token types to drop: leave the flag out"
        )
    found, source = source.family, narrow(source, family or source.family, str(path))
    if not _is_ours(path) or source.family != found:
        _settle(source)
    return source


def narrow(source: Source, family: str, origin: str) -> Source:
    """The part of a checkpoint that a model of `family` needs. ValueError: it is no part of it."""
    if family == source.family:
        return source
    what, parts = WORDS[source.family]
    if family not in parts:
        raise ValueError(
            f"{origin} holds {what} (family {source.family}), not {WORDS[family][0]} (family {family}); "
            f"it can be read as {', '.join((source.family, *parts))}"
        )
    wanted = re.compile(apply.paths_of(family) + "|params/temp" * (family in ("itm", "features")))
    leaves = list(trees.paths(source.state))
    left = sorted({"/".join(path.split("/")[:3]) for path, _ in leaves if not wanted.fullmatch(path)})
    state = trees.nest((path, x) for path, x in leaves if wanted.fullmatch(path))
    if "queue" in state.get("momentum", {}):  # the originals' retrieval loader takes these features along, of no image
        length = len(state["momentum"]["queue"]["img"])
        state["momentum"]["queue"] |= {"image_id": np.full(length, -100, np.int64), "ptr": np.zeros((), np.int64)}
    note = f"of {what} only what {WORDS[family][0]} needs: left out {', '.join(apply.folded(left))}"
    return source._replace(family=family, state=state, notes=[*source.notes, note], absent=())


# --- where it comes from ----------------------------------------------------------------------------------------------
def _is_ours(path: pathlib.Path) -> bool:
    return any((path / name).is_dir() for name in (checkpoint.SUBDIR, "state")) or any(path.glob("[0-9]*/state"))


def _read_ours(folder: pathlib.Path, heads: Mapping, with_momentum: bool, via: tuple) -> Source:
    if any(heads.values()):
        raise ValueError(
            f"{folder} is a checkpoint of ours and names its numbers of heads: leave out --vit_heads and the like"
        )
    cfg, converted = _settings(folder), checkpoint.load_data(folder).get("converted", {})
    params = frozen(folder, via=via)  # first: an origin that is missing is found before anything large is read
    state, momentum = (
        {"params": trees.merge(checkpoint.load_params(folder, lazy="qformer" in cfg.model), params)},
        checkpoint.load_extra(folder) if with_momentum else None,
    )
    saved.check_sizes(cfg, state["params"], folder)
    if momentum:
        state["momentum"] = {name: part for name, part in momentum.items() if part}
    return Source(
        converted.get("family") or blip2.family_of(cfg) or cfg.objective,
        state,
        cfg,
        checkpoint.own_vocabulary(folder),
        [],
        tuple(converted.get("absent", ())),
        converted.get("kept", {}),
        tuple(name for name in ("vit", "llm") if name in params) if "qformer" in cfg.model else (),
        checkpoint.own_vocabulary(folder, "questions"),
    )


def _settings(folder: pathlib.Path) -> ConfigDict:
    """`config.base()` with objective, model and texts of a checkpoint of ours."""
    return saved.settings(checkpoint.load_config(folder), folder)


def _read_folder(path: pathlib.Path, heads: Mapping, drop_token_types: bool) -> Source:
    """A Hugging Face folder, of BLIP, BLIP-2, BERT, CLIP, OPT, T5, or of a ViT of timm."""
    if not os.path.lexists(path / "config.json"):
        raise ValueError(
            f"{path} holds neither checkpoints of ours ({checkpoint.SUBDIR}/) nor a Hugging Face model (config.json)"
        )
    config = hf.settings(path, "config.json")
    kind = config.get("model_type")
    if kind in ("bert", *language_models.KINDS):
        family = kind
    elif kind in hf_clip.KINDS:
        family = "clip"
    elif isinstance(kind, str) and kind in hf_blip2_config.KINDS:
        return hf_blip2.read(path, heads)
    elif "architecture" in config and "model_type" not in config:
        family = "deit"
    else:
        return hf.read(path, heads)
    opened = hf.open_weights(path)
    try:
        named = hf_clip.under_original_names(opened) if family == "clip" else opened
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    tensors, notes = plain_names(named, str(path))
    if find_family(tensors) != family:
        raise ValueError(
            f"{path}: config.json is of {NAMES[family]}, but the weights are not: they hold "
            f"{apply.listed(apply.folded(tensors)[:6]) or 'nothing'}"
        )
    vocab, tokenizer = None, None
    if family in language_models.KINDS:
        vocab = hf_blip2.tokenizer_of(path)
    if family == "bert":
        size = tensors[bert.WORDS].shape[0] if bert.WORDS in tensors else 0
        vocab, tokenizer, more = hf.vocabulary(path, size + len(EXTRA))
        notes += more

    def said(sizes, layers) -> foreign.Said:
        if family in language_models.KINDS:
            pre_norm = blip2.kinds(family, tensors)["norm"] == "pre"
            found = language_models.said(family, config, sizes, layers, pre_norm)
            rest = foreign.ignored(language_models.ignored(family, config))
            return found._replace(notes=[*found.notes, *rest])
        if family == "clip":
            return hf_clip.said(config, sizes, layers)
        if family == "deit":
            return foreign.timm(config, sizes, layers)
        return foreign.bert(config, sizes, layers, bert.token_types(tensors), tokenizer and tokenizer.pad)

    source = _of_tensors(tensors, str(path), family, heads, said, drop_token_types)
    return source._replace(vocab=vocab, notes=[*opened.notes, *notes, *source.notes])


def _read_file(path: pathlib.Path, family: str, heads: Mapping, drop_token_types: bool) -> Source:
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a checkpoint file, a Hugging Face folder, or a workdir")
    opened = torch_io.open_tensors(path)
    tensors, notes = plain_names(opened, str(path))
    beside = [path.with_name(name) for name in foreign.BESIDE if path.with_name(name).is_file()]

    def said(sizes, layers) -> foreign.Said:
        """Of the settings beside the file, those that are its own."""
        for place in beside:
            try:
                config = foreign.load(place)
            except ValueError as e:
                notes.append(f"beside it: {e}")
                continue
            if "architecture" in config and "model_type" not in config and "W" not in sizes:
                return foreign.timm(config, sizes, layers)
            if foreign.describes(config, sizes, layers):
                return foreign.bert(config, sizes, layers, bert.token_types(tensors), None)
            notes.append(f"{place.name} beside it is of another model: not read")
        return foreign.Said({}, [], [])

    source = _of_tensors(tensors, str(path), family, heads, said, drop_token_types)
    return source._replace(notes=[*opened.notes, *notes, *source.notes])


def _of_tensors(
    tensors: Mapping,
    origin: str,
    family: str,
    heads: Mapping,
    said: Callable[[Mapping, Mapping], foreign.Said],
    drop_token_types: bool,
) -> Source:
    """State dict under the originals' names -> Source without vocabulary.

    said: of (sizes, layers), what settings that lie beside the weights say.
    """
    found = find_family(tensors)
    if not found and any(name.startswith("llm_proj.") for name in tensors):
        raise ValueError(f"{origin} is an InstructBLIP with Vicuna: of language models only OPT and T5 are here")
    if not found and any(name.startswith("vision_model.") for name in tensors):
        raise ValueError(
            f"{origin} holds a model under Hugging Face's names: give the folder it lies in, with its config.json"
        )
    if not (found or family):
        raise ValueError(
            f"{origin} holds {apply.listed(apply.folded(tensors)[:6]) or 'nothing'}, ...: no checkpoint of BLIP or "
            f"BLIP-2 and no initial weights; families are {', '.join(FAMILIES)}"
        )

    found = found or family
    held, later = set(tensors), blip2.is_one(found)
    try:
        if later:
            blip2.refuse_half(tensors)
            tensors = words_and_head(tensors, prefix) if (prefix := blip2.t5_prefix(tensors)) is not None else tensors
        table = apply.rows(found, tensors)
        sizes, layers = apply.infer(table, tensors), apply.layer_counts(found, tensors)
    except ValueError as e:
        raise ValueError(f"{origin}: {e}") from None
    beside = said(sizes, layers)
    if beside.problems:
        raise ValueError("\n  ".join([f"{origin}: the config.json does not fit:", *apply.shown(beside.problems)]))
    notes = [*beside.notes]
    kinds = blip2.kinds(found, tensors) if later else {}
    heads = (
        blip2.heads(origin, sizes, kinds, heads, beside.heads, notes)
        if later
        else {
            "vit": sizes["N"] if "N" in sizes else _heads(origin, "vit", heads, sizes.get("D"), beside, notes),
            "med": _heads(origin, "med", heads, sizes.get("W"), beside, notes),
        }
    )
    if later and found in WHOLE and POSITION_IDS in tensors and len(tensors[POSITION_IDS].shape) == 2:
        sizes.setdefault("T", tensors[POSITION_IDS].shape[1])
    try:
        state = apply.from_torch(found, tensors, heads, lazy=later)
        if found == "bert":
            bert.settle_token_types(state["params"]["med"], tensors, drop_token_types, notes)
    except ValueError as e:
        hint = ""
        if family not in ("", found):
            hint = f"\nand it holds {WORDS[found][0]}, not {WORDS[family][0]} (--family={family})"
        raise ValueError(f"{origin}: {e}{hint}") from None

    notes += dtype_notes(tensors) + [
        f"{what} is not in the file" for what, _ in apply.absent_groups(found, tensors) if what
    ]
    if found == "bert":
        sizes["V"] = bert.add_tokens(state["params"]["med"], sizes["V"], notes)

    copies = [copy for copy, _ in apply.copies(found, table)]
    optional = copies + list(apply.buffers([*copies, *(key for row in table for key in row.keys)]))
    optional += [POSITION_IDS] * (found in WHOLE) + ["temp"] * (found == "blip2_itm")
    return Source(
        family=found,
        state=state,
        cfg=blip2.settings(found, sizes, layers, kinds, heads, beside.more, notes)
        if later
        else make_config(sizes, layers, heads),
        vocab=None,
        notes=notes,
        absent=tuple(name for name in optional if name not in held),
    )


def _heads(origin: str, name: str, given: Mapping, width: int | None, beside: foreign.Said, notes: list[str]) -> int:
    said = beside.heads.get(name)
    asked = given.get(name, 0)
    if width is None:
        return asked or 1
    if said and asked and said != asked:
        raise ValueError(
            f"{origin}: its config.json says {said} heads, not {asked}: leave out --{name}_heads, or of a run set "
            f"model.{name}.heads={said}"
        )
    if said or asked:
        return said or asked
    if width % HEAD_DIM:
        raise ValueError(
            f"{origin}: a width of {width} is no multiple of {HEAD_DIM}, the head dim of the released models: give the "
            f"number of heads with --{name}_heads"
        )
    if width not in RELEASED:
        notes.append(
            f"the number of heads is not said anywhere: {width // HEAD_DIM} taken, width / {HEAD_DIM} as in the "
            f"released models; --{name}_heads if it is another"
        )
    return width // HEAD_DIM


# --- what all have in common ------------------------------------------------------------------------------------------
def _settle(source: Source) -> None:
    """Settings that follow from the family alone.

    A family that has no temperature gets one: the model has a place for it, though no inference reads it.
    """
    objective, max_len, prompt = TASKS[source.family]
    c, momentum = source.cfg, source.state.get("momentum", {})
    queue = len(momentum["queue"]["img"]) if "queue" in momentum else 0
    with c.unlocked():
        c.objective = objective
        c.model.update(dtype="float32")
        positions = (c.model.qformer if "qformer" in c.model else c.model.med).positions
        c.text.update(vocab="", max_len=min(max_len, positions), prompt=prompt)
        c.loss.update(momentum=bool(momentum), queue=queue)
    if source.family in ("itm", "features", *MATCHING):
        source.state["params"].setdefault("temp", np.float32(0.07))


def _resize(source: Source, img_size: int) -> None:
    model = source.cfg.model
    if img_size < 1 or img_size % model.vit.patch:
        raise ValueError(f"--img_size={img_size} is no multiple of the patch, {model.vit.patch} pixels")
    before, positions = model.img_size, (img_size // model.vit.patch) ** 2 + 1
    if before == img_size:
        return
    for part in (source.state["params"], source.state.get("momentum", {}).get("params", {})):
        if "vit" in part:
            part["vit"]["pos_embed"] = resized(np.asarray(part["vit"]["pos_embed"]), positions, part["vit"])
    with source.cfg.unlocked():
        model.img_size = img_size
    source.notes.append(f"position table resized from {before} to {img_size} pixels")
