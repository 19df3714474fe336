"""Another threshold for a finished run: new decisions from its tables and the original records, without a model."""

from __future__ import annotations

import contextlib
import itertools
import pathlib

from ml_collections import ConfigDict
from tqdm import tqdm

from blip_jax import buckets, lock
from blip_jax.capfilt import decisions, settings, shards, summary
from blip_jax.capfilt.decisions import BELOW, MATCHED, Row
from blip_jax.console import say
from blip_jax.data import batches
from blip_jax.data.source import BadRecord
from blip_jax.parallel.interrupt import Interrupt, Stopped, check


def refilter(run_dir, threshold: float, out) -> dict:
    """The run in `run_dir` with another threshold, in the folder `out`: the same bytes as a run with it would give.

    Finished shards in `out` are kept, so that it can be stopped, by SIGTERM or SIGINT, and called again. Returns the
    summary, also in out/summary.json, or {"stopped": True}. ValueError: threshold, an unfinished run, sources that are
    not those of the run, or an `out` in which another run is at work.
    """
    try:
        with Interrupt() as stop:
            return _refilter(run_dir, threshold, out, stop)
    except Stopped:
        say("refilter: stopped by a signal; nothing unfinished is kept; run again to go on")
        return {"stopped": True}


def _refilter(run_dir, threshold: float, out, stop: Interrupt) -> dict:
    run_dir, out = buckets.of(run_dir, "run"), buckets.of(out, "out")
    record = settings.read(run_dir)
    if out == run_dir:
        raise ValueError(f"out is {out}, the run itself: give another folder")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}: it must be between 0 and 1")

    plan = shards.Plan(record["records"], record["settings"]["shard_examples"])
    missing = len(plan) - len(shards.finished(run_dir, len(plan)))
    if missing:
        raise ValueError(
            f"{run_dir} is not finished, {missing} of {len(plan)} shards are missing: run `blip-jax capfilt` on it "
            "until it prints its summary"
        )

    sources = batches.open_all(ConfigDict(record["settings"]["data"]["sources"]), texts=False)
    lengths = {name: len(source) for name, source in sources.items()}
    if lengths != record["records"]:
        raise ValueError(
            f"the sources hold {lengths} records, the run had {record['records']}: give back the data it was made from"
        )

    record["settings"]["threshold"] = float(threshold)
    with contextlib.ExitStack() as stack:
        with shards.writing("the settings", out):
            stack.enter_context(lock.held(out))
            settings.settle(out, record)
        done = set(shards.finished(out, len(plan)))
        for shard in tqdm([k for k in range(len(plan)) if k not in done], desc="refilter", unit="shard"):
            with stop.deferred("dropping this shard, then stopping"):
                _make(shard, run_dir, out, sources, threshold)
        return summary.finish(out, len(plan), threshold)


def _make(shard: int, run_dir: pathlib.Path, out: pathlib.Path, sources: dict, threshold: float) -> None:
    writer = shards.ShardWriter(out, shard)
    try:
        rows = decisions.rows_of(shards.folder(run_dir, shard) / shards.TABLE)
        for (dataset, number), own in itertools.groupby(rows, lambda row: (row.dataset, row.record)):
            own = [decisions.by_threshold(row, threshold) if row.reason in (MATCHED, BELOW) else row for row in own]
            check()
            kept = any(row.kept for row in own)  # else the picture is not read
            writer.add(_record(sources[dataset], number, own) if kept else None, own)
        writer.commit()
    except BaseException:
        writer.drop()
        raise


def _record(source, number: int, rows: list[Row]) -> dict:
    """The record that the rows are about, as the run wrote it. ValueError: the source holds another one."""
    try:
        fields = shards.storable(source[number], rows[0].dataset)
    except BadRecord as e:
        raise ValueError(
            f"record {number} of source {source.name!r} could be read in the run and cannot be now: {e}"
        ) from e
    if fields["key"] != rows[0].key:
        raise ValueError(
            f"record {number} of source {source.name!r} is {fields['key']!r}, in the run it was {rows[0].key!r}: "
            "give back the data it was made from"
        )
    return fields
