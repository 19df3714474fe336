"""Tar shards of webdataset and img2dataset as a random-access source.

Members that share a path up to the first dot of its last part form a sample: "a/0001.jpg", "a/0001.txt", "a/0001.json".
Of "photo.v2.jpg" the sample is "photo" and the extension "v2.jpg", whose last part says what it is. Which members count
where there are several: `blip_jax.data.members`.
"""

from __future__ import annotations

import bisect
import json
import logging
from collections import Counter

import numpy as np

from blip_jax.data import headers, members
from blip_jax.data.index import indexes
from blip_jax.data.source import (
    MAX_BYTES,
    MAX_TEXT,
    BadRecord,
    Source,
    as_captions,
    expand,
    field_of,
    image_id,
    in_keys,
    read_at,
)

log = logging.getLogger(__name__)

LOOKED_AT = 100  # samples, spread over all, that show at opening which fields their .json have
EXTENSIONS = " ".join(f".{ext}" for ext in members.PICTURES)


class TarShards(Source):
    """Samples of uncompressed tar shards, in the order of their first members, read by offset.

    The key is "<source>:<shard>/<sample>"; a sample name that appears again in its shard gets "~2", "~3", .... What
    cannot be read of a shard is one BadRecord for each damage (`members`). About 40 bytes a sample are kept.

    caption_key: "caption" takes the .txt, and where a sample has none the field "caption" of its .json; any other name,
    or "json/caption", the field of the .json alone ("a/b" is nested), and "txt" the .txt alone. image_key: "image", or
    the extension of the pictures that are meant. image_id: the field of the .json; without one, the key.
    """

    def __init__(self, name: str, cfg):
        self._shards = expand(name, cfg)
        self._names = [f"{name}:{file}" for file in in_keys(self._shards)]
        self._field = cfg.caption_key.removeprefix("json/")
        texts = {"caption": ("text", "json"), "txt": ("text",)}
        self._texts = texts.get(cfg.caption_key, ("json",))  # where a caption is looked for
        found = indexes(members, self._shards, {"image_key": cfg.image_key.lower().lstrip(".")}, name)
        self._rows = [index.arrays["rows"] for index in found]
        self._ends_of = [index.arrays["ends"] for index in found]
        self._members = [index.arrays["names"] for index in found]
        self._ends = np.cumsum([len(rows) for rows in self._rows]).tolist()
        if len(self) or any(index.notes["unused"] for index in found):
            self._check(name, cfg, [index.notes for index in found])

    def _check(self, name: str, cfg, notes: list[dict]) -> None:
        """Says what of the shards is not read, and finds out whether there are pictures and texts."""
        unused = sum((Counter(found["unused"]) for found in notes), Counter())
        has = {place: any((rows[place] > 0).any() for rows in self._rows) for place in members.PLACES}
        if not has["image"]:
            raise ValueError(
                f"data source {name!r}: no sample in {cfg.path!r} has a picture "
                + (f"({EXTENSIONS})" if cfg.image_key == "image" else f"with the extension {cfg.image_key!r}")
                + (f"; other members are {_counted(unused)}" if unused else "")
                + "; give shards as webdataset or img2dataset write them"
            )
        self._say(name, notes, unused)

        fields, seen, differ = Counter(), 0, 0
        for k in sorted({k * len(self) // LOOKED_AT for k in range(LOOKED_AT)} | {0}):
            s, row = self._place(k)
            try:
                about = self._json(s, row)
            except (OSError, ValueError, RecursionError):
                continue
            fields.update(about.keys())
            seen += field_of(about, self._field, self) is not self
            differ += (
                self._texts == ("text", "json") and bool(about) and row["text"] > 0 and self._differs(s, row, about)
            )
        if differ:
            log.warning(
                "%s: the .txt of a sample is its caption, and differs from the field 'caption' of its .json in %d of "
                "the samples looked at: caption_key='json/caption' takes that field",
                name,
                differ,
            )
        there = f"the fields of the .json are {[*dict(fields.most_common(12))]}" if fields else "no .json was readable"
        if self._texts == ("json",) and not (seen and has["json"]):
            raise ValueError(
                f"data source {name!r}: caption_key is {cfg.caption_key!r}, but "
                + (f"no .json that was looked at has that field; {there}" if has["json"] else "there is no .json")
                + ": set `caption_key`, or 'caption' for the .txt members"
            )
        pairs = {
            place: any(((rows["image"] > 0) & (rows[place] > 0)).any() for rows in self._rows) for place in self._texts
        }
        if not pairs.get("text") and not (pairs.get("json") and seen):
            self.without_texts = (
                f"no sample in {cfg.path!r} has both a picture and a caption (.txt, or .json with {self._field!r})"
                + (f"; {there}: set `caption_key`" if has["json"] else "")
            )

    def _say(self, name: str, notes: list[dict], unused: Counter) -> None:
        """What of the shards is not read, or read in spite of something, a line for each kind."""
        for shard, found in zip(self._shards, notes):
            count, sample, used = found["several"]
            if count:
                total = sum(other["several"][0] for other in notes)
                log.warning(
                    "%s: %d samples have more than one picture, .txt or .json; one of each kind is used, of %s in %s "
                    "the %s. image_key names another extension of pictures",
                    name, total, sample, shard, used,
                )  # fmt: skip
                break
        if behind := [(shard, found["behind"]) for shard, found in zip(self._shards, notes) if found["behind"][0]]:
            log.warning(
                "%s: %d shards go on behind an end mark, as %s at byte %d; they are read on (joined tars, or zeroed "
                "blocks whose members are lost)",
                name, len(behind), behind[0][0], behind[0][1][1],
            )  # fmt: skip
        if rest := [(shard, found["rest"]) for shard, found in zip(self._shards, notes) if found["rest"]]:
            log.warning("%s: %d shards end in bytes that are no tar, as %s in %d", name, len(rest), *rest[0])
        broken = [(shard, rows["fault"] > 0) for shard, rows in zip(self._shards, self._rows)]
        if broken := [(shard, bad) for shard, bad in broken if bad.any()]:
            log.warning(
                "%s is cut or broken after %d samples; %d records of %d shards of %s are lost, those around them are "
                "used",
                broken[0][0], broken[0][1].argmax(), sum(bad.sum() for _, bad in broken), len(broken), name,
            )  # fmt: skip
        if unused:
            log.info("%s: members that are not read: %s", name, _counted(unused))

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, i: int) -> tuple[int, np.void]:
        """(number of the shard, index row) of sample `i`."""
        s = bisect.bisect_right(self._ends, i)
        return s, self._rows[s][i - (self._ends[s - 1] if s else 0)]

    def _sample(self, i: int) -> tuple[int, str, np.void]:
        """(number of the shard, key, index row) of sample `i`. BadRecord: it has no picture that can be read."""
        s, row = self._place(i)
        k = i - (self._ends[s - 1] if s else 0)
        ends = self._ends_of[s]
        member = self._members[s][int(ends[k - 1]) if k else 0 : int(ends[k])].tobytes().decode(errors="replace")
        key = f"{self._names[s]}/{member}"
        if row["fault"]:
            raise BadRecord(key, headers.FAULTS[row["fault"]])
        if not row["image"]:
            raise BadRecord(key, "no picture: no member with an extension of one")
        if row["image_size"] > MAX_BYTES:
            raise BadRecord(key, f"file too large: {row['image_size']} bytes, at most {MAX_BYTES} are read")
        return s, key, row

    def _bytes(self, s: int, row: np.void, place: str) -> bytes:
        size = int(row[f"{place}_size"])
        if place != "image" and size > MAX_TEXT:
            raise ValueError(f"{size} bytes, at most {MAX_TEXT} are read")
        return read_at(self._shards[s], int(row[place]) * headers.BLOCK, size)

    def _json(self, s: int, row: np.void) -> dict:
        """The object in a sample's .json, {} where there is none. OSError, ValueError, RecursionError: not readable."""
        about = json.loads(self._bytes(s, row, "json"), strict=False) if row["json"] else {}
        if not isinstance(about, dict):
            raise ValueError(f"an object is expected, not {str(about)[:80]!r}")
        return about

    def _differs(self, s: int, row: np.void, about: dict) -> bool:
        other = field_of(about, self._field)
        try:
            return other is not None and str(other).strip() != self._bytes(s, row, "text").decode("utf-8-sig").strip()
        except (OSError, ValueError):
            return False

    def captions_of(self, i: int) -> list[str]:
        s, key, row = self._sample(i)
        return self._captions(s, key, row, None)

    def _captions(self, s: int, key: str, row: np.void, about: dict | None) -> list[str]:
        """about: what is in the .json, where it has been read."""
        place = next((place for place in self._texts if row[place]), None)
        if place is None:
            return []
        try:
            if place == "text":
                return [self._bytes(s, row, "text").decode("utf-8-sig")]
            return as_captions(key, field_of(self._json(s, row) if about is None else about, self._field))
        except OSError as e:
            raise BadRecord(key, f"unreadable file: {e}") from None
        except (ValueError, RecursionError) as e:  # not JSON, not UTF-8, no object, too long, nested too deep
            raise BadRecord(key, f"malformed caption: {type(e).__name__}: {e}") from None

    def __getitem__(self, i: int) -> dict:
        s, key, row = self._sample(i)
        try:
            image = self._bytes(s, row, "image")
        except OSError as e:
            raise BadRecord(key, f"unreadable file: {e}") from None
        try:
            about = self._json(s, row)
        except (OSError, ValueError, RecursionError):  # if its caption is wanted, reading that says what is wrong
            about = None
        captions = self._captions(s, key, row, about)
        return {
            "key": key,
            "image": image,
            "captions": captions,
            "image_id": image_id((about or {}).get("image_id"), key),
        }


def _counted(unused: Counter) -> str:
    return ", ".join(f"{kind} ({n})" for kind, n in unused.most_common(members.SHOWN))
