"""Plans of evaluations: the programs, arrays and parameters of a plan are those that the evaluation runs."""

import json

import jax
import numpy as np
import pytest

from blip_jax import config, tasks, trees
from blip_jax.cli import main
from blip_jax.inference.batching import placed
from blip_jax.inference.load import Loaded
from blip_jax.models import flops, initial
from blip_jax.models.layers import stack
from blip_jax.parallel import sharding
from blip_jax.plan import aot, chips, plan, programs
from blip_jax.tasks import captioned, two_stage, vqa

SIZE, T = 16, 12
TRIPS = 6  # of a token loop


def sized(task: str, llm: str = ""):
    """A tiny config of a task, of BLIP-2 but for "caption"; vocabularies have no padding."""
    blip = task == "caption"
    c = (config.base("tiny") if blip else config.blip2("eva_tiny", "tiny", llm)).unlock()
    c.objective = task
    if hasattr(tasks.of(c), "leaves"):
        c.task = tasks.of(c).leaves()
    c.model.update(img_size=SIZE, embed_dim=16, dtype="float32")
    c.model["med" if blip else "qformer"].vocab_size = 128
    c.loss.queue = 0
    if llm:
        c.model.llm.vocab_size = 384
        c.text.prompt = (
            "Question: {} Answer:" if task == "blip2_vqa" else "nine words that make more than eight tokens here"
        )
    c.text.max_len, c.train.batch, c.train.steps, c.train.save_every = T, 16, 10, 10
    c.eval.update(k=3, batch=12, rerank_texts=2, beams=2, min_length=2, max_length=TRIPS + 1)
    if task == "caption":
        c.eval.max_length += 1  # [DEC], the prompt
    if task == "blip2_stage1":
        c.task.eval_len = T + 4
    if task == "blip2_vqa":
        c.task.update(beams=2, max_length=TRIPS + 1)
    with c.data.unlocked():
        c.data.train.world = c.data.eval.world = config.source("scenes", count=20, size=32)
    return c


class Words:
    """A word is a token, after one that begins a text."""

    bos, newline, eos, sep, pad, dec = 1, 2, 2, 2, 0, 127

    def lengths(self, texts, most):
        return np.array([1 + len(text.split()) for text in texts])

    def encode(self, texts, length, **how):
        mask = np.arange(length) < self.lengths(texts, length)[:, None]
        return mask.astype(np.int32), mask

    def decode(self, ids):
        return "a word"


class Questions:
    """Rows of `blip2_vqa.eval_data`."""

    def __len__(self):
        return 20

    def batches(self, size):
        words = {"ids": np.int32, "txt_mask": bool, "question": np.int32, "question_mask": bool}
        rows = {name: np.zeros((size, T), dtype) for name, dtype in words.items()}
        yield [{"question_id": i} for i in range(size)], {"img": np.zeros((size, SIZE, SIZE, 3), np.uint8)} | rows


def parameters(cfg, mesh) -> dict:
    """As `blip-jax evaluate` has them on the devices."""
    shapes = jax.eval_shape(lambda: initial.init_params(cfg, tasks.build(cfg), jax.random.key(0)))
    return placed(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), mesh, cfg.model.dtype)


def run(cfg, mesh, skipped, monkeypatch) -> list:
    """(FLOPs, what it is called with) of every program that an evaluation jits; nothing is computed."""
    ran = {}

    def traced(function):
        def call(*args):
            args = bare(args)
            jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*args)
            ran[str(args[1:])] = flops.count_jaxpr(jaxpr, trips=TRIPS), args
            return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), out)

        return call

    for module, kept in ((captioned, "writer"), (two_stage, "compiled"), (vqa, "jitted")):
        monkeypatch.setattr(module, kept, getattr(module, kept).__wrapped__)
    task, tokenizer = tasks.of(cfg), Words()
    loaded = Loaded(tasks.build(cfg), parameters(cfg, mesh), cfg, tokenizer, "")
    data = Questions() if cfg.objective == "blip2_vqa" else task.eval_data(cfg, tokenizer, skipped)
    with monkeypatch.context() as patched:
        patched.setattr(jax, "jit", traced)
        list(task.samples(loaded, data, mesh)) if hasattr(task, "samples") else task.evaluate(loaded, data, mesh)
    return list(ran.values())


def bare(args):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)


@pytest.mark.parametrize(
    "task, llm, names",
    [
        ("caption", "", ["captions"]),
        ("blip2_stage1", "", ["encode images", "encode texts", "re-rank"]),
        ("blip2_stage2", "opt_tiny", ["captions"]),
        ("blip2_stage2", "flant5_tiny", ["captions"]),
        ("blip2_vqa", "opt_tiny", ["answers"]),
    ],
)
def test_what_is_planned_is_what_an_evaluation_runs(task, llm, names, tmp_path, monkeypatch):
    cfg, mesh = sized(task, llm), sharding.mesh_of((2, 2, 1), jax.devices()[:4])
    with stack.looped():
        planned, ran = programs.evaluate(cfg, mesh), run(cfg, mesh, tmp_path / "skipped.jsonl", monkeypatch)
        assert [p.name for p in planned] == names and len(ran) == len(planned)
        for program, (counted, args) in zip(planned, ran):
            assert bare(program.args) == args
            own = flops.count_function(program.function, *program.args, trips=program.trips or None)
            assert own == counted == pytest.approx(program.flops, rel=1e-3), program.name
            assert program.trips == (0 if len(names) > 1 else TRIPS)


def test_parameters_are_planned_in_the_dtype_and_the_parts_that_an_evaluation_keeps():
    cfg = sized("blip2_stage2", "opt_tiny")
    cfg.model.dtype, cfg.mesh.data, cfg.mesh.fsdp = "bfloat16", 2, 2
    mesh = sharding.mesh_of((2, 2, 1), jax.devices()[:4])
    (made,) = programs.evaluate(cfg, mesh)
    kept = dict(trees.paths(parameters(cfg, mesh)))
    for path, x in trees.paths(made.parts["parameters"]):
        assert (x.shape, x.dtype, x.sharding) == (kept[path].shape, kept[path].dtype, kept[path].sharding), path
    assert kept["llm/blocks/mlp/fc1/kernel"].dtype == "bfloat16" and kept["query_tokens"].dtype == "float32"
    assert made.images == 8 and made.trips == TRIPS  # of eval.batch 12 the largest 4 * 2^i


def test_the_plan_of_captions_has_a_rate_and_that_of_retrieval_none(monkeypatch):
    monkeypatch.setattr(aot, "installed", lambda: False)
    found = {}
    for task, llm in (("blip2_stage2", "opt_tiny"), ("blip2_stage1", "")):
        cfg = sized(task, llm)
        found[task] = plan.make(plan.request(cfg, chips.topology("v5e:2x2"), "evaluate"))
        assert found[task]["fits"] is None and "days" not in found[task]
    (row,) = found["blip2_stage2"]["programs"]
    assert found["blip2_stage2"]["images_per_s"] == pytest.approx(8 / row["seconds"]["compute"])
    assert "images/s" in plan.table(found["blip2_stage2"]) and "images_per_s" not in found["blip2_stage1"]
    json.dumps(found)


def test_an_objective_that_does_not_say_what_it_evaluates_is_refused(tmp_path, capsys):
    (tmp_path / "c.py").write_text(
        "from blip_jax.config import base, source\nfrom blip_jax.tasks import nlvr\n\n"
        "def get_config():\n    c = base('tiny')\n    c.objective = 'nlvr'\n    c.loss.queue = 0\n"
        "    c.train.batch, c.train.steps = 16, 10\n"
        "    with c.data.unlocked():\n        c.data.train.x = source('nlvr', 'x.json', images='.')\n    return c\n"
    )
    assert main.main(["plan", f"--config={tmp_path / 'c.py'}", "--topology=v5e:2x2", "--workload=evaluate"]) == 2
    err = capsys.readouterr().err
    assert "objective nlvr does not say what its evaluation runs" in err and err.count("\n") == 1
