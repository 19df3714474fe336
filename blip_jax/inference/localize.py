"""Where in a picture the words of a text are: cross-attention of the matching head's encoder, weighted by gradients.

Grad-CAM as LAVIS has it for BLIP (`compute_gradcam` of its image-text matching model): of one layer, for each token,
the mean over heads of probability times positive part of the gradient of the logit "the text belongs to the image".
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.inference import inputs, programs

OF_TWELVE = 7  # the layer, from 0, that LAVIS takes of BERT's twelve


def layer_of(layers: int, layer: int | None = None) -> int:
    """The layer that is looked at of so many: `layer`, from 0, or the one that lies as deep as LAVIS's.

    Not the last: what a word finds there no longer reaches the matching head, which reads [ENC] alone. ValueError:
    there is no such layer.
    """
    last = layers - 2
    if layer is not None:
        layer = inputs.whole(layer, "layer")
    if last < 0:
        raise ValueError("a text encoder of one layer has no maps of words: give a model with two or more")
    if layer is None:
        return min(OF_TWELVE * layers // 12, last)
    if not 0 <= layer <= last:
        raise ValueError(
            f"layer is {inputs.shown(layer)}: the text encoder has {layers} layers; give 0 to {last}, as the words' "
            "part of the last one does not reach the matching head"
        )
    return layer


def program(model, layer: int) -> Callable:
    """For jax.jit: (params, img u8[B,S,S,3], ids i32[B,T], txt_mask bool[B,T]) -> {"probability": f32[B], "maps":
    f32[B,T,P-1]}, of each token what each patch of the image did for the match."""

    def localize(params, img, ids, txt_mask):
        kv, (B, T) = programs.view(model, "kv")(params, img)["kv"], ids.shape
        L, _, P, N, _ = kv.k.shape

        def match(nudge):
            logits, p = model.apply({"params": params}, ids, txt_mask, kv, nudge, method="match_looking")
            return logits[:, 1].sum(), (logits, p[layer])

        slope, (logits, p) = jax.grad(match, has_aux=True)(jnp.zeros((L, B, N, T, P), kv.k.dtype))
        cam = (p * jax.nn.relu(slope[layer])).astype(jnp.float32).mean(axis=1)
        return {"probability": jax.nn.softmax(logits)[:, 1], "maps": cam[:, :, 1:]}  # without the image's [CLS]

    return localize


def by_words(maps: np.ndarray, words: list[tuple[str, range]]) -> dict:
    """Maps of tokens f32[T,P-1] as {"words": [str], "maps": f32[words,g,g], "text_map": f32[g,g]} on the grid of
    patches. A word has the mean of its pieces, the text that of all pieces, without [CLS] and [SEP].

    words: of `Tokenizer.words`.
    """
    side = round(maps.shape[1] ** 0.5)
    mean = lambda positions: maps[list(positions)].mean(axis=0).reshape(side, side)
    return {
        "words": [word for word, _ in words],
        "maps": np.stack([mean(positions) for _, positions in words]),
        "text_map": mean(position for _, positions in words for position in positions),
    }


def peak(heat: np.ndarray) -> tuple[float, float]:
    """(x, y) of a map f32[h,w], as shares of width and height from the left and the top: the middle of its hottest
    cell; (0.5, 0.5) of a map without any heat."""
    h, w = heat.shape
    if not heat.max() > 0:
        return 0.5, 0.5
    y, x = divmod(int(heat.argmax()), w)
    return (x + 0.5) / w, (y + 0.5) / h
