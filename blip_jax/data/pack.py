"""Packing: the records of any source, in order, as ArrayRecord shards with their captions beside them.

OUT/00000.array_record holds the first `shard_examples` records of the source but for those that cannot be used, and so
on. A shard is written in OUT/unfinished and then renamed, so that what has its name is complete; a run that is called
again goes on with the shards that are not there. Where OUT is on a bucket, a shard is written in a local folder and
copied there whole. pack.json says of what it is made, skipped.jsonl what was left out, which is noted before the shard.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable

from tqdm import tqdm

from blip_jax import buckets
from blip_jax.data import paths, temporary
from blip_jax.data.formats import open_source
from blip_jax.data.formats.array_record import CAPTIONS, Writing
from blip_jax.data.ledger import Ledger
from blip_jax.data.source import BadRecord, Source

SETTINGS = "pack.json"
NOT_OF_RECORDS = ("weight", "cache")  # leaves of a source
UNFINISHED = "unfinished"
STEP = 100  # records between two looks at whether to stop


def pack(
    name: str,
    cfg,
    out: str | os.PathLike,
    *,
    shard_examples: int = 10_000,
    threads: int = 8,
    max_bad_share: float = 0.05,
    process: int = 0,
    processes: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> dict:
    """Packs the source that `cfg` (a config.source) describes into the folder `out`, or goes on with it.

    name: of the source, with which its keys begin. process of processes: makes the shards process, process + processes,
    ...; all see one `out`. stop: asked now and then; what is unfinished is dropped. Returns {"stopped": bool,
    "finished": shards, "shards": of so many}, and when all are finished also {"records", "texts", "skipped": {reason:
    n}}. ValueError: the source cannot be opened, more than `max_bad_share` of 100 records or more cannot be used, or
    `out` was begun with other settings. OSError: `out` cannot be written.
    """
    out = buckets.of(out, "out")
    if shard_examples < 1 or threads < 1 or not 0 <= process < processes:
        raise ValueError(
            f"shard_examples={shard_examples} and threads={threads} must be 1 or more, process={process} below "
            f"processes={processes}"
        )
    source = open_source(name, cfg)
    count = -(-len(source) // shard_examples)
    with contextlib.ExitStack() as stack:
        try:
            if buckets.is_bucket(out):
                stack.callback(buckets.settle)
                beside = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(dir=temporary.own_folder())))
            else:
                beside = out / UNFINISHED
                beside.mkdir(parents=True, exist_ok=True)
            _settle(out, beside, _settings(name, cfg, len(source), shard_examples))
            there = set(_finished(out, count))
            skipped = buckets.staged(out / f"skipped{f'-p{process}' if process else ''}.jsonl")
        except OSError as e:
            raise _unwritten(out, e) from e
        spans = {
            k: range(k * shard_examples, min((k + 1) * shard_examples, len(source)))
            for k in range(process, count, processes)
            if k not in there
        }
        _make(source, spans, out, beside, Ledger(skipped, max_bad_share), threads, stop)
    finished = _finished(out, count)
    if len(finished) < count:
        return {"stopped": stop(), "finished": len(finished), "shards": count}
    shutil.rmtree(beside, ignore_errors=True)
    return {"stopped": False, "finished": count, "shards": count, **_summary(out, count)}


def _make(source: Source, spans: dict, out, beside: pathlib.Path, ledger: Ledger, threads: int, stop: Callable) -> None:
    """Writes the shards that `spans` has, number -> records, `threads` of them at once."""
    ended, noting = threading.Event(), threading.Lock()

    def note(read: int, events: list) -> None:
        with noting:
            ledger.add(read, events)
            buckets.sync()

    with (
        tqdm(total=sum(map(len, spans.values())), desc=f"pack {out}", unit=" records", mininterval=1) as bar,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):
        ends = lambda: ended.is_set() or stop()
        work = [pool.submit(_write, source, span, _shard(out, k), beside, bar, note, ends) for k, span in spans.items()]
        try:
            for done in concurrent.futures.as_completed(work):
                done.result()
        except BaseException:
            ended.set()
            for waiting in work:
                waiting.cancel()
            raise


def _shard(out, k: int):
    return out / f"{k:05d}.array_record"


def _finished(out, count: int) -> list[int]:
    """Numbers of the shards that are there, of `count`."""
    if not buckets.is_bucket(out):
        return [k for k in range(count) if _shard(out, k).exists()]
    there = set(buckets.glob(f"{out}/*.array_record", {}))
    return [k for k in range(count) if str(_shard(out, k)) in there]


def _write(source: Source, span: range, path, beside: pathlib.Path, bar: tqdm, note: Callable, stop: Callable) -> None:
    """Writes one shard; where it is stopped, nothing. note: takes the records read, and what was wrong with some."""
    events, texts = [], 0
    try:
        with Writing(path, beside) as file:
            for n, i in enumerate(span):
                if n % STEP == 0:
                    if stop():
                        return
                    bar.update(min(n, STEP))
                try:
                    record = source[i]
                except BadRecord as e:
                    events.append((source.name, e.key, e.reason, False))
                    continue
                if "image" not in record:
                    raise ValueError(
                        f"data source {source.name!r}: its records have {', '.join(sorted(record))} and not one "
                        "picture each; only such are packed"
                    )
                file.add(record)
                texts += len(record.get("captions") or ())
            note(len(span), events)
            skipped = collections.Counter(reason.split(":")[0] for _, _, reason, _ in events)
            file.commit({"read": len(span), "records": len(file), "texts": texts, "skipped": skipped})
    except (OSError, RuntimeError) as e:  # RuntimeError: ArrayRecord's writer, which keeps the number only in words
        raise _unwritten(path.parent, e) from e
    bar.update(len(span) - (len(span) - 1) // STEP * STEP)


def _unwritten(out: pathlib.Path, e: Exception) -> OSError:
    return OSError(
        f"packing into {out} failed: {' '.join(str(e).split())[:300]}. Nothing half-written counts. Make room or give "
        "a folder that can be written, then run the same command again: finished shards stay as they are"
    )


def _settings(name: str, cfg, records: int, shard_examples: int) -> dict:
    files = [] if cfg.kind in ("tfds", "scenes") else paths.find(cfg.path, on_bucket=True)
    of = {leaf: value for leaf, value in json.loads(cfg.to_json()).items() if leaf not in NOT_OF_RECORDS}
    size = sum(map(buckets.size, files))
    return {"name": name, "source": of, "records": records, "bytes": size, "shard_examples": shard_examples}


def _settle(out, beside: pathlib.Path, settings: dict) -> None:
    """Notes the settings in a new `out`. ValueError: it was begun with others, or holds shards without settings."""
    path = out / SETTINGS
    if not buckets.is_file(path):
        if buckets.is_file(_shard(out, 0)):
            raise ValueError(f"{out} holds shards and no {SETTINGS}: give another folder, or remove them")
        content = json.dumps(settings, indent=1)
        if not buckets.is_bucket(out):
            own = beside / f"{SETTINGS}.{uuid.uuid4().hex}"
            own.write_text(content, encoding="utf-8")
            own.replace(path)
            return
        try:
            return buckets.create(path, content.encode())
        except FileExistsError:  # another process was quicker
            pass
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e}): remove {out} and pack anew") from None
    changed = [
        f"{leaf} {before.get(leaf)!r} -> {value!r}" for leaf, value in settings.items() if before.get(leaf) != value
    ]
    if changed:
        raise ValueError(
            f"{out} was begun with other settings: {'; '.join(changed)}. Give another folder, or remove this one"
        )


def _summary(out, count: int) -> dict:
    """What the shards say of themselves, together."""

    def first(k: int) -> dict:
        with buckets.opened(f"{_shard(out, k)}{CAPTIONS}") as file:
            return json.loads(file.readline())

    total, skipped = collections.Counter(), collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(buckets.THREADS) as pool:
        abouts = list(pool.map(first, range(count)))
    for about in abouts:
        total.update({name: about[name] for name in ("records", "texts")})
        skipped.update(about["skipped"])
    return {"records": total["records"], "texts": total["texts"], "skipped": dict(skipped)}
