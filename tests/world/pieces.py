"""A small T5 vocabulary for tests."""

import collections
import json
import math
import pathlib

from blip_jax.data.text.sentencepiece import SENTINELS, SPACE, SPECIAL


def write_pieces(captions, size: int, path: pathlib.Path, table: str | None = None) -> None:
    """A tokenizer.json as FlanT5's, of `size` tokens with the 100 sentinels: all characters, and the most frequent
    words as one piece each. table: of characters, in base 64."""
    words = collections.Counter(word for caption in captions for word in caption.split())
    letters = collections.Counter({SPACE: sum(words.values())})
    for word, n in words.items():
        letters.update({c: n * word.count(c) for c in set(word)})
    total = sum(letters.values())
    scores = {c: math.log(n / total) - 2 for c, n in letters.items()}
    room = size - len(SENTINELS) - len(SPECIAL) - len(scores)
    if room < 0:
        raise ValueError(f"size={size}: characters, special tokens and sentinels alone are {size - room}")
    for word, n in sorted(words.items(), key=lambda x: (-x[1], x[0]))[:room]:
        scores[SPACE + word] = math.log(n / total)
    scores |= {f"{SPACE}{SPACE}{i}": -20.0 for i in range(size - len(SENTINELS) - len(SPECIAL) - len(scores))}
    vocab = [[x, 0.0] for x in SPECIAL] + [[x, score] for x, score in scores.items()] + [[x, 0.0] for x in SENTINELS]
    normalizer = table and {"type": "Precompiled", "precompiled_charsmap": table}
    model = {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False}
    path.write_text(json.dumps({"version": "1.0", "normalizer": normalizer, "model": model}), encoding="utf-8")
