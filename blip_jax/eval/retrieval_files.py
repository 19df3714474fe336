"""The files of retrieval that are scored: which text belongs to which picture or video, and scores of all pairs.

Every reader says what a file lacks in one ValueError that begins with the file's name.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from blip_jax import buckets
from blip_jax.eval import recall
from blip_jax.eval.files import content, is_text, is_texts


class Pairs(NamedTuple):
    """Which texts belong to which picture or video."""

    owners: int  # pictures or videos
    text_owner: np.ndarray  # i64[texts]
    videos: bool


def references(path: str) -> Pairs:
    """BLIP's list of {image, caption: one or several}, or of {clip_name, caption}, MSR-VTT's; texts in their order.

    MSR-VTT's official file has `videos` and `sentences`: texts are those of the first video, of the second, and so on.
    """
    found = content(path)
    if isinstance(found, dict) and "sentences" in found:
        found = _by_video(path, found)
    numbers: dict[str, int] = {}
    owner, videos = [], False
    for row in found if isinstance(found, list) else [found]:
        row = row if isinstance(row, dict) else {}
        clip = row.get("clip_name", row.get("video"))
        name, texts = row.get("image", clip), row.get("caption")
        texts = [texts] if is_text(texts) else texts
        if not is_text(name) or not is_texts(texts):
            raise ValueError(
                f"{path}: a list of {{image, caption}} is expected, or of {{clip_name, caption}}, not {str(row)[:120]}"
            )
        videos |= "image" not in row
        owner += [numbers.setdefault(name, len(numbers))] * len(texts)
    if not owner:
        raise ValueError(f"{path}: it holds no text to retrieve")
    return Pairs(len(numbers), np.array(owner), videos)


def _by_video(path: str, official: dict) -> list[dict]:
    clips: dict[str, list] = {}
    try:
        clips |= {row["video_id"]: [] for row in official.get("videos", [])}
        for row in official["sentences"]:
            clips.setdefault(row["video_id"], []).append(row["caption"])
    except (TypeError, KeyError):
        raise ValueError(f"{path}: `videos` and `sentences` of MSR-VTT have a `video_id`, these a `caption`") from None
    return [{"clip_name": name, "caption": texts} for name, texts in clips.items() if texts]


FORWARD = ("i2t", "score_i2t", "scores_i2t", "v2t", "score_v2t", "scores_v2t")
BACK = ("t2i", "score_t2i", "scores_t2i", "t2v", "score_t2v", "scores_t2v")
SHORTLISTS = ("i2t", "i2t_text", "t2i", "t2i_image", "text_image")  # of scores.npz, `tasks.two_stage.ranked`


def scores(path: str, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Scores by which pictures rank texts and texts pictures, both f[images, texts].

    The scores.npz of `blip-jax evaluate`, which has the shortlists alone; a .npz of `i2t` [images, texts] and `t2i`
    [texts, images], as BLIP's evaluation has them (also v2t, t2v, with score_ or scores_ before); or a .npy of one
    matrix [images, texts] for both. ValueError: it is another file, or of another list, or it has NaN.
    """
    images, texts = pairs.owners, len(pairs.text_owner)
    try:
        with buckets.opened(path) as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                found = {"the matrix": (loaded, (images, texts))}
            elif set(SHORTLISTS) <= set(loaded):
                found = _shortlists(loaded, pairs)
            else:
                names = [next((n for n in wanted if n in loaded), None) for wanted in (FORWARD, BACK)]
                if None in names:
                    raise ValueError(f"it has {sorted(loaded)}, not `i2t` and `t2i`")
                found = {name: (loaded[name], shape) for name, shape in zip(names, ((images, texts), (texts, images)))}
    except (ValueError, EOFError, KeyError, IndexError) as e:
        raise ValueError(
            f"{path}: no scores of retrieval ({e}): scores.npz of `blip-jax evaluate` on the same list is expected, a "
            ".npz with `i2t` [images, texts] and `t2i` [texts, images], or a .npy [images, texts]"
        ) from None
    for name, (values, shape) in found.items():
        if values.shape != shape or values.dtype.kind not in "fiu":
            raise ValueError(
                f"{path}: {name} is {values.dtype}{list(values.shape)}, but the references have {images} pictures and "
                f"{texts} texts: numbers {list(shape)} are expected"
            )
        if np.isnan(values).any():
            raise ValueError(f"{path}: {name} has NaN at {np.argwhere(np.isnan(values))[0].tolist()}")
    matrices = [values for values, _ in found.values()]
    return (matrices[0], matrices[0]) if len(matrices) == 1 else (matrices[0], matrices[1].T)


def _shortlists(loaded, pairs: Pairs) -> dict:
    """{"i2t", "t2i": (matrix, its shape)} of scores.npz. ValueError, IndexError: it is of other pictures or texts."""
    owner, images, texts = loaded["text_image"], pairs.owners, len(pairs.text_owner)
    if not np.array_equal(owner, pairs.text_owner):
        raise ValueError(
            f"it is of {len(loaded['i2t'])} pictures and {len(owner)} texts, in their order, and the references have "
            f"{images} and {texts}, or another order: what cannot be read is not in it, nor what eval.limit leaves out"
        )
    i2t = recall.spread(loaded["i2t_text"], loaded["i2t"], texts)
    t2i = recall.spread(loaded["t2i_image"], loaded["t2i"], images)
    return {"i2t": (i2t, (images, texts)), "t2i": (t2i, (texts, images))}
