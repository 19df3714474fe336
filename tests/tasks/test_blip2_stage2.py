"""BLIP-2's second stage as a task: its examples, what it costs, meshes, and runs with OPT and with T5."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from world import language
from world.language import tiny
from world.runs import leaves, rows

from blip_jax import config, from_pretrained, tasks, trees
from blip_jax.data.formats import open_source
from blip_jax.data.text import tokenizers
from blip_jax.eval import java
from blip_jax.models import flops, initial
from blip_jax.models.layers.dense import rounded_once
from blip_jax.parallel import sharding
from blip_jax.tasks import blip2_stage2 as task
from blip_jax.tasks import step
from blip_jax.train import evaluation, loop


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """kind -> file of a vocabulary that fits the tiny language model."""
    return language.vocabularies(tmp_path_factory.mktemp("llm"))


def record(caption):
    return {"key": "k", "source": "s", "image": b"", "image_id": "1", "captions": [caption]}


def test_opt_learns_the_caption_and_its_end_but_not_prompt_and_padding(vocabularies):
    cfg = tiny("opt", **{"text.prompt": "a photo of", "text.max_len": 40})
    tokenizer = tokenizers.of(cfg.model, vocabularies["opt"])
    row = task.example(record("a red circle."), np.random.default_rng(0), cfg, tokenizer)
    learned = row["ids"][row["lm_mask"]]
    assert tokenizer.decode(learned) == "a red circle" and learned[-1] == tokenizer.newline
    assert row["ids"][0] == tokenizer.bos and tokenizer.decode(row["ids"]) == "a photo of a red circle"
    assert not row["lm_mask"][row["txt_mask"].sum() :].any()

    cfg.text.prompt = "사진"  # of more tokens than letters
    row = task.example(record("a red circle"), np.random.default_rng(0), cfg, tokenizer)
    assert tokenizer.decode(row["ids"][row["lm_mask"]]) == "a red circle"

    cfg.text.prompt = ""
    row = task.example(record("a red circle"), np.random.default_rng(0), cfg, tokenizer)
    assert (row["lm_mask"] == row["txt_mask"]).all() and row["lm_mask"][0]  # the first id is learned too

    cfg.text.max_len = 3  # cut, a caption has no end
    row = task.example(record("a red circle"), np.random.default_rng(0), cfg, tokenizer)
    assert row["lm_mask"].all() and tokenizer.newline not in row["ids"]


def test_t5_reads_a_caption_up_to_its_middle_and_writes_the_rest(vocabularies):
    cfg = tiny("flant5", **{"text.max_len": 60})
    tokenizer, caption, cuts = tokenizers.of(cfg.model, vocabularies["flant5"]), "a red circle and a square", []
    for seed in range(60):
        row = task.example(record(caption), np.random.default_rng(seed), cfg, tokenizer)
        read, write = (tokenizer.decode(row[name]) for name in ("ids", "out_ids"))
        assert f"{read} {write}" == caption
        assert row["out_ids"][row["out_mask"]][-1] == row["ids"][row["txt_mask"]][-1] == tokenizer.eos
        cuts.append(len(read.split()))
    assert set(cuts) == {1, 2, 3}, "each place from the first word to the middle, and no other"
    row = task.example(record("circle"), np.random.default_rng(0), cfg, tokenizer)
    assert row["txt_mask"].sum() == 1 and tokenizer.decode(row["out_ids"]) == "circle"
    cfg.text.prompt = "a photo of"
    row = task.example(record(caption), np.random.default_rng(0), cfg, tokenizer)
    assert (tokenizer.decode(row["ids"]), tokenizer.decode(row["out_ids"])) == ("a photo of", caption)


def batch_of(cfg, seed=0):
    rng, out = np.random.default_rng(seed), {}
    for name, (shape, dtype) in task.shapes(cfg).items():
        if name.endswith("mask"):
            out[name] = np.arange(shape[1]) < rng.integers(3, shape[1] + 1, shape[0])[:, None]
        elif name == "img":
            out[name] = rng.normal(size=shape).astype(np.float32)
        else:
            out[name] = rng.integers(5, 100, shape).astype(dtype)
    return jax.tree.map(jnp.asarray, out)


@functools.cache
def world(llm):
    cfg = tiny(llm)
    model = task.build(cfg)
    params = jax.jit(lambda: initial.init_params(cfg, model, jax.random.key(0)))()
    return cfg, model, initial.magnified(params, 4)


def loss_of(cfg, model):
    def loss(trained, frozen, batch):
        keys = step.Keys(jax.random.key(1), jax.random.key(2), 0)
        used = rounded_once(trees.merge(trained, frozen), model.dtype)
        return task.loss(model, cfg, used, None, batch, keys)[0]

    return loss


@pytest.mark.parametrize("llm", ["opt", "flant5"])
def test_a_mesh_and_making_layers_again_change_nothing_and_no_gradient_is_of_frozen_parts(llm):
    cfg, model, params = world(llm)
    again = task.build(tiny(llm, **{"model.remat": "full"}))
    trained, frozen = trees.split(params, cfg.optim.freeze)
    batch = batch_of(cfg)
    grads = jax.jit(jax.value_and_grad(loss_of(cfg, model)))
    want, want_grads = grads(trained, frozen, batch)
    assert {path.split("/")[0] for path, _ in trees.paths(trained)} == {
        "ln_vision",
        "query_tokens",
        "qformer",
        "llm_proj",
    }
    cfg.mesh.update(data=2, fsdp=2, tensor=2)
    mesh = sharding.make_mesh(cfg.mesh)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, sharding.shardings_for(x, mesh)) for x in (trained, frozen)]
        grads = jax.jit(jax.value_and_grad(loss_of(cfg, again)))
        found, found_grads = grads(*placed, jax.device_put(batch, sharding.batch_sharding(mesh)))
    np.testing.assert_allclose(found, want, rtol=1e-5)
    for (path, a), (_, b) in zip(trees.paths(want_grads), trees.paths(jax.device_get(found_grads))):
        if not path.endswith("/k/bias"):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * max(np.abs(a).max(), 1e-3), err_msg=path)


@pytest.mark.parametrize("llm", ["opt", "flant5"])
def test_cost_of_a_step_is_as_counted(llm):
    cfg, model, params = world(llm)
    trained, frozen = trees.split(params, cfg.optim.freeze)
    counted = flops.count_function(jax.grad(loss_of(cfg, model)), trained, frozen, batch_of(cfg)) / cfg.train.batch
    # The trace holds the gradient of the head's matrix, which nobody asks for and the compiler drops; and it lacks
    # those of T5's decoder before it first looks at what was read: its self-attention and one projection.
    parts, m, T = task.flops(cfg), cfg.model.llm, cfg.text.max_len
    before = 2 * T * 5 * m.width * m.heads * m.head_dim + 8 * m.heads * m.head_dim * T * T if llm == "flant5" else 0
    assert counted == pytest.approx(parts["step"] + parts["lm_head"] - before, rel=0.001)


@pytest.mark.parametrize("llm", ["opt", "flant5"])
def test_a_run_on_scenes_resumes_bit_for_bit_and_its_checkpoints_hold_no_frozen_part(
    llm, vocabularies, tmp_path, monkeypatch
):
    """And evaluation writes the captions that the verb does."""
    cfg = language.on_scenes(tiny(llm, **{"text.vocab": str(vocabularies[llm])}))
    cfg.train.update(steps=2, log_every=1, save_every=1)
    out = loop.fit(cfg, tmp_path / "run")
    assert np.isfinite(out["log"]["loss"])
    saved = leaves(tmp_path / "run")
    assert "llm_proj/kernel" in saved and not [path for path in saved if path.startswith(("vit/", "llm/"))]

    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "2")
    assert loop.fit(cfg, tmp_path / "cut")["step"] == 2
    assert leaves(tmp_path / "cut") == saved and rows(tmp_path / "cut") == rows(tmp_path / "run")

    def gone():
        raise ValueError("no Java")

    monkeypatch.setattr(java, "find", gone)
    with cfg.data.unlocked():
        cfg.data.eval.world = config.source("scenes", count=3, size=32, seed=1)
    cfg.eval.update(beams=2, min_length=1, max_length=6)
    result = evaluation.evaluate(cfg, tmp_path / "eval", tmp_path / "run")
    pictures = [record["image"] for record in open_source("world", cfg.data.eval.world)]
    told = from_pretrained(tmp_path / "run").caption(pictures, beams=2, min_length=1, max_length=6)
    assert [row["caption"] for row in result["predictions"]] == [found["caption"] for [found] in told]


def test_settings_that_do_not_fit(vocabularies):
    tokenizer = tokenizers.of(tiny("opt").model, vocabularies["opt"])
    for more, expected in (
        ({"text.buckets": (8, 12), "loss.smoothing_over": "valid"}, "text.buckets"),
        ({"loss.group_size": 5}, "loss.group_size"),
        ({"text.prompt": "a photograph of one of the many things"}, "text.prompt"),
    ):
        assert any(expected in line for line in task.check(tiny("opt", **more), tokenizer)), expected
    with pytest.raises(ValueError, match=r"config\.blip2\(llm"):
        cfg = config.blip2("eva_tiny", "tiny").unlock()
        cfg.objective, cfg.task = "blip2_stage2", {}
        tasks.validate(cfg)
    with pytest.raises(ValueError, match="T5"):
        tokenizers.of(tiny("flant5").model, vocabularies["opt"])
