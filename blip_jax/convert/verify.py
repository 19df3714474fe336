"""What was written, read again and compared.

Every tensor bit by bit, and the outputs of both models where transformers is there.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import re
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax import trees
from blip_jax.convert import apply, hf, hf_config, torch_io
from blip_jax.convert.read import heads_of, narrow, read
from blip_jax.convert.recognise import find_family, plain_names
from blip_jax.convert.rules.families import INITIAL
from blip_jax.convert.source import PADDED, Source, official, vocab_sizes
from blip_jax.tasks import build

PEERS = {
    "pretrain": ("caption", "itm"),
    "retrieval": ("itm",),
    "itm": ("itm",),
    "caption": ("caption",),
    "vqa": ("vqa",),
}
FIRST_ID = 2  # transformers leaves the first id as it is, and so have both models here
TOLERANCE = 1e-3  # of the largest output (or of 1): float32 sums in another order differ by 1e-5 or so


def verify(source: Source, written: pathlib.Path, to: str, origin: pathlib.Path) -> None:
    """Compares `written` with the `source` it was made of and with the file `origin`, and says so.

    to: which of `write.FORMATS` it has.

    ValueError: a tensor is missing, added or changed, or the outputs of transformers' model differ by more than
    TOLERANCE.
    """
    again = read(
        written,
        vocab=f"{source.vocab or ''},{source.questions}" if source.questions else str(source.vocab or ""),
        heads={} if to == "ours" else heads_of(source.cfg),
    )
    expected = source if again.family == source.family else narrow(source, again.family, str(origin))
    left = tuple(f"params/{part}/" for part in source.frozen if to == "official")
    _same(
        {path: x for path, x in trees.paths(expected.state) if not path.startswith(left)},
        dict(trees.paths(again.state)),
        f"what was written ({to})",
        ignore=() if to == "ours" else ("params/temp",) * (again.family in ("itm", "features")),
        entries={} if to == "ours" else vocab_sizes(source.cfg),
    )
    _against_file(source, again, origin)
    _against_peer(source)


def _held(path: str, x, entries: Mapping[str, int]):
    """An array without the padding of a vocabulary, which only ours have. entries: of `vocab_sizes`."""
    if not re.search(PADDED, path) or apply.part(path) not in entries:
        return x
    x, n = np.asarray(x), entries[apply.part(path)]
    return x[..., :n] if path.endswith("kernel") else x[:n]


def _same(want: dict, got: dict, what: str, ignore: tuple = (), entries: Mapping[str, int] = MappingProxyType({})):
    """Says that two sets of arrays are equal in every bit, but for the padding of vocabularies of so many `entries`.
    ValueError: those that are not, or only in one of them."""
    names = (want.keys() | got.keys()) - set(ignore)
    held = functools.partial(_held, entries=entries)
    changed = [
        name
        for name in sorted(names)
        if name not in want or name not in got or not _equal(held(name, want[name]), held(name, got[name]))
    ]
    if changed:
        raise ValueError(
            f"{what} differs from its origin in {len(changed)} of {len(names)} tensors: "
            f"{', '.join(apply.folded(changed))}"
        )
    print(f"  verified: {what} equals its origin in all {len(names)} tensors, bit by bit", flush=True)


def _equal(a, b) -> bool:
    """Whether two arrays are the same bit by bit, once they are f32; so -0.0 is not 0.0."""
    a, b = apply.as_float32(a), apply.as_float32(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return np.array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))


def _against_file(source: Source, again: Source, origin: pathlib.Path) -> None:
    """The way back to the originals' names against the file itself, where it is one of theirs and was taken whole."""
    if not origin.is_file() or source.family in INITIAL:
        return
    tensors, _ = plain_names(torch_io.open_tensors(origin), str(origin))
    if find_family(tensors) != source.family or again.family != source.family:
        return
    back = official(again._replace(absent=source.absent))
    resized = [
        name
        for name in back
        if name.endswith("pos_embed") and name in tensors and back[name].shape != tensors[name].shape
    ]
    ignored = [name for name in tensors if name not in back and name not in source.absent]
    _same(
        {k: tensors[k] for k in tensors if k not in ignored},
        back,
        "the way back to the original's names",
        ignore=tuple(resized),
    )


def _against_peer(source: Source) -> None:
    """Runs our model and transformers' on random input and says the largest difference of each output."""
    if (
        source.family not in PEERS
        or source.family == "vqa"
        and source.cfg.model.vit.width != source.cfg.model.med.width
    ):
        print(
            f"  not run: transformers has no model of family {source.family} and these sizes, so tensors were compared "
            "only"
        )
        return
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        print(
            f"  not run: transformers' model (no {' and no '.join(missing)}; pip install 'blip-jax[peers]'), so "
            "tensors were compared only"
        )
        return
    model = source.cfg.model
    rng = np.random.default_rng(0)
    img = rng.standard_normal((2, model.img_size, model.img_size, 3), np.float32)
    ids = rng.integers(5, model.med.vocab_size - 2, (2, min(12, model.med.positions))).astype(np.int32)
    ids[:, 0] = FIRST_ID
    for half in PEERS[source.family]:
        theirs = _peer_outputs(half, model, source.state["params"], img, ids)
        ours = _outputs(half, source, img, ids)
        for name, want in theirs.items():
            difference, largest = np.abs(ours[name] - want).max(), max(1.0, np.abs(want).max())
            print(
                f"  verified: {name}, ours and transformers': largest difference {difference:.2e} (largest value "
                f"{largest:.3g})"
            )
            if not difference <= TOLERANCE * largest:
                raise ValueError(f"{name} of transformers' model differs by {difference:.2e}: more than rounding")


def _peer_outputs(half: str, model, params: Mapping, img: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What transformers' model with our parameters makes of random input: name -> f32.

    half: caption | itm | vqa; model: our `cfg.model`; img: normalised f32[B,S,S,3]; ids: i32[B,T], all real; decoders
    begin with [DEC] in the place of the first. ValueError: transformers' model has other tensors.
    """
    import torch
    import transformers

    names = {
        "caption": "BlipForConditionalGeneration",
        "itm": "BlipForImageTextRetrieval",
        "vqa": "BlipForQuestionAnswering",
    }
    tensors = apply.to_torch(half, {"params": params}, vocab_size=model.med.vocab_size)
    sizes = transformers.BlipConfig.from_dict(hf_config.model_json(half, model, sep=0, pad=0))
    net = getattr(transformers, names[half])(sizes).eval()
    missing, unexpected = net.load_state_dict(
        {hf.to_hf(k): torch.from_numpy(x) for k, x in tensors.items()}, strict=False
    )
    if missing or any("decoder.weight" not in k and "decoder.bias" not in k for k in unexpected):
        raise ValueError(f"transformers' {names[half]} lacks {missing} and does not know {unexpected}")

    pixels, ids = (
        torch.from_numpy(np.ascontiguousarray(img.transpose(0, 3, 1, 2))),
        torch.from_numpy(ids.astype(np.int64)),
    )
    decoded = torch.cat([torch.full_like(ids[:, :1], model.med.vocab_size - 2), ids[:, 1:]], dim=1)
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        if half == "caption":
            out = {"caption logits": net(pixel_values=pixels, input_ids=decoded, attention_mask=mask).logits[:, :-1]}
        elif half == "itm":
            scores = [
                net(pixel_values=pixels, input_ids=ids, attention_mask=mask, use_itm_head=head)[0]
                for head in (True, False)
            ]
            out = dict(zip(("matching logits", "cosines"), scores))
        else:
            img_tok = net.vision_model(pixel_values=pixels)[0]
            states = net.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=img_tok)[0]
            answers = net.text_decoder(input_ids=decoded, attention_mask=mask, encoder_hidden_states=states)
            out = {"question states": states, "answer logits": answers.logits[:, :-1]}
    return {name: x.numpy() for name, x in out.items()}


def _outputs(half: str, source: Source, img: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What `_peer_outputs` gives, of our model."""
    model, params, mask = build(source.cfg), source.state["params"], np.ones(ids.shape, bool)
    V = source.cfg.model.med.vocab_size

    def run(params, img, ids):
        def call(method, *args, **how):
            return model.apply({"params": params}, *args, method=method, **how)

        img_tok = call("encode_image", img)
        kv = call("image_kv", img_tok)
        if half == "itm":
            _, txt_emb = call("encode_text", ids, mask)
            return {
                "matching logits": call("match", ids, mask, kv, first_id=FIRST_ID),
                "cosines": call("project_image", img_tok) @ txt_emb.T,
            }
        if half == "vqa":
            states = call("encode_question", ids, mask, kv, first_id=FIRST_ID)
            kv = call("question_kv", states)
            return {"question states": states, "answer logits": call("lm_logits", ids, mask, kv)[..., :V]}
        return {"caption logits": call("lm_logits", ids, mask, kv)[..., :V]}

    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, jax.jit(run)(params, jnp.asarray(img), jnp.asarray(ids)))
