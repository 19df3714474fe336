"""What `from_pretrained` gives of a BLIP-2 with a language model: texts after a prompt, captions and answers.

Pictures and passes are as in inference/verbs.py. Lengths are new tokens: neither the prompt nor a start id counts in
them (decode/limits.py says what the originals' limits mean). A prompt is read as it is written, and its padding is not
attended to, so that no text depends on the prompts beside it. The Q-Former of an InstructBLIP reads it too: its last
cfg.text.max_len tokens.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from blip_jax.decode import beam, limits
from blip_jax.inference import inputs, language, programs
from blip_jax.inference.batching import at_least, padded
from blip_jax.inference.verbs import LEAST_TOKENS, TEXTS, Pretrained, checked, seeded

QUESTION = {"opt": "Question: {} Answer:", "t5": "Question: {} Short answer:"}  # BLIP-2 paper, section 4.1
CANDIDATES = 64  # texts that are scored at once after each prompt


class Prompted(Pretrained):
    """A model with the verbs generate, caption and answer; attributes as `Pretrained`."""

    def verbs(self) -> tuple[str, ...]:
        return "generate", "caption", "answer"

    def generate(
        self,
        images,
        prompts="",
        n: int = 1,
        method: str = "beam",
        *,
        beams: int = 5,
        min_length: int = 0,
        max_length: int = 30,
        top_p: float = 0.9,
        top_k: int = 50,
        temperature: float = 1.0,
        repetition_penalty: float | None = None,
        length_penalty: float = 1.0,
        rule: str = "lavis",
        seed: int = 0,
    ) -> list:
        """n texts that follow each image and its prompt, as [{"text": str, "log_prob": float}, ...], best first with
        beams. For several images or prompts a list of these lists.

        Args:
          prompts: a str for all images, or one for each; "": none, as in pre-training.
          n, method, beams, top_p, top_k, temperature, repetition_penalty, length_penalty, seed: as of
            `Pretrained.caption`;
            repetition_penalty None is 1.
          min_length, max_length: new tokens; the end counts in the second alone.
          rule: of beams, how lengths count in scores: "lavis" | "hf" (`decode.beam.RULES`).
        """
        pictures, one_image = inputs.pictures(images)
        prompts, one_prompt = inputs.texts(prompts, "prompts", str, empty=True)
        how = self._method(
            n,
            method,
            beams,
            min_length,
            max_length,
            top_p,
            top_k,
            temperature,
            repetition_penalty,
            length_penalty,
            rule,
        )
        found = self._texts_behind(pictures, prompts, how, seed)
        told = [[{"text": text, "log_prob": p} for text, p in row] for row in found]
        return told[0] if one_image and one_prompt else told

    def fits(self, prompt: str, max_length: int = 30) -> bool:
        """Whether `generate` has room for a prompt and as many new tokens behind it."""
        return int(self.tokenizer.lengths([prompt], 1 << 20)[0]) <= language.room(self.model, max_length)

    def caption(self, images, n: int = 1, method: str = "beam", *, prompt: str | None = None, beams: int = 5, **how):
        """n captions of each image, as [{"caption": str, "log_prob": float}, ...], as `generate` makes them.

        prompt: None: as the model was trained; one of VQA: none.
        """
        if prompt is None:
            prompt = "" if "{}" in self.cfg.text.prompt else self.cfg.text.prompt.strip()
        if not isinstance(prompt, str):
            raise ValueError(f"prompt is of type {type(prompt).__name__}: give a str")
        found = self.generate(images, prompt, n, method, beams=beams, **how)
        rename = lambda rows: [{"caption": row["text"], "log_prob": row["log_prob"]} for row in rows]
        return rename(found) if found and isinstance(found[0], dict) else [rename(rows) for rows in found]

    def answer(
        self,
        images,
        questions,
        *,
        method: str = "generate",
        answers=None,
        prompt: str | None = None,
        beams: int = 5,
        min_length: int = 0,
        max_length: int = 10,
        length_penalty: float | None = None,
        repetition_penalty: float = 1.0,
        rule: str = "lavis",
    ) -> dict | list:
        """An answer to each question about its image, paired as in `Pretrained.match`: a dict, or a list of them.

        Args:
          method: "generate": {"answer", "log_prob"}, by beam search. "rank": {"answer", "score"}, the one of `answers`
            that is the likeliest, of which score is the summed log-likelihood.
          prompt: with {} for the question; None: as a model was trained that was for VQA, else "Question: {} Answer:"
            with OPT, "Question: {} Short answer:" with T5.
          length_penalty: None: 0 with OPT and -1 with T5, as LAVIS's evaluations have it.
          repetition_penalty: LAVIS's InstructBLIP has 1.5.
        """
        kind, trained = self.cfg.model.llm.kind, self.cfg.text.prompt
        prompt = (trained if "{}" in trained else QUESTION[kind]) if prompt is None else prompt
        if not isinstance(prompt, str) or "{}" not in prompt:
            raise ValueError(f"prompt is {inputs.shown(prompt)}: give a str with {{}} where the question belongs")
        pictures, one_image = inputs.pictures(images)
        questions, one = inputs.texts(questions, "questions", str.strip)
        i, t = inputs.pairs(len(pictures), len(questions), "questions")
        pictures, prompts = [pictures[j] for j in i], [prompt.replace("{}", questions[j]) for j in t]
        own = self.cfg.text.question  # of the Q-Former
        asked = [own.replace("{}", questions[j]) for j in t] if own else prompts
        if method == "generate":
            if answers is not None:
                raise ValueError("answers are given but method is 'generate': set method='rank', or leave them out")
            penalty = {"opt": 0.0, "t5": -1.0}[kind] if length_penalty is None else length_penalty
            how = self._method(
                1, "beam", beams, min_length, max_length, 0.9, 50, 1.0, repetition_penalty, penalty, rule
            )
            found = self._texts_behind(pictures, prompts, how, 0, asked)
            told = [{"answer": rows[0][0], "log_prob": rows[0][1]} for rows in found]
        elif method == "rank":
            told = self._ranked(pictures, prompts, answers, asked)
        else:
            raise ValueError(f"method is {inputs.shown(method)}: choose generate, or rank with answers=")
        return told[0] if one and one_image else told

    # --- how ----------------------------------------------------------------------------------------------------------
    def _method(
        self, n, method, beams, least, most, top_p, top_k, temperature, repetition, length_penalty, rule
    ) -> programs.Method:
        least, most = inputs.whole(least, "min_length"), inputs.whole(most, "max_length")
        if rule not in beam.RULES:
            raise ValueError(f"rule is {inputs.shown(rule)}: choose one of {', '.join(beam.RULES)}")
        if not 0 <= least <= most or not 1 <= most <= language.MOST_PROMPT:
            raise ValueError(
                f"min_length, max_length are {inputs.shown(least)}, {inputs.shown(most)} new tokens: give lengths in "
                f"order, the second from 1 to {language.MOST_PROMPT}"
            )
        how = programs.Method(
            method,
            inputs.whole(n, "n"),
            inputs.number(top_p, "top_p"),
            inputs.whole(top_k, "top_k"),
            inputs.number(temperature, "temperature"),
            inputs.number(1.0 if repetition is None else repetition, "repetition_penalty"),
            beams=inputs.whole(beams, "beams"),
            length_penalty=inputs.number(length_penalty, "length_penalty"),
            rule=rule,
            **limits.lengths(1, least, most),
        )
        if wrong := checked(how):
            raise ValueError("; ".join(wrong))
        return how

    def _prompts(self, prompts: list[str], most: int) -> tuple[np.ndarray, np.ndarray]:
        return language.prompt_ids(self.model, self.tokenizer, prompts, most)

    def _questions(self, asked: list[str]) -> tuple[np.ndarray, ...]:
        return language.question_ids(self.model, self.tokenizer, asked, self.cfg.text.max_len)

    # --- work ---------------------------------------------------------------------------------------------------------
    def _texts_behind(
        self, pictures: list, prompts: list[str], how: programs.Method, seed, asked: list[str] | None = None
    ) -> list[list[tuple]]:
        """[(text, log_prob), ...] of each picture and its prompt. asked: what the Q-Former reads; None: the prompts."""
        i, t = inputs.pairs(len(pictures), len(prompts), "prompts")
        ids, mask = self._prompts(prompts, how.max_length - 1)
        question, seed = self._questions(asked or prompts), seeded(seed)
        special = language.special(self.model, self.tokenizer)

        def rows(at: slice):
            img = self._pixels([pictures[j] for j in i[at]])
            names = [hashlib.blake2b(x, digest_size=16).hexdigest() + prompts[j] for x, j in zip(img, t[at])]
            return (
                img,
                np.stack([programs.example_key(name, seed) for name in names]),
                ids[t[at]],
                mask[t[at]],
                *(x[t[at]] for x in question),
            )

        program = self._program(("generate", how, ids.shape[1]), lambda: language.generating(self.model, how, special))
        limit = self._images_of(how.n if how.kind == "nucleus" else how.beams)
        found = self._map(program, len(t), rows, limit)
        return [
            [(self.tokenizer.decode(row[1:]).strip(), float(p)) for row, p in zip(*texts)]
            for texts in zip(found["ids"], found["log_prob"])
        ]

    def _ranked(self, pictures: list, prompts: list[str], answers, asked: list[str]) -> list[dict[str, Any]]:
        if answers is None:
            raise ValueError("method is 'rank' without answers=: give the texts to choose from")
        answers, _ = inputs.texts(answers, "answers", str.strip)
        out_ids, out_mask = self._answers(answers)
        ids, mask = self._prompts(prompts, out_ids.shape[1])
        question = self._questions(asked)

        def rows(at: slice):
            return self._pixels(pictures[at]), ids[at], mask[at], *(x[at] for x in question)

        found, C = [], min(CANDIDATES, at_least(len(answers)))
        program = self._program(("likelihood", ids.shape[1]), lambda: language.likelihood(self.model))
        for start in range(0, len(answers), C):
            given = tuple(padded(x[start : start + C], C) for x in (out_ids, out_mask))
            limit = max(1, TEXTS * self.batch // C)
            found.append(self._map(program, len(pictures), rows, min(limit, self.batch), given)["nll"])
        nll = np.concatenate(found, axis=1)[:, : len(answers)]
        return [{"answer": answers[best], "score": -float(row[best])} for row, best in zip(nll, nll.argmin(axis=1))]

    def _answers(self, answers: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """ids i32[C,U] and mask of answers as they follow a prompt, their ends included."""
        opt = self.cfg.model.llm.kind == "opt"
        written = [f" {answer}\n" for answer in answers] if opt else answers
        most = at_least(int(self.tokenizer.lengths(written, 1 << 20).max()), LEAST_TOKENS) + opt
        ids, mask = self.tokenizer.encode(written, most)
        return ids[:, opt:], mask[:, opt:]  # OPT's "</s>" before a text, the prompt brings
