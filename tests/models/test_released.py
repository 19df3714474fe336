"""Expected numbers of the released checkpoints, for whoever has them: pytest tests/models/test_released.py -m released
--blip-checkpoints DIR

DIR holds, each optional, else its tests are skipped and say so:
  model_large_caption.pth, model_base_retrieval_coco.pth, model_large_retrieval_coco.pth, model_base_capfilt_large.pth,
  model_base_vqa_capfilt_large.pth   as the original's README lists them
  blip_coco_caption_base.pth    the re-release of LAVIS (its model blip_caption, base_coco)
  merlion.png                   docs/_static/merlion.png of LAVIS
  demo.jpg                      the picture of a woman and a dog on a beach of the original's demo notebook
  vocab.txt                     of bert-base-uncased; without it the one in the Hugging Face hub's cache is used
The numbers were printed by the original's notebook, LAVIS's tests and transformers' conversion script; the tolerances
are their digits.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import blip_jax
from blip_jax import losses
from blip_jax.convert.write import convert
from blip_jax.data import image
from blip_jax.models.vision.vit import normalize_pixels

pytestmark = pytest.mark.released
BEACH = "a woman sitting on the beach with a dog"


@pytest.fixture(scope="module")
def has(request):
    """A function: file name -> its path; skips the test where DIR lacks it."""

    def path(name):
        found = pathlib.Path(request.config.getoption("--blip-checkpoints")) / name
        if not found.is_file():
            pytest.skip(f"{found} is not there")
        return found

    return path


@pytest.fixture(scope="module")
def load(has, tmp_path_factory):
    """A function: file name -> the model; with `img_size` and `family` after a conversion to them."""

    def model(name, **changes):
        path = has(name)
        vocab = path.with_name("vocab.txt")
        vocab = str(vocab) if vocab.is_file() else ""
        if not changes:
            return blip_jax.from_pretrained(path, dtype="float32", vocab=vocab)
        out = tmp_path_factory.mktemp("converted") / "model"
        convert(path, out, vocab=vocab, **changes)
        return blip_jax.from_pretrained(out, dtype="float32")

    return model


def img_tok(model, path):
    """Image tokens of a picture."""
    pixels = image.eval_transform(image.decode(path.read_bytes(), 10**8)[0], model.cfg.model.img_size)
    return run(model, "encode_image", normalize_pixels(pixels[None]))


def run(model, method, *args, **kwargs):
    """A method of the Flax model, compiled."""
    return jax.jit(lambda params, *a: model.model.apply({"params": params}, *a, method=method, **kwargs))(
        model.params, *args
    )


@pytest.mark.parametrize(
    "name, said",
    [
        ("blip_coco_caption_base.pth", "a large fountain spewing water into the air"),
        ("model_large_caption.pth", "a large statue of a person spraying water from a fountain"),
    ],
)
def test_captions_of_lavis(load, has, name, said):
    model = load(name)
    assert model.caption(has("merlion.png"), beams=3, min_length=10, max_length=30)[0]["caption"] == said


def test_caption_loss_of_lavis(load, has):
    """Its test gives the text without the prompt, yet the first four tokens count as prompt and are not scored."""
    model = load("blip_coco_caption_base.pth")
    ids, mask = model.tokenizer.encode(["a large statue of a person spraying water from a fountain"], 40)
    ids, mask = ids[:, : mask.sum()], mask[:, : mask.sum()]
    assert ids[0, 4:].tolist() == [1997, 1037, 2711, 29035, 2300, 2013, 1037, 9545, 102]
    logits = run(model, "lm_logits", ids, mask, run(model, "image_kv", img_tok(model, has("merlion.png"))))
    scored = mask[:, 1:] & (np.arange(1, ids.shape[1]) >= 4)
    by_form = [
        float(losses.lm(logits, jnp.asarray(ids[:, 1:]), jnp.asarray(scored), 30524, smoothing=0.1, over=over))
        for over in ("valid", "all")
    ]
    # which torch printed the number, and so which form of the smoothing term it has, is not known
    assert min(abs(loss - 2.7152) for loss in by_form) < 1e-3, by_form


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "model_base_retrieval_coco.pth",
            {"merlion in Singapore": (0.98613, 0.4633), "a random irrelevant caption": (0.05704, 0.23282)},
        ),
        (
            "model_large_retrieval_coco.pth",
            {"merlion in Singapore": (0.99466, 0.4474), "a random irrelevant caption": (0.04744, 0.12821)},
        ),
    ],
)
def test_matching_of_lavis(load, has, name, expected):
    got = load(name).match(has("merlion.png"), list(expected))
    for i, (probability, cosine) in enumerate(expected.values()):
        assert got["probability"][i] == pytest.approx(probability, abs=2e-4)
        assert got["cosine"][i] == pytest.approx(cosine, abs=2e-4)


def test_matching_of_the_demo_notebook(load, has):
    """With [CLS] at the beginning, as its class leaves it."""
    got = load("model_base_retrieval_coco.pth").match(has("demo.jpg"), BEACH, first="[CLS]")
    assert (got["probability"], got["cosine"]) == (pytest.approx(0.9960, abs=2e-4), pytest.approx(0.5262, abs=2e-4))


def test_matching_of_transformers_conversion(load, has):
    """It pads to 35 tokens and gives no mask, so that padding is attended to, with [CLS] at the beginning."""
    model = load("model_base_retrieval_coco.pth")
    ids, _ = model.tokenizer.encode(["A picture of a woman with a dog sitting in a beach"], 35)
    everywhere, seen = np.ones(ids.shape, bool), img_tok(model, has("demo.jpg"))
    logits = run(model, "match", ids, everywhere, run(model, "image_kv", seen), first_id=model.tokenizer.cls)
    assert float(jax.nn.softmax(logits)[0, 1]) == pytest.approx(0.45698845, abs=2e-4)
    cosine = run(model, "project_image", seen) @ run(model, "encode_text", ids, everywhere)[1].T
    assert float(cosine[0, 0]) == pytest.approx(0.21106875, abs=2e-5)


def test_caption_of_transformers_conversion(load, has):
    """The decoder of the pre-trained model at 384 pixels, greedy, after the prompt."""
    model = load("model_base_capfilt_large.pth", family="caption", img_size=384)
    said = model.caption(has("demo.jpg"), beams=1, min_length=0, max_length=20)[0]["caption"]
    ids = [1037, 2450, 3564, 2006, 1996, 3509, 2007, 2014, 3899]  # after "a picture of"
    assert said == model.tokenizer.decode(ids) == "a woman sitting on the beach with her dog"


def test_features_of_lavis(load, has):
    model, text = load("model_base_capfilt_large.pth"), "a large fountain spewing water into the air"
    got = {
        **model.features(has("merlion.png")),
        **model.features(texts=text),
        **model.features(has("merlion.png"), text),
    }
    for name, mean, digit in (
        ("image_embeds", -0.02032, 2e-5),
        ("multimodal_embeds", -0.00095, 2e-5),
        ("text_embeds", -6.61e-5, 1e-6),
        ("text_embeds_proj", -0.002149, 2e-6),
        ("image_embeds_proj", -0.0023, 1e-4),
    ):
        assert got[name].mean() == pytest.approx(mean, abs=digit), name
    assert got["image_embeds_proj"][0] @ got["text_embeds_proj"][0] == pytest.approx(0.2622, abs=2e-4)


@pytest.mark.parametrize(
    "picture, question, answer",
    [
        ("merlion.png", "Which city is this photo taken?", "singapore"),
        ("demo.jpg", "How many dogs are in this image?", "1"),
    ],
)
def test_answers(load, has, picture, question, answer):
    assert load("model_base_vqa_capfilt_large.pth").answer(has(picture), question)["answer"] == answer
