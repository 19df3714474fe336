"""Batches: a weighted, shuffled mixture of sources for training, and retrieval evaluation data; decoding in threads.

The order of training is a pure function of the seed, the sources and the global example number i = step * B + position,
and so is what happens to an example: its random stream is Philox(seed, i). Nothing is remembered between steps, hence
the step number is the whole iterator state, and any number of processes sees the same global batches.

What goes wrong is data too. A record that cannot be used is replaced by another of its source, drawn from the example's
own stream; it is counted by reason, and named once in skipped.jsonl as {source, key, reason, used: false}. A record
that is irregular but used (16-bit or animated picture, below 8x8, aspect ratio above 20, NUL or broken characters, a
caption of more than 10 times text.max_words words) is noted there with used: true, and counted apart. Counting happens
when a batch is delivered, so that it does not depend on threads.

With text.buckets, which examples form a step's batch follows from the lengths of their texts
(blip_jax/data/windows.py), so these are found beforehand from the captions alone. A record that replaces an unusable
one must then fit the
batch it comes into: records are drawn until one does, and after MISFITS long ones the next is cut, and noted.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator

import grain
import numpy as np
from ml_collections import ConfigDict

from blip_jax.data import image
from blip_jax.data.formats import open_source
from blip_jax.data.ledger import Ledger
from blip_jax.data.source import BadRecord, Source
from blip_jax.data.text.clean import clean_caption, plain_text
from blip_jax.data.windows import Windows

log = logging.getLogger(__name__)

TRIES = 100  # records tried for one example before its source counts as unusable
MISFITS = 20  # replacements too long for the batch, after which one is cut


def open_all(sources) -> dict[str, Source]:
    if not len(sources):
        raise ValueError("no data source: add one to the config, such as c.data.train.web = source('json', 'web.json')")
    return {name: open_source(name, s) if isinstance(s, ConfigDict) else s for name, s in sorted(sources.items())}


def cleaned_captions(record: dict, max_words: int) -> tuple[list[str], list[str]]:
    """The non-empty cleaned captions of a record, and notes. BadRecord when there is none."""
    out, notes = [], []
    for caption in record["captions"]:
        caption, found = plain_text(caption)
        notes += found
        if caption.count(" ") > 10 * max_words:
            notes.append(f"long caption, cut to {max_words} words")
        out.append(clean_caption(caption, max_words))
    out = [c for c in out if any(letter.isprintable() and not letter.isspace() for letter in c)]
    if not out:
        raise BadRecord(record["key"], "empty caption")
    return out, list(dict.fromkeys(notes))


def decode_image(record: dict, max_pixels: int):
    try:
        return image.decode(record["image"], max_pixels)
    except image.BadImage as e:
        raise BadRecord(record["key"], str(e)) from None


def in_threads(ds, cfg, ahead: int):
    """Iterator over a grain MapDataset, computed up to `ahead` elements ahead by cfg.data.threads threads."""
    n = cfg.data.threads
    return iter(ds.to_iter_dataset(grain.ReadOptions(num_threads=n, prefetch_buffer_size=max(ahead, n) if n else 0)))


class TrainData:
    """Training batches of the weighted mixture cfg.data.train, for process `process_index` of `process_count`.

    rows: positions i64, rising, in each micro-batch that this process makes; by default the part that has its number.
    Attributes: sources, name -> Source; epoch_examples, examples of one epoch (cfg.data.epoch_examples, else the sum
    over the sources). Within a source, any len(source) examples from a multiple of it cover each record once, in an
    order that is new for every epoch. Raises ValueError for a wrong source, weights that are not positive, and a batch
    that does not divide, and with text.buckets for a source that has no captions without pictures.
    """

    def __init__(
        self, cfg, tokenizer, *, process_index: int, process_count: int, skipped_path, rows: np.ndarray | None = None
    ):
        self.cfg, self.tokenizer = cfg, tokenizer
        batch, micro = cfg.train.batch, cfg.optim.accumulate
        if batch < 1 or micro < 1 or batch % (micro * process_count):
            raise ValueError(
                f"train.batch={batch} does not divide into optim.accumulate={micro} micro-batches on {process_count} "
                f"processes: make it a multiple of {max(micro, 1) * process_count}"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} is not below process_count={process_count}")
        part = batch // (micro * process_count)
        self._rows = np.arange(process_index * part, (process_index + 1) * part) if rows is None else rows
        self.local_batch = micro * len(self._rows)
        self.sources = open_all(cfg.data.train)
        self.epoch_examples = cfg.data.epoch_examples or sum(map(len, self.sources.values()))
        self._prompt_len = _prompt_len(cfg, tokenizer)
        if cfg.text.buckets:
            _can_bucket(self.sources)
        self._order = _mixture(cfg, self.sources)
        self._ledger = Ledger(skipped_path, cfg.data.max_bad_share)

    def batches(self, start_step: int = 0) -> Batches:
        """Iterator over the local batches of steps start_step, start_step + 1, ...; decoding begins at once. Close it.

        {"img": u8[b,H,W,3], "ids": i32[b,T], "txt_mask": bool[b,T], "lm_mask": bool[b,T], "image_id": i64[b], "key":
        list of str}; b = B / processes, or the rows given; T is cfg.text.max_len, or with text.buckets each step has
        its own, the same for all processes. Texts begin with cfg.text.prompt; lm_mask is txt_mask without [CLS] and the
        prompt. Raises ValueError when more than data.max_bad_share of at least 100 records are unusable.
        """
        data, windows = self.cfg.data, self._windows(start_step) if self.cfg.text.buckets else None
        local = grain.MapDataset.range(start_step * self.local_batch, sys.maxsize)
        local = local.map(lambda j: self.example(*self._global(j, windows)))
        return Batches(
            in_threads(local, self.cfg, data.prefetch * self.local_batch), self.local_batch, self._ledger, windows
        )

    def _windows(self, start_step: int) -> Windows:
        text, data, train = self.cfg.text, self.cfg.data, self.cfg.train
        ahead = 1 + max(data.prefetch, -(-data.threads // self.local_batch))
        return Windows(
            self._text_lengths,
            batch=train.batch,
            window=text.bucket_window,
            buckets=text.buckets,
            seed=self.cfg.seed,
            start_step=start_step,
            threads=data.threads,
            ahead=ahead,
        )

    def counts(self) -> dict:
        """{"read": records tried, "skipped": {reason: n}, "noted": {reason: n}} over the batches delivered."""
        return self._ledger.counts()

    def _global(self, j: int, windows: Windows | None) -> tuple[int, int]:
        """Number in the global order of this process's example `j`, and T of its batch."""
        step, position = divmod(j, self.local_batch)
        micro, offset = divmod(position, len(self._rows))
        at = micro * (self.cfg.train.batch // self.cfg.optim.accumulate) + int(self._rows[offset])
        if windows is None:
            return step * self.cfg.train.batch + at, self.cfg.text.max_len
        numbers, T = windows.batch(step)
        return int(numbers[at]), T

    def _stream(self, i: int) -> np.random.Generator:
        """The random numbers of global example `i`."""
        return np.random.Generator(np.random.Philox(key=np.array([self.cfg.seed, i], np.uint64)))

    def _text_lengths(self, numbers: range) -> np.ndarray:
        """i32: the positions that the texts of these global examples take if their pictures can be used."""
        return self.tokenizer.lengths([self._text(i) for i in numbers], self.cfg.text.max_len)

    def _text(self, i: int) -> str:
        """What `example` reads as the text of `i`, from captions alone; another record's where the picture proves
        unusable."""
        (name, r), rng = self._order[i], None
        source, cfg = self.sources[name], self.cfg.text
        for _ in range(TRIES):
            try:
                captions, _ = cleaned_captions({"key": name, "captions": source.captions_of(r)}, cfg.max_words)
            except BadRecord:
                rng = rng or self._stream(i)
                r = int(rng.integers(len(source)))
                continue
            rng = rng if rng or len(captions) == 1 else self._stream(i)  # most often there is nothing to draw
            return cfg.prompt + (captions[int(rng.integers(len(captions)))] if len(captions) > 1 else captions[0])
        return cfg.prompt  # nothing can be used: `example` says so

    def example(self, i: int, T: int) -> dict:
        """Global example `i` in a batch of T text positions: one row of it, and what the ledger takes in ("read",
        "events")."""
        name, r = self._order[i]
        source, events, rng, misfits = self.sources[name], [], self._stream(i), 0
        for tried in range(1, TRIES + 1):
            try:
                record = source[r]
                captions, notes = cleaned_captions(record, self.cfg.text.max_words)
                picture, found = decode_image(record, self.cfg.data.max_pixels)
            except BadRecord as e:
                events.append((name, e.key, e.reason, False))
                r = int(rng.integers(len(source)))
                continue
            written = self.cfg.text.prompt + captions[int(rng.integers(len(captions)))]
            if T < self.cfg.text.max_len and self.tokenizer.lengths([written], self.cfg.text.max_len)[0] > T:
                if misfits < MISFITS:
                    misfits, r = misfits + 1, int(rng.integers(len(source)))
                    continue
                notes.append("text cut: too long for the batch of the unusable record that it replaces")
            events += [(name, record["key"], note, True) for note in found + notes]
            row = self._row(name, record, picture, written, T, rng)
            return {**row, "read": tried, "events": events}
        return {"read": TRIES, "events": events}

    def _row(self, name: str, record: dict, picture, written: str, T: int, rng: np.random.Generator) -> dict:
        cfg = self.cfg
        img = image.train_transform(
            picture,
            cfg.model.img_size,
            rng,
            scale=cfg.data.crop_scale,
            flip=cfg.data.flip,
            randaugment=cfg.data.randaugment,
        )
        ids, mask = self.tokenizer.encode([written], T)
        return {
            "img": img,
            "ids": ids[0],
            "txt_mask": mask[0],
            "lm_mask": mask[0] & (np.arange(T) >= self._prompt_len),
            "image_id": _number(name, record["image_id"]),
            "key": record["key"],
        }


def _can_bucket(sources: dict[str, Source]) -> None:
    """ValueError: sources whose texts can only be read with their pictures."""
    if unfit := [name for name, source in sources.items() if not hasattr(source, "captions_of")]:
        raise ValueError(
            f"text.buckets needs the captions of all records without their pictures, which array_record and tfds do not "
            f"give: {', '.join(unfit)}. Give these as json or tar, or set text.buckets=()"
        )


def _prompt_len(cfg, tokenizer) -> int:
    """Positions of [CLS] and cfg.text.prompt. ValueError: none would be left for a word and [SEP]."""
    prompt, T = cfg.text.prompt, min((cfg.text.max_len, *cfg.text.buckets))
    n = int(tokenizer.encode([prompt], len(prompt) + 2)[1].sum()) - 1
    if n + 2 > T:
        leaf = "text.max_len" if T == cfg.text.max_len else "the shortest of text.buckets"
        raise ValueError(
            f"text.prompt={prompt!r} takes {n} of {leaf}={T} positions with [CLS], so that no word fits "
            f"before [SEP]: set {leaf} to {n + 2} at the very least, or shorten the prompt"
        )
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

    def __init__(self, examples, size: int, ledger: Ledger, windows: Windows | None = None):
        self._examples, self._size, self._ledger, self._windows = examples, size, ledger, windows
        examples.start_prefetch()

    def text_shares(self, step: int) -> dict[int, float]:
        """T -> share of the batches in the window of `step` that are so long; waits until they are known. Needs
        text.buckets."""
        return self._windows.shares(step)

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
        if self._windows:
            self._windows.close()
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
        self.cfg, self.sources = cfg, open_all(sources)
        self._ledger = Ledger(skipped_path, cfg.data.max_bad_share)
        self._where: list[tuple[str, int]] = []
        self.captions: list[str] = []
        text_image: list[int] = []
        for name, r in ((name, r) for name, source in self.sources.items() for r in range(len(source))):
            if cfg.eval.limit and self.n_images == cfg.eval.limit:
                break
            try:
                record = self.sources[name][r]
                captions, notes = cleaned_captions(record, cfg.text.max_words)
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
        examples = in_threads(grain.MapDataset.range(n).map(self._picture), self.cfg, self.cfg.data.prefetch * batch)
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
            picture, notes = decode_image(record, self.cfg.data.max_pixels)
        except BadRecord as e:
            log.warning("evaluation: image %d (%s) of %s: %s", i, e.key, name, e.reason)
            return None, [(name, e.key, e.reason, False)]
        return image.eval_transform(picture, self.cfg.model.img_size), [
            (name, record["key"], note, True) for note in notes
        ]
