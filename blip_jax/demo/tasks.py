"""`blip-jax demo tasks`: four tasks in miniature on a world that knows the truth, from nothing to an HTML report.

BLIP paper, section 5: captions, questions (VQA), pairs of pictures (NLVR2), dialogs. The world is written out as the
files that COCO, VQA, NLVR2 and Visual Dialog publish, and from there all is as with those: a BLIP is pre-trained on the
captions, fine-tuned for each task, and evaluated on unseen pictures by the official scorers. Every stage has a folder
of its own in the workdir and is the call that the commands `train` and `evaluate` make; a demo run again goes on where
it was.
"""

from __future__ import annotations

import pathlib
import shutil
from typing import NamedTuple

from ml_collections import ConfigDict

from blip_jax import buckets, lock
from blip_jax.console import say
from blip_jax.data.scenes import official
from blip_jax.data.scenes.official import Sizes
from blip_jax.data.text.wordpiece import EXTRA, train_vocab
from blip_jax.demo import clock
from blip_jax.demo import tasks_results as findings
from blip_jax.demo.clock import Stage, stop_if
from blip_jax.demo.results import publish
from blip_jax.parallel import compiler
from blip_jax.tasks import dialog, vqa
from blip_jax.train import evaluation, loop

SIZES = {  # split -> how much of it
    "train": Sizes(pictures=6000, captions=5, questions=4, sentences=4000, dialogs=3000),
    "val": Sizes(pictures=50, captions=5, questions=1, sentences=25, dialogs=4),  # says which checkpoint is the best
    "test": Sizes(pictures=500, captions=5, questions=4, sentences=150, dialogs=40),
}
VOCAB = Sizes(pictures=1000, captions=5, questions=4, sentences=300, dialogs=0)  # that the vocabulary is trained on
PROMPT = "a picture of "


class Run(NamedTuple):
    """A training of the demo."""

    title: str
    share: float  # its steps, of cfg.train.steps
    batch: float  # its batch, of cfg.train.batch
    rate: float  # its learning rate, of cfg.optim.lr
    length: int  # text.max_len, that nothing is cut
    cost: float  # about its seconds on 2 idle cores
    start: str = "pretrain"  # the run whose parameters a fine-tuning starts from


RUNS = {  # folder, of a fine-tuning also the objective -> its training
    "pretrain": Run("pre-training", 1.0, 1.0, 1.0, 18, 210.0),
    "vqa": Run("questions", 1.2, 1.0, 1.0, 12, 145.0),
    # The paper's starts from pre-training. From there this one ends lower: docs/results.md
    "nlvr": Run("pairs of pictures", 2.0, 1.0, 1.0, 15, 230.0, start="vqa"),
    "caption": Run("captions", 0.2, 1.0, 1.0, 21, 40.0),
    "dialog": Run("dialogs", 0.5, 0.25, 1.0, 72, 110.0),
}
EVALUATED = 20.0  # seconds of an evaluation


def run(cfg, workdir) -> dict:
    """Runs or goes on with all stages in `workdir`.

    cfg: the pre-training (configs/scenes_tasks.py); its own sources and vocabulary give way to those of `workdir`.

    Returns {"stopped": bool, "results": what the report shows}. Writes results.json and report.html beside the stages.
    """
    workdir = buckets.local(workdir, "--workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    compiler.keep_in(workdir / "compiled")  # a run that goes on compiles nothing anew
    with lock.held(workdir):
        results = clock.through(stages(cfg, workdir), lambda: findings.collect(cfg, workdir), workdir)
        if results is None:
            return {"stopped": True}
        publish(results, findings.table(results), workdir)
        return {"stopped": False, "results": results}


def stages(cfg, workdir: pathlib.Path) -> list[Stage]:
    """All of them but the report, in order. Each reads what those before it left in `workdir`."""
    steps = cfg.train.steps / 700

    def train(name: str) -> Stage:
        fit = lambda: stop_if(loop.fit(config_of(cfg, workdir, name), workdir / name))
        title = RUNS[name].title
        return Stage(title if name == "pretrain" else f"fine-tune: {title}", RUNS[name].cost * steps, fit)

    def evaluate(name: str) -> Stage:
        return Stage(f"evaluate: {RUNS[name].title}", EVALUATED, lambda: _evaluate(cfg, workdir, name))

    first, *tuned = RUNS
    files = Stage("files of the world", 40.0, lambda: _files(cfg, workdir))
    return [files, train(first), *(stage for name in tuned for stage in (train(name), evaluate(name)))]


def config_of(cfg, workdir: pathlib.Path, name: str) -> ConfigDict:
    """The config of the run in folder `name` of RUNS."""
    c, run = ConfigDict(cfg).copy_and_resolve_references().unlock(), RUNS[name]
    c.text.vocab = str(workdir / "data" / "vocab.txt")
    c.train.steps, c.train.batch = max(1, round(run.share * c.train.steps)), max(1, round(run.batch * c.train.batch))
    c.optim.lr *= run.rate
    c.text.max_len = run.length
    c.data.train, c.data.eval = (ConfigDict(findings.sources(workdir, name, split)) for split in ("train", "val"))
    if name == "pretrain":
        c.data.eval = ConfigDict()
        return c.lock()
    c.objective, c.train.init_from = name, str(workdir / run.start)
    if name == "caption":
        c.text.prompt, c.eval.max_length = PROMPT, run.length
    elif name == "vqa":
        c.task = vqa.leaves()
        c.task.answers, c.task.answer_len = 3, 4
        c.data.eval = ConfigDict()  # as in the paper the last checkpoint is used
    elif name == "dialog":
        c.task = dialog.leaves()
        c.task.caption_len = RUNS["pretrain"].length
        c.eval.batch, c.eval.rerank_texts = 5, 100
    if name in findings.BEST:
        c.train.keep_best = True
        c.train.save_every = c.train.eval_every = -(-c.train.steps // 2)
    return c.lock()


def _files(cfg, workdir: pathlib.Path) -> None:
    """Writes the files of all splits and a vocabulary, whole or not at all."""
    folder, beside = workdir / "data", workdir / "data.tmp"
    if folder.exists():
        return
    shutil.rmtree(beside, ignore_errors=True)
    size = cfg.model.img_size
    for split, sizes in SIZES.items():
        say(f"{split}: {sizes.pictures} pictures with captions and questions, and more of pairs and dialogs")
        official.write(beside, split, sizes, findings.seed_of(cfg, split), size)
    texts = official.texts(VOCAB, findings.seed_of(cfg, "train"), size)
    train_vocab(texts, cfg.model.med.vocab_size - len(EXTRA), beside / "vocab.txt")
    beside.replace(folder)


def _evaluate(cfg, workdir: pathlib.Path, name: str) -> None:
    """The task's scores of the test split in `workdir`/NAME-test, once."""
    out = workdir / f"{name}-test"
    if (out / "evaluation.json").exists():
        return
    c = config_of(cfg, workdir, name).unlock()
    c.data.eval = ConfigDict(findings.sources(workdir, name, "test"))
    best = "best" if name in findings.BEST else ""
    evaluation.evaluate(c.lock(), out, str(workdir / name / best))
