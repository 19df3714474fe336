"""Captioning, filter and vision tower beside transformers' BLIP with our weights, and captioning beside the original's
way of decoding.

The original's way is our decoder, but it projects the image keys and values again for every token and every caption.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers_peer

from blip_jax.bench import caption, inference
from blip_jax.inference import programs
from blip_jax.inference.programs import encode_pixels
from blip_jax.models.layers.dense import apart
from blip_jax.models.text.cache import KeysAndValues, opened

LOGITS = {"float32": 1e-3, "bfloat16": 0.25}  # largest difference of the captioners' logits, whose deviation is about 1
OUTPUTS = {"float32": 1e-3, "bfloat16": 0.2}  # root mean square difference of outputs, of their standard deviation


def captions(settings: caption.Settings, ours: caption.Ours, img: np.ndarray, dtype: str) -> tuple[dict, dict]:
    """(how far the captioners agree, {name: job} of transformers and of the original's way), as
    `bench.caption.run` takes a peer."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    params = jax.tree.map(np.asarray, ours.params)
    peer = transformers_peer.Peer(ours.config, params, dtype, eos=caption.EOS, pad=caption.PAD)
    found = same_captions(ours, peer, img[:2], dtype)

    pixels, length = peer.pixels(img), len(ours.prompt) + settings.tokens
    states = peer.vision(pixels)
    out = {"transformers vision": lambda: peer.vision(pixels)}
    for n in settings.captions:
        how = dict(
            do_sample=True,
            top_p=0.9,
            top_k=50,
            repetition_penalty=1.1,
            num_return_sequences=n,
            max_new_tokens=settings.tokens,
            min_new_tokens=settings.tokens,
        )
        rows = states.repeat_interleave(n, dim=0)  # its `generate` repeats the image states before it projects them
        out[f"transformers/{n}"] = functools.partial(exactly, length, peer.generate, pixels, ours.prompt, **how)
        out[f"transformers image_kv/{n}"] = functools.partial(peer.image_kv, rows)
        out[f"transformers decode/{n}"] = functools.partial(exactly, length, peer.decode, states, ours.prompt, **how)

    n = min(settings.captions)  # with more captions the original's way only does the same work more often
    again = original_way(ours, caption.sampling(settings, ours, n))
    out[f"original/{n}"] = caption.waiting(again, ours.weights, img, caption.keys_of(img))
    return found, out


class OriginalWay:
    """Stands in for the model in `programs.decoder`, and image states [B,P,1,D] for keys and values: they are projected
    again for every token and every caption, as in the original's `generate`, which caches only the self-attention."""

    def __init__(self, model):
        self.model, self.empty_cache = model, model.empty_cache

    def apply(self, variables, ids, start, cache, states, method):
        (states,) = apart(states)  # of the one layer that they pretend to be
        img_tok = opened(states, self.model.dtype)[0][:, :, 0]
        # else XLA takes the projection out of the loop
        img_tok, start = jax.lax.optimization_barrier((img_tok, start))
        img_tok = jnp.repeat(img_tok, len(ids) // len(img_tok), axis=0)
        kv = self.model.apply(variables, img_tok, method="image_kv")
        return self.model.apply(variables, ids, start, cache, kv, method=method)


def original_way(ours: caption.Ours, method: programs.Method) -> Callable:
    """As `Ours.whole`, with keys and values again for every token."""
    decode = programs.decoder(OriginalWay(ours.model), ours.prompt, method, eos=caption.EOS, pad=caption.PAD)

    def run(params, img, keys):
        states = encode_pixels(ours.model, params, img)[None, :, :, None]
        return decode(params, KeysAndValues(states, states), keys)

    return jax.jit(run)


def logits(ours: caption.Ours, params, img, ids):
    """f32[B,T-1,V] of our captioner, teacher-forced"""
    apply = functools.partial(ours.model.apply, {"params": params})
    kv = apply(encode_pixels(ours.model, params, img), method="image_kv")
    return apply(ids, jnp.ones(ids.shape, bool), kv, method="lm_logits")[..., : ours.config.med.vocab_size]


def same_captions(ours: caption.Ours, peer, img: np.ndarray, dtype: str) -> dict:
    """Largest difference of teacher-forced logits; in float32 also whether greedy texts are equal. ValueError if
    they differ."""
    ids = np.random.default_rng(1).integers(5, ours.config.med.vocab_size - 2, (len(img), 12)).astype(np.int32)
    ids[:, 0] = ours.prompt[0]
    a, b = (
        np.asarray(jax.jit(functools.partial(logits, ours))(ours.weights, img, ids)),
        peer.logits(peer.pixels(img), ids)[:, :-1],
    )
    difference = float(np.abs(a - b).max())
    found = {"logit_difference": difference, "limit": LOGITS[dtype]}
    problem = (
        f"logits differ by {difference:.2g}, more than {LOGITS[dtype]:.2g}" if not difference <= LOGITS[dtype] else ""
    )
    if dtype == "float32" and not problem:
        length = len(ours.prompt) + 6
        greedy = programs.Method(top_k=1, min_length=length, max_length=length)
        keys = np.zeros((len(img), 2), np.uint32)
        mine = np.asarray(ours.whole(greedy)(ours.weights, img, keys)["ids"])[:, 0]
        theirs = peer.generate(
            peer.pixels(img), ours.prompt, do_sample=False, repetition_penalty=1.1, max_new_tokens=6, min_new_tokens=6
        )
        same = np.array_equal(mine, theirs)
        found["greedy_ids_equal"] = same
        problem = "" if same else "greedy texts differ although logits agree"
    if problem:
        raise ValueError(f"transformers with our weights is not our model: {problem}; times would not be comparable")
    return found


def exactly(length: int, generate: Callable, *args, **how) -> None:
    """Calls the peer; ValueError if its texts do not have `length` tokens, prompt included."""
    ids = generate(*args, **how)
    if ids.shape[1] != length:
        raise ValueError(
            f"transformers gave texts of {ids.shape[1]} tokens, not {length}: times would not be comparable"
        )


def outputs(settings: inference.Settings, ours: inference.Ours, batch: dict, job: Callable) -> tuple[dict, dict]:
    """(how far the outputs agree, {"transformers": job}), as `bench.inference.run` takes a peer."""
    dtype = ours.config.dtype
    params = jax.tree.map(np.asarray, ours.params)
    peer = transformers_peer.Matcher(ours.config, params, dtype, settings.threads)
    theirs = peer.job(settings.workload, peer.inputs(batch))
    return same_outputs(job(), theirs(), dtype), {"transformers": theirs}


def same_outputs(ours: dict, theirs: dict, dtype: str) -> dict[str, float]:
    """Root mean square difference of each output, of its standard deviation. ValueError: more than OUTPUTS."""
    found = {}
    for name, x in ours.items():
        mine, peer = np.asarray(x, np.float32), theirs[name].float().cpu().numpy()
        found[name] = float(np.sqrt(np.mean((mine - peer) ** 2)) / np.std(peer))
        if not found[name] <= OUTPUTS[dtype]:
            raise ValueError(
                f"transformers with our weights is not our model: {name} differs by {found[name]:.2g} of its "
                f"deviation, "
                f"more than {OUTPUTS[dtype]:.2g}; times would not be comparable"
            )
    return found
