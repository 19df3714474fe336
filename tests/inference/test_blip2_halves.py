"""Matching of BLIP-2 as Hugging Face has it: what the whole model gives, and the classes of one half each."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from world import blip2 as cases
from world.convert import same_bits
from world.golden import folder
from world.verbs import photos

import blip_jax
from blip_jax import tasks
from blip_jax.convert import read, write
from blip_jax.models.blip import unit

CASE = "hf_itm"
HALVES = {  # family -> (transformers' class, where meta.json lists its tensors)
    "blip2_vision": ("Blip2VisionModelWithProjection", "keys_vision_model"),
    "blip2_text": ("Blip2TextModelWithProjection", "keys_text_model"),
}
IO = np.load(folder(f"blip2/{CASE}") / "io.npz")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    size = cases.settings(CASE)["qformer_config"]["vocab_size"]
    return cases.vocab(tmp_path_factory.mktemp("words") / "vocab.txt", size)


def half(path, family):
    """The folder of a half."""
    name, listed = HALVES[family]
    settings = cases.settings(CASE) | {"architectures": [name]}
    tensors = cases.weights(CASE)
    return cases.folder(path, CASE, settings, {key: tensors[key] for key in cases.meta(CASE)[listed]})


@functools.cache
def outputs(method, model, **how):
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args, method=method, **how))


def image(model, img):
    return model.project_image(model.encode_image(img))


def text(model, ids, mask):
    return unit(model.text_proj(model.encode_text(ids, mask)[0].astype(jnp.float32)))


def match(model, img, ids, mask):
    return model.match(ids, mask, model.image_kv(model.encode_image(img)))


def given():
    ids, mask = jnp.asarray(IO["input_ids"], jnp.int32), jnp.asarray(IO["attention_mask"] > 0)
    return jnp.asarray(IO["image"]).transpose(0, 2, 3, 1), ids, mask


def close(ours, name):
    np.testing.assert_allclose(np.asarray(ours), IO[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("eps", ["", "_eps1e-5"])
def test_golden_matching_and_both_projections(eps, words, tmp_path):
    found = read.read(cases.folder(tmp_path / "whole", CASE), vocab=words)
    cfg, params = found.cfg, jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, found.state["params"]))
    assert cfg.model.vision_eps == 1e-6
    with cfg.unlocked():
        cfg.model.vision_eps = 1e-5 if eps else 1e-6
    model, (img, ids, mask) = tasks.build(cfg), given()
    img_emb, txt = outputs(image, model)(params, img), outputs(text, model)(params, ids, mask)
    close(img_emb, f"image_embeds{eps}")
    close(txt * mask[..., None], f"text_embeds{eps}")
    close(model.similarity(img_emb, txt[:, 0]), f"itc{eps}")
    close(outputs(match, model)(params, img, ids, mask), f"itm_logits{eps}")


@pytest.mark.parametrize("family", HALVES)
def test_a_half_is_read_written_and_gives_its_projection(family, words, tmp_path):
    vocab = {"vocab": words} if family == "blip2_text" else {}
    folder = half(tmp_path / "theirs", family)
    found = read.read(folder, **vocab)
    assert found.family == family and ("vit" in found.state["params"]) == (family == "blip2_vision")
    write.convert(folder, tmp_path / "ours", **vocab)
    write.convert(tmp_path / "ours", tmp_path / "back", to="hf")
    same_bits(load_file(tmp_path / "back" / "model.safetensors"), load_file(folder / "model.safetensors"))
    settings, theirs = json.loads((tmp_path / "back" / "config.json").read_text()), cases.settings(CASE)
    assert settings["architectures"] == [HALVES[family][0]]
    for name in ("vision_config", "qformer_config"):
        kept = {key: value for key, value in theirs[name].items() if "dropout" not in key}  # of training, not read
        assert {key: settings[name][key] for key in kept} == kept

    model, (img, ids, mask) = blip_jax.from_pretrained(tmp_path / "ours", batch=2), given()
    if family == "blip2_vision":
        close(outputs(image, model.model)(model.params, img), "image_embeds")
        (picture,) = photos(1)
        told, queries = model.features(picture), theirs["num_query_tokens"]
        assert told["image_embeds_proj"].shape == (queries, theirs["image_text_hidden_size"])
        np.testing.assert_allclose(np.linalg.norm(told["image_embeds_proj"], axis=-1), 1, atol=1e-5)
        calls = [("text encoder", lambda: model.features(texts="a"))]
    else:
        close(outputs(text, model.model)(model.params, ids, mask) * mask[..., None], "text_embeds")
        assert model.features(texts=["word1 word2", "word3"])["text_embeds_proj"].shape[0] == 2
        calls = [("image encoder", lambda: model.features(photos(1)[0]))]
    calls += [
        ("matching head", lambda: model.match(photos(1)[0], "a")),
        ("decoder", lambda: model.caption(photos(1)[0])),
    ]
    for missing, call in calls:
        with pytest.raises(ValueError, match=f"it has no .*{missing}"):
            call()
    with pytest.raises(ValueError, match="LAVIS has no file of"):
        write.convert(tmp_path / "ours", tmp_path / "x.pth")


def test_the_whole_is_also_written_as_a_half(words, tmp_path):
    folder = cases.folder(tmp_path / "whole", CASE)
    for family, (_, listed) in HALVES.items():
        write.convert(folder, tmp_path / family, to="hf", family=family, vocab=words if family == "blip2_text" else "")
        tensors = load_file(tmp_path / family / "model.safetensors")
        assert tensors.keys() == set(cases.meta(CASE)[listed])
