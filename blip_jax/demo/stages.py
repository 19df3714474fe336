"""`blip-jax demo`: the paper in miniature on the built-in world, from nothing to an HTML report.

Paper sections 3.3, 4.2, 4.3.

Pre-train on human and noisy web captions; fine-tune captioner and filter on the human ones; CapFilt, by nucleus
sampling and by beam search; pre-train anew, with as many steps, on the corpora of the paper's tables 1 and 2; evaluate;
report. Every stage has a folder of its own in the workdir and is the same call that the commands `train` and `capfilt`
make; a demo run again goes on where it was.
"""

from __future__ import annotations

import json
import pathlib

from ml_collections import ConfigDict

from blip_jax import buckets, config, lock
from blip_jax.capfilt.refilter import refilter
from blip_jax.capfilt.run import run as capfilt
from blip_jax.config import source
from blip_jax.console import say
from blip_jax.data.scenes.world import vocab_captions
from blip_jax.data.text.wordpiece import EXTRA, train_vocab
from blip_jax.demo import clock
from blip_jax.demo import results as findings
from blip_jax.demo.clock import Stage, stop_if
from blip_jax.parallel import compiler
from blip_jax.train import loop

VOCAB_SCENES = 20_000  # captions that the vocabulary is trained on
PROMPT = "a picture of "
FINE_TUNING = {"captioner": 0.8, "filter": 0.7}  # steps, as shares of the pre-training's
CORPORA = {  # pre-training -> (texts of the web: all, kept or none, synthetic texts: of which run, all or kept)
    "neither": ("all", None),
    "filter": ("kept", None),
    "captioner": ("all", ("capfilt-unfiltered", "all")),
    "both": ("kept", ("capfilt", "kept")),
    "both-beam": ("kept", ("capfilt-beam", "kept")),
}
QUICK = ("neither", "both")  # the pre-trainings of `--quick`


def run(cfg, workdir, quick: bool = False) -> dict:
    """Runs or goes on with all stages in `workdir`.

    cfg: the pre-training (configs/scenes.py), on the sources human and web; quick: only the pre-trainings of QUICK, and
    what they need.

    Returns {"stopped": bool, "results": what the report shows}. Writes results.json and report.html beside the stages.
    """
    workdir = buckets.local(workdir, "--workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    compiler.keep_in(workdir / "compiled")  # the pre-trainings are one program
    corpora = QUICK if quick else tuple(CORPORA)
    with lock.held(workdir):
        if quick:
            pictures, left_out = cfg.data.train.web.count, ", ".join(_left_out(corpora))
            say(f"quick: {cfg.train.steps} steps, {pictures} pictures of the web; left out: {left_out}")
        _vocabulary(cfg, workdir)
        return _run(cfg, workdir, corpora)


def _run(cfg, workdir: pathlib.Path, corpora: tuple[str, ...]) -> dict:
    def collect() -> dict:
        return findings.collect(cfg, workdir, corpora, list(FINE_TUNING), _left_out(corpora))

    results = clock.through(stages(cfg, workdir, corpora), collect, workdir)
    if results is None:
        return {"stopped": True}
    findings.publish(results, findings.table(results), workdir)
    return {"stopped": False, "results": results}


def _left_out(corpora: tuple[str, ...]) -> list[str]:
    return [name for name in CORPORA if name not in corpora]


def stages(cfg, workdir: pathlib.Path, corpora: tuple[str, ...]) -> list[Stage]:
    """All that the pre-trainings on `corpora` need but the report, in order.

    Each reads what those before it left in `workdir`.
    """
    steps, pictures = cfg.train.steps / 1050, cfg.data.train.web.count / 8000

    def pretrain(name: str, title: str) -> Stage:
        return Stage(title, 86 * steps, lambda: _fit(pretraining(cfg, workdir, name), workdir / f"pretrain-{name}"))

    def tune(name: str) -> Stage:
        cost = {"captioner": 44, "filter": 50}[name] * steps
        return Stage(f"fine-tune the {name}", cost, lambda: _fit(fine_tuning(cfg, workdir, name), workdir / name))

    def bootstrap(folder: str, kind: str) -> Stage:
        cost = {"nucleus": 30, "beam": 75}[kind] * pictures
        run = lambda: stop_if(capfilt(capfilt_config(cfg, workdir, kind), workdir / folder))
        return Stage(f"CapFilt, {kind}", cost, run)

    unfiltered = lambda: stop_if(refilter(workdir / "capfilt", 0.0, workdir / "capfilt-unfiltered"))
    first, *others = corpora
    needed = {CORPORA[name][1][0] for name in others if CORPORA[name][1]}
    extra = {
        "capfilt-beam": bootstrap("capfilt-beam", "beam"),
        "capfilt-unfiltered": Stage("CapFilt without the filter", 8 * pictures, unfiltered),
    }
    return [
        pretrain(first, "pre-train on the web as it is"),
        *(tune(name) for name in FINE_TUNING),
        bootstrap("capfilt", "nucleus"),
        *(stage for folder, stage in extra.items() if folder in needed),
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
    stop_if(loop.fit(cfg, workdir))


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
