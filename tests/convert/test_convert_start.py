"""What runs begin with: initial weights from others' files, pre-training resumed from theirs, ours written for them."""

import json

import jax
import numpy as np
import optax
import pytest
from world import official
from world.convert import converted, same_bits, store, vocab  # noqa: F401 (fixtures)

from blip_jax import checkpoint, config, trees
from blip_jax.capfilt.run import models
from blip_jax.convert import apply, read, torch_io, write
from blip_jax.models import initial
from blip_jax.models.vision.vit import resize_pos_embed
from blip_jax.tasks import build
from blip_jax.train import loop, start
from blip_jax.train import state as train_state

HEADS = official.TINY_HEADS


# --- initial weights --------------------------------------------------------------------------------------------------
def test_deit(tmp_path):
    arrays = official.tensors("deit", official.TINY, img_size=32)
    got = read.read(store(tmp_path, "deit", arrays), **HEADS)
    assert got.family == "deit" and set(got.state["params"]) == {"vit"} and got.vocab is None
    same_bits(
        {k: x for k, x in arrays.items() if not k.startswith("head.")},
        apply.to_torch("deit", got.state, vocab_size=120),
    )
    with pytest.raises(ValueError, match="are no model"):
        write.convert(tmp_path / "deit.safetensors", tmp_path / "x.pth", **HEADS)


def test_augreg(tmp_path):
    arrays = official.flax()
    np.savez(tmp_path / "vit.npz", **arrays)
    got = read.read(tmp_path / "vit.npz")
    vit = got.state["params"]["vit"]
    assert got.family == "augreg" and got.cfg.model.vit.heads == 4 and got.cfg.model.img_size == 32
    block, attention = "Transformer/encoderblock_1/", "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/"
    for ours, theirs in (
        (vit["blocks"]["attn"]["k"]["kernel"][1], attention + "key/kernel"),
        (vit["blocks"]["attn"]["out"]["kernel"][1], attention + "out/kernel"),
        (vit["blocks"]["attn"]["q"]["bias"][1], attention + "query/bias"),
        (vit["blocks"]["mlp"]["fc1"]["kernel"][1], block + "MlpBlock_3/Dense_0/kernel"),
        (vit["blocks"]["ln2"]["scale"][1], block + "LayerNorm_2/scale"),
        (vit["blocks"]["ln1"]["bias"][1], block + "LayerNorm_0/bias"),
        (vit["patch_embed"]["kernel"], "embedding/kernel"),
        (vit["ln_post"]["scale"], "Transformer/encoder_norm/scale"),
        (vit["pos_embed"][None], "Transformer/posembed_input/pos_embedding"),
        (vit["cls"][None, None], "cls"),
    ):
        np.testing.assert_array_equal(ours, arrays[theirs], err_msg=theirs)
    shapes = jax.eval_shape(lambda: initial.init_params(got.cfg, build(got.cfg), jax.random.key(0)))["vit"]
    assert {p: x.shape for p, x in trees.paths(vit)} == {p: x.shape for p, x in trees.paths(shapes)}


@pytest.mark.parametrize("prefix, old_norms, head", [("bert.", True, True), ("bert.", False, True), ("", False, False)])
def test_bert(prefix, old_norms, head, tmp_path, vocab):
    arrays, plain = official.bert(prefix=prefix, old_norms=old_norms, head=head), official.bert(head=head)
    got = read.read(store(tmp_path, "bert", arrays), vocab=vocab, heads=dict(med=4))
    med = got.state["params"]["med"]
    assert got.family == "bert" and got.cfg.model.med.vocab_size == 120 and ("lm_head" in med) == head
    layer = jax.tree.map(lambda x: x[1], med["blocks"])
    assert set(layer) == {"self_attn", "self_attn_dec", "mlp", "mlp_ln"}  # cross-attention stays random
    query = plain["bert.encoder.layer.1.attention.self.query.weight"].T.reshape(32, 4, 8)
    for name in ("self_attn", "self_attn_dec"):
        np.testing.assert_array_equal(layer[name]["q"]["kernel"], query)
        np.testing.assert_array_equal(
            layer[name]["ln"]["scale"], plain["bert.encoder.layer.1.attention.output.LayerNorm.weight"]
        )
    table = med["embed"]["word"]["embedding"]
    np.testing.assert_array_equal(table[:118], plain["bert.embeddings.word_embeddings.weight"])
    assert table.shape == (128, 32) and 0.01 < table[118:120].std() < 0.03 and not table[120:].any()
    if head:
        np.testing.assert_array_equal(med["lm_head"]["bias"][:118], plain["cls.predictions.bias"])
        assert not med["lm_head"]["bias"][118:].any()
    else:
        assert "the language-modelling head is not in the file" in got.notes


def test_a_folder_of_bert(tmp_path, vocab):
    folder = tmp_path / "bert-base-uncased"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    store(folder, "model", official.bert())
    (folder / "vocab.txt").write_text(open(vocab).read())
    assert read.read(folder, heads=dict(med=4)).vocab == folder / "vocab.txt"
    assert read.read(folder, heads=dict(med=4)).family == "bert"


# --- training from it -------------------------------------------------------------------------------------------------
TRAIN = official.TINY | dict(depth=1, F=192, layers=1, K=32)  # the model of tiny_cfg


def started(cfg, tmp_path):
    """The state that a run of `cfg` begins with, on the host."""
    run = loop.prepare(cfg, tmp_path / "run")
    with jax.set_mesh(run.mesh):
        return jax.device_get(start.create(run, start.load(run)).replace(rng=None))


def test_pretraining_starts_from_initial_weights_of_two_origins(tiny_cfg, tmp_path, converted, capsys):
    deit = official.tensors("deit", TRAIN, img_size=16)
    vit, med = converted("deit", deit), converted("bert", official.bert(TRAIN), vocab=tiny_cfg.text.vocab)
    tiny_cfg.train.init_from = f"{vit}, {med}"
    state = started(tiny_cfg, tmp_path)
    said = capsys.readouterr().out
    assert (
        "start random: " in said
        and "med/blocks/cross_attn/q/kernel" in said
        and "temp" in said
        and "vit/" not in said.split("start random: ")[1].split("\n")[0]
    )
    np.testing.assert_array_equal(state.params["vit"]["cls"], deit["cls_token"][0, 0])
    bert = official.bert(TRAIN)
    np.testing.assert_array_equal(
        state.params["med"]["embed"]["pos"]["embedding"],
        bert["bert.embeddings.position_embeddings.weight"] + bert["bert.embeddings.token_type_embeddings.weight"][0],
    )
    assert 0.01 < state.params["med"]["blocks"]["cross_attn"]["q"]["kernel"].std() < 0.03
    assert state.params["temp"] == np.float32(0.07)
    np.testing.assert_array_equal(state.extra["params"]["vit"]["cls"], state.params["vit"]["cls"])
    tiny_cfg.train.init_from = str(
        converted("caption", official.tensors("caption", TRAIN, img_size=16), vocab=tiny_cfg.text.vocab)
    )
    with pytest.raises(ValueError, match="temp is missing"):  # a model, not initial weights
        started(tiny_cfg, tmp_path)


@pytest.fixture
def pretrained(converted, tiny_cfg):
    """Tensors of a pre-training file of tiny_cfg's size, and the workdir they were converted into."""
    arrays = official.tensors("pretrain", TRAIN, img_size=16)
    arrays["queue_ptr"] = np.array([24])
    return arrays, converted("pretrain", arrays, vocab=tiny_cfg.text.vocab)


def test_pretraining_resumes_from_momentum_and_queue(tiny_cfg, tmp_path, pretrained, capsys):
    arrays, tiny_cfg.train.init_from = pretrained[0], str(pretrained[1])
    state = started(tiny_cfg, tmp_path)
    back = apply.to_torch("pretrain", {"params": state.params, "momentum": state.extra}, vocab_size=120)
    for name, x in back.items():
        if name != "queue_ptr":
            np.testing.assert_array_equal(x, arrays[name], err_msg=name)
    assert state.extra["queue"]["ptr"] == 16  # the beginning of the batch of 16 that 24 lies in
    assert not np.array_equal(arrays["vision_proj_m.weight"], arrays["vision_proj.weight"])
    said = capsys.readouterr().out
    assert (
        "the momentum encoder starts from its momentum encoder" in said
        and "the queues start from its 32 features" in said
    )
    with tiny_cfg.unlocked():
        tiny_cfg.loss.queue = 64
    fresh = started(tiny_cfg, tmp_path)
    assert "its queues are of 32 features, loss.queue is 64: they start anew" in capsys.readouterr().out
    assert fresh.extra["queue"]["img"].shape == (64, 16) and fresh.extra["queue"]["ptr"] == 0
    np.testing.assert_array_equal(fresh.extra["params"]["vision_proj"]["kernel"], arrays["vision_proj_m.weight"].T)


def test_retrieval_fine_tuning_takes_the_features_of_pretraining(tiny_cfg, tmp_path, pretrained, capsys):
    arrays, tiny_cfg.train.init_from = pretrained[0], str(pretrained[1])
    with tiny_cfg.unlocked():
        tiny_cfg.objective, tiny_cfg.model.img_size = "retrieval", 32
    state = started(tiny_cfg, tmp_path)
    queue = state.extra["queue"]
    np.testing.assert_array_equal(queue["img"], arrays["image_queue"].T)
    assert (queue["image_id"] == -100).all() and queue["ptr"] == 0
    resized = resize_pos_embed(arrays["visual_encoder_m.pos_embed"][0], 17)
    np.testing.assert_array_equal(state.extra["params"]["vit"]["pos_embed"], resized)


def test_a_converted_workdir_is_no_run_to_resume(tiny_cfg, pretrained):
    with pytest.raises(
        ValueError, match="checkpoint 0 in .* holds another model or optimiser(?s:.*)use another workdir"
    ):
        loop.fit(tiny_cfg, pretrained[1])


def test_capfilt_takes_converted_models(tiny_cfg, converted):
    tensors = lambda family: official.tensors(family, TRAIN, img_size=16)
    cfg = config.capfilt()
    cfg.captioner = str(converted("caption", tensors("caption"), vocab=tiny_cfg.text.vocab))
    cfg.filter = str(converted("itm", tensors("itm"), vocab=tiny_cfg.text.vocab))
    with cfg.unlocked():
        cfg.data.sources.world = config.source("scenes", count=1)
    captioner, judge = models(cfg)
    assert (
        captioner.cfg.text.prompt == "a picture of "
        and captioner.cfg.text.max_len == 40
        and judge.cfg.text.max_len == 35
    )
    np.testing.assert_array_equal(judge.params["itm_head"]["bias"], tensors("itm")["itm_head.bias"])


def test_a_run_of_ours_is_written_as_the_originals_would(tiny_cfg, tmp_path):
    """State of training, with momentum and queue -> .pth -> the same arrays; counters get the originals' 64 bits."""
    pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[convert]'")
    model, workdir = build(tiny_cfg), tmp_path / "run"
    state = jax.jit(lambda key: train_state.create(tiny_cfg, model, optax.set_to_zero(), key))(jax.random.key(3))
    with checkpoint.open_dir(workdir, 1) as manager:
        checkpoint.save(manager, 5, state, {"step": 5}, json.loads(tiny_cfg.to_json()))
    (workdir / "vocab.txt").write_text(open(tiny_cfg.text.vocab).read())
    write.convert(workdir, tmp_path / "out.pth")
    got = torch_io.open_tensors(tmp_path / "out.pth")
    shapes = official.shapes("pretrain", TRAIN, img_size=16)
    assert {name: np.asarray(x).shape for name, x in got.items()} == shapes
    assert got["queue_ptr"].dtype == np.int64 and got["text_encoder.embeddings.position_ids"].tolist() == [
        list(range(40))
    ]
    again = read.read(tmp_path / "out.pth", vocab=tiny_cfg.text.vocab, **HEADS)
    want = jax.tree.map(np.asarray, {"params": state.params, "momentum": state.extra})
    mine, words = dict(trees.paths(again.state)), slice(120)  # without the padding of the stored vocabulary
    for path, x in trees.paths(want):
        rows = words if path.endswith("word/embedding") else ...
        np.testing.assert_array_equal(mine[path][rows], x[rows], err_msg=path)
