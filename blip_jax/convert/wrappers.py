"""What other programs lay around a state dict, dicts it is packed into and parts of its names."""

from __future__ import annotations

from collections.abc import Mapping

# keys under which training programs save a state dict, one in the other: the originals, Lightning, DeepSpeed
PACKED = ("model", "state_dict", "model_state_dict", "module")
DEPTH = 8  # of such dicts
# parts of names that wrappers put in anywhere: DataParallel, torch.compile, FSDP, activation checkpointing
INSERTED = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
LEADING = "model"  # of a module that holds the model as self.model


class Renamed(Mapping):
    """The tensors of another mapping under other names."""

    def __init__(self, tensors: Mapping, names: Mapping[str, str]):
        self._tensors, self._names = tensors, names

    def __getitem__(self, name):
        return self._tensors[self._names[name]]

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


def unpack(content: Mapping) -> tuple[Mapping, list[str], list[str]]:
    """The dict of tensors in the dicts of PACKED that it may lie in.

    Returns it, the keys that led there, and those that stand beside. ValueError: two keys that could lead there.
    """
    way, beside = [], []
    while len(way) < DEPTH:
        found = [name for name in PACKED if isinstance(content.get(name), Mapping)]
        if not found:
            break
        if len(found) > 1:
            raise ValueError(
                f"it holds dicts under {' and under '.join(map(repr, found))}, and does not say which is the model: "
                "save the state dict alone"
            )
        beside += [str(name)[:60] for name in content if name != found[0]]
        content, way = content[found[0]], [*way, found[0]]
    return content, way, beside


def unwrap(tensors: Mapping, known) -> tuple[Mapping, list[str]]:
    """The tensors under names without wrappers, and notes that say so; `tensors` itself where there is none.

    known: whether names are those of a model; a leading `model.` is only taken off where that makes them known.
    ValueError: two names become one.
    """
    names = {name: ".".join(part for part in name.split(".") if part not in INSERTED) for name in tensors}
    left_out = [w for w in INSERTED if any(w in name.split(".") for name in names)]
    stripped = names
    while not known(stripped.values()) and any(new.startswith(f"{LEADING}.") for new in stripped.values()):
        stripped = {name: new.removeprefix(f"{LEADING}.") for name, new in stripped.items()}
    if stripped is not names and known(stripped.values()):
        names, left_out = stripped, [*left_out, LEADING]
    if not left_out:
        return tensors, []
    back: dict[str, str] = {}
    for name, new in names.items():
        if new in back:
            raise ValueError(f"{back[new]} and {name} are both {new} without {' and '.join(left_out)}: which is meant?")
        back[new] = name
    return Renamed(tensors, back), [f"names are read without {', '.join(f'{w}.' for w in left_out)}"]
