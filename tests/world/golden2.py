"""Golden cases of BLIP-2: sizes, inputs and outputs of a folder, and its weights as parameters of ours."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from blip_jax import config, trees
from blip_jax.convert.layouts import to_ours
from blip_jax.convert.rules import qformer as rules
from blip_jax.tasks import blip2_stage1
from world import towers
from world.golden import folder

ATOL = 1e-5  # losses and activations
GRAD_TOL = 1e-4  # gradients, of the largest entry


class Case:
    """One folder; weights: of another one."""

    def __init__(self, name: str, weights: str = ""):
        self.meta = json.loads((folder(f"blip2/{name}") / "meta.json").read_text())
        self.io = np.load(folder(f"blip2/{name}") / "io.npz")
        self.sizes, self.tokens = self.meta["config"], self.meta.get("tokens", {})
        self.tensors = load_file(folder(f"blip2/{weights or name}") / "weights.safetensors")
        s = self.sizes
        self.qformer = dict(
            width=s["tw"], layers=s["tl"], heads=s["th"], mlp=s["ti"], positions=s["pos"], vocab_size=s["vocab"]
        )

    @functools.cached_property
    def tower(self):
        """(kind, heads, parameters) of the image tower. The meta does not say CLIP's, whose heads are 64 wide."""
        kind = "clip" if "visual_encoder.class_embedding" in self.tensors else "eva"
        width = len(self.tensors["ln_vision.weight"])
        heads = self.sizes["vheads"] if kind == "eva" else width // 64
        return kind, heads, towers.parameters(kind, self.tensors, heads)

    def config(self, **leaves):
        """The config of this case's model and loss, without dropout; leaves: as of the command line."""
        s, (kind, heads, vit), c = self.sizes, self.tower, config.blip2("eva_tiny", "tiny").unlock()
        depth, width, mlp = vit["blocks"]["mlp"]["fc1"]["kernel"].shape
        c.model.vit.update(kind=kind, width=width, depth=depth, heads=heads, mlp=mlp, patch=s["patch"])
        c.model.qformer.update(self.qformer, queries=s["nq"])
        c.model.update(img_size=s["img"], embed_dim=s["embed"], dropout=0.0, dtype="float32")
        c.text.max_len, c.train.batch, c.task = s["L"], s["B"], blip2_stage1.leaves()
        c.update_from_flattened_dict(leaves)
        return c

    def batch(self, *index):
        """A batch of the task, of every row."""
        ids, mask = self.texts(*index)
        flat = lambda x: x.reshape(-1, *x.shape[ids.ndim - 1 :])
        batch = {"img": flat(self.images(*index)), "ids": flat(ids), "txt_mask": flat(mask)}
        if "image_id" in self.io:
            batch["image_id"] = jnp.asarray(self.io["image_id"][index], jnp.int32).reshape(-1)
        return batch

    def negatives(self, *index):
        """i32[2,B]: the image drawn for each text, the text drawn for each image."""
        return jnp.asarray([self.io[f"neg_{kind}_idx"][index].reshape(-1) for kind in ("image", "text")], jnp.int32)

    def texts(self, *index):
        """(ids i32[...,T], mask bool[...,T])"""
        return (
            jnp.asarray(self.io["input_ids"][index], jnp.int32),
            jnp.asarray(self.io["attention_mask"][index] > 0),
        )

    def images(self, *index):
        """Normalised pixels f32[...,S,S,3]"""
        return jnp.moveaxis(jnp.asarray(self.io["image"][index]), -3, -1)

    def params(self, table=rules.STAGE1) -> dict:
        """The weights that `table` names, and the tower's, as parameters of ours."""
        return jax.tree.map(jnp.asarray, trees.nest(self.ours(self.tensors, table).items()))

    def ours(self, tensors, table=rules.STAGE1) -> dict:
        """path -> array, of those of `tensors` (torch key -> array) that `table` names or that are the tower's."""
        out = {}
        for key, path, layout, _ in table:
            own = range(self.sizes["tl"])[:: 2 if "crossattention" in key else 1]
            keys = [key.format(i=i) for i in own] if "{i}" in key else [key]
            if keys[0] in tensors:
                found = [to_ours(tensors[k], layout, self.sizes["th"])[""] for k in keys]
                out[path.removeprefix("params/")] = np.stack(found) if "{i}" in key else found[0]
        if any(key.startswith("visual_encoder.") for key in tensors):
            kind, heads, _ = self.tower
            out |= {f"vit/{path}": x for path, x in trees.paths(towers.parameters(kind, tensors, heads))}
        return out


def given(answers, weights):
    """A `draw` that returns these negatives in order and records the sampling weights it was shown."""
    answers = list(answers)

    def draw(key, w, first_row):
        weights.append(w)
        return answers.pop(0)

    return draw


def close(ours, theirs, atol=ATOL, what=""):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=atol, err_msg=what)


def check_grads(ours: dict, theirs: dict):
    """Gradients path -> array against the original's. A key's bias shifts all scores of a query alike: its gradient is
    zero, what is stored is rounding noise."""
    assert theirs
    for path, want in theirs.items():
        largest = np.abs(want).max()
        if path.endswith("/k/bias"):
            assert largest < 1e-5 and np.abs(ours[path]).max() < 1e-5, path
        else:
            close(ours[path], want, GRAD_TOL * largest, path)
