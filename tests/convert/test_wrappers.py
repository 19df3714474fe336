"""Checkpoints as training programs save them: in dicts, under names that wrappers lengthened. Read, and said."""

import numpy as np
import pytest
from safetensors.numpy import save_file
from world import official
from world.convert import same_bits, vocab  # noqa: F401 (a fixture)

from blip_jax.convert import apply, read, wrappers, write

HEADS = official.TINY_HEADS
CAPTION = official.tensors("caption", official.TINY, img_size=32)


def under(prefix, arrays=CAPTION):
    return {prefix + name: x for name, x in arrays.items()}


def inside(part, arrays=CAPTION):
    """As where only the towers were wrapped: visual_encoder.PART.blocks..."""
    return {".".join((tower, part, *rest)): x for name, x in arrays.items() for tower, *rest in [name.split(".")]}


NAMES = {
    "DataParallel": (under("module."), "module."),
    "torch.compile": (under("_orig_mod."), "_orig_mod."),
    "Lightning": (under("model."), "model."),
    "twice": (under("model.model."), "model."),
    "compiled in DataParallel": (under("module._orig_mod."), "module., _orig_mod."),
    "all": (under("model._orig_mod.module."), "module., _orig_mod., model."),
    "towers compiled": (inside("_orig_mod"), "_orig_mod."),
    "towers in FSDP": (under("_fsdp_wrapped_module.", inside("_fsdp_wrapped_module")), "_fsdp_wrapped_module."),
}


def is_the_captioner(got):
    assert got.family == "caption"
    buffers = {name: x for name, x in CAPTION.items() if name.endswith("position_ids")}
    same_bits(CAPTION, apply.to_torch("caption", got.state, vocab_size=120) | buffers)


@pytest.mark.parametrize("kind", NAMES)
def test_names_that_wrappers_lengthened(tmp_path, vocab, kind):
    arrays, said = NAMES[kind]
    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, tmp_path / "x.safetensors")
    got = read.read(tmp_path / "x.safetensors", vocab=vocab, **HEADS)
    assert f"names are read without {said}" in got.notes
    is_the_captioner(got)


@pytest.mark.parametrize(
    "way",
    [("model",), ("state_dict",), ("model_state_dict",), ("module",), ("model", "state_dict"), ("state_dict",) * 3],
)
def test_dicts_that_hold_the_state_dict(tmp_path, vocab, way):
    torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[convert]'")
    content = {name: torch.from_numpy(np.array(x)) for name, x in under("module.").items()}
    for name in reversed(way):
        content = {name: content, "epoch": 3, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "x.pth")
    got = read.read(tmp_path / "x.pth", vocab=vocab, **HEADS)
    is_the_captioner(got)
    said = "\n".join(got.notes)
    assert ("the state dict lies under " + " > ".join(way) in said) == (way != ("model",))
    assert "left out what stands beside the weights: epoch" in said and "names are read without module." in said


def test_two_models_in_one_file_are_not_chosen_from(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[convert]'")
    torch.save({"model": {"a": torch.zeros(1)}, "state_dict": {"b": torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth: it holds dicts under 'model' and under 'state_dict'"):
        read.read(tmp_path / "x.pth")
    torch.save({"model": {"a.module.b": torch.zeros(1), "module.a.b": torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="a.module.b and module.a.b are both a.b without module."):
        read.read(tmp_path / "x.pth")


def test_a_dict_that_holds_itself_ends():
    content = {}
    content["model"] = content
    assert wrappers.unpack(content)[1] == ["model"] * wrappers.DEPTH


def test_convert_says_it_and_verifies_against_the_file(tmp_path, vocab, capsys):
    path, arrays = tmp_path / "x.safetensors", official.tensors("features", official.TINY, img_size=32)
    save_file({name: np.ascontiguousarray(x) for name, x in under("module.", arrays).items()}, path)
    write.convert(path, tmp_path / "ours", vocab=vocab, verify=True, **HEADS)
    said = capsys.readouterr().out
    assert "names are read without module." in said and "the way back to the original's names" in said


def test_initial_weights_and_hugging_face_folders_may_be_wrapped_too(tmp_path, vocab):
    arrays = official.tensors("deit", official.TINY, img_size=32)
    save_file(under("module.", arrays), tmp_path / "deit.safetensors")
    got = read.read(tmp_path / "deit.safetensors", **HEADS)
    assert got.family == "deit" and "names are read without module." in got.notes
    save_file(under("_orig_mod.", official.bert(prefix="", head=False)), tmp_path / "bert.safetensors")
    assert read.read(tmp_path / "bert.safetensors", vocab=vocab, heads=dict(med=4)).family == "bert"
    from blip_jax.convert import hf

    hf.write(tmp_path / "hf", read.read(*caption_file(tmp_path), vocab=vocab, **HEADS))
    from safetensors.numpy import load_file

    plain = load_file(tmp_path / "hf" / "model.safetensors")
    save_file(under("_orig_mod.", plain), tmp_path / "hf" / "model.safetensors")
    got = read.read(tmp_path / "hf")
    assert got.family == "caption" and "names are read without _orig_mod." in got.notes


def caption_file(tmp_path):
    save_file({name: np.ascontiguousarray(x) for name, x in CAPTION.items()}, tmp_path / "c.safetensors")
    return (tmp_path / "c.safetensors",)
