"""A conversation about a photograph with a BLIP-2 that has a language model: what was said before is its prompt."""

from __future__ import annotations

from blip_jax.inference.prompted import QUESTION

TURNS = 8  # that a model is reminded of: the prompts of training are short


def turn(model, image: bytes, question: str, said: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """`said`, (question, answer) of each turn, and one more.

    The prompt is that of a question, after the earlier questions and answers in the same form, as in LAVIS's examples.
    ValueError: no question, or what `generate` raises.
    """
    if not question.strip():
        raise ValueError("Say something first.")
    form = QUESTION[model.cfg.model.llm.kind]
    before = [f"{form.replace('{}', asked)} {answer}." for asked, answer in said[-TURNS:]]
    prompt = " ".join([*before, form.replace("{}", question.strip())])
    [found] = model.generate(image, prompt)
    return [*said, (question.strip(), found["text"])]
