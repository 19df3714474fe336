"""Live against Hugging Face transformers on random weights.

The same numbers from its folders, and from ours in its classes.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from world import jitted, towers

import blip_jax
from blip_jax import config
from blip_jax.convert import hf, hf_config, read
from blip_jax.convert.apply import from_torch
from blip_jax.data import image
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.inference import programs
from blip_jax.models.text.cache import images_of
from blip_jax.models.vision.vit import normalize_pixels
from blip_jax.tasks import build

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[peers]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install -e '.[peers]'")
ATOL = 1e-4  # float32
# by name: transformers imports a class, which takes seconds, when it is first asked for, here not before a test runs
CLASSES = {"caption": "ConditionalGeneration", "itm": "ImageTextRetrieval", "vqa": "QuestionAnswering"}
DEC, ENC, CLS, SEP, PAD = 118, 119, 2, 3, 0  # of the tiny vocabulary
TEXT = dict(
    vocab_size=120,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=40,
    bos_token_id=DEC,
    eos_token_id=SEP,
    sep_token_id=SEP,
    pad_token_id=PAD,
)
VISION = dict(
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=24,
    patch_size=8,
    layer_norm_eps=1e-6,
)
PROMPT = [DEC, 11, 12, 13]


def class_of(family):
    return getattr(transformers, f"BlipFor{CLASSES[family]}")


def net(family, text=TEXT, vision=VISION, gain=1.5):
    """A class of transformers with weights that make texts of various lengths."""
    model = class_of(family)(
        transformers.BlipConfig(text_config=dict(text), vision_config=dict(vision), image_text_hidden_size=16)
    ).eval()
    g = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        wide = (
            0.1
            if p.ndim == 1
            else 1.9 * gain * p.shape[-1] ** -0.5
            if "embedding" in name
            else gain * p[0].numel() ** -0.5
        )
        p.data = torch.randn(p.shape, generator=g) * wide + ("orm" in name and name.endswith("weight"))
    if family != "itm":
        model.text_decoder.cls.predictions.bias.data[SEP] += 3.0
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_vocab):
    """A function: family -> transformers' model, its folder, and what is ours.

    The folder was written by save_pretrained, with a vocabulary.
    """

    @functools.cache
    def save(family):
        model, folder = net(family), tmp_path_factory.mktemp("saved") / family
        store(model, folder, tiny_vocab)
        return model, folder, Ours(folder)

    return save


def store(model, folder, vocab, **how):
    model.save_pretrained(folder, **how)
    shutil.copy(vocab, folder / "vocab.txt")
    return folder


class Ours:
    """What we read from a folder, and its model as jitted functions."""

    def __init__(self, folder):
        self.source = read.read(folder)
        self.model, self.params = build(self.source.cfg), self.source.state["params"]
        self.size, self.sep = self.source.cfg.model.img_size, SEP

    def __call__(self, method, *args, **kwargs):
        return jitted.apply(self.model, self.params, method, *args, **kwargs)

    def texts(self, kv, prompt, **how):
        """i32[B,L]: greedy where how has no beams."""
        method = programs.Method(
            **({"kind": "beam"} if "beams" in how else {"top_k": 1}), **{"repetition_penalty": 1.0, **how}
        )
        keys = np.zeros((images_of(kv), 2), np.uint32)
        return np.asarray(decoder(self.model, tuple(prompt), method, self.sep)(self.params, kv, keys)["ids"][:, 0])


@functools.cache
def decoder(model, prompt, method, sep):
    """The jitted program that continues a prompt."""
    return jax.jit(programs.decoder(model, list(prompt), method, eos=sep, pad=PAD))


def pictures(n, size, seed=5):
    """u8[n,size,size,3] and the same normalised, for us and for torch."""
    img = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), np.uint8)
    ours = np.asarray(normalize_pixels(img))
    return img, ours, torch.from_numpy(np.ascontiguousarray(ours.transpose(0, 3, 1, 2)))


def questions(vocab=120, seed=6):
    """ids i32[3,7] from [CLS] to [SEP], padded, and their mask."""
    ids = np.random.default_rng(seed).integers(5, vocab - 2, (3, 7)).astype(np.int32)
    ids[:, 0] = CLS
    mask = np.arange(7) < np.array([[7], [4], [5]])
    ids[~mask] = PAD
    return ids, mask


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=ATOL)


def same_texts(ours, theirs, sep=SEP):
    """Equal ids up to [SEP].

    Behind it, transformers cuts off common padding, and its beam search fills with [SEP] where [PAD] is 0.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert theirs.shape[1] <= ours.shape[1]
    ended = np.cumsum(theirs == sep, axis=1) - (theirs == sep) > 0
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], np.where(ended, PAD, theirs))
    assert (ours[:, theirs.shape[1] :] == PAD).all()


def long(ids):
    return torch.from_numpy(np.asarray(ids, np.int64))


# --- tiny models ------------------------------------------------------------------------------------------------------
def test_caption_logits_and_texts(saved):
    theirs, _, ours = saved("caption")
    img, mine, pixels = pictures(4, ours.size)
    ids = np.random.default_rng(1).integers(5, 118, (4, 9))
    ids[:, 0] = DEC
    kv = ours("image_kv", ours("encode_image", mine))
    with torch.inference_mode():
        want = theirs(pixel_values=pixels, input_ids=long(ids), attention_mask=torch.ones(4, 9)).logits[:, :-1]
    close(ours("lm_logits", jnp.asarray(ids), jnp.ones((4, 9), bool), kv)[..., :120], want)
    prompt = torch.tensor([[*PROMPT, SEP]] * 4)
    greedy = theirs.generate(pixels, prompt.clone(), max_length=20, num_beams=1, do_sample=False)
    same_texts(ours.texts(kv, PROMPT, max_length=20, min_length=0), greedy.numpy())
    for penalty in (1.0, 1.1):
        beams = theirs.generate(
            pixels,
            prompt.clone(),
            max_length=20,
            min_length=7,
            num_beams=3,
            do_sample=False,
            length_penalty=0.0,
            repetition_penalty=penalty,
        )
        mine = ours.texts(
            kv, PROMPT, beams=3, max_length=20, min_length=7, length_penalty=0.0, repetition_penalty=penalty
        )
        same_texts(mine, beams.numpy())
        assert len({int((row != PAD).sum()) for row in mine}) > 1  # some end early, some later


def test_beam_search_divides_by_another_length(saved):
    """A text's score is its log-probability over its length, and the length is counted otherwise.

    The original (and ours) counts the prompt but not [SEP], transformers today the new tokens with [SEP]. So without a
    length penalty both choose the same, with it each what is best by its own count.
    """
    theirs, _, ours = saved("caption")
    _, mine, pixels = pictures(8, ours.size)
    kv = ours("image_kv", ours("encode_image", mine))

    def log_prob(ids):
        ids = np.pad(ids, ((0, 0), (0, 24 - ids.shape[1])))
        logits = ours("lm_logits", jnp.asarray(ids), jnp.ones(ids.shape, bool), kv)
        of_token = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[:, 1:, None], axis=-1)[..., 0]
        ended = np.cumsum(ids == SEP, axis=1) - (ids == SEP) > 0
        return (of_token * ~ended[:, 1:])[:, len(PROMPT) - 1 :].sum(1), (~ended).sum(1), (ids == SEP).any(1)

    how = dict(max_length=24, length_penalty=1.0)
    chosen = [
        ours.texts(kv, PROMPT, beams=3, min_length=0, **how),
        theirs.generate(pixels, torch.tensor([[*PROMPT, SEP]] * 8), num_beams=3, do_sample=False, **how).numpy(),
    ]
    total, length, ended = (np.stack(x) for x in zip(*map(log_prob, chosen)))  # [ours | transformers', image]
    original, new = total / (length - ended), total / (length - len(PROMPT))
    assert (original[0] >= original[1] - ATOL).all() and (new[1] >= new[0] - ATOL).all()
    differ = abs(total[0] - total[1]) > ATOL
    assert differ.any() and not differ.all()


def test_matching_logits_and_cosines_with_the_first_id_of_either(saved):
    """Trained with [ENC] at position 0, which ours sets.

    transformers leaves [CLS] there unless the caller puts [ENC].
    """
    theirs, _, ours = saved("itm")
    _, mine, pixels = pictures(3, ours.size)
    ids, mask = questions()
    img_tok = ours("encode_image", mine)
    match = lambda **first: ours("match", jnp.asarray(ids), jnp.asarray(mask), ours("image_kv", img_tok), **first)
    with torch.inference_mode():
        scores = lambda ids, itm: (
            theirs(input_ids=long(ids), pixel_values=pixels, attention_mask=long(mask), use_itm_head=itm).itm_score
        )
        with_cls, cosines = scores(ids, True), scores(ids, False)
        with_enc = scores(np.where(np.arange(7) == 0, ENC, ids), True)
    close(match(first_id=CLS), with_cls)
    close(match(), with_enc)
    assert np.abs(np.asarray(match()) - with_cls.numpy()).max() > 0.01
    _, txt_emb = ours("encode_text", jnp.asarray(ids), jnp.asarray(mask))
    close(ours("project_image", img_tok) @ txt_emb.T, cosines)


def test_answers_with_the_first_id_of_either(saved):
    theirs, _, ours = saved("vqa")
    _, mine, pixels = pictures(3, ours.size)
    ids, mask = questions()
    image_kv = ours("image_kv", ours("encode_image", mine))

    def both(first, **how):
        states = ours(
            "encode_question",
            jnp.asarray(ids),
            jnp.asarray(mask),
            image_kv,
            **({"first_id": CLS} if first == CLS else {}),
        )
        kv = ours("question_kv", states)  # attended to as a whole, padding too, by both
        asked = long(np.where(np.arange(7) == 0, first, ids))
        beams = {"num_beams": how["beams"], "length_penalty": 0.0} if "beams" in how else {}
        given = theirs.generate(
            asked, pixels, attention_mask=long(mask), max_length=how["max_length"], do_sample=False, **beams
        )
        mine = ours.texts(kv, [DEC], min_length=0, **how, **({"length_penalty": 0.0} if beams else {}))
        same_texts(mine, given.numpy())
        return states

    with_cls, with_enc = (both(first, max_length=12) for first in (CLS, ENC))
    assert np.abs(np.asarray(with_cls - with_enc)).max() > 0.01
    both(CLS, max_length=12, beams=3)


def outputs(model, family, pixels):
    """What a model of transformers gives for fixed inputs, as arrays."""
    ids, mask = questions()
    with torch.inference_mode():
        if family == "caption":
            return [
                model(pixel_values=pixels, input_ids=long(ids)).logits,
                model.generate(pixels, max_length=9, do_sample=False),
            ]
        if family == "vqa":
            return [
                model.generate(long(ids), pixels, attention_mask=long(mask), max_length=9, do_sample=False, num_beams=2)
            ]
        scores = functools.partial(model, input_ids=long(ids), pixel_values=pixels, attention_mask=long(mask))
        return [scores(use_itm_head=True).itm_score, scores(use_itm_head=False).itm_score]


@pytest.mark.parametrize("family", CLASSES)
def test_transformers_loads_what_we_write_and_gives_the_same(saved, family, tmp_path):
    theirs, folder, ours = saved(family)
    hf.write(tmp_path / "back", ours.source)
    back, info = class_of(family).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    _, _, pixels = pictures(3, ours.size)
    for a, b in zip(outputs(theirs, family, pixels), outputs(back.eval(), family, pixels)):
        assert torch.equal(a, b)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert x.dtype == after[name].dtype and np.array_equal(x, after[name]), name


def test_bin_and_shards_are_read_as_the_one_file_is(saved, tmp_path, tiny_vocab):
    """Also the .bin of early releases, which holds tied copies and position_ids, and shards of it."""
    theirs, folder, ours = saved("vqa")
    tensors = {name: x.clone() for name, x in theirs.state_dict().items()}
    for text_model in ("text_encoder", "text_decoder.bert"):
        tensors[f"{text_model}.embeddings.position_ids"] = torch.arange(40)[None]
    assert len(tensors) == len(load_file(folder / "model.safetensors")) + 4
    folders = {kind: tmp_path / kind for kind in ("bin", "legacy", "bin_shards", "shards")}
    for kind in ("bin", "legacy", "bin_shards"):
        shutil.copytree(folder, folders[kind], ignore=lambda *_: ["model.safetensors"])
    torch.save(tensors, folders["bin"] / "pytorch_model.bin")
    torch.save(tensors, folders["legacy"] / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    where = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(tensors)}
    for shard in set(where.values()):
        torch.save({name: tensors[name] for name in where if where[name] == shard}, folders["bin_shards"] / shard)
    (folders["bin_shards"] / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    store(theirs, folders["shards"], tiny_vocab, max_shard_size="100KB")
    assert (folders["shards"] / "model.safetensors.index.json").exists()
    for kind, path in folders.items():
        got = read.read(path)
        jax.tree.map(np.testing.assert_array_equal, got.state, ours.source.state)
        hf.write(tmp_path / "out" / kind, got)
        assert (tmp_path / "out" / kind / "model.safetensors").read_bytes() == (
            tmp_path / "out/bin/model.safetensors"
        ).read_bytes()


def test_half_precision_becomes_float32(tmp_path, tiny_vocab):
    for dtype in (torch.float16, torch.bfloat16):
        model = net("itm").to(dtype)
        got = read.read(store(model, tmp_path / str(dtype), tiny_vocab))
        kernel = got.state["params"]["itm_head"]["kernel"]
        np.testing.assert_array_equal(kernel, model.itm_head.weight.float().detach().numpy().T)
        assert (
            kernel.dtype == np.float32
            and f"tensors in {str(dtype).removeprefix('torch.')} became float32" in " ".join(got.notes)
        )


# --- where transformers' defaults are not what was trained ------------------------------------------------------------
def logits_of(model, pixels):
    with torch.inference_mode():
        return model(pixel_values=pixels, input_ids=torch.tensor([PROMPT] * len(pixels))).logits[:, :-1]


def our_logits(ours, mine):
    kv = ours("image_kv", ours("encode_image", mine))
    return ours("lm_logits", jnp.asarray([PROMPT] * len(mine)), jnp.ones((len(mine), 4), bool), kv)[..., :120]


def rewrite(folder, change):
    """Lets `change` edit the parsed config.json."""
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))


def test_text_heads_that_config_json_does_not_say_are_twelve(tmp_path, tiny_vocab):
    """As trained with BERT-base's 12 heads.

    transformers itself falls back to 8 and computes something else, until our export.
    """
    # With a feed-forward layer as wide as BERT-base's float32 is good for 4e-5; with TEXT's 64 for 1e-4, by the CPU.
    wide = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 1, "num_attention_heads": 12}
    trained = net("caption", text={**TEXT, **wide}, gain=0.7)
    folder = store(trained, tmp_path / "hub", tiny_vocab)
    _, mine, pixels = pictures(2, VISION["image_size"])
    want = logits_of(trained, pixels)
    for change in (
        lambda c: c["text_config"].pop("num_attention_heads"),
        lambda c: c["text_config"].update(num_attention_heads=8),
    ):
        rewrite(folder, change)
        wrong = transformers.BlipForConditionalGeneration.from_pretrained(folder).eval()
        assert (
            wrong.config.text_config.num_attention_heads == 8 and (logits_of(wrong, pixels) - want).abs().max() > 0.01
        )
        ours = Ours(folder)
        close(our_logits(ours, mine), want)
        assert "num_attention_heads is missing or 8, transformers' default: 12 taken" in " ".join(ours.source.notes)
    hf.write(tmp_path / "out", ours.source)
    right = transformers.BlipForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert right.config.text_config.num_attention_heads == 12
    close(logits_of(right, pixels), want)


def test_other_widths_have_the_heads_that_config_json_says(saved, tmp_path, tiny_vocab):
    eight = net("caption", text={**TEXT, "num_attention_heads": 8})
    folder = store(eight, tmp_path / "eight", tiny_vocab)
    rewrite(folder, lambda c: c["text_config"].pop("num_attention_heads"))
    _, mine, pixels = pictures(2, VISION["image_size"])
    ours = Ours(folder)
    close(our_logits(ours, mine), logits_of(eight, pixels))
    assert not [note for note in ours.source.notes if "ignored" not in note]  # nothing else is said


def test_vision_eps_is_the_one_of_training(saved, tmp_path, tiny_vocab):
    """Seen where activations are small: transformers' default of 1e-5 gives other logits than the 1e-6 of training."""
    trained = net("caption")
    trained.vision_model.embeddings.patch_embedding.weight.data *= 1e-3
    for p in (
        trained.vision_model.embeddings.position_embedding,
        trained.vision_model.embeddings.class_embedding,
        trained.vision_model.embeddings.patch_embedding.bias,
    ):
        p.data *= 1e-3
    folder = store(trained, tmp_path / "hub", tiny_vocab)
    _, mine, pixels = pictures(2, VISION["image_size"])
    want = logits_of(trained, pixels)
    rewrite(folder, lambda c: c["vision_config"].pop("layer_norm_eps"))
    default = transformers.BlipForConditionalGeneration.from_pretrained(folder).eval()
    assert (
        default.config.vision_config.layer_norm_eps == 1e-5 and (logits_of(default, pixels) - want).abs().max() > 0.01
    )
    ours = Ours(folder)
    close(our_logits(ours, mine), want)
    assert "vision_config.layer_norm_eps is 1e-05, transformers' default: 1e-06 taken" in " ".join(ours.source.notes)
    hf.write(tmp_path / "out", ours.source)
    written = transformers.BlipConfig.from_pretrained(tmp_path / "out")
    assert (written.vision_config.layer_norm_eps, written.text_config.layer_norm_eps) == (1e-6, 1e-12)
    close(logits_of(transformers.BlipForConditionalGeneration.from_pretrained(tmp_path / "out").eval(), pixels), want)


def test_defaults_of_missing_keys_are_transformers_own():
    settings = transformers.BlipConfig()
    for part, defaults in hf_config.DEFAULTS.items():
        theirs = getattr(settings, part) if part else settings
        assert {key: getattr(theirs, key) for key in defaults} == defaults


def test_processor_reads_pictures_and_texts_as_we_do(saved, tmp_path, tiny_vocab):
    _, _, ours = saved("caption")
    hf.write(tmp_path / "out", ours.source)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 47, 3), np.uint8))
    said = "a red circle on the left of a BLUE square"
    got = processor(images=picture, text=said, return_tensors="np")
    assert isinstance(processor, transformers.BlipProcessor) and set(got) == {
        "pixel_values",
        "input_ids",
        "attention_mask",
    }
    want = normalize_pixels(image.eval_transform(picture, ours.size))
    np.testing.assert_allclose(got["pixel_values"][0].transpose(1, 2, 0), want, atol=1e-6)
    tokenizer = Tokenizer(tiny_vocab)
    ids, mask = tokenizer.encode([said], 40)
    np.testing.assert_array_equal(got["input_ids"][0], ids[0][mask[0]])
    spoken = [tokenizer.dec, *ids[0][mask[0]][1:], tokenizer.enc]
    assert processor.decode(spoken, skip_special_tokens=True) == tokenizer.decode(spoken)
    assert len(processor.tokenizer) == tokenizer.vocab_size
    assert processor.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [tokenizer.dec, tokenizer.enc]


def test_two_lines_on_either_side_say_the_same(saved, tmp_path):
    """A picture and a text through our verbs, and through what transformers loads from our export.

    That is its processor and its model.
    """
    picture = Image.fromarray(np.random.default_rng(7).integers(0, 256, (40, 33, 3), np.uint8))
    said = "a red circle on the left"
    for family in ("itm", "caption"):
        hf.write(tmp_path / family, saved(family)[2].source)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "itm")
    theirs, ours = (
        load(tmp_path / "itm")
        for load in (transformers.BlipForImageTextRetrieval.from_pretrained, blip_jax.from_pretrained)
    )
    given = processor(images=picture, text=said, return_tensors="pt")
    with torch.inference_mode():
        itm, itc = (theirs.eval()(**given, use_itm_head=head).itm_score for head in (True, False))
    got = ours.match(picture, said, first="[CLS]")
    close([got["probability"], got["cosine"]], [float(itm.softmax(1)[0, 1]), float(itc[0, 0])])

    theirs, ours = (
        load(tmp_path / "caption")
        for load in (transformers.BlipForConditionalGeneration.from_pretrained, blip_jax.from_pretrained)
    )
    ids = theirs.generate(given["pixel_values"], num_beams=3, max_length=12, length_penalty=0.0, do_sample=False)
    got = ours.caption(picture, prompt="", min_length=0, max_length=12, length_penalty=0.0)[0]["caption"]
    assert got == processor.decode(ids[0], skip_special_tokens=True) and got


# --- ViT-B/16 ---------------------------------------------------------------------------------------------------------
BASE = dict(
    text_config=dict(num_attention_heads=12, sep_token_id=102), vision_config=dict(image_size=224, layer_norm_eps=1e-6)
)


class Full(Ours):
    """ViT-B/16 of one family with parameters that are not read from a folder."""

    def __init__(self, family, params):
        cfg = config.base()
        with cfg.unlocked():
            cfg.objective = {"itm": "retrieval"}.get(family, family)
            cfg.model.update(dtype="float32")
        self.model, self.params, self.size, self.sep = build(cfg), jax.tree.map(jnp.asarray, params), 224, 102


@pytest.fixture(scope="module")
def full():
    """Random weights of ViT-B/16 and two BERT-bases.

    (transformers' three classes, which share them; the same as ours).
    """
    with torch.device("meta"):
        nets = {family: class_of(family)(transformers.BlipConfig(**BASE)).eval() for family in CLASSES}
    g, tensors = torch.Generator().manual_seed(0), {}
    shapes = {name: p.shape for model in nets.values() for name, p in model.named_parameters()}
    for name, shape in shapes.items():
        wide = 0.1 if len(shape) == 1 else 0.05 if "embedding" in name else shape[1:].numel() ** -0.5
        tensors[name] = (
            torch.randn(shape, generator=g).mul_(wide).add_(float("orm" in name and name.endswith("weight")))
        )
    tensors["text_decoder.cls.predictions.bias"][102] += 3
    for model in nets.values():
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()
        for part in [m for m in model.modules() if hasattr(m, "position_ids")]:
            part.position_ids = torch.arange(512)[None]
        assert not any(x.is_meta for x in (*model.parameters(), *model.buffers()))
    of = lambda *parts: {hf.to_original(name): x.numpy() for name, x in tensors.items() if name.startswith(parts)}
    heads = dict(heads=dict(vit=12, med=12))
    vqa = from_torch("vqa", of("vision_model", "text_encoder", "text_decoder"), **heads)["params"]
    itm = {"vit": vqa["vit"], "med": vqa["med"], "temp": np.float32(0.07)}
    for name in ("vision_proj", "text_proj", "itm_head"):
        itm[name] = {"kernel": tensors[f"{name}.weight"].numpy().T, "bias": tensors[f"{name}.bias"].numpy()}
    ours = {"vqa": vqa, "itm": itm, "caption": {"vit": vqa["vit"], "med": vqa["med_dec"]}}
    return nets, {family: Full(family, params) for family, params in ours.items()}


def test_full_size_captions(full):
    theirs, ours = (side["caption"] for side in full)
    _, mine, pixels = pictures(1, 224)
    prompt = [30522, 1037, 3861, 1997]
    kv = ours("image_kv", ours("encode_image", mine))
    ids = np.array([[*prompt, 2450, 3564, 102]])
    with torch.inference_mode():
        want = theirs(pixel_values=pixels, input_ids=long(ids)).logits[:, :-1]
    close(ours("lm_logits", jnp.asarray(ids), jnp.ones(ids.shape, bool), kv)[..., :30524], want)
    how = dict(max_length=12, repetition_penalty=1.3)  # so that random weights do not repeat one word
    for beams in ({}, dict(num_beams=3, length_penalty=0.0)):
        given = theirs.generate(pixels, torch.tensor([[*prompt, 102]]), do_sample=False, **how, **beams)
        mine = ours.texts(kv, prompt, min_length=0, **how, **({"beams": 3, "length_penalty": 0.0} if beams else {}))
        same_texts(mine, given, sep=102)
        assert len(set(mine[0])) > 5


def test_full_size_matching(full):
    theirs, ours = (side["itm"] for side in full)
    _, mine, pixels = pictures(2, 224)
    ids, mask = (
        np.array([[101, 1037, 2450, 2007, 3899, 102], [101, 2711, 29035, 102, 0, 0]]),
        np.arange(6) < np.array([[6], [4]]),
    )
    img_tok = ours("encode_image", mine)
    with torch.inference_mode():
        scores = functools.partial(theirs, input_ids=long(ids), pixel_values=pixels, attention_mask=long(mask))
        itm, itc = scores(use_itm_head=True).itm_score, scores(use_itm_head=False).itm_score
    close(ours("match", jnp.asarray(ids), jnp.asarray(mask), ours("image_kv", img_tok), first_id=101), itm)
    _, txt_emb = ours("encode_text", jnp.asarray(ids), jnp.asarray(mask))
    close(ours("project_image", img_tok) @ txt_emb.T, itc)


def test_full_size_answers(full):
    theirs, ours = (side["vqa"] for side in full)
    _, mine, pixels = pictures(2, 224)
    ids, mask = (
        np.array([[101, 2129, 2116, 6077, 102, 0], [101, 2073, 2003, 2023, 1029, 102]]),
        np.arange(6) < np.array([[5], [6]]),
    )
    states = ours(
        "encode_question",
        jnp.asarray(ids),
        jnp.asarray(mask),
        ours("image_kv", ours("encode_image", mine)),
        first_id=101,
    )
    kv = ours("question_kv", states)
    given = theirs.generate(
        long(ids), pixels, attention_mask=long(mask), max_length=8, do_sample=False, num_beams=3, length_penalty=0.0
    )
    same_texts(ours.texts(kv, [30522], beams=3, length_penalty=0.0, min_length=0, max_length=8), given, sep=102)


# --- BLIP-2 -----------------------------------------------------------------------------------------------------------
def test_blip2s_vision_tower_agrees():
    """Blip2VisionModel with random weights and heads of 88; its norm behind the blocks is BLIP-2's ln_vision."""
    sizes = dict(hidden_size=176, num_attention_heads=2, intermediate_size=768, num_hidden_layers=2, patch_size=14)
    torch.manual_seed(0)
    settings = transformers.Blip2VisionConfig(**sizes, image_size=28, layer_norm_eps=1e-6, initializer_range=0.1)
    theirs = transformers.Blip2VisionModel(settings).eval()
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers": "blocks",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
        "layer_norm": "norm",
    }
    tensors, rng = {}, np.random.default_rng(0)
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            x += 0.1 * torch.from_numpy(rng.normal(size=tuple(x.shape)).astype(np.float32))
            if name.endswith("qkv.bias"):  # keys have none
                x[176:352] = 0
            for old, new in names.items():
                name = name.replace(old, new)
            tensors[name] = x.numpy().copy()
        pixel_values = torch.from_numpy(rng.normal(size=(2, 3, 28, 28)).astype(np.float32))
        want = theirs(pixel_values=pixel_values).last_hidden_state.numpy()
    for name in [name for name in tensors if name.endswith("qkv.bias")]:
        q, _, v = np.split(tensors.pop(name), 3)
        tensors |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
    norm = {"ln_vision." + leaf: tensors.pop("post_layernorm." + leaf) for leaf in ("weight", "bias")}
    params = towers.parameters("eva", tensors, 2, prefix="")
    vit = towers.of_shapes("eva", params, 2, 28)
    assert params["blocks"]["attn"]["q"]["kernel"].shape == (2, 176, 2, 88)
    out = jax.jit(vit.apply)({"params": params}, towers.pixels(pixel_values.numpy()))
    np.testing.assert_allclose(towers.ln_vision(norm, out, 1e-6), want, rtol=0, atol=2e-5)
