"""Dialogs about a picture, as Visual Dialog's: questions, answers in a manner that a person keeps, and of each round a
hundred different answers, of which one was given.

A caption names one object. Questions are those of questions.py; one may ask on about the only thing that was just
found to be there, as "it". A person answers in single words or in whole sentences, which the first answer shows; so an
answer in the other manner is true as well, and has a relevance of 1, but is not the one that was given. The wrong ones
are other answers to this question, answers to others of its kind, and any answers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from blip_jax.data.scenes import crowd, questions, world
from blip_jax.data.scenes.crowd import KINDS, Thing, a, found, named
from blip_jax.data.scenes.questions import ANSWERS, ASKED, COLOUR, COUNTS, GROUND, SHAPE, THERE, Question
from blip_jax.data.scenes.words import pick

ROUNDS = 5
OPTIONS = 100
MANNERS = ("word", "sentence")
ON = 0.5  # probability that a dialog goes on with a thing that was just found
OF_ITS_KIND = 50  # options that answer questions of the same kind, if there are as many


class Round(NamedTuple):
    question: Question
    answer: str
    options: list[str]
    truth: int  # place of the answer among the options
    relevance: list[float]  # 1 of what is true, else 0


class Dialog(NamedTuple):
    caption: str
    rounds: list[Round]


def said(question: Question, answer: str, manner: str) -> str:
    """`answer` to a question, true or not, as a person of this manner says it."""
    kind, thing, sentence = question.kind, question.thing, manner == MANNERS[1]
    if kind in COUNTS:
        n = int(answer)
        return f"i see {questions.WORDS[n] if n else 'no'} {named(thing, n)}" if sentence else questions.WORDS[n]
    if not sentence:
        return answer
    if kind == THERE:
        return f"yes, there is {a(thing)}" if answer == "yes" else f"no, there is no {named(thing)}"
    _, _, verb, *subject = question.text.removesuffix("?").split()  # "what colour is the circle"
    told = answer if kind != SHAPE else a(Thing(None, answer)) if verb == "is" else named(Thing(None, answer), 2)
    return f"{' '.join(subject)} {verb} {told}"


def answers(question: Question) -> list[str]:
    """All that people may answer to it, true or not."""
    return [said(question, answer, manner) for answer in ANSWERS[question.kind] for manner in MANNERS]


@functools.cache
def answers_to(kind: str) -> tuple[str, ...]:
    """All that people may answer to any question of a kind, or, of "", to any at all."""
    if not kind:
        return tuple(dict.fromkeys(text for kind in ASKED for text in answers_to(kind)))
    about = {GROUND: (Thing(),), COLOUR: KINDS["shape"], SHAPE: KINDS["colour"], THERE: questions.ABOUT}
    things = about[kind] if kind in about else KINDS[COUNTS[kind]]
    asked = [Question(kind, questions.text_of(kind, thing, n), "", thing) for thing in things for n in (1, 2)]
    asked += [_on(kind, Thing(), "")] * (kind in (COLOUR, SHAPE))
    return tuple(dict.fromkeys(text for question in asked for text in answers(question)))


def _on(kind: str, thing: Thing, answer: str) -> Question:
    return Question(kind, f"{kind} is it?", answer, thing)


def dialog(seed: int, index: int, size: int) -> Dialog:
    """The dialog about picture `index` of crowd.py."""
    rng, picture = world.stream(seed, index, crowd.DIALOG), crowd.scene(seed, index, size)
    caption, manner = crowd.hint(rng, picture), pick(rng, MANNERS)
    rounds: list[Round] = []
    while len(rounds) < ROUNDS:
        asked = _next(rng, picture, rounds[-1].question if rounds else None)
        if asked and asked.text not in [r.question.text for r in rounds]:
            rounds.append(_round(rng, asked, manner))
    return Dialog(caption, rounds)


def _next(rng, picture: dict, last: Question | None) -> Question | None:
    """A question, which may be about the one thing that `last` found."""
    if last and last.kind in (*COUNTS, THERE) and any(last.thing) and rng.random() < ON:
        own = found(picture, last.thing)
        kinds = [kind for kind, known in zip((COLOUR, SHAPE), last.thing) if not known]
        if len(own) == 1 and kinds:
            return _on(kinds[0], last.thing, own[0][kinds[0].removeprefix("what ")])
    return questions.ask(rng, picture, pick(rng, ASKED))


def _round(rng, question: Question, manner: str) -> Round:
    """A question answered, with its options."""
    answer, of_it = said(question, question.answer, manner), answers(question)
    options = list(dict.fromkeys([answer, *of_it]))
    for pool, most in ((answers_to(question.kind), len(options) + OF_ITS_KIND), (answers_to(""), OPTIONS)):
        others = [text for text in pool if text not in options]
        options += [others[i] for i in rng.permutation(len(others))[: most - len(options)].tolist()]
    options = [options[i] for i in rng.permutation(OPTIONS).tolist()]
    true = {said(question, question.answer, manner) for manner in MANNERS}
    return Round(question, answer, options, options.index(answer), [float(text in true) for text in options])
