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
from blip_jax.tasks import captioned, dialog, nlvr, two_stage, video_qa, vqa

SIZE, T = 16, 12
TRIPS = 6  # of a token loop
GENERATED = "vqa, generated"  # a task with another of its settings
PICTURE = {"img": np.zeros((SIZE, SIZE, 3), np.uint8)}
TEXT = {"ids": np.zeros(T, np.int32), "txt_mask": np.zeros(T, bool)}
QUESTION = {"question": TEXT["ids"], "question_mask": TEXT["txt_mask"]}


def sized(task: str, llm: str = ""):
    """A tiny config of a task, of BLIP-2 where it is one of its; vocabularies have no padding."""
    blip, generated = not task.startswith("blip2"), task == GENERATED
    task = "vqa" if generated else task
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
    if task in ("vqa", "video_qa"):
        c.task.update(beams=2, max_length=TRIPS + 2, k=4)  # [DEC], the first token
    if generated:
        c.task.method = "generate"
    if task.startswith("video"):
        c.task.frames = 3
    if task == "dialog":
        c.task.caption_len = 9
        c.model.vit.update(width=c.model.med.width, heads=c.model.med.heads)
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


class Rows:
    """What a task's `eval_data` gives, 20 of one row."""

    def __init__(self, record: dict, row: dict):
        self.record, self.row = record, row

    def __len__(self):
        return 20

    def batches(self, size):
        yield [self.record] * size, {name: np.stack([x] * size) for name, x in self.row.items()}


class Videos:
    """What `video_qa.eval_data` gives: 20 videos with a question each."""

    n_images, captions, text_image = 20, ["what is it"] * 20, np.arange(20)
    records = [{"question_id": i, "answer": "x"} for i in range(20)]

    def image_batches(self, size):
        yield {"index": np.arange(size), "img": np.zeros((size, 3, SIZE, SIZE, 3), np.uint8)}


def told(cfg) -> Rows | Videos | None:
    """Of a task whose data are of other kinds than captions, in the place of its `eval_data`."""
    asked = np.empty((), object)
    asked[()] = [dialog.Asked(1, dialog.Texts([1] * (T - 3), [[1, 2], [3, 2]]), [0, 1])]
    caption = {"caption_ids": np.zeros(9, np.int32), "caption_mask": np.zeros(9, bool)}
    rounds = [{"truth": None, "relevance": None}]
    rows = {
        "blip2_vqa": ({"question_id": 1}, PICTURE | TEXT | QUESTION),
        "vqa": ({"question_id": 1}, PICTURE | TEXT),
        "nlvr": ({}, {side: PICTURE["img"] for side in nlvr.SIDES} | TEXT),
        "dialog": ({"image_id": "1", "rounds": rounds}, PICTURE | caption | {"asked": asked}),
    }
    if cfg.objective == "video_qa":
        return Videos()
    return Rows(*rows[cfg.objective]) if cfg.objective in rows else None


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

    compiled = ((module, "compiled") for module in (dialog, nlvr, two_stage, video_qa))
    for module, kept in ((captioned, "writer"), (vqa, "jitted"), *compiled):
        monkeypatch.setattr(module, kept, getattr(module, kept).__wrapped__)
    task, tokenizer = tasks.of(cfg), Words()
    loaded = Loaded(tasks.build(cfg), parameters(cfg, mesh), cfg, tokenizer, "")
    data = told(cfg) or task.eval_data(cfg, tokenizer, skipped)
    with monkeypatch.context() as patched:
        patched.setattr(jax, "jit", traced)
        list(task.samples(loaded, data, mesh)) if hasattr(task, "samples") else task.evaluate(loaded, data, mesh)
    return list(ran.values())


def bare(args):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)


@pytest.mark.parametrize(
    "task, llm, names",
    [
        ("caption", "", {"captions": TRIPS}),
        ("vqa", "", {"answers": 0}),
        (GENERATED, "", {"answers": TRIPS}),
        ("nlvr", "", {"labels": 0}),
        ("dialog", "", {"encode images": 0, "match": 0}),
        ("video_qa", "", {"encode videos": 0, "answers": TRIPS}),
        ("blip2_stage1", "", {"encode images": 0, "encode texts": 0, "re-rank": 0}),
        ("blip2_stage2", "opt_tiny", {"captions": TRIPS}),
        ("blip2_stage2", "flant5_tiny", {"captions": TRIPS}),
        ("blip2_vqa", "opt_tiny", {"answers": TRIPS}),
    ],
)
def test_what_is_planned_is_what_an_evaluation_runs(task, llm, names, tmp_path, monkeypatch):
    cfg, mesh = sized(task, llm), sharding.mesh_of((2, 2, 1), jax.devices()[:4])
    if task in ("vqa", "video_qa"):  # as long as plans count a list, and one answer as long
        (tmp_path / "answers.json").write_text(json.dumps(["a"] * (vqa.LISTED - 1) + ["a " * (vqa.LONGEST - 1)]))
        leaves = ["answer_list"] if task == "vqa" else [*video_qa.LISTS.values()]
        cfg.task.update({leaf: str(tmp_path / "answers.json") for leaf in leaves})
    with stack.looped():
        planned, ran = programs.evaluate(cfg, mesh), run(cfg, mesh, tmp_path / "skipped.jsonl", monkeypatch)
        assert {p.name: p.trips for p in planned} == names and len(ran) == len(planned)
        for program, (counted, args) in zip(planned, ran):
            assert bare(program.args) == args
            own = flops.count_function(program.function, *program.args, trips=program.trips or None)
            assert own == counted == pytest.approx(program.flops, rel=1e-3), program.name


@pytest.mark.parametrize("task", ["dialog", "video_qa"])
def test_what_stays_on_the_devices_is_planned_as_it_lies_there(task):
    """Keys and values of pictures, from one program to the next, on a mesh whose every axis splits them."""
    cfg, mesh = sized(task), sharding.mesh_of((2, 2, 2), jax.devices())
    first, second = programs.evaluate(cfg, mesh)
    with jax.set_mesh(mesh):
        found = jax.jit(first.function, **first.jit).lower(*first.args).compile()
    given = jax.tree.leaves(second.args[1])
    for x, place in zip(given, jax.tree.leaves(found.output_shardings), strict=True):
        assert place.is_equivalent_to(x.sharding, x.ndim), (x, place)
    (L, B, P, N, H), part = given[0].shape, given[0].sharding.shard_shape(given[0].shape)
    assert part == (L, B // 4, P, N // 2, H) and B == second.images


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
        "from blip_jax.config import blip2, source\n\n"
        "def get_config():\n    c = blip2('eva_tiny', 'tiny', 'opt_tiny')\n    c.objective = 'language'\n"
        "    c.train.batch, c.train.steps = 16, 10\n"
        "    with c.data.unlocked():\n        c.data.train.x = source('json', 'x.json')\n    return c\n"
    )
    assert main.main(["plan", f"--config={tmp_path / 'c.py'}", "--topology=v5e:2x2", "--workload=evaluate"]) == 2
    err = capsys.readouterr().err
    assert "objective language does not say what its evaluation runs" in err and err.count("\n") == 1
