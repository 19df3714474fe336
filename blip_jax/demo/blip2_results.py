"""What BLIP-2 in miniature found: from the folders of its stages (blip2.py) to what its report shows."""

from __future__ import annotations

import json
import os
import pathlib

from ml_collections import ConfigDict

from blip_jax import checkpoint
from blip_jax.config import source
from blip_jax.console import say
from blip_jax.data.formats import open_source
from blip_jax.demo import relations, truth
from blip_jax.demo.results import curves_of, evaluation_of, facts_of, rows_of, scores_of, told
from blip_jax.inference.pretrained import from_pretrained

UNSEEN = 500  # pictures that are captioned and retrieved
CAPTIONED = {"stage2": relations.BOTH, "stage2-alone": relations.ALONE}  # folder of a run -> what the report calls it
RETRIEVED = {"stage1": relations.WITH_ITG, "stage1-without-itg": relations.WITHOUT_ITG}
TOWER = {"blip": "BLIP, whose tower it is"}
BY_CHANCE = "captions of other pictures"
GALLERY = 12  # pictures shown with their captions
PICTURES = 64  # captioned at once


def unseen(cfg) -> ConfigDict:
    """The pictures that no stage learns from, as `cfg.data.eval`."""
    world, c = cfg.data.train.world, ConfigDict()
    c.scenes = source("scenes", count=UNSEEN, seed=1, size=world.size, easy=world.easy)
    return c


def caption(cfg, workdir: pathlib.Path) -> None:
    """Captions of the unseen pictures by the newest checkpoints of CAPTIONED, by beam search; once of each."""
    pictures = open_source("scenes", unseen(cfg).scenes)
    for name in CAPTIONED:
        newest = checkpoint.newest(workdir / name)
        if (file := _captions(newest)).exists():
            continue
        say(f"{name}: captions of {len(pictures)} unseen pictures, by checkpoint {newest.name}")
        model = from_pretrained(newest, dtype=cfg.model.dtype, batch=PICTURES)
        whole = [pictures[i]["image"] for i in range(len(pictures))]
        found = model.caption(whole, max_length=cfg.text.max_len)
        beside = file.with_suffix(".tmp")
        beside.write_text(json.dumps([rows[0]["caption"] for rows in found], indent=1) + "\n", encoding="utf-8")
        os.replace(beside, file)


def _captions(newest: pathlib.Path) -> pathlib.Path:
    return newest.parent.parent / f"captions-{newest.name}.json"


def collect(cfg, workdir: pathlib.Path) -> dict:
    """The `results` of report.write but for its phases, from what the stages of blip2.py left in `workdir`."""
    pictures = open_source("scenes", unseen(cfg).scenes)
    scenes = [pictures.scene(i) for i in range(len(pictures))]
    texts = {
        name: json.loads(_captions(checkpoint.newest(workdir / run)).read_text(encoding="utf-8"))
        for run, name in CAPTIONED.items()
    }
    hits = {name: truth.hits(scenes, own) for name, own in texts.items()}
    chance = truth.hits(scenes[1:] + scenes[:1], texts[relations.BOTH])
    scores = {name: scores_of(_evaluated(cfg, workdir / run), workdir / run) for run, name in RETRIEVED.items()}
    ranked = {name: relations.of_pictures(s.i2t, s.t2i, s.text_image) for name, s in scores.items()}
    by_cosine = {name: relations.of_pictures(s.cosine, s.cosine, s.text_image) for name, s in scores.items()}
    logs = {name: rows_of(workdir / run) for run, name in (CAPTIONED | RETRIEVED | TOWER).items()}
    found = [("figure 5", relations.figure5(hits)), ("table 6", relations.table6(ranked, by_cosine))]
    return {
        "title": "BLIP-2 on a world that knows the truth",
        "intro": _intro(cfg),
        "facts": facts_of(cfg, f"blip-jax demo blip2 --workdir={workdir.name}", "second stage"),
        "captioners": [
            {"name": name, **{part: float(each.mean()) for part, each in own.items()}}
            for name, own in (hits | {BY_CHANCE: chance}).items()
        ],
        "objectives": [
            {"itg": name == relations.WITH_ITG, "metrics": evaluation_of(logs[name])} for name in RETRIEVED.values()
        ],
        "relations": [{"table": at, **r._asdict(), "verdict": r.verdict} for at, rows in found for r in rows],
        "captions": [
            {
                "image": pictures[i]["image"],
                "texts": [
                    {"by": name, "text": own[i], "true": bool(hits[name][truth.WHOLE][i])}
                    for name, own in texts.items()
                ],
            }
            for i in range(min(GALLERY, len(pictures)))
        ],
        "curves": {name: curves_of(rows) for name, rows in logs.items()}
        | {"language model": curves_of(rows_of(workdir / "language"))},
    }


def _evaluated(cfg, run: pathlib.Path) -> ConfigDict:
    """`cfg` with the evaluation data and texts of the first stage in `run`."""
    c = ConfigDict(cfg).copy_and_resolve_references().unlock()
    kept = json.loads((run / "config.json").read_text(encoding="utf-8"))
    c.data.eval, c.text.max_len = unseen(cfg), kept["task"]["eval_len"]
    return c.lock()


def _intro(cfg) -> str:
    world = cfg.data.train.world
    return (
        f"An image tower, of a BLIP that was pre-trained on {world.count} small pictures of coloured shapes, and a "
        "language model, which learnt from captions alone and never saw a picture, are both frozen. Between them "
        "learns a Q-Former: in a first stage what of a picture texts speak of, in a second one to be understood by the "
        "language model. The paper's two ablations leave out the first stage, or from it the generation of texts. "
        "Because the world is drawn, every caption can be checked against what is in its picture."
    )


def table(results: dict) -> str:
    """Both tables for the console."""
    lines = [f"{'captions by':28} {'colours right':>14} {'objects right':>14} {'wholly true':>12}"]
    for row in results["captioners"]:
        shares = (f"{100 * row[part]:{width}.1f} %" for part, width in zip(truth.PARTS, (12, 12, 10)))
        lines.append(f"{row['name']:28} {' '.join(shares)}")
    lines += ["", f"{'first stage':28} {'mean recall':>14} {'by cosine':>14}"]
    for row in results["objectives"]:
        m = row["metrics"]
        name = relations.WITH_ITG if row["itg"] else relations.WITHOUT_ITG
        lines.append(f"{name:28} {m['r_mean']:14.1f} {m['itc_r_mean']:14.1f}")
    lines += ["", *(told(r) for r in results["relations"])]
    lines.append(f"{sum(s for _, s in results['phases']):.0f} s in all")
    return "\n".join(lines)
