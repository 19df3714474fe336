"""BLIP-2's second stage against LAVIS, in float32, from pixels to loss, gradients and texts: OPT, T5, InstructBLIP's
wiring with T5. Every size comes from a case's meta.json."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from world.golden2 import GRAD_TOL, Case, close

from blip_jax import config, trees
from blip_jax.convert import apply
from blip_jax.decode import limits
from blip_jax.inference import language
from blip_jax.inference.programs import Method
from blip_jax.models.blip2_llm import Blip2Llm
from blip_jax.tasks import blip2_stage2, blip2_vqa, step

FAMILY = {"stage2_opt": "blip2_opt", "stage2_opt_full": "blip2_opt", "instruct_t5": "instruct_t5"}
# the decoding of cases that do not record it (reference: additions, section A)
DECODE = {
    "stage2_opt": {
        "greedy": dict(num_beams=1, max_length=12, length_penalty=1.0),
        "beam5": dict(num_beams=5, max_length=12, length_penalty=1.0),
        "beam3_lp2": dict(num_beams=3, max_length=10, length_penalty=2.0),
    },
    "stage2_t5": {
        "greedy": dict(num_beams=1, max_new_tokens=12, length_penalty=1.0),
        "beam5": dict(num_beams=5, max_new_tokens=12, length_penalty=1.0),
        "beam5_lpm1": dict(num_beams=5, max_new_tokens=10, length_penalty=-1.0),
    },
    "instruct_t5": {},
}
CASES = ("stage2_opt", "stage2_opt_full", "stage2_t5", "stage2_t5_full", "instruct_t5")


class LlmCase(Case):
    """A case with a language model, whose sizes `meta` has under transformers' names."""

    def __init__(self, name):
        super().__init__(name)
        self.name, self.family = name, FAMILY.get(name, "blip2_t5")
        self.t5 = self.family != "blip2_opt"
        llm = self.meta["llm"]
        self.llm = (
            dict(
                kind="t5",
                width=llm["d_model"],
                layers=llm["num_layers"],
                decoder_layers=llm["num_decoder_layers"],
                heads=llm["num_heads"],
                head_dim=llm["d_kv"],
                mlp=llm["d_ff"],
                vocab_size=llm["vocab_size"],
                buckets=llm["relative_attention_num_buckets"],
                max_distance=llm["relative_attention_max_distance"],
            )
            if self.t5
            else dict(
                kind="opt",
                width=llm["hidden_size"],
                layers=llm["num_hidden_layers"],
                heads=llm["num_attention_heads"],
                mlp=llm["ffn_dim"],
                positions=llm["max_position_embeddings"],
                vocab_size=llm["vocab_size"],
                embed_width=llm["word_embed_proj_dim"],
                pre_norm=llm["do_layer_norm_before"],
            )
        )
        s = self.sizes
        self.heads = {"vit": self.tower[1], "qformer": s["th"], "llm": self.llm["heads"]}
        self.params = jax.tree.map(jnp.asarray, self.converted(self.tensors))
        self.special = language.Ids(0, 1, 0) if self.t5 else language.Ids(2, int(self.io["eos_token_id"]), 1)

    def converted(self, tensors):
        return apply.from_torch(self.family, tensors, self.heads)["params"]

    def config(self, **leaves):
        c = super().config(**leaves)
        c.objective = "blip2_stage2"
        c.model.llm = config.blip2("eva_tiny", "tiny", "opt_tiny").model.llm.copy_and_resolve_references().unlock()
        c.model.llm = self.llm
        c.model.llm_dropout, c.task = 0.0, {}
        c.optim.freeze = ("vit/.*", "llm/.*")
        return c

    @functools.cached_property
    def model(self):
        return Blip2Llm.from_config(self.config().model, questions=self.family == "instruct_t5", frozen=True)

    def ids(self, name, mask=None):
        ids = jnp.asarray(self.io[name], jnp.int32)
        return ids, jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(self.io[mask] > 0)

    def llm_batch(self):
        """A batch of the task, and the question of InstructBLIP."""
        if self.t5:
            (ids, mask), (out, out_mask) = self.ids("input_ids", "input_mask"), self.ids("output_ids", "output_mask")
            batch = {"ids": ids, "txt_mask": mask, "out_ids": out, "out_mask": out_mask}
        else:
            ids, mask = self.ids("input_ids", "attention_mask")
            scored = mask & (jnp.arange(ids.shape[1]) >= int(self.io["prompt_length"]))
            batch = {"ids": ids, "txt_mask": mask, "lm_mask": scored}
        question = {}
        if self.family == "instruct_t5":
            question = dict(zip(("question", "question_mask"), self.ids("qformer_ids", "qformer_mask")))
        return batch | question | {"img": self.images()}

    def decoding(self):
        """name -> (Method, prompt ids, mask)"""
        out = {}
        if self.name == "instruct_t5":
            answer = self.meta["decode"]
            return {"answer": (self.method(answer), *self.ids("answer_prompt_ids", "answer_prompt_mask"))}
        for name, settings in DECODE.get(self.name, self.meta.get("decode", {})).items():
            if name.startswith("vqa"):
                prompt = self.ids("vqa_prompt_ids", "vqa_prompt_mask")
            elif "cap_prompt_ids" in self.io:
                alone = self.io["cap_prompt_ids"][-1:] if name == "cap_beam5_empty" else self.io["cap_prompt_ids"]
                ids = jnp.tile(jnp.asarray(alone, jnp.int32), (self.sizes["B"], 1))
                prompt = ids, jnp.ones(ids.shape, bool)
            elif self.t5:
                prompt = self.ids("input_ids", "input_mask")
            else:
                ids = jnp.tile(jnp.array([2, 21, 22]), (self.sizes["B"], 1))
                prompt = ids, jnp.ones(ids.shape, bool)
            out[name] = self.method(settings), *prompt
        return out

    def method(self, settings):
        counted = "max_length" in settings
        most = settings["max_length"] if counted else settings["max_new_tokens"]
        length = limits.of_lavis(settings.get("min_length", 0), most, start_in_max=counted)
        beams, penalty = settings["num_beams"], settings.get("repetition_penalty", 1.0)
        if beams > 1:
            how = dict(kind="beam", beams=beams, length_penalty=float(settings["length_penalty"]), rule="lavis")
        else:
            how = dict(kind="nucleus", top_k=1)
        return Method(**how, repetition_penalty=penalty, **limits.lengths(1, **length))


@functools.cache
def case_of(name):
    return LlmCase(name)


def loss_of(case, params, batch):
    keys = step.Keys(jax.random.key(1), jax.random.key(2), 0)
    task = blip2_vqa if "question" in batch else blip2_stage2
    return task.loss(case.model, case.config(), params, None, batch, keys)[0]


@pytest.mark.parametrize("name", CASES)
def test_golden_loss_and_gradients(name):
    case = case_of(name)
    trained, frozen = trees.split(case.params, ("vit/.*", "llm/.*"))
    loss, grads = jax.jit(
        jax.value_and_grad(lambda trained, batch: loss_of(case, trees.merge(trained, frozen), batch))
    )(trained, case.llm_batch())
    close(loss, case.io["loss"], max(1e-5, 3e-6 * abs(float(case.io["loss"]))))

    # the originals' gradients under our names: of all tensors that have one, 1 where they do
    theirs = {key[5:]: case.io[key] for key in case.io.files if key.startswith("grad/")}
    filled = lambda fill: {
        key: fill(key, x) for key, x in case.tensors.items() if not key.startswith("visual_encoder.")
    }
    want = case.converted(filled(lambda key, x: theirs.get(key, np.zeros_like(x))))
    there = case.converted(filled(lambda key, x: np.full_like(x, key in theirs)))
    want, there, grads = dict(trees.paths(want)), dict(trees.paths(there)), dict(trees.paths(grads))
    compared = 0
    for path, grad in grads.items():
        largest = np.abs(want[path]).max()
        if not there[path].any():
            continue
        compared += 1
        if path.endswith("/k/bias"):  # zero in exact arithmetic
            assert largest < 1e-5 and np.abs(grad).max() < 1e-5, path
        else:
            close(grad * there[path], want[path], GRAD_TOL * largest, path)
    assert compared == len(grads) or "full" not in name and compared >= len(theirs)


@pytest.mark.parametrize("name", CASES)
def test_golden_texts(name):
    case = case_of(name)
    pixels = functools.partial(case.model.apply, {"params": case.params})
    soft = jax.jit(lambda img, *question: pixels(pixels(img, method="encode_image"), *question, method="soft_prompt"))
    question = case.ids("qformer_ids", "qformer_mask") if case.family == "instruct_t5" else ()
    found = soft(case.images(), *question)
    if "soft_prompt" in case.io:
        close(found, case.io["soft_prompt"], 1e-5 * max(1, np.abs(case.io["soft_prompt"]).max()))
    for key, (method, ids, mask) in case.decoding().items():
        told = texts(case, method, ids, mask, found)
        same_texts(told["ids"][:, 0], case.io[key], case, key)


def texts(case, method, ids, mask, soft):
    """`language.behind` soft prompts that are there already; settings that are numbers alone share a program."""
    numbers = jnp.float32(method.length_penalty), jnp.int32(method.min_length)
    return behind(case, method._replace(length_penalty=0.0, min_length=0), numbers, soft, ids, mask)


@functools.partial(jax.jit, static_argnums=(0, 1))
def behind(case, method, numbers, soft, ids, mask):
    apply = functools.partial(case.model.apply, {"params": case.params})
    method = method._replace(length_penalty=numbers[0], min_length=numbers[1])
    return language.behind(apply, soft, ids, mask, jnp.zeros((len(ids), 2), jnp.uint32), method, case.special)


def same_texts(ours, theirs, case, what):
    ours = np.asarray(ours)
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs, err_msg=what)
    assert (ours[:, theirs.shape[1] :] == case.special.pad).all(), what
