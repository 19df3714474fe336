"""blip-jax pack: any source of data to ArrayRecord shards, with the captions beside them."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import flags

from blip_jax import buckets
from blip_jax.config import source

SHARED = ("path", "weight")  # leaves of a source that are no flags here


def pack(argv: list[str], parse: Callable, again: int) -> int:
    """blip-jax pack; `parse` as in cli/main.py, `again` the status of a run that was stopped."""
    values = flags.FlagValues()
    values.set_gnu_getopt()  # the path and flags in any order
    leaves = {leaf: value for leaf, value in source("").items() if leaf not in SHARED}
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}
    for leaf, value in leaves.items():
        text = "leaf of a source (blip_jax/config/leaves.py)" if leaf != "kind" else "default: by the file's content"
        if isinstance(value, tuple):
            flags.DEFINE_multi_string(leaf, list(value), f"{text}; repeatable", flag_values=values)
        else:
            define.get(type(value), flags.DEFINE_string)(leaf, value, text, flag_values=values)
    flags.DEFINE_string("out", None, "folder of the shards", flag_values=values)
    flags.DEFINE_string("name", "", "with which keys begin; default: that of the folder", flag_values=values)
    for name, value, text in (
        ("shard_examples", 10_000, "records of a shard"),
        ("threads", 8, "shards written at once"),
        ("processes", 1, "that share the work"),
    ):
        flags.DEFINE_integer(name, value, text, lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process", 0, "number of this process", lower_bound=0, flag_values=values)
    flags.DEFINE_float("max_bad_share", 0.05, "more unusable records: stop", flag_values=values)
    given = parse(values, argv, required=("out",), positional=sys.maxsize)
    from blip_jax.data import paths
    from blip_jax.data.formats import KINDS, kind_of
    from blip_jax.data.pack import pack
    from blip_jax.parallel.interrupt import Interrupt

    kind = values.kind
    if len(given) > 1:
        raise ValueError(f"{given[0]!r} and {len(given) - 1} more: give one path or pattern in quotes, as 'cc/*.tar'")
    if not given and kind != "scenes":
        raise ValueError("blip-jax pack needs a file or a pattern in quotes, as blip-jax pack 'cc/*.tar' --out=data/cc")
    if not kind:
        first = paths.find(given[0], on_bucket=True)[0]
        kind = kind_of(first) if buckets.is_file(first) else "a folder"
        if kind not in KINDS and kind not in ("csv", "parquet"):
            raise ValueError(f"{first!r} is {kind or 'of an unknown kind'}: give the files, and --kind=json or another")
    leaves = {
        leaf: tuple(v) if isinstance(v := getattr(values, leaf), list) else v for leaf in leaves if leaf != "kind"
    }
    cfg, out = source(kind, *given, **leaves), buckets.of(values.out, "--out")
    with Interrupt("dropping unfinished shards; the same command goes on") as interrupt:
        done = pack(
            values.name or out.name,
            cfg,
            out,
            shard_examples=values.shard_examples,
            threads=values.threads,
            max_bad_share=values.max_bad_share,
            process=values.process,
            processes=values.processes,
            stop=lambda: interrupt.asked,
        )
    if "records" not in done:
        print(f"{out}: {done['finished']} of {done['shards']} shards are finished; run again to go on", file=sys.stderr)
        return again if done["stopped"] else 0
    print(
        f"{out}: {done['records']} records with {done['texts']} texts in {done['shards']} shards; read them with "
        f"source('array_record', {str(out / '*.array_record')!r})"
    )
    if done["skipped"]:
        left = ", ".join(f"{reason} ({n})" for reason, n in sorted(done["skipped"].items()))
        print(f"left out: {left}; they are named in {out / 'skipped.jsonl'}", file=sys.stderr)
    return 0
