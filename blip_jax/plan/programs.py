"""The programs of a config as the compiler would get them, from sizes alone.

No data, vocabulary, checkpoint or device is touched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from blip_jax import config, tasks, trees
from blip_jax.capfilt import settings
from blip_jax.inference import programs
from blip_jax.inference.batching import alone
from blip_jax.models import flops, initial
from blip_jax.models.layers import tpu
from blip_jax.models.layers.dense import rounds
from blip_jax.models.vision.vit import normalize_pixels
from blip_jax.parallel import sharding
from blip_jax.tasks.step import jit_arguments, make_step
from blip_jax.train import optim
from blip_jax.train import state as train_state

TRAINING = "train step"  # name of the one program that has gradients
PROMPT = 4  # positions of the paper's prompt "a picture of " with [DEC]


class Program(NamedTuple):
    """One jitted function of a workload with the shapes, dtypes and shardings of what it is called with."""

    name: str
    function: Callable
    args: tuple  # of ShapeDtypeStruct trees
    jit: dict  # what jax.jit is told beside: donate_argnums, out_shardings, compiler_options
    images: int  # of all devices together that one call handles
    flops: float  # of one call by the formulas of models.flops, all devices together
    # likewise what is done beyond them: again in the backward pass, by model.remat or attention's kernel for TPUs, and
    # by that kernel for positions that pad its lengths
    recomputed: float
    trips: int  # iterations of its token loop, 0: it has none
    parts: dict  # what its arguments are -> tree of ShapeDtypeStructs


def arguments(program: Program) -> dict[str, int]:
    """Bytes on one device of each of the program's `parts`, before the compiler pads them."""
    return {name: _local(tree) for name, tree in program.parts.items()}


def _local(tree) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def _placed(shapes, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def create(cfg, mesh) -> Program:
    """The creation of the state that `train` steps on, as a new run jits it."""
    model, (tx, _) = tasks.build(cfg), optim.make(cfg, 1)
    make = functools.partial(train_state.create, cfg, model, tx)
    key = jax.eval_shape(lambda: jax.random.key(cfg.seed))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, P()))
    shapes = jax.eval_shape(make, key)
    shardings = sharding.shardings_for(shapes, mesh)
    return Program(
        name="creation of the state",
        function=make,
        args=(key,),
        jit={"out_shardings": shardings},
        images=0,
        flops=0.0,
        recomputed=0.0,
        trips=0,
        parts={"state": _placed(shapes, shardings)},
    )


def train(cfg, mesh) -> list[Program]:
    """The train step of `cfg` on `mesh`, at text.max_len positions, its state donated, as `train.loop.fit` jits it."""
    epoch = max(1, (cfg.data.epoch_examples or cfg.train.batch) // cfg.train.batch)
    task = tasks.of(cfg)
    model, (tx, _) = task.build(cfg), optim.make(cfg, epoch)
    shapes = jax.eval_shape(lambda: train_state.create(cfg, model, tx, jax.random.key(cfg.seed)))
    shardings = sharding.shardings_for(shapes, mesh)
    state, batch = _placed(shapes, shardings), _batch(cfg, mesh)

    extra = state.extra or {"params": {}, "queue": None}
    parts = {
        "parameters": state.params,
        "frozen parameters": state.frozen,
        "optimiser": state.opt,
        "momentum copies": extra["params"],
        "queue": extra["queue"],
        "batch": batch,
    }
    return [
        Program(
            name=TRAINING,
            function=make_step(cfg, model, tx, epoch),
            args=(state, batch),
            jit=jit_arguments(shardings, mesh),
            images=cfg.train.batch,
            flops=task.flops(cfg)["step"] * cfg.train.batch,
            recomputed=recomputed(cfg, platform_of(mesh)) * cfg.train.batch,
            trips=0,
            parts=parts,
        )
    ]


def platform_of(mesh) -> str:
    """Of the devices of a mesh, which may be only described; "" where it has none."""
    device = mesh.abstract_mesh.abstract_device
    return device.platform if device else ""


def recomputed(cfg, platform: str = "") -> float:
    """FLOPs of an example beyond those that the formulas count: what the backward pass repeats by model.remat, and what
    the tower's attention does more where it is a kernel of the platform's.

    Of a ViT that is trained the blocks but for what no gradient needs, or scores; of BLIP-2, with "full", its text
    layers.
    """
    if "med" in cfg.model:
        momentum = bool(tasks.of(cfg).flops(cfg).get("momentum_vision"))
        return _repeated_tower(cfg, platform) + (1 + momentum) * _pictures(cfg) * beyond(cfg.model, platform)
    model = tasks.build(cfg)
    if not hasattr(model, "frozen"):  # a language model alone
        return 0.0
    texts = _repeated_texts(cfg) if cfg.model.remat == "full" else 0.0
    tower = 0.0 if model.frozen else _repeated_tower(cfg, platform)
    return texts + tower + _pictures(cfg) * beyond(cfg.model, platform)


def _plain_and_kernel(model, platform: str, dtype: str = "") -> tuple:
    """(forward, backward) FLOPs of attention in a block of the tower for one picture, of the plain products and as it
    is computed in `dtype`, "": the model's own; model: a `cfg.model`."""
    D, P = model.vit.width, flops.positions(model)
    plain = 4.0 * P**2 * D, 8.0 * P**2 * D
    return plain, tpu.flops(P, P, D) if platform == "tpu" and tpu.pays(P, P, dtype or model.dtype) else plain


def beyond(model, platform: str, dtype: str = "") -> float:
    """FLOPs of a picture's forward pass through the tower beyond the plain products; as `_plain_and_kernel`."""
    plain, ours = _plain_and_kernel(model, platform, dtype)
    return model.vit.depth * (ours[0] - plain[0])


def _pictures(cfg) -> int:
    """How many pictures an example has: sides, frames."""
    arrays = tasks.of(cfg).shapes(cfg).values()
    return sum(math.prod(shape[1:-3]) for shape, dtype in arrays if dtype == jnp.uint8)


def _repeated_texts(cfg) -> float:
    """Passes of BLIP-2's Q-Former and language model, of whose feed-forward what is only added is not repeated, nor
    what the language model has outside its layers."""
    parts, llm = tasks.of(cfg).flops(cfg), cfg.model.llm
    repeated = sum(parts.get(name, 0.0) for name in ("queries", "text", "match", "decoder", "llm"))
    if not len(llm):
        return repeated
    T, closing = cfg.text.max_len, 2 * llm.width * llm.mlp
    read = cfg.model.qformer.queries + T
    if llm.kind == "opt":
        return repeated - llm.layers * read * closing
    decoders = llm.get("decoder_layers", 0) or llm.layers
    encoded_kv = 2 * read * 2 * llm.width * llm.heads * llm.head_dim
    return repeated - (llm.layers * read + decoders * T) * closing - decoders * encoded_kv


def _repeated_tower(cfg, platform: str) -> float:
    v, positions = cfg.model.vit, flops.positions(cfg.model)
    plain, ours = _plain_and_kernel(cfg.model, platform)
    blocks = 2 * positions * (4 * v.width**2 + v.width * v.mlp) + ours[0]  # without fc2, whose result is only added
    again = {"none": 0.0, "dots": ours[0], "full": blocks}[cfg.model.remat]
    return _pictures(cfg) * v.depth * (again + ours[1] - plain[1])


def _batch(cfg, mesh) -> dict:
    place, A = sharding.batch_sharding(mesh, cfg.optim.accumulate), cfg.optim.accumulate

    def rows(B, *shape):
        return (A, B // A, *shape) if A > 1 else (B, *shape)

    return {
        name: jax.ShapeDtypeStruct(rows(*shape), dtype, sharding=place)
        for name, (shape, dtype) in tasks.of(cfg).shapes(cfg).items()
    }


def evaluate(cfg, mesh) -> list[Program]:
    """What `blip-jax evaluate` runs of `cfg` on `mesh`. A token loop is counted to its end, the most tokens of a text.

    ValueError: the objective does not say what that is.
    """
    task, unit = tasks.of(cfg), mesh.shape["data"] * mesh.shape["fsdp"]
    if not hasattr(task, "passes"):
        raise ValueError(
            f"workload evaluate: objective {cfg.objective} does not say what its evaluation runs (passes, "
            "blip_jax/tasks); plan its training, or the evaluation of another objective"
        )
    model, split = task.build(cfg), sharding.partition_spec(("act_batch",))
    params = _rounded(cfg, model, mesh)

    def lie(spec, part):
        place = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), part)

    def program(found) -> Program:
        batch = jax.tree.map(lie, found.specs or (split,) * len(found.rows), found.rows)
        first = jax.tree.leaves(batch)[0]
        images = next(n for n, axes in zip(first.shape, first.sharding.spec) if axes == sharding.AXES["act_batch"])
        more = found.pictures * beyond(cfg.model, platform_of(mesh)) if found.pictures else 0.0
        return Program(
            name=found.name,
            function=found.function,
            args=(params, *batch),
            # of several hosts each gets all results
            jit={} if found.stays else {"out_shardings": NamedSharding(mesh, P())},
            images=images,
            flops=images * found.flops,
            recomputed=images * more,
            trips=found.trips,
            parts={"parameters": params, "batch": batch},
        )

    return [program(found) for found in task.passes(cfg, model, unit)]


def capfilt(cfg, mesh, captioner, judge) -> list[Program]:
    """Captioner and filter of the CapFilt config `cfg`, as configs of their training.

    Each place on the data axis works alone. The token loop is counted to its end, method.max_length tokens.
    """
    method, place = settings.method_of(cfg), sharding.batch_sharding(mesh)
    size = cfg.device_batch * mesh.shape["data"] * mesh.shape["fsdp"]
    T, texts = judge.text.max_len, 1 + method.n
    models = {"captioner": captioner, "filter": judge}
    model = {name: _model(c, cfg.dtype) for name, c in models.items()}
    params = {name: _rounded(c, model[name], mesh) for name, c in models.items()}

    def rows(dtype, *shape):
        return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=place)

    def pixels(c):
        return rows(jnp.uint8, c.model.img_size, c.model.img_size, 3)

    # the captioner; which ids begin, end and fill a text does not change what is computed
    begin, end, pad = captioner.model.med.vocab_size - 2, captioner.model.med.vocab_size - 3, 0
    decode = programs.decoder(model["captioner"], [begin] + [1] * (PROMPT - 1), method, eos=end, pad=pad)

    def caption(params, img, keys):
        apply = functools.partial(model["captioner"].apply, {"params": params})
        return decode(params, apply(apply(normalize_pixels(img), method="encode_image"), method="image_kv"), keys)

    # the filter; what it sees of an image stays on the devices, split along the dimension that counts the images
    places = {name: programs.VIEW_ROWS[name] for name in ("kv", "img_emb")}
    view = alone(programs.view(model["filter"], *places), mesh, (0,), places)

    def split(dim, x):
        where = NamedSharding(mesh, P(*[None] * dim, sharding.AXES["act_batch"]))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    seen = {
        name: jax.tree.map(functools.partial(split, places[name]), part)
        for name, part in jax.eval_shape(view, params["filter"], pixels(judge)).items()
    }

    def program(name, function, who, batch, image_flops, trips=0, more=0.0):
        other = "filter" if who == "captioner" else "captioner"
        return Program(
            name=name,
            function=function,
            args=(params[who], *batch),
            jit={},
            images=size,
            flops=size * image_flops,
            recomputed=size * more,
            trips=trips,
            parts={"parameters": params[who], "other model's parameters": params[other], "batch": batch},
        )

    tokens = method.max_length - PROMPT
    width = method.n if method.kind == "nucleus" else method.beams
    project = 2 * judge.model.embed_dim * judge.model.vit.width
    look = flops.encode_image(judge.model) + flops.rerank_unit(judge.model, T, 0) + project
    return [
        program(
            "caption",
            alone(caption, mesh, (0, 0), 0),
            "captioner",
            (pixels(captioner), rows(jnp.uint32, 2)),
            flops.caption_image(captioner.model, PROMPT, tokens, width),
            trips=tokens - 1,
            more=beyond(captioner.model, platform_of(mesh), cfg.dtype),
        ),
        program(
            "view",
            view,
            "filter",
            (pixels(judge),),
            look,
            more=beyond(judge.model, platform_of(mesh), cfg.dtype),
        ),
        program(
            "score",
            alone(programs.score(model["filter"]), mesh, (places, 0, 0), 0),
            "filter",
            (seen, rows(jnp.int32, texts, T), rows(jnp.bool_, texts, T)),
            flops.filter_image(judge.model, T, texts) - look,
        ),
    ]


def _model(cfg, dtype: str):
    sizes = config.base().unlock()
    sizes.update({"objective": cfg.objective, "model": cfg.model})
    sizes.model.dtype = dtype or cfg.model.dtype
    return tasks.build(sizes)


def _rounded(cfg, model, mesh):
    """Shapes of a model's parameters as inference keeps them on the devices of `mesh` (`batching.placed`).

    Matrices are in the dtype of the computation.
    """
    shapes = jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(0)))
    places = dict(trees.paths(sharding.shardings_for(shapes, mesh)))
    return trees.nest(
        (path, jax.ShapeDtypeStruct(x.shape, model.dtype if rounds(path) else x.dtype, sharding=places[path]))
        for path, x in trees.paths(shapes)
    )
