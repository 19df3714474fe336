"""The smallest second stages of BLIP-2, with OPT and with FlanT5, on the built-in world."""

from __future__ import annotations

import pathlib

from blip_jax import config
from blip_jax.data.scenes.world import vocab_captions
from blip_jax.data.text.bpe import train_bpe
from world.pieces import write_pieces


def tiny(llm: str, **more):
    """The config of a second stage with "opt" or "flant5"; more: leaves by path."""
    c = config.blip2("eva_tiny", "tiny", f"{llm}_tiny").unlock()
    c.model.update(img_size=16, embed_dim=16, dtype="float32", dropout=0.0, llm_dropout=0.0)
    c.model.llm.vocab_size = 384  # a multiple of 128: no row is padding
    c.text.max_len, c.train.batch = 12, 16
    c.update_from_flattened_dict(more)
    return c


def on_scenes(cfg):
    """The config with 64 scenes as its training data."""
    with cfg.data.unlocked():
        cfg.data.train.world = config.source("scenes", count=64, size=32)
    cfg.data.threads = cfg.data.prefetch = 2
    return cfg


def vocabularies(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """kind -> file, made in a folder, of a vocabulary that fits the tiny language model."""
    captions = list(vocab_captions(300))
    train_bpe(captions, 300, folder / "vocab.json")
    write_pieces(captions, 140, folder / "pieces.json")
    return {"opt": folder / "vocab.json", "flant5": folder / "pieces.json"}
