"""The kinds of sources by name, and the one function that opens them."""

from __future__ import annotations

import importlib
import pkgutil

from blip_jax import buckets
from blip_jax.data import paths
from blip_jax.data.formats import csv, json
from blip_jax.data.formats.array_record import BLOCK, MAGIC, ArrayRecords
from blip_jax.data.formats.tar import TarShards
from blip_jax.data.formats.tfds import Tfds
from blip_jax.data.scenes.world import Scenes
from blip_jax.data.source import Source, expand, read_at, refuse_places
from blip_jax.data.table import IMAGE, URL, pick, to_fetch


def _scenes(name: str, cfg) -> Source:
    settings = {leaf: getattr(cfg, leaf) for leaf in ("seed", "count", "size", "noise", "captions", "easy")}
    return Scenes(**settings, name=name)


KINDS = {"json": json.open, "tar": TarShards, "array_record": ArrayRecords, "tfds": Tfds, "scenes": _scenes}
KINDS |= {"tsv": csv.open}
# kinds whose files look like another's; of the rest their own
READS = dict.fromkeys(("vqa", "nlvr", "visdial", "nocaps", "video_text", "video_qa", "karpathy"), "json") | {
    "tsv": "csv"
}
PACKED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7z": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\3\4": "unzip",
}


def open_source(name: str, cfg) -> Source:
    """Opens the source that `cfg` (a config.source) describes. ValueError: a wrong file list, no record."""
    formats = {module.name for module in pkgutil.iter_modules(__path__)}
    if cfg.kind not in KINDS.keys() | formats:
        raise ValueError(
            f"data source {name!r}: kind {cfg.kind!r} is unknown; choose one of {sorted(KINDS.keys() | formats)}"
        )
    if cfg.kind != "scenes":
        refuse_places(name, cfg)
    opened = KINDS[cfg.kind] if cfg.kind in KINDS else importlib.import_module(f"{__name__}.{cfg.kind}").open
    try:
        src = opened(name, cfg)
    except ValueError as e:
        raise ValueError(f"data source {name!r}: {other}" if (other := _mistaken(cfg)) else str(e)) from None
    src.name = name
    if not len(src):
        raise ValueError(
            f"data source {name!r}: {cfg.path or cfg.kind} holds no record; remove the source or give another path"
        )
    return src


def refuse_missing(cfgs) -> None:
    """ValueError: files of these (name -> config.source) are missing, all of them at once, before one is opened."""
    problems = []
    for name, cfg in sorted(cfgs.items()):
        if cfg.kind not in ("tfds", "scenes"):
            try:
                expand(name, cfg)
            except ValueError as e:
                problems.append(str(e))
    if problems:
        raise ValueError("; ".join(problems))


def kind_of(path: str) -> str:
    """The kind of source that reads the file `path`, by its content and name; "packed" or "arrow"; "" where unknown."""
    size = buckets.size(path)
    head = read_at(path, 0, 1 << 16)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"FEA1", b"\xff\xff\xff\xff")):
        return "arrow"
    if head[257:262] == b"ustar":
        return "tar"
    if head.startswith(tuple(PACKED)):
        return "packed"
    if size and size % BLOCK == 0 and MAGIC in read_at(path, size - BLOCK, 512):
        return "array_record"
    if text.startswith((b"{", b"[")):
        return "json"
    first = text.split(b"\n")[0].decode(errors="replace")
    names = [name for separator in csv.SEPARATORS for name in first.strip().replace('"', "").split(separator)]
    if path.lower().endswith((".csv", ".tsv")) or len(names) > 4 and pick(names, "", (*IMAGE, *URL)):
        return "csv"
    return ""


def _mistaken(cfg) -> str:
    """Whether a file of a source that cannot be opened is of another kind, and what to do; "" where it is not."""
    if cfg.kind in ("tfds", "scenes"):
        return ""
    try:
        files = paths.find(cfg.path, on_bucket=True)[:1000]
        found = next(((f, k) for f in files if (k := kind_of(f)) not in ("", READS.get(cfg.kind, cfg.kind))), None)
        addresses = cfg.kind == "json" and found is None and b'"url"' in (head := read_at(files[0], 0, 1 << 16))
        if addresses and f'"{cfg.image_key}"'.encode() not in head:
            return to_fetch(files[0], "url", cfg.caption_key)
    except (ValueError, OSError):
        return ""
    if found is None:
        return ""
    path, kind = found
    if kind == "packed":
        magic = read_at(path, 0, 4)
        tool = next(tool for start, tool in PACKED.items() if magic.startswith(start))
        return (
            f"{path!r} is compressed, which has no random access: unpack it once with `{tool}` and give what is in it"
        )
    if kind == "arrow":
        return (
            f"{path!r} is an Arrow file: convert it to Parquet, as pyarrow.parquet.write_table("
            f"pyarrow.feather.read_table({path!r}), 'table.parquet'), and give kind='parquet'"
        )
    what = {"csv": "a CSV or TSV table", "json": "a JSON list", "parquet": "a Parquet table", "tar": "a tar shard"}
    return (
        f"{path!r} is {what.get(kind, 'an ArrayRecord file')}, not {cfg.kind}: give the source kind={kind!r}, which "
        "reads it as it is, nothing needs to be converted"
    )
