"""The CapFilt run (paper, section 3.3): any source in; decisions on all texts, and shards to train on, out.

Every web text and every synthetic text gets a decision.

Work is cut by shard of the output; shard k belongs to process k % processes. Processes never talk to each other, but
for a look at the settings where JAX has joined them. Each drives its local devices, which hold the parameters whole, or
in groups of mesh.fsdp * mesh.tensor. Row r of a shard always meets the program at place r % device_batch of a device's
batch (r % (device_batch * mesh.fsdp) of a group's), with the same shapes, so neither the number of devices or groups
nor that of processes changes a byte.
"""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from blip_jax import buckets, lock
from blip_jax.capfilt import decisions, settings, summary
from blip_jax.capfilt.decisions import BELOW, EMPTY, REPEATED, UNREADABLE, Row
from blip_jax.capfilt.input import Batch, Records
from blip_jax.capfilt.shards import Keys, Plan, ShardWriter, finished, writing
from blip_jax.config import text_side
from blip_jax.console import say
from blip_jax.data.batches import open_all
from blip_jax.data.ledger import Ledger
from blip_jax.data.text.clean import clean_caption
from blip_jax.inference import language, programs
from blip_jax.inference.batching import Runner, alone, behind, placed
from blip_jax.inference.load import Loaded, checksum, load, place
from blip_jax.models.blip2_llm import Blip2Llm
from blip_jax.parallel import sharding
from blip_jax.parallel.interrupt import Interrupt, Stopped, check
from blip_jax.parallel.processes import agree, holding

PROGRESS_SECONDS = 5.0  # between two lines of progress


def run(cfg, out, process: int | None = None, processes: int | None = None) -> dict:
    """Captions and filters all records of `cfg.data.sources` into the folder `out`, or goes on with what it holds.

    cfg: of config.capfilt; process, processes: this one and how many there are, by default JAX's. Every process is
    called with the same cfg and `out`, which all of them see; one that dies is replaced by calling again, with any
    number. SIGTERM, or SIGINT once, ends after the batch and drops the unfinished shard. No two runs, and no two
    processes of one number, work in one `out` at once (`lock`). Returns the summary
    (capfilt/summary.py), also in out/summary.json, once all shards are finished; before that {"stopped": whether by a
    signal, "finished": shards, "shards": of so many}, without the numbers where the signal came before the first batch.
    ValueError: settings, checkpoints or data do not fit, or `out` was begun with others. OSError: `out` cannot be
      written.
    """
    out = buckets.of(out, "out")
    settings.validate(cfg)
    process = jax.process_index() if process is None else process
    processes = jax.process_count() if processes is None else processes
    if not 0 <= process < processes:
        raise ValueError(f"process={process} of processes={processes}: processes are numbered from 0")
    try:
        with Interrupt() as stop, contextlib.ExitStack() as stack:
            return _run(cfg, out, process, processes, stop, stack)
    except Stopped:
        say("capfilt: stopped by a signal; nothing unfinished is kept; run again to go on")
        return {"stopped": True}


def _run(cfg, out: pathlib.Path, process: int, processes: int, stop: Interrupt, stack: contextlib.ExitStack) -> dict:
    captioner, judge = models(cfg)
    mesh = _mesh(cfg)
    sources = open_all(cfg.data.sources, texts=False)
    lengths = {name: len(source) for name, source in sources.items()}

    # nothing is made for an `out` that holds a run with other settings, or that the processes do not share
    record = settings.on_record(cfg, _record(captioner, judge), _record(judge), judge.tokenizer.crc, lengths)
    with writing("the settings", out):
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(holding(lock.held(out, lock.Share(process, processes)), each=True))
        stack.callback(buckets.settle)
        agree(cfg, out, captioner=record["captioner"], filter=record["filter"], records=lengths)
        settings.settle(out, record)

    # what is left to do here: this process's shards but for the finished ones, whose keys are taken
    plan = Plan(lengths, cfg.shard_examples)
    done, keys = set(finished(out, len(plan))), Keys(out)
    todo = [k for k in range(process, len(plan), processes) if k not in done]
    if todo:  # else the summary looks at them
        keys.add_finished(sorted(done))
    say(
        f"capfilt: {sum(lengths.values())} records of {len(lengths)} sources in {len(plan)} shards, {len(done)} "
        f"finished; process {process} of {processes} makes {len(todo)} on {mesh.size} devices of kind "
        f"{mesh.devices.flat[0].device_kind}; captioner {captioner.origin}, filter {judge.origin}; output in {out}"
    )

    stopped = False
    if todo:
        data = Records(cfg, sources, plan, todo, (captioner.model.img_size, judge.model.img_size))
        devices = Devices(cfg, mesh, captioner, judge)
        with contextlib.closing(_decided(cfg, data, devices, captioner.tokenizer)) as stream:
            stopped = _write(cfg, stream, plan, todo, keys, out, process, stop)

    done = finished(out, len(plan))
    if stopped or len(done) < len(plan):
        what = "stopped by a signal; the unfinished shard is dropped" if stopped else "process finished"
        say(f"capfilt: {what}; {len(done)} of {len(plan)} shards are finished; run again to go on")
        return {"stopped": stopped, "finished": len(done), "shards": len(plan)}
    return summary.finish(out, len(plan), cfg.threshold)


def models(cfg) -> tuple[Loaded, Loaded]:
    """Captioner and filter of a CapFilt config, on the host; one and the same where their checkpoints are.

    ValueError: a checkpoint that cannot be read or cannot do its work, vocabularies that differ, a prompt without room
      behind it.
    """
    captioner = load(cfg.captioner, dtype=cfg.dtype, vocab=cfg.text.captioner_vocab or cfg.text.vocab)
    same = place(cfg.filter) == captioner.origin
    judge = captioner if same else load(cfg.filter, dtype=cfg.dtype, vocab=cfg.text.vocab)
    captioner.require("generate" if _is_language_model(captioner) else "caption", "captioner")
    judge.require("match", "filter")

    tokenizer = captioner.tokenizer
    if not _is_language_model(captioner) and tokenizer.crc != judge.tokenizer.crc:
        raise ValueError(
            f"captioner and filter have different vocabularies, {tokenizer.path} and {judge.tokenizer.path}: fine-tune "
            "both from the same pre-training"
        )
    if captioner.cfg.text.prompt.strip() != cfg.text.prompt.strip():
        say(
            f"capfilt: captions continue text.prompt={cfg.text.prompt!r}; the captioner was trained with "
            f"{captioner.cfg.text.prompt!r}"
        )

    if _is_language_model(captioner):
        try:
            language.prompt_ids(captioner.model, tokenizer, [cfg.text.prompt.strip()], cfg.method.max_length)
        except ValueError as e:
            raise ValueError(f"text.prompt={cfg.text.prompt!r} and method.max_length do not fit: {e}") from None
        return captioner, judge
    prompt, method = len(programs.prompt_ids(tokenizer, cfg.text.prompt)), cfg.method
    room = text_side(captioner.cfg.model).positions
    if not prompt < method.max_length <= room:
        raise ValueError(
            f"method.max_length is {method.max_length}: it must be more than the {prompt} tokens of text.prompt "
            f"with [DEC], and at most the captioner's {room} positions"
        )
    return captioner, judge


def _is_language_model(captioner: Loaded) -> bool:
    return isinstance(captioner.model, Blip2Llm)


def _record(model: Loaded, beside: Loaded | None = None) -> dict:
    """What `settings.on_record` says of a model, of which the words are said where they are not those of `beside`."""
    words = {}
    if beside is not None and model.tokenizer.crc != beside.tokenizer.crc:
        words = {"vocabulary": model.tokenizer.crc}
    return {"path": model.origin, "crc32": checksum(model.params), **words}


def _mesh(cfg) -> Mesh:
    """The local devices, in groups of mesh.fsdp * mesh.tensor. ValueError: these do not divide their number."""
    devices, group = jax.local_devices(), cfg.mesh.fsdp * cfg.mesh.tensor
    if len(devices) % group:
        raise ValueError(
            f"mesh.fsdp * mesh.tensor is {cfg.mesh.fsdp} * {cfg.mesh.tensor}: it must divide the {len(devices)} "
            "devices here"
        )
    shape = len(devices) // group, cfg.mesh.fsdp, cfg.mesh.tensor
    return Mesh(np.asarray(devices).reshape(shape), sharding.MESH, axis_types=(AxisType.Auto,) * 3)


class Devices:
    """Both models on the devices of a mesh, whose places on the data axis work alone, each on its part of a batch."""

    def __init__(self, cfg, mesh: Mesh, captioner: Loaded, judge: Loaded):
        self._run, self._seed, self._judge, self._captioner = Runner(mesh), cfg.seed, judge, captioner
        self.size = cfg.device_batch * self._run.unit  # pictures of a batch
        self.width = 1 + cfg.method.n  # texts of a picture in a pass of the filter

        if _is_language_model(captioner):  # whose texts have a start id before them, but no prompt
            how, prompt, self.prompt_len = settings.method_of_language_model(cfg), cfg.text.prompt.strip(), 1
            caption = language.captioner(captioner.model, captioner.tokenizer, prompt, how)
        else:
            how, prompt = settings.method_of(cfg), cfg.text.prompt
            self.prompt_len = len(programs.prompt_ids(captioner.tokenizer, prompt))
            caption = programs.captioner(captioner.model, captioner.tokenizer, prompt, how)
        view = programs.view(judge.model, "kv", "img_emb")
        seen = {name: programs.VIEW_ROWS[name] for name in ("kv", "img_emb")}
        self._caption = jax.jit(alone(caption, mesh, (0, 0), 0))
        self._view = jax.jit(alone(view, mesh, (0,), seen))
        self._score = jax.jit(alone(programs.score(judge.model), mesh, (seen, 0, 0), 0))
        self._params = placed(captioner.params, mesh, captioner.cfg.model.dtype)
        self._judge_params = self._params if judge is captioner else placed(judge.params, mesh, judge.cfg.model.dtype)

    def begin(self, examples: list[dict]) -> tuple[Any, Any]:
        """(captions, what the filter sees) of the pictures of a batch; neither is waited for."""
        keys = self._put(np.stack([programs.example_key(e["key"], self._seed) for e in examples]))
        made = self._caption(self._params, self._pixels(examples, self._captioner.model.img_size), keys)
        return made, self._view(self._judge_params, self._pixels(examples, self._judge.model.img_size))

    def score(self, seen, texts: list[list[str]]):
        """{"itm", "itc"} f32[size,width] of at most `width` texts of each picture; not waited for.

        seen: what `begin` gave of these pictures for the filter.
        """
        rows = [t for own in texts for t in own + [""] * (self.width - len(own))]
        ids, txt_mask = self._judge.tokenizer.encode(rows, self._judge.cfg.text.max_len)
        ids = self._put(ids.reshape(len(texts), self.width, -1))
        txt_mask = self._put(txt_mask.reshape(len(texts), self.width, -1))
        return self._score(self._judge_params, seen, ids, txt_mask)

    def _pixels(self, examples: list[dict], size: int) -> jax.Array:
        none = np.zeros((size, size, 3), np.uint8)  # of one that cannot be used
        return self._put(np.stack([e["img"][size] if "img" in e else none for e in examples]))

    def _put(self, rows: np.ndarray) -> jax.Array:
        return self._run.put(rows, self.size)


def _decided(cfg, data: Records, devices: Devices, tokenizer) -> Iterator:
    """(Batch, rows of the decision table of each of its examples), batch by batch.

    Three streams, each of which takes from the one before: `begun`, batches that the devices caption and view;
    `scored`, captions turned into text and given to the devices to score; and what is yielded, scores turned into
    decisions. The host waits for results at the start of the last two, so each goes through `behind`: by the time a
    batch is waited for, the devices have the next batch's work and do not stand still while the host does its share.
    Between two pieces of work a signal ends it (Stopped).
    """

    def begun(batches):
        for batch in batches:
            made, seen = devices.begin(batch.examples)
            yield batch, made, seen
            check()

    def scored(begun):
        for batch, made, seen in behind(begun):
            rows = _texts(batch, jax.device_get(made), tokenizer, devices.prompt_len, cfg.text.max_words)
            passes = _passes(rows, devices.width)
            scores = [devices.score(seen, texts) for texts in passes]
            yield batch, rows, passes, scores
            check()

    with contextlib.closing(data.batches(devices.size)) as batches:
        for batch, rows, passes, scores in behind(scored(begun(batches))):
            found = _by_text(len(rows), passes, jax.device_get(scores))
            decided = [
                _judged(example, own, by_text, cfg.threshold)
                for example, own, by_text in zip(batch.examples, rows, found)
            ]
            yield batch, decided


def _texts(batch: Batch, made: dict, tokenizer, prompt_len: int, max_words: int) -> list[list[Row]]:
    """Rows, not scored yet, of every example: its web texts, then its synthetic ones. Unreadable ones have none."""
    out = []
    for example, ids, log_probs in zip(batch.examples, made["ids"], made["log_prob"]):
        if example["reason"]:
            out.append([])
            continue
        place = (example["key"], example["dataset"], example["record"])
        new = [clean_caption(programs.text_of(tokenizer, row, prompt_len), max_words) for row in ids]
        out.append(
            [Row(*place, web, "web") for web in example["texts"]]
            + [Row(*place, own, "synthetic", log_prob=float(p)) for own, p in zip(new, log_probs)]
        )
    return out


def _passes(rows: list[list[Row]], width: int) -> list[list[list[str]]]:
    """The different texts of each image, cut into passes of `width` an image: [passes][images][at most width]."""
    different = [list(dict.fromkeys(row.text for row in of_one if row.text)) for of_one in rows]
    count = max((-(-len(texts) // width) for texts in different), default=0)
    return [[texts[n * width : (n + 1) * width] for texts in different] for n in range(count)]


def _by_text(images: int, passes: list, scores: list[dict]) -> list[dict[str, tuple[float, float]]]:
    """Of each of the first `images`, text -> (itm, itc)."""
    out: list[dict] = [{} for _ in range(images)]
    for texts, found in zip(passes, scores):
        for own, names, itm, itc in zip(out, texts, found["itm"], found["itc"]):
            own.update(zip(names, zip(itm.tolist(), itc.tolist())))
    return out


def _judged(example: dict, rows: list[Row], by_text: dict, threshold: float) -> list[Row]:
    """The decisions on an example's texts; by_text: as in `_by_text`."""
    if example["reason"]:
        return decisions.unreadable(
            example["key"], example["dataset"], example["record"], example["texts"], example["reason"]
        )

    scored = []
    for row in rows:
        if row.text:  # an empty one was not scored
            itm, itc = by_text[row.text]
            row = row._replace(itm=itm, itc=itc)
        scored.append(row)
    return decisions.judge(scored, threshold)


def _write(
    cfg, stream, plan: Plan, todo: list[int], keys: Keys, out: pathlib.Path, process: int, stop: Interrupt
) -> bool:
    """Writes the shards of the stream, each as it ends; whether a signal stopped it before the last."""
    with writing("the list of unreadable records", out):
        path = buckets.staged(out / f"skipped{f'-p{process}' if process else ''}.jsonl")
        ledger = Ledger(path, cfg.data.max_bad_share)
    progress = Progress(sum(len(plan.span(k)) for k in todo))
    writer = None  # of the shard that is being made
    with stop.deferred("finishing this batch, then stopping"):
        try:
            for batch, rows in stream:
                writer = writer or ShardWriter(out, batch.shard)
                with writing("the list of unreadable records", out):
                    ledger.add(len(rows), [event for e in batch.examples for event in e["events"]])
                for example, own in zip(batch.examples, rows):
                    writer.add(example["fields"], own)

                if batch.last:
                    keys.add(batch.shard, ((row.key, row.dataset, row.record, row.reason) for row in writer.rows))
                    with writing("the list of unreadable records", out):
                        buckets.sync()  # first: records of a finished shard are not read again
                    writer.commit()
                    writer = None
                progress.add(rows)

                if stop.asked and not (batch.last and batch.shard == todo[-1]):
                    return True
        except Stopped:
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
        now = time.monotonic()
        self._done += len(rows)
        for row in itertools.chain.from_iterable(rows):
            if row.reason != REPEATED and not row.reason.startswith(UNREADABLE):
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
