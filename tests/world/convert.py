"""Files of synthetic checkpoints, and workdirs made of them, for the tests of the conversion."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from blip_jax.convert import write
from world import official


def store(folder, name, arrays):
    """The tensors in a file that needs no torch."""
    path = folder / f"{name}.safetensors"
    save_file({key: np.ascontiguousarray(x) if x.ndim else x for key, x in arrays.items()}, path)
    return path


def same_bits(a, b):
    """Two dicts of arrays have the same names, types, shapes and bits."""
    assert set(a) == set(b)
    for name in a:
        x, y = np.asarray(a[name]), np.asarray(b[name])
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name


@pytest.fixture
def vocab(tmp_path):
    """A vocab.txt that fits official.TINY."""
    return official.vocabulary(tmp_path / "words.txt")


@pytest.fixture
def converted(tmp_path, vocab):
    """A function: (family, its tensors) -> the workdir they were converted into."""

    def convert(family, arrays, name="", **how):
        out = tmp_path / (name or f"{family}-ours")
        write.convert(store(tmp_path, family, arrays), out, **{"vocab": vocab, **official.TINY_HEADS, **how})
        return out

    return convert
