"""Which device writes what of a checkpoint, and that all of it comes back."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from blip_jax import checkpoint


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
