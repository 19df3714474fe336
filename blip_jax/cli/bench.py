"""blip-jax bench train | caption | filter | encode | rank | dialog | input.

Flags become settings, and settings go to one function of blip_jax/bench.

`measure` also takes a peer, another program that does the same work; the product has none, benchmarks/against.py has.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable

from absl import flags

from blip_jax.cli import configs, usage
from blip_jax.cli.parse import parse
from blip_jax.config import BLIP2_MODELS, VIT_SIZES

# flags of `train` that make a config, where none is given
OWN = ("model", "size", "objective", "img_size", "dtype", "batch", "buckets")


def bench(argv: list[str]) -> int:
    """blip-jax bench."""
    what = argv[1] if argv[1:] else ""
    if what in usage.ASKS:
        usage.show("bench", None)
    if what not in WORKLOADS:
        close = difflib.get_close_matches(what, WORKLOADS, 1, 0.6)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"blip-jax bench measures {', '.join(WORKLOADS)}, not {what or 'nothing'!r}{hint}")
    return measure(what, argv[2:], shlex.join(["blip-jax", *argv]))


def measure(
    what: str,
    argv: list[str],
    command: str,
    more: Callable | None = None,
    peer: Callable | None = None,
) -> int:
    """Measures a workload as `argv` says, with a peer where one is given; `command` is written beside the figures.

    more(values): defines further flags; peer(values): from all flags, the peer that the workload's `run` takes.
    """
    values = flags.FlagValues()
    if more:
        more(values)

    def with_peer() -> dict:
        if peer and "model" in values and values.model:
            raise ValueError(f"--model={values.model}: there is no peer of BLIP-2; use blip-jax bench, or --size")
        return {"peer": peer(values)} if peer else {}

    return WORKLOADS[what]([f"bench {what}", *argv], values, command, with_peer)


def _train(argv: list[str], values: flags.FlagValues, command: str, with_peer: Callable) -> int:
    from blip_jax import tasks
    from blip_jax.bench import train

    default = train.Settings()
    with_config = configs.given(argv)
    argv = configs.take(values, argv, "config", "FILE.py or FILE.py:ARGUMENT: what trains; default: by the flags below")
    flags.DEFINE_enum("size", "base", sorted(VIT_SIZES), "of the model", flag_values=values)
    _model(values, "trained by its stage, in place of --size and --objective")
    flags.DEFINE_enum("objective", "pretrain", tasks.names(), "what is trained", flag_values=values)
    flags.DEFINE_integer("img_size", 224, "pixels", lower_bound=1, flag_values=values)
    flags.DEFINE_multi_enum("dtype", ["bfloat16"], ["bfloat16", "float32"], "repeatable", flag_values=values)
    flags.DEFINE_integer("batch", 8, "global", lower_bound=1, flag_values=values)
    flags.DEFINE_list("buckets", [], "text lengths, as 12,16,20,30", flag_values=values)
    flags.DEFINE_enum("input", default.input, ["synthetic", "real"], "real: the data of --config", flag_values=values)
    _numbers(values, default, steps="timed steps of each text length")
    _common(values, default)
    parse(values, argv, required=())
    settings = train.Settings(**{name: getattr(values, name) for name in train.Settings._fields})
    if with_config:
        if given := [name for name in OWN if values[name].present]:
            raise ValueError(
                f"--{given[0]} and --config: the config has its own; override its leaf, as --config.train.batch=64"
            )
        cfgs = [values.config]
    elif settings.input == "real":
        raise ValueError("--input=real needs --config: whose data?")
    else:
        _alone(values, "size", "objective")
        if values.objective.startswith("blip2") and not values.model:
            raise ValueError(f"--objective={values.objective}: which BLIP-2? give --model={'|'.join(BLIP2_MODELS)}")
        buckets = tuple(_positions(b) for b in values.buckets)
        cfgs = [
            train.sized(values.size, values.objective, values.img_size, dtype, values.batch, buckets, values.model)
            for dtype in values.dtype
        ]
    from blip_jax.parallel import processes

    with processes.start():
        train.run(cfgs, settings, command, values.out, **with_peer())
    return 0


def _model(values: flags.FlagValues, what: str) -> None:
    flags.DEFINE_enum("model", "", ["", *BLIP2_MODELS], f"a BLIP-2, {what}", flag_values=values)


def _alone(values: flags.FlagValues, *names: str) -> None:
    """ValueError: --model beside a flag that it takes the place of."""
    if values.model and (given := [name for name in names if values[name].present]):
        raise ValueError(f"--{given[0]} and --model={values.model}, which says it too: leave one of them out")


def _positions(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"--buckets holds {text!r}: give text lengths with commas, as 12,16,20,30")
    return int(text)


def _caption(argv: list[str], values: flags.FlagValues, command: str, with_peer: Callable) -> int:
    from blip_jax.bench import caption

    default = caption.Settings()
    _sizes(values, default)
    _model(values, "in place of --size")
    flags.DEFINE_multi_integer(
        "captions", list(default.captions), "per image; repeatable", lower_bound=1, flag_values=values
    )
    _numbers(values, default, batch="images", tokens="new tokens per caption", rounds="of which medians are taken")
    _common(values, default)
    parse(values, argv, required=())
    _alone(values, "size")
    settings = _settings(caption.Settings, values)
    if settings.model and not values["img_size"].present:
        settings = settings._replace(img_sizes=caption.BLIP2_IMG_SIZES)
    caption.run(settings, command, values.out, **with_peer())
    return 0


def _inference(workload: str, **usual) -> Callable:
    """usual: settings of this workload that are others by default."""

    def run(argv: list[str], values: flags.FlagValues, command: str, with_peer: Callable) -> int:
        from blip_jax.bench import inference

        default = inference.Settings(workload, **usual)
        _sizes(values, default)
        _numbers(values, default, batch="images per device", rounds="in which all take turns")
        if workload == "filter":
            _numbers(values, default, texts="per image", positions="of each text")
        if workload == "dialog":
            _numbers(values, default, texts="options of the round", positions="of each with its history")
            _numbers(values, default, caption="positions of the picture's caption")
        if workload == "rank":
            _numbers(values, default, positions="of a question", candidates="answers", k="of them scored in full")
            _numbers(values, default, answer="positions of the longest answer")
        _common(values, default)
        parse(values, argv, required=())
        inference.run(_settings(inference.Settings, values, workload=workload), command, values.out, **with_peer())
        return 0

    return run


def _input(argv: list[str], values: flags.FlagValues, command: str, with_peer: Callable) -> int:
    from blip_jax.bench import input

    default = input.Settings()
    _numbers(
        values,
        default,
        examples="of the memory measurement",
        timed="examples of the speed measurement",
        img_size="pixels",
    )
    flags.DEFINE_integer(
        "threads", default.threads, "that decode in the memory measurement", lower_bound=0, flag_values=values
    )
    flags.DEFINE_string("out", "", "JSON file to write", flag_values=values)
    parse(values, argv, required=())
    return int(input.run(_settings(input.Settings, values), command, values.out)["grew_mb"] > input.LIMIT)


def _sizes(values: flags.FlagValues, default) -> None:
    flags.DEFINE_enum("size", default.size, sorted(VIT_SIZES), "of the model", flag_values=values)
    flags.DEFINE_multi_integer(
        "img_size", list(default.img_sizes), "pixels; repeatable", lower_bound=1, flag_values=values
    )
    flags.DEFINE_multi_enum("dtype", list(default.dtypes), list(default.dtypes), "repeatable", flag_values=values)


def _numbers(values: flags.FlagValues, default, **help: str) -> None:
    for name, text in help.items():
        flags.DEFINE_integer(name, getattr(default, name), text, lower_bound=1, flag_values=values)


def _common(values: flags.FlagValues, default) -> None:
    flags.DEFINE_integer(
        "threads", default.threads, "of each side on a CPU; 0: all cores", lower_bound=0, flag_values=values
    )
    flags.DEFINE_string("trace", "", "folder for a profile that TensorBoard and xprof open", flag_values=values)
    flags.DEFINE_string("out", "", "JSON file to write", flag_values=values)


def _settings(kind, values: flags.FlagValues, **more):
    """The NamedTuple `kind` from the flags of the same names.

    img_sizes and dtypes come from the repeated --img_size and --dtype.
    """
    plural = {"img_sizes": "img_size", "dtypes": "dtype"}
    for name in kind._fields:
        if (flag := plural.get(name, name)) in values:
            found = getattr(values, flag)
            more[name] = tuple(found) if isinstance(found, list) else found
    return kind(**more)


WORKLOADS = {
    "train": _train,
    "caption": _caption,
    "filter": _inference("filter"),
    "encode": _inference("encode"),
    "rank": _inference("rank", img_sizes=(480,), positions=35),
    "dialog": _inference("dialog", img_sizes=(384,), texts=100, positions=64),
    "input": _input,
}
