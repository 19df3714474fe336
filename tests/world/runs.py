"""Runs in folders: how one begins, its config file, its log and its parameters."""

from __future__ import annotations

import json
import pathlib

import jax

from blip_jax import checkpoint, trees
from blip_jax.checkpoint import sums
from blip_jax.console import plain
from blip_jax.train import loop, start

# endings of the numbers of a row that no other run has alike
TIMED = ("time", "examples_per_s", "waiting", "goodput", "tflops_per_device", "mfu")
CONFIG = """
import json
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict(json.loads({text!r}), convert_dict=True)
    c.data.crop_scale = tuple(c.data.crop_scale)
    c.optim.freeze = tuple(c.optim.freeze)
    return c.lock()
"""


def write_config(cfg, path: pathlib.Path) -> pathlib.Path:
    path.write_text(CONFIG.format(text=cfg.to_json()))
    return path


def rows(workdir) -> list[dict]:
    """Rows of metrics.jsonl without timings."""
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.endswith(TIMED)} for row in found]


def leaves(workdir) -> dict[str, bytes]:
    """The bytes of every parameter of the newest checkpoint."""
    return {path: x.tobytes() for path, x in trees.paths(checkpoint.load_params(workdir))}


def begun(cfg, workdir: pathlib.Path) -> pathlib.Path:
    """`workdir` with the first checkpoint of a run of `cfg` whose parameters are still the random ones."""
    run = loop.prepare(cfg, workdir)
    with jax.set_mesh(run.mesh), checkpoint.open_dir(run.workdir, 1) as manager:
        state, data = start.create(run, None), {"step": 1, "crc": 0, "sums": None}
        data |= {"frozen": start.reference(run, state, [])} if state.frozen else {}
        checkpoint.save(manager, 1, state.stored, data, plain(run.cfg))
    return run.workdir


def rewrite_data(at, change) -> None:
    """Changes what the checkpoint in the folder `at` holds beside the state, and the checksums that belong to it."""
    data, noted = (json.loads((at / name / "metadata").read_text()) for name in ("data", "checksums"))
    change(data)
    del noted["itself"]
    noted["data"] = sums.of_json(data)
    noted["itself"] = sums.of_json(noted)
    for name, found in (("data", data), ("checksums", noted)):
        (at / name / "metadata").write_text(json.dumps(found))
