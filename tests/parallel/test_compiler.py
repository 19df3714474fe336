"""Where compiled programs are kept from run to run."""

import jax
import pytest

from blip_jax.parallel import compiler

SETTINGS = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """jax's settings as without the tests' own cache, put back afterwards; a home of its own."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


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
