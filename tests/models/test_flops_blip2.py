"""Analytic FLOPs of BLIP-2 against XLA's own count of the step, the traces of step and generation, and the paper's
size."""

import functools

import jax
import jax.numpy as jnp
import pytest

from blip_jax import config, tasks
from blip_jax.inference import language, programs
from blip_jax.models import flops, initial
from blip_jax.models.layers import stack
from blip_jax.tasks import blip2_stage1, step
from blip_jax.train import optim
from blip_jax.train import state as train_state

B, T, WIDTH = 32, 24, 512
LLMS = {"stage 1": "", "opt": "opt_tiny", "t5": "flant5_tiny"}


def sized(kind, layers=2, width=32, **more):
    """A config of narrow models of `layers` text layers, whose vocabularies have no padding."""
    c = config.blip2("eva_tiny", "tiny", LLMS[kind]).unlock()
    c.model.update(img_size=16, embed_dim=16, dtype="float32")
    c.model.vit.depth = 1  # a loop, which XLA counts once
    c.model.qformer.update(width=width, mlp=3 * width, layers=layers, vocab_size=128)
    if kind == "stage 1":
        c.task = blip2_stage1.leaves()
    else:
        c.model.llm.update(width=width, mlp=2 * width, layers=layers, heads=4, vocab_size=384)
        c.model.llm.update({"embed_width": width} if kind == "opt" else {"head_dim": width // 4})
    c.text.max_len, c.train.batch = T, B
    c.update_from_flattened_dict(more)
    return c


def traced_step(cfg):
    """The training step of a config, traced for its shapes."""
    task = tasks.of(cfg)
    model, (tx, _) = task.build(cfg), optim.make(cfg, 5)
    state = jax.eval_shape(functools.partial(train_state.create, cfg, model, tx), jax.random.key(0))
    batch = {name: jax.ShapeDtypeStruct(*x) for name, x in task.shapes(cfg).items()}
    return jax.jit(step.make_step(cfg, model, tx, 5)).trace(state, batch)


@pytest.mark.parametrize("kind", LLMS)
def test_a_layer_of_the_step_costs_what_xla_counts(kind):
    """Two depths, whose difference has nothing of tower, heads and similarities, nor of the gradient of the head's
    frozen matrix, which is traced though nobody asks for it. XLA counts additions, norms and the optimiser, too."""
    counts = []
    for layers in (2, 4):
        cfg = sized(kind, layers, WIDTH)
        traced = traced_step(cfg)
        xla = traced.lower().cost_analysis()["flops"]
        counts.append((tasks.of(cfg).flops(cfg)["step"] * B, flops.count_jaxpr(traced.jaxpr), xla))
    formula, counted, xla = (deep - shallow for shallow, deep in zip(*counts))
    assert formula == pytest.approx(counted, rel=1e-6)
    assert formula < xla < 1.05 * formula


@pytest.mark.parametrize("kind, method", [("stage 1", "nucleus"), ("opt", "beam"), ("t5", "nucleus")])
def test_a_generated_text_costs_what_its_program_does(kind, method):
    cfg = sized(kind, 4 if kind == "stage 1" else 2)
    model, n, prompt, tokens = tasks.build(cfg), 3, 5, 9
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct((2, *shape), dtype)
    params = jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(0)))
    img, keys = rows(jnp.uint8, 16, 16, 3), rows(jnp.uint32, 2)
    if kind == "stage 1":
        how = programs.Method(method, n=n, beams=n, max_length=prompt + tokens)
        decode = programs.decoder(model, [model.dec_id, *range(5, 4 + prompt)], how, eos=3, pad=0)

        def texts(params, img, keys):
            img_tok = programs.encode_pixels(model, params, img)
            return decode(params, model.apply({"params": params}, img_tok, method="image_kv"), keys)

        args = params, img, keys
    else:
        how = programs.Method(method, n=n, beams=n, max_length=1 + tokens)
        texts = language.generating(model, how, language.Ids(2, 1, 0))
        args = params, img, keys, rows(jnp.int32, prompt), rows(jnp.bool_, prompt)
    counted = flops.count_function(texts, *args, trips=tokens - 1) / 2
    assert counted == pytest.approx(flops.blip2_caption_image(cfg.model, prompt, tokens, n), rel=1e-3)


def test_the_first_stage_of_the_papers_size_costs_the_least_that_the_maths_needs():
    """701 GFLOP a pair with 32 positions, ViT-g frozen and keys and values of an image once."""
    cfg = config.blip2("eva_g").unlock()
    cfg.task, cfg.loss.group_size, cfg.train.batch = blip2_stage1.leaves(), 100, 200
    cfg.model.dtype = "float32"  # whose products on a CPU are those of an accelerator in bfloat16
    with stack.looped():  # as on accelerators
        counted = flops.count_jaxpr(traced_step(cfg).jaxpr) / cfg.train.batch
    assert counted <= 1.03 * 701e9
    assert counted == pytest.approx(blip2_stage1.flops(cfg)["step"], rel=1e-3)
