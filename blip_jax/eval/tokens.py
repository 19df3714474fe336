"""Captions as the words that BLEU, METEOR, ROUGE-L and CIDEr count: Penn Treebank's, lower case, without marks."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence

from blip_jax.eval import java

DROPPED = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())  # as coco-caption has them
LINE_ENDS = re.compile("[\n\r\x0b\x0c\u2028\u2029]")  # what Java's tokenizer takes for the end of a line
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
MARKS = re.compile(r"(\.\.\.|--|[;?!(){}\[\]%$]|``|''|[,:](?!\d)|(?<!\d)[,:])")
CONTRACTED = re.compile(r"(?<=[^\W\d_])(n't|'(?:s|re|ve|ll|d|m))(?!\w)")


def ptb(captions: Mapping[Hashable, Sequence[str]]) -> dict[Hashable, list[str]]:
    """The captions of each picture, words with single spaces between, by the Stanford tokenizer that coco-caption uses.

    ValueError: Java or pycocoevalcap is missing, or the tokenizer's answer has another number of lines.
    """
    keys = [key for key, texts in captions.items() for _ in texts]
    lines = [LINE_ENDS.sub(" ", text) for texts in captions.values() for text in texts]
    jar = java.folder() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    program = ("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    found = java.run(java.command("-cp", str(jar), *program), "\n".join(lines)).split("\n")
    if len(found) != len(lines):
        raise ValueError(
            f"Java's tokenizer made {len(found)} lines of {len(lines)} captions: they cannot be told apart"
        )
    out: dict[Hashable, list[str]] = {key: [] for key in captions}
    for key, line in zip(keys, found):
        out[key].append(" ".join(word for word in line.rstrip().split(" ") if word not in DROPPED))
    return out


def approximate(captions: Mapping[Hashable, Sequence[str]]) -> dict[Hashable, list[str]]:
    """Nearly the same without Java, for curves during training: scores from it are not to be published."""
    return {key: [_words(text) for text in texts] for key, texts in captions.items()}


def _words(text: str) -> str:
    text = MARKS.sub(r" \1 ", text.lower().replace("cannot", "can not").replace('"', " "))
    text = CONTRACTED.sub(r" \1", text)
    words = (word if _abbreviated(word) else word.rstrip(".") for word in text.split())
    words = (BRACKETS.get(word, word.strip("'").rstrip("-")) if not word.startswith("'") else word for word in words)
    return " ".join(word for word in words if word and word not in DROPPED)


def _abbreviated(word: str) -> bool:
    """Whether the period at the end of a word belongs to it, as in a.m. or st."""
    return bool(re.fullmatch(r"(?:[^\W\d_]\.)+|(?:st|mr|mrs|ms|dr|jr|vs|etc|no|mt|ave|ft)\.", word))
