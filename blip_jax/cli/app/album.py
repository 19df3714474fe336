"""Search in many photographs by words: their embeddings, computed once and kept."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from blip_jax import buckets
from blip_jax.inference import inputs

THREADS = 8  # that decode photographs
SAVE_EVERY = 30.0  # seconds of work that an end may cost
SAME = 1e-3  # how far the embedding of one picture is from itself where models agree, bfloat16 among them


class Album:
    """Photographs and their embeddings, f32[Q,E] each of unit norm: Q is 1, of BLIP-2 the number of queries.

    What cannot be used is left out, with its reason, in `bad`: {file: reason}.
    """

    def __init__(self, model, files: Sequence[str], kept: str = ""):
        """files: in the order in which they are shown; kept: .npz, also on a bucket, that embeddings are read from and
        written to, "" for none. Nothing is computed here. ValueError: `kept` is no such file."""
        self.model, self.files, self.kept = model, list(files), kept
        self.bad: dict[str, str] = {}
        self._rows: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        self._stored: dict[str, np.ndarray] = {}
        if kept and buckets.is_file(kept):
            self._stored = _read(kept)

    def search(self, text: str, n: int, progress: Callable[[int, int], Any] = lambda *_: None) -> list[tuple]:
        """The n photographs that fit a text best, [(file, cosine), ...], best first.

        progress: told (done, of how many) while embeddings are computed, at the first search. ValueError: no text, or
        no photograph that can be used.
        """
        wanted = self.model.features(texts=text)["text_embeds_proj"][0]  # f32[E]
        with self._lock:
            self._complete(progress)
            rows = list(self._rows.items())
        if not rows:
            file, reason = next(iter(self.bad.items()))
            raise ValueError(f"none of the {len(self.files)} photographs can be used, as {file}: {reason}")
        cosines = np.array([(row @ wanted).max() for _, row in rows])
        best = np.argsort(-cosines, kind="stable")[:n]
        return [(rows[i][0], float(cosines[i])) for i in best]

    def _complete(self, progress: Callable[[int, int], Any]) -> None:
        left = [file for file in self.files if file not in self._rows and file not in self.bad]
        if not left:
            return
        self._take_stored(left)
        left, saved = [file for file in left if file not in self._rows], time.monotonic()
        before = len(self._rows)
        size = 4 * self.model.batch
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for at in range(0, len(left), size):
                progress(len(self.files) - len(left) + at, len(self.files))
                self._embed([x for x in pool.map(self._pixels, left[at : at + size]) if x is not None])
                if self.kept and time.monotonic() - saved > SAVE_EVERY:
                    self._save()
                    saved = time.monotonic()
        if self.kept and len(self._rows) > before:
            self._save()

    def _pixels(self, file: str) -> tuple[str, np.ndarray] | None:
        cfg = self.model.cfg
        try:
            return file, inputs.pixels(inputs.Picture(file, file), cfg.model.img_size, cfg.data.max_pixels)
        except ValueError as e:
            self.bad[file] = str(e).removeprefix(f"{file}: ")
            return None

    def _embed(self, found: list[tuple[str, np.ndarray]]) -> None:
        if found:
            self._rows |= zip((file for file, _ in found), self._embeddings([img for _, img in found]))

    def _embeddings(self, images: list) -> np.ndarray:
        """f32[n,Q,E]"""
        rows = self.model.features(images)["image_embeds_proj"]
        return rows if self.model.queries else rows[:, :1]  # of a BLIP [CLS] alone stands for the whole

    # --- what is kept -------------------------------------------------------------------------------------------------
    def _take_stored(self, files: list[str]) -> None:
        """What was kept of photographs that have not changed since, by a model that is this one."""
        stored, self._stored = self._stored, {}
        if not stored:
            return
        probe = self._probe()
        if stored["probe"].shape != probe.shape or np.abs(stored["probe"] - probe).max() > SAME:
            return  # another model's
        at = {name: i for i, name in enumerate(stored["names"].tolist())}
        for file in files:
            i = at.get(_name(file))
            if i is not None and tuple(stored["states"][i]) == _state(file):
                self._rows[file] = stored["embeddings"][i].astype(np.float32)

    def _probe(self) -> np.ndarray:
        """The embedding of a picture that is always the same, f32[Q,E]: another model has another."""
        size = self.model.cfg.model.img_size
        y, x = np.mgrid[:size, :size] * 255 // size
        return self._embeddings([np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)])[0]

    def _save(self) -> None:
        files = list(self._rows)
        arrays = {
            "names": np.array([_name(file) for file in files]),
            "states": np.array([_state(file) for file in files], np.int64),
            "embeddings": np.stack([self._rows[file] for file in files]),
            "probe": self._probe(),
        }
        with buckets.whole(buckets.of(self.kept)) as path, path.open("wb") as out:
            np.savez(out, **arrays)


def _name(file: str) -> str:
    return str(pathlib.Path(file).absolute())


def _state(file: str) -> tuple[int, int]:
    """(bytes, time of the last change in ns), (0, 0) of a file that is gone"""
    try:
        found = os.stat(file)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _read(kept: str) -> dict[str, np.ndarray]:
    try:
        with buckets.opened(kept) as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in ("names", "states", "embeddings", "probe")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise ValueError(f"{kept} is not what `blip-jax app --features` writes ({e}): name another file") from None
