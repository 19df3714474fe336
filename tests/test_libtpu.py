"""The TPU compiler's stack: set for what this process and its children compile, and left alone where the user set it."""

import os

import pytest

from blip_jax import cli, libtpu
from blip_jax.bench import aot


@pytest.mark.parametrize("given, want", [
    ("", "--fibers_default_thread_stack_size=1048576"),
    ("--xla_tpu_scoped_vmem_limit_kib=65536", "--xla_tpu_scoped_vmem_limit_kib=65536 --fibers_default_thread_stack_size=1048576"),
    ("--fibers_default_thread_stack_size=4194304 --x=1", "--fibers_default_thread_stack_size=4194304 --x=1"),
])
def test_every_command_and_the_compiler_of_plans_get_a_stack(given, want, monkeypatch, capsys):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
    assert aot.environment_of_compiler()["LIBTPU_INIT_ARGS"] == want
    assert cli.main(["no-such-command"]) == 2 and os.environ["LIBTPU_INIT_ARGS"] == want
    libtpu.set_stack()  # once more changes nothing
    assert os.environ["LIBTPU_INIT_ARGS"] == want


def test_a_crash_of_the_compiler_says_what_helps(monkeypatch):
    """A compiler that dies as libtpu does."""
    for said, remedy in (("*** SIGSEGV STACK OVERFLOW received by PID 1", "set LIBTPU_INIT_ARGS=--fibers_default_thread_stack_size="),
                         ("something else", "raise train.batch")):
        script = f"import os, sys; sys.stderr.write({said!r}); sys.stderr.flush(); os.kill(os.getpid(), 11)"
        real = aot.subprocess.run
        with monkeypatch.context() as m:
            m.setattr(aot, "installed", lambda: True)
            m.setattr(aot.subprocess, "run", lambda command, **kw: real([command[0], "-c", script], **kw))
            with pytest.raises(ValueError, match=rf"crashed for v5e:2x2 \(signal 11\): .*{remedy}"):
                aot.compile_programs({"topology": "v5e:2x2"})
