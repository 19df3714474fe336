"""Encoded pictures and record folders for the tests of the data package."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image


def encode(im: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    im.save(out, kind, **options)
    return out.getvalue()


def png_header(w: int, h: int) -> bytes:
    """A PNG of w x h whose pixels are missing."""
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
    return head + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


def noise(seed: int, w: int = 40, h: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


def records(n: int) -> list[dict]:
    """n good records; even ones have two captions."""
    captions = lambda i: [f"picture number {i}", f"noise of seed {i}"][: 2 - i % 2]
    return [
        {"key": f"{i:04d}", "image": encode(noise(i)), "captions": captions(i), "image_id": f"id{i}"} for i in range(n)
    ]


def write_json(folder, rows: list[dict], name: str = "list.json", **options):
    """BLIP's layout: <folder>/img/<key>.jpg and a list beside it. Returns the path of the list."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    table = []
    for r in rows:
        (folder / "img" / f"{r['key']}.jpg").write_bytes(r["image"])
        caption = r["captions"] if len(r["captions"]) != 1 else r["captions"][0]
        table.append({"image": f"img/{r['key']}.jpg", "caption": caption, "image_id": r["image_id"]})
    (folder / name).write_text(json.dumps(table, **options), encoding="utf-8")
    return folder / name


def add_to_tar(tar, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
