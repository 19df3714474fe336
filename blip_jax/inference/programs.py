"""What runs on the devices once a model is trained: functions of (params, rows of arrays).

They are for jax.jit and `inference.batching`.

Looking at images, matching and embedding texts, captions, answers, features: each said once, for the verbs, evaluation
and CapFilt. Row b of every argument and result belongs to the same image, so rows can be padded and shared out over
devices.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax import losses
from blip_jax.decode import beam, generate
from blip_jax.decode.rank import rank
from blip_jax.models.blip import unit
from blip_jax.models.blip2 import Blip2
from blip_jax.models.layers.cpu import single_cpu
from blip_jax.models.layers.dense import stacked_as_bits, text_layers_apart
from blip_jax.models.text.cache import images_of, stored
from blip_jax.models.vision.vit import normalize_pixels
from blip_jax.parallel.sharding import partition_spec

CPU_ROWS = 1200  # of activations [rows, D], about: more and the float32 results of a ViT-B layer leave a CPU's caches
# how keys and values of images, each [L,B,P,N,H], lie on a mesh: as every layer pins its own
KV = partition_spec(("layers", "act_batch", None, "act_heads", None))
VIEW_ROWS = {"img_tok": 0, "kv": 1, "img_emb": 0}  # the dimension of what `view` gives that counts the images


# --- images and texts -------------------------------------------------------------------------------------------------
def encode_pixels(model, params, img):
    """u8[B,S,S,3] RGB -> img_tok [B,P,D] of a Blip, BlipVqa, BlipNlvr or BlipDialog, without dropout; of videos
    u8[B,R,S,S,3] those of all frames, one frame behind the other, [B,R*P,D].

    A single CPU takes a large batch some images at a time, so that what a layer leaves is still in the caches for the
    next one.
    """
    if single_cpu():
        params = stacked_as_bits(params)

    def encode(img):
        return model.apply({"params": params}, normalize_pixels(img), method="encode_image")

    pictures = img.reshape(-1, *img.shape[-3:])
    B, P = len(pictures), 1 + (model.img_size // model.vit_sizes["patch"]) ** 2
    if not single_cpu() or B * P < 2 * CPU_ROWS:
        return encode(img)
    few = max(n for n in range(1, B + 1) if B % n == 0 and n <= max(CPU_ROWS // P, 1))
    img_tok = jax.lax.map(encode, pictures.reshape(B // few, few, *pictures.shape[1:]))
    return img_tok.reshape(len(img), -1, img_tok.shape[-1])


def view(model, *wanted: str) -> Callable:
    """(params, img u8[B,S,S,3]) -> what is `wanted` of the images, or of videos u8[B,R,S,S,3], whose P are R * P.

    img_tok [B,P,D] in the dtype of the computation; kv: keys and values for every text pass; img_emb f32[B,E], of unit
    norm.
    """

    def view(params, img):
        apply = functools.partial(model.apply, {"params": params})
        img_tok = encode_pixels(model, params, img)
        out = {}
        if "img_tok" in wanted:
            out["img_tok"] = img_tok
        if "kv" in wanted:
            out["kv"] = apply(img_tok, method="image_kv")
        if "img_emb" in wanted:
            how = {"frames": img.shape[1]} if img.ndim == 5 else {}
            out["img_emb"] = apply(img_tok, method="project_image", **how)
        return out

    return view


def embed(model) -> Callable:
    """(params, ids i32[B,T], txt_mask bool[B,T]) -> {"txt_emb": f32[B,E]}, of unit norm."""

    def embed(params, ids, txt_mask):
        return {"txt_emb": model.apply({"params": params}, ids, txt_mask, method="encode_text")[1]}

    return embed


def match(model, first_id: int | None = None) -> Callable:
    """How well texts fit images.

    (params, {"kv"} of B images, ids i32[B,G,T], txt_mask bool[B,G,T]) -> {"logit", "probability"}, each f32[B,G].

    ids and txt_mask may be [1,G,T]: the same texts for every image. Each text begins with `first_id`; None: [ENC], as
    in training.
    """

    def match(params, seen, ids, txt_mask):
        B = images_of(seen["kv"])
        _, G, T = ids.shape
        ids, txt_mask = (jnp.broadcast_to(x, (B, G, T)).reshape(B * G, T) for x in (ids, txt_mask))
        logits = model.apply({"params": params}, ids, txt_mask, seen["kv"], first_id=first_id, method="match")
        logits = logits.astype(jnp.float32).reshape(B, G, 2)
        return {"logit": logits[..., 1], "probability": jax.nn.softmax(logits, axis=-1)[..., 1]}

    return match


def rerank(model) -> Callable:
    """`match` of images that were seen before.

    (params, img_tok [B,P,D], ids i32[B,G,T], txt_mask bool[B,G,T]) -> {"logit": f32[B,G]}.
    """

    def rerank(params, img_tok, ids, txt_mask):
        kv = model.apply({"params": params}, img_tok, method="match_kv" if isinstance(model, Blip2) else "image_kv")
        return {"logit": match(model)(params, {"kv": kv}, ids, txt_mask)["logit"]}

    return rerank


def score(model) -> Callable:
    """What CapFilt's filter says of texts (paper, section 3.3).

    (params, {"kv", "img_emb"} of B images, ids i32[B,G,T], txt_mask bool[B,G,T]) -> {"itm", "itc"}, each f32[B,G].

    itm is the probability that a text belongs to its image, itc the similarity of their embeddings: what CapFilt's
    filter says.
    """

    def score(params, seen, ids, txt_mask):
        B, G, T = ids.shape
        txt_emb = embed(model)(params, ids.reshape(B * G, T), txt_mask.reshape(B * G, T))["txt_emb"]
        itm = match(model)(params, seen, ids, txt_mask)["probability"]
        return {"itm": itm, "itc": model.similarity(seen["img_emb"], txt_emb.reshape(B, G, -1))}

    return score


# --- captions ---------------------------------------------------------------------------------------------------------
MOST_SAMPLED, MOST_BEAMS = 256, 64  # texts of an image that are made at once: each takes memory and time to compile


class Method(NamedTuple):
    """How captions are made: nucleus sampling or beam search, n of them per image.

    Lengths as in `generate.Sampling`.
    """

    kind: str = "nucleus"  # nucleus | beam
    n: int = 1  # at most MOST_SAMPLED, with beams no more than these
    top_p: float = 0.9  # nucleus
    top_k: int = 50  # nucleus; 0: off
    temperature: float = 1.0  # nucleus
    repetition_penalty: float = 1.1  # the original: 1.1 with nucleus, 1.0 with beams
    min_length: int = 5
    max_length: int = 20
    beams: int = 3  # beam; at most MOST_BEAMS
    length_penalty: float = 1.0  # beam
    rule: str = "blip"  # beam: how lengths are counted, a key of `beam.RULES`


def example_key(key: str, seed: int) -> np.ndarray:
    """u32[2]: the random key of an example, from its name and the seed of the run alone."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.frombuffer(digest, "<u4")


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """[DEC] and the tokens of `prompt`, without [SEP]: what every caption begins with."""
    size = int(tokenizer.lengths([prompt], 1 << 20)[0])  # a letter may be several tokens
    ids, _ = tokenizer.encode([prompt], size)
    return [tokenizer.dec, *ids[0, 1 : size - 1].tolist()]


def captioning(model, tokenizer, method: Method) -> Callable:
    """What continues any prompt, for jax.jit, which compiles it once for each length of the prompt.

    (params, img u8[B,S,S,3], keys u32[B,2], prompt i32[t] of `prompt_ids`) -> {"ids": i32[B,n,L], "log_prob":
    f32[B,n]}.

    Caption i of an image is drawn with fold_in(its key, i): it depends on nothing else in the batch. ids: [DEC],
    prompt, caption, [SEP] if it ended before L = method.max_length tokens, [PAD]. log_prob: the model's own, summed
    over caption and [SEP].
    """
    return _captioning(model, method, eos=tokenizer.sep, pad=tokenizer.pad)


def captioner(model, tokenizer, prompt: str, method: Method) -> Callable:
    """`captioning` of one prompt: (params, img u8[B,S,S,3], keys u32[B,2]) -> the same result."""
    return continuing(model, prompt_ids(tokenizer, prompt), method, eos=tokenizer.sep, pad=tokenizer.pad)


def continuing(model, prompt: list[int], method: Method, *, eos: int, pad: int) -> Callable:
    """`captioner` of a prompt in ids, of `prompt_ids`."""
    caption, start = _captioning(model, method, eos=eos, pad=pad), np.array(prompt, np.int32)
    return lambda params, img, keys: caption(params, img, keys, start)


def _captioning(model, method: Method, *, eos: int, pad: int) -> Callable:
    decode = _decoding(model, method, eos=eos, pad=pad)

    def caption(params, img, keys, prompt):
        return decode(params, view(model, "kv")(params, img)["kv"], keys, prompt)

    return caption


def decoder(model, prompt: list[int], method: Method, *, eos: int, pad: int) -> Callable:
    """The token loop of `captioner`: (params, image keys and values of B images, keys u32[B,2]) -> the same result."""
    decode, start = _decoding(model, method, eos=eos, pad=pad), np.array(prompt, np.int32)
    return lambda params, kv, keys: decode(params, kv, keys, start)


def _decoding(model, method: Method, *, eos: int, pad: int) -> Callable:
    """The token loop: (params, image keys and values of B images, keys u32[B,2], prompt i32[t]) -> captions."""
    if method.kind not in ("nucleus", "beam"):
        raise ValueError(f"method {method.kind!r} is unknown: choose nucleus or beam")

    def decode(params, kv, keys, prompt):
        B = images_of(kv)
        kv, params = stored(kv), text_layers_apart(params)

        def extend(ids, at, cache):
            return model.apply({"params": params}, ids, at, cache, kv, method="extend")

        # the prompt is the same for all texts of an image: one pass over it, whose result they share
        start = jnp.tile(jnp.asarray(prompt, jnp.int32), (B, 1))
        logits, cache = extend(start, jnp.int32(0), model.empty_cache(B, method.max_length - 1))
        return written(extend, logits, cache, start, keys, method, eos=eos, pad=pad)

    return decode


def written(extend: Callable, logits, cache, start, keys, method: Method, *, eos: int, pad: int) -> dict:
    """n texts for each of B images, of which a decoder has read the beginning once.

    Args:
      extend: as in decode/generate.py, on R = B*n rows (of beams B*M), those of an image one behind another.
      logits f32[B,V], cache arrays [L,B,...]: what the decoder said to `start` i32[B,t]; keys u32[B,2].
    Returns: {"ids": i32[B,n,L], "log_prob": f32[B,n]}, L = method.max_length.
    """
    B, n = len(start), method.n if method.kind == "nucleus" else method.beams
    cache = jax.tree.map(lambda x: jnp.repeat(x, n, axis=1), cache)
    if method.kind == "beam":
        how = beam.Beam(
            method.beams,
            method.length_penalty,
            method.repetition_penalty,
            method.min_length,
            method.max_length,
            method.rule,
        )
        ids, log_prob, _ = beam.search(extend, logits, cache, start, how, method.n, eos=eos, pad=pad)
        return {"ids": ids, "log_prob": log_prob}

    how = generate.Sampling(
        method.top_p,
        method.top_k,
        method.temperature,
        method.repetition_penalty,
        method.min_length,
        method.max_length,
    )

    def key_of(key, row):  # each text has random numbers of its own, by its number among those of its image
        return jax.random.fold_in(jax.random.wrap_key_data(key), row % n)

    logits, start, keys = (jnp.repeat(x, n, axis=0) for x in (logits, start, keys))
    own = jax.vmap(key_of)(keys, jnp.arange(B * n))
    ids, log_prob = generate.sample(extend, logits, cache, start, own, how, eos=eos, pad=pad)
    return {"ids": ids.reshape(B, n, -1), "log_prob": log_prob.reshape(B, n)}


def text_of(tokenizer, ids, prompt_len: int) -> str:
    """The caption in one row of ids i32[L], without the prompt's `prompt_len` tokens, [SEP] and [PAD]."""
    return tokenizer.decode(ids[prompt_len:])


# --- answers ----------------------------------------------------------------------------------------------------------
def question_kv(model, params, kv, ids, txt_mask):
    """What the answer decoder attends to, of G questions on each of B images with these keys and values.

    ids i32[B*G,T], txt_mask bool[B*G,T], row b*G + g.
    """
    apply = functools.partial(model.apply, {"params": params})
    return apply(apply(ids, txt_mask, kv, method="encode_question"), method="question_kv")


def answering(model, how: beam.Beam, n: int, *, eos: int, pad: int) -> Callable:
    """Answers by beam search.

    (params, img u8[B,S,S,3], ids i32[B,T], txt_mask bool[B,T]) -> {"ids": i32[B,n,L], "log_prob": f32[B,n]}.
    """

    def answer(params, img, ids, txt_mask):
        kv = question_kv(model, params, view(model, "kv")(params, img)["kv"], ids, txt_mask)
        return answers(model, params, kv, txt_mask, how, n, eos=eos, pad=pad)

    return answer


def answers(model, params, kv, kv_mask, how: beam.Beam, n: int, *, eos: int, pad: int) -> dict:
    """The best n answers to B questions by beam search: {"ids": i32[B,n,L], "log_prob": f32[B,n]}.

    kv: `question_kv`; kv_mask bool[B,T]: the padding of a question is not attended to, so that an answer does not
    depend on the questions beside it.
    """
    kv, params = stored(kv), text_layers_apart(params)

    def extend(ids, at, cache):
        return model.apply({"params": params}, ids, at, cache, kv, kv_mask=kv_mask, method="extend")

    B = images_of(kv)
    start = jnp.full((B, 1), model.dec_id, jnp.int32)
    logits, cache = extend(start, jnp.int32(0), model.empty_cache(B, how.max_length - 1))
    cache = jax.tree.map(lambda x: jnp.repeat(x, how.beams, axis=1), cache)
    found, log_prob, _ = beam.search(extend, logits, cache, start, how, n, eos=eos, pad=pad)
    return {"ids": found, "log_prob": log_prob}


def ranking(model, k: int) -> Callable:
    """The best k of given answers.

    (params, img, ids, txt_mask as in `answering`, answers i32[C,T], ans_mask bool[C,T]) -> {"candidate": i32[B,k],
    "score": f32[B,k]}.

    Best first, as `rank_answers` has them, question padding masked.
    """

    def ranked(params, img, ids, txt_mask, answers, ans_mask):
        kv = question_kv(model, params, view(model, "kv")(params, img)["kv"], ids, txt_mask)
        best, score = rank_answers(model, params, answers, ans_mask, kv, txt_mask, k=k)
        return {"candidate": best, "score": score}

    return ranked


def rank_answers(
    model, params, ids, txt_mask, kv, kv_mask=None, *, k: int = 128, smoothing: float = 0.1, smoothing_over: str = "all"
):
    """The best k of C candidate answers to each of B questions, best first: candidates i32[B,k], scores f32[B,k].

    Args:
      model, params: of a BlipVqa. ids i32[C,T], txt_mask bool[C,T]: the candidates; position 0 is set to [DEC]. kv,
        kv_mask: as in `BlipVqa.lm_logits`.
      k: candidates whose first token is the most probable and that are scored in full; more than C: all.
      smoothing, smoothing_over: a score is minus `losses.text_ce`. "all" is what the published models were ranked with:
        every position up to the list's longest answer adds its smoothing term, past the answer's end too; "valid"
        leaves those out.
    Needs the logits of B*k answers at once, 4*B*k*T*Vp bytes.
    """
    apply = functools.partial(model.apply, {"params": params})
    B, V = images_of(kv), model.med_sizes["vocab_size"]
    start = jnp.full((B, 1), model.dec_id, jnp.int32)
    first_logits, _ = apply(start, 0, model.empty_cache(B, 1), kv, kv_mask, method="extend")
    longest = txt_mask.any(0)[1:]

    def score(ids, txt_mask):
        logits = apply(ids, txt_mask, kv, kv_mask, method="lm_logits")
        return -losses.text_ce(
            logits, ids[:, 1:], txt_mask[:, 1:], V, smoothing=smoothing, over=smoothing_over, counted=longest
        )

    return rank(first_logits, score, ids, txt_mask, k)


# --- features ---------------------------------------------------------------------------------------------------------
def image_features(model, projected: bool) -> Callable:
    """(params, img u8[B,S,S,3]) -> {"image_embeds": f32[B,P,D], "image_embeds_proj": f32[B,P,E] if `projected`}.

    Of BLIP-2's first stage these are the queries, [B,Q,W] and [B,Q,E].
    """

    def features(params, img):
        img_tok = encode_pixels(model, params, img)
        if isinstance(model, Blip2):
            img_tok, _ = model.apply({"params": params}, img_tok, method="look")
        img_tok = img_tok.astype(jnp.float32)
        out = {"image_embeds": img_tok}
        return out | {"image_embeds_proj": _projection(model, params, img_tok, "vision_proj")} if projected else out

    return features


def text_features(model, projected: bool) -> Callable:
    """States of a text's tokens.

    (params, ids i32[B,T], txt_mask bool[B,T]) -> {"text_embeds": f32[B,T,D], and if `projected` "text_embeds_proj":
    f32[B,T,E]}.
    """

    def encode(model, ids, txt_mask):
        return model.encode_text(ids, txt_mask)[0]

    def features(params, ids, txt_mask):
        txt_tok = model.apply({"params": params}, ids, txt_mask, method=encode).astype(jnp.float32)
        out = {"text_embeds": txt_tok}
        return out | {"text_embeds_proj": _projection(model, params, txt_tok, "text_proj")} if projected else out

    return features


def multimodal_features(model) -> Callable:
    """States of the tokens of texts that look at images, with [ENC] first.

    (params, img u8[B,S,S,3], ids i32[B,T], txt_mask bool[B,T]) -> {"multimodal_embeds": f32[B,T,D]}; of BLIP-2's first
    stage the states of the queries that see image and text, [B,Q,W].
    """

    def encode(model, ids, txt_mask, kv):
        if isinstance(model, Blip2):
            return model.join(ids, txt_mask, kv)
        return model.med(ids.at[:, 0].set(model.enc_id), txt_mask, kv=kv)

    def features(params, img, ids, txt_mask):
        kv = view(model, "kv")(params, img)["kv"]
        txt_tok = model.apply({"params": params}, ids, txt_mask, kv, method=encode)
        return {"multimodal_embeds": txt_tok.astype(jnp.float32)}

    return features


def _projection(model, params, tok, layer: str):
    """f32[B,S,E]: the projection `layer` of every token, of unit norm."""
    return unit(model.apply({"params": params}, tok, method=lambda blip, x: getattr(blip, layer)(x)))
