"""Key tables of BLIP-2 against lists of the released checkpoints, LAVIS's and transformers'; nothing of full size is
allocated."""

import json
import math
import re

import numpy as np
import pytest
from world.blip2 import save
from world.convert import same_bits
from world.golden import folder

from blip_jax import config
from blip_jax.cli import usage
from blip_jax.convert import apply, blip2, hf_blip2, read, recognise, vocabulary
from blip_jax.convert.rules.blip2 import HF_BIAS
from blip_jax.convert.rules.families import FAMILIES
from blip_jax.convert.source import official
from blip_jax.trees import Lazy

LAVIS = json.loads((folder("blip2/keys") / "meta.json").read_text())["checkpoints"]
HF = json.loads((folder("blip2/keys") / "hf.json").read_text())["models"]
POSITION_IDS = "Qformer.bert.embeddings.position_ids"


def keys(name):
    """name -> shape of a checkpoint, of one that is listed as another but for some tensors, too."""
    entry = LAVIS[name]
    own = {key: tuple(shape) for key, shape in entry["keys"].items()}
    if "otherwise_as" not in entry:
        return own
    base, _, without = entry["otherwise_as"].partition(" without ")
    rest = keys(base)
    return {k: s for k, s in rest.items() if not (without and k.startswith(without.rstrip("*")))} | own


def stand_ins(shapes):
    """Tensors of these shapes; only biases can be read, as zeros."""
    return {
        name: Lazy(
            shape,
            np.int64 if "position_ids" in name else np.float32,
            (lambda shape=shape: np.zeros(shape, np.float32)) if len(shape) == 1 else None,
        )
        for name, shape in shapes.items()
    }


def tabled(family, tensors):
    """(name -> shape of every row, sizes, layers) as the family's table has them."""
    table = apply.rows(family, tensors)
    letters = apply.infer(table, tensors)
    return {key: apply.shape_of(row.shape, letters) for row in table for key in row.keys}, letters, table


@pytest.mark.parametrize("name", LAVIS)
def test_lavis_files_have_the_names_shapes_and_numbers_of_the_table(name):
    shapes = keys(name)
    tensors = stand_ins(shapes)
    family = recognise.find_family(tensors)
    rows, letters, table = tabled(family, tensors)
    listed = rows | {copy: rows[origin] for copy, origin in apply.copies(family, table)}
    listed |= {POSITION_IDS: (1, letters.get("T", 512))}
    assert listed == shapes and apply.check_keys(family, tensors, table) == []
    assert sum(map(math.prod, rows.values())) == LAVIS[name]["trainable_params"]

    layers, kinds = apply.layer_counts(family, tensors), blip2.kinds(family, tensors)
    notes = []
    heads = blip2.heads(name, letters, kinds, {}, {}, notes)
    model = blip2.settings(family, letters, layers, kinds, heads, {}, notes).model
    tower = "clip_l" if "vitL" in name else "eva_g"
    llm = {"opt2.7b": "opt_2.7b", "opt6.7b": "opt_6.7b", "flant5xxl": "flant5_xxl", "flant5xl": "flant5_xl"}
    llm |= {"flanxl": "flant5_xl"}
    llm = next((value for key, value in llm.items() if key in name), "")
    want = config.blip2(tower, "base", llm).model.copy_and_resolve_references().unlock()
    want.img_size = 364 if "364" in name else 224
    assert json.loads(model.to_json()) == json.loads(want.to_json())
    assert len(notes) == ("364" not in name) + bool(llm)  # of every part that is not in the file


# what the letters of the shapes are where the numbers of tensors are the real ones, but they are small
SMALL = dict(D=12, F=10, P=5, p=2, W=6, M=8, T=7, V=11, Q=3, E=4, C=14, J=14)


@pytest.mark.parametrize("name", LAVIS)
def test_lavis_files_are_read_and_written_with_every_name(name, tmp_path):
    """All tensors of the real files, as many layers, of small shapes: in, and out again bit by bit."""
    shapes, rng = keys(name), np.random.default_rng(0)
    family = recognise.find_family(shapes)
    table = apply.rows(family, shapes)
    tensors = {
        key: rng.normal(size=apply.shape_of(row.shape, SMALL)).astype(np.float32) for row in table for key in row.keys
    }
    tensors |= {copy: tensors[origin] for copy, origin in apply.copies(family, table)}
    tensors[POSITION_IDS] = np.arange(SMALL["T"], dtype=np.int64)[None]
    assert tensors.keys() == shapes.keys()
    got = read.read(save(tmp_path / "small.safetensors", tensors), vocab=None, heads=dict(vit=2, qformer=3))
    assert got.family == family
    same_bits(official(got), tensors)


def test_optimiser_groups_of_the_fine_tuned_checkpoints():
    """Sizes of the groups that LAVIS makes at a layer decay of 0.95 against our factors, looked up by path."""
    for name, entry in LAVIS.items():
        if not entry["groups_lr_layer_decay_0p95"] or "otherwise_as" in entry:
            continue
        shapes = keys(name)
        family = recognise.find_family(shapes)
        want, got = {}, {}
        for group in entry["groups_lr_layer_decay_0p95"]:
            key = (group["weight_decay"], round(group["lr_scale"], 6))
            want[key] = want.get(key, 0) + group["n"]
        for row in apply.rows(family, stand_ins(shapes)):
            path = row.path.removeprefix("params/").replace("{qkv}", "q")
            found = (by for pattern, by in config.layer_decay(0.95, 39) if re.fullmatch(pattern, path))
            factor = next(found, 1.0)
            for i, key in enumerate(row.keys):
                scale = factor[i] if isinstance(factor, tuple) else factor
                decay = 0.0 if len(shapes[key]) == 1 or key.endswith(".bias") else 0.05
                got[decay, round(scale, 6)] = got.get((decay, round(scale, 6)), 0) + 1
        assert got == want, name


@pytest.mark.parametrize("name", HF)
def test_transformers_classes_have_the_names_and_shapes_of_the_table(name):
    shapes = {key: tuple(shape) for key, shape in HF[name].items()}
    family = "blip2_itm" if "Retrieval" in name else "blip2_opt" if "opt" in name else "blip2_t5"
    tensors = hf_blip2.under_original_names(
        family, stand_ins(shapes) if family != "blip2_t5" else without_copies(shapes)
    )
    rows, letters, table = tabled(family, tensors)
    assert apply.check_keys(family, tensors, table) == []
    back = {}
    for key, shape in (rows | {copy: rows[origin] for copy, origin in apply.copies(family, table)}).items():
        if key.endswith(("attn.q_bias", "attn.v_bias")):
            back[HF_BIAS[1].format(i=key.split(".")[2])] = (3 * shape[0],)
        elif key != "temp":
            back[hf_blip2.to_hf(family, key)] = shape
    assert back == shapes
    assert letters["D"] == 1408 and ("opt" not in name or letters["U"] == 50304)


def without_copies(shapes):
    """Copies of T5's word table are compared as they are read, and there is nothing to read here."""
    return {name: x for name, x in stand_ins(shapes).items() if not name.endswith("embed_tokens.weight")} | {
        "language_model.shared.weight": np.broadcast_to(np.float32(0), shapes["language_model.shared.weight"])
    }


def test_berts_words_and_dec_are_the_vocabulary_of_a_q_former():
    assert vocabulary.BERT_VOCAB[2] + 1 == config.QFORMER_SIZES["base"]["vocab_size"]


def test_the_help_of_convert_names_all_families():
    assert usage.FAMILIES.split(", ") == list(FAMILIES) and usage.FAMILIES in usage.text("convert").replace("\n", " ")
