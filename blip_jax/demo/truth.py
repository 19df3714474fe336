"""How true captions are, and how well a CapFilt run told true texts from false ones.

It is measured against the built-in world, which knows the truth.
"""

from __future__ import annotations

import collections
import pathlib
from typing import NamedTuple

import numpy as np

from blip_jax.capfilt import decisions
from blip_jax.data.scenes import words
from blip_jax.data.scenes.world import Scenes
from blip_jax.demo import relations

WHOLE = "whole"
PARTS = {"colours": ("colour",), "objects": ("colour", "shape"), WHOLE: ()}  # of what a caption claims: of objects
POINTS = 101  # of a ROC curve that is returned
BINS = 20  # of matching probabilities, 0 to 1


class Judged(NamedTuple):
    """A row of the decision table and the truth about it."""

    row: decisions.Row
    true: bool  # whether all that the text says holds of the picture
    noise: str | None  # web texts: kind of noise; None: a clean caption


def judged(run, worlds: dict[str, Scenes]) -> list[Judged]:
    """Every text of the finished CapFilt run in folder `run`.

    worlds: its sources by name. Unreadable records are left out.
    """
    out = []
    for table in sorted(pathlib.Path(run).glob("shards/*/decisions.parquet")):
        seen: collections.Counter = collections.Counter()
        for row in decisions.rows_of(table):
            if row.reason.startswith(decisions.UNREADABLE):
                continue
            world, kind = worlds[row.dataset], None
            if row.source == "web":
                kind = world.web_captions(row.record)[seen[row.record]][0]
                seen[row.record] += 1
            out.append(Judged(row, words.is_true(world.scene(row.record), row.text), kind))
    return out


def hits(scenes: list[dict], captions: list[str]) -> dict[str, np.ndarray]:
    """For each caption, whether it is true of its scene: {part of PARTS: f64[n], 1 or 0}.

    "colours": all colours of the objects that it names are there, and it names one; "objects": so are all objects, by
    colour and shape as far as it says them; "whole": all that it says holds. A caption outside of the grammar of the
    world has none of these.
    """
    return {part: np.array([_hit(*pair, part) for pair in zip(scenes, captions, strict=True)], float) for part in PARTS}


def _hit(scene: dict, caption: str, part: str) -> bool:
    claims = words.read(caption)
    if claims is None or part == WHOLE:
        return claims is not None and words.holds(claims, scene)
    said = [[(name, value) for name, value in one if name in PARTS[part]] for one in claims.objects]
    return any(said) and words.holds(words.Claims(said, [], []), scene)


def roc(scores, positive) -> tuple[list[tuple[float, float]], float]:
    """ROC curve [(false positive rate, true positive rate)] of at most POINTS points, and the area under it.

    scores f[n]: higher means positive; positive bool[n]. Equal scores count half. ValueError: one of the classes is
    empty.
    """
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
    if positive.all() or not positive.any():
        raise ValueError(f"a ROC curve needs both classes: {positive.sum()} of {positive.size} texts are true")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of each run of equal scores
    tpr = np.append(0, np.cumsum(positive[order])[last] / positive.sum())
    fpr = np.append(0, np.cumsum(~positive[order])[last] / (~positive).sum())
    shown = np.unique(np.linspace(0, len(fpr) - 1, POINTS).round().astype(int))
    return [(float(fpr[i]), float(tpr[i])) for i in shown], float(np.trapezoid(tpr, fpr))


def decided(texts: list[Judged]) -> dict:
    """Whether those that the filter dropped are more often false than those that it kept, of the texts that it scored.

    {"share_dropped", "false_dropped", "false_kept": shares, None of no text; "difference" of the latter two, None where
    one is; "error", half its 95 % interval; "verdict" of relations.verdict}
    """
    scored = [j for j in texts if j.row.reason in (decisions.MATCHED, decisions.BELOW)]
    groups = [[not j.true for j in scored if j.row.kept == kept] for kept in (False, True)]
    dropped, kept = (float(np.mean(group)) if group else None for group in groups)
    out = {"share_dropped": len(groups[0]) / len(scored) if scored else None}
    out |= {"false_dropped": dropped, "false_kept": kept, "difference": None, "error": None, "verdict": "undecided"}
    if dropped is None or kept is None:
        return out
    error = relations.SIGMAS * np.sqrt(sum(np.var(group) / len(group) for group in groups))
    found = dropped - kept
    return out | {"difference": found, "error": float(error), "verdict": relations.verdict(found, float(error))}


def noise_of(texts: list[Judged], threshold: float) -> dict:
    """Of all texts of a run: noise before and after, precision, recall and ROC of the filter.

    All of them on texts that were scored or are empty:
    {"threshold", "before" and "after": share of false texts among the web's, among all that is kept; "web_after",
    "synthetic_before", "synthetic_after"; "precision", "recall" of keeping true texts, web and synthetic; "auc", "roc"
    of the matching probability over these; "auc_wrong": clean web captions against captions of other pictures; "rows":
    [(kind of web noise, texts, share dropped)], "decided": {source: `decided` of its texts}, "hist": {"true", "false":
    texts by matching probability, "edges"}};
    shares of no text are None
    """
    texts = [j for j in texts if j.row.reason != decisions.REPEATED]
    scored = [j for j in texts if j.row.itm is not None]
    web, synthetic = ([j for j in texts if j.row.source == s] for s in decisions.SOURCES)
    kept = [j for j in texts if j.row.kept]

    def false(group: list[Judged]) -> float | None:
        return float(np.mean([not j.true for j in group])) if group else None

    def curve_of(group: list[Judged]) -> tuple:
        return roc([j.row.itm for j in group], [j.true for j in group])

    curve, auc = curve_of(scored)
    against = [j for j in scored if j.row.source == "web" and j.noise in (None, "wrong")]

    edges = np.linspace(0, 1, BINS + 1)
    kinds = collections.Counter(j.noise or "none" for j in web)
    dropped = collections.Counter(j.noise or "none" for j in web if not j.row.kept)
    true_kept = sum(j.true for j in kept)
    return {
        "threshold": threshold,
        "before": false(web),
        "after": false(kept),
        "web_after": false([j for j in kept if j.row.source == "web"]),
        "synthetic_before": false(synthetic),
        "synthetic_after": false([j for j in kept if j.row.source == "synthetic"]),
        "precision": true_kept / len(kept) if kept else None,
        "recall": true_kept / max(1, sum(j.true for j in texts)),
        "auc": auc,
        "roc": curve,
        "auc_wrong": curve_of(against)[1],
        "decided": {source: decided([j for j in texts if j.row.source == source]) for source in decisions.SOURCES},
        "rows": [(kind, n, dropped[kind] / n) for kind, n in sorted(kinds.items(), key=lambda k: -k[1])],
        "hist": {
            **{
                name: np.histogram([j.row.itm for j in scored if j.true == true], edges)[0].tolist()
                for name, true in (("true", True), ("false", False))
            },
            "edges": edges.tolist(),
        },
    }
