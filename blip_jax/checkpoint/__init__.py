"""Checkpoints of a run: train state, data position and config, one folder per step, written by orbax in the background.

A folder appears under its final name only when it is complete (orbax writes beside it and renames), so a process killed
at any moment leaves the previous checkpoint usable; `open_dir` removes what such a process left behind. The format
knows nothing of the mesh: a state saved on one restores onto any other. Each array has a checksum, and so have the data
position, the config and the vocabulary: whatever reads a checkpoint compares them.
"""

from blip_jax.checkpoint.folders import (
    BEST,
    COMMITTED,
    SUBDIR,
    folders,
    home,
    missing,
    newest_complete,
    references,
    short,
    vocabularies,
    vocabulary,
)
from blip_jax.checkpoint.load import (
    Damaged,
    check_folders,
    damage,
    load_config,
    load_data,
    load_extra,
    load_params,
    newest,
    own_vocabulary,
)
from blip_jax.checkpoint.store import check_same, open_dir, restore, save, write
