"""Frozen parameters: the steps they give, checkpoints without them, and what they are restored from."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from world.processes import Pod, Server
from world.runs import rewrite_data, rows, write_config

import blip_jax
from blip_jax import checkpoint, trees
from blip_jax.console import plain
from blip_jax.convert import origins, read, write
from blip_jax.models.vision.vit import resize_pos_embed
from blip_jax.parallel import sharding
from blip_jax.plan import programs
from blip_jax.tasks import step as steps
from blip_jax.train import loop, start
from blip_jax.train.summary import memory_report

FROZEN = ("vit/.*", "med/embed/.*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("frozen")


@pytest.fixture
def origin(tiny_cfg, folder):
    """Workdir with a first checkpoint of pre-training, of pictures of 16 px."""
    return begun(tiny_cfg, folder / "origin")


@pytest.fixture
def cfg(tiny_cfg, origin):
    """A captioner at 32 px in bfloat16 whose ViT and word table stay those of `origin`: 4 steps, saved after 2 and
    4."""
    return captioner(tiny_cfg, origin)


@pytest.fixture
def finished(cfg, folder):
    """The run of `cfg`."""
    if not (folder / "run").exists():
        loop.fit(cfg, folder / "run")
    return folder / "run"


@pytest.fixture
def moved(finished, origin, tmp_path):
    """A copy of the run and its origin, as another machine would have it: (run, origin)."""
    for path in (finished, origin):
        shutil.copytree(path, tmp_path / path.name)
    return tmp_path / finished.name, tmp_path / origin.name


def begun(cfg, workdir, seed: int = 0):
    """The workdir of a run of `cfg` with a checkpoint 1 of its initial state."""
    if not workdir.exists():
        cfg.seed = seed
        run = loop.prepare(cfg, workdir)
        with jax.set_mesh(run.mesh), checkpoint.open_dir(workdir, 1) as manager:
            checkpoint.save(manager, 1, start.create(run, None).stored, {"step": 1, "crc": 0, "sums": None}, plain(cfg))
        cfg.seed = 0
    return workdir


def captioner(cfg, init_from):
    cfg.objective, cfg.model.img_size, cfg.model.dtype = "caption", 32, "bfloat16"
    cfg.text.prompt, cfg.text.max_len = "a picture of ", 14
    cfg.train.init_from, cfg.optim.freeze = str(init_from), FROZEN
    cfg.train.steps, cfg.train.save_every, cfg.train.log_every = 4, 2, 1
    return cfg


def flat(tree) -> dict:
    return {path: np.asarray(x) for path, x in trees.paths(tree)}


def unpadded(params: dict) -> dict:
    """Parameters without the rows behind the 120 entries of the vocabulary."""
    return params | {path: params[path][:120] for path in ("med/embed/word/embedding", "med/lm_head/bias")}


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and len(a) > 0
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def edit(workdir, change) -> None:
    """Changes what each checkpoint of a workdir says of its frozen parameters."""
    for at in checkpoint.folders(workdir).values():
        rewrite_data(at, lambda data: change(data["frozen"]))


def config_of(workdir):
    """The config that a run was made with."""
    c = ConfigDict(json.loads((workdir / "config.json").read_text()), convert_dict=True)
    c.data.crop_scale, c.optim.freeze = tuple(c.data.crop_scale), tuple(c.optim.freeze)
    return c.unlock()


def cut(workdir) -> pathlib.Path:
    """The workdir as a kill after step 2 would have left it."""
    shutil.rmtree(workdir / "checkpoints" / "4")
    return workdir


# --- steps ------------------------------------------------------------------------------------------------------------
def test_they_are_in_the_dtype_of_the_computation_where_the_layers_round_them(cfg, tmp_path):
    run = loop.prepare(cfg, tmp_path / "run")
    dtypes = {path: str(x.dtype) for path, x in trees.paths(run.shapes.frozen)}
    assert dtypes["vit/blocks/mlp/fc1/kernel"] == dtypes["med/embed/word/embedding"] == "bfloat16"
    assert dtypes["vit/pos_embed"] == dtypes["vit/blocks/mlp/fc1/bias"] == dtypes["med/embed/ln/scale"] == "float32"
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((run.shapes.params, run.shapes.opt[0].mu)))


def test_those_with_momentum_copies_stay_float32(tiny_cfg, tmp_path):
    tiny_cfg.model.dtype, tiny_cfg.optim.freeze = "bfloat16", ("vit/.*", "med/blocks/self_attn_dec/.*")
    run = loop.prepare(tiny_cfg, tmp_path / "run")
    dtypes = {path: str(x.dtype) for path, x in trees.paths(run.shapes.frozen)}
    assert dtypes["vit/blocks/mlp/fc1/kernel"] == "float32"  # the average of it and its copy is taken in float32
    assert dtypes["med/blocks/self_attn_dec/q/kernel"] == "bfloat16"
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(run.shapes.extra["params"]))


@pytest.mark.parametrize("devices", [1, 8])
def test_steps_are_bitwise_those_of_float32(cfg, tmp_path, devices):
    """Two steps from the same parameters, the frozen ones in bfloat16 and in float32."""
    cfg.mesh.data, cfg.mesh.fsdp = (1, 1) if devices == 1 else (4, 2)
    run = loop.prepare(cfg, tmp_path / "run") if devices == 8 else None
    mesh = run.mesh if run else sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    if run is None:
        cfg.mesh.data = 8
        run = loop.prepare(cfg, tmp_path / "run")
    local = next(run.data.batches(0))
    batch = {name: jnp.asarray(x) for name, x in local.items() if name != "key"}
    frozen = flat(read.read(cfg.train.init_from).state["params"])
    frozen["vit/pos_embed"] = resize_pos_embed(frozen["vit/pos_embed"], 17)

    results = []
    for dtype in ("bfloat16", "float32"):
        with jax.set_mesh(run.mesh):
            state = jax.device_get(start.create(run, start.load(run)))
        if dtype == "float32":
            state = state.replace(frozen=trees.nest((path, frozen[path]) for path, _ in trees.paths(state.frozen)))
        assert str(state.frozen["vit"]["blocks"]["mlp"]["fc2"]["kernel"].dtype) == dtype
        with jax.set_mesh(mesh):
            state = jax.device_put(state, sharding.shardings_for(state, mesh))
            step = jax.jit(steps.make_step(cfg, run.model, run.tx, run.epoch_steps))
            for _ in range(2):
                state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
        results.append(flat({"params": state.params, "mu": state.opt[0].mu, "metrics": metrics}))
    same(*results)
    moved = flat(state.params)["med/lm_head/dense/kernel"] - frozen["med/lm_head/dense/kernel"]
    assert np.abs(moved).max() > 0


def test_memory_is_counted_as_it_is(cfg, tmp_path):
    """Frozen matrices take two bytes a number and no gradient, in what a run says and in a plan."""
    run = loop.prepare(cfg, tmp_path / "run")
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    program = programs.train(cfg, run.mesh)[0]
    found = programs.arguments(program)
    assert found["parameters"] == size(run.shapes.params)
    assert found["frozen parameters"] == size(run.shapes.frozen)
    assert found["optimiser"] == size(run.shapes.opt) == 2 * size(run.shapes.params) + 4 * 2
    cfg.optim.freeze = ()
    whole = programs.arguments(programs.train(cfg, run.mesh)[0])
    matrices = sum(x.size for x in jax.tree.leaves(run.shapes.frozen) if x.dtype == jnp.bfloat16)
    both = found["parameters"] + found["frozen parameters"]
    assert whole["parameters"] - both == 2 * matrices > 0.8 * size(run.shapes.frozen)
    state = size(run.shapes.stored.replace(rng=None)) + size(run.shapes.frozen)
    assert f"state {state / 2**30:.3f} GiB + gradients {size(run.shapes.params) / 2**30:.3f} GiB" in memory_report(run)


# --- checkpoints ------------------------------------------------------------------------------------------------------
def test_a_checkpoint_refers_to_them_and_does_not_hold_them(finished, origin, cfg):
    newest = checkpoint.newest(finished)
    held, every = flat(checkpoint.load_params(newest)), flat(read.read(newest).state["params"])
    assert not any(path.startswith(("vit/", "med/embed/")) for path in held) and len(held) > 5
    assert not [path for path in (newest / "state").rglob("*") if "frozen" in path.name]
    assert "'frozen', '" not in (newest / "state" / "_METADATA").read_text()

    reference = checkpoint.load_data(newest)["frozen"]
    at = origin / "checkpoints" / "1"
    assert reference["origins"] == [{"given": str(origin), "at": str(at), "beside": "../origin/checkpoints/1"}]
    assert reference["leaves"].keys() == every.keys() - held.keys()
    used = dict(trees.paths(loop.prepare(cfg, finished).shapes.frozen))
    assert reference["leaves"] == {path: origins.leaf(every[path].astype(x.dtype)) for path, x in used.items()}


def test_a_checkpoint_that_holds_them_is_of_an_earlier_version(cfg, tmp_path):
    run = loop.prepare(cfg, tmp_path / "run")
    with jax.set_mesh(run.mesh), checkpoint.open_dir(run.workdir, 1) as manager:
        checkpoint.save(manager, 1, start.create(run, None), {"step": 1, "crc": 0, "sums": None}, plain(cfg))
    for ask in (lambda: read.read(run.workdir), lambda: loop.fit(cfg, run.workdir)):
        with pytest.raises(ValueError, match="of an earlier version .* frozen parameters were in the checkpoint"):
            ask()


def test_resuming_is_bitwise(finished, moved, capsys):
    run = cut(moved[0])
    cfg = config_of(run)
    loop.fit(cfg, run)
    assert "frozen parameters restored from" in capsys.readouterr().out
    assert rows(run) == rows(finished)
    same(flat(checkpoint.load_params(run)), flat(checkpoint.load_params(finished)))
    assert checkpoint.load_data(run)["frozen"] == checkpoint.load_data(finished)["frozen"]


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_they_are_restored_on_any_mesh(finished, cfg, mesh):
    cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor = mesh
    run = loop.prepare(cfg, finished)
    frozen = start.load_frozen(run, 4)
    assert frozen.reference == checkpoint.load_data(finished)["frozen"]
    want = flat(frozen.params)
    placed = start.placed(frozen.params, run.shardings.frozen)
    same(flat(placed), want)
    assert frozen.params == {}  # each array was let go
    assert not placed["vit"]["blocks"]["mlp"]["fc1"]["kernel"].sharding.is_fully_replicated
    with jax.set_mesh(run.mesh):
        state = start.create(run, start.load(run))
    assert start.reference(run, state, start.located(run)) == frozen.reference


def test_another_dtype_of_the_computation_takes_them_from_the_origin(finished, cfg):
    """Checked as they were used, then used as they are; checkpoints from then on refer to that."""
    cfg.model.dtype = "float32"
    frozen = start.load_frozen(loop.prepare(cfg, finished), 4)
    want = flat(read.read(cfg.train.init_from).state["params"])
    got = flat(frozen.params)
    np.testing.assert_array_equal(got["med/embed/word/embedding"], want["med/embed/word/embedding"])
    assert frozen.reference["leaves"] == {path: origins.leaf(x) for path, x in got.items()}
    assert {leaf["dtype"] for leaf in frozen.reference["leaves"].values()} == {"float32"}


# --- origins that are not what they were ------------------------------------------------------------------------------
def test_an_origin_that_moved_along_or_is_named_anew_is_accepted(finished, moved, origin, folder, tmp_path, capsys):
    run, there = cut(moved[0]), moved[1]
    cfg = config_of(run)
    edit(run, lambda reference: reference["origins"][0].update(at=str(tmp_path / "gone")))
    same(flat(read.read(run).state["params"]), flat(read.read(finished / "checkpoints" / "2").state["params"]))
    there.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError) as e:
        loop.fit(cfg, run)
    leaves = checkpoint.load_data(run)["frozen"]["leaves"]
    for part in (
        f"checkpoint {run / 'checkpoints' / '2'}: its frozen parameters ({origins.summary(leaves)})",
        f"cannot be restored from {tmp_path / 'gone'}",
        "is no file or folder here",
        "name where it lies now with train.init_from",
    ):
        assert part in str(e.value), str(e.value)
    with pytest.raises(ValueError, match="its frozen parameters .* cannot be restored from"):
        blip_jax.from_pretrained(run)

    cfg.train.init_from = str(tmp_path / "elsewhere")
    loop.fit(cfg, run)
    assert rows(run) == rows(finished)
    at = checkpoint.load_data(run)["frozen"]["origins"][0]
    assert at["given"] == cfg.train.init_from and at["at"] == str(tmp_path / "elsewhere" / "checkpoints" / "1")


def test_an_origin_that_changed_is_refused(finished, moved, tiny_cfg, origin, tmp_path):
    run, there = moved
    edit(run, lambda reference: reference["origins"][0].update(at=str(there / "checkpoints" / "1")))
    reference = checkpoint.load_data(run)["frozen"]
    word = reference["leaves"]["med/embed/word/embedding"]
    read.read(run)
    shutil.rmtree(there)
    cfg = config_of(run)
    tiny_cfg.objective, tiny_cfg.model.img_size, tiny_cfg.model.dtype = "pretrain", 16, "float32"
    tiny_cfg.text.prompt, tiny_cfg.train.init_from, tiny_cfg.optim.freeze = "", "", ()
    begun(tiny_cfg, there, seed=1)
    for ask in (lambda: blip_jax.from_pretrained(run), lambda: loop.fit(cfg, run), lambda: convert(run, tmp_path)):
        with pytest.raises(ValueError) as e:
            ask()
        for part in (
            f"checkpoint {run / 'checkpoints' / '4'}: its frozen parameters came from {there / 'checkpoints' / '1'}",
            f"expected {origins.summary(reference['leaves'])}, found {len(reference['leaves'])} parameters, checksum",
            f"med/embed/word/embedding: expected bfloat16[128, 32] {word['crc']}, found bfloat16[128, 32] ",
            "put back what was there",
        ):
            assert part in str(e.value), str(e.value)


def convert(run, folder, to=".pth"):
    out = folder / f"out{to}"
    write.convert(run, out, to="official" if to == ".pth" else "hf")
    return out


def test_the_run_itself_is_no_origin(finished, cfg):
    cfg.train.init_from = str(finished)
    with pytest.raises(ValueError, match="a checkpoint of this run itself"):
        start.load_frozen(loop.prepare(cfg, finished), 4)


def test_what_was_frozen_cannot_change_on_resuming(finished, cfg):
    cfg.optim.freeze = ("vit/.*",)
    run = loop.prepare(cfg, finished)
    with checkpoint.open_dir(finished, 3) as manager, pytest.raises(ValueError) as e:
        start.check_resume(manager, 4, run)
    assert "params/med/embed/word/embedding: only in this config's state" in str(e.value)
    assert "frozen/med/embed/word/embedding: only in the checkpoint" in str(e.value) and "optim.freeze" in str(e.value)


# --- reading ----------------------------------------------------------------------------------------------------------
def test_every_reader_gets_all_parameters(finished, origin, cfg, tmp_path):
    """In float32, as the origin has them: a model, files of others, a run that starts from it, and one that keeps its
    frozen parts."""
    want, first = flat(read.read(finished).state["params"]), flat(read.read(origin).state["params"])
    np.testing.assert_array_equal(want["vit/pos_embed"], resize_pos_embed(first["vit/pos_embed"], 17))
    for path in want:
        if path.startswith(("vit/", "med/embed/")) and path != "vit/pos_embed":
            np.testing.assert_array_equal(want[path], first[path], err_msg=path)
    assert (want["med/lm_head/dense/kernel"] != first["med/lm_head/dense/kernel"]).any()

    model = blip_jax.from_pretrained(finished)
    assert len(model.caption([np.zeros((32, 32, 3), np.uint8)], method="beam")) == 1
    heads = {"heads": {"vit": cfg.model.vit.heads, "med": cfg.model.med.heads}, "vocab": cfg.text.vocab}
    files = (read.read(convert(finished, tmp_path), **heads), read.read(convert(finished, tmp_path, "-hf")))
    for found in files:  # their tables are without the padding of the vocabulary
        same(unpadded(flat(found.state["params"])), unpadded(want))

    cfg.optim.freeze, cfg.train.init_from = ("vit/.*",), str(finished)
    run = loop.prepare(cfg, tmp_path / "next")
    with jax.set_mesh(run.mesh):
        state = start.create(run, start.load(run))
        for path, x in flat(state.all_params).items():
            np.testing.assert_array_equal(x, want[path].astype(x.dtype), err_msg=path)
        data = {"step": 0, "frozen": start.reference(run, state, start.located(run))}
        with checkpoint.open_dir(run.workdir, 1) as manager:
            checkpoint.save(manager, 0, state.stored, data, plain(cfg))
    same(flat(read.read(run.workdir).state["params"]), want)

    there = str(run.workdir / "checkpoints" / "0")
    loop_ = shutil.copytree(finished, tmp_path / "run")
    edit(run.workdir, lambda reference: reference["origins"][0].update(at=str(loop_ / "checkpoints" / "4")))
    same(flat(read.read(run.workdir).state["params"]), want)
    edit(loop_, lambda reference: reference["origins"][0].update(at=there))
    with pytest.raises(ValueError, match=f"in a circle: {there} -> {loop_ / 'checkpoints' / '4'} -> {there}"):
        read.read(run.workdir)


# --- frozen parameters that are random --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


def test_random_ones_are_drawn_again_after_a_run_of_two_processes(tiny_cfg, tmp_path, server):
    """Of two processes and a mesh that splits them; read and gone on with by one process on another mesh."""
    cfg = captioner(tiny_cfg, "")
    cfg.seed, cfg.train.steps = 3, 2
    cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor = 1, 2, 2
    file, run = write_config(cfg, tmp_path / "config.py"), tmp_path / "run"
    pod = Pod(server, tmp_path, 2, 2, ["command", "train", f"--config={file}", f"--workdir={run}"])
    assert pod.ends() == [0, 0], pod.text(0) + pod.text(1)
    reference = checkpoint.load_data(run)["frozen"]
    assert reference["origins"] == [] and reference["random"]["seed"] == 3

    cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor = 4, 2, 1
    prepared = loop.prepare(cfg, tmp_path / "fresh")
    with jax.set_mesh(prepared.mesh):
        fresh = start.create(prepared, None)
        assert start.reference(prepared, fresh, []) == reference
    got = flat(read.read(run).state["params"])
    for path, x in flat(fresh.frozen).items():
        np.testing.assert_array_equal(got[path].astype(x.dtype), x, err_msg=path)
    cfg.train.steps, cfg.seed, cfg.model.init_std = 4, 9, 0.5  # those that drew them count
    assert loop.fit(cfg, run)["step"] == 4
    assert checkpoint.load_data(run)["frozen"] == reference
    same(flat(read.read(run).state["params"]["vit"]), flat(trees.nest(got.items())["vit"]))

    edit(run, lambda reference: reference["random"].update(seed=4))
    with pytest.raises(ValueError, match="came from the random numbers of seed 4, which holds others now: expected"):
        read.read(run)
