"""The tokenizer of a config: that of the model which reads its texts, and of a Q-Former that reads questions too."""

from __future__ import annotations

import pathlib
import zlib

from blip_jax.data.text import bpe, sentencepiece, wordpiece

KINDS = {"bert": wordpiece.Tokenizer, "opt": bpe.Tokenizer, "t5": sentencepiece.Tokenizer}


class WithQuestions:
    """A language model's tokenizer, whose attributes it has, with `questions`: the one of a Q-Former that reads the
    prompt as well.

    Attributes: language, questions; crc: of both.
    """

    def __init__(self, language, questions: wordpiece.Tokenizer):
        self.language, self.questions = language, questions
        self.crc = zlib.crc32(f"{language.crc} {questions.crc}".encode())

    def __getattr__(self, name: str):
        return getattr(self.language, name)


def of(model, path: str | pathlib.Path, questions: str | pathlib.Path = ""):
    """The tokenizer in file `path` for a `cfg.model`: BERT's WordPiece, or the kind of its language model.

    questions: BERT's vocabulary, of a Q-Former that reads questions; then the two as `WithQuestions`.
    ValueError: a file is none of its kind.
    """
    llm = model.get("llm")
    found = KINDS[llm.kind if llm else "bert"](path)
    return WithQuestions(found, wordpiece.Tokenizer(questions)) if questions else found


def of_config(cfg):
    """The tokenizer of cfg.text.vocab. ValueError: `of`, `files`."""
    return of(cfg.model, *files(cfg.text.vocab))


def files(vocab: str | pathlib.Path) -> list[str]:
    """The files that text.vocab names: one, or a language model's and behind a comma that of its Q-Former; "" where it
    is empty. ValueError: more than two."""
    if pathlib.Path(vocab).is_file() or "," not in str(vocab):
        return [str(vocab)]
    found = [name.strip() for name in str(vocab).split(",")]
    if len(found) > 2:
        raise ValueError(
            f"text.vocab={str(vocab)!r} names {len(found)} files: give one, or the language model's and, behind a "
            "comma, BERT's for a Q-Former that reads questions"
        )
    return found


def parts(tokenizer) -> dict:
    """The tokenizers that one consists of, by the name under which a workdir keeps their files (checkpoint/folders)."""
    if isinstance(tokenizer, WithQuestions):
        return {"vocab": tokenizer.language, "questions": tokenizer.questions}
    return {"vocab": tokenizer}
