"""Files of the image towers of BLIP-2: the part of a whole EVA-CLIP or CLIP tower that it takes, under plain names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from blip_jax.convert.apply import folded, listed
from blip_jax.convert.rules.vision import TOWER_NAMES, TOWER_PREFIXES
from blip_jax.convert.wrappers import Renamed


def find(names: Iterable[str]) -> tuple[str, str] | None:
    """(kind, prefix) of the tower that tensors of these names have, None if they have none."""
    names = set(names)
    for prefix in TOWER_PREFIXES:
        for kind, (mark, *_) in TOWER_NAMES.items():
            if prefix + mark in names:
                return kind, prefix
    return None


def penultimate(tensors: Mapping, depth: int = 0) -> tuple[str, Mapping, list[str]]:
    """(kind, tensors under the names of rules/vision.py, notes) of a file of LAVIS, EVA-CLIP or OpenAI's CLIP.

    A whole tower loses its last block and what follows it, since BLIP-2 takes the tokens of the block before (BLIP-2
    paper, section 3.3); what does not belong to the tower is left out. The notes name both.

    Args:
      tensors: state dict, names with or without one of TOWER_PREFIXES.
      depth: blocks that the model has, 39 or 23; 0: as the file shows, where a norm or head behind the blocks says that
        the tower is whole.
    ValueError: no tower, or neither `depth` blocks nor one more.
    """
    found = find(tensors)
    if found is None:
        raise ValueError(
            f"no image tower of EVA-CLIP or CLIP: the file holds {listed(folded(tensors)[:6]) or 'nothing'}, ...; "
            "expected LAVIS's eva_vit_g.pth or clip_vit_L.pth, or a checkpoint that has the tower"
        )
    kind, prefix = found
    _, blocks, whole = TOWER_NAMES[kind]
    names = {name[len(prefix) :]: name for name in tensors if name.startswith(prefix)}
    block = re.compile(re.escape(blocks) + r"(\d{1,3})\.")
    number = {name: int(match[1]) for name in names if (match := block.match(name))}
    count, extra = max(number.values(), default=-1) + 1, [name for name in names if re.fullmatch(whole, name)]
    wanted = depth or count - bool(extra)
    if count - wanted not in (0, 1):
        raise ValueError(
            f"the {kind} tower of the file has {count} blocks, expected {depth}, or one more: set model.vit.depth to "
            f"{count} or to {count - 1}"
        )
    dropped = [name for name in names if number.get(name, -1) >= wanted or name in extra]
    notes = []
    if dropped:
        notes.append(
            f"of the {count} blocks of the {kind} tower the first {wanted} are read, and nothing behind them: left out "
            f"{listed(folded(dropped))}"
        )
    if others := [name for name in tensors if not name.startswith(prefix)]:
        notes.append(f"of the file only the image tower is read: left out {listed(folded(others))}")
    return kind, Renamed(tensors, {name: names[name] for name in names if name not in set(dropped)}), notes
