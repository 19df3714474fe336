"""Tiny BLIP-2s in workdirs for CapFilt: second stages that caption, a first stage that filters."""

import pathlib

from blip_jax import config
from blip_jax.data.scenes.world import vocab_captions
from blip_jax.data.text.bpe import train_bpe
from blip_jax.tasks import blip2_stage1
from world.pieces import write_pieces
from world.runs import begun


def save_blip2(folder: pathlib.Path, tiny_vocab, *kinds: str) -> dict[str, pathlib.Path]:
    """name -> a workdir with lively random parameters; kinds: of opt, flant5 and stage1."""
    captions, vocab = list(vocab_captions(300)), {"stage1": tiny_vocab}
    vocab |= {"opt": folder / "vocab.json", "flant5": folder / "pieces.json"}
    out = {}
    for kind in kinds:
        if kind == "opt":
            train_bpe(captions, 300, vocab[kind])
        if kind == "flant5":
            write_pieces(captions, 140, vocab[kind])
        c = config.blip2("eva_tiny", "tiny", *([] if kind == "stage1" else [f"{kind}_tiny"])).unlock()
        c.model.update(img_size=16, dtype="float32", init_std=0.2, embed_dim=16)
        if kind == "stage1":
            c.model.update(img_size=24)
            c.task = blip2_stage1.leaves()
        c.text.vocab, c.text.max_len, c.train.steps, c.train.batch = str(vocab[kind]), 14, 1, 16
        with c.data.unlocked():
            c.data.train.world = config.source("scenes", count=64, size=32)
        out[kind] = begun(c, folder / kind)
    return out
