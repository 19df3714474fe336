"""What `from_pretrained` gives of a BLIP, or a first stage of BLIP-2: captions, matching, answers and features.

Pictures are given as a path, bytes, a PIL image or an array u8[H,W,3], one or many; they are decoded as in training
(first frame, alpha dropped), turned upright where an orientation tag says so, as photographs of phones need it, and
resized to the model's size. Texts are cleaned as in training. Work is cut into batches, padded to a power of two of
rows and of tokens, so that each verb compiles once per such shape; padding changes no result.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from blip_jax.config import text_side
from blip_jax.data.text.clean import clean_caption, clean_question, plain_text
from blip_jax.decode import beam
from blip_jax.inference import inputs, localize, programs
from blip_jax.inference.batching import Runner, at_least, at_most, padded
from blip_jax.inference.load import Loaded
from blip_jax.models.blip2 import Blip2

THREADS = 8  # that decode the pictures of a batch
TEXTS = 8  # go through a pass for each image that would: they are that much less work
PROGRAMS = 8  # compiled for a model and kept; the one that was not used for longest makes room for a new one
MOST_PENALTY = 10  # of either sign, of length_penalty: the power of a length that still is a float32
LEAST_TEMPERATURE = 1e-6  # below it scores are no float32 any more
LEAST_TOKENS = 8  # texts are padded to this many, or the next power of two, up to what the model was trained with
MODES = {  # of features -> whether it takes images, texts
    "image": (True, False),
    "text": (False, True),
    "multimodal": (True, True),
}


class Pretrained:
    """A model with the verbs caption, match, answer and features; which of them depends on what it was trained for.

    Attributes: model (of blip_jax.models), params (on the devices), cfg (of config.base), tokenizer, mesh, batch (most
    rows per pass). Verbs raise ValueError for a picture or text that cannot be used, named by its place, and where the
    checkpoint lacks the parts.
    """

    def __init__(self, loaded: Loaded, mesh: Mesh, batch: int, name: str):
        self._loaded = loaded._replace(origin=name)
        self.model, self.params, self.cfg, self.tokenizer, _ = loaded
        self.mesh, self.origin = mesh, name
        self._run, self._programs, self._lock = Runner(mesh), {}, threading.Lock()
        self.batch = at_most(batch, self._run.unit)

    def __repr__(self):
        parts = ", ".join(part for part, there in self._loaded.parts().items() if there)
        return (
            f"Pretrained({self.origin!r}: {self.cfg.objective}, {self.cfg.model.img_size} px, {self.cfg.model.dtype}, "
            f"{parts})"
        )

    def verbs(self) -> tuple[str, ...]:
        """Which verbs there are, but for features: some of caption, match, localize, answer; of a BLIP-2 with a
        language model generate, caption, answer."""
        layers = self.cfg.model.med.layers if self._loaded.can("localize") else 0
        return tuple(
            verb
            for verb in ("caption", "match", "localize", "answer")
            if self._loaded.can(verb) and (verb != "localize" or layers > 1)
        )

    @property
    def queries(self) -> int:
        """How many learned queries look at an image, each with an embedding of its own; 0 of a BLIP."""
        return self.cfg.model.qformer.queries if "qformer" in self.cfg.model else 0

    def caption(
        self,
        images,
        n: int = 1,
        method: str = "beam",
        *,
        prompt: str | None = None,
        beams: int = 3,
        min_length: int = 5,
        max_length: int = 20,
        top_p: float = 0.9,
        top_k: int = 50,
        temperature: float = 1.0,
        repetition_penalty: float | None = None,
        length_penalty: float = 1.0,
        seed: int = 0,
    ) -> list:
        """n captions of each image, as [{"caption": str, "log_prob": float}, ...], best first with beams.

        For several images a list of these lists.

        Args:
          n: at most 256, with beams as many as these.
          method: "beam" (beams, at most 64; length_penalty) | "nucleus" (top_p, top_k with 0 for none, temperature).
          prompt: what each caption continues, and is not part of it; None: as the captioner was trained, else "a
            picture of ".
          min_length, max_length: tokens, the prompt's counted.
          repetition_penalty: None: the original's, 1.0 with beams, 1.1 with nucleus.
          seed: of nucleus sampling, a whole number. A caption depends on it and on the pixels alone: the same picture
            has the same captions wherever it stands, another seed other ones.
        log_prob is the model's own, summed over the caption's tokens and its end.
        """
        self._loaded.require("caption")
        if prompt is None:
            prompt = self.cfg.text.prompt if self.cfg.objective == "caption" else "a picture of "
        sampled = method == "nucleus"
        if repetition_penalty is None:
            repetition_penalty = 1.1 if sampled else 1.0
        how = programs.Method(
            method,
            inputs.whole(n, "n"),
            inputs.number(top_p, "top_p"),
            inputs.whole(top_k, "top_k"),
            inputs.number(temperature, "temperature"),
            inputs.number(repetition_penalty, "repetition_penalty"),
            inputs.whole(min_length, "min_length"),
            inputs.whole(max_length, "max_length"),
            inputs.whole(beams, "beams"),
            inputs.number(length_penalty, "length_penalty"),
        )
        start, seed = self._check(how, prompt), seeded(seed)
        pictures, one = inputs.pictures(images)

        def rows(at: slice):
            img = self._pixels(pictures[at])
            keys = [programs.example_key(hashlib.blake2b(x, digest_size=16).hexdigest(), seed) for x in img]
            return img, np.stack(keys)

        def make():
            return programs.captioning(self.model, self.tokenizer, how)

        program = self._program(("caption", how, len(start)), make)
        limit = self._images_of(how.n if sampled else how.beams)
        found = self._map(program, len(pictures), rows, limit, (np.array(start, np.int32),))
        told = []
        for ids, log_prob in zip(found["ids"], found["log_prob"]):
            texts = [programs.text_of(self.tokenizer, row, len(start)) for row in ids]
            told.append([{"caption": text, "log_prob": float(p)} for text, p in zip(texts, log_prob)])
        return told[0] if one else told

    def match(self, images, texts, *, first: str = "[ENC]", every_pair: bool = False) -> dict:
        """How well texts fit images: {"probability": of the matching head, "cosine": of the embeddings}.

        The first text is compared with the first image and so on; a single one of either with all of the other: NumPy
        f32[n], or two floats where one image and one text are given. every_pair: every image with every text,
        f32[images,texts].
        first: the token at the text's beginning, "[ENC]" as in training (BLIP-2 has [CLS] there), or "[CLS]", which
          the original's stand-alone matching model and transformers have.
        """
        self._loaded.require("match")
        if first not in ("[ENC]", "[CLS]"):
            raise ValueError(f"first is {inputs.shown(first)}: choose [ENC] or [CLS]")
        if not isinstance(every_pair, (bool, np.bool_)):
            raise ValueError(f"every_pair is {inputs.shown(every_pair)}: give True or False")
        pictures, one_image = inputs.pictures(images)
        texts, one_text = self._texts(texts, "texts")
        in_pairs = not every_pair and 1 not in (len(pictures), len(texts))
        if in_pairs:
            inputs.pairs(len(pictures), len(texts), "texts")

        ids, txt_mask = self._tokens(texts)
        embed = self._program(("embed",), lambda: programs.embed(self.model))
        txt_emb = self._map(embed, len(texts), lambda at: (ids[at], txt_mask[at]), TEXTS * self.batch)["txt_emb"]
        itm, itc = self._scores(pictures, ids, txt_mask, txt_emb, first, in_pairs)

        if not every_pair:
            itm, itc = itm.ravel(), itc.ravel()
            if one_image and one_text:
                itm, itc = float(itm[0]), float(itc[0])
        return {"probability": itm, "cosine": itc}

    def localize(self, images, texts, *, layer: int | None = None) -> dict | list:
        """Where in each image the words of its text are, paired as in `match`.

        {"words": [str], "maps": f32[words,g,g] on the grid of patches, "text_map": f32[g,g] of the whole text, "score":
        the matching head's probability}, or a list of them where several are given. Maps are attention times its
        gradient (inference/localize.py), 0 or more; only their course means something.

        layer: of the image-grounded encoder, whose attention is looked at, from 0; None: 7 of 12, as LAVIS has it, and
          as deep of another number. A BLIP-2 has no such maps: there the learned queries look at the image, no words.
        """
        self._loaded.require("localize")
        pictures, one_image = inputs.pictures(images)
        texts, one_text = self._texts(texts, "texts")
        i, t = inputs.pairs(len(pictures), len(texts), "texts")
        layer, (ids, txt_mask) = localize.layer_of(self.cfg.model.med.layers, layer), self._tokens(texts)

        def rows(at: slice):
            return self._pixels([pictures[j] for j in i[at]]), ids[t[at]], txt_mask[t[at]]

        program = self._program(("localize", layer), lambda: localize.program(self.model, layer))
        found, told = self._map(program, len(t), rows), []
        for maps, score, j in zip(found["maps"], found["probability"], t):
            words = self.tokenizer.words(texts[j], self.cfg.text.max_len)
            told.append(localize.by_words(maps, words) | {"score": float(score)})
        return told[0] if one_image and one_text else told

    def answer(
        self,
        images,
        questions,
        *,
        method: str = "generate",
        answers=None,
        k: int = 128,
        beams: int = 3,
        max_length: int = 10,
        min_length: int = 1,
    ) -> dict | list:
        """An answer to each question about its image, paired as in `match`.

        A dict, or a list of them where several are given.

        method "generate": {"answer", "log_prob"}, by beam search; lengths are tokens and count [DEC]. "rank":
        {"answer", "score"}, the best of `answers` by the published rule: the k with the likeliest first token, then the
        smoothed log-probability of the whole, which also depends on the longest of `answers`. Of a question its first
        50 words count.
        """
        self._loaded.require("answer")
        pictures, one_image = inputs.pictures(images)
        questions, one = inputs.texts(questions, "questions", clean_question)
        i, t = inputs.pairs(len(pictures), len(questions), "questions")
        ids, txt_mask = self._tokens(questions)

        def rows(at: slice):
            return self._pixels([pictures[j] for j in i[at]]), ids[t[at]], txt_mask[t[at]]

        if method == "generate":
            how = self._search(answers, beams, min_length, max_length)

            def make():
                return programs.answering(self.model, how, 1, eos=self.tokenizer.sep, pad=self.tokenizer.pad)

            found = self._map(self._program(("answer", how), make), len(t), rows, self._images_of(how.beams))
            told = [
                {"answer": programs.text_of(self.tokenizer, row[0], 1), "log_prob": float(p[0])}
                for row, p in zip(found["ids"], found["log_prob"])
            ]
        elif method == "rank":
            told = self._rank(answers, k, len(t), rows)
        else:
            raise ValueError(f"method is {inputs.shown(method)}: choose generate, or rank with answers=")
        return told[0] if one and one_image else told

    def features(self, images=None, texts=None, mode: str = "") -> dict[str, np.ndarray]:
        """States of every token, NumPy f32, one row per image, text or pair.

        Where one is given, the leading dimension is missing.

        mode: "image": image_embeds [n,P,D] and image_embeds_proj [n,P,E]; "text": text_embeds [n,T,D], text_embeds_proj
        [n,T,E] and text_mask bool[n,T] (True = real token, states elsewhere are 0); "multimodal": multimodal_embeds
        [n,T,D] of texts that look at images, paired as in `match`, and text_mask; "": as many of the two as are given.
        Token 0 stands for the whole. The projected ones have unit norm, and their products at token 0 are the cosines
        of `match`; a captioner has none.
        """
        if mode in ("", None):
            mode = "image" if texts is None else "text" if images is None else "multimodal"
        if not isinstance(mode, str) or mode not in MODES or (images is not None, texts is not None) != MODES[mode]:
            came = " and ".join(f"{'no ' * (x is None)}{name}" for name, x in (("images", images), ("texts", texts)))
            raise ValueError(
                f"mode is {inputs.shown(mode)} with {came}: image takes images alone, text takes texts alone, "
                "multimodal takes both"
            )
        if mode == "image":
            found, one = self._image_features(images)
        elif mode == "text":
            found, one = self._text_features(texts)
        else:
            found, one = self._multimodal_features(images, texts)
        return {name: x[0] for name, x in found.items()} if one else found

    def _image_features(self, images) -> tuple[dict, bool]:
        self._loaded.require("image features")
        pictures, one = inputs.pictures(images)
        projected = "vision_proj" in self.params
        program = self._program(("image features",), lambda: programs.image_features(self.model, projected))
        return self._map(program, len(pictures), lambda at: (self._pixels(pictures[at]),)), one

    def _text_features(self, texts) -> tuple[dict, bool]:
        self._loaded.require("text and multimodal features")
        texts, one = self._texts(texts, "texts")
        ids, txt_mask = self._tokens(texts)
        projected = "text_proj" in self.params
        program = self._program(("text features",), lambda: programs.text_features(self.model, projected))
        found = self._map(program, len(texts), lambda at: (ids[at], txt_mask[at]), TEXTS * self.batch)
        return _without_padding(found, txt_mask), one

    def _multimodal_features(self, images, texts) -> tuple[dict, bool]:
        self._loaded.require("text and multimodal features")
        self._loaded.require("image features")
        texts, one_text = self._texts(texts, "texts")
        pictures, one_image = inputs.pictures(images)
        ids, txt_mask = self._tokens(texts)
        i, t = inputs.pairs(len(pictures), len(texts), "texts")

        def rows(at: slice):
            return self._pixels([pictures[j] for j in i[at]]), ids[t[at]], txt_mask[t[at]]

        program = self._program(("multimodal features",), lambda: programs.multimodal_features(self.model))
        found, one = self._map(program, len(t), rows), one_text and one_image
        if isinstance(self.model, Blip2):  # states of its queries, which have no padding
            return found, one
        return _without_padding(found, txt_mask[t]), one

    def _program(self, key: tuple, make: Callable[[], Callable]) -> Callable:
        """make() under jax.jit, made once for each `key` that is among the last PROGRAMS asked for."""
        with self._lock:
            program = self._programs.pop(key, None) or jax.jit(make())
            self._programs[key] = program  # behind the others
            while len(self._programs) > PROGRAMS:
                self._programs.pop(next(iter(self._programs))).clear_cache()
        return program

    def _images_of(self, rows: int) -> int:
        """Images of a pass in which each has so many rows of the text decoder."""
        return min(self.batch, max(1, TEXTS * self.batch // rows))

    def _map(self, program: Callable, n: int, rows: Callable[[slice], tuple], limit: int = 0, whole: tuple = ()) -> Any:
        """`Runner.map` of at most about `limit` rows a pass, 0: of `batch`."""
        return self._run.map(program, self.params, n, rows, size=self._run.size(n, limit or self.batch), whole=whole)

    def _check(self, how: programs.Method, prompt: str) -> list[int]:
        """The prompt's tokens with [DEC]. ValueError: everything that is wrong with the arguments of `caption`."""
        if not isinstance(prompt, str):
            raise ValueError(f"prompt is of type {type(prompt).__name__}: give a str")
        start, room = programs.prompt_ids(self.tokenizer, plain_text(prompt)[0]), text_side(self.cfg.model).positions
        wrong = checked(how)
        if not len(start) < how.max_length <= room:
            wrong.append(
                f"max_length is {inputs.shown(how.max_length)}: it must be more than the {len(start)} tokens of the "
                f"prompt with [DEC], and at most the model's {room} positions"
            )
        if wrong:
            raise ValueError("; ".join(wrong))
        return start

    def _search(self, answers, beams: int, min_length: int, max_length: int) -> beam.Beam:
        if answers is not None:
            raise ValueError("answers are given but method is 'generate': set method='rank', or leave them out")
        beams, min_length, max_length = (
            inputs.whole(value, name)
            for name, value in (("beams", beams), ("min_length", min_length), ("max_length", max_length))
        )
        if beams > programs.MOST_BEAMS:
            raise ValueError(f"beams is {inputs.shown(beams)}: at most {programs.MOST_BEAMS} are searched")
        most = text_side(self.cfg.model).positions
        if beams < 1 or not 0 <= min_length <= max_length or not 1 < max_length <= most:
            raise ValueError(
                f"beams, min_length, max_length are {', '.join(map(inputs.shown, (beams, min_length, max_length)))}: "
                "give at least 1 beam and "
                f"lengths in order, more than 1 token and at most the model's {most} positions"
            )
        return beam.Beam(beams, min_length=min_length, max_length=max_length)

    def _rank(self, answers, k: int, n: int, rows: Callable) -> list[dict]:
        if answers is None:
            raise ValueError("method is 'rank' without answers=: give the texts to choose from")
        k = inputs.whole(k, "k")
        if k < 1:
            raise ValueError(f"k is {inputs.shown(k)}: it must be at least 1")
        answers, _ = inputs.texts(answers, "answers", str.strip)
        ids, ans_mask = self._tokens(answers, text_side(self.cfg.model).positions)
        k = min(k, len(answers))
        program = self._program(("rank", k, ids.shape), lambda: programs.ranking(self.model, k))
        # the logits of k answers to each question of a pass are there at once
        per_pass = min(self.batch, max(1, TEXTS * self.batch // k))
        found = self._map(program, n, rows, per_pass, (ids, ans_mask))
        return [
            {"answer": answers[best[0]], "score": float(score[0])}
            for best, score in zip(found["candidate"], found["score"])
        ]

    def _scores(
        self, pictures: list, ids, txt_mask, txt_emb, first: str, in_pairs: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """(probability, cosine), f32[images,texts], or f32[n,1] in pairs."""
        first_id = {"[ENC]": None, "[CLS]": self.tokenizer.cls}[first]  # None: as the model was trained
        see = self._program(("view",), lambda: programs.view(self.model, "kv", "img_emb"))
        match = self._program(("match", first_id), lambda: programs.match(self.model, first_id))

        # where each image is scored with all texts, these are no rows but the same for every row: in passes of G texts
        columns, limit = [], 0
        if not in_pairs:
            G = at_least(min(len(ids), TEXTS * self.batch))
            columns = [[padded(x[at : at + G], G)[None] for x in (ids, txt_mask)] for at in range(0, len(ids), G)]
            limit = min(self.batch, max(1, TEXTS * self.batch // G))

        def rows(at: slice):
            img = self._pixels(pictures[at])
            return (img, ids[at, None], txt_mask[at, None]) if in_pairs else (img,)

        def scored(params, img, *own):
            found = see(params, img)
            return found["img_emb"], [match(params, found, *tokens)["probability"] for tokens in columns or [own]]

        img_emb, itm = self._map(scored, len(pictures), rows, limit)
        itc = self.model.similarity(img_emb, txt_emb[:, None] if in_pairs else txt_emb)
        return np.concatenate(itm, axis=1)[:, : itc.shape[1]], itc

    def _pixels(self, pictures: list) -> np.ndarray:
        """u8[n,S,S,3]"""

        def read(picture):
            return inputs.pixels(picture, self.cfg.model.img_size, self.cfg.data.max_pixels)

        with concurrent.futures.ThreadPoolExecutor(min(THREADS, len(pictures))) as pool:
            return np.stack(list(pool.map(read, pictures)))

    def _texts(self, texts, name: str) -> tuple[list[str], bool]:
        return inputs.texts(texts, name, lambda s: clean_caption(s, self.cfg.text.max_words))

    def _tokens(self, texts: list[str], most: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """ids i32[n,T] and mask bool[n,T].

        T is the bucket of the longest, cut to `most` tokens (0: those of training).
        """
        most = most or self.cfg.text.max_len
        ids, txt_mask = self.tokenizer.encode(texts, most)
        self.tokenizer.say_unknown()
        T = min(at_least(int(txt_mask.sum(1).max()), LEAST_TOKENS), most)
        return ids[:, :T], txt_mask[:, :T]


def _without_padding(found: dict, txt_mask: np.ndarray) -> dict[str, np.ndarray]:
    """States [n,T,...] cut to the longest text of bool[n,T], 0 behind each text's end; and that mask."""
    real = txt_mask[:, : txt_mask.sum(1).max()]
    return {name: x[:, : real.shape[1]] * real[..., None] for name, x in found.items()} | {"text_mask": real}


def checked(how: programs.Method) -> list[str]:
    """What is wrong with how texts are to be made."""
    most, wrong = programs.MOST_SAMPLED, []

    def expect(right: bool, name: str, what: str, value=None):
        if not right:
            wrong.append(f"{name} is {inputs.shown(getattr(how, name) if value is None else value)}: {what}")

    if how.kind not in ("beam", "nucleus"):
        wrong.append(f"method is {how.kind}: choose beam or nucleus")
    expect(how.n >= 1, "n", "it must be at least 1")
    expect(how.n <= most, "n", f"at most {most} texts of an image are made at once; another seed gives others")
    if how.kind == "beam":
        expect(how.n <= how.beams, "n", f"{how.beams} beams give at most so many; raise beams")
    expect(how.beams >= 1, "beams", "it must be at least 1")
    expect(how.beams <= programs.MOST_BEAMS, "beams", f"at most {programs.MOST_BEAMS} are searched")
    expect(0 < how.top_p <= 1, "top_p", "it must lie between 0 and 1")
    expect(how.top_k >= 0, "top_k", "it must not be negative; 0 is none")
    expect(how.temperature > 0, "temperature", "it must be positive")
    expect(not 0 < how.temperature < LEAST_TEMPERATURE, "temperature", f"give {LEAST_TEMPERATURE} or more")
    expect(how.repetition_penalty > 0, "repetition_penalty", "it must be positive")
    expect(
        abs(how.length_penalty) <= MOST_PENALTY,
        "length_penalty",
        f"it must lie between -{MOST_PENALTY} and {MOST_PENALTY}",
    )
    expect(
        0 <= how.min_length <= how.max_length, "min_length", f"it must lie between 0 and max_length = {how.max_length}"
    )
    return wrong


def seeded(seed) -> int:
    seed = inputs.whole(seed, "seed")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed is {inputs.shown(seed)}: give one of at most 64 bits")
    return seed
