"""What a finished run did, from its decision tables, as JSON and as a table.

Counts, noise, lengths, words and examples.
"""

from __future__ import annotations

import collections
import json
import pathlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip_jax import buckets
from blip_jax.capfilt import decisions, shards
from blip_jax.capfilt.decisions import BELOW, EMPTY, MATCHED, REPEATED, SOURCES, UNREADABLE
from blip_jax.console import say

FILE = "summary.json"
EXAMPLES = 5  # texts shown of each source, kept and not
BINS = 20  # of matching probabilities, 0 to 1


class _Texts:
    """Running sums over texts of one source."""

    def __init__(self):
        self.reasons, self.lengths = collections.Counter(), collections.Counter()
        self.words: set[str] = set()
        self.itm = np.zeros(BINS, np.int64)
        self.examples = {"kept": [], "dropped": []}

    def add(self, table: pa.Table) -> None:
        self.reasons.update(table.column("reason").to_pylist())
        self._add_words(table.filter(pc.not_equal(table.column("text"), "")).column("text"))
        self.itm += np.histogram(table.column("itm").drop_null().to_numpy(), BINS, (0, 1))[0]
        for name, reason in (("kept", MATCHED), ("dropped", BELOW)):
            chosen = table.filter(pc.equal(table.column("reason"), reason)).select(["key", "text", "itm"])
            self.examples[name] += chosen.slice(0, EXAMPLES - len(self.examples[name])).to_pylist()

    def _add_words(self, text: pa.ChunkedArray) -> None:
        words = pc.utf8_split_whitespace(text)
        self.lengths.update(pc.list_value_length(words).to_pylist())
        self.words.update(pc.unique(pc.list_flatten(words)).to_pylist())

    def result(self) -> dict:
        count, noise = self.reasons.total(), self.reasons[BELOW] + self.reasons[EMPTY]
        judged = count - self.reasons[REPEATED]
        return {
            "texts": count,
            "kept": self.reasons[MATCHED],
            "reasons": dict(sorted(self.reasons.items())),
            "noise_ratio": noise / judged if judged else None,
            **_words(self.lengths, self.words),
            "itm_histogram": self.itm.tolist(),
            "examples": self.examples,
        }


def _words(lengths: collections.Counter, words: set[str]) -> dict:
    n = lengths.total()
    return {
        "distinct_words": len(words),
        "mean_words": sum(k * v for k, v in lengths.items()) / n if n else None,
        "lengths": {str(k): lengths[k] for k in sorted(lengths)},
    }


def summarise(out: pathlib.Path, count: int, threshold: float) -> dict:
    """The summary of the `count` finished shards in `out`. ValueError: a key occurs twice.

    {"threshold", "images": readable ones, "unreadable": {category: records}, "web" and "synthetic": {"texts", "kept",
    "reasons": {reason: texts}, "noise_ratio": share below the threshold or empty of all texts that are no repetition,
    "distinct_words", "mean_words", "lengths": {words: texts}, "itm_histogram": texts by matching probability in 20
    equal bins, "examples": {"kept", "dropped": [{"key", "text", "itm"}]}}, "kept": {"texts", "images",
    "distinct_words", "mean_words", "lengths"}}
    """
    sources, kept = {source: _Texts() for source in SOURCES}, _Texts()
    unreadable, images, kept_images, keys = collections.Counter(), 0, 0, shards.Keys(out)
    for shard in range(count):
        table = decisions.read(shards.folder(out, shard) / shards.TABLE)
        keys.add(shard, shards.places(table))
        lost = pc.starts_with(table.column("reason"), UNREADABLE)
        unreadable.update(
            row["reason"].removeprefix(f"{UNREADABLE}: ")
            for row in _records(table.filter(lost), ["reason"]).to_pylist()
        )

        table = table.filter(pc.invert(lost))
        for source, texts in sources.items():
            texts.add(table.filter(pc.equal(table.column("source"), source)))
        chosen = table.filter(table.column("kept"))
        kept.add(chosen)
        images += len(_records(table))
        kept_images += len(_records(chosen))

    return {
        "threshold": threshold,
        "images": images,
        "unreadable": dict(sorted(unreadable.items())),
        **{source: texts.result() for source, texts in sources.items()},
        "kept": {"texts": kept.reasons[MATCHED], "images": kept_images, **_words(kept.lengths, kept.words)},
    }


def _records(table: pa.Table, columns: list[str] | None = None) -> pa.Table:
    """One row per record."""
    return table.group_by(["dataset", "record", *(columns or [])]).aggregate([])


def finish(out: pathlib.Path, count: int, threshold: float) -> dict:
    """Checks the keys of all shards, writes `out`/summary.json, says and returns what is in it.

    ValueError: a key occurs twice. OSError: `out` cannot be written.
    """
    summary = _there(out) or summarise(out, count, threshold)
    content = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    with shards.writing("the summary", out):
        if not (out / FILE).exists() or (out / FILE).read_text(encoding="utf-8") != content:
            shards.put(out, FILE, content)
    if not buckets.is_bucket(out):
        shutil.rmtree(out / "unfinished", ignore_errors=True)
    say(table_of(summary, out))
    return summary


def _there(out: pathlib.Path) -> dict | None:
    """The summary on a bucket that was written after every table there, so that none has to be fetched again."""
    if not buckets.is_bucket(out):
        return None
    written = buckets.written(out)
    tables = [time for name, time in written.items() if name.endswith(f"/{shards.TABLE}")]
    if FILE not in written or not tables or written[FILE] <= max(tables):
        return None
    return json.loads((out / FILE).read_text(encoding="utf-8"))


def table_of(summary: dict, out: pathlib.Path) -> str:
    """The summary as text for the console."""
    lines = [
        f"CapFilt at threshold {summary['threshold']:g}: {summary['images']} images, "
        f"{sum(summary['unreadable'].values())} unreadable records"
        + "".join(f", {n} {reason}" for reason, n in summary["unreadable"].items()),
        f"{'':12}{'texts':>10}{'kept':>10}{'noise':>9}{'below':>10}{'empty':>8}{'repeated':>10}{'words':>8}{'distinct':>10}",
    ]
    for source in SOURCES:
        s = summary[source]
        widths = ((BELOW, 10), (EMPTY, 8), (REPEATED, 10))
        reasons = "".join(f"{s['reasons'].get(reason, 0):>{width}}" for reason, width in widths)
        noise = f"{100 * s['noise_ratio']:.1f} %" if s["noise_ratio"] is not None else "-"
        lines.append(
            f"{source:12}{s['texts']:>10}{s['kept']:>10}{noise:>9}{reasons}{_mean(s)}{s['distinct_words']:>10}"
        )

    kept = summary["kept"]
    lines.append(
        f"{'kept':12}{kept['texts']:>10}{kept['texts']:>10}{'':37}{_mean(kept)}{kept['distinct_words']:>10}"
        f"   on {kept['images']} images"
    )

    for source in SOURCES:
        for verdict, rows in summary[source]["examples"].items():
            lines += [f"  {source}, {verdict}: {row['itm']:.2f} {row['text']!r} ({row['key']})" for row in rows]
    if not kept["texts"]:
        lines.append(
            "WARNING: NOT ONE TEXT WAS KEPT: the shards are empty and nothing can be trained on them. Lower the "
            "threshold (blip-jax capfilt refilter) or look at the filter: see itm_histogram in summary.json"
        )
    return "\n".join(
        [*lines, f"written to {out}: shards/*/{{web,synthetic}}.array_record, shards/*/{shards.TABLE}, {FILE}"]
    )


def _mean(part: dict) -> str:
    return f"{part['mean_words']:>8.1f}" if part["mean_words"] is not None else f"{'-':>8}"
