"""Packing: the records of any source, in order, as ArrayRecord shards with their captions beside them.

OUT/00000.array_record holds the first `shard_examples` records of the source but for those that cannot be used, and so
on. A shard is written in OUT/unfinished and then renamed, so that what has its name is complete; a run that is called
again goes on with the shards that are not there. pack.json says of what it is made, skipped.jsonl what was left out.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
import pathlib
import shutil
import threading
import uuid
from collections.abc import Callable

from tqdm import tqdm

from blip_jax import buckets
from blip_jax.data import paths
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
    out = buckets.local(out, "out")
    if shard_examples < 1 or threads < 1 or not 0 <= process < processes:
        raise ValueError(
            f"shard_examples={shard_examples} and threads={threads} must be 1 or more, process={process} below "
            f"processes={processes}"
        )
    source = open_source(name, cfg)
    count = -(-len(source) // shard_examples)
    try:
        (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
        _settle(out, _settings(name, cfg, len(source), shard_examples))
    except OSError as e:
        raise _unwritten(out, e) from e
    todo = [k for k in range(process, count, processes) if not _shard(out, k).exists()]
    spans = {k: range(k * shard_examples, min((k + 1) * shard_examples, len(source))) for k in todo}
    ledger = Ledger(out / f"skipped{f'-p{process}' if process else ''}.jsonl", max_bad_share)

    ended = threading.Event()
    with (
        tqdm(total=sum(map(len, spans.values())), desc=f"pack {out}", unit=" records", mininterval=1) as bar,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):
        work = [
            pool.submit(_write, source, spans[k], _shard(out, k), bar, lambda: ended.is_set() or stop()) for k in todo
        ]
        try:
            for done in concurrent.futures.as_completed(work):
                if events := done.result():
                    ledger.add(*events)
        except BaseException:
            ended.set()
            for waiting in work:
                waiting.cancel()
            raise
    finished = [k for k in range(count) if _shard(out, k).exists()]
    if len(finished) < count:
        return {"stopped": stop(), "finished": len(finished), "shards": count}
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return {"stopped": False, "finished": count, "shards": count, **_summary(out, count)}


def _shard(out: pathlib.Path, k: int) -> pathlib.Path:
    return out / f"{k:05d}.array_record"


def _write(source: Source, span: range, path: pathlib.Path, bar: tqdm, stop: Callable[[], bool]) -> tuple | None:
    """Writes one shard; returns what `Ledger.add` takes in, or None where it was stopped."""
    events, texts = [], 0
    try:
        with Writing(path, path.parent / UNFINISHED) as file:
            for n, i in enumerate(span):
                if n % STEP == 0:
                    if stop():
                        return None
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
            skipped = collections.Counter(reason.split(":")[0] for _, _, reason, _ in events)
            file.commit({"read": len(span), "records": len(file), "texts": texts, "skipped": skipped})
    except (OSError, RuntimeError) as e:  # RuntimeError: ArrayRecord's writer, which keeps the number only in words
        raise _unwritten(path.parent, e) from e
    bar.update(len(span) - (len(span) - 1) // STEP * STEP)
    return len(span), events


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


def _settle(out: pathlib.Path, settings: dict) -> None:
    """Notes the settings in a new `out`. ValueError: it was begun with others, or holds shards without settings."""
    path = out / SETTINGS
    if not path.exists():
        if _shard(out, 0).exists():
            raise ValueError(f"{out} holds shards and no {SETTINGS}: give another folder, or remove them")
        beside = out / UNFINISHED / f"{SETTINGS}.{uuid.uuid4().hex}"
        beside.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        beside.replace(path)
        return
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


def _summary(out: pathlib.Path, count: int) -> dict:
    """What the shards say of themselves, together."""
    total, skipped = collections.Counter(), collections.Counter()
    for k in range(count):
        with open(f"{_shard(out, k)}{CAPTIONS}", encoding="utf-8") as file:
            about = json.loads(file.readline())
        total.update({name: about[name] for name in ("records", "texts")})
        skipped.update(about["skipped"])
    return {"records": total["records"], "texts": total["texts"], "skipped": dict(skipped)}
