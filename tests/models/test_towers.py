"""BLIP-2's image towers: parity with LAVIS's in float32 (goldens in tests/golden or $GOLDEN_DIR), sizes, bfloat16,
meshes, operations.

Every size comes from a case's meta.json or the shapes of its arrays.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from world.golden import folder
from world.towers import ln_vision, of_shapes, parameters, pixels, under_our_paths

from blip_jax import config, trees
from blip_jax.config.sizes import TOWER_SIZES, VIT_SIZES
from blip_jax.models import flops, initial
from blip_jax.models.build import fit
from blip_jax.models.layers.dense import rounded
from blip_jax.models.vision.towers import kind_of, tower
from blip_jax.models.vision.vit import Vit, resize_pos_embed
from blip_jax.parallel import sharding

ATOL = 2e-5
GRAD_TOL = 1e-4  # of the largest entry


# --- goldens ----------------------------------------------------------------------------------------------------------
def close(ours, theirs, atol=ATOL, what=""):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=atol, err_msg=what)


@pytest.mark.parametrize("kind, heads", [("eva", "vheads"), ("clip", "heads")])
def test_golden_tower(kind, heads):
    """Tokens after each block (of EVA), behind ln_vision, gradients, and a larger image with the table resized."""
    case = folder(f"blip2/vit_{kind}")
    meta, io = json.loads((case / "meta.json").read_text()), np.load(case / "io.npz")
    tensors, heads = load_file(case / "weights.safetensors"), meta["config"][heads]
    params = parameters(kind, tensors, heads)
    assert kind_of(params) == kind
    vit = of_shapes(kind, params, heads, io["image"].shape[-1])

    def loss(params, img):
        each = vit.apply({"params": params}, img, method="after_blocks")
        out = ln_vision(tensors, each[-1])
        return (out * io["cotangent"]).sum(), (each, out)

    (_, (each, out)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, pixels(io["image"]))
    close(out, io["out"])
    assert (kind == "eva") == ("block0" in io.files)
    for i in range(vit.depth if kind == "eva" else 0):
        close(each[i], io[f"block{i}"], what=f"block {i}")
    if "out_hf_eps" in io.files:
        close(ln_vision(tensors, each[-1], 1e-6), io["out_hf_eps"])

    grads, theirs = dict(trees.paths(grads)), {k[5:]: io[k] for k in io.files if k.startswith("grad/")}
    assert len(theirs) >= 7
    for name, x in theirs.items():  # of the whole tensor's: where q, k and v are one, the bias of k has no gradient
        largest = np.abs(x).max()
        assert largest > 0
        for path, layer, want in under_our_paths(kind, {name: x}, heads):
            close(grads[path] if layer is None else grads[path][layer], want, GRAD_TOL * largest, path)

    large = of_shapes(kind, params, heads, io["image_large"].shape[-1])
    shapes = jax.eval_shape(large.init, jax.random.key(0), pixels(io["image_large"]))["params"]
    fitted = fit({"vit": params}, {"vit": shapes}, "golden")
    assert fitted.resized == (len(params["pos_embed"]), len(shapes["pos_embed"]))
    close(fitted.params["vit"]["pos_embed"], io["pos_embed_large"].reshape(shapes["pos_embed"].shape), 1e-5)
    out = jax.jit(large.apply)({"params": fitted.params["vit"]}, pixels(io["image_large"]))
    close(ln_vision(tensors, out), io["out_large"])


def test_golden_position_tables():
    io = np.load(folder("blip2/pos_embed") / "io.npz")
    names = [name for name in io.files if name != "pos_embed"]
    assert {name.split("_")[0] for name in names} == {"eva", "clip"}
    for name in names:
        want = io[name].reshape(-1, io[name].shape[-1])
        close(resize_pos_embed(io["pos_embed"][0], len(want), name.startswith("clip")), want, 1e-5, name)


def test_golden_norm_epsilons():
    """Weights so small that another epsilon would show."""
    case = folder("blip2/norm_eps")
    meta, io = json.loads((case / "meta.json").read_text()), np.load(case / "io.npz")
    tensors, clip_heads = load_file(case / "weights.safetensors"), re.search(r"(\d+) heads", meta["what"])
    vit_heads = meta["config"]["vheads"]
    heads = {"eva": vit_heads, "clip": int(clip_heads[1]) if clip_heads else vit_heads}
    for kind, prefix, name in (("eva", "visual_encoder.", "vision"), ("clip", "clip_visual_encoder.", "clip_vision")):
        params = parameters(kind, tensors, heads[kind], prefix)
        vit = of_shapes(kind, params, heads[kind], io["image"].shape[-1])
        out = ln_vision(tensors, jax.jit(vit.apply)({"params": params}, pixels(io["image"])))
        close(out, io[name], ATOL * np.abs(io[name]).max(), name)


# --- sizes ------------------------------------------------------------------------------------------------------------
@functools.cache
def shapes_of(name, img_size):
    sizes = {**TOWER_SIZES, **VIT_SIZES}[name]
    vit = tower(sizes, img_size=img_size)
    return jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, img_size, img_size, 3)))["params"]


@pytest.mark.parametrize(
    "name, img_size, count",
    [("eva_g", 224, 985_894_528), ("eva_g", 364, 986_485_888), ("clip_l", 224, 290_581_504)],
)
def test_parameter_counts_of_the_published_towers(name, img_size, count):
    shapes = shapes_of(name, img_size)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count
    mesh = sharding.mesh_of((2, 2, 2), jax.devices()[:8])
    split = sharding.shardings_for({"vit": shapes}, mesh)["vit"]["blocks"]["attn"]["q"]["kernel"]
    assert split.spec == P(None, "fsdp", "tensor", None)
    drawn = jax.eval_shape(
        lambda key: initial.parameters({"vit": shapes}, key, std=0.02, pos_std=0.02), key=jax.random.key(0)
    )
    assert jax.tree.map(lambda x: x.shape, drawn) == jax.tree.map(lambda x: x.shape, {"vit": shapes})


def test_a_tower_is_chosen_by_its_kind():
    assert type(tower(VIT_SIZES["tiny"], img_size=16)) is Vit
    for name in ("tiny", "eva_tiny", "clip_tiny"):
        assert kind_of(shapes_of(name, 16)) == name.split("_")[0].replace("tiny", "vit")
    with pytest.raises(ValueError, match="kind is 'dino': choose one of vit, eva, clip"):
        tower(VIT_SIZES["tiny"] | {"kind": "dino"}, img_size=16)
    with pytest.raises(ValueError, match=r"\(24, 24, 3\) given to a Eva built for \(16, 16, 3\)"):
        tower(TOWER_SIZES["eva_tiny"], img_size=16).init(jax.random.key(0), jnp.zeros((1, 24, 24, 3)))
    eva = {"vit": jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes_of("eva_tiny", 16))}
    other = tower(TOWER_SIZES["eva_tiny"] | {"kind": "clip"}, img_size=24)
    shapes = jax.eval_shape(other.init, jax.random.key(0), jnp.zeros((1, 24, 24, 3)))["params"]
    with pytest.raises(ValueError, match=r"vit/blocks/attn/k/bias is missing\s+vit/ln_pre/bias is missing"):
        fit(eva, {"vit": shapes}, "an EVA tower")


# --- what is computed -------------------------------------------------------------------------------------------------
@functools.cache
def tiny(kind):
    """(sizes, parameters, images) of a tower of 16 pixels."""
    sizes = TOWER_SIZES[f"{kind}_tiny"]
    params = initial.parameters({"vit": shapes_of(f"{kind}_tiny", 16)}, jax.random.key(0), std=0.02, pos_std=0.02)
    img = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 16, 3)), jnp.float32)
    return sizes, initial.magnified(params, 5.0), img


@functools.cache
def plain(kind):
    sizes, params, img = tiny(kind)
    return jax.jit(tower(sizes, img_size=16).apply)({"params": params["vit"]}, img)


@pytest.mark.parametrize("kind", ["eva", "clip"])
def test_a_mesh_changes_nothing(kind):
    sizes, params, img = tiny(kind)
    mesh = sharding.mesh_of((2, 2, 2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, sharding.shardings_for(params, mesh))
        split = jax.device_put(img, sharding.batch_sharding(mesh))
        out = jax.jit(tower(sizes, img_size=16).apply)({"params": spread["vit"]}, split)
    close(out, plain(kind), 1e-5)


@pytest.mark.parametrize("kind", ["eva", "clip"])
def test_bfloat16_is_near_and_rounding_beforehand_changes_nothing(kind):
    sizes, params, img = tiny(kind)
    vit, want = tower(sizes, img_size=16, dtype=jnp.bfloat16), plain(kind)
    run = jax.jit(lambda p, img: vit.apply({"params": p["vit"]}, img))
    out, once = run(params, img), run(rounded(params, jnp.bfloat16), img)
    assert out.dtype == jnp.bfloat16
    assert np.abs(np.asarray(out, np.float32) - want).max() < 0.05 * np.abs(want).max()
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(once, np.float32))


@pytest.mark.parametrize("kind", ["eva", "clip"])
def test_operations_counted_are_those_of_the_program(kind):
    cfg = config.blip2(f"{kind}_tiny", "tiny")
    with cfg.unlocked():
        cfg.model.img_size = 16
    sizes, params, img = tiny(kind)
    vit = tower(cfg.model.vit, img_size=16)
    counted = flops.count_function(lambda img: vit.apply({"params": params["vit"]}, img), img[:1])
    assert flops.vision(cfg.model)[0] == flops.encode_image(cfg.model) == counted
