"""Runs that are killed: kill -9 at any moment leaves them able to resume and to end as if nothing had happened.

A captioner, which starts in half the time, and BLIP-2's second stage, whose frozen parts are drawn again at each start;
a pre-training with momentum and queue is killed in test_processes.py.
"""

import os
import random
import signal
import time

import pytest
from world.language import on_scenes, tiny, vocabularies
from world.runs import leaves, rows, write_config
from world.trainer import Trainer

from blip_jax import checkpoint


def captioner(cfg, folder):
    cfg.objective = "caption"
    return cfg


def second_stage(cfg, folder):
    return on_scenes(tiny("opt", **{"text.vocab": str(vocabularies(folder)["opt"])}))


@pytest.mark.parametrize("make", [captioner, second_stage])
def test_sigterm_and_kill_at_20_moments(make, tiny_cfg, tmp_path):
    """One run is first stopped by a signal, then killed again and again, and ends as the one that nobody disturbed."""
    cfg = make(tiny_cfg, tmp_path)
    cfg.train.update(steps=42, save_every=2, log_every=3, keep=2, keep_every=12)
    trainer = Trainer(write_config(cfg, tmp_path / "config.py"), tmp_path)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    started = time.perf_counter()
    trainer.start(whole)
    assert trainer.wait_for("step 3/42"), trainer.log.read_text()
    start_up = time.perf_counter() - started
    assert trainer.end() == 0, trainer.log.read_text()

    pid = trainer.start(cut)
    assert trainer.wait_for("step 3/42")
    os.kill(pid, signal.SIGTERM)
    assert trainer.end() == 75
    text = trainer.log.read_text()
    stopped = checkpoint.newest(cut).name
    assert "SIGTERM: finishing this step, then saving" in text
    assert f"stopped by a signal at step {stopped} of 42" in text
    assert 3 <= int(stopped) < 42

    draw, statuses, torn = random.Random(0), [], 0
    for attempt in range(20):
        begun = time.perf_counter()
        pid = trainer.start(cut)
        if attempt % 2:  # anywhere between the start and the first steps
            time.sleep(draw.uniform(0, start_up))
        else:  # while the n-th checkpoint is being written, or just after
            trainer.wait_for("saving checkpoint", draw.randint(1, 2))
            start_up = time.perf_counter() - begun  # the first start compiled, later ones do not
            time.sleep(draw.uniform(0, 0.15))
        statuses.append(trainer.kill(pid))
        torn += any("tmp" in p.name for p in (cut / "checkpoints").glob("*"))
        assert "Traceback" not in trainer.log.read_text(), trainer.log.read_text()
    assert statuses.count(-signal.SIGKILL) >= 15 and set(statuses) <= {0, -signal.SIGKILL}
    assert torn, "no kill fell into a save"
    trainer.start(cut)
    assert trainer.end() == 0, trainer.log.read_text()
    assert rows(cut) == rows(whole) and [r["step"] for r in rows(cut)] == list(range(3, 43, 3))
    assert leaves(cut) == leaves(whole)
    assert sorted(p.name for p in (cut / "checkpoints").iterdir()) == ["12", "24", "36", "40", "42"]
    trainer.close()
