"""Plans: a small one really compiled for a TPU.

The analytic part without the compiler, and every mistake said early.
"""

import json
import pathlib
import re

import jax
import pytest

from blip_jax import config
from blip_jax.cli import main
from blip_jax.models.layers import tpu
from blip_jax.plan import aot, chips, plan, programs, reasons, search

CONFIG = """
from blip_jax.config import base, capfilt, source

def get_config():
    c = base("tiny")
    c.model.vit.depth, c.model.med.layers, c.model.img_size, c.model.embed_dim = 3, 1, 16, 16
    c.model.vit.heads = c.model.med.heads = 2
    c.text.max_len = 8
    c.loss.queue, c.loss.group_size = 32, 4
    c.train.batch, c.train.steps = 16, 1000
    with c.data.unlocked():
        c.data.train.world = source("scenes", count=64, size=32)
    {more}
    return c
"""
CAPFILT = """
from blip_jax.config import capfilt, source

def get_config():
    c = capfilt()
    c.captioner = c.filter = "runs/not/yet"
    with c.data.unlocked():
        c.data.sources.web = source("scenes", count=64, size=32)
    return c
"""
has_compiler = pytest.mark.skipif(not aot.installed(), reason="libtpu is not installed: pip install 'blip-jax[tpu]'")


@pytest.fixture
def files(tmp_path):
    """Config files: pretrain, large (of the paper's size), capfilt."""
    written = {
        "pretrain": CONFIG.format(more="pass"),
        "capfilt": CAPFILT,
        "large": (
            "from blip_jax.config import base, source\n\n"
            "def get_config():\n    c = base('large')\n    c.train.steps = 10\n"
            "    with c.data.unlocked():\n        c.data.train.x = source('json', 'x.json')\n    return c\n"
        ),
    }
    for name, text in written.items():
        (tmp_path / f"{name}.py").write_text(text)
    return lambda name: str(tmp_path / f"{name}.py")


def of(path):
    return config_of(pathlib.Path(path).read_text())


def config_of(text):
    space: dict = {}
    exec(compile(text, "config", "exec"), space)
    return space["get_config"]()


@has_compiler
def test_a_small_plan_compiled_for_a_tpu_that_is_not_here(files, tmp_path, capsys):
    out = tmp_path / "plan.json"
    status = main.main(
        ["plan", f"--config={files('pretrain')}", "--topology=v5e:2x2", "--config.mesh.fsdp=2", f"--out={out}"]
    )
    text, made = capsys.readouterr().out, json.loads(out.read_text())
    row = made["programs"][0]
    assert status == 0 and made["fits"] and made["devices"] == 4 and made["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert row["memory"]["activations and temporaries"] > 0 and row["needed"] == sum(row["memory"].values())
    assert row["flops_agree"] == (abs(row["traced_flops"] / row["flops"] - 1) <= 0.02)
    gradients = [c for c in row["collectives"] if c["moves"] == "gradients" and "data" in c["axis"]]
    assert sum(c["count"] for c in gradients) > 3  # ViT: 3 layers
    # half of them on a device, in float32: the bytes of one sum in bfloat16 on this mesh
    once = row["memory"]["parameters"]
    assert once <= sum(c["ici"] for c in row["collectives"] if c["moves"] == "gradients") <= 1.2 * once
    words = [c for c in row["collectives"] if c["moves"] == "gradients" and c["arrays"].startswith("bf16[128,32]")]
    assert [(c["kind"], c["axis"], c["count"], c["ici"]) for c in words] == [
        ("reduce-scatter", "data and fsdp", 1, 128 * 32 * 2 * 3 / 4)
    ]
    kernels = [c for c in row["collectives"] if c["moves"] == "gradients" and c["axis"] in ("data", "fsdp")]
    assert {(c["kind"], c["axis"]) for c in kernels if c["largest"] > 4096} == {
        ("all-reduce", "data"),
        ("reduce-scatter", "fsdp"),
    }
    assert all(once / 2.2 <= c["ici"] <= once / 1.9 for c in kernels if c["largest"] > 4096)
    assert all(c["axis"] != "none" and c["seconds"] > 0 and c["why"] for c in row["collectives"])
    assert row["seconds"]["compute"] == pytest.approx(row["flops"] / 197e12) and row["best_seconds"] == max(
        row["seconds"].values()
    )
    assert made["images_per_s"] == pytest.approx(16 / row["best_seconds"])
    assert made["days"] == pytest.approx(1000 * row["best_seconds"] / 86400)
    assert (
        "it fits" in text and "kinds of less than 1 MiB" in text and "TFLOP a device" in text and "-O0" in made["note"]
    )


@has_compiler
def test_an_evaluation_gathers_the_word_table_in_the_dtype_of_the_computation():
    cfg = config_of(CONFIG.format(more="c.mesh.fsdp = 2"))
    rows = plan.make(plan.request(cfg, chips.topology("v5e:2x2"), "evaluate"))["programs"]
    words = sorted((row["name"], c["arrays"]) for row in rows for c in row["collectives"] if "[128,16]" in c["arrays"])
    assert words == [("encode texts", "bf16[128,16]"), ("re-rank", "bf16[128,16]")]


def test_without_the_compiler_the_analytic_part_and_how_to_get_it(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(aot, "installed", lambda: False)
    out = tmp_path / "plan.json"
    assert main.main(["plan", f"--config={files('large')}", "--topology=v5e:4x8", f"--out={out}"]) == 3
    text, made = capsys.readouterr().out, json.loads(out.read_text())
    row = made["programs"][0]
    assert "pip install 'blip-jax[tpu]'" in text and "gradients" in text and "bound by compute" in text
    # half of the memory is no plan: activations are unknown, and so are memory traffic and the interconnect
    assert made["fits"] is None and "it fits" not in text and "MFU" not in text
    assert re.search(r"NOT DECIDED: the state fits and leaves \d+\.\d+ GiB per device", text)
    assert "by arithmetic alone at most" in text and "memory and interconnect are not counted" in text
    parameters = 474.8e6  # BLIP-L with the decoder's own self-attention and the padded vocabulary
    assert row["memory"]["parameters"] == pytest.approx(4 * parameters, rel=1e-3)
    assert row["memory"]["optimiser"] == pytest.approx(2 * row["memory"]["parameters"], rel=1e-3)
    # in bfloat16
    assert row["gradient_bytes"] == pytest.approx(2 * row["memory"]["parameters"] / 2 * 31 / 32, rel=1e-3)
    # 609.8 a pair with one GPU's columns, here the whole batch's
    assert row["flops"] * 32 / 2880 / 1e9 == pytest.approx(610.6, rel=5e-3)
    with pytest.raises(ValueError, match=re.escape("pip install 'blip-jax[tpu]'")):
        search.run(plan.request(of(files("pretrain")), chips.topology("v5e:2x2")), 1)


def test_without_the_compiler_a_state_that_is_too_large_alone_does_not_fit(files, monkeypatch, capsys):
    monkeypatch.setattr(aot, "installed", lambda: False)
    wide = ["--config.model.vit.width=8192", "--config.model.vit.mlp=32768", "--config.model.vit.heads=64"]
    assert main.main(["plan", f"--config={files('large')}", "--topology=v5e:4x8", *wide]) == 1
    text = capsys.readouterr().out
    assert "it does NOT fit" in text and "GiB too much, before activations" in text
    # of several programs one that is too large decides, and an evaluation is no plan either
    assert main.main(["plan", f"--config={files('large')}", "--topology=v5e:4x8", "--workload=evaluate"]) == 3
    assert "NOT DECIDED" in capsys.readouterr().out


def test_bytes_of_a_split_state_are_those_of_its_shards(files):
    cfg = of(files("pretrain"))
    whole, split = (
        programs.arguments(plan.made(plan.request(c, chips.topology("v5e:2x2")))[0])
        for c in (cfg, config_of(CONFIG.format(more="c.mesh.fsdp = 4")))
    )
    assert split["batch"] == whole["batch"] == 4 * (16 * 16 * 3 + 8 * 4 + 8)
    assert split["queue"] == whole["queue"] == 2 * 32 * 16 * 4 + 4
    assert whole["parameters"] / 4 < split["parameters"] < whole["parameters"] / 3


def test_capfilt_and_evaluation_are_planned_from_sizes(files):
    cfg, four = of(files("capfilt")), chips.topology("v5e:2x2")
    models = [config_of(CONFIG.format(more="pass")) for _ in range(2)]
    request = plan.request(cfg, four, "", *models)
    found = plan.made(request)
    assert [p.name for p in found] == ["caption", "view", "score"] and all(p.images == 256 for p in found)
    for p in [*found, *plan.made(plan.request(models[0], four, "evaluate"))]:
        counted = plan.programs.flops.count_function(p.function, *p.args, trips=p.trips or None)
        assert p.flops == pytest.approx(counted, rel=0.02), p.name


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--topology=v5e:3x5"], r"'v5e:3x5' does not exist.*v5e:4x4"),
        (["--topology=v5p:4x4"], r"3 dimensions.*v5p:2x2x4"),
        (["--topology=v9:2x2"], r"one of v4, v5e, v5p, v6e, v7x"),
        (
            ["--topology=v5e:4x4", "--config.mesh.data=3"],
            r"mesh .data, fsdp, tensor. is .3, 1, 1., 3 devices, but 16 are here",
        ),
        (["--topology=v5e:4x4", "--config.train.batch=24", "--config.loss.queue=0"], r"train.batch is 24.*as 16 or 32"),
        (
            [
                "--topology=v5e:2x2",
                "--slices=3",
                "--config.train.batch=24",
                "--config.loss.queue=0",
                "--config.mesh.fsdp=6",
            ],
            r"mesh.data is 2: it must be a multiple of the 3 slices.*as 3",
        ),
        (["--topology=v5e:2x2", "--workload=capfilt"], r"workload capfilt with a config of training"),
        (["--topology=v5e:2x2", "--workload=evaluate", "--search"], r"--search is for training"),
    ],
)
def test_what_does_not_fit_together_is_said_before_anything_compiles(files, capsys, flags, said):
    assert main.main(["plan", f"--config={files('pretrain')}", *flags]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_capfilt_asks_for_its_models(files, capsys):
    assert main.main(["plan", f"--config={files('capfilt')}", "--topology=v5e:2x2"]) == 2
    assert "--captioner and --filter" in capsys.readouterr().err


def test_chips_and_their_links():
    assert chips.topology("v7x:2x2x1").devices == 8 and chips.topology("v6e:8x8", 2).chips == 128
    assert chips.topology("tpu7x:2x2x1").compiler_name == "tpu7x:2x2x1" and chips.topology("V5E:4x4").shape == (4, 4)
    assert all(chip.largest in chips.shapes(chip) for chip in chips.TPUS.values())
    v5e, v5p = chips.TPUS["v5e"], chips.TPUS["v5p"]
    assert (
        chips.rings(v5e, (4, 8), (4, 8)) == 2
        and chips.rings(v5e, (16, 16), (16, 16)) == 4
        and chips.rings(v5e, (16, 16), (8, 1)) == 1
    )
    assert chips.rings(v5p, (4, 4, 8), (4, 4, 8)) == 6 and chips.rings(v5p, (4, 4, 8), (4, 1, 2)) == 3
    assert chips.peak_flops("TPU v6 lite") == 918e12 and chips.peak_flops("NVIDIA H100 80GB HBM3") == 990e12
    timed = lambda chip, n, links: plan._timed(
        {
            "kind": "all-gather",
            "bytes": 1.2e9,
            "count": 1,
            "devices": n,
            "slices": 1,
            "links": links,
            "axis": "data",
            "op": "",
        },
        chip,
    )["seconds"]
    assert timed(v5e, 4, 2) == pytest.approx(0.9 / 100) and timed(chips.TPUS["v7x"], 4, 2) == pytest.approx(0.9 / 100)
    assert timed(chips.TPUS["v7x"], 2, 0) == pytest.approx(0.6 / 600) and timed(v5e, 1, 0) == 0  # on one chip
    assert chips.peak_flops("TPU7x") == 2307e12 / 2 and chips.peak_flops("cpu") is None


@pytest.mark.parametrize(
    "kind, op, axis, moves",
    [
        (
            "all-reduce",
            "jit(step)/transpose(jvp(Blip.match))/med/blocks/while/body/MedLayer.attend/mlp/fc1/dot_general",
            "data",
            "gradients",
        ),
        ("all-gather", "jit(step)/dynamic_update_slice", "data", "momentum features"),
        ("all-gather", "jit(step)/jvp()/gather", "data", "ids and masks of texts"),
        ("all-gather", "jit(step)/jvp(Blip.encode_image)/vit/while/body/mlp/fc1/dot_general", "fsdp", "parameters"),
        ("all-reduce", "jit(step)/jvp(Blip.encode_image)/vit/while/body/mlp/fc2/dot_general", "tensor", "activations"),
        ("all-reduce", "", "data, between slices", "gradients"),
        ("all-gather", "", "data, between slices", "features and texts"),
        ("all-reduce", "", "data", "gradients and features"),
        ("reduce-scatter", "", "data", "gradients"),
        ("all-gather", "", "data", "gradients and features"),
        (
            "all-gather",
            "jit(step)/jvp(Blip.match)/med/blocks/while/body/MedLayer.attend/cross_attn.cross_attention/vmap()/gather",
            "data in parts of 2",
            "image keys and values",
        ),
        (
            "all-gather",
            "jit(step)/jvp(Blip.match)/med/blocks/while/body/MedLayer.attend/cross_attn.cross_attention/values/shard_map/all_gather",
            "data in parts of 2",
            "image keys and values",
        ),
        (
            "reduce-scatter",
            "jit(step)/transpose(jvp(Blip.match))/med/blocks/while/body/MedLayer.attend/cross_attn.cross_attention/keys/shard_map/reduce_scatter",
            "data",
            "gradients of image keys and values",
        ),
        ("all-gather", "jit(step)/jvp()/shard_map/all_gather", "data in parts of 2", "ids and masks of texts"),
        ("all-reduce", "", "data in parts of 2", "gradients of image keys and values"),
        (
            "all-to-all",
            "jit(step)/transpose(jvp(Blip.match))/med/embed/scatter-add",
            "fsdp",
            "gradients of word states and their ids",
        ),
        (
            "all-to-all",
            "jit(step)/transpose(jvp())/word_table/sharding_constraint",
            "fsdp",
            "gradients of the word table",
        ),
        ("all-gather", "jit(view)/Blip.encode_image/vit/ln_post/convert_element_type", "data", "features and scores"),
        ("all-gather", "jit(view)/Blip.encode_image/vit/while/body/blocks/mlp/fc1/dot_general", "fsdp", "parameters"),
    ],
)
def test_every_big_collective_has_a_reason(kind, op, axis, moves):
    assert reasons.reason(kind, op, axis)[0] == moves


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_an_evaluation_moves_no_gradients(platform):
    for kind in ("all-gather", "all-reduce"):
        found = [reasons.reason(kind, "", "data and fsdp", platform, trains)[0] for trains in (True, False)]
        assert "gradients" in found[0] and found[1] == "features and scores"
    assert reasons.reason("all-gather", "", "fsdp", platform, False)[0] == "parameters"
    end = reasons.reason("all-reduce", "jit(caption)/while/cond/reduce_and", "data", platform, False)
    assert end[0] == "whether every text has ended"


def test_search_tries_the_promising_first_and_drops_what_needs_more(files, monkeypatch):
    tried, gib = [], 2**30
    per_row = {"none": 0.3 * gib, "dots": 0.2 * gib, "full": 0.1 * gib}

    def compiled(request, exact, timeout):
        cfg = request.cfg
        rows = cfg.train.batch // 16
        tried.append((request.mesh, rows, cfg.model.remat))
        needed = per_row[cfg.model.remat] * rows + 0.3 * gib
        row = {"needed": needed, "usable": 15.75 * gib, "bound": "compute"}
        rate = {"none": 3, "dots": 2, "full": 1}[cfg.model.remat] + rows / 1000
        return {"fits": needed < 15.75 * gib, "programs": [row], "images_per_s": rate}

    monkeypatch.setattr(aot, "installed", lambda: True)
    monkeypatch.setattr(plan, "make", compiled)
    monkeypatch.setattr(plan, "table", lambda made: f"plan with {made['images_per_s']}")
    wanted = plan.request(
        config_of(CONFIG.format(more="c.train.batch, c.loss.queue = 1536, 15360")), chips.topology("v5e:4x4")
    )
    found = search.run(wanted, 4)
    # one that is too large says which of its policy are, and what to expect of the next policy
    assert tried == [
        ((16, 1, 1), 64, "none"),
        ((16, 1, 1), 32, "none"),
        ((16, 1, 1), 64, "dots"),
        ((16, 1, 1), 96, "full"),
    ]
    assert found["fits"] and found["tried"][0]["remat"] == "none" and found["tried"][0]["batch_per_device"] == 32
    assert [r["fits"] for r in found["tried"]] == [True, True, True, False]
    assert "does not fit" in search.table(found) and "plan with 3.032" in search.table(found)
    tried.clear()
    assert len(search.run(wanted, 12)["tried"]) == 12 == len(set(tried)) and tried[4] == ((16, 1, 1), 128, "full")
    assert tried[5] == ((2, 8, 1), 32, "none") and {mesh for mesh, *_ in tried[5:]} >= {(1, 16, 1), (8, 1, 2)}


def test_candidates_are_listed_from_the_largest_batch_though_its_groups_are_larger(files):
    """Groups that do not divide a candidate's batch become its rows of a device.

    That means more contrastive columns, and so more FLOPs.
    """
    cfg = config_of(CONFIG.format(more="c.train.batch, c.loss.group_size, c.loss.queue = 96, 6, 9600"))
    found = search.candidates(plan.request(cfg, chips.topology("v5e:4x4")))
    assert [(c.mesh, c.batch, c.remat) for c in found[:6]] == [
        ((16, 1, 1), batch, "none") for batch in (256, 128, 64, 32, 16, 6)
    ]
    assert [c.remat for c in found[:18]] == 6 * ["none"] + 6 * ["dots"] + 6 * ["full"]


def test_the_compiler_says_what_went_wrong(monkeypatch):
    monkeypatch.setattr(aot, "installed", lambda: True)
    with pytest.raises(ValueError, match="took more than"):
        aot.compile_programs({"topology": "v5e:2x2"}, timeout=0.01)
    assert aot._last("W0101 noise\nTraceback:\n  File x\nKeyError: 'mesh'\n") == "KeyError: 'mesh'"


def test_programs_keep_no_arrays():
    cfg = config_of(CONFIG.format(more="pass"))
    made = plan.made(plan.request(cfg, chips.topology("v5e:2x2")))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for p in made for x in jax.tree.leaves(p.args))
    assert config.base().mesh.data == -1 and plan.mesh_shape(cfg, chips.topology("v5e:2x2")) == (4, 1, 1)


def test_what_remat_repeats_is_counted():
    """In float32, whose products on a CPU are those of a TPU in bfloat16."""
    traced, repeated = {}, {}
    for remat in search.REMAT:
        cfg = config_of(CONFIG.format(more=f"c.model.remat, c.model.dtype, c.loss.queue = '{remat}', 'float32', 0"))
        program = plan.made(plan.request(cfg, chips.topology("v5e:2x2")))[0]
        traced[remat] = plan.programs.flops.count_function(program.function, *program.args)
        repeated[remat] = program.recomputed
        assert traced[remat] == pytest.approx(program.flops + program.recomputed, rel=0.02)
    assert {remat: counted - traced["none"] for remat, counted in traced.items()} == repeated
    assert repeated["none"] == 0 < repeated["dots"] < repeated["full"]


@pytest.mark.parametrize("remat", search.REMAT)
def test_what_attentions_kernel_for_tpus_does_more_is_counted(remat, monkeypatch):
    """5 positions, padded to 128; in the momentum pass, too."""
    monkeypatch.setattr(tpu, "LEAST", 5)
    cfg = config_of(CONFIG.format(more=f"c.model.remat, c.model.dtype, c.loss.queue = '{remat}', 'bfloat16', 0"))
    program = plan.made(plan.request(cfg, chips.topology("v5e:2x2")))[0]
    with jax.sharding.use_abstract_mesh(program.args[1]["img"].sharding.mesh):
        counted = plan.programs.flops.count_function(program.function, *program.args)
    assert counted == pytest.approx(program.flops + program.recomputed, rel=0.005) and counted > 3 * program.flops


@pytest.mark.parametrize("platform, dtype", [("tpu", "bfloat16"), ("cpu", "bfloat16")])
def test_capfilts_parameters_are_planned_as_its_devices_keep_them(platform, dtype):
    cfg, device = config.base("tiny"), jax.sharding.AbstractDevice("some device", None, platform)
    mesh = jax.sharding.AbstractMesh(
        (4, 1, 1), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3, abstract_device=device
    )
    params = programs._rounded(cfg, programs._model(cfg, "bfloat16"), mesh)
    assert params["vit"]["blocks"]["mlp"]["fc1"]["kernel"].dtype == dtype


def test_the_creation_of_a_state_is_a_program_and_makes_what_the_step_takes():
    cfg = config_of(CONFIG.format(more="pass"))
    request = plan.request(cfg, chips.topology("v5e:2x2"))
    mesh = jax.sharding.AbstractMesh(
        request.mesh, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    made, (step,) = programs.create(cfg, mesh), programs.train(cfg, mesh)
    assert jax.eval_shape(made.function, *made.args) == jax.eval_shape(lambda state: state, step.args[0])
    assert made.jit["out_shardings"] == jax.tree.map(lambda x: x.sharding, step.args[0])
