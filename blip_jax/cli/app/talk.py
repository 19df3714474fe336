"""A conversation about a photograph with a BLIP-2 that has a language model: what was said before is its prompt."""

from __future__ import annotations

from blip_jax.inference.prompted import QUESTION

TURNS = 8  # that a model is reminded of: the prompts of training are short


def turn(model, image: bytes, question: str, said: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """`said`, (question, answer) of each turn, and one more.

    The prompt is that of a question, after the earlier questions and answers in the same form, as in LAVIS's examples:
    the last TURNS, and of these as many as the model has room for.
    ValueError: no question, or what `generate` raises.
    """
    if not question.strip():
        raise ValueError("Say something first.")
    form = QUESTION[model.cfg.model.llm.kind]
    parts = [f"{form.replace('{}', asked)} {answer}." for asked, answer in said[-TURNS:]]
    parts.append(form.replace("{}", question.strip()))
    while len(parts) > 1 and not model.fits(" ".join(parts)):
        parts.pop(0)
    [found] = model.generate(image, " ".join(parts))
    return [*said, (question.strip(), found["text"])]
