"""Photographs in a quarter of an hour, from random weights and with the text model started from a real BERT:
`python benchmarks/photos.py --out=benchmarks/photos.json`.

Trains both arms of configs/photos.py, one model, the same steps and the same batches, and sets side by side what 500
unseen photographs say of them: retrieval, and captions. Of captions also what people and a single sentence for all
pictures get. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Hashable, Mapping

import cut_bert
import numpy as np
from ml_collections import ConfigDict

from blip_jax import checkpoint
from blip_jax.bench import throughput
from blip_jax.data.text.clean import clean_caption
from blip_jax.demo import relations, results
from blip_jax.eval import captions, files, recall
from blip_jax.train import evaluation, loop

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "photos.py"
ARMS = ("random", "bert")  # arguments of CONFIG
PEOPLE, SENTENCE = "people", "one sentence"
CANDIDATES = 20  # sentences of which the one for all pictures is chosen
METRICS = ("Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
STOPPED = 75  # exit status, as of blip-jax


def configured(arm: str, data: str, steps: int) -> ConfigDict:
    """CONFIG with the argument `arm`. data: folder of the photographs; steps: 0 for its own."""
    spec = importlib.util.spec_from_file_location("photos_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg = module.get_config(arm).unlock()
    for split, source in (("train", cfg.data.train.photos), ("val", cfg.data.eval.photos)):
        source.path, source.images = f"{data}/{split}.json", data
    cfg.text.vocab = f"{data}/bert/vocab.txt"
    cfg.train.init_from = f"{data}/bert" if cfg.train.init_from else ""
    if steps:
        cfg.train.steps, cfg.optim.warmup_steps = steps, min(cfg.optim.warmup_steps, steps // 4)
    return cfg.lock()


# --- one arm ----------------------------------------------------------------------------------------------------------
def train(cfg, workdir: pathlib.Path) -> dict:
    """Trains without an evaluation, or goes on. {"seconds", "processor_seconds"} of all calls together, compilation
    included, which cost.json of the workdir keeps. SystemExit: it was stopped."""
    cfg = cfg.copy_and_resolve_references().unlock()
    cfg.data.eval = ConfigDict()
    kept = workdir / "cost.json"
    spent = {"seconds": 0.0, "processor_seconds": 0.0}
    if kept.exists():
        spent = json.loads(kept.read_text(encoding="utf-8"))
        if int(checkpoint.newest(workdir).name) >= cfg.train.steps:
            return spent
    wall, cpu = time.monotonic(), time.process_time()
    out = loop.fit(cfg.lock(), workdir)
    spent["seconds"] += time.monotonic() - wall
    spent["processor_seconds"] += time.process_time() - cpu
    kept.write_text(json.dumps(spent) + "\n", encoding="utf-8")
    if out["stopped"]:
        raise SystemExit(STOPPED)
    return spent


def retrieved(cfg, workdir: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Recalls of both stages, named as `blip-jax evaluate` names them, and what each picture contributes to the mean
    recall: {"r_mean", "itc_r_mean"}, f64[pictures]."""
    scores = results.scores_of(cfg, workdir)
    stages = {"": (scores.i2t, scores.t2i), "itc_": (scores.cosine, scores.cosine)}
    numbers, each = {"images": len(scores.i2t), "texts": len(scores.text_image)}, {}
    for prefix, (i2t, t2i) in stages.items():
        numbers |= {prefix + name: x for name, x in recall.both_ways(i2t, t2i, scores.text_image).items()}
        each[f"{prefix}r_mean"] = relations.of_pictures(i2t, t2i, scores.text_image)
    return numbers, each


def captioned(cfg, workdir: pathlib.Path) -> dict[int, str]:
    """Picture -> its caption by beam search, as `blip-jax evaluate --config.objective=caption` makes and scores it in
    the workdir's folder `told`."""
    cfg, out = cfg.copy_and_resolve_references().unlock(), told(workdir)
    cfg.objective = "caption"
    if not (out / "predictions.json").exists():
        evaluation.evaluate(cfg.lock(), out, str(workdir))
    return files.caption_results(str(out / "predictions.json"))


def told(workdir: pathlib.Path) -> pathlib.Path:
    """Where the captions by the newest checkpoint lie."""
    return workdir / f"captions-{checkpoint.newest(workdir).name}"


def official(workdir: pathlib.Path) -> dict[str, float]:
    """What `captioned` scored by all captions of people, as far as it could."""
    found = json.loads((told(workdir) / "evaluation.json").read_text(encoding="utf-8"))
    return {name: found[name] for name in METRICS if name in found}


# --- captions beside those of people ----------------------------------------------------------------------------------
def turns(people: Mapping[Hashable, list[str]]) -> list[tuple[dict, dict]]:
    """(picture -> one caption of people, picture -> their other captions), each in turn. ValueError: pictures of
    different numbers of captions, or of one."""
    numbers = {len(texts) for texts in people.values()}
    if len(numbers) != 1 or numbers == {1}:
        raise ValueError(f"pictures have {sorted(numbers)} captions of people: all must have as many, two at least")
    return [
        (
            {key: texts[turn] for key, texts in people.items()},
            {key: texts[:turn] + texts[turn + 1 :] for key, texts in people.items()},
        )
        for turn in range(numbers.pop())
    ]


def beside_people(
    made: Mapping[str, Mapping[Hashable, str]], people: Mapping[Hashable, list[str]], approximate: bool = False
) -> dict[str, captions.Scores]:
    """Scores of captions (name -> picture -> caption), and under PEOPLE those of one person by the others' captions.

    One caption of each picture is left out in turn: it is what people are scored with, and the others are the
    references of all. Numbers are means over the turns, so that every row has the same references. Arguments else as
    `captions.score`.
    """
    texts, references, groups = {}, {}, {}
    for turn, (left_out, others) in enumerate(turns(people)):
        for name, own in ({**made, PEOPLE: left_out}).items():
            groups[f"{name} {turn}"] = [(name, turn, key) for key in people]
            texts |= {(name, turn, key): own[key] for key in people}
            references |= {(name, turn, key): others[key] for key in people}
    found = captions.by_group(texts, references, groups, approximate=approximate)
    out = {}
    for name in (*made, PEOPLE):
        own = [found[group] for group in found if group.rsplit(" ", 1)[0] == name]
        mean = lambda dicts: {metric: float(np.mean([each[metric] for each in dicts])) for metric in dicts[0]}
        each = {key: mean([scores.each[name, turn, key] for turn, scores in enumerate(own)]) for key in people}
        out[name] = captions.Scores(mean([scores.corpus for scores in own]), each)
    return out


def sentence(people: Mapping[Hashable, list[str]], pictures: int = 500) -> str:
    """The one of the commonest training captions that as a caption of all pictures has the highest CIDEr.

    people: of the training pictures, of which `pictures`, spread evenly, score the sentences. Tokens are approximate.
    """
    counts = collections.Counter(clean_caption(text, 30) for texts in people.values() for text in texts)
    common = [text for text, _ in counts.most_common(CANDIDATES)]
    keys = list(people)
    keys = [keys[i] for i in np.unique(np.linspace(0, len(keys) - 1, pictures).astype(int))]
    scored = {text: [(text, key) for key in keys] for text in common}
    of_all = [pair for pairs in scored.values() for pair in pairs]
    found = captions.by_group(
        {pair: pair[0] for pair in of_all}, {pair: people[pair[1]] for pair in of_all}, scored, approximate=True
    )
    return max(common, key=lambda text: found[text].corpus[f"{captions.MARK}CIDEr"])


# --- both arms --------------------------------------------------------------------------------------------------------
def error(each: np.ndarray) -> float:
    """Half the 95 % interval of the mean of what pictures contribute: that of having looked at these and not others."""
    return float(relations.SIGMAS * np.std(each, ddof=1) / len(each) ** 0.5)


def with_error(each: np.ndarray) -> dict[str, float]:
    return {"mean": float(np.mean(each)), "error": error(each)}


def run(data: str, runs: str, bert: str, steps: int, command: str, out: str = "", only: str = "") -> dict:
    """Trains and evaluates both arms, says the tables, writes JSON to `out`; returns what is in it.

    data: folder of photographs; runs: where the workdirs go; bert: folder of a BERT, "": the package's; only: trains
    this arm alone and returns.
    """
    throughput.check_out(out)
    prepare(data, bert, configured(ARMS[0], data, steps))
    cfgs = {arm: configured(arm, data, steps) for arm in ARMS}
    at = {arm: pathlib.Path(runs) / arm for arm in ARMS}
    cost = {arm: train(cfgs[arm], at[arm]) for arm in ([only] if only else ARMS)}
    if only:
        return cost

    found, pictures, made = {}, {}, {}
    for arm in ARMS:
        numbers, pictures[arm] = retrieved(cfgs[arm], at[arm])
        made[arm] = captioned(cfgs[arm], at[arm])
        log = [row for row in results.rows_of(at[arm]) if "train/loss" in row]
        found[arm] = {
            "step": int(checkpoint.newest(at[arm]).name),
            "cost": cost[arm],
            "losses": {name: [row[f"train/{name}"] for row in (log[0], log[-1])] for name in results.LOSSES},
            "retrieval": numbers | {name: with_error(each) for name, each in pictures[arm].items()},
            "captions": official(at[arm]),
        }
    fixed = sentence(files.caption_references(f"{data}/train.json").captions)
    people = files.caption_references(f"{data}/val.json").captions
    scores = beside_people(made | {SENTENCE: dict.fromkeys(people, fixed)}, people)
    cider = {name: np.array([own.each[key]["CIDEr"] for key in people]) for name, own in scores.items()}
    result = {
        "command": command,
        "workload": "photos",
        **throughput.about(),
        "steps": cfgs["bert"].train.steps,
        "batch": cfgs["bert"].train.batch,
        "arms": found,
        "sentence": fixed,
        "captions": {
            name: {metric: own.corpus[metric] for metric in METRICS} | {"CIDEr_error": error(cider[name])}
            for name, own in scores.items()
        },
        "different_captions": {arm: len(set(texts.values())) for arm, texts in made.items()},
        "bert_minus_random": {
            name: with_error(pictures["bert"][name] - pictures["random"][name]) for name in ("r_mean", "itc_r_mean")
        }
        | {"CIDEr": with_error(cider["bert"] - cider["random"])},
    }
    throughput.write(out, result)
    print(table(result))
    return result


def prepare(data: str, bert: str, cfg) -> None:
    """Cuts the BERT of the config out of the one in folder `bert`, where that has not been done."""
    if pathlib.Path(data, "bert", "config.json").exists():
        return
    sizes, words = cfg.model.med, cfg.model.med.vocab_size - 2
    arguments = [f"--captions={data}/train.json", f"--layers={sizes.layers}", f"--words={words}", f"--out={data}/bert"]
    cut_bert.main(arguments + [f"--bert={bert}"] * bool(bert))


def table(result: dict) -> str:
    """Retrieval, captions and costs, side by side."""
    arms = result["arms"]
    sides = {"image to text": "txt", "text to image": "img"}
    rows = []
    for name, side in sides.items():
        for how, prefix in (("re-ranked", ""), ("cosine alone", "itc_")):
            numbers = [[arms[arm]["retrieval"][f"{prefix}{side}_r{k}"] for k in recall.RECALLS] for arm in ARMS]
            rows.append([f"{name}, {how}", *(f"{x:.1f}" for own in numbers for x in own)])
    head = ["", *(f"{arm} R@{k}" for arm in ARMS for k in recall.RECALLS)]
    told = lambda x: f"{x['mean']:.2f} ± {x['error']:.2f}"
    more = [
        [what, *(told(arms[arm]["retrieval"][name]) for arm in ARMS), told(result["bert_minus_random"][name])]
        for what, name in (("mean recall, re-ranked", "r_mean"), ("mean recall, cosine alone", "itc_r_mean"))
    ]
    scored = [
        [name, *(f"{100 * own[metric]:.1f}" for metric in METRICS), f"± {100 * own['CIDEr_error']:.1f}"]
        for name, own in result["captions"].items()
    ]
    took = [
        f"{arm}: {own['cost']['seconds']:.0f} s, {own['cost']['processor_seconds']:.0f} processor seconds; losses "
        + ", ".join(f"{name.removeprefix('loss_')} {a:.2f} to {b:.2f}" for name, (a, b) in own["losses"].items())
        for arm, own in arms.items()
    ]
    difference = result["bert_minus_random"]["CIDEr"]
    return "\n\n".join(
        [
            "\n".join(took),
            throughput.markdown(head, rows),
            throughput.markdown(["", *ARMS, "difference"], more),
            f"one sentence: {result['sentence']!r}",
            throughput.markdown(["by the captions of four people, times 100", *METRICS, "of CIDEr"], scored),
            "\n".join(
                f"{arm}, by all captions of people: "
                + ", ".join(f"{name} {100 * x:.1f}" for name, x in own["captions"].items())
                for arm, own in arms.items()
            ),
            f"CIDEr, bert - random: {100 * difference['mean']:.1f} ± {100 * difference['error']:.1f}; different "
            f"captions: {result['different_captions']}",
        ]
    )


def main(argv: list[str]) -> None:
    """The command line."""
    made = argparse.ArgumentParser(prog="python benchmarks/photos.py")
    made.add_argument("--data", default="data/photos", help="folder with train.json, val.json and pictures")
    made.add_argument("--runs", default="runs/photos_arms", help="folder of the workdirs")
    made.add_argument("--bert", default="", help="Hugging Face folder of a BERT; default: that of the package")
    made.add_argument("--steps", type=int, default=0, help="default: the config's; a few for a rehearsal")
    made.add_argument("--only", default="", choices=("", *ARMS), help="train this arm, and end")
    made.add_argument("--out", default="", help="JSON file to write")
    run(**vars(made.parse_args(argv)), command=" ".join(["python benchmarks/photos.py", *argv]))


if __name__ == "__main__":
    main(sys.argv[1:])
