"""blip-jax score caption | nocaps | vqa | nlvr2 | visdial | retrieval | video_qa: result files against references.

No model is needed, and nothing here imports jax: the command starts as quickly as Python does.
"""

from __future__ import annotations

import difflib
import json
import pathlib
import sys
from typing import NamedTuple

from absl import flags

from blip_jax import buckets
from blip_jax.cli import usage
from blip_jax.cli.parse import parse
from blip_jax.eval import captions, files, nlvr, recall, retrieval_files, spice, video_qa, visdial, vqa


class Found(NamedTuple):
    """What a task's scorer found."""

    scores: dict  # name -> number, or group -> {name: number}
    each: list[dict]  # the same of each example
    said: str = ""  # what was left out, and why


def score(argv: list[str]) -> int:
    """blip-jax score."""
    what = argv[1] if argv[1:] else ""
    if what in usage.ASKS:
        usage.show("score", None)
    if what not in TASKS:
        close = difflib.get_close_matches(what, TASKS, 1, 0.6)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"blip-jax score knows {', '.join(TASKS)}, not {what or 'nothing'!r}{hint}")
    run, of_results, of_references, own = TASKS[what]
    values = flags.FlagValues()
    flags.DEFINE_string("results", None, of_results, flag_values=values)
    flags.DEFINE_string("references", None, of_references, flag_values=values)
    for name, (default, text) in own.items():
        kinds = {str: flags.DEFINE_string, bool: flags.DEFINE_bool, list: flags.DEFINE_multi_string}
        kinds[type(default)](name, default, text, flag_values=values)
    flags.DEFINE_bool("json", False, "one JSON object instead of a table", flag_values=values)
    flags.DEFINE_string("out", "", "file to write, JSON: the scores and those of each example", flag_values=values)
    parse(values, [f"score {what}", *argv[2:]], required=("results", "references"))
    out = buckets.of(values.out, "--out") if values.out else None
    found = run(values)
    if out:
        buckets.write(out, json.dumps({"scores": found.scores, "each": found.each}, indent=1) + "\n")
    print(json.dumps(found.scores) if values.json else table(found.scores))
    if found.said:
        print(found.said, file=sys.stderr if values.json else sys.stdout)
    return 0


def table(scores: dict) -> str:
    """A line for each number; of groups a column for each."""
    groups = {name: own for name, own in scores.items() if isinstance(own, dict)}
    if not groups:
        room = max(map(len, scores))
        return "\n".join(f"{name:{room}} {_number(value):>10}" for name, value in scores.items())
    lines = [f"{'':12}" + "".join(f"{name:>14}" for name in groups)]
    for metric in next(iter(groups.values())):
        lines.append(f"{metric:12}" + "".join(f"{_number(own[metric]):>14}" for own in groups.values()))
    return "\n".join(lines)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _caption(values: flags.FlagValues) -> Found:
    results, people = files.caption_results(values.results), files.caption_references(values.references)
    files.check_complete(values.results, results, people.captions, "picture", values.references)
    _say_begin(len(results))
    found = captions.score(results, people.captions, corenlp=values.spice)
    each = [{"image_id": key, **own} for key, own in found.each.items()]
    return Found(found.corpus, each, _about_spice(values))


def _nocaps(values: flags.FlagValues) -> Found:
    results, people = files.caption_results(values.results), files.caption_references(values.references)
    files.check_complete(values.results, results, people.captions, "picture", values.references)
    if without := [key for key in people.captions if key not in people.domains]:
        raise ValueError(
            f"{values.references}: {len(without)} of {len(people.captions)} pictures have no `domain`, such as "
            f"{without[: files.SHOWN]}: give nocaps_val_4500_captions.json"
        )
    names = [name for name in DOMAINS if name in people.domains.values()]
    names += sorted(set(people.domains.values()) - set(names))
    groups = {name: [key for key in people.captions if people.domains[key] == name] for name in names}
    _say_begin(len(results))
    found = captions.by_group(
        results, people.captions, groups | {"entire": list(people.captions)}, corenlp=values.spice
    )
    each = [{"image_id": key, "domain": people.domains[key], **own} for key, own in found["entire"].each.items()]
    return Found({name: own.corpus for name, own in found.items()}, each, _about_spice(values))


def _say_begin(n: int) -> None:
    print(f"scoring {n} captions; METEOR takes some 13 s of a core to start", file=sys.stderr)


def _about_spice(values: flags.FlagValues) -> str:
    return "" if values.spice else f"SPICE: {spice.NOT_COMPUTED.format(flag='spice')}"


def _vqa(values: flags.FlagValues) -> Found:
    results, people = files.vqa_results(values.results), files.vqa_references(values.references)
    files.check_complete(values.results, results, people, "question", values.references)
    scores = vqa.score(results, people, as_lavis=values.as_lavis)
    each = [
        {
            "question_id": key,
            "accuracy": round(100 * vqa.accuracy(results[key], own["answers"], as_lavis=values.as_lavis), 2),
        }
        for key, own in people.items()
    ]
    return Found(scores, each)


def _nlvr2(values: flags.FlagValues) -> Found:
    results, people = files.nlvr_results(values.results), files.nlvr_references(values.references)
    files.check_complete(values.results, results, people, "example", values.references)
    scores = _nlvr2_of(values.references, results, people)
    for path in values.subset:
        part = files.nlvr_references(path)
        if more := sorted(part.keys() - people.keys()):
            raise ValueError(
                f"--subset={path}: {len(more)} of {len(part)} examples are not in {values.references}, such as "
                f"{more[: files.SHOWN]}"
            )
        own = _nlvr2_of(path, results, part)
        scores |= {f"{pathlib.Path(path).stem}/{name}": value for name, value in own.items()}
    each = [{"identifier": name, "right": results[name] == label} for name, (label, _) in people.items()]
    return Found(scores, each)


def _nlvr2_of(path: str, results: dict, people: dict) -> dict[str, float]:
    if unknown := [name for name, (label, _) in people.items() if label is None]:
        raise ValueError(f"{path}: {len(unknown)} of {len(people)} examples have no label, such as {unknown[:3]}")
    rows = [(results[name], label, group) for name, (label, group) in people.items()]
    return nlvr.score(*zip(*rows)) | {"examples": len(rows), "sentences": len({group for *_, group in rows})}


def _visdial(values: flags.FlagValues) -> Found:
    results, rounds = files.visdial_results(values.results), files.visdial_rounds(values.references)
    known = {key: own for key, own in rounds.items() if own.truth is not None}
    if not known:
        raise ValueError(f"{values.references}: no round has answer_options and gt_index, so that none can be scored")
    files.check_complete(values.results, results, known, "round", values.references)
    for key, own in known.items():
        if len(results[key]) != own.options:
            raise ValueError(
                f"{values.results}: {len(results[key])} ranks for the {own.options} options of picture {key[0]}, round "
                f"{key[1]}"
            )
    scores = visdial.sparse([(_from_ranks(results[key]), own.truth) for key, own in known.items()])
    del scores["ties"]  # ranks have none
    said = "" if values.dense else "NDCG: not computed (it needs the dense annotations: --dense=FILE)"
    if values.dense:
        relevance = files.visdial_relevance(values.dense)
        if more := sorted(relevance.keys() - known.keys()):
            raise ValueError(
                f"--dense={values.dense}: {len(more)} of {len(relevance)} rounds (picture, round) are not among those "
                f"of {values.references}, such as {more[: files.SHOWN]}"
            )
        dense = visdial.dense([(_from_ranks(results[key]), own) for key, own in relevance.items()])
        if left := dense.pop("without_relevance"):
            said = f"NDCG: {left} of {len(relevance)} rounds have no relevant option and are left out"
        scores |= dense
    each = [
        {"image_id": image, "round_id": number, "rank": results[image, number][own.truth]}
        for (image, number), own in known.items()
    ]
    return Found(scores, each, said)


def _from_ranks(ranks: list[int]) -> list[int]:
    """Scores that rank options so."""
    return [-rank for rank in ranks]


def _retrieval(values: flags.FlagValues) -> Found:
    pairs = retrieval_files.references(values.references)
    i2t, t2i = retrieval_files.scores(values.results, pairs)
    scores = (recall.video if pairs.videos else recall.both_ways)(i2t, t2i, pairs.text_owner)
    texts = recall.image_to_text_ranks(i2t, pairs.text_owner) + 1
    back = recall.text_to_image_ranks(t2i, pairs.text_owner) + 1
    with_text = sorted({*pairs.text_owner.tolist()})
    each = [{"image": i, "rank": int(rank)} for i, rank in zip(with_text, texts)]
    return Found(scores, each + [{"text": i, "rank": int(rank)} for i, rank in enumerate(back)])


def _video_qa(values: flags.FlagValues) -> Found:
    results, people = files.video_qa_results(values.results), files.video_qa_references(values.references)
    files.check_complete(values.results, results, people, "question", values.references)
    ways = {"accuracy": "answer"} | {name: name for name in next(iter(results.values())) if name != "answer"}
    scores = {
        way: video_qa.accuracy([results[key][name] for key in people], list(people.values()))
        for way, name in ways.items()
    }
    each = [
        {"question_id": key, **{way: video_qa.is_right(results[key][name], own) for way, name in ways.items()}}
        for key, own in people.items()
    ]
    return Found(scores | {"questions": len(people)}, each)


DOMAINS = ("in-domain", "near-domain", "out-domain")
SPICE = {"spice": ("", "folder with CoreNLP 3.6.0's two jars, which no package brings; without it no SPICE")}
COCO = "annotations in COCO's layout, or BLIP's list of {image, caption}"
CAPTIONS = '[{"image_id": 7, "caption": "a dog"}, ...], one for every picture'
TASKS = {  # task -> (scorer, what results are, what references are, its flags: name -> (default, help))
    "caption": (_caption, CAPTIONS, COCO, SPICE),
    "nocaps": (_nocaps, CAPTIONS, "nocaps_val_4500_captions.json", SPICE),
    "vqa": (
        _vqa,
        '[{"question_id": 7, "answer": "yes"}, ...], one for every question',
        "v2_mscoco_*_annotations.json, or BLIP's list with the answers of people",
        {"as_lavis": (False, "by LAVIS's program, with which BLIP-2 was measured, not the official one")},
    ),
    "nlvr2": (
        _nlvr2,
        'lines "dev-0-0-0,True", or [{"identifier": "dev-0-0-0", "label": true}, ...]',
        "the official dev.json, test1.json or test2.json",
        {"subset": ([], "a file of some of the examples, as balanced_dev.json: scored as well; repeatable")},
    ),
    "visdial": (
        _visdial,
        '[{"image_id": 7, "round_id": 1, "ranks": [3, 1, 2, ...]}, ...], one for every round, 1 for the best option',
        "visdial_1.0_val.json",
        {"dense": ("", "visdial_1.0_val_dense_annotations.json, for NDCG")},
    ),
    "retrieval": (
        _retrieval,
        "scores.npz, .npz with `i2t` [images, texts] and `t2i` [texts, images], or .npy [images, texts] for both",
        "BLIP's list of {image, caption}, or MSR-VTT's of {clip_name, caption}",
        {},
    ),
    "video_qa": (
        _video_qa,
        '[{"question_id": 7, "answer": "dog"}, ...], one for every question',
        "MSRVTT-QA's or MSVD-QA's test_qa.json, or LAVIS's qa_test.json",
        {},
    ),
}
