"""Files that lie, that are cut, or that would run code: refused in one clear line, and nothing of them is run."""

import builtins
import io
import json
import os
import pickle
import resource
import signal
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file
from world import official

from blip_jax.cli import main
from blip_jax.convert import hf, read, torch_io

HEADS = official.TINY_HEADS


class Intruder:
    """An object whose unpickling makes the folder `path`, as any other code could be run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.makedirs, (self.path, 0o777, True)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[convert]'")


@pytest.fixture
def good(torch, tmp_path):
    """A sound .pth of a small captioner."""
    official.save(tmp_path / "good.pth", official.tensors("caption", official.TINY, img_size=32))
    return tmp_path / "good.pth"


def refused(path, *expected):
    """The message that reading it ends with; the command says it too, with status 2."""
    with pytest.raises(ValueError) as e:
        read.read(path, vocab="none.txt", **HEADS)
    for part in (path.name, *expected):
        assert part in str(e.value), str(e.value)
    return str(e.value)


# --- pickles ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, zipped", [("zip.pth", True), ("legacy.pth", False), ("pytorch_model.bin", True), ("old.bin", False)]
)
@pytest.mark.parametrize("place", ["model", "beside"])
def test_a_pickle_that_would_run_code_is_not_run(torch, tmp_path, name, zipped, place, capsys):
    mark, arrays = tmp_path / "was run", official.tensors("caption", official.TINY, img_size=32)
    tensors = {key: torch.from_numpy(np.array(x)) for key, x in arrays.items()}
    content = {"model": tensors | ({"extra": Intruder(mark)} if place == "model" else {}), "config": Intruder(mark)}
    path = tmp_path / name
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)
    assert mark.exists()  # the trap works: reading it without care runs it
    mark.rmdir()
    said = refused(path, "os.makedirs", "which is code, not a tensor; nothing of it was run")
    assert not mark.exists() and "\n" not in said
    assert main.main(["convert", str(path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not mark.exists() and not (tmp_path / "out").exists()


def test_a_bare_pickle_is_not_run(torch, tmp_path):
    mark = tmp_path / "was run"
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"model": Intruder(mark)}, protocol=2))
    refused(tmp_path / "bare.pth")
    assert not mark.exists()


def test_code_in_a_hugging_face_folder_is_not_run(torch, tmp_path):
    mark, folder = tmp_path / "was run", tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["BlipForConditionalGeneration"], "model_type": "blip"}')
    torch.save({"a": Intruder(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="nothing of it was run"):
        read.read(folder)
    assert not mark.exists()


def test_the_legacy_format_is_read_where_it_is_sound(torch, tmp_path):
    arrays = official.tensors("caption", official.TINY, img_size=32)
    torch.save(
        {"model": {k: torch.from_numpy(np.array(x)) for k, x in arrays.items()}},
        tmp_path / "old.pth",
        _use_new_zipfile_serialization=False,
    )
    got = torch_io.open_tensors(tmp_path / "old.pth")
    assert set(got) == set(arrays)
    for name, x in arrays.items():
        np.testing.assert_array_equal(np.asarray(got[name]), x)


@pytest.mark.parametrize(
    "content, expected",
    [
        ([1, 2], "holds a list, no dict of tensors"),
        ({"model": {"a": 3, "b": "text"}}, "holds more than tensors:\n  a is a int\n  b is a str"),
        ({"model": {5: None}}, "5 is the name of an entry"),
        ({"epoch": 7}, "epoch is a int"),
        ({}, "nothing"),
    ],
    ids=["list", "numbers", "names", "no model", "empty"],
)
def test_what_is_no_state_dict_is_named(torch, tmp_path, content, expected):
    torch.save(content, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", expected)


def test_tensors_that_are_not_plain_are_named(torch, tmp_path):
    content = {"sparse": torch.eye(3).to_sparse(), "wide": torch.zeros(1).expand(10**9, 10**6)}
    torch.save(content, tmp_path / "x.pth")
    refused(
        tmp_path / "x.pth",
        "sparse is no dense tensor",
        "wide claims [1000000000, 1000000], more than the 4 bytes that are stored",
    )


def test_without_torch_the_remedy_is_said(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}q\x00.")
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    refused_by = pytest.raises(ValueError, match=r"files of PyTorch need torch .*: pip install 'blip-jax\[convert\]'")
    with refused_by:
        read.read(tmp_path / "x.pth")


# --- cut and damaged --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["pth", "legacy.pth", "safetensors", "npz"])
def test_truncated_files(tmp_path, share, kind):
    arrays, whole, cut = (
        official.tensors("caption", official.TINY, img_size=32),
        tmp_path / f"whole.{kind}",
        tmp_path / f"cut.{kind}",
    )
    if "pth" in kind:
        torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[convert]'")
        torch.save(
            {"model": {k: torch.from_numpy(np.array(x)) for k, x in arrays.items()}},
            whole,
            _use_new_zipfile_serialization=kind == "pth",
        )
    elif kind == "npz":
        np.savez(whole, **official.flax())
    else:
        save_file({k: np.ascontiguousarray(x) for k, x in arrays.items()}, whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    said = refused(cut)
    assert any(word in said for word in ("truncated", "it is empty", "it begins with")), said


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "it is empty"),
        (b"hello, these are words", "it begins with b'hello"),
        (b"<!DOCTYPE html><html>", "it is a web page, the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "a pointer of git-lfs"),
        (bytes(range(256)) * 3, "is no checkpoint"),
    ],
    ids=["empty", "text", "html", "lfs", "noise"],
)
def test_what_is_no_checkpoint(tmp_path, content, expected):
    for suffix in ("pth", "npz"):
        (tmp_path / f"x.{suffix}").write_bytes(content)
        refused(tmp_path / f"x.{suffix}", expected)


def rezip(path, out, change=lambda name, data: data, extra=(), compression=zipfile.ZIP_STORED):
    """A copy of a zip with its members changed (None: left out)."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for info in old.infolist():
            data = change(info.filename, old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
        for name, data in extra:
            new.writestr(name, data)
    return out


def test_a_zip_that_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.pth", "w") as archive:
        archive.writestr("a.jpg", b"x")
        archive.writestr("b/c.txt", b"y")
    refused(
        tmp_path / "photos.pth",
        "is a zip but no checkpoint: it holds a.jpg, b/c.txt, neither the data.pkl of torch.save",
    )


def test_a_compressed_or_bursting_zip_is_refused(good, tmp_path):
    packed = rezip(good, tmp_path / "packed.pth", compression=zipfile.ZIP_DEFLATED)
    refused(packed, "is compressed", "torch stores tensors as they are")
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(10**6, np.float32))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cls.npy", buffer.getvalue())
    refused(tmp_path / "bomb.npz", "would unpack to 4000128 bytes", "these are no weights")


def test_a_zip_that_lies_about_a_size_is_refused(good, tmp_path):
    """The central directory claims a member of 3 GB."""
    content = bytearray(good.read_bytes())
    at = content.rfind(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", 3 * 10**9, 3 * 10**9)
    (tmp_path / "lies.pth").write_bytes(content)
    refused(tmp_path / "lies.pth", "bytes in a file of")


def test_a_storage_that_is_shorter_or_missing_is_refused(good, tmp_path):
    halve = lambda name, data: data[: len(data) // 2] if "/data/" in name and len(data) > 9000 else data
    short = rezip(good, tmp_path / "short.pth", halve)
    refused(short)
    gone = rezip(good, tmp_path / "gone.pth", lambda name, data: None if name.endswith("/data/3") else data)
    refused(gone, "truncated, damaged")


def test_two_members_of_one_name_are_refused(good, tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = rezip(
            good, tmp_path / "twice.pth", extra=[("good/data.pkl", b"\x80\x02}q\x00."), ("good/version", b"3")]
        )
    refused(twice, "members of the same name")


# --- numpy and safetensors --------------------------------------------------------------------------------------------
def test_an_npz_with_objects_is_not_unpickled(tmp_path):
    mark = tmp_path / "was run"
    np.savez(tmp_path / "objects.npz", **official.flax() | {"extra": np.array([Intruder(mark)], object)})
    refused(tmp_path / "objects.npz", "extra.npy holds Python objects, which is code", "nothing of it was run")
    assert not mark.exists()


def test_an_npz_whose_header_lies_is_refused(tmp_path):
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000), }"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + b"\0" * 64
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("cls.npy", data)
    refused(tmp_path / "x.npz", "cls.npy claims [1000000000, 1000000] of float32, but has 64 bytes")


@pytest.mark.parametrize(
    "header, expected",
    [
        (b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,8]}}', "truncated or damaged"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9000000]}}', "truncated or damaged"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}', "truncated or damaged"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            "damaged",
        ),
        (b'{"a":{"dtype":"F8_E5M2","shape":[8],"data_offsets":[0,8]}}', "of kinds that no BLIP has: a is F8_E5M2"),
        (b'{"a":', "truncated or damaged"),
    ],
    ids=["shape", "beyond the end", "negative", "overlap", "kind", "cut json"],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, header, expected):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    refused(tmp_path / "x.safetensors", expected)
    (tmp_path / "y.safetensors").write_bytes(struct.pack("<Q", 2**62) + header + b"\0" * 8)
    refused(tmp_path / "y.safetensors", "truncated or damaged")


# --- numbers and names that size what is done -------------------------------------------------------------------------
@pytest.mark.parametrize("number", ["99999999", "1000", "9" * 5000, "0" * 40 + "300000"])
@pytest.mark.parametrize("kind", ["file", "folder", "bert"])
def test_a_layer_number_is_not_believed(tmp_path, number, kind):
    name = {
        "file": f"visual_encoder.blocks.{number}.norm1.weight",
        "folder": f"vision_model.encoder.layers.{number}.layer_norm1.weight",
        "bert": f"bert.encoder.layer.{number}.output.dense.weight",
    }[kind]
    path = tmp_path / kind
    path.mkdir()
    arrays = official.bert() if kind == "bert" else official.tensors("caption", official.TINY, img_size=32)
    if kind == "folder":
        arrays = {hf.to_hf(key): x for key, x in arrays.items()}
        (path / "config.json").write_text('{"architectures": ["BlipForConditionalGeneration"], "model_type": "blip"}')
    arrays[name] = np.zeros(48, np.float32)
    save_file({k: np.ascontiguousarray(x) for k, x in arrays.items()}, path / "model.safetensors")
    with pytest.raises(ValueError, match="a model has fewer than 1000 layers") as e:
        read.read(path if kind == "folder" else path / "model.safetensors", **HEADS)
    assert str(path) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 600


def test_numbers_of_any_length_in_names_that_no_table_has(tmp_path):
    names = [f"qformer.{'7' * 5000}{i}.weight" for i in range(9)] + [f"x.{i}.y" for i in range(50)]
    arrays = official.tensors("caption", official.TINY, img_size=32) | {n: np.zeros(1, np.float32) for n in names}
    save_file({k: np.ascontiguousarray(x) for k, x in arrays.items()}, tmp_path / "x.safetensors")
    said = refused(tmp_path / "x.safetensors", "x.{0-49}.y")
    assert len(said) < 3000


def test_a_message_names_few_of_many_wrong_names(tmp_path):
    names = [f"{chr(97 + i % 26)}{i:x}" for i in range(5000)]
    arrays = official.tensors("caption", official.TINY, img_size=32) | {n: np.zeros(1, np.float32) for n in names}
    save_file({k: np.ascontiguousarray(x) for k, x in arrays.items()}, tmp_path / "x.safetensors")
    assert len(refused(tmp_path / "x.safetensors", "... and 4980 more")) < 3000


def test_too_many_tensors_are_refused_unread(tmp_path):
    save_file({f"t{i}": np.zeros(0, np.float32) for i in range(20_001)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "holds 20001 tensors: models here have at most 20000")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "blip"}')
    index = {"weight_map": {f"t{i}": "../x.safetensors" for i in range(20_001)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names 20001 tensors"):
        read.read(folder)
    index = {"weight_map": {f"t{i}": f"../{i}.safetensors" for i in range(300)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="and 280 more"):
        read.read(folder)


def test_an_empty_tensor_sizes_nothing(tmp_path):
    arrays = official.tensors("caption", official.TINY, img_size=32)
    arrays["text_decoder.bert.embeddings.position_embeddings.weight"] = np.zeros((10**12, 0), np.float32)
    save_file({k: np.ascontiguousarray(x) for k, x in arrays.items()}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "is [1000000000000, 0], empty")


def test_tensors_that_share_a_storage_claim_no_more_than_tied_ones_do(torch, tmp_path):
    arrays = official.tensors("caption", official.TINY | {"layers": 40}, img_size=32)
    seen = torch.zeros(max(x.size for x in arrays.values()))
    views = {k: seen[: x.size].view(x.shape) if x.dtype == np.float32 else torch.tensor(x) for k, x in arrays.items()}
    torch.save({"model": views}, tmp_path / "x.pth")
    said = refused(tmp_path / "x.pth", "tensors share", "times as many: these are no weights")
    assert "\n" not in said
    tied = official.tensors("pretrain", official.TINY, img_size=32)  # its decoder's copies share the encoder's
    official.save(tmp_path / "tied.pth", tied)
    assert len(torch_io.open_tensors(tmp_path / "tied.pth")) == len(tied)


# --- JSON -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "content, told",
    [
        ("[" * 200_000, "config.json cannot be read"),
        ('{"a":' * 200_000, "config.json cannot be read"),
        ('{"architectures": [{"a": 1}]}', r"architectures is \[\{'a': 1\}\]: it must be a list of names"),
        ('{"architectures": 7}', "architectures is 7: it must be a list of names"),
        ('{"architectures": "BlipModel"}', "architectures is 'BlipModel': it must be a list of names"),
        ('{"model_type": [[[[[[[[[[7]]]]]]]]]]}', r"model_type \[\[\[\["),
        ('{"model_type": "blip", "text_config": 7}', "text_config is 7: it must be settings"),
        ('{"model_type": "blip", "text_config": {"hidden_act": {"a": 1}}}', "text_config.hidden_act is {'a': 1}"),
        ('{"model_type": "blip", "vision_config": {"qkv_bias": false}}', "vision_config.qkv_bias is False"),
        ('{"model_type": "blip", "text_config": {"position_embedding_type": "x"}}', "position_embedding_type is 'x'"),
    ],
)
def test_settings_that_are_too_deep_or_of_other_kinds(tmp_path, content, told, capsys):
    arrays = official.tensors("caption", official.TINY, img_size=32)
    save_file({hf.to_hf(k): np.ascontiguousarray(x) for k, x in arrays.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=told) as e:
        read.read(tmp_path, **HEADS)
    assert len(str(e.value)) < 800
    assert main.main(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_settings_file_without_end_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(ValueError, match="it has 1099511627776 bytes, of at most"):
        read.read(tmp_path)


# --- pickles of other protocols, and no name --------------------------------------------------------------------------
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickle_of_a_newer_protocol_is_called_that(torch, tmp_path, protocol):
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"model": {"a": [1, 2]}}, protocol=protocol))
    said = refused(tmp_path / "x.pth", "a pickle with the instruction", "save it again with torch.save")
    assert "which is code" not in said and "\n" not in said


def test_a_refusal_always_has_a_reason():
    assert "(torch: MemoryError)" in torch_io.refusal(MemoryError())


@pytest.mark.parametrize("name", ["", "  ", None, 7, b"x"])
def test_what_is_no_name_of_a_checkpoint(name):
    with pytest.raises(ValueError, match="names no checkpoint: give a workdir"):
        read.read(name)


# --- a disk that is full ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("to, name", [("official", "out.pth"), ("hf", "out")])
def test_a_full_disk_is_one_line_and_nothing_stays(good, tmp_path, monkeypatch, capsys, to, name):
    vocab = official.vocabulary(tmp_path / "v.txt")
    before, (soft, hard) = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file may not grow: as on a full disk, writing fails
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        flags = [f"--vocab={vocab}", "--vit_heads=4", "--med_heads=4", f"--to={to}"]
        status = main.main(["convert", str(good), str(tmp_path / name), *flags])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    (last,) = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and last.startswith("error: ") and "cannot be written" in last and "GB are free there" in last
    assert sorted(tmp_path.iterdir()) == before
