"""What is in a tar file, without reading its data: the samples that its members form."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from typing import NamedTuple

import numpy as np

from blip_jax import buckets
from blip_jax.data.headers import BLOCK, CUT, FAULTS, Local, Member, Walk
from blip_jax.data.index import Index
from blip_jax.data.remote import Ranges

VERSION = 1
PICTURES = ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "heic", "heif")
KINDS = (*PICTURES, "txt", "json")
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7z": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
PLACES = ("image", "text", "json")
ROW = np.dtype([(f"{name}{part}", "u4") for name in PLACES for part in ("", "_size")] + [("fault", "u1")])
LAYOUT = {
    "rows": ROW,  # of each sample: block (of BLOCK bytes) of a member's data, 0: it has none, and bytes; and its fault
    "ends": np.dtype("u4"),  # where each sample's name ends in the next
    "names": np.dtype("u1"),  # UTF-8, one after another
}
SHOWN = 12  # extensions that are named


class Sample(NamedTuple):
    """Members of one name: extension as it is written -> (start, size, fault)."""

    name: str
    members: dict[str, tuple[int, int, int]]


def build(path: str, image_key: str) -> Index:
    """The samples of a tar file, in the order of their first members. ValueError: it is no tar, or a compressed one.

    Members that share a path up to the first dot of its last part are one sample, as for webdataset, also where others
    lie between them. A member that its sample has already begins another one, named with "~2", "~3", ....
    image_key: "image", or the extension of the pictures that are meant.
    """
    samples: list[Sample] = []
    newest: dict[str, Sample] = {}
    names: set[str] = set()
    seen: Counter = Counter()
    unused: Counter = Counter()
    damages: list[tuple[int, Member]] = []  # how many samples began before it
    with contextlib.closing(Ranges(path) if buckets.is_bucket(path) else Local(path)) as file:
        _check(path, file)
        walk = Walk(file)
        for member in walk:
            if not member.name:
                damages.append((len(samples), member))
                continue
            folder, slash, base = member.name.rpartition("/")
            stem, _, ext = base.partition(".")
            if not member.regular or not stem or _kind(ext) not in KINDS:
                kind = "links" if not member.regular else "hidden" if not stem else f".{ext[-20:]}" if ext else "no dot"
                unused[kind] += kind in unused or len(unused) < 100
                continue
            name = folder + slash + stem
            sample = newest.get(name)
            if sample is None or ext in sample.members:
                free = name
                while free in names:
                    seen[name] += 1
                    free = f"{name}~{seen[name] + 1}"
                names.add(free)
                sample = newest[name] = Sample(free, {})
                samples.append(sample)
            sample.members[ext] = member.start, member.size, member.fault
    if not walk.found:
        raise ValueError(f"{path!r} is not a tar file (no header in it): remove it from the list or fetch it again")
    _blame(samples, damages, walk.cut, size=walk.size)
    return _packed(samples, image_key, walk, unused)


def _check(path: str, file: Local | Ranges) -> None:
    """ValueError: an open file is compressed, or too large."""
    head = file.read(4, 0)
    for magic, tool in COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{path!r} is a compressed tar, which has no random access: unpack it once with `{tool}` and give the "
                "plain .tar"
            )
    if file.size >= BLOCK << 32:
        raise ValueError(f"{path!r} has {file.size} bytes, and tars of less than 2 TiB are read: split it")


@functools.lru_cache(1 << 12)
def _kind(ext: str) -> str:
    """What a member is by its extension, of which the last part counts: "v2.JPG" is a jpg."""
    return ext.rpartition(".")[2].lower()


def _whole(sample: Sample, texts: bool) -> bool:
    kinds = {_kind(ext) for ext in sample.members}
    return not kinds.isdisjoint(PICTURES) and (not texts or "txt" in kinds or "json" in kinds)


def _blame(samples: list[Sample], damages: list[tuple[int, Member]], cut: bool, size: int) -> None:
    """Lays each damage to a sample beside it that lacks something, or else to one of its own, so that each is named."""
    texts = any(_kind(ext) in ("txt", "json") for sample in samples for ext in sample.members)
    last = samples[-1].members.values() if samples else ()
    if cut and not any(fault == CUT for _, _, fault in last) and not any(d.fault == CUT for _, d in damages):
        damages.append((len(samples), Member("", size, 0, True, CUT)))
    for before, damage in reversed(damages):
        beside = [samples[before - 1]] if before else []
        if damage.fault != CUT:
            beside += samples[before : before + 1]
        lacking = [sample for sample in beside if not _whole(sample, texts)]
        place = "(rest)" if damage.fault == CUT else f"(byte {damage.start})"
        hurt = lacking[0] if lacking else Sample(place, {})
        if not lacking:
            samples.insert(before, hurt)
        hurt.members["damage"] = damage.start, 0, damage.fault


@functools.lru_cache(1 << 12)
def _chosen(extensions: tuple[str, ...], image_key: str) -> tuple[str | None, str | None, str | None, bool]:
    """Of a sample's members: the picture, the .txt and the .json that belong to it; and whether one is left out.

    The picture is the one with the fewest dots in its extension; of several the first in the order of PICTURES, then
    the first in the shard. A .txt and a .json belong to it that share what is before its last dot ("v2.jpg" and
    "v2.txt"), or else have nothing there, or else come first.
    """
    pictures = [ext for ext in extensions if _kind(ext) in PICTURES]
    wanted = [ext for ext in pictures if image_key in ("image", ext.lower())]
    picture = min(wanted, key=lambda ext: (ext.count("."), PICTURES.index(_kind(ext))), default=None)
    before = (picture or "").rpartition(".")[0]

    def beside(kind: str) -> str | None:
        found = [ext for ext in extensions if _kind(ext) == kind]
        return min(found, key=lambda ext: (ext.rpartition(".")[0] != before, "." in ext), default=None)

    chosen = picture, beside("txt"), beside("json")
    return *chosen, any(ext not in chosen for ext in extensions if _kind(ext) in KINDS)


def _packed(samples: list[Sample], image_key: str, walk: Walk, unused: Counter) -> Index:
    rows, several = [], []
    for sample in samples:
        picture, *texts, left_out = _chosen(tuple(sample.members), image_key)
        row, fault = [], 0
        for ext in (picture, *texts, "damage"):
            start, size, bad = sample.members.get(ext, (0, 0, 0))
            row += [start // BLOCK, min(size, 2**32 - 1)]
            fault = fault or bad
        rows.append((*row[:-2], fault))
        if left_out and picture:
            several.append((sample, " ".join(f".{ext}" for ext in (picture, *texts) if ext)))
    names = [sample.name.encode(errors="backslashreplace") for sample in samples]
    notes = {
        "several": [len(several), *(several[0][0].name[:200], several[0][1][:200])] if several else [0, "", ""],
        "behind": [len(walk.behind), *walk.behind[:1]],
        "rest": walk.rest,
        "unused": dict(unused.most_common(SHOWN)),
    }
    arrays = {
        "rows": np.array(rows, ROW),
        "ends": np.cumsum([len(name) for name in names], dtype=np.uint32),
        "names": np.frombuffer(b"".join(names), np.uint8),
    }
    return Index(arrays, notes)


def sound(index: Index, size: int) -> bool:
    """Whether every member lies in the file or is said not to, the names are whole, and the notes are notes."""
    rows, ends = index.arrays["rows"], index.arrays["ends"]
    whole = [0, *ends[-1:].tolist()][-1] == len(index.arrays["names"]) and len(ends) == len(rows)
    inside = all(
        (rows[place].astype(np.int64) * BLOCK + rows[f"{place}_size"] <= size)[rows["fault"] == 0].all()
        for place in PLACES
    )
    several, behind, rest, unused = (index.notes[name] for name in ("several", "behind", "rest", "unused"))
    noted = [type(x) for x in (*several, *behind, rest, *unused.values())]
    return (
        whole
        and inside
        and bool((np.diff(ends.astype(np.int64)) >= 0).all() and (rows["fault"] < len(FAULTS)).all())
        and noted == [int, str, str, *(int for _ in (*behind, rest, *unused))]
    )


def probe(index: Index) -> int:
    """Where the header of the last sample's first member begins, or -1."""
    row = index.arrays["rows"][-1:]
    first = min((int(row[place][0]) for place in PLACES if len(row) and row[place][0]), default=0)
    return (first - 1) * BLOCK if first else -1
