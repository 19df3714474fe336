"""blip-jax <command>: flags become a config, a config goes to one function. USAGE lists the commands.

A mistake is one line, `error: ...`, and exit status 2; BLIP_JAX_DEBUG=1 shows where it came from. Of the other
statuses, 0: done;
75: stopped before the end, by a signal or because another process is gone, the same command goes on; 1: the run
diverged.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import pathlib
import re
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from blip_jax.cli import infer
from blip_jax.parallel import compiler
from blip_jax.parallel.interrupt import Interrupt, Stopped

ROOT = pathlib.Path(__file__).resolve().parents[2]
AGAIN = 75  # EX_TEMPFAIL: stopped before the end; what a launcher restarts on
USAGE = """usage: blip-jax <command> [flags]

  train     --config=configs/x.py --workdir=DIR      train, or resume what DIR holds
  evaluate  --config=configs/x.py --workdir=DIR      what the task measures on data.eval, newest checkpoint
            [--checkpoint=FOLDER]                    ... or this one
  capfilt   --config=configs/x.py --out=DIR          caption and filter data.sources into DIR, or go on with it
            [--process=K --processes=N]              ... as one of N processes that share DIR
  capfilt refilter --run=DIR --threshold=0.7 --out=DIR2   another threshold for a finished run, without a model
  vocab     --captions=FILE ...                      train a WordPiece vocabulary from captions (repeat the flag)
            [--scenes=N] --size=N --out=vocab.txt    ... from N built-in scenes
  pack      'PATTERN' --out=DIR [--kind= --images=]  any source of data to ArrayRecord shards, or go on with them
  convert   IN OUT [--to=ours|official|hf]           checkpoints of PyTorch in and out: .pth, Hugging Face folders,
            [--verify --vocab=FILE --family=         initial weights
             --img_size= --vit_heads= --med_heads=]

  caption   PICTURES [--n= --method=nucleus --prompt= --seed=]   captions of pictures
  match     PICTURES --text=...                      texts against pictures
  answer    PICTURES --question=... [--answers=FILE] answers, free or the best of a list
  features  [PICTURES] [--text=...] --out=FILE.npz   states and embeddings
            all four: PICTURES are files, folders or patterns;
            --model=DIR, a workdir, a checkpoint, a Hugging Face folder or a name on the hub
            [--json --batch= --dtype= --vocab=]

  bench     train [--config=configs/x.py]            speed of the training step: images/s, MFU, memory
  bench     caption | filter | encode | input        speed of the other work; benchmarks/README.md
            all: [--out=FILE.json --trace=DIR]
  plan      --config=configs/x.py --topology=v5e:4x8 memory, collectives and best speed on a TPU slice that is not here
            [--slices=N --search --workload=evaluate --exact --out=FILE.json]
            of CapFilt: [--captioner=CONFIG --filter=CONFIG]
  demo      --workdir=DIR                            the paper in miniature on the built-in world, with a report

train, evaluate and capfilt run on several hosts, too: started on each of them alike (docs/many_hosts.md).
Exit status: 0 done, 75 stopped before the end and to be run again, 1 diverged, 2 a mistake that the last line names.
Any leaf of the config is a flag: --config.optim.lr=2e-4. blip_jax/config/leaves.py lists them with their units.
"""


def train(argv: list[str]) -> int:
    """blip-jax train."""
    cfg, values = _config_and_flags(argv)
    from blip_jax.parallel import processes
    from blip_jax.train import loop

    with processes.start():
        try:
            out = loop.fit(cfg, values.workdir)
        except loop.NonFiniteLoss as e:
            print(f"error: {e}", file=sys.stderr)
            return 1
    return AGAIN if out["stopped"] else 0


def evaluate(argv: list[str]) -> int:
    """blip-jax evaluate."""
    what = "workdir, checkpoint folder, .pth, Hugging Face folder or name; default: the newest of --workdir"
    cfg, values = _config_and_flags(argv, checkpoint=what)
    from blip_jax import tasks
    from blip_jax.console import say
    from blip_jax.parallel import processes
    from blip_jax.train import loop

    with processes.start(), Interrupt():
        result = loop.evaluate(cfg, values.workdir, values.checkpoint or "")
        say(tasks.of(cfg).table(result))
        say(f"written to {pathlib.Path(values.workdir) / 'evaluation.json'}")
    return 0


def capfilt(argv: list[str]) -> int:
    """blip-jax capfilt, and blip-jax capfilt refilter."""
    if argv[1:2] == ["refilter"]:
        return _refilter(["capfilt refilter", *argv[2:]])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "python file with get_config()", lock_config=True, flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string("out", None, "folder of the run: decision tables and shards", flag_values=values)
    flags.DEFINE_integer("process", None, "number of this process; default: JAX's", flag_values=values)
    flags.DEFINE_integer("processes", None, "how many processes share the work; default: JAX's", flag_values=values)
    _parse(values, argv, required=("config", "out"))
    if (values.process is None) != (values.processes is None):
        raise ValueError("give both --process and --processes, or neither")
    from blip_jax.capfilt.run import run
    from blip_jax.parallel import processes

    with processes.start() if values.process is None else contextlib.nullcontext():
        if stopped := run(values.config, values.out, values.process, values.processes).get("stopped", False):
            processes.stop()
    return AGAIN if stopped else 0


def _refilter(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("run", None, "folder of a finished `blip-jax capfilt` run", flag_values=values)
    flags.DEFINE_float("threshold", None, "matching probability from which a text is kept", flag_values=values)
    flags.DEFINE_string("out", None, "folder to write", flag_values=values)
    _parse(values, argv, required=("run", "threshold", "out"))
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
    _parse(values, argv, required=("out",))
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
    pathlib.Path(values.out).absolute().parent.mkdir(parents=True, exist_ok=True)
    train_vocab(captions, values.size, values.out)
    print(
        f"{values.out}: {values.size} entries from {len(captions)} captions; set text.vocab={values.out} and "
        f"model.med.vocab_size={Tokenizer(values.out).vocab_size}"
    )
    return 0


def pack(argv: list[str]) -> int:
    """blip-jax pack."""
    from blip_jax.cli.pack import pack

    return pack(argv, _parse, AGAIN)


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
    for name, text in (
        ("img_size", "pixels, resizes the position table"),
        ("vit_heads", "heads of the ViT; default: what config.json says, else width / 64"),
        ("med_heads", "heads of the MED; default: what config.json says, else width / 64"),
    ):
        flags.DEFINE_integer(name, 0, text, lower_bound=0, flag_values=values)
    flags.DEFINE_bool(
        "drop_token_types", False, "of BERT, drop its token-type row as the original BLIP does", flag_values=values
    )
    flags.DEFINE_bool("verify", False, "compare what was written, and run both models", flag_values=values)
    paths = _parse(values, argv, required=(), positional=2)
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
        vit_heads=values.vit_heads,
        med_heads=values.med_heads,
        drop_token_types=values.drop_token_types,
        verify=values.verify,
    )
    return 0


def demo(argv: list[str]) -> int:
    """blip-jax demo."""
    default = ROOT / "configs" / "scenes.py"
    if not any(re.match(r"--?config(=|$)", arg) for arg in argv):
        if not default.exists():
            raise ValueError(f"{default} is missing: run from a checkout of the project, or give --config")
        argv = [argv[0], f"--config={default}", *argv[1:]]
    cfg, values = _config_and_flags(argv)
    from blip_jax.demo import stages

    with Interrupt():
        return AGAIN if stages.run(cfg, values.workdir)["stopped"] else 0


def bench(argv: list[str]) -> int:
    """blip-jax bench."""
    from blip_jax.cli.bench import bench

    return bench(argv, _parse)


def plan(argv: list[str]) -> int:
    """blip-jax plan."""
    from blip_jax.cli.plan import plan

    return plan(argv, _parse)


COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "capfilt": capfilt,
    "vocab": vocab,
    "pack": pack,
    "convert": convert,
    "caption": infer.caption,
    "match": infer.match,
    "answer": infer.answer,
    "features": infer.features,
    "demo": demo,
    "bench": bench,
    "plan": plan,
}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    alone = argv is None  # the process ends with this command
    argv = sys.argv[1:] if alone else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    compiler.set_stack()
    try:
        if wrong := [arg for arg in argv if any("\udc80" <= c <= "\udcff" for c in arg)]:  # bytes that are no UTF-8
            raise ValueError(f"{wrong[0]!r} is no text in UTF-8: rename the file or folder")
        if argv[0] not in COMMANDS:
            raise ValueError(f"unknown command {argv[0]!r}: choose one of {', '.join(COMMANDS)}")
        return COMMANDS[argv[0]](argv)
    except Stopped:
        print("stopped by a signal; run the same command again", file=sys.stderr)
        return AGAIN
    except (ValueError, OSError, flags.Error) as e:
        if os.environ.get("BLIP_JAX_DEBUG"):
            raise
        print(f"error: {e}", file=sys.stderr)
        if alone:  # threads of libraries that failed, too, have nothing to say behind this line
            sys.stdout.flush()
            os._exit(2)
        return 2


def _config_and_flags(argv: list[str], **extra: str) -> tuple[ConfigDict, flags.FlagValues]:
    """The locked config of --config with its overrides, and --workdir with the `extra` flags (name -> help)."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "python file with get_config()", lock_config=True, flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, logs", flag_values=values)
    for name, text in extra.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    _parse(values, argv, required=("config", "workdir"))
    return values.config, values


def _parse(values: flags.FlagValues, argv: list[str], required: tuple[str, ...], positional: int = 0) -> list[str]:
    """Sets the flags; returns the arguments that are none, at most `positional`."""
    try:
        rest = values(argv)
    except (AttributeError, KeyError) as e:  # an override, or the config file itself, names a leaf that does not exist
        raise ValueError(_unknown_leaf(argv) or f"{_config_path(argv)}: {e.args[0]}") from e
    # of a ValueError in a config file, such as an unknown argument, with the whole traceback
    except flags.IllegalFlagValueError as e:
        *_, last = str(e).strip().splitlines()
        if "parsing config file" not in str(e) or not last.startswith("ValueError: "):
            raise
        raise ValueError(last.removeprefix("ValueError: ")) from e
    if len(rest) > 1 + positional:
        raise ValueError(
            f"unexpected argument {rest[1 + positional]!r}: flags are --name=value; `blip-jax --help` lists them"
        )
    missing = [f"--{name}" for name in required if getattr(values, name) is None]
    if missing:
        raise ValueError(f"blip-jax {argv[0]} needs {' and '.join(missing)}; `blip-jax --help` shows how")
    return rest[1:]


def _config_path(argv: list[str]) -> str:
    for i, arg in enumerate(argv):
        if match := re.match(r"--?config(?:=(.*))?$", arg):
            return match[1] if match[1] is not None else "".join(argv[i + 1 : i + 2])
    return ""


def _unknown_leaf(argv: list[str]) -> str | None:
    """What is wrong with the first --config.a.b that the config file does not have; None if all exist."""
    plain = flags.FlagValues()
    only = [argv[0], f"--config={_config_path(argv)}"]
    config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=plain, sys_argv=only)
    try:
        plain(only)
    except (AttributeError, KeyError):
        return None
    for arg in argv:
        match = re.match(r"--?(?:no)?config\.([^=]+)", arg)
        node, done = plain.config, []
        for name in match[1].split(".") if match else ():
            if not isinstance(node, ConfigDict) or name not in node:
                have = sorted(node) if isinstance(node, ConfigDict) else []
                close = [".".join([*done, c]) for c in difflib.get_close_matches(name, have, 3, 0.5)]
                hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(have) or 'no leaves'}"
                return f"{arg}: {'.'.join(done) or 'the config'} has no key {name!r}; {hint}"
            node, done = node[name], [*done, name]
    return None
