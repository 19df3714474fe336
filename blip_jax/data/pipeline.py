"""Batches: a weighted, shuffled mixture of sources for training, and retrieval evaluation data; decoding in threads.

The order of training is a pure function of the seed, the sources and the global example number i = step * B + position,
and so is what happens to an example: its random stream is Philox(seed, i). Nothing is remembered between steps, hence
the step number is the whole iterator state, and any number of processes sees the same global batches.

What goes wrong is data too. A record that cannot be used is replaced by another of its source, drawn from the example's
own stream; it is counted by reason, and named once in skipped.jsonl as {source, key, reason, used: false}. A record
that is irregular but used (16-bit or animated picture, below 8x8, aspect ratio above 20, NUL or broken characters, a
caption of more than 10 times text.max_words words) is noted there with used: true, and counted apart. Counting happens
when a batch is delivered, so that it does not depend on threads.
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import pathlib
import sys
from collections.abc import Iterator

import grain
import numpy as np
from ml_collections import ConfigDict

from blip_jax.data import image, text
from blip_jax.data.records import BadRecord, Source, open_source

log = logging.getLogger(__name__)

TRIES = 100  # records tried for one example before its source counts as unusable
ENOUGH = 100  # records tried before max_bad_share can stop a run


class Ledger:
    """Counts of records read, skipped and noted, and the skipped.jsonl file, to which each record is written once."""

    def __init__(self, path, max_bad_share: float):
        self.path, self.max_bad_share = pathlib.Path(path), max_bad_share
        self.read, self.skipped, self.noted = 0, collections.Counter(), collections.Counter()
        self._written: set[int] = set()
        self._torn = False  # a killed run may have left half a line
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace")
            self._torn = bool(lines) and not lines.endswith("\n")
            for line in lines.splitlines():
                try:
                    row = json.loads(line)
                    self._written.add(_event(row["source"], row["key"], row["reason"], row["used"]))
                except (ValueError, TypeError, KeyError):
                    continue  # the half line: its record is written again when it is met

    def add(self, read: int, events: list[tuple[str, str, str, bool]]) -> None:
        """Takes in records tried and their events (source, key, reason, used). ValueError: too many are unusable."""
        self.read += read
        rows = []
        for source, key, reason, used in events:
            (self.noted if used else self.skipped)[reason.split(":")[0]] += 1
            if (name := _event(source, key, reason, used)) not in self._written:
                self._written.add(name)
                rows.append(json.dumps({"source": source, "key": key, "reason": reason, "used": used}) + "\n")
        if rows:
            with self.path.open("a", encoding="utf-8") as f:
                f.write("\n" * self._torn + "".join(rows))
            self._torn = False
        self.check()

    def check(self) -> None:
        bad = self.skipped.total()
        if self.read >= ENOUGH and bad > self.max_bad_share * self.read:
            worst = ", ".join(f"{reason} ({n})" for reason, n in self.skipped.most_common(3))
            raise ValueError(
                f"{bad} of {self.read} records read ({100 * bad / self.read:.1f} %) cannot be used, more than "
                f"data.max_bad_share={self.max_bad_share:g} allows. Commonest: {worst}. They are named in "
                f"{self.path}: repair the data, or raise data.max_bad_share"
            )

    def counts(self) -> dict:
        return {"read": self.read, "skipped": dict(self.skipped), "noted": dict(self.noted)}


def _event(source: str, key: str, reason: str, used: bool) -> int:
    """What is written once: a bad record, or one note of a used one. A number, as there may be millions."""
    return hash((source, key, reason if used else None))


def _open_all(sources) -> dict[str, Source]:
    if not len(sources):
        raise ValueError("no data source: add one to the config, such as c.data.train.web = source('json', 'web.json')")
    return {name: open_source(name, s) if isinstance(s, ConfigDict) else s for name, s in sorted(sources.items())}


def _captions(record: dict, max_words: int) -> tuple[list[str], list[str]]:
    """The non-empty cleaned captions of a record, and notes. BadRecord when there is none."""
    out, notes = [], []
    for caption in record["captions"]:
        caption, found = text.plain_text(caption)
        notes += found
        if caption.count(" ") > 10 * max_words:
            notes.append(f"long caption, cut to {max_words} words")
        out.append(text.clean_caption(caption, max_words))
    out = [c for c in out if any(letter.isprintable() and not letter.isspace() for letter in c)]
    if not out:
        raise BadRecord(record["key"], "empty caption")
    return out, list(dict.fromkeys(notes))


def _decode(record: dict, max_pixels: int):
    try:
        return image.decode(record["image"], max_pixels)
    except image.BadImage as e:
        raise BadRecord(record["key"], str(e)) from None


def _threads(ds, cfg, ahead: int):
    """Iterator over a grain MapDataset, computed up to `ahead` elements ahead by cfg.data.threads threads."""
    n = cfg.data.threads
    return iter(ds.to_iter_dataset(grain.ReadOptions(num_threads=n, prefetch_buffer_size=max(ahead, n) if n else 0)))


class TrainData:
    """Training batches of the weighted mixture cfg.data.train, for process `process_index` of `process_count`.

    Attributes: sources, name -> Source; epoch_examples, examples of one epoch (cfg.data.epoch_examples, else the sum
    over the sources). Within a source, any len(source) examples from a multiple of it cover each record once, in an
    order that is new for every epoch. Raises ValueError for a wrong source, weights that are not positive, and a batch
    that does not divide.
    """

    def __init__(self, cfg, tokenizer, *, process_index: int, process_count: int, skipped_path):
        self.cfg, self.tokenizer = cfg, tokenizer
        batch, micro = cfg.train.batch, cfg.optim.accumulate
        if batch < 1 or micro < 1 or batch % (micro * process_count):
            raise ValueError(
                f"train.batch={batch} does not divide into optim.accumulate={micro} micro-batches on {process_count} "
                f"processes: make it a multiple of {max(micro, 1) * process_count}"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} is not below process_count={process_count}")
        self.local_batch = batch // process_count
        self._part = batch // (micro * process_count)  # of this process in a micro-batch
        self._first = process_index * self._part
        self.sources = _open_all(cfg.data.train)
        self.epoch_examples = cfg.data.epoch_examples or sum(map(len, self.sources.values()))
        self._prompt_len = _prompt_len(cfg, tokenizer)
        self._order = _mixture(cfg, self.sources)
        self._ledger = Ledger(skipped_path, cfg.data.max_bad_share)

    def batches(self, start_step: int = 0) -> Batches:
        """Iterator over the local batches of steps start_step, start_step + 1, ...; decoding begins at once. Close it.

        {"img": u8[b,H,W,3], "ids": i32[b,T], "txt_mask": bool[b,T], "lm_mask": bool[b,T], "image_id": i64[b], "key": list
        of str}; b = B / processes. Texts begin with cfg.text.prompt; lm_mask is txt_mask without [CLS] and the prompt.
        Raises ValueError when more than data.max_bad_share of at least 100 records are unusable.
        """
        local = grain.MapDataset.range(start_step * self.local_batch, sys.maxsize).map(self._global).map(self.example)
        return Batches(
            _threads(local, self.cfg, self.cfg.data.prefetch * self.local_batch), self.local_batch, self._ledger
        )

    def counts(self) -> dict:
        """{"read": records tried, "skipped": {reason: n}, "noted": {reason: n}} over the batches delivered."""
        return self._ledger.counts()

    def _global(self, j: int) -> int:
        """Number in the global order of this process's example `j`."""
        step, position = divmod(j, self.local_batch)
        micro, offset = divmod(position, self._part)
        size = self.cfg.train.batch // self.cfg.optim.accumulate
        return step * self.cfg.train.batch + micro * size + self._first + offset

    def example(self, i: int) -> dict:
        """Global example `i`: one row of a batch, and what the ledger takes in ("read", "events")."""
        name, r = self._order[i]
        source, events = self.sources[name], []
        rng = np.random.Generator(np.random.Philox(key=np.array([self.cfg.seed, i], np.uint64)))
        for tried in range(1, TRIES + 1):
            try:
                row, key, notes = self._read(name, source[r], rng)
            except BadRecord as e:
                events.append((name, e.key, e.reason, False))
                r = int(rng.integers(len(source)))
                continue
            events += [(name, key, note, True) for note in notes]
            return {**row, "read": tried, "events": events}
        return {"read": TRIES, "events": events}

    def _read(self, name: str, record: dict, rng: np.random.Generator) -> tuple[dict, str, list[str]]:
        cfg = self.cfg
        captions, notes = _captions(record, cfg.text.max_words)
        picture, found = _decode(record, cfg.data.max_pixels)
        caption = captions[int(rng.integers(len(captions)))]
        img = image.train_transform(
            picture,
            cfg.model.img_size,
            rng,
            scale=cfg.data.crop_scale,
            flip=cfg.data.flip,
            randaugment=cfg.data.randaugment,
        )
        ids, mask = self.tokenizer.encode([cfg.text.prompt + caption], cfg.text.max_len)
        row = {
            "img": img,
            "ids": ids[0],
            "txt_mask": mask[0],
            "lm_mask": mask[0] & (np.arange(cfg.text.max_len) >= self._prompt_len),
            "image_id": _number(name, record["image_id"]),
            "key": record["key"],
        }
        return row, record["key"], found + notes


def _prompt_len(cfg, tokenizer) -> int:
    """Positions of [CLS] and cfg.text.prompt. ValueError: none would be left for a word and [SEP]."""
    prompt, T = cfg.text.prompt, cfg.text.max_len
    n = int(tokenizer.encode([prompt], len(prompt) + 2)[1].sum()) - 1
    if n + 2 > T:
        raise ValueError(f"text.prompt={prompt!r} takes {n} of text.max_len={T} positions with [CLS], so that no word fits "
                         f"before [SEP]: set text.max_len to {n + 2} at the very least, or shorten the prompt")
    return n


def _mixture(cfg, sources: dict[str, Source]):
    """MapDataset over global example numbers -> (source name, record number)."""
    weights = {name: cfg.data.train[name].weight for name in sources}
    wrong = {name: w for name, w in weights.items() if not w > 0}
    if wrong:
        raise ValueError(f"data.train weights must be above 0, got {wrong}: remove a source that is not wanted")
    parts = []
    for name, source in sources.items():
        seed = int.from_bytes(hashlib.blake2b(f"{cfg.seed} {name}".encode(), digest_size=4).digest(), "little")
        order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
        parts.append(order.map(lambda r, name=name: (name, r)))
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, list(weights.values()))


def _number(source: str, image_id: str) -> int:
    """A stable i64 for an image: the same image of the same source has the same number in every run."""
    name = f"{source}\0{image_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


class Batches:
    """Iterator of batches over an iterator of examples; a context manager, or `close()`, ends its threads."""

    def __init__(self, examples, size: int, ledger: Ledger):
        self._examples, self._size, self._ledger = examples, size, ledger
        examples.start_prefetch()

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict:
        rows = [next(self._examples) for _ in range(self._size)]
        self._ledger.add(sum(r["read"] for r in rows), [e for r in rows for e in r["events"]])
        for r in rows:
            if "img" not in r:
                raise ValueError(
                    f"{TRIES} records in a row of source {r['events'][0][0]!r} cannot be used, the last because of "
                    f"{r['events'][-1][2]!r}; they are named in {self._ledger.path}: repair or remove the source"
                )
        batch = {k: np.stack([r[k] for r in rows]) for k in ("img", "ids", "txt_mask", "lm_mask")}
        return {**batch, "image_id": np.array([r["image_id"] for r in rows], np.int64), "key": [r["key"] for r in rows]}

    def close(self) -> None:
        self._examples.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class EvalData:
    """Every picture and every caption of `sources` (name -> config.source, or an open Source), for retrieval
    evaluation.

    Each record is one image (the first cfg.eval.limit ones, if set) and all its captions count. Attributes: captions,
    list of cleaned str; text_image i64[n_text], the image of each; n_images. A record without a usable caption or file
    is left out here; a picture that turns out undecodable later has index -1 in `image_batches`. Both are counted and
    named as in training, and too many raise ValueError, as does a source that leaves no image at all.
    """

    def __init__(self, cfg, tokenizer, sources, *, skipped_path):
        self.cfg, self.sources = cfg, _open_all(sources)
        self._ledger = Ledger(skipped_path, cfg.data.max_bad_share)
        self._where: list[tuple[str, int]] = []
        self.captions: list[str] = []
        text_image: list[int] = []
        for name, r in ((name, r) for name, source in self.sources.items() for r in range(len(source))):
            if cfg.eval.limit and self.n_images == cfg.eval.limit:
                break
            try:
                record = self.sources[name][r]
                captions, notes = _captions(record, cfg.text.max_words)
            except BadRecord as e:
                self._ledger.add(1, [(name, e.key, e.reason, False)])
                continue
            self._ledger.add(1, [(name, record["key"], note, True) for note in notes])
            text_image += [self.n_images] * len(captions)
            self.captions += captions
            self._where.append((name, r))
        if not self._where:
            raise ValueError(
                f"evaluation: no record of {sorted(self.sources)} can be used: {dict(self._ledger.skipped)}; they are "
                f"named in {skipped_path}"
            )
        self.text_image = np.array(text_image, np.int64)
        self._reported: set[int] = set()

    @property
    def n_images(self) -> int:
        return len(self._where)

    def counts(self) -> dict:
        """{"read": records tried, "skipped": {reason: n}, "noted": {reason: n}}"""
        return self._ledger.counts()

    def image_batches(self, batch: int) -> Iterator[dict]:
        """{"img": u8[batch,H,W,3], "index": i64[batch]} in the order of images; -1: zeros, padding or unreadable."""
        size, n = self.cfg.model.img_size, self.n_images
        examples = _threads(grain.MapDataset.range(n).map(self._picture), self.cfg, self.cfg.data.prefetch * batch)
        try:
            for first in range(0, n, batch):
                img, index = np.zeros((batch, size, size, 3), np.uint8), np.full(batch, -1, np.int64)
                for i in range(first, min(first + batch, n)):
                    picture, events = next(examples)
                    if picture is not None:
                        img[i - first], index[i - first] = picture, i
                    if i not in self._reported:  # evaluation passes over the images again and again
                        self._ledger.add(0, events)
                        self._reported |= {i} if events else set()
                yield {"img": img, "index": index}
        finally:
            examples.close()

    def _picture(self, i: int):
        name, r = self._where[i]
        try:
            record = self.sources[name][r]
            picture, notes = _decode(record, self.cfg.data.max_pixels)
        except BadRecord as e:
            log.warning("evaluation: image %d (%s) of %s: %s", i, e.key, name, e.reason)
            return None, [(name, e.key, e.reason, False)]
        return image.eval_transform(picture, self.cfg.model.img_size), [
            (name, record["key"], note, True) for note in notes
        ]
