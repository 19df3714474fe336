"""BLIP-2's second stage: what the queries found in an image is the beginning of a text for a frozen language model
(BLIP-2 paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from blip_jax.decode.rank import text_nll
from blip_jax.models import blip2
from blip_jax.models.layers.dense import Dense
from blip_jax.models.text import cache as caches
from blip_jax.models.text.opt import Opt, after_prompts
from blip_jax.models.text.t5 import T5
from blip_jax.models.vision.vit import torch_uniform

LANGUAGE_MODELS = {"opt": Opt, "t5": T5}  # kind of cfg.model.llm -> its class


def language_model(sizes: Mapping, **settings) -> Opt | T5:
    """The language model of these sizes, `cfg.model.llm`; its other fields are `settings`."""
    return LANGUAGE_MODELS[sizes["kind"]](**{name: x for name, x in sizes.items() if name != "kind"}, **settings)


class Blip2Llm(nn.Module):
    """All parts of the second stage as methods on arrays; parameters vit, ln_vision, query_tokens, qformer, llm_proj,
    llm.

    `questions`: the Q-Former reads a question beside the queries (InstructBLIP's wiring, which is how the paper's VQA
    is read; reference: section C), so it has word embeddings and the text's feed-forwards. With `frozen` the tower runs
    as in evaluation and has no gradient.
    """

    vit_sizes: Any
    qformer_sizes: Any
    llm_sizes: Any
    img_size: int
    questions: bool = False
    vision_eps: float = 1e-5
    frozen: bool = False
    init_std: float = 0.02
    drop_path: float = 0.0
    dropout: float = 0.1
    llm_dropout: float = 0.1
    remat: str = "none"
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, model, *, questions: bool = False, frozen: bool = False) -> Blip2Llm:
        """Builds from `cfg.model` of `config.blip2`, with a language model."""
        return cls(
            FrozenDict(model.vit),
            FrozenDict(model.qformer),
            FrozenDict(model.llm),
            model.img_size,
            questions,
            model.vision_eps,
            frozen,
            model.init_std,
            model.drop_path,
            model.dropout,
            model.llm_dropout,
            model.remat,
            jnp.dtype(model.dtype),
        )

    def setup(self):
        blip2.begin(self, text=self.questions, head=False)
        self.llm = language_model(
            self.llm_sizes, init_std=self.init_std, dropout=self.llm_dropout, remat=self.remat, dtype=self.dtype
        )
        init = torch_uniform(self.qformer_sizes["width"])
        self.llm_proj = Dense(self.embed_width, dtype=self.dtype, kernel_init=init, bias_init=init)

    @property
    def embed_width(self) -> int:
        """Width of the vectors that the language model takes, OPT-350m's narrower one too."""
        return self.llm_sizes.get("embed_width", self.llm_sizes["width"])

    @property
    def writes_answers_apart(self) -> bool:
        """Whether what is written is apart from what is read, in a decoder of its own (T5)."""
        return self.llm_sizes["kind"] == "t5"

    def __call__(self, img, ids, txt_mask):
        """Runs every branch once, so that `init` creates every parameter."""
        soft = self.soft_prompt(self.encode_image(img), *((ids, txt_mask) if self.questions else ()))
        apart = (ids, txt_mask) if self.writes_answers_apart else ()
        return self.target_logits(soft, ids, txt_mask, *apart)

    def encode_image(self, img, *, deterministic: bool = True):
        """Normalised pixels f32[B,S,S,3] -> img_tok [B,P,D], behind ln_vision"""
        return blip2.tokens_of(self, img, deterministic)

    def soft_prompt(self, img_tok, question=None, question_mask=None, *, deterministic: bool = True):
        """img_tok [B,P,D] -> [B,Q,E], what the language model reads in place of words.

        question i32[B,T], question_mask bool[B,T]: [CLS] ... [SEP] of the Q-Former's vocabulary, which the queries read
        beside the image, where the model has `questions`.
        """
        if self.questions and question is None:
            raise ValueError("question is None, but this Q-Former reads one: give its ids and mask")
        kv = self.qformer.image_kv(img_tok)
        if question is None:
            qry, _ = self.qformer.look(self.query_tokens, kv, deterministic=deterministic)
        else:
            qry, _ = self.qformer.join(self.query_tokens, question, question_mask, kv, deterministic=deterministic)
        return self.llm_proj(qry)

    def target_logits(self, soft, ids, txt_mask, out_ids=None, out_mask=None, *, deterministic: bool = True):
        """What the language model says of each token of a text behind `soft` [B,Q,E].

        OPT: f32[B,T,Vp], scores of each of ids i32[B,T], which are prompt and text (txt_mask bool[B,T], padded on the
        right), before it is read. T5: f32[B,U,Vp], of each of out_ids i32[B,U] (out_mask bool[B,U]), with ids the
        prompt.
        """
        embeds, mask = self._prompt(soft, ids, txt_mask)
        if not self.writes_answers_apart:
            states = self.llm(embeds, mask, deterministic=deterministic)
            return self.llm.logits(states[:, soft.shape[1] - 1 : -1])
        return self.llm.target_logits(embeds, mask, out_ids, out_mask, deterministic=deterministic)

    def begin(self, soft, ids, txt_mask, length: int):
        """Reads what texts of at most `length` tokens, their start id counted, will follow: `soft` and a prompt.

        ids i32[B,T], txt_mask bool[B,T], of OPT padded on the left. Returns f32[B,Vp], scores of the first token; the
        cache, arrays [L,B,...]; and what `extend` is told.
        """
        embeds, mask = self._prompt(soft, ids, txt_mask)
        if not self.writes_answers_apart:
            slots = mask.shape[1] + length - 1
            logits, cache = self.llm.prefill(embeds, mask, self.llm.empty_cache(len(ids), slots))
            return logits, cache, mask
        seen = caches.stored(self.llm.cross_kv(self.llm.encode(embeds, mask))), mask
        start = jnp.zeros((len(ids), 1), jnp.int32)
        return *self.llm.extend(start, jnp.int32(0), self.llm.empty_cache(len(ids), length), *seen), seen

    def extend(self, ids, start, cache, seen):
        """(f32[R,Vp], what follows the last of t more tokens, and the cache), as decode/generate.py takes it.

        ids i32[R,t] of R = B*n texts, rows b*n+i for image b; start counts the start id.
        """
        if self.writes_answers_apart:
            return self.llm.extend(ids, start, cache, *seen)
        mask = jnp.repeat(seen, len(ids) // len(seen), axis=0)
        return after_prompts(self.llm.extend, mask, caches.length(cache))(ids, start, cache)

    def nll(self, soft, ids, txt_mask, out_ids, out_mask):
        """Summed negative log-likelihoods f32[B,C] of C texts behind each of B prompts, which are read once.

        soft, ids, txt_mask: as `begin` takes them; out_ids i32[C,U], out_mask bool[C,U]: without a start id, ends
        included. Needs the logits of B*C texts at once, 4*B*C*U*Vp bytes.
        """
        (B, _), (C, U) = ids.shape, out_ids.shape
        rows = jnp.tile(out_ids, (B, 1))
        if self.writes_answers_apart:
            embeds, mask = self._prompt(soft, ids, txt_mask)
            logits = self.llm.target_logits(embeds, mask, rows, jnp.tile(out_mask, (B, 1)))
            logits = logits.reshape(B, C, U, -1)
            return text_nll(logits[:, 0, 0], logits[:, :, 1:], out_ids, out_mask)
        first, cache, mask = self.begin(soft, ids, txt_mask, U)
        cache = jax.tree.map(lambda x: jnp.repeat(x, C, axis=1), cache)
        extend = after_prompts(self.llm.extend_states, jnp.repeat(mask, C, axis=0), caches.length(cache))
        states, _ = extend(rows[:, :-1], 1, cache)
        return text_nll(first, self.llm.logits(states).reshape(B, C, U - 1, -1), out_ids, out_mask)

    def _prompt(self, soft, ids, txt_mask):
        """(vectors [B,Q+T,E], which of them are real bool[B,Q+T])"""
        embeds = jnp.concatenate([soft, self.llm.embed(ids)], axis=1)
        return embeds, jnp.pad(txt_mask, ((0, 0), (soft.shape[1], 0)), constant_values=True)
