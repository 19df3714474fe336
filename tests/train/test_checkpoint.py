"""Which device writes what of a checkpoint, and that all of it comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from blip_jax import checkpoint, from_pretrained
from blip_jax.convert import read as source
from blip_jax.train import loop


def test_devices_share_the_writing_of_large_arrays_alone(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    state = {
        "kernel": jax.device_put(jnp.arange(2.0**16).reshape(64, 1024), whole),
        "bias": jax.device_put(jnp.arange(1024.0), whole),
        "moment": jax.device_put(jnp.arange(64.0).reshape(16, 4), split),
        "rng": jax.device_put(jax.random.key(7), whole),
        "none": None,
    }
    with checkpoint.open_dir(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 3, state, {"step": 3}, {})
    with checkpoint.open_dir(tmp_path, keep=1) as manager:
        written = {
            name: x.storage.write_shape for name, x in manager.item_metadata(3)["state"].tree.items() if x is not None
        }
        shapes = jax.eval_shape(lambda: state)
        back, data = checkpoint.restore(manager, 3, shapes, jax.tree.map(lambda x: x.sharding, state))
    assert written == {"kernel": (8, 1024), "bias": (1024,), "moment": (2, 4), "rng": (2,)}
    assert data == {"step": 3} and back.keys() == state.keys() and back["none"] is None
    assert jax.random.key_impl(back["rng"]) == jax.random.key_impl(state["rng"])
    assert jax.random.bits(back["rng"]) == jax.random.bits(state["rng"])
    for name in ("kernel", "bias", "moment"):
        np.testing.assert_array_equal(back[name], state[name])
        assert back[name].sharding == state[name].sharding


def test_unstacked_text_layers_are_refused_wherever_a_checkpoint_is_read(tmp_path, tiny_cfg):
    """In one line that says how to convert or start anew."""
    kernel = np.zeros((2, 2), np.float32)
    old = {"params": {"med": {"layer_00": {"mlp": {"fc1": {"kernel": kernel}}}}}, "frozen": {}, "momentum": None}
    checkpoint.write(tmp_path, old, {"step": 0}, {"objective": "pretrain"})
    tiny_cfg.train.init_from = str(tmp_path)
    readers = {
        "resume": lambda: loop.fit(tiny_cfg, tmp_path),
        "init_from": lambda: loop.fit(tiny_cfg, tmp_path / "new"),
        "evaluate": lambda: checkpoint.load_params(tmp_path / "checkpoints" / "0"),
        "momentum": lambda: checkpoint.load_extra(tmp_path),
        "capfilt": lambda: checkpoint.load_config(tmp_path),
        "from_pretrained": lambda: from_pretrained(tmp_path),
        "convert": lambda: source.read(tmp_path),
    }
    for name, read in readers.items():
        with pytest.raises(ValueError, match="earlier version of blip_jax.*blip-jax convert.*or start anew") as refused:
            read()
        assert "\n" not in str(refused.value), name
