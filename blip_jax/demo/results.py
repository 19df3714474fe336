"""What the demo found: from the folders of its stages to the numbers, pictures and curves that its report shows."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import platform
from collections.abc import Sequence

import jax
import numpy as np

from blip_jax import __version__, checkpoint
from blip_jax.capfilt import decisions
from blip_jax.console import revision, say
from blip_jax.data.evaluation import EvalData
from blip_jax.data.formats import open_source
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.demo import relations, report, truth
from blip_jax.inference.load import load
from blip_jax.parallel import sharding
from blip_jax.tasks import two_stage

VERDICTS = {"holds": "as there", "undecided": "within the error", "reversed": "the other way round"}
GALLERY = 24  # pictures shown with their texts
QUERIES = 6  # retrieval examples
SHOWN = 5  # pictures of each
DECODED = {  # how captions are made -> (pre-training on them, their CapFilt run), in the order of table 2
    "beam": ("both-beam", "capfilt-beam"),
    "nucleus": ("both", "capfilt"),
}
LOSSES = ("loss_itc", "loss_itm", "loss_lm")


def collect(
    cfg, workdir: pathlib.Path, corpora: Sequence[str], fine_tuned: list[str], left_out: Sequence[str] = ()
) -> dict:
    """The `results` of report.write but for its phases, from what the stages of stages.py left in `workdir`.

    corpora, fine_tuned: names of the pre-trainings and of the fine-tunings; left_out: of what `--quick` does not have.
    """
    command = "blip-jax demo --quick" if left_out else "blip-jax demo"
    worlds = {"web": open_source("web", cfg.data.train.web)}
    threshold = json.loads((workdir / "capfilt" / "summary.json").read_text(encoding="utf-8"))["threshold"]
    decoded = {kind: run for kind, run in DECODED.items() if run[0] in corpora}
    texts = {kind: truth.judged(workdir / folder, worlds) for kind, (_, folder) in decoded.items()}
    noise = {kind: truth.noise_of(t, threshold) for kind, t in texts.items()}
    logs = {name: rows_of(workdir / f"pretrain-{name}") for name in corpora}
    metrics = {name: evaluation_of(rows) for name, rows in logs.items()}
    scores = {name: scores_of(cfg, workdir / f"pretrain-{name}") for name in corpora}
    pictures = {name: relations.of_pictures(s.i2t, s.t2i, s.text_image) for name, s in scores.items()}
    return {
        "title": "CapFilt on a world that knows the truth",
        "intro": _intro(cfg) + (f" Left out here: {', '.join(left_out)}." if left_out else ""),
        "facts": facts_of(cfg, f"{command} --workdir={workdir.name}", "pre-training"),
        "table1": [_corpus(name, texts["nucleus"], metrics[name]) for name in corpora if name != DECODED["beam"][0]],
        "table2": _decodings(texts, noise, metrics) if len(decoded) > 1 else [],
        "relations": _relations(pictures, {kind: _dropped(of) for kind, of in texts.items()}),
        "curves": {f"pre-training: {name}": curves_of(rows) for name, rows in logs.items()}
        | {f"fine-tuning: {name}": curves_of(rows_of(workdir / name)) for name in fine_tuned},
        "noise": noise["nucleus"],
        "gallery": _gallery(texts["nucleus"], worlds),
        "retrieval": _retrieved(cfg, workdir / "pretrain-both", scores["both"]),
    }


def publish(results: dict, tables: str, workdir: pathlib.Path) -> None:
    """Writes results.json and report.html and says what they hold; tables: for the console."""
    plain = json.dumps(results, indent=1, default=lambda b: base64.b64encode(b).decode())
    beside = workdir / "results.json.tmp"
    beside.write_text(plain + "\n", encoding="utf-8")
    os.replace(beside, workdir / "results.json")
    report.write(workdir / "report.html", results)
    say("\n" + tables)
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
    if results["table2"]:
        lines.append("")
    for row in results["table2"][1:]:
        lines.append(
            f"{row['method']:10} true {100 * row['true']:5.1f} %, dropped by the filter "
            f"{100 * row['noise_removed']:5.1f} %, mean recall {row['metrics']['r_mean']:.1f}"
        )
    lines.append("")
    lines += [told(r) for r in results["relations"]]
    n = results["noise"]
    lines.append(
        f"\nfalse texts: web {100 * n['before']:.1f} % before, {_percent(n['web_after'])} among the kept; kept of web "
        f"and captioner {_percent(n['after'])}; filter at {n['threshold']:g}: precision {_percent(n['precision'])}, "
        f"recall {_percent(n['recall'])}; ROC AUC of all texts {n['auc']:.3f}, of clean and "
        f"wrong captions {n['auc_wrong']:.3f}"
    )
    lines.append(f"{sum(s for _, s in results['phases']):.0f} s in all")
    return "\n".join(lines)


def told(relation: dict) -> str:
    """A row of `relations` for the console."""
    r, what = relation, "" if relation["what"] == relations.RECALL else f", {relation['what']}"
    return (
        f"the paper has {r['larger']} > {r['smaller']}{what}: here {r['difference']:+.1f} +- {r['error']:.1f}, "
        f"{VERDICTS[r['verdict']]}"
    )


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


def facts_of(cfg, command: str, training: str) -> list[tuple[str, str]]:
    """What the numbers depend on, down to the bit: the threads and the vector instructions of a CPU, too.

    command: without --config.seed; training: name of the runs that have cfg.train.steps.
    """
    device = jax.devices()[0]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        ("command", f"{command} --config.seed={cfg.seed}"),
        (
            "hardware",
            f"{jax.device_count()} {device.device_kind} device; {threads} of {os.cpu_count()} cores, {_processor()}",
        ),
        ("software", f"blip_jax {__version__}, revision {revision()}, jax {jax.__version__}"),
        (training, f"{cfg.train.steps} steps of {cfg.train.batch} pairs each"),
    ]


def _processor() -> str:
    """Name of the CPU, as far as the system tells it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def rows_of(run: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def evaluation_of(rows: list[dict]) -> dict[str, float]:
    last = [r for r in rows if "eval/r_mean" in r][-1]
    return {name.removeprefix("eval/"): value for name, value in last.items() if name.startswith("eval/")}


def curves_of(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
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


def _decodings(texts: dict[str, list[truth.Judged]], noise: dict[str, dict], metrics: dict[str, dict]) -> list[dict]:
    """Table 2; texts, noise: of each of DECODED; metrics: of each pre-training."""
    rows = [
        {
            "method": kind,
            "noise_removed": _share(_dropped(texts[kind])),
            "true": 1 - noise[kind]["synthetic_before"],
            "metrics": metrics[corpus],
        }
        for kind, (corpus, _) in DECODED.items()
    ]
    return [{"method": "none", "metrics": metrics["neither"]}, *rows]


def _dropped(texts: list[truth.Judged]) -> tuple[int, int]:
    """(synthetic texts that the filter dropped, those that it scored)"""
    scored = [j for j in texts if j.row.source == "synthetic" and j.row.reason in (decisions.MATCHED, decisions.BELOW)]
    return sum(not j.row.kept for j in scored), len(scored)


def _share(counts: tuple[int, int]) -> float:
    return counts[0] / max(1, counts[1])


def _relations(pictures: dict[str, np.ndarray], dropped: dict[str, tuple[int, int]]) -> list[dict]:
    """The `relations` of report.write; pictures: name of a pre-training -> `relations.of_pictures`."""
    corpora = {"filter": "filter only", "captioner": "captioner only"}
    first = {corpora.get(name, name): values for name, values in pictures.items()}
    second = {kind: pictures[corpus] for kind, (corpus, _) in DECODED.items() if corpus in pictures}
    second["neither"] = pictures["neither"]
    found = [(1, relations.table1(first)), (2, relations.table2(second, dropped))]
    return [{"table": table, **r._asdict(), "verdict": r.verdict} for table, rows in found for r in rows]


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


def scores_of(cfg, run: pathlib.Path) -> two_stage.Scores:
    """Of the evaluation data by the newest checkpoint of `run`; kept there, so that it is computed once."""
    newest = checkpoint.newest(run)
    file = run / f"scores-{newest.name}.npz"
    if file.exists():
        with np.load(file) as kept:
            return two_stage.Scores(**kept)
    mesh = sharding.make_mesh(cfg.mesh)
    found = load(newest, mesh, cfg.model.dtype)
    data = _eval_data(cfg, found.tokenizer, run)
    scores = two_stage.two_stage_scores(cfg, found.model, found.params, data, found.tokenizer, mesh)
    beside = file.with_name("scores.tmp.npz")  # numpy wants the ending
    np.savez(beside, **scores._asdict())
    os.replace(beside, file)
    return scores


def _eval_data(cfg, tokenizer: Tokenizer, run: pathlib.Path) -> EvalData:
    return EvalData(cfg, tokenizer, cfg.data.eval, skipped_path=run / "skipped-eval.jsonl")


def _retrieved(cfg, run: pathlib.Path, scores: two_stage.Scores) -> list[dict]:
    """The best pictures for some captions of the evaluation data."""
    data = _eval_data(cfg, Tokenizer(cfg.text.vocab), run)
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
