"""What attention that writes no scores is worth on a TPU that is not here: `python benchmarks/towers.py --size=base
--img_size=224,384,480 --batch=64,16,8`.

The gradient of one vision tower, in bfloat16, compiled for one chip (pip install -e ".[tpu]") with plain attention and
with that of `models/layers/tpu.py`: temporaries, memory traffic as `blip-jax plan` counts it, FLOPs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

COLUMNS = ("px", "positions", "batch", "attention", "temporaries GiB", "traffic GB", "TFLOP", "processor s")


def main(argv: list[str]) -> int:
    """The command line: prints a row when its program is compiled, the table as Markdown."""
    made = argparse.ArgumentParser(prog="python benchmarks/towers.py")
    made.add_argument("--topology", default="v5e:2x2", help="whose chip it is")
    made.add_argument("--size", default="base", help="tiny, base, large")
    made.add_argument("--img_size", type=numbers, default=[384], help="pixels; several with commas")
    made.add_argument("--batch", type=numbers, default=[16], help="pictures, for each --img_size")
    made.add_argument("--remat", default="none", help="none, dots, full")
    made.add_argument("--exact", action="store_true", help="the compiler's usual level, not -O0, as of blip-jax plan")
    args = made.parse_args(argv)
    if len(args.batch) != len(args.img_size):
        made.error(f"--batch has {len(args.batch)} numbers, --img_size {len(args.img_size)}: give one for each")

    from blip_jax.plan import aot

    os.environ |= aot.environment_of_compiler() | {"XLA_FLAGS": ""}  # before jax is imported
    if not args.exact:
        os.environ["JAX_OPTIMIZATION_LEVEL"] = "O0"
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for px, batch in zip(args.img_size, args.batch):
        for attention in ("plain", "splash"):
            cells = compiled(args, px, batch, attention)
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return 0


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def compiled(args: argparse.Namespace, px: int, batch: int, attention: str) -> tuple:
    """The cells of a row."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from blip_jax import config
    from blip_jax.models import flops
    from blip_jax.models.layers import tpu
    from blip_jax.models.vision.vit import Vit
    from blip_jax.parallel import sharding
    from blip_jax.plan import aot, chips, hlo

    tpu.LEAST = 1 if attention == "splash" else sys.maxsize
    topology = chips.topology(args.topology)
    device = aot.mesh_of(topology, (topology.devices, 1, 1)).devices.flat[0]
    mesh = sharding.mesh_of((1, 1, 1), [device])
    v = config.base(args.size).model.vit
    vit = Vit(v.width, v.depth, v.heads, v.mlp, v.patch, px, remat=args.remat, dtype=jnp.bfloat16)

    def loss(params, img):
        return jnp.sum(jnp.square(vit.apply({"params": params}, img).astype(jnp.float32)))

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    img = shape(jax.ShapeDtypeStruct((batch, px, px, 3), jnp.float32))
    params = jax.tree.map(shape, jax.eval_shape(lambda img: vit.init(jax.random.key(0), img)["params"], img))
    begun = time.process_time()
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss)).trace(params, img)
        done = traced.lower().compile()
    return (
        px,
        (px // v.patch) ** 2 + 1,
        batch,
        attention,
        f"{aot.temporaries(done.memory_analysis()) / 2**30:.2f}",
        f"{hlo.traffic(done.as_text()) / 1e9:.1f}",
        f"{flops.count_jaxpr(traced.jaxpr) / 1e12:.3f}",
        f"{time.process_time() - begun:.0f}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
