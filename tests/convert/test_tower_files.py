"""Files of the image towers of BLIP-2: names, whole towers, other prefixes, and what is said of what is left out."""

import numpy as np
import pytest
from world.towers import parameters

from blip_jax import trees
from blip_jax.convert import towers
from blip_jax.convert.rules.vision import CLIP, EVA

F32 = np.float32
SIZES = {"D": 8, "F": 12, "P": 5, "p": 4}


def shapes_of(table, sizes):
    """A table's names and their shapes, `{i}` as it stands."""
    dims = lambda word: int(word.rstrip("DFPp") or 1) * sizes.get(word.lstrip("0123456789"), 1)
    return {key: tuple(map(dims, shape.split())) for key, _, _, shape in table}


def tensors_of(table, depth):
    """Random arrays under a table's names, without prefix."""
    rng, out = np.random.default_rng(0), {}
    for key, shape in shapes_of(table, SIZES).items():
        names = [key.format(i=i) for i in range(depth)] if "{i}" in key else [key]
        out |= {name: rng.normal(size=shape).astype(F32) for name in names}
    return out


def same(ours, theirs):
    ours, theirs = dict(trees.paths(ours)), dict(trees.paths(theirs))
    assert ours.keys() == theirs.keys()
    for path, x in theirs.items():
        np.testing.assert_array_equal(ours[path], x, err_msg=path)


def prefixed(prefix, tensors):
    return {prefix + name: x for name, x in tensors.items()}


def test_names_and_shapes_of_eva():
    """LAVIS's names at full size, written out: 13 tensors a block and 4 before them."""
    D, F = 1408, 6144
    want = {
        "cls_token": (1, 1, D),
        "pos_embed": (1, 257, D),
        "patch_embed.proj.weight": (D, 3, 14, 14),
        "patch_embed.proj.bias": (D,),
    }
    block = {
        "norm1.weight": (D,),
        "norm1.bias": (D,),
        "norm2.weight": (D,),
        "norm2.bias": (D,),
        "attn.q_bias": (D,),
        "attn.v_bias": (D,),
        "attn.qkv.weight": (3 * D, D),
        "attn.proj.weight": (D, D),
        "attn.proj.bias": (D,),
        "mlp.fc1.weight": (F, D),
        "mlp.fc1.bias": (F,),
        "mlp.fc2.weight": (D, F),
        "mlp.fc2.bias": (D,),
    }
    want |= {"blocks.{i}." + name: shape for name, shape in block.items()}
    assert shapes_of(EVA, {"D": D, "F": F, "P": 257, "p": 14}) == want


def test_names_and_shapes_of_clip():
    D, F = 1024, 4096
    norms = {"ln_pre": "", "ln_1": "transformer.resblocks.{i}.", "ln_2": "transformer.resblocks.{i}."}
    want = {f"{at}{name}.{leaf}": (D,) for name, at in norms.items() for leaf in ("weight", "bias")}
    want |= {"class_embedding": (D,), "positional_embedding": (257, D), "conv1.weight": (D, 3, 14, 14)}
    block = {
        "attn.in_proj_weight": (3 * D, D),
        "attn.in_proj_bias": (3 * D,),
        "attn.out_proj.weight": (D, D),
        "attn.out_proj.bias": (D,),
        "mlp.c_fc.weight": (F, D),
        "mlp.c_fc.bias": (F,),
        "mlp.c_proj.weight": (D, F),
        "mlp.c_proj.bias": (D,),
    }
    want |= {"transformer.resblocks.{i}." + name: shape for name, shape in block.items()}
    assert shapes_of(CLIP, {"D": D, "F": F, "P": 257, "p": 14}) == want


@pytest.mark.parametrize("prefix", ["", "visual_encoder.", "visual."])
@pytest.mark.parametrize("depth", [0, 2])
def test_a_whole_eva_tower_loses_its_last_block(prefix, depth):
    tensors = tensors_of(EVA, 3)
    extra = {"norm.weight": np.ones(8, F32), "norm.bias": np.ones(8, F32), "head.weight": np.ones((5, 8), F32)}
    extra |= {"head.bias": np.ones(5, F32)}
    kind, read, notes = towers.penultimate(prefixed(prefix, tensors | extra), depth)
    assert kind == "eva" and len(read) == 4 + 13 * 2
    same(parameters("eva", read, 2, ""), parameters("eva", tensors_of_first(tensors, 2), 2, ""))
    assert len(notes) == 1 and "of the 3 blocks of the eva tower the first 2 are read" in notes[0]
    assert all(name in notes[0] for name in ("blocks.2.attn.q_bias", "norm.weight", "head.weight"))


def tensors_of_first(tensors, depth):
    """Without the blocks from `depth` on."""
    number = lambda name: next((int(word) for word in name.split(".") if word.isdigit()), -1)
    return {name: x for name, x in tensors.items() if number(name) < depth}


def test_openais_clip_loses_its_last_block_its_head_and_its_text_tower():
    tensors = tensors_of(CLIP, 3)
    extra = {"ln_post.weight": np.ones(8, F32), "ln_post.bias": np.ones(8, F32), "proj": np.ones((8, 6), F32)}
    text = {"transformer.resblocks.0.ln_1.weight": np.ones(4, F32), "positional_embedding": np.ones((7, 4), F32)}
    text |= {"token_embedding.weight": np.ones((9, 4), F32), "logit_scale": np.ones((), F32)}
    kind, read, notes = towers.penultimate(prefixed("visual.", tensors | extra) | text)
    assert kind == "clip"
    same(parameters("clip", read, 2, ""), parameters("clip", tensors_of_first(tensors, 2), 2, ""))
    assert all(name in notes[0] for name in ("ln_post.weight", "proj", "transformer.resblocks.2.mlp.c_fc.bias"))
    assert all(name in notes[1] for name in ("token_embedding.weight", "logit_scale")) and len(notes) == 2


@pytest.mark.parametrize("depth", [0, 3])
def test_towers_that_end_where_blip2s_do_are_read_whole(depth):
    for kind, table in (("eva", EVA), ("clip", CLIP)):
        tensors = tensors_of(table, 3)
        found, read, notes = towers.penultimate(tensors, depth)
        assert (found, set(read), notes) == (kind, set(tensors), [])


def test_the_depth_of_the_model_says_that_a_tower_is_whole_where_its_head_is_gone():
    tensors = tensors_of(EVA, 3)
    _, read, notes = towers.penultimate(tensors, 2)
    assert set(read) == set(tensors_of_first(tensors, 2)) and "blocks.2.norm1.weight" in notes[0]


def test_other_files_and_depths_are_refused():
    with pytest.raises(ValueError, match="the eva tower of the file has 2 blocks, expected 4, or one more: set model"):
        towers.penultimate(tensors_of(EVA, 2), 4)
    with pytest.raises(
        ValueError, match="no image tower of EVA-CLIP or CLIP: the file holds text.weight, ...; expected"
    ):
        towers.penultimate({"text.weight": np.ones(3, F32)})
