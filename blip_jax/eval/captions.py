"""Caption metrics as coco-caption gives them: BLEU, METEOR, ROUGE-L, CIDEr, SPICE. Texts in, numbers out.

BLEU, ROUGE-L and CIDEr are pycocoevalcap's, METEOR and the tokenizer its Java programs. All are fractions, which papers
print times 100. CIDEr weighs words by how many pictures of the corpus have them: that of one picture is 0, and that of
a part of the pictures is another than their mean in the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from blip_jax.eval import java, spice, tokens
from blip_jax.eval.meteor import Meteor

MARK = "approximate/"  # begins the names of metrics that rest on approximate tokens


class Scores(NamedTuple):
    corpus: dict[str, float]  # "Bleu_1" to "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", maybe "SPICE"; lengths of BLEU
    each: dict[Hashable, dict[str, float]]  # the same of each picture


def score(
    results: Mapping[Hashable, str],
    references: Mapping[Hashable, Sequence[str]],
    *,
    corenlp: str = "",
    approximate: bool = False,
) -> Scores:
    """Scores of captions (picture -> text) against those of people (picture -> texts).

    corenlp: folder of CoreNLP 3.6.0, for SPICE; "": without. approximate: tokens without Java, hence no METEOR and no
    SPICE, and every name begins with "approximate/": for curves during training alone.
    ValueError: pictures without a caption or a reference, pycocoevalcap or Java is missing.
    """
    return by_group(results, references, {"": list(references)}, corenlp=corenlp, approximate=approximate)[""]


def by_group(
    results: Mapping[Hashable, str],
    references: Mapping[Hashable, Sequence[str]],
    groups: Mapping[str, Sequence[Hashable]],
    *,
    corenlp: str = "",
    approximate: bool = False,
) -> dict[str, Scores]:
    """As `score`, of each group of pictures as a corpus of its own."""
    _check(results, references, groups)
    if corenlp:
        spice.check(corenlp)
    java.folder()
    with contextlib.nullcontext() if approximate else Meteor() as meteor:
        return {
            name: _corpus({key: results[key] for key in keys}, {key: references[key] for key in keys}, meteor, corenlp)
            for name, keys in groups.items()
        }


def _check(results, references, groups) -> None:
    wanted = [key for keys in groups.values() for key in keys]
    missing = [key for key in wanted if key not in results]
    bare = [key for key in wanted if not references.get(key)]
    for found, what in ((missing, "caption to score"), (bare, "reference caption")):
        if found:
            raise ValueError(f"{len(found)} of {len(wanted)} pictures have no {what}, such as {found[:3]}")
    if empty := [name for name, keys in groups.items() if not keys]:
        raise ValueError(f"no picture to score{f' in {empty}' if empty != [''] else ''}")


def _corpus(results: dict, references: dict, meteor: Meteor | None, corenlp: str) -> Scores:
    """meteor: None for approximate tokens."""
    from pycocoevalcap.bleu.bleu import Bleu  # here: an extra that the rest does without
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    split = tokens.ptb if meteor else tokens.approximate
    lists, people = split({key: [text] for key, text in results.items()}), split(references)
    plain = {key: text for key, [text] in lists.items()}
    bleu, bleus = Bleu(4).compute_score(people, lists, verbose=0)
    found = {f"Bleu_{n}": (value, values) for n, (value, values) in enumerate(zip(bleu, bleus), 1)}
    if meteor:
        found["METEOR"] = meteor.score(plain, people)
    found["ROUGE_L"] = Rouge().compute_score(people, lists)
    found["CIDEr"] = Cider().compute_score(people, lists)
    if meteor and corenlp:
        found["SPICE"] = spice.score(plain, people, corenlp)
    mark = "" if meteor else MARK
    corpus = {mark + name: float(value) for name, (value, _) in found.items()}
    lengths = [(len(text.split()), [len(one.split()) for one in people[key]]) for key, text in plain.items()]
    corpus[f"{mark}bleu_testlen"] = sum(own for own, _ in lengths)
    corpus[f"{mark}bleu_reflen"] = sum(min(others, key=lambda n: (abs(n - own), n)) for own, others in lengths)
    each = {
        key: {mark + name: float(values[i]) for name, (_, values) in found.items()} for i, key in enumerate(results)
    }
    return Scores(corpus, each)
