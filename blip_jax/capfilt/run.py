"""The CapFilt run: any source in; a decision on every web and synthetic text, and shards to train on, out (paper,
section 3.3).

Work is cut by shard of the output; shard k belongs to process k % processes. Processes never talk to each other, but
for a look at the settings where JAX has joined them. Each drives its local devices, which hold the parameters whole.
Row r of a shard always meets the program at place r % device_batch of a device's batch, with the same shapes, so
neither the number of devices nor that of processes changes a byte.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from blip_jax.capfilt import caption, decisions, settings, summary
from blip_jax.capfilt.decisions import BELOW, EMPTY, REPEATED, UNREADABLE, Row
from blip_jax.capfilt.filter import scorer, viewer
from blip_jax.capfilt.input import Batch, Records
from blip_jax.capfilt.shards import Keys, Plan, ShardWriter, finished, writing
from blip_jax.console import say
from blip_jax.data import batches as pipeline
from blip_jax.data.text.clean import clean_caption
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.models.layers.dense import rounded
from blip_jax.parallel import processes as cluster
from blip_jax.parallel.interrupt import Interrupt

PROGRESS_SECONDS = 5.0  # between two lines of progress


def run(cfg, out, process: int | None = None, processes: int | None = None) -> dict:
    """Captions and filters all records of `cfg.data.sources` into the folder `out`, or goes on with what it holds.

    cfg: of config.capfilt; process, processes: this one and how many there are, by default JAX's. Every process is
    called with the same cfg and `out`, which all of them see; one that dies is replaced by calling again, with any
    number. SIGTERM, or SIGINT once, ends after the batch and drops the unfinished shard.
    Returns the summary (capfilt/tally.py), also in out/summary.json, once all shards are finished; before that
    {"stopped": whether by a signal, "finished": shards, "shards": of so many}.
    ValueError: settings, checkpoints or data do not fit, or `out` was begun with others. OSError: `out` cannot be
    written.
    """
    settings.validate(cfg)
    process = jax.process_index() if process is None else process
    processes = jax.process_count() if processes is None else processes
    if not 0 <= process < processes:
        raise ValueError(f"process={process} of processes={processes}: processes are numbered from 0")
    out = pathlib.Path(out).absolute()
    captioner, judge, tokenizer = settings.load(cfg)
    sources = pipeline.open_all(cfg.data.sources)
    lengths = {name: len(source) for name, source in sources.items()}
    with writing("the settings", out):
        out.mkdir(parents=True, exist_ok=True)
        cluster.agree(cfg, out, captioner=captioner.record, filter=judge.record, records=lengths)
        settings.settle(out, settings.on_record(cfg, captioner, judge, lengths))
    plan = Plan(lengths, cfg.shard_examples)
    done, keys = set(finished(out, len(plan))), Keys(out)
    for shard in sorted(done):
        keys.add_finished(shard)
    todo = [k for k in range(process, len(plan), processes) if k not in done]
    say(
        f"capfilt: {sum(lengths.values())} records of {len(lengths)} sources in {len(plan)} shards, {len(done)} finished; "
        f"process {process} of {processes} makes {len(todo)} on {len(jax.local_devices())} devices of kind "
        f"{jax.local_devices()[0].device_kind}; captioner {captioner.folder}, filter {judge.folder}; output in {out}"
    )
    stopped = False
    if todo:
        data = Records(cfg, sources, plan, todo, (captioner.model.img_size, judge.model.img_size))
        with contextlib.closing(_decided(cfg, data, captioner, judge, tokenizer)) as stream:
            stopped = _write(cfg, stream, plan, todo, keys, out, process)
    done = finished(out, len(plan))
    if stopped or len(done) < len(plan):
        what = "stopped by a signal; the unfinished shard is dropped" if stopped else "process finished"
        say(f"capfilt: {what}; {len(done)} of {len(plan)} shards are finished; run again to go on")
        return {"stopped": stopped, "finished": len(done), "shards": len(plan)}
    return summary.finish(out, len(plan), cfg.threshold)


class Devices:
    """The local devices: programs that run on each of them alone, on its part of a batch, with parameters kept
    whole."""

    def __init__(self):
        local = jax.local_devices()
        self._mesh = jax.make_mesh((len(local),), ("data",), devices=local, axis_types=(jax.sharding.AxisType.Auto,))
        self.count = len(local)

    def whole(self, tree) -> Any:
        """Arrays that every device holds."""
        return jax.device_put(tree, NamedSharding(self._mesh, P()))

    def split(self, rows: np.ndarray) -> jax.Array:
        """An array whose rows are shared out."""
        return jax.device_put(rows, NamedSharding(self._mesh, P("data")))

    def compiled(self, function):
        """`function(params, *arrays)` of rows, for arrays from `whole` and `split`; no device waits for another."""
        return jax.jit(
            lambda params, *rows: jax.shard_map(
                function,
                mesh=self._mesh,
                in_specs=(P(), *(P("data") for _ in rows)),
                out_specs=P("data"),
                check_vma=False,
            )(params, *rows)
        )


def _decided(cfg, data: Records, captioner: settings.Part, judge: settings.Part, tokenizer: Tokenizer) -> Iterator:
    """(Batch, rows of the decision table of each of its examples). The device works a batch ahead of the host's
    share."""
    devices, method = Devices(), settings.method_of(cfg)
    make = devices.compiled(caption.captioner(captioner.model, tokenizer, cfg.text.prompt, method))
    view = devices.compiled(viewer(judge.model))
    score = devices.compiled(scorer(judge.model))
    caption_params = devices.whole(rounded(captioner.params, captioner.model.dtype))
    filter_params = (
        caption_params if judge.params is captioner.params else devices.whole(rounded(judge.params, judge.model.dtype))
    )
    size, prompt_len = cfg.device_batch * devices.count, len(caption.prompt_ids(tokenizer, cfg.text.prompt))

    def captioned(batches):
        for batch in batches:
            img = {
                s: devices.split(_filled([e.get("img", {}).get(s) for e in batch.examples], size, (s, s, 3), np.uint8))
                for s in data.img_sizes
            }
            keys = _filled([caption.example_key(e["key"], cfg.seed) for e in batch.examples], size, (2,), np.uint32)
            yield (
                batch,
                (
                    make(caption_params, img[captioner.model.img_size], devices.split(keys)),
                    view(filter_params, img[judge.model.img_size]),
                ),
            )

    def scored(batches):
        for batch, (made, seen) in _one_behind(batches):
            rows = _texts(batch, jax.device_get(made), tokenizer, prompt_len, cfg.text.max_words)
            width = 1 + method.n
            passes = _passes(rows, size, width)
            yield (
                batch,
                (
                    rows,
                    passes,
                    [
                        score(
                            filter_params, seen, *map(devices.split, _encoded(tokenizer, texts, width, judge.max_len))
                        )
                        for texts in passes
                    ],
                ),
            )

    with contextlib.closing(data.batches(size)) as batches:
        for batch, (rows, passes, scores) in _one_behind(scored(captioned(batches))):
            found = _by_text(len(rows), passes, jax.device_get(scores))
            yield (
                batch,
                [
                    _judged(example, own, by_text, cfg.threshold)
                    for example, own, by_text in zip(batch.examples, rows, found)
                ],
            )


def _one_behind(items: Iterator) -> Iterator:
    """Each item once the next has been started on the device."""
    waiting = None
    for item in items:
        if waiting is not None:
            yield waiting
        waiting = item
    if waiting is not None:
        yield waiting


def _filled(rows: list, size: int, shape: tuple, dtype) -> np.ndarray:
    """`rows` as [size, *shape]; zeros where there is none."""
    out = np.zeros((size, *shape), dtype)
    for i, row in enumerate(rows):
        if row is not None:
            out[i] = row
    return out


def _texts(batch: Batch, made: dict, tokenizer: Tokenizer, prompt_len: int, max_words: int) -> list[list[Row]]:
    """Rows, not scored yet, of every example: its web texts, then its synthetic ones. Unreadable ones have none."""
    out = []
    for example, ids, log_probs in zip(batch.examples, made["ids"], made["log_prob"]):
        if example["reason"]:
            out.append([])
            continue
        place = (example["key"], example["dataset"], example["record"])
        new = [clean_caption(caption.text_of(tokenizer, row, prompt_len), max_words) for row in ids]
        out.append(
            [Row(*place, web, "web") for web in example["texts"]]
            + [Row(*place, own, "synthetic", log_prob=float(p)) for own, p in zip(new, log_probs)]
        )
    return out


def _passes(rows: list[list[Row]], size: int, width: int) -> list[list[list[str]]]:
    """The different texts of each of `size` images, cut into passes of `width` an image: [passes][size][at most
    width]."""
    different = [list(dict.fromkeys(row.text for row in of_one if row.text)) for of_one in rows]
    count = max((-(-len(texts) // width) for texts in different), default=0)
    different += [[] for _ in range(size - len(rows))]
    return [[texts[n * width : (n + 1) * width] for texts in different] for n in range(count)]


def _encoded(tokenizer: Tokenizer, texts: list[list[str]], width: int, max_len: int) -> list[np.ndarray]:
    """ids i32[B,G,T] and mask bool[B,G,T] of at most `width` = G texts of each image; an empty text where there is
    none."""
    ids, mask = tokenizer.encode([t for own in texts for t in own + [""] * (width - len(own))], max_len)
    return [x.reshape(len(texts), width, max_len) for x in (ids, mask)]


def _by_text(images: int, passes: list, scores: list[dict]) -> list[dict[str, tuple[float, float]]]:
    """Of each of the first `images`, text -> (itm, itc)."""
    out: list[dict] = [{} for _ in range(images)]
    for texts, found in zip(passes, scores):
        for own, names, itm, itc in zip(out, texts, found["itm"], found["itc"]):
            own.update(zip(names, zip(itm.tolist(), itc.tolist())))
    return out


def _judged(example: dict, rows: list[Row], by_text: dict, threshold: float) -> list[Row]:
    if example["reason"]:
        return decisions.unreadable(
            example["key"], example["dataset"], example["record"], example["texts"], example["reason"]
        )
    scored = (row._replace(itm=by_text[row.text][0], itc=by_text[row.text][1]) if row.text else row for row in rows)
    return decisions.judge(scored, threshold)


def _write(cfg, stream, plan: Plan, todo: list[int], keys: Keys, out: pathlib.Path, process: int) -> bool:
    """Writes the shards of the stream, each as it ends; whether a signal stopped it before the last."""
    with writing("the list of unreadable records", out):
        ledger = pipeline.Ledger(out / f"skipped{f'-p{process}' if process else ''}.jsonl", cfg.data.max_bad_share)
    progress, writer = Progress(sum(len(plan.span(k)) for k in todo)), None
    with Interrupt("finishing this batch, then stopping") as interrupt:
        try:
            for batch, rows in stream:
                writer = writer or ShardWriter(out, batch.shard)
                with writing("the list of unreadable records", out):
                    ledger.add(len(rows), [event for e in batch.examples for event in e["events"]])
                for example, own in zip(batch.examples, rows):
                    writer.add(example["fields"], own)
                if batch.last:
                    keys.add(batch.shard, ((row.key, row.dataset, row.record, row.reason) for row in writer.rows))
                    writer.commit()
                    writer = None
                progress.add(rows)
                if interrupt.asked and not (batch.last and batch.shard == todo[-1]):
                    return True
        finally:
            if writer is not None:
                writer.drop()
    return False


class Progress:
    """Lines of progress: images, images/s, time left, and the share of each source's texts that is noise."""

    def __init__(self, total: int):
        self._total, self._done, self._said = total, 0, time.monotonic()
        self._since, self._first = None, 0
        self._texts = {source: [0, 0] for source in decisions.SOURCES}  # all but repetitions, noise

    def add(self, rows: list[list[Row]]) -> None:
        """Takes in a batch. The first one, which waited for the compiler, does not count for images/s."""
        now, self._done = time.monotonic(), self._done + len(rows)
        for row in (
            row for own in rows for row in own if row.reason != REPEATED and not row.reason.startswith(UNREADABLE)
        ):
            self._texts[row.source][0] += 1
            self._texts[row.source][1] += row.reason in (BELOW, EMPTY)
        if self._since is None:
            self._since, self._first = now, self._done
        if now - self._said >= PROGRESS_SECONDS or self._done == self._total:
            self._said = now
            say(self._line(now))

    def _line(self, now: float) -> str:
        noise = ", ".join(f"{source} {100 * lost / max(n, 1):.1f} %" for source, (n, lost) in self._texts.items())
        timing = ""
        if self._done > self._first:
            rate = (self._done - self._first) / (now - self._since)
            left = int((self._total - self._done) / rate)
            timing = f"  {rate:.1f} images/s  eta {left // 3600}:{left % 3600 // 60:02}:{left % 60:02}"
        return f"capfilt: {self._done}/{self._total} images{timing}  noise so far: {noise}"
