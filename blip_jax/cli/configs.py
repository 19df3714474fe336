"""--config on the command line: a Python file, what `get_config` of it gives, and any leaf as a flag.

Also the settings that a run left in its workdir. Whatever is wrong with a file is one line that names it.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import sys
import traceback

from absl import flags
from ml_collections import ConfigDict, config_flags

from blip_jax import buckets, config, trees
from blip_jax.cli import usage
from blip_jax.convert.saved import base_of

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# the paper's runs: beside the package in a checkout, within it where it is installed
CONFIGS = next((p for p in (PACKAGE / "configs", PACKAGE.parent / "configs") if p.is_dir()), PACKAGE / "configs")
SAVED = "config.json"  # the resolved config that a run writes into its workdir
ALIASES = {  # what other programs call it -> the leaf here, or how it is said
    **dict.fromkeys(("learning_rate", "lr", "base_lr", "init_lr", "peak_lr", "max_lr"), "optim.lr"),
    **dict.fromkeys(("lr_min", "end_lr", "final_lr"), "optim.min_lr"),
    **dict.fromkeys(("batch_size", "global_batch_size", "train_batch_size", "bs"), "train.batch"),
    **dict.fromkeys(("batch_size_per_device", "per_device_train_batch_size", "micro_batch_size"), "train.batch"),
    **dict.fromkeys(("epochs", "num_epochs", "max_epoch", "max_epochs", "num_train_epochs"), "train.steps"),
    **dict.fromkeys(("max_steps", "num_steps", "total_steps", "iterations", "iters", "num_iters"), "train.steps"),
    **dict.fromkeys(("num_workers", "workers", "dataloader_num_workers"), "data.threads"),
    **dict.fromkeys(
        ("warmup", "num_warmup_steps", "warmup_iters", "warmup_epochs", "warmup_ratio"), "optim.warmup_steps"
    ),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_schedule", "lr_scheduler_type", "sched"), "optim.schedule"),
    **dict.fromkeys(("wd", "decay"), "optim.weight_decay"),
    **dict.fromkeys(("beta1", "adam_beta1"), "optim.b1"),
    **dict.fromkeys(("beta2", "adam_beta2"), "optim.b2"),
    **dict.fromkeys(("adam_epsilon", "epsilon"), "optim.eps"),
    **dict.fromkeys(("grad_clip", "clip_grad", "clip_grad_norm", "max_grad_norm", "gradient_clip_val"), "optim.clip"),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "accum_steps", "grad_accum", "accum_freq", "accum_grad_iters"),
        "optim.accumulate",
    ),
    **dict.fromkeys(("image_size", "img_res", "image_res", "resolution"), "model.img_size"),
    **dict.fromkeys(("precision", "amp", "fp16", "bf16", "mixed_precision"), "model.dtype"),
    **dict.fromkeys(
        ("gradient_checkpointing", "grad_checkpointing", "use_grad_checkpoint", "vit_grad_ckpt"), "model.remat"
    ),
    **dict.fromkeys(("drop_path_rate",), "model.drop_path"),
    **dict.fromkeys(("max_text_length", "max_txt_len", "context_length"), "text.max_len"),
    **dict.fromkeys(("vocab_file", "tokenizer", "vocabulary"), "text.vocab"),
    **dict.fromkeys(("queue_size",), "loss.queue"),
    **dict.fromkeys(("momentum", "ema_decay"), "loss.ema"),
    **dict.fromkeys(("pretrained", "checkpoint", "init_checkpoint", "load_from", "finetune"), "train.init_from"),
    **dict.fromkeys(
        ("save_steps", "save_freq", "save_frequency", "save_interval", "checkpoint_every"), "train.save_every"
    ),
    **dict.fromkeys(("logging_steps", "log_freq", "log_interval", "print_freq"), "train.log_every"),
    **dict.fromkeys(("eval_steps", "eval_freq", "eval_interval", "evaluation_steps"), "train.eval_every"),
    **dict.fromkeys(("save_total_limit", "keep_checkpoints", "max_to_keep"), "train.keep"),
    **dict.fromkeys(("k_test", "top_k_rerank"), "eval.k"),
    **dict.fromkeys(("eval_batch_size", "batch_size_test", "per_device_eval_batch_size"), "eval.batch"),
}
OWN = ("data.train.", "data.eval.", "data.sources.")  # leaves of sources: no one of them can be meant
UNITS = {  # leaves that are counted otherwise than their other names suggest
    "train.steps": "a run's length is in steps; an epoch is the examples that the start-up log names, over train.batch",
    "optim.warmup_steps": "steps",
    "train.batch": "examples of all devices together",
    "loss.ema": "of the momentum encoder; AdamW's are optim.b1 and optim.b2",
}
FOLDERS = {"output_dir", "out_dir", "work_dir", "log_dir", "logdir", "save_dir", "output", "outdir", "save_path"}


def take(values: flags.FlagValues, argv: list[str], name: str, help: str, workdir: bool = False) -> list[str]:
    """Defines flag `name`, a config, with its leaves as flags, from what `argv` says; returns argv without the file.

    workdir: without the flag, the settings in --workdir are taken where a run left some.
    ValueError: the file, or a leaf that it does not have.
    """
    path, rest = _split(argv, name)
    if usage.asked(argv):
        path = None
    elif path is None and workdir:
        path = _left(argv)
    if path is None:
        flags.DEFINE_string(name, None, help, flag_values=values)
        return rest
    cfg = load(path)
    if not given(argv, name):
        print(f"no --config: the settings are those of {path}", file=sys.stderr)
    for arg in rest:
        if problem := unknown_leaf(cfg, name, arg):
            raise ValueError(problem)
    config_flags.DEFINE_config_dict(name, cfg, help, flag_values=values, sys_argv=rest)
    return rest


def given(argv: list[str], name: str = "config") -> bool:
    """Whether `argv` names a file for flag `name`."""
    return _split(argv, name)[0] is not None


def _split(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """(the last value of flag `name`, or None; the other arguments)"""
    path, rest, args = None, [], iter(argv)
    for arg in args:
        if match := re.fullmatch(rf"--?{name}(?:=(.*))?", arg, re.S):
            path = match[1] if match[1] is not None else next(args, "")
        else:
            rest.append(arg)
    return path, rest


def _left(argv: list[str]) -> str | None:
    """The config.json of --workdir; None without that flag. ValueError: there is none."""
    folder = _split(argv, "workdir")[0]
    if not folder:
        return None
    if buckets.is_bucket(folder) and (path := buckets.of(folder, "--workdir") / SAVED).exists():
        return str(path)
    path = buckets.local(folder, "--workdir") / SAVED if not buckets.is_bucket(folder) else path
    if path.is_file():
        return str(path)
    parent = path.parent.parent
    near = [p.name for p in parent.iterdir() if (p / SAVED).is_file()] if parent.is_dir() else []
    close = [str(parent / name) for name in difflib.get_close_matches(path.parent.name, near, 2, 0.6)]
    why = f"{folder} {f'holds no {SAVED}' if path.parent.is_dir() else 'is no folder'}"
    hint = f"; did you mean --workdir={' or '.join(close)}?" if close else ""
    raise ValueError(f"blip-jax {argv[0]} needs --config, or the --workdir of a run: {why}{hint}")


# --- files ------------------------------------------------------------------------------------------------------------
def load(path: str) -> ConfigDict:
    """The locked config of FILE.py, FILE.py:ARGUMENT, or the config.json of a run. ValueError: one line that names it.

    A file that raises is an error that names its line; with BLIP_JAX_DEBUG=1 the exception goes on as it is.
    """
    file, argument = _file_and_argument(path)
    if file.endswith(".json"):
        return of_run(buckets.of(file))
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config={path}: a Python file (.py) or a run's {SAVED} was expected")
    module = importlib.util.module_from_spec(spec)
    cached, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # no __pycache__ beside the user's file
    try:
        spec.loader.exec_module(module)
        cfg = _get(module, file, argument)
    except _Wrong as e:
        raise ValueError(str(e)) from None
    except (Exception, SystemExit) as e:
        if os.environ.get("BLIP_JAX_DEBUG"):
            raise
        raise ValueError(_said(e, file)) from e
    finally:
        sys.dont_write_bytecode = cached
    if not isinstance(cfg, ConfigDict):
        raise ValueError(
            f"{file}: get_config() returned {type(cfg).__name__}, expected a ConfigDict: begin it with "
            "blip_jax.config.base() and return that"
        )
    return cfg.lock()


class _Wrong(ValueError):
    """A message that needs no line of the file."""


def _get(module, file: str, argument: str | None):
    function = getattr(module, "get_config", None)
    if not callable(function):
        raise _Wrong(f"{file} has no function get_config(): it must return a config, as those in configs/ do")
    arguments = [] if argument is None else [argument]
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        wants = "no argument" if arguments else "an argument"
        how = f"--config={file}" if arguments else f"--config={file}:ARGUMENT; the top of the file says which there are"
        raise _Wrong(f"{file}: its get_config takes {wants}: give {how}") from None
    return function(*arguments)


def _file_and_argument(path: str) -> tuple[str, str | None]:
    """FILE and ARGUMENT of FILE:ARGUMENT, where FILE exists. ValueError: it does not, with what is near.

    configs/NAME.py is where the command runs, and if it is not there the package's own.
    """
    if buckets.is_bucket(path) and path.endswith(".json"):
        return path, None
    buckets.local(path, "--config")
    places = [i for i, letter in enumerate(path) if letter == ":"]
    for file, argument in ((path, None), *((path[:i], path[i + 1 :]) for i in places)):
        if os.path.isfile(file):
            return file, argument
    file, _, argument = path.partition(":")
    if pathlib.PurePath(file).parts[:-1] == ("configs",) and (CONFIGS / pathlib.PurePath(file).name).is_file():
        found = CONFIGS / pathlib.PurePath(file).name
        print(f"{file} is not here: the one of the package, {found}", file=sys.stderr)
        return str(found), argument if ":" in path else None
    if os.path.isdir(file):
        found = sorted(p.name for p in pathlib.Path(file).glob("*.py"))
        raise ValueError(
            f"--config={path} is a folder: give a file of it"
            + (f", as {os.path.join(file, found[0])}" if found else ", but it holds no .py file")
        )
    raise ValueError(f"--config={path}: no such file {_near(file)}")


def _near(file: str) -> str:
    """Where a file that does not exist may be."""
    folder, name = pathlib.Path(file).parent, pathlib.Path(file).name
    if folder.is_dir():
        here = [p.name for p in folder.glob("*.py")]
        if close := difflib.get_close_matches(name if name.endswith(".py") else f"{name}.py", here, 2, 0.6):
            return f"in {folder.absolute()}; did you mean {' or '.join(str(folder / c) for c in close)}?"
    there = CONFIGS / (name if name.endswith(".py") else f"{name}.py")
    if there.is_file():
        return f"in {os.getcwd()}; did you mean configs/{there.name}?"
    return f"in {os.getcwd()}" + ("" if folder.is_dir() else f", which has no folder {folder}")


def _said(e: BaseException, file: str) -> str:
    """An exception from a config file as one line that names file and line."""
    text = _short(e)
    if isinstance(e, SyntaxError) and e.filename:
        return f"{e.filename}, line {e.lineno}: {type(e).__name__}: {e.msg}"
    if isinstance(e, ValueError) and pathlib.Path(file).name in text:
        return text  # it was written for the reader and names the file
    frames = [f for f in traceback.extract_tb(e.__traceback__) if os.path.abspath(f.filename) == os.path.abspath(file)]
    line = f", line {frames[-1].lineno}" if frames else ""
    kind = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "
    return f"{file}{line}: {kind}{text}".rstrip(": ")


def of_run(path: pathlib.Path) -> ConfigDict:
    """The config that a training run left as `path`; leaves that it did not have yet have their defaults.

    Where its vocabulary is gone, the copy beside it takes its place. ValueError: it is no such config, or has leaves
    that there are no more.
    """
    try:
        saved = _tuples(json.loads(path.read_text(encoding="utf-8")))
        c = base_of(saved.get("model"))
        sources = {part: saved["data"].pop(part) for part in ("train", "eval")}
        task, have = saved.pop("task", {}), trees.flat(c.to_dict())
        if odd := [name for name in trees.flat(saved) if name not in have]:
            raise ValueError(f"unknown {', '.join(odd[:5])}")
        c.update(saved)
        with c.unlocked():
            c.task = ConfigDict(task)
            for part, found in sources.items():
                c.data[part] = ConfigDict({name: config.source(**leaves) for name, leaves in found.items()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ValueError(
            f"{path} is no config of a training run of this version ({type(e).__name__}: {_short(e)}): give "
            "--config=FILE.py"
        ) from e
    use_own_vocabulary(c, path.parent)
    return c


def use_own_vocabulary(cfg: ConfigDict, workdir) -> None:
    """Where the vocabulary that a config names is gone, the copy in the workdir takes its place, and it is said."""
    named = [cfg.text.vocab] if buckets.is_file(cfg.text.vocab) else cfg.text.vocab.split(",")
    for i, name in enumerate(("vocab", "questions")[: len(named)]):
        copies = [buckets.of(workdir) / f"{name}{suffix}" for suffix in (".txt", ".json", ".model")]
        if not buckets.is_file(named[i]) and (copy := next((str(p) for p in copies if p.is_file()), None)):
            print(f"text.vocab={named[i]!r} is not there: the copy {copy} is used", file=sys.stderr)
            named[i] = copy
    cfg.text.vocab = ",".join(named)


def _short(e: BaseException) -> str:
    """The text of an exception as one line that is not too long."""
    text = " ".join(str(e).split())
    return text if len(text) <= 400 else text[:400] + " ..."


def _tuples(x):
    """JSON with tuples for its lists, as configs have them."""
    if isinstance(x, dict):
        return {name: _tuples(value) for name, value in x.items()}
    return tuple(_tuples(value) for value in x) if isinstance(x, list) else x


# --- leaves -----------------------------------------------------------------------------------------------------------
def unknown_leaf(cfg: ConfigDict, flag: str, arg: str) -> str | None:
    """What is wrong with an argument --FLAG.a.b=value whose leaf the config does not have; None if there is nothing."""
    match = re.match(rf"--?(?:no)?{flag}\.([^=]+)", arg)
    node, done = cfg, []
    for name in match[1].split(".") if match else ():
        if not isinstance(node, ConfigDict) or name not in node:
            return f"{arg}: {'.'.join(done) or 'the config'} has no key {name!r}; {_hint(cfg, node, done, name)}"
        node, done = node[name], [*done, name]
    return None


def _hint(cfg: ConfigDict, node, done: list[str], name: str) -> str:
    have = sorted(node) if isinstance(node, ConfigDict) else []
    if there := leaf(cfg, name):
        return f"did you mean {there}?"
    if close := [".".join([*done, c]) for c in difflib.get_close_matches(name, have, 3, 0.5)]:
        return f"did you mean {' or '.join(close)}?"
    return f"it has {', '.join(have) or 'no leaves'}"


def leaf(cfg: ConfigDict | None, word: str) -> str | None:
    """The leaf of a config that `word` stands for, with its unit where that may surprise; None: there is none.

    word: another program's name, a leaf without its folder, or a whole leaf. cfg: None for any training config.
    """
    word = word.lower().replace("-", "_")
    have = trees.flat((config.base() if cfg is None else cfg).to_dict())
    if word in have:
        return word
    found = [name] if (name := ALIASES.get(word.split(".")[-1])) in have else []
    found = found or [name for name in have if name.split(".")[-1] == word.split(".")[-1] and not name.startswith(OWN)]
    if not found:
        return None
    return " or ".join(found[:3]) + (f" ({UNITS[found[0]]})" if found[0] in UNITS else "")
