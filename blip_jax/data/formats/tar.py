"""Tar shards of webdataset and img2dataset as a random-access source.

Members that share a path up to the first dot of its last part form a sample: "a/0001.jpg", "a/0001.txt", "a/0001.json".
The picture is the jpg, jpeg, png, webp or gif member; the caption is the txt member, else the field "caption" of the
json member.
"""

from __future__ import annotations

import bisect
import collections
import json
import logging
import os
import posixpath
import tarfile

import numpy as np
from tqdm import tqdm

from blip_jax.data.source import MAX_BYTES, BadRecord, Source, as_captions, expand, read_at

log = logging.getLogger(__name__)

BLOCK = 512  # bytes of a tar block
PICTURES = ("jpg", "jpeg", "png", "webp", "gif")
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7z": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
ROW = np.dtype(
    [("image", "i8"), ("image_size", "u4"), ("text", "i8"), ("text_size", "u4"), ("is_json", "?"), ("cut", "?")]
)


class TarShards(Source):
    """Samples of uncompressed tar shards, in the order of their first members, read by offset.

    The index is built at opening.

    The key is "<shard>/<sample>"; a sample name that appears again in its shard gets "~2", "~3", .... Of a shard that
    ends in the middle, the samples before the cut are used and what is cut is one BadRecord. About 40 bytes a
    sample are kept.
    """

    def __init__(self, name: str, cfg):
        self._shards = expand(name, cfg)
        indexes = [_index(f) for f in tqdm(self._shards, desc=f"index {name}", unit="shard", delay=5)]
        self._keys, self._key_ends, self._rows = zip(*indexes)
        self._ends = np.cumsum([len(r) for r in self._rows]).tolist()
        usable = sum(int(np.sum((r["image"] >= 0) & (r["text"] >= 0))) for r in self._rows)
        if self._ends[-1] and not usable:
            raise ValueError(
                f"data source {name!r}: no sample in {cfg.path!r} has both a picture (.jpg .jpeg .png .webp .gif) and "
                'a caption (.txt, or .json with "caption"); give shards as webdataset or img2dataset write them'
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def _sample(self, i: int) -> tuple[str, str, np.void]:
        """(shard, key, index row) of sample `i`. BadRecord: it has no picture that can be read."""
        s = bisect.bisect_right(self._ends, i)
        k = i - (self._ends[s - 1] if s else 0)
        shard, row = self._shards[s], self._rows[s][k]
        start = int(self._key_ends[s][k - 1]) if k else 0
        key = f"{os.path.basename(shard)}/{self._keys[s][start : int(self._key_ends[s][k])].decode()}"
        if row["cut"]:
            raise BadRecord(key, f"tar cut in the middle: {shard!r} ends inside this sample")
        if row["image"] < 0:
            raise BadRecord(key, "no picture: no .jpg .jpeg .png .webp .gif member")
        if row["image_size"] > MAX_BYTES:
            raise BadRecord(key, f"file too large: {row['image_size']} bytes, at most {MAX_BYTES} are read")
        return shard, key, row

    def captions_of(self, i: int) -> list[str]:
        return self._captions(*self._sample(i))

    def _captions(self, shard: str, key: str, row: np.void) -> list[str]:
        try:
            text = read_at(shard, int(row["text"]), min(int(row["text_size"]), MAX_BYTES)) if row["text"] >= 0 else None
            if text is not None:
                text = json.loads(text).get("caption") if row["is_json"] else text.decode()
        except OSError as e:
            raise BadRecord(key, f"unreadable file: {e}") from None
        except (ValueError, AttributeError, RecursionError) as e:  # not JSON, not UTF-8, no object
            raise BadRecord(key, f"malformed caption: {type(e).__name__}: {e}") from None
        return as_captions(key, text)

    def __getitem__(self, i: int) -> dict:
        shard, key, row = self._sample(i)
        try:
            image = read_at(shard, int(row["image"]), int(row["image_size"]))
        except OSError as e:
            raise BadRecord(key, f"unreadable file: {e}") from None
        return {"key": key, "image": image, "captions": self._captions(shard, key, row), "image_id": key}


def _index(path: str) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Of one shard: sample names, concatenated; u4[n] where each ends; ROW[n] with -1 for an absent member."""
    size = os.path.getsize(path)
    rows: list[dict] = []
    latest: dict[str, dict] = {}  # sample name -> its newest row
    seen: collections.Counter = collections.Counter()
    with _open(path) as tar:
        while (member := _next(tar)) is not None:
            folder, base = posixpath.split(member.name)
            stem, _, ext = base.partition(".")
            ext = ext.lower()
            if not member.isreg() or not stem or ext not in (*PICTURES, "txt", "json"):
                continue
            slot = "image" if ext in PICTURES else ext

            # a member that the newest sample of its name has already begins another sample of that name
            sample = posixpath.join(folder, stem)
            if sample not in latest or slot in latest[sample]:
                seen[sample] += 1
                key = sample if seen[sample] == 1 else f"{sample}~{seen[sample]}"
                latest[sample] = {"key": key, "cut": False}
                rows.append(latest[sample])
            latest[sample][slot] = (member.offset_data, min(member.size, 2**32 - 1))
            latest[sample]["cut"] |= member.offset_data + member.size > size

        if read_at(path, tar.offset, BLOCK) != bytes(BLOCK):  # a tar ends with blocks of zeros
            log.warning("%s is cut or broken after %d samples: those before are used", path, len(rows))
            if rows and not ("image" in rows[-1] and ("txt" in rows[-1] or "json" in rows[-1])):
                rows[-1]["cut"] = True
            elif not (rows and rows[-1]["cut"]):
                rows.append({"key": "(rest)", "cut": True})
    return _pack(rows)


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        member = tar.next()
    except tarfile.TarError:
        return None
    tar.members = []  # the file would remember every member
    return member


def _pack(rows: list[dict]) -> tuple[bytes, np.ndarray, np.ndarray]:
    table = np.zeros(len(rows), ROW)
    for out, row in zip(table, rows):
        image, text = row.get("image", (-1, 0)), row.get("txt", row.get("json", (-1, 0)))
        out["image"], out["image_size"], out["text"], out["text_size"] = *image, *text
        out["is_json"], out["cut"] = "txt" not in row and "json" in row, row["cut"]
    keys = [row["key"].encode("utf-8", "replace") for row in rows]
    return b"".join(keys), np.cumsum([len(k) for k in keys], dtype=np.uint32), table


def _open(path: str) -> tarfile.TarFile:
    with open(path, "rb") as f:
        head = f.read(4)
    for magic, tool in COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{path!r} is a compressed tar, which has no random access: unpack it once with `{tool}` and give the "
                "plain .tar"
            )
    try:
        return tarfile.open(path, "r:")
    except tarfile.TarError as e:
        raise ValueError(f"{path!r} is not a tar file ({e}): remove it from the list or fetch it again") from None
