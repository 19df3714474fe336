"""Batches: a weighted, shuffled mixture of sources for training; decoding in threads.

The order of training is a pure function of the seed, the sources and the global example number i = step * B + position,
and so is what happens to an example: its random stream is Philox(seed, i). Nothing is remembered between steps, hence
the step number is the whole iterator state, and any number of processes sees the same global batches. A run whose batch
changed on the way counts on from the examples that it has seen (`order.Order`).

What goes wrong is data too. A record that cannot be used is replaced by another of its source, drawn from the example's
own stream; it is counted by reason, and named once in skipped.jsonl as {source, key, reason, used: false}. A record
that is irregular but used (16-bit or animated picture, below 8x8, aspect ratio above 20, NUL or broken characters, a
caption of more than 10 times text.max_words words) is noted there with used: true, and counted apart. Counting happens
when a batch is delivered, so that it does not depend on threads.

With text.buckets, which examples form a step's batch follows from the lengths of their texts
(blip_jax/data/windows.py), so these are found beforehand from the captions alone. A record that replaces an unusable
one must then fit the batch it comes into: records are drawn until one does, and after MISFITS long ones the next is
cut, and noted.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence

import grain
import numpy as np
from ml_collections import ConfigDict

from blip_jax.data import image
from blip_jax.data.formats import open_source, refuse_missing
from blip_jax.data.ledger import Ledger
from blip_jax.data.order import Order
from blip_jax.data.source import BadRecord, Source
from blip_jax.data.windows import Windows, plan

log = logging.getLogger(__name__)

# entries of a batch whose last dimension is cfg.text.max_len, or with text.buckets the step's own
TEXT = ("ids", "txt_mask", "lm_mask")
TRIES = 100  # records tried for one example before its source counts as unusable
MISFITS = 20  # replacements too long for the batch, after which one is cut


def open_all(sources, texts: bool = True) -> dict[str, Source]:
    """name -> opened source, of configs or open sources. ValueError: one has no texts, though `texts` are needed."""
    if not len(sources):
        raise ValueError("no data source: add one to the config, such as c.data.train.web = source('json', 'web.json')")
    refuse_missing({name: s for name, s in sources.items() if isinstance(s, ConfigDict)})
    opened = {name: open_source(name, s) if isinstance(s, ConfigDict) else s for name, s in sorted(sources.items())}
    for name, source in opened.items():
        if (why := getattr(source, "without_texts", "")) and texts:
            raise ValueError(f"data source {name!r}: {why}")
        if why and isinstance(sources[name], ConfigDict):
            log.warning("data source %r: %s; its pictures are taken without texts", name, why)
    return opened


@contextlib.contextmanager
def decoded(record: dict, encoded: Sequence[bytes], cfg) -> Iterator[list]:
    """(picture, notes) of pictures of a record, as `image.decoded`. BadRecord: one of them is none."""
    with contextlib.ExitStack() as room:
        try:
            found = room.enter_context(image.decoded(encoded, cfg.data.max_pixels, cfg.data.upright))
        except image.BadImage as e:
            raise BadRecord(record["key"], str(e)) from None
        yield found


def threads(ds, cfg, ahead: int):
    """Iterator over a grain MapDataset, computed up to `ahead` elements ahead by cfg.data.threads threads."""
    n = cfg.data.threads
    return iter(ds.to_iter_dataset(grain.ReadOptions(num_threads=n, prefetch_buffer_size=max(ahead, n) if n else 0)))


class TrainData:
    """Training batches of the weighted mixture cfg.data.train, for process `process_index` of `process_count`.

    task: a module of blip_jax/tasks, of which `example` makes a row of a record and, for text.buckets, `text` finds its
    text.
    rows: positions i64, rising, in each micro-batch that this process makes; by default the part that has its number.
    Attributes: sources, name -> Source; epoch_examples, examples of one epoch (cfg.data.epoch_examples, else the sum
    over the sources). Within a source, any len(source) examples from a multiple of it cover each record once, in an
    order that is new for every epoch. Raises ValueError for a wrong source, weights that are not positive, and a batch
    that does not divide, and with text.buckets for a task or a source that has no texts without pictures.
    """

    def __init__(
        self,
        cfg,
        tokenizer,
        task,
        *,
        process_index: int,
        process_count: int,
        skipped_path,
        rows: np.ndarray | None = None,
    ):
        self.cfg, self.tokenizer, self.task = cfg, tokenizer, task
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
        if cfg.text.buckets:
            _can_bucket(cfg.objective, task, self.sources)
        self._cfgs = {T: _of_length(cfg, T) for T in (*cfg.text.buckets, cfg.text.max_len)}
        self._order = _mixture(cfg, self.sources)
        self._ledger = Ledger(skipped_path, cfg.data.max_bad_share)

    def batches(self, start_step: int = 0, order: Order = Order()) -> Batches:
        """Iterator over the local batches of steps start_step, start_step + 1, ...; decoding begins at once. Close it.

        order: what examples there are from its own step on, which is no later.

        The rows of the task's `example`, stacked, pictures as u8[b,H,W,3], and "key", a list of str; b = B / processes,
        or the rows given. Texts have cfg.text.max_len positions, or with text.buckets each step has its own, the same
        for all processes. Raises ValueError when more than data.max_bad_share of at least 100 records are unusable.
        """
        start = start_step - order.step  # from here on, steps and places in the order are counted from the order's own
        data, windows = self.cfg.data, self._windows(start, order) if self.cfg.text.buckets else None
        local = grain.MapDataset.range(start * self.local_batch, sys.maxsize)
        local = local.map(lambda j: self.example(*self._global(j, windows, order)))
        return Batches(
            threads(local, self.cfg, data.prefetch * self.local_batch), self.local_batch, self._ledger, windows, order
        )

    def unseen(
        self, step: int, order: Order, *, batch: int, buckets, bucket_window: int, max_len: int
    ) -> tuple[tuple[int, ...], int]:
        """(left, following) of an `Order` after `step` steps that had this batch and these windows of texts.

        Exact for the sources that these steps had.
        """
        if not buckets:
            return order.rest((step - order.step) * batch)
        window, done = divmod(step - order.step, bucket_window)
        first = window * bucket_window * batch
        end = first + (bucket_window * batch if done else 0)
        left, following = order.rest(end)
        if done:
            numbers = [order.number(i) for i in range(first, end)]
            lengths = np.minimum(self._text_lengths(numbers, max_len), buckets[-1])
            rows, _ = plan(lengths, batch, buckets, self.cfg.seed, window)
            left = tuple(sorted([*(numbers[at] for at in rows[done:].ravel()), *left]))
        return left, following

    def _windows(self, start_step: int, order: Order) -> Windows:
        text, data, train = self.cfg.text, self.cfg.data, self.cfg.train
        ahead = 1 + max(data.prefetch, -(-data.threads // self.local_batch))
        return Windows(
            lambda places: self._text_lengths(map(order.number, places), text.max_len),
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

    def _global(self, j: int, windows: Windows | None, order: Order) -> tuple[int, int]:
        """Number in the global order of this process's example `j`, and T of its batch."""
        step, position = divmod(j, self.local_batch)
        micro, offset = divmod(position, len(self._rows))
        at = micro * (self.cfg.train.batch // self.cfg.optim.accumulate) + int(self._rows[offset])
        if windows is None:
            return order.number(step * self.cfg.train.batch + at), self.cfg.text.max_len
        places, T = windows.batch(step)
        return order.number(int(places[at])), T

    def _stream(self, i: int) -> np.random.Generator:
        """The random numbers of global example `i`."""
        return np.random.Generator(np.random.Philox(key=np.array([self.cfg.seed, i], np.uint64)))

    def _text_lengths(self, numbers: Iterable[int], max_len: int) -> np.ndarray:
        """i32: the positions, `max_len` at most, that the texts of these global examples take if their pictures can be
        used."""
        return self.tokenizer.lengths([self._text(i) for i in numbers], max_len)

    def _text(self, i: int) -> str:
        """What `example` reads as the text of `i`, from captions alone.

        It is another record's where the picture proves unusable.
        """
        name, r = self._order[i]
        source, rng = self.sources[name], self._stream(i)
        for _ in range(TRIES):
            try:
                return self.task.text({"key": name, "captions": source.captions_of(r)}, rng, self.cfg)[0]
            except BadRecord:
                r = int(rng.integers(len(source)))
        return ""  # nothing can be used: `example` says so

    def example(self, i: int, T: int) -> dict:
        """Global example `i` in a batch of T text positions: a row, and what the ledger takes in ("read", "events")."""
        name, r = self._order[i]
        source, rng = self.sources[name], self._stream(i)
        events, misfits = [], 0
        for tried in range(1, TRIES + 1):
            try:
                record, notes = {**source[r], "source": name}, []
                # never the first one tried, for which the batch was made: only one that stands in for it
                if self._too_long(record, rng, T):
                    if misfits < MISFITS:
                        misfits, r = misfits + 1, int(rng.integers(len(source)))
                        continue
                    notes = ["text cut: too long for the batch of the unusable record that it replaces"]
                row, found = self._row(record, rng, T)
            except BadRecord as e:
                events.append((name, e.key, e.reason, False))
                r = int(rng.integers(len(source)))
                continue
            events += [(name, record["key"], note, True) for note in found + notes]
            return {**row, "key": record["key"], "read": tried, "events": events}
        return {"read": TRIES, "events": events}

    def _too_long(self, record: dict, rng: np.random.Generator, T: int) -> bool:
        """Whether the text that the task draws takes more than T positions; if not, `rng` stands where it stood."""
        if T == self.cfg.text.max_len:
            return False
        before = rng.bit_generator.state
        written, _ = self.task.text(record, rng, self.cfg)
        if self.tokenizer.lengths([written], self.cfg.text.max_len)[0] > T:
            return True
        rng.bit_generator.state = before
        return False

    def _row(self, record: dict, rng: np.random.Generator, T: int) -> tuple[dict, list[str]]:
        """The task's row with its pictures decoded and augmented, and notes. BadRecord: it cannot be used."""
        data = self.cfg.data
        row = self.task.example(record, rng, self._cfgs[T], self.tokenizer)
        notes = row.pop("notes")

        # all are decoded before one is augmented: a picture that cannot be used draws no random numbers
        names, found = [name for name, value in row.items() if isinstance(value, bytes)], []
        with decoded(record, [row[name] for name in names], self.cfg) as pictures:
            for name, (picture, irregular) in zip(names, pictures):
                found += irregular
                row[name] = image.train_transform(
                    picture,
                    self.cfg.model.img_size,
                    rng,
                    scale=data.crop_scale,
                    flip=data.flip,
                    randaugment=data.randaugment,
                )
        return row, [*found, *notes]


def _of_length(cfg, T: int) -> ConfigDict:
    """The config for a batch of T text positions."""
    if T == cfg.text.max_len:
        return cfg
    own = cfg.copy_and_resolve_references().unlock()
    own.text.max_len = T
    return own.lock()


def _can_bucket(objective: str, task, sources: dict[str, Source]) -> None:
    """ValueError: a task without texts to order, or sources whose texts can only be read with their pictures."""
    if not hasattr(task, "text"):
        raise ValueError(
            f"text.buckets is set but objective is {objective}, whose batches have one length: set text.buckets=()"
        )
    if unfit := [name for name, source in sources.items() if not hasattr(source, "captions_of")]:
        raise ValueError(
            "text.buckets needs the captions of all records without their pictures, which tfds and array_record files "
            f"without captions beside them do not give: {', '.join(unfit)}. Give these as json or tar, or set "
            "text.buckets=(), or make shards with captions of them with `blip-jax pack`"
        )


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


class Batches:
    """Iterator of batches over an iterator of examples; a context manager, or `close()`, ends its threads."""

    def __init__(self, examples, size: int, ledger: Ledger, windows: Windows | None = None, order: Order = Order()):
        self._examples, self._size, self._ledger, self._windows, self._order = examples, size, ledger, windows, order
        examples.start_prefetch()

    def text_shares(self, step: int) -> dict[int, float]:
        """T -> share of the batches in the window of `step` that are so long.

        Waits until they are known. Needs text.buckets.
        """
        return self._windows.shares(step - self._order.step)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict:
        rows = [next(self._examples) for _ in range(self._size)]
        self._ledger.add(sum(r["read"] for r in rows), [e for r in rows for e in r["events"]])
        for r in rows:
            if "key" not in r:
                raise ValueError(
                    f"{TRIES} records in a row of source {r['events'][0][0]!r} cannot be used, the last because of "
                    f"{r['events'][-1][2]!r}; they are named in {self._ledger.path}: repair or remove the source"
                )
        batch = {name: np.stack([r[name] for r in rows]) for name in rows[0] if name not in ("key", "read", "events")}
        return {**batch, "key": [r["key"] for r in rows]}

    def close(self) -> None:
        if self._windows:
            self._windows.close()
        self._examples.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exc) -> None:
        self.close()
