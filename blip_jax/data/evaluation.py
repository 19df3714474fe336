"""Data of evaluations: every record of the sources once, in order; what cannot be used is counted as in training."""

from __future__ import annotations

import abc
import hashlib
import logging
import zlib
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from ml_collections import ConfigDict

from blip_jax.data import image, pairs, video
from blip_jax.data.batches import decoded, open_all, threads
from blip_jax.data.ledger import Ledger
from blip_jax.data.source import BadRecord

log = logging.getLogger(__name__)


class Looks(abc.ABC):
    """What is looked at once a pass, pictures or videos, with texts about each.

    Attributes: captions, list of cleaned str; text_image i64[n_text], the picture or video of each, rising. `_shape` is
    that of one, `_picture` reads it. One that turns out unreadable has index -1 in `image_batches`.
    """

    cfg: ConfigDict
    captions: list[str]
    text_image: np.ndarray
    _ledger: Ledger
    _shape: tuple[int, ...]

    def __init__(self):
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return self.n_images

    @property
    @abc.abstractmethod
    def n_images(self) -> int:
        """How many there are."""

    @abc.abstractmethod
    def _picture(self, i: int) -> tuple[np.ndarray | None, list]:
        """u8[_shape], None where it cannot be read, and events for the ledger."""

    def counts(self) -> dict:
        """{"read": records tried, "skipped": {reason: n}, "noted": {reason: n}}"""
        return self._ledger.counts()

    def image_batches(self, batch: int) -> Iterator[dict]:
        """{"img": u8[batch,...], "index": i64[batch]} in order; -1: zeros, padding or unreadable."""
        n = self.n_images
        examples = threads(grain.MapDataset.range(n).map(self._picture), self.cfg, self.cfg.data.prefetch * batch)
        try:
            for first in range(0, n, batch):
                img, index = np.zeros((batch, *self._shape), np.uint8), np.full(batch, -1, np.int64)
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


class EvalData(Looks):
    """Every picture and every caption of `sources`, for the evaluation of retrieval.

    sources: name -> config.source, or an open Source.

    The records of one image_id of a source are one picture with all their captions, in the order of first appearance,
    so that a row for each caption gives the same numbers as a row with a list. Of a picture that several of them bring,
    the first that can be read counts; that they bring different ones is noted and said. With cfg.eval.limit the first
    so many pictures count, and reading ends at the first record of another one.

    A record without a usable caption or file is left out here. It is counted and named as in training, and so is a
    picture that turns out undecodable later; too many raise ValueError, as does a source that leaves no picture at all.
    """

    def __init__(self, cfg, tokenizer, sources, *, skipped_path):
        super().__init__()
        self.cfg, self.sources = cfg, open_all(sources)
        self._shape = (cfg.model.img_size, cfg.model.img_size, 3)
        self._ledger = Ledger(skipped_path, cfg.data.max_bad_share)
        self._where: list[list[tuple[str, int]]] = []  # records of each picture, of which one is as good as another
        numbers: dict[tuple[str, str], int] = {}  # of pictures, by source and image_id
        pictures: list[bytes] = []  # digest of each
        texts: list[list[str]] = []
        for name, r in ((name, r) for name, source in self.sources.items() for r in range(len(source))):
            try:
                record = self.sources[name][r]
                captions, notes = pairs.captions(record, cfg.text.max_words)
            except BadRecord as e:
                self._ledger.add(1, [(name, e.key, e.reason, False)])
                continue
            n = numbers.setdefault((name, record["image_id"]), self.n_images)
            digest = hashlib.blake2b(record["image"], digest_size=8).digest()
            if n == self.n_images:
                if n == cfg.eval.limit > 0:
                    break
                self._where.append([])
                pictures.append(digest)
                texts.append([])
            elif digest != pictures[n]:
                notes.append(
                    f"another picture than the first of its image_id, which is used: {record['image_id'][:80]!r}"
                )
            self._ledger.add(1, [(name, record["key"], note, True) for note in notes])
            texts[n] += captions
            self._where[n].append((name, r))
        if not self._where:
            raise ValueError(
                f"evaluation: no record of {sorted(self.sources)} can be used: {dict(self._ledger.skipped)}; they are "
                f"named in {skipped_path}"
            )
        if others := sum(n for note, n in self._ledger.noted.items() if note.startswith("another picture than")):
            log.warning(
                "evaluation: %d records bring another picture than the first of their image_id, which is used with "
                "all captions; they are named in %s. Where they are different pictures, give them different ids",
                others,
                skipped_path,
            )
        self.captions = [caption for own in texts for caption in own]
        self.text_image = np.repeat(np.arange(self.n_images), [len(own) for own in texts])

    @property
    def n_images(self) -> int:
        return len(self._where)

    def _picture(self, i: int):
        """The first picture of image `i` that can be read, or None, and events of those tried."""
        events = []
        for name, r in self._where[i]:
            try:
                record = self.sources[name][r]
                with decoded(record, [record["image"]], self.cfg) as [(picture, notes)]:
                    img = image.eval_transform(picture, self.cfg.model.img_size)
            except BadRecord as e:
                log.warning("evaluation: image %d (%s) of %s: %s", i, e.key, name, e.reason)
                events.append((name, e.key, e.reason, False))
                continue
            events += [(name, record["key"], note, True) for note in notes]
            return img, events
        return None, events


class EvalVideos(Looks):
    """Every video of `sources` with the texts that go with it, captions or questions.

    text: record -> (its texts, notes), or BadRecord. n: frames of each video; its form is u8[n,S,S,3], S =
    model.img_size. The records of one file of a source are one video, in the order of first appearance; with
    cfg.eval.limit the first so many count, and reading ends at the first record of another one. `records` holds the
    record of each text.

    A record that cannot be used, as its file is missing, say, and a video that turns out unreadable later are counted
    and named as in training, and too many raise ValueError, as does a source that leaves no video at all, or a missing
    PyAV.
    """

    def __init__(self, cfg, sources, text, n: int, *, skipped_path):
        super().__init__()
        video.check()
        self.cfg, self.sources = cfg, open_all(sources)
        self._shape = (n, cfg.model.img_size, cfg.model.img_size, 3)
        self._ledger = Ledger(skipped_path, cfg.data.max_bad_share)
        self._videos: list[tuple[str, dict]] = []  # source and first record of each
        numbers: dict[tuple[str, str], int] = {}  # of videos, by source and file
        own: list[list[tuple[str, dict]]] = []  # texts and records of each
        for name, r in ((name, r) for name, source in self.sources.items() for r in range(len(source))):
            try:
                record = self.sources[name][r]
                texts, notes = text(record)
            except BadRecord as e:
                self._ledger.add(1, [(name, e.key, e.reason, False)])
                continue
            at = numbers.setdefault((name, record["video"]), self.n_images)
            if at == self.n_images:
                if at == cfg.eval.limit > 0:
                    break
                self._videos.append((name, record))
                own.append([])
            self._ledger.add(1, [(name, record["key"], note, True) for note in notes])
            own[at] += [(one, record) for one in texts]
        if not own:
            raise ValueError(
                f"evaluation: no record of {sorted(self.sources)} can be used: {dict(self._ledger.skipped)}; they are "
                f"named in {skipped_path}"
            )
        self.captions = [one for each in own for one, _ in each]
        self.records = [record for each in own for _, record in each]
        self.text_image = np.repeat(np.arange(self.n_images), [len(each) for each in own])

    @property
    def n_images(self) -> int:
        return len(self._videos)

    def _picture(self, i: int):
        name, record = self._videos[i]
        try:
            found, notes = video.frames(record["video"], *self._shape[:2], self.cfg.data.max_pixels)
        except video.BadVideo as e:
            log.warning("evaluation: video %d (%s) of %s: %s", i, record["key"], name, e)
            return None, [(name, record["key"], str(e), False)]
        return found, [(name, record["key"], note, True) for note in notes]


class EvalRows:
    """The records of `sources` in order as the rows of `example`, for evaluation one by one.

    Of many records the first cfg.eval.limit count, if that is set. example: (record, cfg, tokenizer) -> row, as a
    task's `example` without random choices; pictures come as a model sees them. `records` holds what is known of
    each row besides its arrays: the record without its pictures. texts: a source without any is refused. A record
    that cannot be used is left out, counted and named as in training; a source that leaves none raises ValueError.
    """

    def __init__(self, cfg, tokenizer, example, sources, *, skipped_path, texts: bool = True):
        self.cfg, self.tokenizer, self.sources, self._example = cfg, tokenizer, open_all(sources, texts), example
        self._ledger = Ledger(skipped_path, cfg.data.max_bad_share)
        where = [(name, r) for name, source in self.sources.items() for r in range(len(source))]
        self._where = where[: cfg.eval.limit or len(where)]

    def __len__(self) -> int:
        """Records there are, usable or not."""
        return len(self._where)

    def counts(self) -> dict:
        """{"read": records tried, "skipped": {reason: n}, "noted": {reason: n}} of the passes so far."""
        return self._ledger.counts()

    def batches(self, batch: int) -> Iterator[tuple[list[dict], dict]]:
        """(records, arrays [n, ...]) of n <= batch usable records, in order. ValueError: not one can be used."""
        some = False
        for tried in self._tried(range(len(self)), batch):
            for i, (_, row, events) in tried.items():
                if row is None:
                    [(name, key, reason, _)] = events
                    log.warning("evaluation: record %d (%s) of %s: %s", i, key, name, reason)
            used = [(record, row) for record, row, _ in tried.values() if row is not None]
            if used:
                some = True
                yield [record for record, _ in used], _stacked([row for _, row in used])
        if not some:
            raise ValueError(
                f"evaluation: no record of {sorted(self.sources)} can be used: {dict(self._ledger.skipped)}; they are "
                f"named in {self._ledger.path}"
            )

    def _tried(self, places: Sequence[int], batch: int) -> Iterator[dict[int, tuple[dict, dict | None, list]]]:
        """`_row` of `places` in order, `batch` of them at a time, by place; what happened is in the ledger."""
        rows = threads(grain.MapDataset.source(places).map(self._row), self.cfg, self.cfg.data.prefetch * batch)
        try:
            for first in range(0, len(places), batch):
                tried = {i: next(rows) for i in places[first : first + batch]}
                self._ledger.add(len(tried), [event for _, _, events in tried.values() for event in events])
                yield tried
        finally:
            rows.close()

    def _row(self, i: int) -> tuple[dict, dict | None, list]:
        """What is known of record `i`, its row, None where it cannot be used, and events for the ledger."""
        name, r = self._where[i]
        try:
            record = {**self.sources[name][r], "source": name}
            row = self._example(record, self.cfg, self.tokenizer)
            notes = row.pop("notes")
            fields = [field for field, value in row.items() if isinstance(value, bytes)]
            with decoded(record, [row[field] for field in fields], self.cfg) as pictures:
                for field, (picture, found) in zip(fields, pictures):
                    row[field] = image.eval_transform(picture, self.cfg.model.img_size)
                    notes = found + notes
        except BadRecord as e:
            return {}, None, [(name, e.key, e.reason, False)]
        known = {field: value for field, value in record.items() if field not in ("image", "images")}
        return known, row, [(name, record["key"], note, True) for note in notes]


class HeldOut(EvalRows):
    """Records of `sources` as examples that a task trains on, cfg.eval.loss_examples of them, each once.

    task: a module of blip_jax/tasks, whose `example` makes a row of a record. Which records, in which order, and what
    is random in the rows follow from the seed and the keys alone: every pass gives the same. Pictures come as
    evaluation shows them, without augmentation.

    A record that no example can be made of, as it has no answer or label, is left out, counted, and named at
    `skipped_path`; however many these are, that is no error.
    """

    def __init__(self, cfg, tokenizer, task, sources, *, skipped_path):
        def example(record: dict, cfg, tokenizer) -> dict:
            drawn = np.array([cfg.seed, zlib.crc32(record["key"].encode(errors="backslashreplace"))], np.uint64)
            return task.example(record, np.random.Generator(np.random.Philox(key=drawn)), cfg, tokenizer)

        super().__init__(cfg, tokenizer, example, sources, skipped_path=skipped_path, texts=False)
        self._ledger = Ledger(skipped_path, max_bad_share=1.0)
        order = np.random.Generator(np.random.Philox(cfg.seed)).permutation(len(self._where))
        self._where = [self._where[i] for i in order[: cfg.eval.loss_examples]]
        self._unusable: set[int] = set()  # places, as far as passes met them

    def whole(self, batch: int, unit: int) -> Iterator[dict]:
        """Arrays [batch, ...] of the examples in order, at last [n, ...] of what remains, n a multiple of `unit` and
        not 1, as an example alone has no other to be told from; unless batch is 1. Fewer than `unit` are left out.
        """
        held: list[dict] = []
        for tried in self._tried([i for i in range(len(self)) if i not in self._unusable], batch):
            self._unusable |= {i for i, (_, row, _) in tried.items() if row is None}
            held += [row for _, row, _ in tried.values() if row is not None]
            if len(held) >= batch:
                yield _stacked(held[:batch])
                held = held[batch:]
        if (n := len(held) // unit * unit) >= min(batch, 2):
            yield _stacked(held[:n])


def _stacked(rows: list[dict]) -> dict:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
