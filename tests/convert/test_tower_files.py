"""Files of the image towers of BLIP-2: names, whole towers, other prefixes, and what is said of what is left out."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from world.towers import parameters

from blip_jax import trees
from blip_jax.convert import hf_clip, read, towers
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


# --- Hugging Face folders of CLIP -------------------------------------------------------------------------------------
def clip_folder(path, kind="clip", blocks=3, changes=None):
    """A folder of CLIPModel ("clip") or CLIPVisionModel, and the tensors of its tower under OpenAI's names."""
    theirs = tensors_of(CLIP, blocks) | {"ln_post.weight": np.full(8, 2, F32), "ln_post.bias": np.full(8, 3, F32)}
    begin, out = "vision_model." if kind == "clip" else "", {}
    for name, x in theirs.items():
        for ours, hub in hf_clip.NAMES:
            pattern = re.compile(re.escape(ours).replace(r"\{i\}", r"(\d+)"))
            if match := pattern.match(name):
                name = hub.replace("{i}", match[1] if match.groups() else "") + name[match.end() :]
                break
        if ".in_proj_" in name:
            at, leaf = name.split("in_proj_")
            out |= {f"{begin}{at}{c}_proj.{leaf}": part for c, part in zip("qkv", np.split(x, 3))}
        else:
            out[begin + name] = x
    vision = dict(hidden_size=8, intermediate_size=12, patch_size=4, image_size=8, num_attention_heads=2)
    vision |= dict(
        num_hidden_layers=blocks, hidden_act="quick_gelu", layer_norm_eps=1e-5, model_type="clip_vision_model"
    )
    vision |= changes or {}
    config = vision
    if kind == "clip":
        out |= {"text_model.embeddings.token_embedding.weight": np.ones((9, 4), F32), "logit_scale": np.ones((), F32)}
        out |= {"visual_projection.weight": np.ones((6, 8), F32), "text_projection.weight": np.ones((6, 4), F32)}
        config = {"model_type": "clip", "vision_config": vision, "projection_dim": 6}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(out, path / "model.safetensors")
    return theirs


@pytest.mark.parametrize("kind", hf_clip.KINDS)
def test_a_hugging_face_folder_of_clip_is_the_tower(kind, tmp_path):
    theirs = clip_folder(tmp_path / "clip", kind)
    got = read.read(tmp_path / "clip")
    assert got.family == "clip" and got.state["params"].keys() == {"vit"}
    vit = got.cfg.model.vit
    assert (vit.kind, vit.depth, vit.heads, vit.width, got.cfg.model.img_size) == ("clip", 2, 2, 8, 8)
    own = {name: x for name, x in tensors_of_first(theirs, 2).items() if not name.startswith("ln_post")}
    same(got.state["params"]["vit"], parameters("clip", own, 2, ""))
    said = " ".join(got.notes)
    assert "of the 3 blocks of the clip tower the first 2 are read" in said
    assert ("text_model.embeddings.token_embedding.weight" in said) == (kind == "clip")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': the CLIP tower here has 'quick_gelu'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
        ({"num_attention_heads": 3}, "num_attention_heads is 3: it must divide the width 8"),
        ({"hidden_size": 9}, "hidden_size is 9, but the weights have 8"),
        ({"image_size": 16}, "image_size is 16, but the weights have 5 positions"),
        ({"num_hidden_layers": 7}, "num_hidden_layers is 7, but the weights have 2"),
    ],
)
def test_settings_of_clip_that_do_not_fit(changes, said, tmp_path):
    clip_folder(tmp_path / "clip", changes=changes)
    with pytest.raises(ValueError, match=said):
        read.read(tmp_path / "clip")


def test_a_clip_without_one_of_q_k_and_v(tmp_path):
    clip_folder(tmp_path / "clip")
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    del tensors["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, tmp_path / "clip" / "model.safetensors")
    with pytest.raises(ValueError, match="resblocks.1.attn.in_proj_bias: q, k and v of one shape are expected"):
        read.read(tmp_path / "clip")
