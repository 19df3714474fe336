"""The programs of a config as the compiler would get them, from sizes alone: no data, vocabulary, checkpoint or
device is touched."""

from __future__ import annotations

import functools
import math
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from blip_jax import config, tasks, trees
from blip_jax.capfilt import settings
from blip_jax.inference import programs
from blip_jax.inference.batching import alone
from blip_jax.models import flops, initial
from blip_jax.models.layers.dense import rounds
from blip_jax.models.vision.vit import normalize_pixels
from blip_jax.parallel import sharding
from blip_jax.tasks import step as steps
from blip_jax.train import optim
from blip_jax.train import state as train_state

PROMPT = 4  # positions of the paper's prompt "a picture of " with [DEC]


class Program(NamedTuple):
    """One jitted function of a workload with the shapes, dtypes and shardings of what it is called with."""

    name: str
    function: Callable
    args: tuple  # of ShapeDtypeStruct trees
    jit: dict  # what jax.jit is told beside: donate_argnums, out_shardings, compiler_options
    images: int  # of all devices together that one call handles
    flops: float  # of one call by the formulas of bench.flops, all devices together
    recomputed: float  # what model.remat makes the backward pass do again, likewise
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
        "creation of the state",
        make,
        (key,),
        {"out_shardings": shardings},
        0,
        0.0,
        0.0,
        0,
        {"state": _placed(shapes, shardings)},
    )


def train(cfg, mesh) -> list[Program]:
    """The train step of `cfg` on `mesh`, at text.max_len positions, its state donated, as `train.fit` jits it."""
    epoch = max(1, (cfg.data.epoch_examples or cfg.train.batch) // cfg.train.batch)
    task = tasks.of(cfg)
    model, (tx, _) = task.build(cfg), optim.make(cfg, epoch)
    shapes = jax.eval_shape(lambda: train_state.create(cfg, model, tx, jax.random.key(cfg.seed)))
    shardings = sharding.shardings_for(shapes, mesh)
    state, batch = _placed(shapes, shardings), _batch(cfg, mesh)
    extra = state.extra or {"params": {}, "queue": None}
    parts = {
        "parameters": (state.params, state.frozen),
        "optimiser": state.opt,
        "momentum copies": extra["params"],
        "queue": extra["queue"],
        "batch": batch,
    }
    step = steps.make_step(cfg, model, tx, epoch)
    return [
        Program(
            "train step",
            step,
            (state, batch),
            steps.jit_arguments(shardings, mesh),
            cfg.train.batch,
            task.flops(cfg)["step"] * cfg.train.batch,
            recomputed(cfg) * cfg.train.batch,
            0,
            parts,
        )
    ]


def recomputed(cfg) -> float:
    """FLOPs of an image that the backward pass repeats by model.remat: the ViT's blocks but for what no gradient
    needs, or scores."""
    v, positions = cfg.model.vit, (cfg.model.img_size // cfg.model.vit.patch) ** 2 + 1
    scores, mixing = 2 * positions**2 * v.width, 4 * positions**2 * v.width
    blocks = 2 * positions * (4 * v.width**2 + v.width * v.mlp) + mixing  # without fc2, whose result is only added
    return v.depth * {"none": 0.0, "dots": scores, "full": blocks}[cfg.model.remat]


def _batch(cfg, mesh) -> dict:
    place, A = sharding.batch_sharding(mesh, cfg.optim.accumulate), cfg.optim.accumulate

    def rows(B, *shape):
        return (A, B // A, *shape) if A > 1 else (B, *shape)

    return {
        name: jax.ShapeDtypeStruct(rows(*shape), dtype, sharding=place)
        for name, (shape, dtype) in tasks.of(cfg).shapes(cfg).items()
    }


def evaluate(cfg, mesh) -> list[Program]:
    """Retrieval of `cfg` on `mesh`: the pass over images, the one over texts, and the one that re-ranks."""
    model, rows = tasks.build(cfg), mesh.shape["data"] * mesh.shape["fsdp"]
    if not getattr(model, "encoder", False):
        raise ValueError(
            f"workload evaluate: retrieval needs a model with BLIP's text encoder, and objective is {cfg.objective}; plan its "
            "training, or give a config of objective pretrain or retrieval"
        )
    B, G, T, S = -(-cfg.eval.batch // rows) * rows, cfg.eval.rerank_texts, cfg.text.max_len, cfg.model.img_size
    shapes = jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(0)))
    params, place = _placed(shapes, sharding.shardings_for(shapes, mesh)), sharding.batch_sharding(mesh)
    array = lambda shape, dtype: jax.ShapeDtypeStruct((B, *shape), dtype, sharding=place)
    positions = (S // cfg.model.vit.patch) ** 2 + 1
    # where the mesh reaches over several hosts, each gets all results
    whole = {"out_shardings": NamedSharding(mesh, P())}
    img, ids, txt = array((S, S, 3), jnp.uint8), array((G, T), jnp.int32), array((G, T), jnp.bool_)
    tok = array((positions, cfg.model.vit.width), jnp.dtype(cfg.model.dtype))
    one, real = array((T,), jnp.int32), array((T,), jnp.bool_)
    make = lambda name, f, x, n: Program(
        name, f, (params, *x), whole, B, n * B, 0.0, 0, {"parameters": params, "batch": x}
    )
    project = 2 * cfg.model.embed_dim * cfg.model.vit.width
    both = flops.filter_image(cfg.model, T, 1) - flops.filter_image(cfg.model, T, 1, itc=False)
    return [
        make(
            "encode images", programs.view(model, "img_tok", "img_emb"), (img,), flops.encode_image(cfg.model) + project
        ),
        make("encode texts", programs.embed(model), (one, real), both - project - 2 * cfg.model.embed_dim),
        make("re-rank", programs.rerank(model), (tok, ids, txt), flops.rerank_unit(cfg.model, T, G)),
    ]


def capfilt(cfg, mesh, captioner, judge) -> list[Program]:
    """Captioner and filter of the CapFilt config `cfg`, as configs of their training; each place on the data axis works
    alone.

    The token loop is counted to its end, method.max_length tokens.
    """
    method, place = settings.method_of(cfg), sharding.batch_sharding(mesh)
    size, T, texts = cfg.device_batch * mesh.shape["data"] * mesh.shape["fsdp"], judge.text.max_len, 1 + method.n
    rows = lambda shape, dtype: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=place)
    models = {"captioner": captioner, "filter": judge}
    params = {name: _rounded(c, mesh, cfg.dtype) for name, c in models.items()}
    model = {name: _model(c, cfg.dtype) for name, c in models.items()}
    pixels = lambda c: rows((c.model.img_size, c.model.img_size, 3), jnp.uint8)
    end, pad = captioner.model.med.vocab_size - 3, 0  # ids do not change what is computed
    decode = programs.decoder(
        model["captioner"], [captioner.model.med.vocab_size - 2] + [1] * (PROMPT - 1), method, eos=end, pad=pad
    )

    def make(params, img, keys):
        apply = functools.partial(model["captioner"].apply, {"params": params})
        return decode(params, apply(apply(normalize_pixels(img), method="encode_image"), method="image_kv"), keys)

    places = {name: programs.VIEW_ROWS[name] for name in ("kv", "img_emb")}
    view = alone(programs.view(model["filter"], *places), mesh, (0,), places)
    behind = lambda dim: NamedSharding(mesh, P(*[None] * dim, sharding.AXES["act_batch"]))
    seen = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=behind(places[name])), part)
        for name, part in jax.eval_shape(view, params["filter"], pixels(judge)).items()
    }
    tokens = method.max_length - PROMPT
    own = lambda name, x: {
        "parameters": params[name],
        "other model's parameters": params["filter" if name == "captioner" else "captioner"],
        "batch": x,
    }
    captioned, viewed = (pixels(captioner), rows((2,), jnp.uint32)), (pixels(judge),)
    scored = (seen, rows((texts, T), jnp.int32), rows((texts, T), jnp.bool_))
    look = (
        flops.encode_image(judge.model)
        + flops.rerank_unit(judge.model, T, 0)
        + 2 * judge.model.embed_dim * judge.model.vit.width
    )
    width = method.n if method.kind == "nucleus" else method.beams
    return [
        Program(
            "caption",
            alone(make, mesh, (0, 0), 0),
            (params["captioner"], *captioned),
            {},
            size,
            size * flops.caption_image(captioner.model, PROMPT, tokens, width),
            0.0,
            tokens - 1,
            own("captioner", captioned),
        ),
        Program("view", view, (params["filter"], *viewed), {}, size, size * look, 0.0, 0, own("filter", viewed)),
        Program(
            "score",
            alone(programs.score(model["filter"]), mesh, (places, 0, 0), 0),
            (params["filter"], *scored),
            {},
            size,
            size * (flops.filter_image(judge.model, T, texts) - look),
            0.0,
            0,
            own("filter", scored),
        ),
    ]


def _model(cfg, dtype: str):
    sizes = config.base().unlock()
    sizes.update({"objective": cfg.objective, "model": cfg.model})
    sizes.model.dtype = dtype or cfg.model.dtype
    return tasks.build(sizes)


def _rounded(cfg, mesh, dtype: str):
    """Shapes of a model's parameters as CapFilt keeps them on the devices of `mesh`, matrices in the dtype of the
    computation."""
    model = _model(cfg, dtype)
    shapes = jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(0)))
    places = dict(trees.paths(sharding.shardings_for(shapes, mesh)))
    return trees.nest(
        (path, jax.ShapeDtypeStruct(x.shape, model.dtype if rounds(path) else x.dtype, sharding=places[path]))
        for path, x in trees.paths(shapes)
    )
