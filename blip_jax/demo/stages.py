"""`blip-jax demo`: the paper in miniature on the built-in world, from nothing to an HTML report.

Paper sections 3.3, 4.2, 4.3.

Pre-train on human and noisy web captions; fine-tune captioner and filter on the human ones; CapFilt, by nucleus
sampling and by beam search; pre-train anew, with as many steps, on the corpora of the paper's tables 1 and 2; evaluate;
report. Every stage has a folder of its own in the workdir and is the same call that the commands `train` and `capfilt`
make; a demo run again goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from blip_jax import config, lock
from blip_jax.capfilt.refilter import refilter
from blip_jax.capfilt.run import run as capfilt
from blip_jax.config import source
from blip_jax.console import say
from blip_jax.data.scenes.world import vocab_captions
from blip_jax.data.text.wordpiece import EXTRA, train_vocab
from blip_jax.demo import results as findings
from blip_jax.train import loop

VOCAB_SCENES = 20_000  # captions that the vocabulary is trained on
PROMPT = "a picture of "
FINE_TUNING = {"captioner": 0.5, "filter": 0.6}  # steps, as shares of the pre-training's
CORPORA = {  # pre-training -> (texts of the web: all, kept or none, synthetic texts: of which run, all or kept)
    "neither": ("all", None),
    "filter": ("kept", None),
    "captioner": ("all", ("capfilt-unfiltered", "all")),
    "both": ("kept", ("capfilt", "kept")),
    "both-beam": ("kept", ("capfilt-beam", "kept")),
}


class Stopped(Exception):
    """A signal ended a stage; what it had done is saved."""


def run(cfg, workdir) -> dict:
    """Runs or goes on with all stages in `workdir`.

    cfg: the pre-training (configs/scenes.py), on the sources human and web.

    Returns {"stopped": bool, "results": what the report shows}. Writes results.json and report.html beside the stages.
    """
    workdir = pathlib.Path(workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    if not jax.config.jax_compilation_cache_dir:  # the pre-trainings are one program
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    with lock.held(workdir):
        _vocabulary(cfg, workdir)
        return _run(cfg, workdir)


def _run(cfg, workdir: pathlib.Path) -> dict:
    found = stages(cfg, workdir)
    report = Stage("report", 30.0, lambda: None)
    clock = Clock(workdir / "stages.json", [*found, report])
    try:
        for stage in found:
            with clock.running(stage):
                stage.run()
    except Stopped:
        say(f"stopped: the same command goes on with this stage, {workdir} has what is done")
        return {"stopped": True}
    with clock.running(report):
        results = findings.collect(cfg, workdir, list(CORPORA), list(FINE_TUNING))
    results["phases"] = list(clock.seconds().items())
    findings.publish(results, workdir)
    return {"stopped": False, "results": results}


class Stage(NamedTuple):
    """A part of the demo that is begun, and gone on with, as a whole."""

    name: str
    cost: float  # about how many seconds it takes on 2 idle CPU cores
    run: Callable[[], None]


def stages(cfg, workdir: pathlib.Path) -> list[Stage]:
    """All of them but the report, in order. Each reads what those before it left in `workdir`."""
    steps, pictures = cfg.train.steps / 3000, cfg.data.train.web.count / 8000

    def pretrain(name: str, title: str) -> Stage:
        return Stage(title, 120 * steps, lambda: _fit(pretraining(cfg, workdir, name), workdir / f"pretrain-{name}"))

    def tune(name: str) -> Stage:
        cost = {"captioner": 30, "filter": 50}[name] * steps
        return Stage(f"fine-tune the {name}", cost, lambda: _fit(fine_tuning(cfg, workdir, name), workdir / name))

    def bootstrap(folder: str, kind: str) -> Stage:
        cost = {"nucleus": 40, "beam": 60}[kind] * pictures
        run = lambda: _stop_if(capfilt(capfilt_config(cfg, workdir, kind), workdir / folder))
        return Stage(f"CapFilt, {kind}", cost, run)

    unfiltered = lambda: _stop_if(refilter(workdir / "capfilt", 0.0, workdir / "capfilt-unfiltered"))
    first, *others = CORPORA
    return [
        pretrain(first, "pre-train on the web as it is"),
        *(tune(name) for name in FINE_TUNING),
        bootstrap("capfilt", "nucleus"),
        bootstrap("capfilt-beam", "beam"),
        Stage("CapFilt without the filter", 5 * pictures, unfiltered),
        *(pretrain(name, f"pre-train anew: {name}") for name in others),
    ]


def pretraining(cfg, workdir: pathlib.Path, name: str) -> ConfigDict:
    """The config of one pre-training: human captions and the corpus `name`.

    Both are balanced by their numbers of texts.
    """
    web, synthetic = CORPORA[name]
    c = _copy(cfg)
    if web == "kept":
        c.data.train.web = _kept(workdir / "capfilt", "web")
    if synthetic:
        c.data.train.synthetic = _kept(workdir / synthetic[0], "synthetic")
    return c.lock()


def fine_tuning(cfg, workdir: pathlib.Path, name: str) -> ConfigDict:
    """The config of the captioner or the filter: the human captions, starting from the first pre-training."""
    c = _copy(cfg)
    c.objective = {"captioner": "caption", "filter": "retrieval"}[name]
    del c.data.train["web"]
    c.data.eval = ConfigDict()
    if name == "captioner":
        c.text.prompt = PROMPT
        c.text.max_len += len(PROMPT.split())
    c.train.steps = max(1, round(FINE_TUNING[name] * cfg.train.steps))
    c.train.init_from = str(workdir / "pretrain-neither")
    return c.lock()


def capfilt_config(cfg, workdir: pathlib.Path, kind: str) -> ConfigDict:
    """The CapFilt run over the web source with captions by `kind`: nucleus or beam."""
    c = config.capfilt().unlock()
    c.captioner, c.filter = str(workdir / "captioner"), str(workdir / "filter")
    c.data.sources.web = cfg.data.train.web
    c.data.threads, c.seed = cfg.data.threads, cfg.seed
    c.device_batch, c.shard_examples = 100, 2000
    c.method.kind = kind
    c.method.repetition_penalty = 1.0  # the captions of this world repeat words: "a", "red", "on the left"
    c.method.max_length = cfg.text.max_len + len(PROMPT.split())
    c.text.prompt = PROMPT
    return c.lock()


def _kept(run: pathlib.Path, part: str) -> ConfigDict:
    """The source of what CapFilt run `run` kept; weighs as many as it has texts."""
    texts = json.loads((run / "summary.json").read_text(encoding="utf-8"))[part]["kept"]
    return source("array_record", str(run / "shards" / "*" / f"{part}.array_record"), weight=float(texts))


def _copy(cfg) -> ConfigDict:
    return ConfigDict(cfg).copy_and_resolve_references().unlock()


def _fit(cfg, workdir) -> None:
    _stop_if(loop.fit(cfg, workdir))


def _stop_if(out: dict) -> None:
    if out.get("stopped"):
        raise Stopped


def _vocabulary(cfg, workdir: pathlib.Path) -> None:
    if cfg.text.vocab:
        return
    cfg.text.vocab = str(workdir / "vocab.txt")
    if not pathlib.Path(cfg.text.vocab).exists():
        say(f"making a vocabulary from the captions of {VOCAB_SCENES} scenes: some seconds")
        beside = workdir / "vocab.txt.tmp"
        train_vocab(vocab_captions(VOCAB_SCENES), cfg.model.med.vocab_size - len(EXTRA), beside)
        beside.replace(cfg.text.vocab)
        say(f"vocabulary from the captions of {VOCAB_SCENES} scenes: {cfg.text.vocab}")


class Clock:
    """Which stage runs, what each has taken over all starts of a demo, and how long the rest may take.

    A stage that ran to its end is looked at again when the demo is run again, and its time is not added to.
    """

    def __init__(self, path: pathlib.Path, stages: list[Stage]):
        self.path, self.stages = path, stages
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._kept = {stage.name: kept.get(stage.name, {"seconds": 0.0, "done": False}) for stage in stages}

    def seconds(self) -> dict[str, float]:
        """Name of a stage -> seconds it took, of those that have begun."""
        return {name: kept["seconds"] for name, kept in self._kept.items() if kept["seconds"]}

    def left(self) -> tuple[float, bool]:
        """(seconds that the stages not done may take, whether that was learnt from stages that are done)"""
        done = [s for s in self.stages if self._kept[s.name]["done"]]
        known, expected = sum(self._kept[s.name]["seconds"] for s in done), sum(s.cost for s in done)
        rest = sum(s.cost for s in self.stages if s not in done)
        return (rest * known / expected, True) if known and expected else (rest, False)

    @contextlib.contextmanager
    def running(self, stage: Stage):
        """Says what begins; adds the time spent inside, unless it was done before."""
        kept, place = self._kept[stage.name], f"stage {self.stages.index(stage) + 1} of {len(self.stages)}"
        if kept["done"]:
            say(f"\n== {place}: {stage.name}; done before")
            yield
            return
        seconds, learnt = self.left()
        minutes = f"about {max(1, round(seconds / 60))} min left"
        say(f"\n== {place}: {stage.name}; {minutes}{'' if learnt else ', if 2 CPU cores are idle'}")
        begun, before = time.perf_counter(), kept["seconds"]
        try:
            yield
            kept["done"] = True
        finally:
            kept["seconds"] = round(before + time.perf_counter() - begun, 1)
            beside = self.path.with_name(self.path.name + ".tmp")
            beside.write_text(json.dumps(self._kept, indent=1) + "\n", encoding="utf-8")
            os.replace(beside, self.path)
