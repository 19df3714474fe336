"""Which device writes what of a checkpoint, that all of it comes back wherever it lies, and that damage is noticed."""

import json
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from blip_jax import checkpoint, from_pretrained
from blip_jax.checkpoint import sums
from blip_jax.cli import main
from blip_jax.config import base
from blip_jax.convert import read as source
from blip_jax.train import loop, saving


def test_devices_share_the_writing_of_large_arrays_alone(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    state = {
        "kernel": jax.device_put(jnp.arange(2.0**16).reshape(64, 1024), whole),
        "bias": jax.device_put(jnp.arange(1024.0), whole),
        "moment": jax.device_put(jnp.arange(64.0).reshape(16, 4), split),
        "rng": jax.device_put(jax.random.key(7), whole),
        "none": None,
    }
    with checkpoint.open_dir(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 3, state, {"step": 3}, {})
    with checkpoint.open_dir(tmp_path, keep=1) as manager:
        written = {
            name: x.storage.write_shape for name, x in manager.item_metadata(3)["state"].tree.items() if x is not None
        }
        shapes = jax.eval_shape(lambda: state)
        back, data = checkpoint.restore(manager, 3, shapes, jax.tree.map(lambda x: x.sharding, state))
    assert written == {"kernel": (8, 1024), "bias": (1024,), "moment": (2, 4), "rng": (2,)}
    assert data == {"step": 3} and back.keys() == state.keys() and back["none"] is None
    assert jax.random.key_impl(back["rng"]) == jax.random.key_impl(state["rng"])
    assert jax.random.bits(back["rng"]) == jax.random.bits(state["rng"])
    for name in ("kernel", "bias", "moment"):
        np.testing.assert_array_equal(back[name], state[name])
        assert back[name].sharding == state[name].sharding


def test_those_of_every_so_many_steps_outlive_the_newest_ones(tmp_path):
    """Also those that an earlier process wrote, and none where that is not asked for."""
    state, keep = {"kernel": jnp.arange(4.0)}, lambda: sorted(checkpoint.folders(tmp_path))
    for steps, found in (((2, 4, 6), [4, 6]), ((8, 10, 12, 14), [4, 8, 12, 14])):
        with checkpoint.open_dir(tmp_path, 1, every=4) as manager:
            for step in steps:
                checkpoint.save(manager, step, state, {"step": step}, {})
        assert keep() == found
    with checkpoint.open_dir(tmp_path, 1) as manager:
        checkpoint.save(manager, 16, state, {"step": 16}, {})
    assert keep() == [16]


def test_unstacked_text_layers_are_refused_wherever_a_checkpoint_is_read(tmp_path, tiny_cfg):
    """In one line that says how to convert or start anew."""
    kernel = np.zeros((2, 2), np.float32)
    old = {"params": {"med": {"layer_00": {"mlp": {"fc1": {"kernel": kernel}}}}}, "frozen": {}, "momentum": None}
    checkpoint.write(tmp_path, old, {"step": 0}, {"objective": "pretrain"})
    tiny_cfg.train.init_from = str(tmp_path)
    readers = {
        "resume": lambda: loop.fit(tiny_cfg, tmp_path),
        "init_from": lambda: loop.fit(tiny_cfg, tmp_path / "new"),
        "evaluate": lambda: checkpoint.load_params(tmp_path / "checkpoints" / "0"),
        "momentum": lambda: checkpoint.load_extra(tmp_path),
        "capfilt": lambda: checkpoint.load_config(tmp_path),
        "from_pretrained": lambda: from_pretrained(tmp_path),
        "convert": lambda: source.read(tmp_path),
    }
    for name, read in readers.items():
        with pytest.raises(ValueError, match="earlier version of blip_jax.*blip-jax convert.*or start anew") as refused:
            read()
        assert "\n" not in str(refused.value), name


# --- wherever it lies -------------------------------------------------------------------------------------------------
STATE = {"params": {"kernel": np.arange(2.0**13, dtype=np.float32).reshape(64, 128), "bias": np.ones(3, np.float32)}}

CONFIG = json.loads(base("tiny").to_json())


def saved(workdir, *steps):
    """`workdir` with checkpoints of STATE, of which the number of the step is a part, and a vocabulary."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    with checkpoint.open_dir(workdir, keep=len(steps)) as manager:
        for step in steps:
            state = {**STATE, "step": np.int32(step), "rng": jax.random.key(step)}
            checkpoint.save(manager, step, jax.tree.map(jnp.asarray, state), {"step": step}, CONFIG)
    return workdir


def restored(workdir, step):
    state = jax.tree.map(jnp.asarray, {**STATE, "step": np.int32(0), "rng": jax.random.key(0)})
    with checkpoint.open_dir(workdir, keep=9) as manager:
        return checkpoint.restore(
            manager, step, jax.eval_shape(lambda: state), jax.tree.map(lambda x: x.sharding, state)
        )


NAMES = ["run[1]", "a?b", "50%", "50%20x", "a#b", "a*b", "**", "{a,b}", "a\\b", "a\nb", "x.__lock", "gs:", "c|zip:x"]
NAMES += ["%2e%2e", "~", " a b ", "\u043b\u044e-\u4e2d\u6587"]


@pytest.mark.parametrize("name", NAMES)
def test_a_workdir_of_any_name(tmp_path, name):
    workdir = saved(tmp_path / name, 3)
    assert checkpoint.check_folders(workdir) == (3, []) and not checkpoint.damage(workdir / "checkpoints" / "3")
    state, data = restored(workdir, 3)
    assert state["step"] == 3 and data == {"step": 3}
    np.testing.assert_array_equal(checkpoint.load_params(workdir)["kernel"], state["params"]["kernel"])
    checkpoint.write(tmp_path / name / "converted", STATE, {"step": 0}, {})
    np.testing.assert_array_equal(checkpoint.load_params(tmp_path / name / "converted")["bias"], np.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == [name]  # and nothing elsewhere


def test_a_name_that_cannot_be_printed_is_refused_before_anything_is_written(tmp_path, capsys):
    workdir = tmp_path / os.fsdecode(b"\xff")
    with pytest.raises(ValueError, match="is no name in UTF-8: rename the folder"):
        checkpoint.open_dir(workdir, keep=1)
    assert main.main(["train", "--config=x.py", f"--workdir={workdir}"]) == 2
    assert "is no text in UTF-8: rename the file or folder" in capsys.readouterr().err


def test_folders_beside_checkpoints(tmp_path):
    """What is no number is left alone; what orbax alone takes for one would keep it from saving."""
    workdir = saved(tmp_path, 3)
    for name in ("²", "007", "٣", "3 (copy)", "-4"):
        (workdir / "checkpoints" / name).mkdir()
    assert list(checkpoint.folders(workdir)) == [3] and checkpoint.check_folders(workdir) == (3, [])
    assert checkpoint.newest(workdir).name == "3"
    with checkpoint.open_dir(workdir, keep=1) as manager:
        assert manager.all_steps() == [3]
        with pytest.raises(ValueError, match="checkpoint 2 was not saved, as .* holds checkpoint 3"):
            checkpoint.save(manager, 2, jax.tree.map(jnp.asarray, STATE), {}, {})
    for name in ("1٣", "14"):
        (workdir / "checkpoints" / name).touch()
        with pytest.raises(ValueError, match=f"{name} is named as a checkpoint is, and is none: move it away"):
            checkpoint.check_folders(workdir)
        (workdir / "checkpoints" / name).unlink()


# --- checksums --------------------------------------------------------------------------------------------------------
def test_devices_and_numpy_compute_the_same_checksums():
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    arrays = {
        "long": rng.normal(size=70000).astype(np.float32),
        "moment": rng.normal(size=(8, 5, 6)).astype(np.float32),
        "half": rng.normal(size=(4, 2)).astype(ml_dtypes.bfloat16),
        "bytes": rng.integers(0, 255, (4, 99)).astype(np.uint8),
        "bool": rng.normal(size=12) > 0,
        "scalar": np.int32(-7),
        "empty": np.zeros((0, 3), np.float32),
    }
    own = {name: sums.of_array(np.asarray(x)) for name, x in arrays.items()}
    cut = {"moment": P("data", None, "model"), "half": P("data", "model"), "bytes": P("data")}
    placed = {name: jax.device_put(x, NamedSharding(mesh, cut.get(name, P()))) for name, x in arrays.items()}
    assert sums.of_state(placed) == own
    assert own["moment"].startswith("float32[8,5,6] ") and own["empty"] == "float32[0,3] 00000000"
    x = arrays["moment"]
    assert sums.of_array(x.T) == sums.of_array(np.ascontiguousarray(x.T)) != own["moment"]
    assert sums.of_array(x.astype(">f4")) == own["moment"]
    wide = rng.integers(-9, 9, 40000)
    assert sums.of_array(wide).startswith("int64[40000] ") and sums.of_array(wide) != sums.of_array(wide[::-1])


def test_a_checksum_changes_with_every_bit_and_with_the_order():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    seen = {
        sums.of_array(x),
        sums.of_array(x[::-1]),
        sums.of_array(-x),
    }  # all signs: that of an even number of elements
    for i in range(12 * 32):
        flipped = x.copy()
        flipped.view(np.uint32).flat[i // 32] ^= np.uint32(1 << i % 32)
        seen.add(sums.of_array(flipped))
    assert len(seen) == 3 + 12 * 32


def test_every_flipped_bit_of_a_checkpoint_is_noticed_or_harmless(tmp_path):
    """One in every file, and several in the arrays; what is noticed names the newest good one."""
    workdir = saved(tmp_path, 2, 3)
    folder = workdir / "checkpoints" / "3"
    before, (want, _) = checkpoint.load_params(workdir), restored(workdir, 3)
    arrays = max(folder.glob("state/ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)
    quiet = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for at in {len(content) // 2} | ({len(content) * i // 7 for i in range(7)} if path == arrays else set()):
            path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            try:
                got, data = restored(workdir, 3)
                assert checkpoint.load_config(workdir) == CONFIG and data == {"step": 3}
                assert path.name not in ("_METADATA", "_sharding", "metadata", "checksums.json", "process_0"), path
                quiet.append((path, checkpoint.damage(folder)))
                for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
                    np.testing.assert_array_equal(sums.stored(x), sums.stored(y))
                np.testing.assert_array_equal(checkpoint.load_params(workdir)["kernel"], before["kernel"])
            except ValueError as e:
                assert f"checkpoint 3 in {folder.parent} is " in str(e) and "\n" not in str(e)
                assert f"checkpoint 2 is the newest good one: move {folder} away" in str(e) or "incomplete" in str(e)
            path.write_bytes(content)
    assert arrays not in [path for path, _ in quiet]
    assert not [found for _, found in quiet if found] and not checkpoint.damage(folder)


@pytest.mark.parametrize(
    "file, text",
    [
        ("state/_METADATA", "[]"),
        ("state/_METADATA", "{}"),
        ("state/_METADATA", "[" * 100_000),
        ("config/metadata", "[1]"),
        ("config/metadata", '{"objective": "caption"}'),
        ("data/metadata", "\x00"),
        ("checksums/metadata", "{}"),
        ("checksums/metadata", "{"),
        ("checksums/metadata", None),
        ("state/array_metadatas/process_0", "{"),
        ("state/_METADATA", lambda text: text.replace("jax.Array", "jax.Arrax", 1)),
        ("state/_METADATA", lambda text: text + " "),
        ("state/array_metadatas/process_0", lambda text: text.replace("1", "0", 1)),
        ("state/array_metadatas/process_0", None),
        ("state/checksums.json", None),
        ("state/checksums.json", "{}"),
        ("state/checksums.json", "7"),
    ],
)
def test_the_command_line_names_a_damaged_file_in_its_last_line(tmp_path, capfd, file, text):
    workdir = saved(tmp_path / "run", 2, 3)
    damaged = workdir / "checkpoints" / "3" / file
    if callable(text):
        assert (text := text(before := damaged.read_text())) != before
    damaged.unlink() if text is None else damaged.write_text(text)
    with pytest.raises(ValueError, match="checkpoint 3 in .* is .*checkpoint 2 is the newest (good|complete) one") as e:
        restored(workdir, 3)
        checkpoint.load_config(workdir)
    capfd.readouterr()  # what orbax warned of
    assert "\n" not in str(e.value)
    assert main.main(["convert", str(workdir), str(tmp_path / "out")]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "checkpoint 3 in" in err and "checkpoint 2 is the newest" in err
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "3"]


def test_a_checkpoint_without_checksums_is_read_and_said_to_be_unverified(tmp_path, capfd):
    folder = saved(tmp_path, 3) / "checkpoints" / "3"
    shutil.rmtree(folder / "checksums")
    assert checkpoint.missing(folder) == ["checksums/"]  # orbax noted that it wrote it
    (folder / "_CHECKPOINT_METADATA").write_text("{}")
    assert not checkpoint.damage(folder) and restored(tmp_path, 3)[1] == {"step": 3}
    np.testing.assert_array_equal(checkpoint.load_params(tmp_path)["bias"], np.ones(3))
    assert (
        capfd.readouterr().err
        == f"{folder} has no checksums, as it is of an earlier version: read without verifying it\n"
    )


def test_a_checkpoint_of_before_the_files_had_checksums_is_read(tmp_path):
    state = saved(tmp_path, 3) / "checkpoints" / "3" / "state"
    (state / "checksums.json").unlink()
    noted = state.parent / "checksums" / "metadata"
    found = json.loads(noted.read_text())
    del found["files"], found["itself"]
    noted.write_text(json.dumps(found | {"itself": sums.of_json(found)}))
    assert not checkpoint.damage(state.parent) and restored(tmp_path, 3)[1] == {"step": 3}


def test_an_error_of_a_library_is_one_line():
    assert (
        checkpoint.short(ValueError("\n first \nsecond")) == "first second"
        and checkpoint.short(KeyError()) == "KeyError"
    )
    full = ValueError("Error writing\n local file [os_error_code='28'] [source locations='...']")
    assert checkpoint.short(full) == os.strerror(28) and len(checkpoint.short(ValueError("x" * 999))) == 304


def test_another_vocabulary_than_the_one_that_was_there_is_refused(tmp_path):
    workdir = saved(tmp_path, 3)
    assert checkpoint.own_vocabulary(workdir / "checkpoints" / "3") == workdir / "vocab.txt"
    (workdir / "vocab.txt").write_text("[PAD]\n[UNJ]\n")
    with pytest.raises(ValueError, match="vocab.txt is not the vocabulary that checkpoint .*: put back vocab.txt"):
        checkpoint.own_vocabulary(workdir / "checkpoints" / "3")


def test_a_run_whose_last_checkpoint_cannot_be_read_back_is_not_done(tmp_path):
    workdir = saved(tmp_path, 2, 3)
    saving.reopen(SimpleNamespace(workdir=workdir), 3, thoroughly=True)
    for path in (workdir / "checkpoints" / "3").glob("state/ocdbt.process_0/d/*"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(checkpoint.Damaged, match="checkpoint 3 in .* is damaged: .*; checkpoint 2 is the newest good"):
        saving.reopen(SimpleNamespace(workdir=workdir), 3, thoroughly=True)
    shutil.rmtree(workdir / "checkpoints" / "3" / "data")
    with pytest.raises(checkpoint.Damaged, match="data/ is missing"):
        saving.reopen(SimpleNamespace(workdir=workdir), 3, thoroughly=False)


def test_settings_that_are_none_of_ours_are_an_error_of_one_line(tmp_path):
    checkpoint.write(tmp_path, STATE, {"step": 0}, {"objective": "pretrain"})
    with pytest.raises(ValueError, match="the settings in .* are not those of a model: model.embed_dim is missing"):
        source.read(tmp_path)
