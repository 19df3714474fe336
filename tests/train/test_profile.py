"""Profiles of some steps of a run."""

import jax
import jax.numpy as jnp
import pytest

from blip_jax.train import profile
from blip_jax.train.profile import Profile, Steps


@pytest.mark.parametrize("text", ["", "0:3", "5:4", "a:b", "1:2:3", "-1:2", "1:", "1:100000", "1e3", "9" * 20])
def test_steps_that_are_none(text):
    with pytest.raises(ValueError, match="--profile is .*: give FIRST:LAST"):
        profile.parse(text)


def test_steps():
    assert profile.parse("100:103") == Steps(100, 103) and profile.parse("7") == Steps(7, 7)
    assert profile.port("9012") == 9012
    for text in ("80", "70000", "x", ""):
        with pytest.raises(ValueError, match="--profiler_port is"):
            profile.port(text)


def steps_of(recorder, first, last):
    """Runs steps `first` to `last`; which of them were recorded."""
    recorded = []
    for step in range(first, last + 1):
        recorder.before(step)
        recorded += [step] * bool(recorder._begun)
        recorder.after(step, jnp.float32(step) + 1)
    return recorded


def test_the_steps_that_are_wanted_are_recorded_also_by_a_run_that_goes_on_within_them(tmp_path, capsys):
    with Profile(Steps(2, 3), tmp_path / "a") as recorder:
        assert steps_of(recorder, 1, 5) == [2, 3]
    assert list((tmp_path / "a").rglob("*.xplane.pb")) and f"steps 2 to 3: {tmp_path / 'a'}" in capsys.readouterr().out
    with Profile(Steps(2, 9), tmp_path / "b") as recorder:
        assert steps_of(recorder, 4, 5) == [4, 5]  # then a signal
    assert list((tmp_path / "b").rglob("*.xplane.pb")) and "stopped before step 9" in capsys.readouterr().out
    for wanted in (None, Steps(2, 3)):  # over before the run goes on
        with Profile(wanted, tmp_path / "c") as recorder:
            assert steps_of(recorder, 4, 5) == []
    assert not (tmp_path / "c").exists() and not capsys.readouterr().out


def test_others_may_ask_for_a_profile(capsys):
    with profile.served(None):
        assert not capsys.readouterr().out
    with profile.served(39012):
        assert "port 39012" in capsys.readouterr().out
        with pytest.raises(Exception, match="Only one profiler server"):
            jax.profiler.start_server(39013)
    with profile.served(39012):  # it is free again
        pass
