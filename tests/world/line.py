"""The smallest task there is, for tests of what has nothing to do with models: a line through the mean of a picture."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from blip_jax.data import pairs


class Line(nn.Module):
    dtype = jnp.float32

    @nn.compact
    def __call__(self, img, ids, txt_mask):
        return nn.Dense(2, name="vision_proj")(img.mean((1, 2)))


def check(cfg, tokenizer=None):
    return []


def build(cfg):
    return Line()


def example(record, rng, cfg, tokenizer):
    row = pairs.example(record, rng, cfg, tokenizer)
    return {name: row[name] for name in ("img", "ids", "txt_mask", "notes")}


shapes = pairs.shapes


def loss(model, cfg, params, extra, batch, keys):
    """How far the line is from the length of the text, with noise."""
    found = model.apply({"params": params}, batch["img"], batch["ids"], batch["txt_mask"])
    wanted = batch["txt_mask"].sum(1, keepdims=True) + jax.random.normal(keys.dropout, found.shape)
    total = jnp.square(found - wanted).mean()
    return total, ({"loss": total}, {})


def flops(cfg, T=None):
    return {"line": 12, "step": 36}
