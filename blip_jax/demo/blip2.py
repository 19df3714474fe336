"""`blip-jax demo blip2`: BLIP-2 in miniature on the built-in world, with the paper's two ablations.

BLIP-2 paper, sections 3 and 4: figure 5 and table 6.

A BLIP is pre-trained and its image tower kept; a language model is trained on captions that have no pictures. Both are
frozen from then on. The Q-Former starts from the BLIP's text model, as the paper's from BERT. It learns from the tower
in a first stage, with image-grounded text generation and without; in a second stage the language model captions from
what the Q-Former finds, once from the first stage and once, for as many steps, from a Q-Former that had none. Every
stage has a folder of its own in the workdir and is the call that the commands `train` and `convert` make; a demo run
again goes on where it was.
"""

from __future__ import annotations

import pathlib

from ml_collections import ConfigDict

from blip_jax import buckets, config, lock
from blip_jax.config import source
from blip_jax.console import say
from blip_jax.convert import write
from blip_jax.data.scenes.world import vocab_captions
from blip_jax.data.text.bpe import train_bpe
from blip_jax.data.text.wordpiece import train_vocab
from blip_jax.demo import blip2_results as findings
from blip_jax.demo import clock
from blip_jax.demo.clock import Stage, stop_if
from blip_jax.demo.results import publish
from blip_jax.parallel import compiler
from blip_jax.tasks import blip2_stage1
from blip_jax.train import loop

VOCAB_SCENES = 20_000  # captions that both vocabularies are trained on
# the language model learns from so many texts of captions of one scene each, of a world with a seed so much larger
TEXTS, CAPTIONS, APART = 20_000, 4, 1000
# of all that comes before the second stage, whose own is cfg.optim.lr: as fast as this it learns as much from nothing
FIRST_LR = 1e-3
CUT = {"tower": "deit", "words": "bert"}  # folder -> the part of the BLIP, as a family of checkpoints
RUNS = {  # folder -> (what its run is called, steps as a share of cfg.train.steps, about its seconds on 2 idle cores)
    "blip": ("BLIP, for its image tower", 10.0, 260.0),  # after 4.0 its tower shows colours, but no shapes yet
    "language": ("language model, on captions alone", 6.0, 95.0),
    "stage1": ("first stage", 2.0, 90.0),
    "stage1-without-itg": ("first stage without ITG", 2.0, 70.0),
    "stage2": ("second stage", 1.0, 22.0),
    "stage2-alone": ("second stage without the first", 1.0, 18.0),
}


def run(cfg, workdir) -> dict:
    """Runs or goes on with all stages in `workdir`.

    cfg: the second stage (configs/scenes_blip2.py) on the source world.

    Returns {"stopped": bool, "results": what the report shows}. Writes results.json and report.html beside the stages.
    """
    workdir = buckets.local(workdir, "--workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    compiler.keep_in(workdir / "compiled")  # two runs of a stage are one program
    with lock.held(workdir):
        _vocabularies(cfg, workdir)
        results = clock.through(stages(cfg, workdir), lambda: findings.collect(cfg, workdir), workdir)
        if results is None:
            return {"stopped": True}
        publish(results, findings.table(results), workdir)
        return {"stopped": False, "results": results}


def stages(cfg, workdir: pathlib.Path) -> list[Stage]:
    """All of them but the report, in order. Each reads what those before it left in `workdir`."""

    def train(name: str) -> Stage:
        title, _, cost = RUNS[name]
        fit = lambda: stop_if(loop.fit(config_of(cfg, workdir, name), workdir / name))
        return Stage(title, cost * cfg.train.steps / 300, fit)

    parts = Stage("image tower and words of it", 2.0, lambda: _cut(workdir))
    captions = Stage("captions of unseen pictures", 40.0, lambda: findings.caption(cfg, workdir))
    first, *others = (train(name) for name in RUNS)
    return [first, parts, *others, captions]


def config_of(cfg, workdir: pathlib.Path, name: str) -> ConfigDict:
    """The config of the run in folder `name` of RUNS."""
    c = ConfigDict(cfg).copy_and_resolve_references().unlock()
    c.train.steps = max(1, round(RUNS[name][1] * cfg.train.steps))
    at = {part: str(workdir / part) for part in (*CUT, "language", "stage1")}
    begun = f"{at['tower']},{at['words']}"
    if not name.startswith("stage2"):
        c.optim.lr = FIRST_LR
    if name == "blip":
        return _blip(c, workdir)
    if name == "language":
        c.objective, c.optim.freeze = "language", ()
        world = cfg.data.train.world
        c.data.train = ConfigDict()
        c.data.train.texts = source(
            "scenes", count=TEXTS, captions=CAPTIONS, seed=world.seed + APART, size=world.size, easy=world.easy
        )
        c.text.max_len = cfg.model.llm.positions
    elif name.startswith("stage1"):
        c.objective, c.task = "blip2_stage1", blip2_stage1.leaves()
        c.task.itg = name == "stage1"
        c.task.eval_len = _text_of_qformer(c, workdir)
        c.optim.freeze, c.model.llm = ("vit/.*",), ConfigDict()
        c.data.eval = findings.unseen(cfg)
        c.train.init_from = begun
    else:
        c.train.init_from = f"{at['stage1'] if name == 'stage2' else begun},{at['language']}"
    return c.lock()


def _blip(c: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
    """Pre-training of a BLIP with the tower of `c`, a copy of the second stage, and texts of the Q-Former's sizes."""
    tower, texts = c.model.vit.to_dict(), c.model.qformer.to_dict()
    shared = {name: c.model[name] for name in ("img_size", "embed_dim", "init_std", "dropout", "dtype")}
    del tower["kind"], texts["queries"]
    texts["vocab_size"] += 1  # [ENC]
    c.objective, c.model, c.optim.freeze = "pretrain", config.base("tiny").model.unlock(), ()
    c.model.update(vit=tower, med=texts, **shared)
    _text_of_qformer(c, workdir)
    return c.lock()


def _text_of_qformer(c: ConfigDict, workdir: pathlib.Path) -> int:
    """Sets the text of a model that reads WordPiece; its length."""
    c.text.vocab, c.text.max_len = str(workdir / "vocab.txt"), 20
    return c.text.max_len


def _cut(workdir: pathlib.Path) -> None:
    for name, family in CUT.items():
        if not (workdir / name).exists():
            write.convert(workdir / "blip", workdir / name, family=family)


def _vocabularies(cfg, workdir: pathlib.Path) -> None:
    """Makes the two vocabularies, BLIP's and the Q-Former's, and the language model's, which text.vocab may name."""
    words, bytes_ = workdir / "vocab.txt", workdir / "bpe"
    if not words.exists():
        say(f"making two vocabularies from the captions of {VOCAB_SCENES} scenes: some seconds")
        train_vocab(vocab_captions(VOCAB_SCENES), cfg.model.qformer.vocab_size - 1, words.with_suffix(".tmp"))
        words.with_suffix(".tmp").replace(words)
    if cfg.text.vocab:
        return
    cfg.text.vocab = str(bytes_ / "vocab.json")
    if not (bytes_ / "vocab.json").exists():
        beside = workdir / "bpe.tmp"
        beside.mkdir(exist_ok=True)
        train_bpe(vocab_captions(VOCAB_SCENES), cfg.model.llm.vocab_size, beside / "vocab.json")
        beside.replace(bytes_)
