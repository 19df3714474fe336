"""What follows from a run's settings alone, kept for the next run of this process that has the same ones: another stage
of a demo, or a run that goes on. Tracing a step again takes seconds, and loading its program as many."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable

from ml_collections import ConfigDict

from blip_jax.console import plain

MOST = 8  # things kept, those asked for last
ELSEWHERE = ("data", "eval", "train.init_from", "train.log_every", "train.save_every", "train.eval_every", "train.keep")
ELSEWHERE += ("train.keep_every", "train.keep_best", "train.wandb")
_kept: dict[Hashable, object] = {}


def of(cfg: ConfigDict, make: Callable, *what: Hashable):
    """make(settings), made once for these settings and `what`.

    settings: `cfg` without the leaves ELSEWHERE, which neither a model nor its steps read.
    """
    settings = ConfigDict(cfg).copy_and_resolve_references().unlock()
    for path in ELSEWHERE:
        *parents, name = path.split(".")
        within = settings
        for parent in parents:
            within = within[parent]
        del within[name]
    key = (*what, json.dumps(plain(settings), sort_keys=True))
    made = _kept.pop(key) if key in _kept else make(settings.lock())
    _kept[key] = made  # the last asked for is the last in order
    for oldest in list(_kept)[:-MOST]:
        del _kept[oldest]
    return made
