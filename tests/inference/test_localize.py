"""Heat maps of words: attention times its gradient, held against a forward pass in NumPy and differences of it."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from world.verbs import TEXTS, apply, close, photos, saved, seen, tokens

import blip_jax
from blip_jax.cli import main
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.inference import heat, localize

LAYERS, STEP = 3, 1e-5


@pytest.fixture(scope="module")
def localizer(tiny_vocab, tmp_path_factory):
    """(model of a text encoder of LAYERS layers, its parameters, its workdir)"""
    at = tmp_path_factory.mktemp("localizer") / "retrieval"
    params = saved(at, "retrieval", 7, tiny_vocab, LAYERS)
    return blip_jax.from_pretrained(at), params, at


# --- the matching head in NumPy, float64 ------------------------------------------------------------------------------
def normed(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]


def headed(x, p):
    return np.einsum("td,dnh->nth", x, p["kernel"]) + p["bias"][:, None]


def attending(x, y, p, nudge=0.0):
    """(closed output, probabilities [N,T,S]) of x [T,D] at y [S,D']"""
    q, k, v = headed(x, p["q"]), headed(y, p["k"]), headed(y, p["v"])
    s = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
    seen_ = s / s.sum(-1, keepdims=True)
    out = np.einsum("nth,nhd->td", (seen_ + nudge) @ v, p["out"]["kernel"]) + p["out"]["bias"]
    return normed(x + out, p["ln"]), seen_


def logits_and_looks(params, ids, img_tok, layer, nudge=0.0):
    """Matching logits [2] of ids [T] and img_tok [P,D'], and the cross-attention of `layer`, to which `nudge` comes."""
    med = params["med"]
    x = med["embed"]["word"]["embedding"][ids] + med["embed"]["pos"]["embedding"][: len(ids)]
    x, looks = normed(x, med["embed"]["ln"]), None
    for i in range(LAYERS):
        block = of_layer(med["blocks"], i)
        x, _ = attending(x, x, block["self_attn"])
        x, seen_ = attending(x, img_tok, block["cross_attn"], nudge if i == layer else 0.0)
        looks = seen_ if i == layer else looks
        h = x @ block["mlp"]["fc1"]["kernel"] + block["mlp"]["fc1"]["bias"]
        h = 0.5 * h * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        x = normed(x + h @ block["mlp"]["fc2"]["kernel"] + block["mlp"]["fc2"]["bias"], block["mlp_ln"])
    return x[0] @ params["itm_head"]["kernel"] + params["itm_head"]["bias"], looks


def of_layer(tree, i):
    return {k: of_layer(v, i) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree[i], np.float64)


def by_differences(params, ids, img_tok, layer):
    """Maps [T,P-1], from central differences of the logit in every single probability."""
    logits, looks = logits_and_looks(params, ids, img_tok, layer)
    slope = np.zeros_like(looks)
    for at in np.ndindex(looks.shape):
        nudge = np.zeros_like(looks)
        nudge[at] = STEP
        more, less = (logits_and_looks(params, ids, img_tok, layer, sign * nudge)[0][1] for sign in (1, -1))
        slope[at] = (more - less) / (2 * STEP)
    return (looks * np.maximum(slope, 0)).mean(0)[:, 1:], np.exp(logits[1]) / np.exp(logits).sum()


def test_maps_are_attention_times_the_slope_of_the_logit(localizer):
    model, params, _ = localizer
    img, text = photos(1)[0], TEXTS[0]
    img_tok = np.asarray(apply(model, "encode_image", seen(img)), np.float64)[0]
    ids = np.array(tokens(model, text)[0][0])
    ids[0] = model.tokenizer.enc
    for layer in range(LAYERS - 1):
        found = model.localize(img, text, layer=layer)
        want, probability = by_differences(params, ids, img_tok, layer)
        words = model.tokenizer.words(text, 14)
        assert found["words"] == text.split() and want[1:-1].max() > 1e-3, want  # there is something to compare
        side = round(want.shape[1] ** 0.5)
        for own, (_, at) in zip(found["maps"], words, strict=True):
            np.testing.assert_allclose(own, want[list(at)].mean(0).reshape(side, side), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found["text_map"].ravel(), want[1:-1].mean(0), rtol=1e-3, atol=1e-6)
        assert found["score"] == pytest.approx(probability, abs=1e-5)
    default = model.localize(img, text)
    close(default["text_map"], model.localize(img, text, layer=1)["text_map"], 0)  # 7 of 12
    assert default["score"] == pytest.approx(model.match(img, text)["probability"], abs=1e-5)


def test_neighbours_and_padding_change_no_map(localizer):
    model, _, _ = localizer
    imgs, texts = photos(3), [TEXTS[0], "a small red ring", "ring"]
    together = model.localize(imgs, texts)
    assert [found["words"] for found in together] == [text.split() for text in texts]
    for img, text, found in zip(imgs, texts, together):
        alone = model.localize(img, text)
        close(alone["maps"], found["maps"], 1e-6)
        close(alone["text_map"], found["text_map"], 1e-6)
    cut = model.localize(imgs[0], TEXTS[1:2])  # of more tokens than the model was trained with
    assert cut[0]["words"] == TEXTS[1].split()[:9] and len(cut[0]["maps"]) == 9


def test_layers_as_deep_as_lavis_has_them():
    assert [localize.layer_of(n) for n in (2, 3, 6, 12, 24)] == [0, 1, 3, 7, 14]
    assert localize.layer_of(12, 10) == 10
    for layer, told in ((11, "give 0 to 10"), (-1, "give 0 to 10"), (1.5, "whole number")):
        with pytest.raises(ValueError, match=told):
            localize.layer_of(12, layer)


def test_models_without_such_maps_say_so(tiny_vocab, tmp_path):
    saved(tmp_path / "caption", "caption", 0, tiny_vocab)
    with pytest.raises(ValueError, match="cannot do localize: it has no image-grounded text encoder and no matching"):
        blip_jax.from_pretrained(tmp_path / "caption").localize(photos(1)[0], "a star")
    with pytest.raises(ValueError, match="one layer"):
        localize.layer_of(1)


def test_words_are_where_their_pieces_are(tiny_vocab):
    tokenizer = Tokenizer(tiny_vocab)
    text = "a  chequered red-ish starfish ünder, é"
    found, (ids, mask) = tokenizer.words(text, 40), tokenizer.encode([text], 40)
    assert [word for word, _ in found] == text.split()
    assert [i for _, at in found for i in at] == list(range(1, mask.sum() - 1))  # all pieces, each once
    assert max(len(at) for _, at in found) > 3
    for word, at in found[:2] + found[3:4]:
        assert tokenizer.decode(ids[0, list(at)]) == word
    cut = tokenizer.words(text, 6)
    assert [i for _, at in cut for i in at] == [1, 2, 3, 4] and cut[0] == ("a", range(1, 2))


def test_the_peak_is_the_middle_of_the_hottest_cell():
    found = np.zeros((2, 4), np.float32)
    assert localize.peak(found) == (0.5, 0.5)
    found[1, 2] = 3
    assert localize.peak(found) == (0.625, 0.75)


def test_an_overlay_is_hot_where_the_map_is():
    photo = Image.new("RGB", (64, 32), (90, 120, 150))
    found = np.zeros((2, 4), np.float32)
    assert np.array_equal(heat.overlay(photo, found), photo)
    found[0, 3] = 2e-7
    drawn = np.asarray(heat.overlay(photo, found)).astype(int)
    moved = np.abs(drawn - np.asarray(photo)).sum(-1)
    assert drawn.shape == (32, 64, 3) and moved[:12, 52:].min() > 100 and not moved[:, :32].any()
    steps = heat.colours()
    light = steps.astype(float) ** 2.2 @ [0.2126, 0.7152, 0.0722]
    assert steps.shape == (256, 3) and (np.diff(light[::16]) > 0).all() and light[-1] > 10 * light[0]


def test_localize_from_the_shell(localizer, tmp_path, capsys):
    model, _, at = localizer
    for i, img in enumerate(photos(2)):
        Image.fromarray(img).save(tmp_path / f"{i}.png")
    files, out = [str(tmp_path / f"{i}.png") for i in range(2)], tmp_path / "map.png"
    asked = ["localize", f"--model={at}", "--batch=1", f"--text={TEXTS[0]}"]
    assert main.main([*asked, files[0], "--text=a small red ring", f"--out={out}"]) == 0
    want = [model.localize(files[0], text) for text in (TEXTS[0], "a small red ring")]
    x, y = localize.peak(want[0]["maps"][2])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{files[0]}: probability {want[0]['score']:.4f}  {TEXTS[0]}"
    assert lines[3] == f"{files[0]}: x {x:.2f}  y {y:.2f}  red" and len(lines) == 2 * (1 + 4)
    drawn = heat.sheet(heat.photograph(files[0], 1 << 20), want)
    assert np.array_equal(Image.open(out).convert("RGB"), drawn)

    assert main.main([*asked, *files, "--json", "--layer=0"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == files
    found, said = model.localize(files[1], TEXTS[0], layer=0), rows[1]["texts"][0]
    assert said["text"] == TEXTS[0] and said["probability"] == pytest.approx(found["score"], abs=1e-5)
    assert [(word["x"], word["y"]) for word in said["words"]] == list(map(localize.peak, found["maps"]))
    for wrong, told in (
        ([*files, f"--out={out}"], "is of one picture, and 2 are given"),
        ([files[0], "--out=map.jpg"], "ending in .png"),
    ):
        assert main.main([*asked, *wrong]) == 2
        assert told in capsys.readouterr().err
