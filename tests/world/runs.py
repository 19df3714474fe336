"""Runs in folders, for the tests that start them as commands: their config files and their logs."""

from __future__ import annotations

import json
import pathlib

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
    return [{k: v for k, v in row.items() if not k.endswith(("examples_per_s", "waiting"))} for row in found]
