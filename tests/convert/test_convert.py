"""Checkpoints of PyTorch in and out.

Every family, re-releases, what is wrong with them, sizes, vocabulary, the command.
"""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from world import official
from world.convert import converted, same_bits, store, vocab  # noqa: F401 (fixtures)

from blip_jax import checkpoint, config, trees
from blip_jax.cli import main
from blip_jax.convert import apply, recognise, torch_io, vocabulary
from blip_jax.convert import read as reading
from blip_jax.convert import write as writing
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.models import initial
from blip_jax.models.vision.vit import resize_pos_embed
from blip_jax.tasks import build

MODELS = ("pretrain", "retrieval", "itm", "features", "dialog", "caption", "vqa", "nlvr")
HEADS = official.TINY_HEADS
NUMBER_OF_KEYS = {  # of the released files
    ("pretrain", "base"): 1272,
    ("pretrain", "large"): 1560,
    ("retrieval", "base"): 949,
    ("retrieval", "large"): 1237,
    ("caption", "base"): 474,
    ("caption", "large"): 618,
    ("vqa", "base"): 791,
    ("nlvr", "base"): 579,
    ("itm", "base"): 473,
    ("itm", "large"): 617,
    ("features", "base"): 467,
    ("dialog", "base"): 469,  # of which there is no released file
}
needs_torch = pytest.mark.skipif(
    "not __import__('importlib').util.find_spec('torch')", reason="torch is not installed; pip install -e '.[convert]'"
)


def sizes_of(family):
    other = {"nlvr": {"layers": 7}, "dialog": {"W": official.TINY["D"]}}  # a dialog's widths are one
    return official.TINY | other.get(family, {})


def tiny(family, **how):
    return official.tensors(family, sizes_of(family), img_size=32, **how)


# --- tables -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family, size", NUMBER_OF_KEYS, ids="-".join)
def test_names_and_shapes_of_released_files(family, size):
    """The table against the list of names that official.py makes by itself; nothing of full size is allocated."""
    shapes = official.shapes(family, {"base": official.BASE, "large": official.LARGE}[size])
    assert len(shapes) == NUMBER_OF_KEYS[family, size]
    stand_ins = {
        name: torch_io.Lazy(shape, np.int64 if re.search("ids|ptr|idx", name) else np.float32, None)
        for name, shape in shapes.items()
    }
    table = apply.rows(family, stand_ins)
    letters = apply.infer(table, stand_ins)
    listed = {key: apply.shape_of(row.shape, letters) for row in table for key in row.keys}
    listed |= {copy: listed[origin] for copy, origin in apply.copies(family, table)}
    listed |= {key: (1, *listed[beside][:1]) for key, beside in apply.buffers(listed).items()}
    assert listed == shapes
    assert apply.check_keys(family, stand_ins, table) == [] and recognise.find_family(stand_ins) == family
    cfg = reading.make_config(letters, apply.layer_counts(family, stand_ins), {"vit": letters["D"] // 64, "med": 12})
    want = model_settings(size, official.IMG_SIZE.get(family, 384))
    assert json.loads(cfg.model.to_json()) == want


def model_settings(size, img_size):
    cfg = config.base(size)
    with cfg.unlocked():
        cfg.model.img_size = img_size
    return json.loads(cfg.model.to_json())


@pytest.mark.parametrize("family", MODELS)
def test_what_is_read_has_the_shapes_of_the_model(family, tmp_path, vocab):
    """Shapes and names of from_torch against the model built from the settings that the same tensors gave."""
    got = reading.read(store(tmp_path, family, tiny(family)), vocab=vocab, **HEADS)
    assert got.family == family and got.cfg.model.img_size == 32
    shapes = jax.eval_shape(lambda: initial.init_params(got.cfg, build(got.cfg), jax.random.key(0)))
    want = {path: x.shape for path, x in trees.paths(shapes)}
    have = {path: x.shape for path, x in trees.paths(got.state["params"])}
    if family == "features":  # it has no projections
        want = {path: shape for path, shape in want.items() if not re.match("vision_proj|text_proj|itm_head", path)}
    assert have == want


# --- there and back ---------------------------------------------------------------------------------------------------
@needs_torch
@pytest.mark.parametrize("family", MODELS)
def test_official_files_come_back_bit_by_bit(family, tmp_path, vocab):
    """.pth -> workdir -> .pth: same names, types, shapes and bits; the container is the originals'."""
    import torch

    arrays = tiny(family)
    official.save(
        tmp_path / "in.pth", arrays, epoch=3, optimizer={"state": {}, "param_groups": []}, config={"lr": 1e-4}
    )
    writing.convert(tmp_path / "in.pth", tmp_path / "ours", vocab=vocab, **HEADS)
    writing.convert(tmp_path / "ours", tmp_path / "back.pth")
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(content) == ["model"]
    same_bits(arrays, {name: x.numpy() for name, x in content["model"].items()})
    word = content["model"].get("text_decoder.bert.embeddings.word_embeddings.weight")
    if word is not None:  # tied tensors share their bytes, as in the originals' files
        assert content["model"]["text_decoder.cls.predictions.decoder.weight"].data_ptr() == word.data_ptr()


def test_a_workdir_holds_momentum_queue_vocabulary_and_settings(converted, vocab):
    arrays = tiny("retrieval")
    out = converted("retrieval", arrays)
    state, momentum = {"params": checkpoint.load_params(out)}, checkpoint.load_extra(out)
    back = apply.to_torch("retrieval", state | {"momentum": momentum}, vocab_size=120)
    same_bits({name: x for name, x in arrays.items() if not name.endswith("position_ids")}, back)
    assert momentum["queue"]["image_id"].dtype == np.int64 and momentum["queue"]["ptr"] == 8
    cfg = checkpoint.load_config(out)
    assert (cfg["objective"], cfg["text"]["vocab"]) == ("retrieval", "vocab.txt")
    assert (cfg["loss"]["momentum"], cfg["loss"]["queue"], cfg["model"]["img_size"]) == (True, 24, 32)
    assert (out / "vocab.txt").read_text() == open(vocab).read()
    again = reading.read(out)
    assert (
        again.family == "retrieval" and again.vocab == out / "vocab.txt" and again.cfg.model.to_dict() == cfg["model"]
    )


def test_a_captioner_computes_the_same_after_the_conversion(converted):
    """Through the checkpoint on disk: logits as of the tensors themselves."""
    arrays = tiny("caption")
    out = converted("caption", arrays)
    read = reading.read(out)
    direct = apply.from_torch("caption", arrays, **HEADS)["params"]
    model, rng = build(read.cfg), np.random.default_rng(0)
    img, ids = rng.standard_normal((1, 32, 32, 3), np.float32), rng.integers(5, 118, (1, 6)).astype(np.int32)

    def logits(params):
        call = lambda *a, method: model.apply({"params": params}, *a, method=method)
        return call(
            jnp.asarray(ids),
            np.ones((1, 6), bool),
            call(call(img, method="encode_image"), method="image_kv"),
            method="lm_logits",
        )

    np.testing.assert_array_equal(jax.jit(logits)(checkpoint.load_params(out)), jax.jit(logits)(direct))
    assert read.cfg.text.prompt == "a picture of " and read.cfg.text.max_len == 40


@needs_torch
@pytest.mark.parametrize(
    "family, gone",
    [
        ("pretrain", r"\w+_m\..*|.*queue.*"),  # re-released for inference
        ("pretrain", r"image_queue|text_queue|queue_ptr"),
        ("retrieval", r"\w+_m\..*"),
        ("caption", r".*position_ids"),  # saved with a later transformers
        ("vqa", r"text_decoder\.cls\.predictions\.decoder\.(weight|bias)"),  # tied copies left out
        ("pretrain", r"text_decoder\.bert\.(embeddings|encoder\.layer\.\d+\.(crossattention|intermediate|output))\..*"),
    ],
    ids=["no momentum, no queue", "no queue", "no momentum", "no buffers", "no copies", "no tied text model"],
)
def test_what_re_releases_leave_out_is_left_out_again(family, gone, tmp_path, vocab, capsys):
    arrays = {name: x for name, x in tiny(family).items() if not re.fullmatch(gone, name)}
    assert len(arrays) < len(tiny(family))
    official.save(tmp_path / "in.pth", arrays)
    writing.convert(tmp_path / "in.pth", tmp_path / "ours", vocab=vocab, **HEADS)
    said = capsys.readouterr().out
    assert ("the momentum encoder is not in the file" in said) == ("_m" in gone)
    writing.convert(tmp_path / "ours", tmp_path / "back.pth")
    same_bits(arrays, torch_io.open_tensors(tmp_path / "back.pth"))


@pytest.mark.parametrize("family", ["caption", "itm", "vqa"])
def test_the_way_through_a_hugging_face_folder_changes_no_bit(family, tmp_path, vocab, capsys):
    """official -> folder for transformers -> workdir -> official."""
    arrays = official.tensors(family, official.TINY | dict(W=48), img_size=32)
    writing.convert(store(tmp_path, family, arrays), tmp_path / "folder", to="hf", vocab=vocab, verify=True, **HEADS)
    writing.convert(tmp_path / "folder", tmp_path / "ours", verify=True)
    same_bits(arrays, writing.official(reading.read(tmp_path / "ours")))
    assert capsys.readouterr().out.count("bit by bit") == 3  # folder, the way back to the file, workdir


def test_of_a_pretraining_model_a_hugging_face_folder_holds_a_half(tmp_path, vocab):
    path = store(tmp_path, "pretrain", tiny("pretrain"))
    with pytest.raises(ValueError, match="choose a half with --family=caption or --family=itm"):
        writing.convert(path, tmp_path / "folder", to="hf", vocab=vocab, **HEADS)
    assert not (tmp_path / "folder").exists()
    writing.convert(path, tmp_path / "folder", to="hf", family="itm", vocab=vocab, **HEADS)
    assert reading.read(tmp_path / "folder").family == "itm"


def test_half_precision_becomes_float32_and_is_said(tmp_path, vocab):
    arrays = {name: x.astype(ml_dtypes.bfloat16) if x.dtype == np.float32 else x for name, x in tiny("itm").items()}
    got = reading.read(store(tmp_path, "itm", arrays), vocab=vocab, **HEADS)
    assert "92 tensors in bfloat16 became float32" in got.notes
    kernel = got.state["params"]["itm_head"]["kernel"]
    np.testing.assert_array_equal(kernel, arrays["itm_head.weight"].astype(np.float32).T)
    assert all(x.dtype == np.float32 for _, x in trees.paths(got.state))


# --- what is wrong ----------------------------------------------------------------------------------------------------
def test_all_problems_come_at_once(tmp_path, vocab):
    arrays = tiny("pretrain")
    del arrays["temp"], arrays["visual_encoder.blocks.0.norm1.weight"], arrays["visual_encoder.blocks.1.norm1.weight"]
    del arrays["text_encoder_m.encoder.layer.1.output.dense.bias"]  # of an optional group that is there
    arrays["visual_encoder.extra"] = np.zeros(3, np.float32)
    arrays["itm_head.weight"] = np.zeros((3, 32), np.float32)
    arrays["text_proj.weight"] = np.zeros((16, 31), np.float32)  # 31 against the width that all others have
    arrays["vision_proj.bias"] = np.zeros(16, np.int32)
    arrays["text_decoder.cls.predictions.decoder.weight"] = arrays["text_decoder.cls.predictions.decoder.weight"] + 1
    arrays["visual_encoder.norm.bias"] = np.array([np.nan] * 48, np.float32)
    arrays["text_encoder.encoder.layer.0.output.dense.bias"] = np.array([-np.inf] + [0] * 31, np.float32)
    with pytest.raises(ValueError) as e:
        reading.read(store(tmp_path, "pretrain", arrays), vocab=vocab, **HEADS)
    for part in (
        "missing: temp, visual_encoder.blocks.{0-1}.norm1.weight",
        "text_encoder_m.encoder.layer.1.output.dense.bias",
        "not in the table of family 'pretrain': visual_encoder.extra",
        "itm_head.weight is [3, 32], the other tensors imply [2, 32]",
        "text_proj.weight is [16, 31], the other tensors imply [16, 32]",
        "vision_proj.bias holds int32, expected floating-point numbers",
        "NaN or infinite: visual_encoder.norm.bias, text_encoder.encoder.layer.0.output.dense.bias",
        "tied but unequal: text_decoder.bert.encoder.layer.0.output.dense.bias and ",
        "text_decoder.cls.predictions.decoder.weight and text_encoder.embeddings.word_embeddings.weight",
    ):
        assert part in str(e.value), part


@pytest.mark.parametrize(
    "change, expected",
    [
        (
            lambda t: t.update({"visual_encoder.pos_embed": np.zeros((1, 16, 48), np.float32)}),
            "16 rows: it must be 1 + a square",
        ),
        (
            lambda t: (
                [t.pop(k) for k in list(t) if k.startswith("visual_encoder.blocks.1.")]
                and t.update({"visual_encoder.blocks.2.norm1.bias": np.zeros(48, np.float32)})
            ),
            "missing: visual_encoder.blocks.{1-2}.norm1.weight",
        ),
        (
            lambda t: t.update({"cls_token": t["visual_encoder.cls_token"]}),
            "not in the table of family 'caption': cls_token",
        ),
        (
            lambda t: t.update({"text_decoder.cls.predictions.bias": np.zeros(119, np.float32)}),
            "is [119], the other tensors imply [120]",
        ),
        (
            lambda t: t.update({"text_decoder.bert.embeddings.LayerNorm.bias": np.zeros((32, 1), np.float32)}),
            "is [32, 1], the other",
        ),
    ],
    ids=["grid", "a layer in the middle", "unknown", "head", "rank"],
)
def test_broken_tensors_are_refused(change, expected, tmp_path, vocab):
    arrays = tiny("caption")
    change(arrays)
    with pytest.raises(ValueError) as e:
        reading.read(store(tmp_path, "caption", arrays), vocab=vocab, **HEADS)
    assert expected in str(e.value)


def test_a_failed_conversion_leaves_nothing_and_an_old_out_stays(tmp_path, vocab, converted, monkeypatch):
    arrays = tiny("itm")
    out = converted("itm", arrays)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="itm-ours exists already"):
        converted("itm", arrays)
    monkeypatch.setattr(checkpoint, "write", lambda workdir, *_: [] + {})
    with pytest.raises(TypeError):
        converted("itm", arrays, name="other")
    assert sorted(tmp_path.rglob("*")) == before and out.is_dir()


@needs_torch
@pytest.mark.parametrize("out", ["out.pth", "ours"])
def test_two_conversions_to_one_output(out, tmp_path, vocab, monkeypatch):
    """While one is at work the other is refused; and what another program puts there meanwhile stays as it is."""
    path, read = tmp_path / "x.pth", reading.read
    official.save(path, tiny("caption"))
    other, asked = tmp_path / "other" / out, {"to": {"out.pth": "official"}.get(out, out), "vocab": vocab, **HEADS}

    def meanwhile(*args, **kw):
        found = read(*args, **kw)
        with pytest.raises(ValueError, match=f"{other} is in use by process"):
            writing.convert(path, other, **asked)
        if other.suffix:
            other.write_text("mine")
        else:
            other.mkdir()
        return found

    monkeypatch.setattr(writing, "read", meanwhile)
    with pytest.raises(ValueError, match=f"{other} exists already"):
        writing.convert(path, other, **asked)
    assert other.read_text() == "mine" if other.suffix else not list(other.iterdir())
    assert [p.name for p in other.parent.iterdir()] == [out]


def test_a_family_that_is_not_there_is_refused_and_a_part_can_be_taken(tmp_path, vocab):
    path = store(tmp_path, "pretrain", tiny("pretrain"))
    with pytest.raises(
        ValueError,
        match="holds a pre-training model .*, not a question answering model .family vqa.; it can be read as "
        "pretrain, retrieval, itm, features, caption",
    ):
        reading.read(path, family="vqa", vocab=vocab, **HEADS)
    with pytest.raises(ValueError, match="family is 'captions': choose one of"):
        reading.read(path, family="captions")
    whole = reading.read(path, vocab=vocab, **HEADS)
    for family in ("retrieval", "itm", "features", "caption"):
        part = reading.read(path, family=family, vocab=vocab, **HEADS)
        arrays = apply.to_torch(family, part.state, vocab_size=120)
        names = set(official.shapes(family, official.TINY))
        assert set(arrays) == {name for name in names if not name.endswith("position_ids")}
        assert part.cfg.objective == {"caption": "caption"}.get(family, "retrieval") and "left out" in part.notes[-1]
        model = build(part.cfg)
        assert model.decoder == (family == "caption") != model.encoder
        np.testing.assert_array_equal(part.state["params"]["vit"]["cls"], whole.state["params"]["vit"]["cls"])
        queue = part.state.get("momentum", {}).get("queue")
        assert (queue is None) == (family != "retrieval")
        assert queue is None or (queue["image_id"] == -100).all() and queue["ptr"] == 0
    with pytest.raises(ValueError, match="this is no|holds a captioner"):
        reading.read(store(tmp_path, "caption", tiny("caption")), family="pretrain", vocab=vocab, **HEADS)

    parts = {name: reading.read(path, family=name, vocab=vocab, **HEADS) for name in ("deit", "bert")}
    own = dict(trees.paths(whole.state["params"]))
    for name, part in parts.items():
        taken = dict(trees.paths(part.state["params"]))
        tower = {p for p in own if p.startswith("vit/")}
        words = {p for p in own if p.startswith("med/") and "cross_attn" not in p}
        assert taken.keys() == {"deit": tower, "bert": words}[name]
        assert all((x == own[p]).all() for p, x in taken.items())


def test_files_of_other_models_are_named(tmp_path):
    for name, expected in (
        ("layer.0.weight", "no checkpoint of BLIP"),
        ("vision_model.embeddings.class_embedding", "the folder it lies in"),
    ):
        save_file({name: np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=expected):
            reading.read(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="nowhere.pth' is no file or folder here"):
        reading.read(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="neither checkpoints of ours"):
        reading.read(tmp_path)


# --- sizes, vocabulary ------------------------------------------------------------------------------------------------
def test_heads_come_from_the_width_or_the_flags(tmp_path, vocab):
    path = store(tmp_path, "itm", tiny("itm"))
    with pytest.raises(ValueError, match="a width of 48 is no multiple of 64.*--vit_heads"):
        reading.read(path, vocab=vocab)
    with pytest.raises(ValueError, match="a width of 32 .*--med_heads"):
        reading.read(path, vocab=vocab, heads=dict(vit=3))
    with pytest.raises(ValueError, match="ViT's width 48 does not divide into 5 heads"):
        reading.read(path, vocab=vocab, heads=dict(vit=5, med=2))
    wide = official.tensors("itm", official.TINY | dict(D=128, W=64), img_size=16)
    model = reading.read(store(tmp_path, "wide", wide), vocab=vocab).cfg.model
    assert (model.vit.heads, model.med.heads) == (2, 1)


def test_image_size_resizes_both_position_tables(tmp_path, vocab):
    arrays = tiny("retrieval")
    path = store(tmp_path, "retrieval", arrays)
    got = reading.read(path, vocab=vocab, img_size=48, **HEADS)
    for part, name in ((got.state["params"], "visual_encoder"), (got.state["momentum"]["params"], "visual_encoder_m")):
        np.testing.assert_array_equal(part["vit"]["pos_embed"], resize_pos_embed(arrays[f"{name}.pos_embed"][0], 37))
    assert got.cfg.model.img_size == 48 and got.notes[-1] == "position table resized from 32 to 48 pixels"
    same = reading.read(path, vocab=vocab, img_size=32, **HEADS)
    np.testing.assert_array_equal(same.state["params"]["vit"]["pos_embed"], arrays["visual_encoder.pos_embed"][0])
    with pytest.raises(ValueError, match="--img_size=36 is no multiple of the patch, 8"):
        reading.read(path, vocab=vocab, img_size=36, **HEADS)


def test_the_vocabulary_must_fit(tmp_path, vocab, monkeypatch):
    path = store(tmp_path, "itm", tiny("itm"))
    other = official.vocabulary(tmp_path / "other.txt", 119)
    with pytest.raises(ValueError, match=r"other.txt has 119 entries with \[DEC\] and \[ENC\], but the model has 120"):
        reading.read(path, vocab=other, **HEADS)
    with pytest.raises(
        ValueError, match="no vocabulary came with the checkpoint, and 120 entries are not those of google-bert"
    ):
        reading.read(path, **HEADS)
    words = open(vocab).read().split()
    (tmp_path / "early.txt").write_text("\n".join(["[DEC]", "[ENC]", *words]) + "\n")
    with pytest.raises(ValueError, match="early.txt numbers .* 0 and 1: they must be the last two of 120"):
        reading.read(path, vocab=str(tmp_path / "early.txt"), **HEADS)


def test_berts_vocabulary_is_fetched_where_the_hub_is(tmp_path, vocab, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed; pip install -e '.[hub]'")
    path = store(tmp_path, "itm", tiny("itm"))
    asked = []

    def download(repository, name, local_files_only):
        asked.append((repository, name, local_files_only))
        if local_files_only:
            raise OSError("not in the cache")
        if vocab is None:
            raise OSError("no network")
        return vocab

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(vocabulary, "BERT_VOCAB", (*vocabulary.BERT_VOCAB[:2], 118))
    assert str(reading.read(path, **HEADS).vocab) == vocab
    assert asked == [("google-bert/bert-base-uncased", "vocab.txt", local) for local in (True, False)]
    vocab = None
    with pytest.raises(ValueError, match="could not be fetched .OSError.: give one with --vocab=FILE"):
        reading.read(path, **HEADS)


def test_a_tokenizer_json_travels_as_well(tmp_path, vocab, converted):
    Tokenizer(vocab)._tok.save(str(tmp_path / "tokenizer.json"))
    out = converted("itm", tiny("itm"), vocab=str(tmp_path / "tokenizer.json"))
    assert checkpoint.load_config(out)["text"]["vocab"] == "vocab.json"
    assert reading.read(out).vocab == out / "vocab.json" and Tokenizer(out / "vocab.json").enc == 119


# --- the command ------------------------------------------------------------------------------------------------------
def test_the_command(tmp_path, vocab, capsys):
    path, out = store(tmp_path, "nlvr", tiny("nlvr")), tmp_path / "deep" / "er" / "nlvr"
    flags = [f"--vocab={vocab}", "--vit_heads=4", "--med_heads=4"]
    assert main.main(["convert", str(path), str(out), "--verify", *flags]) == 0
    said = capsys.readouterr().out
    for part in (
        "an NLVR2 model (family nlvr), ViT 2 x 48, 4 heads, 32 px; MED 7 x 32, 4 heads, 120 entries;",
        " parameters\n",
        "what was written (ours) equals its origin in all",
        f"the way back to the original's names equals its origin in all {len(tiny('nlvr'))} tensors, bit by bit",
        "tensors were compared only",
        "GB written in",
        "peak memory",
    ):
        assert part in said, part
    for argv, expected in (
        (["a"], "needs IN and OUT"),
        (["a", "b", "c"], "unexpected argument 'c'"),
        ([str(path), str(out), *flags], "exists already"),
        ([str(path), "x", "--to=onnx"], "--to=onnx: choose one of"),
        ([str(path), "x", "--famly=nlvr"], "famly"),
        ([str(out), "x", "--vit_heads=2"], "names its numbers of heads"),
    ):
        assert main.main(["convert", *argv]) == 2
        assert expected in capsys.readouterr().err


def test_verify_finds_a_changed_bit(tmp_path, vocab, monkeypatch):
    path, write = store(tmp_path, "caption", tiny("caption")), checkpoint.write

    def flip(workdir, state, *rest):
        kernel = np.array(state["params"]["med"]["blocks"]["mlp"]["fc1"]["kernel"])
        kernel[1, 3, 4] = np.nextafter(kernel[1, 3, 4], np.float32(9))
        state["params"]["med"]["blocks"]["mlp"]["fc1"]["kernel"] = kernel
        write(workdir, state, *rest)

    monkeypatch.setattr(
        checkpoint, "write", lambda workdir, state, *rest: flip(workdir, jax.tree.map(np.asarray, state), *rest)
    )
    with pytest.raises(
        ValueError, match="differs from its origin in 1 of 57 tensors: params/med/blocks/mlp/fc1/kernel"
    ):
        writing.convert(path, tmp_path / "out", vocab=vocab, verify=True, **HEADS)
    assert not (tmp_path / "out").exists()


@needs_torch
@pytest.mark.parametrize(
    "family, outputs",
    [
        ("caption", ["caption logits"]),
        ("vqa", ["question states", "answer logits"]),
        ("pretrain", ["caption logits", "matching logits", "cosines"]),
    ],
)
def test_verify_runs_both_models(family, outputs, tmp_path, vocab, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed; pip install -e '.[peers]'")
    arrays = official.tensors(family, official.TINY | dict(W=48), img_size=16)
    writing.convert(store(tmp_path, family, arrays), tmp_path / "ours", vocab=vocab, verify=True, **HEADS)
    lines = re.findall(r"verified: (.+), ours and transformers': largest difference (\S+)", capsys.readouterr().out)
    assert [name for name, _ in lines] == outputs and all(float(x) < 1e-4 for _, x in lines)
