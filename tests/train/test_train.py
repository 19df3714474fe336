"""The loop: bitwise resume, also on another mesh, what is written, what is refused before anything compiles."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from world.runs import TIMED, rewrite_data

from blip_jax import checkpoint, lock, tasks, trees
from blip_jax.config import source
from blip_jax.console import plain
from blip_jax.models import initial
from blip_jax.parallel import interrupt, sharding
from blip_jax.tasks import two_stage
from blip_jax.train import loop, metrics, saving, start


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a run that was never interrupted: 6 steps, checkpoints 3 and 6, rows 2, 4 and 6, and an evaluation."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def cfg(tiny_cfg):
    with tiny_cfg.data.unlocked():
        tiny_cfg.data.eval.world = source("scenes", count=20, size=32, seed=1)
    tiny_cfg.eval.batch = 16
    tiny_cfg.eval.k = 4
    tiny_cfg.eval.loss_examples = 16
    return tiny_cfg


@pytest.fixture
def full_run(cfg, finished):
    """The uninterrupted run, made by the first test that needs it."""
    if not finished.exists():
        out = loop.fit(cfg, finished)
        assert out["step"] == 6 and not out["stopped"]
    return finished


@pytest.fixture
def cut_run(full_run, tmp_path):
    """The uninterrupted run as a kill between steps 4 and 6 would have left it: checkpoint 3, and rows beyond it."""
    shutil.copytree(full_run, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
    return tmp_path / "cut"


def rows(workdir, part="train"):
    """Rows of metrics.jsonl without timings, by step; an error if a step is there twice."""
    out = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = {k: v for k, v in json.loads(line).items() if not k.endswith(TIMED)}
        if any(k.startswith(part) for k in row):
            assert row["step"] not in out, f"step {row['step']} twice"
            out[row["step"]] = row
    return out


def state_of(cfg, workdir, step):
    """Every leaf of a checkpoint as numpy, on the mesh of `cfg`."""
    run = loop.prepare(cfg, workdir)
    with checkpoint.open_dir(workdir, 3) as manager:
        state, data = checkpoint.restore(manager, step, run.shapes, run.shardings)
    leaves = jax.tree.leaves_with_path(state.replace(rng=jax.random.key_data(state.rng)))
    return {trees.path_name(path): np.asarray(x) for path, x in leaves}, data


def test_a_run_writes_what_it_promises(full_run, cfg):
    assert sorted(p.name for p in (full_run / "checkpoints").iterdir()) == ["3", "6"]
    assert (full_run / "vocab.txt").read_bytes() == open(cfg.text.vocab, "rb").read()
    assert json.loads((full_run / "config.json").read_text()) == plain(cfg)
    assert any((full_run / "tb").iterdir())
    got = rows(full_run)
    assert sorted(got) == [2, 4, 6]
    for step, row in got.items():
        for name in ("loss", "loss_itc", "loss_itm", "loss_lm", "itm_acc", "alpha", "temp", "grad_norm"):
            assert math.isfinite(row[f"train/{name}"])
        total = sum(row[f"train/loss_{part}"] for part in ("itc", "itm", "lm"))
        assert row["train/loss"] == pytest.approx(total, rel=1e-5)
        assert row["train/examples"] == 16 * step and row["train/epoch"] == step / 4
    assert got[2]["train/lr"] == pytest.approx(1e-6 + (3e-4 - 1e-6) * 1 / 2)  # of the second step, in the warm-up
    assert got[6]["train/lr"] == pytest.approx(3e-4 * 0.9)  # second epoch
    evaluated = rows(full_run, "eval")
    assert list(evaluated) == [6] and 0 <= evaluated[6]["eval/r_mean"] <= 100 and evaluated[6]["eval/images"] == 20
    assert evaluated[6]["eval/loss_examples"] == 16
    total = sum(evaluated[6][f"eval/loss_{part}"] for part in ("itc", "itm", "lm"))
    assert evaluated[6]["eval/loss"] == pytest.approx(total, rel=1e-5)


def test_examples_crc_is_of_the_keys_and_their_places(full_run, cfg):
    run = loop.prepare(cfg, full_run)
    crc, seen = 0, []
    with run.data.batches(0) as batches:
        for _ in range(6):
            keys = next(batches)["key"]
            crc = (crc + sum(zlib.crc32(f"{i} {key}".encode()) for i, key in enumerate(keys, len(seen)))) % 2**32
            seen += keys
    assert rows(full_run)[6]["train/examples_crc"] == crc
    assert sorted(seen[:64]) == sorted(set(seen))  # 64 records: the first epoch has each of them once


def test_resume_is_bitwise(full_run, cut_run, cfg, capsys):
    """6 = 3 + kill + 3: rows (a mean that spans the cut too), examples, evaluation and every leaf of the state."""
    out = loop.fit(cfg, cut_run)
    assert out["step"] == 6
    assert rows(cut_run) == rows(full_run) and rows(cut_run, "eval") == rows(full_run, "eval")
    (mine, data), (theirs, same_data) = state_of(cfg, cut_run, 6), state_of(cfg, full_run, 6)
    assert data == same_data
    assert mine.keys() == theirs.keys() and len(mine) > 100
    for path in mine:
        np.testing.assert_array_equal(mine[path], theirs[path], err_msg=path)
    text = capsys.readouterr().out + (cut_run / "start.txt").read_text()
    for part in (
        "resuming from checkpoint 3; settings changed since: none",
        "resumed at step 3",
        "8 devices",
        "jax 0.",
        '"objective": "pretrain"',
        "| trained/vit/blocks/",
        "total ",
        "FLOPs: ",
        "memory per device: state",
        "4 steps; 6 steps are 1.50 epochs",
        "outputs in",
        "step 4/6",
        "eta ",
        "examples/s",
        "waiting",
    ):
        assert part in text, part


def test_resume_on_another_mesh(full_run, cut_run, cfg):
    cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor = 2, 2, 2
    loop.fit(cfg, cut_run)
    mine, theirs = rows(cut_run), rows(full_run)
    assert mine[2] == theirs[2]
    for step in (4, 6):
        assert mine[step]["train/examples_crc"] == theirs[step]["train/examples_crc"]
        for name in ("loss", "loss_itc", "loss_itm", "loss_lm"):
            assert mine[step][f"train/{name}"] == pytest.approx(theirs[step][f"train/{name}"], rel=1e-6)
    (got, _), (want, _) = state_of(cfg, cut_run, 6), state_of(cfg, full_run, 6)
    for path in want:  # of what is larger than 1, as the temperature's momentum, 1e-6 is within its last three bits
        np.testing.assert_allclose(got[path], want[path], rtol=1e-6, atol=1e-6, err_msg=path)


def test_a_finished_run_is_left_alone(full_run, cfg, tmp_path):
    shutil.copytree(full_run, tmp_path / "again")
    before = (tmp_path / "again" / "metrics.jsonl").read_text()
    out = loop.fit(cfg, tmp_path / "again")
    assert out == {"step": 6, "stopped": False}
    assert (tmp_path / "again" / "metrics.jsonl").read_text() == before


def test_changed_settings_are_said_and_a_torn_checkpoint_is_removed(cut_run, cfg, capsys):
    torn = cut_run / "checkpoints" / "5.orbax-checkpoint-tmp"
    shutil.copytree(cut_run / "checkpoints" / "3", torn)
    shutil.rmtree(torn / "state" / "d")
    cfg.train.steps, cfg.train.keep = 3, 2
    assert loop.fit(cfg, cut_run)["step"] == 3
    text = capsys.readouterr().out
    assert "train.keep: 3 -> 2; train.steps: 6 -> 3" in text
    assert [p.name for p in (cut_run / "checkpoints").iterdir()] == ["3"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(cut_run, cfg):
    run = loop.prepare(cfg, cut_run)
    with checkpoint.open_dir(cut_run, 3) as manager:
        state, data = checkpoint.restore(manager, 3, run.shapes, run.shardings)
        broken = jax.tree.map(lambda x: x, state.params)
        broken["text_proj"]["bias"] = broken["text_proj"]["bias"].at[0].set(jnp.nan)
        data |= {"step": 4, "sums": None, "examples": 64, "epoch": 1.0}
        checkpoint.save(manager, 4, state.replace(params=broken, step=jnp.int32(4)), data, plain(cfg))
    with pytest.raises(saving.NonFiniteLoss, match="step 5: a loss or the gradient norm is not finite"):
        loop.fit(cfg, cut_run)
    assert sorted(p.name for p in (cut_run / "checkpoints").iterdir()) == ["3", "4"]
    assert sorted(rows(cut_run)) == [2, 4]


def test_a_loss_that_is_not_finite_before_anything_was_saved(cfg, tmp_path):
    run = loop.prepare(cfg, tmp_path / "new")
    sums = metrics.add(metrics.zeros(["loss"]), {"loss": jnp.float32(jnp.nan)})
    with pytest.raises(saving.NonFiniteLoss) as e:
        saving.finite(run, 1, sums)
    assert "step 1: " in str(e.value) and "nothing was saved yet; lower optim.lr" in str(e.value)
    assert "checkpoint" not in str(e.value)


# --- another batch ----------------------------------------------------------------------------------------------------
def test_another_batch_goes_on_at_the_next_example(cut_run, cfg, capsys):
    """48 examples were seen in steps of 16; each further step sees 8. The same with the checkpoint of a run that did
    not count them."""
    folder = cut_run / "checkpoints" / "3"
    saved = checkpoint.load_data(folder)
    assert saved["examples"] == 48 and saved["epoch"] == 0.75
    rewrite_data(folder, lambda data: [data.pop(name) for name in ("order", "examples", "epoch")])

    cfg.train.batch, cfg.train.steps, cfg.data.eval = 8, 6, type(cfg.data.eval)()
    assert loop.fit(cfg, cut_run)["step"] == 6
    text = capsys.readouterr().out
    assert "train.batch: 16 -> 8: 48 examples, 0.75 epochs, were seen; it goes on with example 48" in text
    got = rows(cut_run)
    assert [got[step]["train/examples"] for step in (2, 4, 6)] == [32, 56, 72]
    assert [got[step]["train/epoch"] for step in (2, 4, 6)] == [0.5, 0.875, 1.125]
    assert got[4]["train/lr"] == pytest.approx(3e-4) and got[6]["train/lr"] == pytest.approx(3e-4 * 0.9)

    run = loop.prepare(cfg, cut_run)
    with run.data.batches(0) as batches:
        keys = [key for _ in range(9) for key in next(batches)["key"]]
    crc = sum(zlib.crc32(f"{i} {key}".encode()) for i, key in enumerate(keys)) % 2**32
    assert got[6]["train/examples_crc"] == crc
    saved = checkpoint.load_data(cut_run)
    assert saved["examples"] == 72 and saved["order"] == {"step": 3, "following": 48, "left": [], "epoch": 0.75}


def test_the_queue_keeps_whole_batches_when_the_batch_changes(full_run, cfg, tmp_path):
    cfg.train.batch, cfg.loss.queue = 16, 32
    run = loop.prepare(cfg, tmp_path / "new")
    with jax.set_mesh(run.mesh):
        state = start.create(run, None)
        for ptr, want in ((8, 16), (24, 0), (16, 16)):
            queue = state.extra["queue"] | {"ptr": jnp.int32(ptr)}
            moved = start.aligned(run, state.replace(extra=state.extra | {"queue": queue}))
            assert int(moved.extra["queue"]["ptr"]) == want


# --- stopping, and one run in one folder ------------------------------------------------------------------------------
def without_evaluation(full_run, workdir):
    """The uninterrupted run as it was before its evaluation."""
    shutil.copytree(full_run, workdir)
    kept = [line for line in (workdir / "metrics.jsonl").read_text().splitlines() if "eval/" not in line]
    (workdir / "metrics.jsonl").write_text("\n".join(kept) + "\n")


@pytest.mark.parametrize("place", ["image features", "re-ranking"])
def test_a_signal_within_an_evaluation_stops_it_and_the_same_command_makes_it_again(
    full_run, cfg, tmp_path, monkeypatch, capsys, place
):
    workdir = tmp_path / "run"
    without_evaluation(full_run, workdir)

    def interrupting(items, desc, **kw):
        for number, item in enumerate(items):
            if desc == place and number == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    with monkeypatch.context() as m:
        m.setattr(two_stage, "tqdm", interrupting)
        assert loop.fit(cfg, workdir) == {"step": 6, "stopped": True}
    text = capsys.readouterr().out
    assert "SIGTERM: ending this evaluation, of step 6, which is saved" in text
    assert "stopped by a signal at step 6 of 6; checkpoint 6 in" in text and "the same command goes on" in text
    assert not rows(workdir, "eval") and sorted(rows(workdir)) == [2, 4, 6]
    again = loop.fit(cfg, workdir)
    assert again["step"] == 6 and not again["stopped"]
    got, want = rows(workdir, "eval")[6], rows(full_run, "eval")[6]
    assert got == pytest.approx(want) and not lock_files(workdir)


@pytest.mark.parametrize("how", ["a signal", "out of memory"])
def test_a_step_is_saved_before_it_is_evaluated(cut_run, cfg, monkeypatch, how):
    cfg.train.eval_every = 4  # which is no step to be saved

    def evaluate(loaded, data, mesh):
        assert checkpoint.newest_complete(cut_run) == 4
        if how == "a signal":
            os.kill(os.getpid(), signal.SIGTERM)
            interrupt.check()
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(tasks.of(cfg), "evaluate", evaluate)
    if how == "a signal":
        out = loop.fit(cfg, cut_run)
        assert out["step"] == 4 and out["stopped"]
    else:
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            loop.fit(cfg, cut_run)
    assert checkpoint.newest_complete(cut_run) == 4 and not rows(cut_run, "eval") and not lock_files(cut_run)


def test_a_signal_before_the_first_step(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "prepare", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert loop.fit(cfg, tmp_path / "run") == {"step": 0, "stopped": True}
    assert not (tmp_path / "run").exists()  # a lock leaves no empty folder


def test_a_folder_in_use_is_left_alone(cut_run, cfg, compiled):
    before = {p: p.stat().st_mtime_ns for p in cut_run.rglob("*")}
    with lock.held(cut_run):
        with pytest.raises(ValueError, match=f"{cut_run} is in use by process {os.getpid()} on host"):
            loop.fit(cfg, cut_run)
    assert {p: p.stat().st_mtime_ns for p in cut_run.rglob("*")} == before and not compiled


@pytest.mark.parametrize("part", ["a row", "the vocabulary"])
def test_a_full_disk_is_one_line(cut_run, cfg, monkeypatch, part):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    where = {"a row": (metrics.Writer, "row"), "the vocabulary": (shutil, "copyfile")}[part]
    if part == "the vocabulary":
        (cut_run / "vocab.txt").unlink()
    monkeypatch.setattr(*where, full)
    with pytest.raises(OSError) as e:
        loop.fit(cfg, cut_run)
    assert str(e.value) == (
        f"writing in {cut_run} failed: No space left on device; make room, then run the same command again to go on "
        f"from checkpoint 3 in {cut_run}"
    )


def lock_files(workdir):
    return list(workdir.glob("lock*"))


@pytest.mark.parametrize(
    "words, said",
    [
        (
            'RESOURCE_EXHAUSTED: Error writing "a" in OCDBT\n' + 400 * "x" + " [os_error_code='28']",
            "No space left on device",
        ),
        ("400 lines\n" * 400, "400 lines 400 lines"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_one_line(cut_run, cfg, monkeypatch, words, said):
    def full(*_, **__):
        raise ValueError(words)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError) as e:
        loop.fit(cfg, cut_run)
    text = str(e.value)
    assert f"writing a checkpoint in {cut_run / 'checkpoints'} failed: {said}" in text and "\n" not in text
    assert len(text) < 700 and "make room, then run the same command again to go on from checkpoint 3" in text


@pytest.fixture
def compiled():
    """Names of the events of XLA compilation since the test began."""
    events, on = [], [True]
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: events.append(name) if on[0] and "backend_compile" in name else None
    )
    yield events
    on[0] = False


def _vocabulary_without_cls(cfg, tmp_path):
    lines = [t for t in open(cfg.text.vocab).read().split("\n") if t != "[CLS]"]
    (tmp_path / "bad.txt").write_text("\n".join(lines))
    cfg.text.vocab = str(tmp_path / "bad.txt")


def _missing_files(cfg, tmp_path):
    with cfg.data.unlocked():
        cfg.data.train.web = source("json", str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda c, _: c.update({"objective": "vqa2"}), "objective is 'vqa2'"),
        (lambda c, _: c.train.update({"batch": 12}), "train.batch is 12"),
        (lambda c, _: c.loss.update({"queue": 24}), "loss.queue is 24"),
        (lambda c, _: c.model.med.update({"vocab_size": 99}), "model.med.vocab_size=120"),
        (lambda c, _: c.data.update({"epoch_examples": 9}), "fewer than train.batch"),
        (lambda c, _: c.optim.update({"freeze": ("vitt/.*",)}), "vitt"),
        (lambda c, _: c.mesh.update({"data": 1, "tensor": 8}), "attn/q/kernel"),
        (_vocabulary_without_cls, "[CLS]"),
        (_missing_files, "nowhere.json"),
    ],
    ids=["objective", "batch", "queue", "vocab_size", "epoch", "freeze", "heads", "special tokens", "file list"],
)
def test_mistakes_are_found_before_anything_compiles(cfg, tmp_path, compiled, change, expected):
    change(cfg, tmp_path)
    with pytest.raises(ValueError) as e:
        loop.fit(cfg, tmp_path / "run")
    assert expected in str(e.value)
    assert not compiled


def test_the_checkpoint_of_another_model_is_refused(cut_run, cfg, compiled):
    cfg.model.embed_dim, cfg.model.vit.width, cfg.loss.queue = 8, 96, 64
    with pytest.raises(ValueError) as e:
        loop.fit(cfg, cut_run)
    for part in (
        "checkpoint 3 in",
        "params/text_proj/kernel: checkpoint [32, 16], this config [32, 8]",
        "... and",
        "use another workdir",
        "model.embed_dim: 16 -> 8",
        "loss.queue: 32 -> 64",
    ):
        assert part in str(e.value), part
    assert not compiled and sorted(rows(cut_run)) == [2, 4, 6]  # nothing was touched


def test_a_workdir_of_another_vocabulary_is_refused(cut_run, cfg, tmp_path):
    words = open(cfg.text.vocab).read().rstrip("\n").split("\n")
    (tmp_path / "other.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]) + "\n")
    cfg.text.vocab = str(tmp_path / "other.txt")
    with pytest.raises(ValueError, match="trained with another vocabulary"):
        loop.fit(cfg, cut_run)
    shutil.rmtree(cut_run / "checkpoints")  # nothing was trained with it yet: it may change
    assert loop.prepare(cfg, cut_run).tokenizer.vocab_size == 120
    assert (cut_run / "vocab.txt").read_bytes() == (tmp_path / "other.txt").read_bytes()


def test_init_from_takes_parameters_and_momentum_copies(full_run, cfg, tmp_path):
    cfg.train.init_from = str(full_run)
    run = loop.prepare(cfg, tmp_path / "new")
    with jax.set_mesh(run.mesh):
        state = start.create(run, start.load(run))
    want = dict(trees.paths(checkpoint.load_params(full_run)))
    got = dict(trees.paths(jax.device_get(state.all_params)))
    assert got.keys() == want.keys() and int(state.step) == 0
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)
    copies = dict(trees.paths(jax.device_get(state.extra["params"])))
    for path, x in copies.items():
        np.testing.assert_array_equal(x, want[path], err_msg=path)
    assert (
        state.params["vit"]["blocks"]["mlp"]["fc1"]["kernel"].sharding
        == (run.shardings.params["vit"]["blocks"]["mlp"]["fc1"]["kernel"])
    )
    np.testing.assert_allclose(np.linalg.norm(state.extra["queue"]["img"], axis=1), 1, rtol=1e-5)


def test_parameters_of_another_image_size_are_resized_and_of_another_width_refused(full_run, cfg, capsys):
    params = checkpoint.load_params(full_run / "checkpoints" / "3")
    cfg.model.img_size = 32  # 17 positions instead of 5

    def shapes():
        model = tasks.build(cfg)
        return jax.eval_shape(lambda: initial.init_params(cfg, model, jax.random.key(0)))

    fitted = start.fit_params(params, shapes(), "here")
    assert fitted["vit"]["pos_embed"].shape == (17, 48)
    np.testing.assert_array_equal(fitted["vit"]["pos_embed"][0], params["vit"]["pos_embed"][0])
    np.testing.assert_array_equal(fitted["vit"]["cls"], params["vit"]["cls"])
    assert "position table resized from 5 to 17" in capsys.readouterr().out
    extra = params | {"spare": {"bias": np.zeros(2)}}
    assert "spare" not in start.fit_params(extra, shapes(), "here") and "spare/bias" in capsys.readouterr().out
    cfg.model.embed_dim = 8
    del params["temp"]
    with pytest.raises(ValueError) as e:
        start.fit_params(params, shapes(), "here")
    for part in (
        "here holds another model",
        "text_proj/kernel is [32, 16], this config needs [32, 8]",
        "temp is missing",
    ):
        assert part in str(e.value)


@pytest.mark.parametrize(
    "lost",
    [
        "data",
        "config/metadata",
        "state",
        "state/_METADATA",
        "state/manifest.ocdbt",
        "state/ocdbt.process_0/d",
        "state/d/* cut",
    ],
)
def test_half_a_checkpoint_is_named_with_what_it_lacks(full_run, tmp_path, lost):
    shutil.copytree(full_run / "checkpoints", tmp_path / "checkpoints")
    assert checkpoint.check_folders(tmp_path) == (6, [])
    newest = tmp_path / "checkpoints" / "6"
    pattern, _, cut = lost.partition(" ")
    path = next(newest.glob(pattern))
    if cut:
        path.write_bytes(path.read_bytes()[:-1])
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError) as e:
        checkpoint.check_folders(tmp_path)
    for part in (
        f"checkpoint 6 in {newest.parent} is incomplete",
        str(path.relative_to(newest)),
        "missing",
        f"checkpoint 3 is the newest complete one: move {newest} away to go on from it",
    ):
        assert part in str(e.value), str(e.value)
    with pytest.raises(ValueError, match="checkpoint 6 in .* is incomplete"):
        checkpoint.load_params(tmp_path)
    assert sorted(p.name for p in newest.parent.iterdir()) == ["3", "6"]  # nothing is removed


def test_an_older_half_checkpoint_is_a_warning_and_none_complete_an_error(full_run, tmp_path):
    shutil.copytree(full_run / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "data")
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
    newest, notes = checkpoint.check_folders(tmp_path)
    assert newest == 6 and "3 is incomplete and of no use: data/ is missing" in notes[0]
    assert "an interrupted save left 7.orbax-checkpoint-tmp" in notes[1]
    shutil.rmtree(tmp_path / "checkpoints" / "6" / "state")
    with pytest.raises(ValueError, match="there is no complete one beside it"):
        checkpoint.check_folders(tmp_path)


def test_half_a_converted_checkpoint(tmp_path):
    checkpoint.write(tmp_path, {"params": {"a": np.arange(6.0), "b": np.float32(1)}}, {}, {})
    assert checkpoint.check_folders(tmp_path) == (0, [])
    (tmp_path / "checkpoints" / "0" / "state" / "params.a" / "0").unlink()
    with pytest.raises(ValueError, match=r"state/params\.a/\* is missing"):
        checkpoint.check_folders(tmp_path)


def test_load_params_needs_a_complete_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        checkpoint.load_params(tmp_path)


def test_micro_batches_keep_the_order_of_rows(tiny_cfg):
    mesh = sharding.make_mesh(tiny_cfg.mesh)
    local = {
        "img": np.arange(32)[:, None],
        "ids": np.arange(32),
        "txt_mask": np.ones(32, bool),
        "image_id": np.arange(32) + 2**40,
        "key": ["k"] * 32,
    }
    one, two = loop.to_devices(local, mesh, 1, np.arange(32), 32), loop.to_devices(local, mesh, 2, np.arange(16), 16)
    np.testing.assert_array_equal(one["img"], local["img"])
    np.testing.assert_array_equal(two["ids"], np.arange(32).reshape(2, 16))
    assert two["image_id"].dtype == jnp.int32 and "key" not in one
    assert {s.data.shape for s in two["ids"].addressable_shards} == {(2, 2)}


def test_means_and_the_first_step_that_is_not_finite():
    sums = metrics.zeros(["loss", "temp"])
    for loss in (1.0, 2.0, jnp.inf, 4.0, jnp.nan):
        sums = metrics.add(sums, {"loss": jnp.float32(loss), "temp": jnp.float32(0.5)})
    numbers = metrics.fetch(sums)
    assert numbers["bad"] == 3 and numbers["count"] == 5 and metrics.means(numbers)["temp"] == 0.5
    one = metrics.fetch(metrics.add(metrics.zeros(["loss"]), {"loss": jnp.float32(1 / 3)}))
    again = metrics.fetch(metrics.load(json.loads(json.dumps(one))))
    assert again == one and one["sum"]["loss"] == np.float32(1 / 3)


def test_rows_after_the_restored_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "a": 1}\n{"step": 3}\n{"ste')
    assert metrics.drop_after(path, 2) == [{"step": 1}, {"step": 2, "a": 1}]
    assert path.read_text() == '{"step": 1}\n{"step": 2, "a": 1}\n'
    path.write_text('{"step": 1}\nhello\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        metrics.drop_after(path, 2)
    assert metrics.drop_after(tmp_path / "none.jsonl", 2) == []


def test_the_clock_leaves_out_pauses_and_the_first_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = metrics.Clock()
    now[0] = 100.0  # compilation
    clock.step(50.0, 1e12)
    assert clock.take() is None
    now[0] = 102.0
    clock.step(0.5, 2e12)
    with clock.paused():
        now[0] = 200.0
    now[0] = 202.0
    clock.step(1.5, 6e12)
    assert clock.take() == metrics.Speed(steps=2 / 4, waiting=2 / 4, flops=8e12 / 4, goodput=4 / 202)
    assert clock.take() is None
    now[0] = 210.0
    clock.step(0.0, 0.0)
    assert clock.take() == metrics.Speed(steps=1 / 8, waiting=0.0, flops=0.0, goodput=12 / 210)


def test_a_run_does_not_load_torch_and_leaves_it_importable(tmp_path):
    (tmp_path / "torch.py").write_text("print('torch loaded')\n")
    code = "import blip_jax.train.loop; print('ready'); import tensorboardX, torch"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["ready", "torch loaded"]
