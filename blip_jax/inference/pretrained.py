"""A model in two lines: `from_pretrained(path)` gives one that captions, matches, answers and describes in features."""

from __future__ import annotations

import os

import jax
from jax.sharding import Mesh

from blip_jax.inference import inputs
from blip_jax.inference.load import load
from blip_jax.inference.prompted import Prompted
from blip_jax.inference.verbs import Pretrained
from blip_jax.models.blip2_llm import Blip2Llm
from blip_jax.parallel import compiler, sharding


def from_pretrained(
    name_or_path, *, dtype: str | None = None, mesh: Mesh | None = None, vocab="", batch: int = 0
) -> Pretrained | Prompted:
    """A model with verbs.

    Args:
      name_or_path: a workdir of `blip-jax train` or `convert`, or one of its checkpoint folders; a PyTorch checkpoint,
        official or LAVIS's; a Hugging Face folder; or a name on the Hugging Face hub. Several with commas: a BLIP-2 and
        the parts that its file lacks, as "blip2_pretrained_opt2.7b.pth,eva_vit_g.pth,opt-2.7b".
      dtype: of the computation, "float32" | "bfloat16"; None: float32 on CPUs, bfloat16 elsewhere.
      mesh: of `sharding.make_mesh`, over which parameters and batches are spread; None: the first device alone.
      vocab: vocab.txt, tokenizer.json or spiece.model; "": the one that came with the checkpoint.
      batch: most images per pass, rounded down to a power of two; 0: 2 on CPUs, 64 elsewhere.
    Compiled programs are kept in $XDG_CACHE_HOME/blip_jax (~/.cache/blip_jax), unless jax_compilation_cache_dir is set.
    ValueError: what is wrong with the checkpoint, its vocabulary, the mesh or another argument.
    """
    if not isinstance(name_or_path, (str, os.PathLike)) or not str(name_or_path):
        raise ValueError(f"name_or_path is {inputs.shown(name_or_path)}: give a file, a folder or a name on the hub")
    vocab = "" if vocab is None else vocab
    if not isinstance(vocab, (str, os.PathLike)):
        raise ValueError(f"vocab is {inputs.shown(vocab)}: give the path of a vocab.txt or tokenizer.json")
    mesh = _mesh(mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if dtype is None or isinstance(dtype, str) and not dtype:
        dtype = "float32" if on_cpu else "bfloat16"
    if not isinstance(dtype, str) or dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {inputs.shown(dtype)}: choose float32 or bfloat16, or None")
    batch = inputs.whole(batch, "batch")
    if batch < 0:
        raise ValueError(f"batch is {batch}: it must be positive, or 0 for 2 on CPUs and 64 elsewhere")
    compiler.keep()
    loaded = load(name_or_path, mesh, dtype, vocab)
    kind = Prompted if isinstance(loaded.model, Blip2Llm) else Pretrained
    return kind(loaded, mesh, batch or (2 if on_cpu else 64), str(name_or_path))


def _mesh(mesh: Mesh | None) -> Mesh:
    """`mesh`, or one of the first device alone.

    ValueError: it has other axes than those of blip_jax/parallel/sharding.py.
    """
    if mesh is None:
        return sharding.mesh_of((1, 1, 1), jax.devices()[:1])
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh is {inputs.shown(mesh)}: give one of blip_jax.parallel.sharding.make_mesh, or None")
    if mesh.axis_names != sharding.MESH:
        raise ValueError(
            f"mesh has the axes {mesh.axis_names}: make it with "
            "blip_jax.parallel.sharding.make_mesh(config.base().mesh)"
        )
    return mesh
