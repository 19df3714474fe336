"""Hugging Face folders without torch or transformers.

Names, config.json, shards, vocabularies, and every way to be wrong.
"""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from blip_jax import checkpoint, config
from blip_jax.convert import hf, hf_config
from blip_jax.convert import read as reading
from blip_jax.convert import write as writing
from blip_jax.convert.rules.blip import TIED
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.tasks import build

FAMILIES = {"caption": "caption", "itm": "retrieval", "vqa": "vqa"}  # family -> objective
# in a state dict of transformers' class, two tied copies of a decoder included
KEYS = {"caption": 473, "itm": 472, "vqa": 789}


def random_source(family, vocab, layers=2, **med):
    """A tiny model of random numbers as if it had been read from a file."""
    c = config.base("tiny")
    with c.unlocked():
        c.objective = FAMILIES.get(family, family)
        c.model.vit.update(width=32, heads=2, mlp=96, depth=layers)
        c.model.med.update(layers=layers, **med)
        c.model.update(img_size=16, embed_dim=16, dtype="float32")
    model = build(c)
    ids = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), ids, ids == 0)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
    for part in ("med", "med_dec"):  # what the stored vocabulary has beyond the real one is zero
        if part in params:
            params[part]["embed"]["word"]["embedding"][120:] = 0
            if "lm_head" in params[part]:
                params[part]["lm_head"]["bias"][120:] = 0
    return reading.Source(family, {"params": params}, c, vocab, [])


@pytest.fixture
def written(tmp_path, tiny_vocab):
    """A function: family, sizes -> (the source, the folder written from it)."""

    def write(family="caption", **sizes):
        made = random_source(family, tiny_vocab, **sizes)
        hf.write(tmp_path / family, made)
        return made, tmp_path / family

    return write


def edit(folder, change, name="config.json"):
    """Lets `change` edit a parsed JSON file."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def problem(folder, read=reading.read):
    """What reading it says."""
    with pytest.raises(ValueError) as e:
        read(folder)
    return str(e.value)


# --- what is right ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bitwise_with_settings_and_vocabulary(written, family, tmp_path):
    made, folder = written(family)
    got = reading.read(folder)
    jax.tree.map(np.testing.assert_array_equal, got.state["params"] | {"temp": 0}, made.state["params"] | {"temp": 0})
    assert (got.family, got.cfg.objective) == (family, FAMILIES[family]) and not got.notes
    for part in ("vit", "med"):
        sizes = {k: v for k, v in got.cfg.model[part].items() if k != "pos_std"}
        assert sizes == {k: made.cfg.model[part][k] for k in sizes}
    assert [got.cfg.model[k] for k in ("img_size", "embed_dim")] == [16, 256 if family != "itm" else 16]
    assert got.vocab.read_bytes() == made.vocab.read_bytes()
    hf.write(tmp_path / "again", got)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_through_a_workdir_of_ours_and_back_is_bitwise(written, family, tmp_path):
    _, folder = written(family)
    writing.convert(folder, tmp_path / "ours")
    writing.convert(tmp_path / "ours", tmp_path / "hf", to="hf", verify=True)
    for name in ("model.safetensors", "vocab.txt", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes(), name
    assert checkpoint.load_config(tmp_path / "ours")["objective"] == FAMILIES[family]


@pytest.mark.parametrize("family", KEYS)
def test_twelve_layers_have_the_keys_of_transformers_classes(written, family):
    _, folder = written(family, layers=12)
    names = set(load_file(folder / "model.safetensors"))
    copies = {copy for copy, _ in TIED[family]}  # not in the file
    assert len(copies) == (0 if family == "itm" else 2) and len(names | copies) == KEYS[family] == len(names) + len(
        copies
    )


def test_names_of_the_vision_tower_both_ways():
    pairs = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
        "norm.weight": "post_layernorm.weight",
        **{
            f"blocks.11.{a}": f"encoder.layers.11.{b}"
            for a, b in (
                ("norm1.bias", "layer_norm1.bias"),
                ("norm2.weight", "layer_norm2.weight"),
                ("attn.qkv.weight", "self_attn.qkv.weight"),
                ("attn.proj.bias", "self_attn.projection.bias"),
                ("mlp.fc1.weight", "mlp.fc1.weight"),
            )
        },
    }
    for original, theirs in pairs.items():
        assert hf.to_hf(f"visual_encoder.{original}") == f"vision_model.{theirs}"
        assert hf.to_original(f"vision_model.{theirs}") == f"visual_encoder.{original}"
    for same in (
        "text_encoder.encoder.layer.0.attention.self.query.weight",
        "vision_proj.bias",
        "text_decoder.cls.predictions.bias",
    ):
        assert hf.to_hf(same) == hf.to_original(same) == same
    assert (
        hf.to_hf("missing: visual_encoder.blocks.{0-11}.norm1.bias")
        == "missing: vision_model.encoder.layers.{0-11}.layer_norm1.bias"
    )


def test_a_tied_copy_stands_for_its_original_and_must_equal_it(written):
    made, folder = written()
    tensors = load_file(folder / "model.safetensors")
    word, head = "text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.decoder.weight"
    tensors[head] = tensors.pop(word)
    save_file(tensors, folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, reading.read(folder).state["params"], made.state["params"])
    save_file({**tensors, word: tensors[head] + 1}, folder / "model.safetensors")
    assert "tied but unequal" in problem(folder) and head in problem(folder)


def test_squares_as_lists_and_missing_keys_take_transformers_defaults(written):
    _, folder = written()
    edit(folder, lambda c: c["vision_config"].update(image_size=[16, 16], patch_size=[8, 8]))
    edit(folder, lambda c: [c["vision_config"].pop(k) for k in ("hidden_act", "layer_norm_eps")])
    edit(folder, lambda c: c.pop("architectures"))
    got = reading.read(folder)
    assert (got.family, got.cfg.model.img_size) == ("caption", 16)
    assert got.notes == [
        "vision_config.layer_norm_eps is 1e-05, transformers' default: 1e-06 taken, with which the originals were "
        "trained"
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_architectures_the_text_models_tell_the_family(written, family):
    _, folder = written(family)
    edit(folder, lambda c: c.pop("architectures"))
    assert reading.read(folder).family == family


def test_heads_missing_or_transformers_default_at_berts_width_are_twelve(written):
    _, folder = written("itm", layers=1, width=768, heads=12)
    kernel = lambda **heads: reading.read(folder, **heads).state["params"]["med"]["blocks"]["self_attn"]["q"]["kernel"][
        0
    ]
    assert kernel().shape == (768, 12, 64) and not reading.read(folder).notes
    for change in (
        lambda c: c["text_config"].pop("num_attention_heads"),
        lambda c: c["text_config"].update(num_attention_heads=8),
    ):
        edit(folder, change)
        assert kernel().shape == (768, 12, 64) and "12 taken" in reading.read(folder).notes[0]
        assert kernel(heads=dict(med=8)).shape == (768, 8, 96)
    edit(folder, lambda c: c["text_config"].update(num_attention_heads=6))
    assert kernel().shape == (768, 6, 128)


def test_retrieval_and_halves_of_pretraining_are_written_and_say_what_is_left_out(tmp_path, tiny_vocab):
    made = random_source("retrieval", tiny_vocab)
    hf.write(tmp_path / "itm", made)
    assert made.notes == [
        "temperature, momentum encoder and queues are left out: transformers' class has no place for them"
    ]
    whole = random_source("caption", tiny_vocab)._replace(family="pretrain")
    with pytest.raises(ValueError, match="choose a half with --family=caption or --family=itm"):
        hf.write(tmp_path / "no", whole)
    assert not (tmp_path / "no").exists()


# --- vocabularies -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("extra", [(), ("[DEC]", "[ENC]")])
def test_a_tokenizer_json_with_or_without_the_new_tokens(written, tmp_path, tiny_vocab, extra):
    made, folder = written()
    lines = tiny_vocab.read_text().split()
    tokenizer = BertWordPieceTokenizer({t: i for i, t in enumerate(lines)}, lowercase=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in extra])
    (folder / "vocab.txt").unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    got = reading.read(folder)
    assert (
        got.vocab.name == "tokenizer.json"
        and (t := Tokenizer(got.vocab)).vocab_size == 120
        and (t.dec, t.enc) == (118, 119)
    )
    hf.write(tmp_path / "json", got)
    assert JsonTokenizer.from_file(str(tmp_path / "json" / "tokenizer.json")).get_vocab_size() == 118 + len(extra)
    jax.tree.map(np.testing.assert_array_equal, reading.read(tmp_path / "json").state, got.state)


def test_of_two_vocabularies_the_one_that_fits(written, tiny_vocab, tmp_path):
    _, folder = written()
    BertWordPieceTokenizer(str(tiny_vocab), lowercase=True).save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(tiny_vocab.read_text().split()[:100]) + "\n")
    assert reading.read(folder).vocab.name == "tokenizer.json"
    (folder / "tokenizer.json").unlink()
    assert "vocab.txt has 102 entries with [DEC] and [ENC], but the model has 120" in problem(folder)
    assert reading.read(folder, vocab=str(tiny_vocab)).vocab == tiny_vocab


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("bos_token_id", 30522, "bos_token_id is 30522, but the vocabulary's is 118"),
        ("sep_token_id", 102, "sep_token_id is 102, but the vocabulary's is 3"),
        ("vocab_size", "120", "text_config.vocab_size is '120': it must be a whole number above 0"),
    ],
)
def test_ids_and_sizes_of_another_vocabulary(written, key, value, said):
    _, folder = written("vqa")
    edit(folder, lambda c: c["text_config"].update({key: value}))
    assert said in problem(folder)


# --- config.json that does not fit ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["Blip2ForConditionalGeneration", "BlipModel", "CLIPModel"])
def test_unknown_architecture(written, name):
    _, folder = written()
    edit(folder, lambda c: c.update(architectures=[name]))
    said = problem(folder)
    assert f"architecture {name}" in said and all(known in said for known in hf_config.ARCHITECTURES)
    edit(folder, lambda c: (c.pop("architectures"), c.update(model_type="siglip")))
    assert "model_type 'siglip'" in problem(folder)


def test_all_problems_of_config_json_at_once(written):
    _, folder = written()
    edit(
        folder,
        lambda c: (
            c["vision_config"].update(hidden_act="quick_gelu", layer_norm_eps=1e-3, image_size=[16, 32]),
            c["text_config"].update(num_hidden_layers="2", layer_norm_eps=1e-5),
        ),
    )
    said = problem(folder)
    for part in (
        "vision_config.hidden_act is 'quick_gelu'",
        "vision_config.layer_norm_eps is 0.001",
        "vision_config.image_size is [16, 32]: it must be a whole number above 0",
        "text_config.num_hidden_layers is '2'",
        "text_config.layer_norm_eps is 1e-05: the models here have 1e-12",
    ):
        assert part in said


def test_sizes_that_the_weights_contradict(written):
    _, folder = written("itm")
    edit(
        folder,
        lambda c: (
            c["vision_config"].update(hidden_size=48, num_hidden_layers=3, image_size=24),
            c["text_config"].update(vocab_size=130),
            c.update(image_text_hidden_size=8),
        ),
    )
    said = problem(folder)
    for part in (
        "vision_config.hidden_size is 48, but the weights have 32",
        "vision_config.num_hidden_layers is 3, but the weights have 2",
        "vision_config.image_size is 24 with patches of 8, but the weights have 5 positions",
        "text_config.vocab_size is 130, but the weights have 120",
        "  image_text_hidden_size is 8, but the weights have 16",
    ):
        assert part in said


def test_heads_that_do_not_divide(written):
    _, folder = written()
    edit(folder, lambda c: c["text_config"].update(num_attention_heads=5))
    assert "width 32 does not divide into 5 heads" in problem(folder)


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "config.json cannot be read"),
        ("[]", "config.json"),
        ("\xff", "config.json cannot be read"),
    ],
)
def test_config_json_that_is_none(written, content, said):
    _, folder = written()
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert said in problem(folder, hf.read)


def test_no_config_and_no_weights(written, tmp_path):
    _, folder = written()
    (folder / "model.safetensors").unlink()
    (folder / "tf_model.h5").write_bytes(b"")
    assert "holds no weights, none of model.safetensors" in problem(folder)
    (folder / "config.json").unlink()
    assert "config.json" in problem(folder)


def test_weights_that_are_not_complete_under_their_own_names(written):
    _, folder = written()
    tensors = load_file(folder / "model.safetensors")
    norm = "vision_model.encoder.layers.1.layer_norm1.weight"
    del tensors[norm]
    tensors["vision_model.post_layernorm.bias"] = np.zeros(7, np.float32)
    tensors["vision_model.embeddings.class_embedding"] = tensors["vision_model.embeddings.class_embedding"] * np.nan
    save_file({**tensors, "qformer.weight": np.zeros(3, np.float32)}, folder / "model.safetensors")
    said = problem(folder)
    for part in (
        f"missing: {norm}",
        "qformer.weight",
        "misshapen: vision_model.post_layernorm.bias is [7]",
        "NaN or infinite: vision_model.embeddings.class_embedding",
    ):
        assert part in said
    assert "visual_encoder" not in said


# --- shards -----------------------------------------------------------------------------------------------------------
def shard(folder, n=3):
    """Splits model.safetensors in n; the index as a dict."""
    tensors = load_file(folder / "model.safetensors")
    where = {name: f"model-{i % n + 1:05}-of-{n:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for name in set(where.values()):
        save_file({k: tensors[k] for k in where if where[k] == name}, folder / name)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_are_read_as_one(written):
    made, folder = written("vqa")
    shard(folder)
    jax.tree.map(np.testing.assert_array_equal, reading.read(folder).state["params"], made.state["params"])


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/secret.safetensors",
        "..\\secret.safetensors",
        "..",
        "",
        "secret.safetensors\n",
        "config.json",
        "~secret.safetensors",
    ],
)
def test_a_shard_outside_the_folder_is_never_opened(written, name, monkeypatch):
    _, folder = written()
    index = shard(folder)
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder.parent / "secret.safetensors")
    first = next(iter(index["weight_map"]))
    edit(folder, lambda c: c["weight_map"].update({first: name}), "model.safetensors.index.json")
    opened = []
    monkeypatch.setattr(hf.torch_io, "open_tensors", opened.append)
    assert f"{name!r} is no plain file name" in problem(folder)
    assert not opened


def test_shards_that_are_missing_or_disagree_with_the_index(written):
    _, folder = written()
    where = shard(folder)["weight_map"]
    names = sorted(where)
    one, two, three = sorted(set(where.values()))
    again, lost, unlisted = names[0], names[1], names[2]
    first, second = load_file(folder / one), load_file(folder / two)
    second.pop(lost)
    save_file({**second, again: first[again]}, folder / two)
    edit(folder, lambda c: c["weight_map"].pop(unlisted), "model.safetensors.index.json")
    said = problem(folder)
    for part in (
        f"{again} is in {one} and in {two}",
        f"{lost} should be in {two}, but is not",
        f"{unlisted} is in {three}, but not in the index",
    ):
        assert part in said
    (folder / three).unlink()
    assert problem(folder).endswith(f"{three} is missing")
    for broken in ({}, {"weight_map": {}}, {"weight_map": [one]}, {"weight_map": {again: 1}}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(broken))
        assert "has no weight_map" in problem(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.txt", "model-00002-of-00003.safetensors"])
def test_a_link_out_of_the_folder_is_refused(written, tmp_path, name):
    _, folder = written()
    if "00002" in name:
        shard(folder)
    outside = tmp_path / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)
    assert f"{folder / name} is a link to {outside}, out of its folder" in problem(folder, hf.read)
    (folder / name).unlink()
    shutil.move(outside, folder / "inside")
    (folder / name).symlink_to("inside")  # within the folder it may lead anywhere
    assert hf.read(folder).family == "caption"


def test_a_folder_that_is_only_called_like_the_hubs_is_no_cache(written, tmp_path):
    _, folder = written()
    lookalike = tmp_path / "snapshots" / "model"
    shutil.copytree(folder, lookalike)
    shutil.move(lookalike / "vocab.txt", tmp_path / "secret")
    (lookalike / "vocab.txt").symlink_to("../../secret")
    assert "out of its folder" in problem(lookalike)


def test_links_of_the_hubs_cache_are_followed_within_their_model(written, tmp_path):
    made, folder = written()
    model = tmp_path / "hub" / "models--org--name"
    snapshot = model / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for i, file in enumerate(sorted(os.listdir(folder))):
        shutil.move(folder / file, model / "blobs" / str(i))
        (snapshot / file).symlink_to(f"../../blobs/{i}")
    jax.tree.map(np.testing.assert_array_equal, reading.read(snapshot).state["params"], made.state["params"])
    other = tmp_path / "hub" / "models--org--other"
    other.mkdir()
    shutil.copy(model / "blobs" / "0", other / "blob")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../models--org--other/blob")
    assert "out of its folder" in problem(snapshot, hf.read)


# --- what cannot be written -------------------------------------------------------------------------------------------
def test_what_no_class_of_transformers_can_hold(tmp_path, tiny_vocab):
    made = random_source("vqa", tiny_vocab, width=48)
    for wrong, said in (
        (made, "one width, not 32 and 48"),
        (random_source("caption", None), "needs a vocabulary"),
        (random_source("caption", tiny_vocab, vocab_size=130), "has 120 entries with [DEC] and [ENC], but the model"),
        (random_source("nlvr", tiny_vocab), "no class for"),
    ):
        with pytest.raises(ValueError) as e:
            hf.write(tmp_path / "out", wrong)
        assert said in str(e.value) and not (tmp_path / "out").exists()
