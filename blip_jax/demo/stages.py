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
    clock = Clock(workdir / "seconds.json")
    try:
        _stages(cfg, workdir, clock)
    except Stopped:
        return {"stopped": True}
    with clock.phase("report"):
        results = findings.collect(cfg, workdir, list(CORPORA), clock.seconds)
    findings.publish(results, workdir)
    return {"stopped": False, "results": results}


def _stages(cfg, workdir: pathlib.Path, clock: Clock) -> None:
    with clock.phase("pre-train on the web as it is"):
        _fit(pretraining(cfg, workdir, "neither"), workdir / "pretrain-neither")
    for name in FINE_TUNING:
        with clock.phase(f"fine-tune the {name}"):
            _fit(fine_tuning(cfg, workdir, name), workdir / name)
    for folder, kind in (("capfilt", "nucleus"), ("capfilt-beam", "beam")):
        with clock.phase(f"CapFilt, {kind}"):
            _stop_if(capfilt(capfilt_config(cfg, workdir, kind), workdir / folder))
    with clock.phase("CapFilt without the filter"):
        _stop_if(refilter(workdir / "capfilt", 0.0, workdir / "capfilt-unfiltered"))
    for name in list(CORPORA)[1:]:
        with clock.phase(f"pre-train anew: {name}"):
            _fit(pretraining(cfg, workdir, name), workdir / f"pretrain-{name}")


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
        beside = workdir / "vocab.txt.tmp"
        train_vocab(vocab_captions(VOCAB_SCENES), cfg.model.med.vocab_size - len(EXTRA), beside)
        beside.replace(cfg.text.vocab)
        say(f"vocabulary from the captions of {VOCAB_SCENES} scenes: {cfg.text.vocab}")


class Clock:
    """Seconds spent in each phase, over all starts of a demo."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @contextlib.contextmanager
    def phase(self, name: str):
        """Says what begins; adds the time spent inside."""
        say(f"\n== {name}")
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - begun, 1)
            beside = self.path.with_name(self.path.name + ".tmp")
            beside.write_text(json.dumps(self.seconds, indent=1) + "\n")
            os.replace(beside, self.path)
