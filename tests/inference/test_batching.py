"""Programs over rows in passes."""

import os
import signal

import numpy as np
import pytest
from ml_collections import ConfigDict

from blip_jax.inference.batching import Runner
from blip_jax.parallel import sharding
from blip_jax.parallel.interrupt import Interrupt, Stopped


def test_a_signal_ends_it_between_two_passes():
    run, passes = Runner(sharding.make_mesh(ConfigDict({"data": 8, "fsdp": 1, "tensor": 1}))), []
    stop = Interrupt("ending it")

    def rows(at):
        passes.append(at.start)
        if passes == [0, 8, 16]:
            os.kill(os.getpid(), signal.SIGTERM)
        return (np.arange(at.start, at.stop),)

    def double(params, x):
        return 2 * x

    with stop, pytest.raises(Stopped):
        run.map(double, {}, 50, rows, size=8)
    assert stop.asked and passes == [0, 8, 16]
    np.testing.assert_array_equal(run.map(double, {}, 50, rows, size=8), 2 * np.arange(50))
