"""What a language model is reminded of in a conversation, without one."""

import types

import pytest

from blip_jax.cli.app import talk


class Model:
    """Answers with the number of the question; reads prompts of `room` words."""

    def __init__(self, kind: str, room: int):
        self.cfg = types.SimpleNamespace(model=types.SimpleNamespace(llm=types.SimpleNamespace(kind=kind)))
        self.room, self.prompts = room, []

    def fits(self, prompt):
        return len(prompt.split()) <= self.room

    def generate(self, image, prompt):
        assert image == b"photo"
        self.prompts.append(prompt)
        return [{"text": f"a{len(self.prompts)}"}]


def told(model, questions: int) -> list[tuple[str, str]]:
    said = []
    for n in range(1, questions + 1):
        said = talk.turn(model, b"photo", f" q{n} ", said)
    return said


def test_the_last_turns_stand_before_the_question():
    model = Model("t5", 10_000)
    assert told(model, 12) == [(f"q{n}", f"a{n}") for n in range(1, 13)]
    assert model.prompts[1] == "Question: q1 Short answer: a1. Question: q2 Short answer:"
    turns = " ".join(f"Question: q{n} Short answer: a{n}." for n in range(12 - talk.TURNS, 12))
    assert model.prompts[11] == f"{turns} Question: q12 Short answer:"
    with pytest.raises(ValueError, match="Say something"):
        talk.turn(model, b"photo", "  ", [])


def test_the_oldest_are_forgotten_where_there_is_no_room():
    model = Model("opt", 3 + 2 * 4)  # words of a question, and of two turns
    said = told(model, 4)
    assert len(said) == 4, "they are still shown"
    assert model.prompts[3] == "Question: q2 Answer: a2. Question: q3 Answer: a3. Question: q4 Answer:"
    model.room = 1  # not even for the question: the model says so itself
    talk.turn(model, b"photo", "q5", said)
    assert model.prompts[4] == "Question: q5 Answer:"
