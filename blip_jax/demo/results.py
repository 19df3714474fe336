"""What the demo found: from the folders of its stages to the numbers, pictures and curves that its report shows."""

from __future__ import annotations

import base64
import json
import os
import pathlib

import jax
import numpy as np

from blip_jax import __version__
from blip_jax.capfilt import decisions
from blip_jax.console import revision, say
from blip_jax.data.batches import EvalData
from blip_jax.data.formats import open_source
from blip_jax.demo import report, truth
from blip_jax.inference.load import load
from blip_jax.parallel import sharding
from blip_jax.tasks import two_stage

GALLERY = 24  # pictures shown with their texts
QUERIES = 6  # retrieval examples
SHOWN = 5  # pictures of each
LOSSES = ("loss_itc", "loss_itm", "loss_lm")


def collect(cfg, workdir: pathlib.Path, corpora: list[str], seconds: dict[str, float]) -> dict:
    """The `results` of report.write, from the folders that the stages of blip_jax/demo/stages.py left in `workdir`."""
    worlds = {"web": open_source("web", cfg.data.train.web)}
    threshold = json.loads((workdir / "capfilt" / "summary.json").read_text(encoding="utf-8"))["threshold"]
    texts = {name: truth.judged(workdir / name, worlds) for name in ("capfilt", "capfilt-beam")}
    nucleus, beam = (truth.noise_of(t, threshold) for t in texts.values())
    logs = {name: _rows(workdir / f"pretrain-{name}") for name in corpora}
    metrics = {name: _evaluation(rows) for name, rows in logs.items()}
    return {
        "title": "CapFilt on a world that knows the truth",
        "intro": _intro(cfg),
        "facts": _facts(cfg, workdir, seconds),
        "table1": [_corpus(name, texts["capfilt"], metrics[name]) for name in corpora[:4]],
        "table2": [
            {"method": "none", "metrics": metrics["neither"]},
            *(
                {
                    "method": method,
                    "noise_removed": _dropped(texts[folder]),
                    "true": 1 - found["synthetic_before"],
                    "metrics": metrics[name],
                }
                for method, folder, found, name in (
                    ("beam", "capfilt-beam", beam, "both-beam"),
                    ("nucleus", "capfilt", nucleus, "both"),
                )
            ),
        ],
        "curves": {
            name: _curves(rows)
            for name, rows in (logs | {name: _rows(workdir / name) for name in ("captioner", "filter")}).items()
        },
        "noise": nucleus,
        "gallery": _gallery(texts["capfilt"], worlds),
        "retrieval": _retrieved(cfg, workdir / "pretrain-both"),
        "phases": list(seconds.items()),
    }


def publish(results: dict, workdir: pathlib.Path) -> None:
    """Writes results.json and report.html and says what they hold."""
    plain = json.dumps(results, indent=1, default=lambda b: base64.b64encode(b).decode())
    beside = workdir / "results.json.tmp"
    beside.write_text(plain + "\n", encoding="utf-8")
    os.replace(beside, workdir / "results.json")
    report.write(workdir / "report.html", results)
    say("\n" + table(results))
    say(f"report: {workdir / 'report.html'}; numbers: {workdir / 'results.json'}")


def table(results: dict) -> str:
    """Both tables and the filter's figures for the console."""
    lines = [
        f"{'captioner':10} {'filter':8} {'texts':>8} {'noise':>8} {'image to text R@1':>18} {'text to image R@1':>18} "
        f"{'mean recall':>12}"
    ]
    for row in results["table1"]:
        m = row["metrics"]
        lines.append(
            f"{'yes' if row['captioner'] else '-':10} {'yes' if row['filter'] else '-':8} {row['texts']:8} "
            f"{100 * row['noise']:6.1f} % {m['txt_r1']:18.1f} {m['img_r1']:18.1f} {m['r_mean']:12.1f}"
        )
    lines.append("")
    for row in results["table2"][1:]:
        lines.append(
            f"{row['method']:10} true {100 * row['true']:5.1f} %, dropped by the filter "
            f"{100 * row['noise_removed']:5.1f} %, mean recall {row['metrics']['r_mean']:.1f}"
        )
    n = results["noise"]
    lines.append(
        f"\nfalse texts: web {100 * n['before']:.1f} % before, {_percent(n['web_after'])} among the kept; kept of web "
        f"and captioner {_percent(n['after'])}; filter at {n['threshold']:g}: precision {_percent(n['precision'])}, "
        f"recall {_percent(n['recall'])}; ROC AUC {n['auc']:.3f}, wrong captions {n['auc_wrong']:.3f}"
    )
    lines.append(f"{sum(s for _, s in results['phases']):.0f} s in all")
    return "\n".join(lines)


def _percent(share) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _intro(cfg) -> str:
    web, human = cfg.data.train.web, cfg.data.train.human
    return (
        f"Small pictures of coloured shapes come with captions as the web has them: {web.count} pictures, "
        f"{100 * web.noise:.0f} % of the captions wrong, partly wrong or no captions at all. {human.count} more come "
        f"with {human.captions} human captions each. A model pre-trained on both is fine-tuned on the human part, once "
        "into a captioner and once into a filter; these make a cleaner and larger corpus, and new models are "
        "pre-trained on each of the corpora, with equally many steps. Because the world is drawn, every text can be "
        "checked against what is in its picture."
    )


def _facts(cfg, workdir: pathlib.Path, seconds: dict) -> list[tuple[str, str]]:
    device = jax.devices()[0]
    return [
        ("command", f"blip-jax demo --workdir={workdir.name} --config.seed={cfg.seed}"),
        ("hardware", f"{jax.device_count()} {device.device_kind} device, {os.cpu_count()} processors"),
        ("software", f"blip_jax {__version__}, revision {revision()}, jax {jax.__version__}"),
        ("pre-training", f"{cfg.train.steps} steps of {cfg.train.batch} pairs each"),
        ("time", f"{sum(seconds.values()) / 60:.1f} minutes in all"),
    ]


def _rows(run: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _evaluation(rows: list[dict]) -> dict[str, float]:
    last = [r for r in rows if "eval/r_mean" in r][-1]
    return {name.removeprefix("eval/"): value for name, value in last.items() if name.startswith("eval/")}


def _curves(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    found = {loss: [(r["step"], r[f"train/{loss}"]) for r in rows if f"train/{loss}" in r] for loss in LOSSES}
    return {loss: points for loss, points in found.items() if points}


def _corpus(name: str, texts: list[truth.Judged], metrics: dict) -> dict:
    """A row of table 1; texts: those of the CapFilt run whose web and synthetic texts make up the corpora."""
    captioner, filtered = name in ("captioner", "both"), name in ("filter", "both")
    used = [
        j
        for j in texts
        if j.row.text
        and j.row.reason != decisions.REPEATED
        and (captioner or j.row.source == "web")
        and (j.row.kept or not filtered)
    ]
    return {
        "captioner": captioner,
        "filter": filtered,
        "images": len({j.row.key for j in used}),
        "texts": len(used),
        "noise": sum(not j.true for j in used) / max(1, len(used)),
        "metrics": metrics,
    }


def _dropped(texts: list[truth.Judged]) -> float:
    """Share of the synthetic texts that the filter dropped."""
    scored = [j for j in texts if j.row.source == "synthetic" and j.row.reason in (decisions.MATCHED, decisions.BELOW)]
    return sum(not j.row.kept for j in scored) / max(1, len(scored))


def _gallery(texts: list[truth.Judged], worlds: dict) -> list[dict]:
    """The first pictures with a scored web and synthetic text, six of each combination of decisions, in turn."""
    of_record: dict = {}
    for j in texts:
        if j.row.itm is not None:
            of_record.setdefault((j.row.dataset, j.row.record), {})[j.row.source] = j
    groups: dict = {}
    for place, pair in of_record.items():
        if len(pair) == 2:
            groups.setdefault((pair["web"].row.kept, pair["synthetic"].row.kept), []).append((place, pair))
    chosen = [g[i] for i in range(GALLERY) for g in (groups[k] for k in sorted(groups)) if i < len(g)][:GALLERY]
    out = []
    for (dataset, record), pair in chosen:
        card = {"image": worlds[dataset][record]["image"]}
        for source, j in pair.items():
            card |= {
                source: j.row.text,
                f"{source}_kept": j.row.kept,
                f"{source}_itm": j.row.itm,
                f"{source}_true": j.true,
            }
        out.append(card)
    return out


def _retrieved(cfg, run: pathlib.Path) -> list[dict]:
    """The best pictures for some captions of the evaluation data, by the newest checkpoint of `run`."""
    mesh = sharding.make_mesh(cfg.mesh)
    found = load(run, mesh, cfg.model.dtype)
    data = EvalData(cfg, found.tokenizer, cfg.data.eval, skipped_path=run / "skipped-eval.jsonl")
    scores = two_stage.two_stage_scores(cfg, found.model, found.params, data, found.tokenizer, mesh)
    source = next(iter(data.sources.values()))
    out = []
    for text in np.linspace(0, len(data.captions) - 1, QUERIES).astype(int):
        best = np.argsort(-scores.t2i[:, text])[:SHOWN]
        images = [
            {
                "image": source[int(i)]["image"],
                "right": bool(i == scores.text_image[text]),
                "score": float(scores.t2i[i, text]),
            }
            for i in best
        ]
        out.append({"query": data.captions[text], "images": images})
    return out
