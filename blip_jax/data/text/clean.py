"""The original's cleaning of captions and questions, and of decoded text."""

from __future__ import annotations

import re

PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
# where transformers 4.15, with which the original decodes, takes spaces out (`clean_up_tokenization`), in its order
JOINED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def plain_text(s: str) -> tuple[str, list[str]]:
    """A string that can be encoded as UTF-8 and has no NUL, and notes on what had to be removed for that."""
    notes = []
    if "\0" in s:
        s, notes = s.replace("\0", ""), ["NUL characters removed"]
    if not s.isascii() and any("\ud800" <= c <= "\udfff" for c in s):
        s = s.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        notes.append("broken characters replaced")
    return s, notes


def clean_caption(s: str, max_words: int) -> str:
    """The original's caption cleaning: lower case, . ! " ( ) * # : ; ~ to spaces, runs of white space to one, cut."""
    s = re.sub(r"\s{2,}", " ", PUNCTUATION.sub(" ", s.lower()))
    return " ".join(s.rstrip("\n").strip(" ").split(" ")[:max_words])


def clean_question(s: str, max_words: int = 50) -> str:
    """The original's question cleaning: lower case, the same characters deleted, end trimmed, cut to `max_words`."""
    return " ".join(PUNCTUATION.sub("", s.lower()).rstrip(" ").split(" ")[:max_words])


def too_long(question: str) -> bool:
    """Whether `clean_question` leaves out words."""
    return clean_question(question, len(question) + 1) != clean_question(question)


def tidy(s: str) -> str:
    """Decoded text as the original gives it: without the spaces that pieces left before marks and in contractions."""
    for spaced in JOINED:
        s = s.replace(spaced, spaced.strip())
    return s
