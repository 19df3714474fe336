"""blip-jax <command>: flags become a config, a config goes to one function. usage.py lists the commands.

A mistake is one line, `error: ...`, and exit status 2; BLIP_JAX_DEBUG=1 shows where it came from. Of the other
statuses, 0: done; 75: stopped before the end, by a signal or because another process is gone, the same command goes on;
1: not done as asked, a run diverged, say.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import sys

from absl import flags
from ml_collections import ConfigDict

from blip_jax import __version__, buckets
from blip_jax.cli import configs, infer, usage
from blip_jax.cli.parse import parse
from blip_jax.parallel import compiler
from blip_jax.parallel.interrupt import Interrupt, Stopped

# parts of models -> what they are called, of those that have attention heads
HEADED = {"vit": "image encoder", "med": "MED", "qformer": "Q-Former", "llm": "language model"}
AGAIN = 75  # EX_TEMPFAIL: stopped before the end; what a launcher restarts on


def train(argv: list[str]) -> int:
    """blip-jax train."""
    steps = "FIRST:LAST, steps of which a profile is left in the workdir's profile/"
    port = "port at which XProf and TensorBoard may ask this process for a profile while it runs"
    cfg, values = config_of_run(argv, profile=steps, profiler_port=port)
    from blip_jax.console import say
    from blip_jax.parallel import processes
    from blip_jax.train import loop, profile, saving

    wanted = profile.parse(values.profile) if values.profile is not None else None
    server = profile.port(values.profiler_port) if values.profiler_port is not None else None
    with processes.start(), profile.served(server):
        say(compiler.keep())
        try:
            out = loop.fit(cfg, values.workdir, wanted)
        except saving.NonFiniteLoss as e:
            print(f"error: {e}", file=sys.stderr)
            return 1
    return AGAIN if out["stopped"] else 0


def evaluate(argv: list[str]) -> int:
    """blip-jax evaluate."""
    what = "workdir, checkpoint folder, .pth, Hugging Face folder or name; default: the newest of --workdir"
    cfg, values = config_of_run(argv, checkpoint=what)
    configs.use_own_vocabulary(cfg, values.workdir)
    from blip_jax import tasks
    from blip_jax.console import say
    from blip_jax.parallel import processes
    from blip_jax.train import evaluation

    with processes.start(), Interrupt():
        say(compiler.keep())
        result = evaluation.evaluate(cfg, values.workdir, values.checkpoint or "")
        say(tasks.of(cfg).table(result))
        say(f"written to {buckets.of(values.workdir) / 'evaluation.json'}")
    return 0


def capfilt(argv: list[str]) -> int:
    """blip-jax capfilt, and blip-jax capfilt refilter."""
    if argv[1:2] == ["refilter"]:
        return _refilter(["capfilt refilter", *argv[2:]])
    values = flags.FlagValues()
    argv = configs.take(values, argv, "config", "FILE.py or FILE.py:ARGUMENT")
    flags.DEFINE_string("out", None, "folder of the run: decision tables and shards", flag_values=values)
    flags.DEFINE_integer("process", None, "number of this process; default: JAX's", flag_values=values)
    flags.DEFINE_integer("processes", None, "how many processes share the work; default: JAX's", flag_values=values)
    parse(values, argv, required=("config", "out"))
    if (values.process is None) != (values.processes is None):
        raise ValueError("give both --process and --processes, or neither")
    from blip_jax.capfilt.run import run
    from blip_jax.console import say
    from blip_jax.parallel import processes

    with processes.start() if values.process is None else contextlib.nullcontext():
        say(compiler.keep())
        if stopped := run(values.config, values.out, values.process, values.processes).get("stopped", False):
            processes.stop()
    return AGAIN if stopped else 0


def _refilter(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("run", None, "folder of a finished `blip-jax capfilt` run", flag_values=values)
    flags.DEFINE_float("threshold", None, "matching probability from which a text is kept", flag_values=values)
    flags.DEFINE_string("out", None, "folder to write", flag_values=values)
    parse(values, argv, required=("run", "threshold", "out"))
    from blip_jax.capfilt.refilter import refilter

    return AGAIN if refilter(values.run, values.threshold, values.out).get("stopped") else 0


def vocab(argv: list[str]) -> int:
    """blip-jax vocab."""
    values = flags.FlagValues()
    text = (
        "file or pattern, repeatable: a caption a line, or what a source reads (JSON, CSV, Parquet, tar, ArrayRecord)"
    )
    flags.DEFINE_multi_string("captions", [], text, flag_values=values)
    flags.DEFINE_string("caption_key", "caption", "field of the captions in these", flag_values=values)
    flags.DEFINE_integer("scenes", 0, "captions of this many built-in scenes", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("size", 30522, "entries of the vocabulary", lower_bound=1, flag_values=values)
    flags.DEFINE_string("out", None, "file to write", flag_values=values)
    parse(values, argv, required=("out",))
    out = buckets.of(values.out, "--out")
    from blip_jax.data import captions as texts
    from blip_jax.data.scenes.world import vocab_captions
    from blip_jax.data.text.wordpiece import Tokenizer, train_vocab

    if not values.captions and not values.scenes:
        raise ValueError(
            "give captions: --captions=FILE (text, JSON, CSV, Parquet or tar; may be repeated) or --scenes=N"
        )
    captions, left_out = texts.read(values.captions, values.caption_key)
    captions += list(vocab_captions(values.scenes)) if values.scenes else []
    if left_out:
        reasons = ", ".join(f"{reason} ({n})" for reason, n in left_out.items())
        print(f"left out of what --captions names: {reasons}", file=sys.stderr)
    with buckets.whole(out) as file:
        train_vocab(captions, values.size, file)
        tokenizer, words = Tokenizer(file), file.read_text(encoding="utf-8").splitlines()
    idle = sum(word.startswith("[unused") for word in words)
    spare = f", {idle} of them [unused] (--size={values.size - idle} holds as much)" if idle else ""
    print(
        f"{values.out}: {values.size} entries from {len(captions)} captions{spare}; set text.vocab={values.out} and "
        f"model.med.vocab_size={tokenizer.vocab_size}"
    )
    return 0


def pack(argv: list[str]) -> int:
    """blip-jax pack."""
    from blip_jax.cli.pack import pack

    return pack(argv, parse, AGAIN)


def convert(argv: list[str]) -> int:
    """blip-jax convert."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "to", "", "ours | official | hf; default: official where OUT ends in .pth, else ours", flag_values=values
    )
    flags.DEFINE_string("vocab", "", "vocab.txt or tokenizer.json; default: what comes with IN", flag_values=values)
    flags.DEFINE_string(
        "family", "", "what IN must hold, or the part of it to take; default: what it holds", flag_values=values
    )
    flags.DEFINE_integer("img_size", 0, "pixels, resizes the position table", lower_bound=0, flag_values=values)
    for name, what in HEADED.items():
        text = f"heads of the {what}; default: what config.json says, else as in the released models"
        flags.DEFINE_integer(f"{name}_heads", 0, text, lower_bound=0, flag_values=values)
    flags.DEFINE_bool(
        "drop_token_types", False, "of BERT, drop its token-type row as the original BLIP does", flag_values=values
    )
    flags.DEFINE_bool("verify", False, "compare what was written, and run both models", flag_values=values)
    paths = parse(values, argv, required=(), positional=2)
    if len(paths) < 2:
        raise ValueError(
            "blip-jax convert needs IN and OUT: blip-jax convert model_base.pth runs/pretrained --vocab=vocab.txt"
        )
    from blip_jax.convert import write

    write.convert(
        *paths,
        to=values.to,
        vocab=values.vocab,
        family=values.family,
        img_size=values.img_size,
        heads={name: n for name in HEADED if (n := values[f"{name}_heads"].value)},
        drop_token_types=values.drop_token_types,
        verify=values.verify,
    )
    return 0


def app(argv: list[str]) -> int:
    """blip-jax app."""
    from blip_jax.cli.app import app

    return app(argv)


def push(argv: list[str]) -> int:
    """blip-jax push."""
    values = flags.FlagValues()
    flags.DEFINE_string("family", "", "the part to take, as in convert; default: all of it", flag_values=values)
    flags.DEFINE_bool("private", False, "a repository that is made is seen by its owner alone", flag_values=values)
    flags.DEFINE_string("license", "", "as the hub calls it, apache-2.0; default: none is stated", flag_values=values)
    flags.DEFINE_string("card", "", "README.md to send; default: the folder's, or one that is made", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "say what would be sent, and send nothing", flag_values=values)
    given = parse(values, argv, required=(), positional=2)
    if len(given) < 2:
        raise ValueError("blip-jax push needs MODEL and NAME: blip-jax push runs/captioner me/blip-birds --private")
    from blip_jax.convert.push import push

    push(
        *given,
        family=values.family,
        private=values.private,
        licence=values.license,
        card=values.card,
        dry_run=values.dry_run,
    )
    return 0


DEMOS = {"": "scenes.py", "blip2": "scenes_blip2.py", "tasks": "scenes_tasks.py"}  # which demo -> its config
QUICK = "--quick"  # of the first


def demo(argv: list[str]) -> int:
    """blip-jax demo, blip-jax demo blip2 and blip-jax demo tasks."""
    which = argv[1] if argv[1:] and argv[1] in DEMOS else ""
    argv = [argv[0], *argv[1 + bool(which) :]]
    quick = not which and QUICK in argv
    argv = [arg for arg in argv if not quick or arg != QUICK]
    if not configs.given(argv):
        argv = [argv[0], f"--config={configs.CONFIGS / DEMOS[which]}{':quick' * quick}", *argv[1:]]
    cfg, values = config_of_run(argv)
    from blip_jax.demo import blip2, stages, tasks

    run = {"blip2": blip2.run, "tasks": tasks.run}.get(which) or functools.partial(stages.run, quick=quick)
    with Interrupt():
        return AGAIN if run(cfg, values.workdir)["stopped"] else 0


def bench(argv: list[str]) -> int:
    """blip-jax bench."""
    from blip_jax.cli.bench import bench

    return bench(argv)


def report(argv: list[str]) -> int:
    """blip-jax report."""
    from blip_jax.cli.report import report

    return report(argv)


def score(argv: list[str]) -> int:
    """blip-jax score."""
    from blip_jax.cli.score import score

    return score(argv)


def plan(argv: list[str]) -> int:
    """blip-jax plan."""
    from blip_jax.cli.plan import plan

    return plan(argv)


COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "capfilt": capfilt,
    "vocab": vocab,
    "pack": pack,
    "convert": convert,
    "push": push,
    "caption": infer.caption,
    "match": infer.match,
    "localize": infer.localize,
    "answer": infer.answer,
    "features": infer.features,
    "app": app,
    "demo": demo,
    "report": report,
    "score": score,
    "bench": bench,
    "plan": plan,
}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    alone = argv is None  # the process ends with this command
    argv = sys.argv[1:] if alone else argv
    if argv and argv[0] == "help":  # `help train` is `train --help`
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in usage.ASKS:
        print(usage.OVERVIEW)
        return 0 if argv else 2
    if argv[0] in ("-V", "--version", "version"):
        from blip_jax.console import revision

        print(f"blip-jax {__version__}, revision {revision()}")
        return 0
    compiler.set_stack()
    try:
        if wrong := [arg for arg in argv if any("\udc80" <= c <= "\udcff" for c in arg)]:  # bytes that are no UTF-8
            raise ValueError(f"{wrong[0]!r} is no text in UTF-8: rename the file or folder")
        if argv[0] not in COMMANDS:
            raise ValueError(_unknown(argv[0]))
        return COMMANDS[argv[0]](argv)
    except usage.Shown:
        return 0
    except Stopped:
        print("stopped by a signal; run the same command again", file=sys.stderr)
        return AGAIN
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130  # as a shell has it for SIGINT
    except (ValueError, OSError, flags.Error) as e:
        if os.environ.get("BLIP_JAX_DEBUG"):
            raise
        print(f"error: {e}", file=sys.stderr)
        if alone:  # threads of libraries that failed, too, have nothing to say behind this line
            sys.stdout.flush()
            os._exit(2)
        return 2


def _unknown(word: str) -> str:
    close = difflib.get_close_matches(word.lstrip("-").lower(), COMMANDS, 2, 0.6)
    if word.startswith("-") and not close:
        return f"{word} comes before a command: blip-jax COMMAND {word}; the commands are {', '.join(COMMANDS)}"
    hint = f"did you mean {' or '.join(close)}? The commands are" if close else "the commands are"
    return f"unknown command {word!r}: {hint} {', '.join(COMMANDS)}"


def config_of_run(argv: list[str], **extra: str) -> tuple[ConfigDict, flags.FlagValues]:
    """The locked config of --config with its overrides, and --workdir with the `extra` flags (name -> help).

    Without --config, the settings that a run left in --workdir.
    """
    values = flags.FlagValues()
    default = "configs/scenes.py" if argv[0] == "demo" else "config.json of --workdir"
    rest = configs.take(values, argv, "config", f"FILE.py or FILE.py:ARGUMENT; default: {default}", workdir=True)
    flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, logs", flag_values=values)
    for name, text in extra.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    parse(values, rest, required=("config", "workdir"))
    return values.config, values
