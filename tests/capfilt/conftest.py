"""What the tests of CapFilt have in common."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_once(compilation_cache):
    """Every program is kept: each run compiles the same ones."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, 0.0)
    yield
    jax.config.update(name, before)
