"""Signals: at once where nothing is lost, else at a place where somebody looks."""

import os
import signal

import pytest

from blip_jax.parallel import interrupt
from blip_jax.parallel.interrupt import Interrupt, Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_where_nothing_is_lost_a_signal_ends_it_at_once(number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="stopped by a signal"), Interrupt():
        os.kill(os.getpid(), number)
        raise AssertionError("went on")
    assert signal.getsignal(number) is before
    assert capsys.readouterr().out == f"{signal.Signals(number).name}: stopping\n"


def test_where_something_is_it_waits_for_a_place(capsys):
    interrupt.check()  # nobody has entered anything
    with Interrupt("saving") as stop:
        interrupt.check()
        assert not stop.here()
        with stop.deferred("ending the evaluation"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and stop.here()
        with pytest.raises(Stopped):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):  # the second time it is meant
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("went on")
    interrupt.check()
    assert capsys.readouterr().out == "SIGTERM: ending the evaluation\n"


def test_several_processes_agree():
    asked = []

    def agree(own):
        asked.append(own)
        return len(asked) == 3

    with Interrupt("saving", agree):
        interrupt.check()
        interrupt.check()
        with pytest.raises(Stopped):
            interrupt.check()
    assert asked == [False] * 3


def test_an_inner_one_gives_back_to_the_outer():
    with pytest.raises(Stopped), Interrupt() as outer:
        with Interrupt("saving") as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner.asked and not outer.asked
        os.kill(os.getpid(), signal.SIGTERM)
