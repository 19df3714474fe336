"""Recall from scores of image-text retrieval, in both directions: numbers in, numbers out.

Ties: the shortlist prefers the lower index; a rank counts every candidate that scores as high as the right one as
before it, so a constant score earns nothing.
"""

from __future__ import annotations

import math

import numpy as np

RECALLS = (1, 5, 10)
CHUNK = 1024  # rows of a score matrix handled at a time, to bound temporaries
UNSCORED = -100.0  # score of a pair outside the shortlist


def shortlist(similarity: np.ndarray, k: int) -> np.ndarray:
    """bool[N,M]: True for the k largest entries of each row of f32[N,M].

    Of equal values those of lower columns come first. k > M keeps all.
    """
    n, m = similarity.shape
    if k >= m:
        return np.ones((n, m), bool)
    keep = np.empty((n, m), bool)
    for start in range(0, n, CHUNK):
        rows = similarity[start : start + CHUNK]
        kth = -np.partition(-rows, k - 1, axis=1)[:, k - 1 : k]
        above, equal = rows > kth, rows == kth
        room = k - above.sum(axis=1, keepdims=True)
        keep[start : start + CHUNK] = above | (equal & (np.cumsum(equal, axis=1) <= room))
    return keep


def compact(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(columns i32[N,k], their scores f32[N,k]) of f32[N,M]: what is not UNSCORED, k the most of a row; rows with
    less are filled with pairs that are.
    """
    real = scores != UNSCORED
    k = int(real.sum(axis=1).max())
    columns = np.nonzero(shortlist(real.astype(np.int8), k))[1].reshape(len(scores), k)
    return columns.astype(np.int32), np.take_along_axis(scores, columns, axis=1)


def spread(columns: np.ndarray, values: np.ndarray, m: int) -> np.ndarray:
    """The f32[N,M] that `compact` made these of. IndexError: a column that is not of m."""
    out = np.full((len(columns), m), UNSCORED, values.dtype)
    np.put_along_axis(out, columns, values, axis=1)
    return out


def image_to_text_ranks(scores: np.ndarray, text_image: np.ndarray) -> np.ndarray:
    """Rank (from 0) of the best of each image's own captions among all texts.

    Args: scores f32[n_images, n_texts]; text_image i64[n_texts], the image of each text.
    Returns i64 of the images that have a caption, in order: how many texts of other images score at least as high.
    """
    own = scores[text_image, np.arange(len(text_image))]
    best = np.full(len(scores), -np.inf, scores.dtype)
    np.maximum.at(best, text_image, own)
    as_high = np.concatenate(
        [(scores[s : s + CHUNK] >= best[s : s + CHUNK, None]).sum(axis=1) for s in range(0, len(scores), CHUNK)]
    )
    own_as_high = np.bincount(text_image, weights=own == best[text_image], minlength=len(scores)).astype(np.int64)
    has_caption = np.bincount(text_image, minlength=len(scores)) > 0
    return (as_high - own_as_high)[has_caption]


def text_to_image_ranks(scores: np.ndarray, text_image: np.ndarray) -> np.ndarray:
    """i64[n_texts]: how many images other than its own score at least as high for each text; arguments as above."""
    own = scores[text_image, np.arange(len(text_image))]
    return sum((scores[s : s + CHUNK] >= own).sum(axis=0) for s in range(0, len(scores), CHUNK)) - 1


def recalls(ranks: np.ndarray) -> dict[str, float]:
    """{"r1", "r5", "r10", "r_mean"} in percent from ranks i64[N] that start at 0; r_mean is the mean of the three."""
    out = {f"r{k}": 100.0 * float(np.mean(ranks < k)) for k in RECALLS}
    return {**out, "r_mean": sum(out.values()) / len(RECALLS)}


def both_ways(i2t: np.ndarray, t2i: np.ndarray, text_image: np.ndarray) -> dict[str, float]:
    """Recalls of both directions in percent, their means, and "r_mean", the mean of the two means.

    Args: i2t, t2i f32[n_images, n_texts], the scores that images rank texts by, and texts images; text_image
    i64[n_texts]. Returns {"txt_r1", "txt_r5", "txt_r10", "txt_r_mean", "img_r1", ..., "r_mean"}: txt_* retrieves texts,
    img_* images.
    """
    txt = recalls(image_to_text_ranks(i2t, text_image))
    img = recalls(text_to_image_ranks(t2i, text_image))
    out = {f"txt_{name}": value for name, value in txt.items()} | {f"img_{name}": value for name, value in img.items()}
    return {**out, "r_mean": (txt["r_mean"] + img["r_mean"]) / 2}


def video(v2t: np.ndarray, t2v: np.ndarray, text_video: np.ndarray) -> dict[str, float]:
    """As `both_ways`, of videos: vid_* retrieves videos, the paper's direction; "vid_mdR": the median rank, from 1.

    Args: v2t, t2v f32[n_videos, n_texts]; text_video i64[n_texts].
    """
    out = {name.replace("img_", "vid_"): value for name, value in both_ways(v2t, t2v, text_video).items()}
    return {**out, "vid_mdR": float(np.median(text_to_image_ranks(t2v, text_video) + 1))}


def rerank_units(needed: np.ndarray, texts_per_unit: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the wanted pairs into units of one image and up to G = `texts_per_unit` of its texts.

    Args: needed bool[n_images, n_texts].
    Returns: image i64[U] and text i64[U,G] of each unit, -1 where a unit has fewer texts. Every wanted pair occurs
      once.
    """
    image, text = np.nonzero(needed)  # sorted by image
    per_image = np.bincount(image, minlength=len(needed))
    place = np.arange(len(image)) - (np.cumsum(per_image) - per_image)[image]  # of the pair among its image's
    units_of = -(-per_image // texts_per_unit)
    unit = (np.cumsum(units_of) - units_of)[image] + place // texts_per_unit
    texts = np.full((units_of.sum(), texts_per_unit), -1, np.int64)
    texts[unit, place % texts_per_unit] = text
    return np.repeat(np.arange(len(needed)), units_of), texts


def table(result: dict) -> str:
    """Recalls of both directions in percent, re-ranked and by cosine alone, beside what chance would give.

    result: of `evaluate`, with "images" and "texts", how many there are.
    """
    images, texts = result["images"], result["texts"]
    lines = [f"{f'{images} images, {texts} captions':28} {'R@1':>7} {'R@5':>7} {'R@10':>7}"]
    for name, side in (("image to text", "txt"), ("text to image", "img")):
        for suffix, prefix in (("", ""), (", cosine alone", "itc_")):
            numbers = [result[f"{prefix}{side}_r{k}"] for k in RECALLS]
            lines.append(f"{name + suffix:28} " + " ".join(f"{n:7.1f}" for n in numbers))
        chance = [chance_recall(images, texts, k, side) for k in RECALLS]
        lines.append(f"{name + ', chance':28} " + " ".join(f"{n:7.1f}" for n in chance))
    return "\n".join(lines)


def chance_recall(images: int, texts: int, k: int, side: str) -> float:
    """R@k in percent of a random order. side "img": one image is right; "txt": texts/images of the texts are right."""
    if side == "img":
        return 100.0 * min(k, images) / images
    right = max(1, round(texts / images))
    return 100.0 * (1 - math.comb(texts - right, min(k, texts)) / math.comb(texts, min(k, texts)))
