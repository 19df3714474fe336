"""Where compiled programs are kept from run to run."""

import os
import time
import zlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from blip_jax.parallel import compiler

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """jax's settings as without the tests' own cache, put back afterwards; a home of its own."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_are_kept_where_the_user_says_and_else_at_home(settings, tmp_path, monkeypatch):
    assert f"kept in {tmp_path / 'blip_jax'}; JAX_COMPILATION_CACHE_DIR" in compiler.keep()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "blip_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert f"kept in {tmp_path / 'blip_jax'};" in compiler.keep()  # what is set stays
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("HOME", "/home/someone")
    assert "kept in /home/someone/.cache/blip_jax;" in compiler.keep()


def test_programs_are_not_kept_where_they_would_not_be_found(settings, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "of several processes of CPUs" in compiler.keep() and jax.config.jax_compilation_cache_dir is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "kept in" in compiler.keep()
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert "is off" in compiler.keep() and jax.config.jax_compilation_cache_dir is None


def older(file, seconds: float):
    """Makes a file look as if it had last been read and written so long ago."""
    then = time.time() - seconds
    os.utime(file, (then, then))


def test_what_a_killed_process_left_half_written_is_removed_and_kept_anew(settings, tmp_path):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compile = lambda: jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))
    compiler.keep()
    compile()
    files = sorted((tmp_path / "blip_jax").glob("*-cache"))
    assert files and all(compiler.whole(file) for file in files)
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
        older(file, 60)
    jax.clear_caches()
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        compile()
    assert not any(compiler.whole(file) for file in files)  # jax leaves them as they are
    (tmp_path / "blip_jax" / ".checked").unlink()  # as if the process had begun after them
    assert f"; {len(files)} that were half written are removed" in compiler.keep()
    jax.clear_caches()
    compile()
    assert all(compiler.whole(file) for file in files)


def test_each_program_is_read_through_once(tmp_path, monkeypatch):
    content = zlib.compress(os.urandom(3 << 20))
    written = {"whole": content, "half": content[: len(content) // 2], "empty": b"", "other": b"\x28\xb5\x2f\xfd.."}
    for name, data in written.items():
        (tmp_path / f"{name}-cache").write_bytes(data)
        older(tmp_path / f"{name}-cache", 60)
    (tmp_path / "begun-cache").write_bytes(content[:100])  # by a process that goes on
    assert compiler.remove_broken(tmp_path) == 2
    assert {file.name for file in tmp_path.glob("*-cache")} == {"whole-cache", "other-cache", "begun-cache"}
    looked = []
    monkeypatch.setattr(compiler, "whole", lambda file: looked.append(file.name) or True)
    older(tmp_path / ".checked", 30)  # the begun one was written after it
    older(tmp_path / "begun-cache", 20)
    assert compiler.remove_broken(tmp_path) == 0 and looked == ["begun-cache"]


def test_a_program_that_no_run_reads_for_long_is_removed_from_the_folder_that_is_ours_alone(settings, tmp_path):
    ours, own = tmp_path / "blip_jax", tmp_path / "own"
    for folder in (ours, own):
        folder.mkdir()
        for name, age in (("read-cache", 0.9 * compiler.UNUSED), ("unused-cache", 1.1 * compiler.UNUSED)):
            (folder / name).write_bytes(zlib.compress(b"a program"))
            older(folder / name, age)
    compiler.keep()
    assert [file.name for file in ours.glob("*-cache")] == ["read-cache"]
    jax.config.update("jax_compilation_cache_dir", str(own))
    compiler.keep()
    assert len(list(own.glob("*-cache"))) == 2
