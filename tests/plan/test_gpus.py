"""Plans of GPUs: their descriptions and hosts, what a plan makes of what the compiler found, a small one compiled."""

import json
import math
import re
from types import SimpleNamespace

import pytest
from plan.test_plan import CONFIG, config_of

from blip_jax.cli import main
from blip_jax.plan import aot, chips, gpus, plan, search

GIB = 2**30
FOUND = {  # what the compiler's process gives back for a step on four hosts
    "traced_flops": 0.0,
    "arguments": 0,
    "temporaries": 20 * GIB,
    "code": 0,
    "results": 16,
    "bytes": 33.5e9,
    "seconds": 3.0,
    "collectives": [
        {"kind": "all-reduce", "bytes": 8e8, "count": 2, "arrays": "bf16[12,768,3072] and 9 more", "axis": "data"}
        | {"op": "jit(step)/transpose(jvp(vit))/while/body/dot_general", "devices": 32, "slices": 4, "links": 1},
        {"kind": "all-gather", "bytes": 4e8, "count": 12, "arrays": "bf16[768,3072]", "axis": "fsdp"}
        | {"op": "jit(step)/jvp(vit)/while/body/dot_general", "devices": 8, "slices": 1, "links": 1},
        {"kind": "all-reduce", "bytes": 4, "count": 1, "arrays": "f32[]", "axis": "data"}
        | {"op": "jit(step)/reduce_sum", "devices": 4, "slices": 4, "links": 0},
    ],
}


@pytest.fixture
def file(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG.format(more="c.train.batch, c.loss.queue = 64, 128"))
    return f"--config={tmp_path / 'c.py'}"


@pytest.fixture
def cfg():
    return config_of(CONFIG.format(more="c.train.batch, c.loss.queue = 64, 128"))


@pytest.mark.parametrize("name, teraflops", [("a100", 19.5), ("h100", 67), ("h200", 67), ("b200", 75)])
def test_descriptions_name_their_source_and_are_whole(name, teraflops):
    text, gpu = gpus.target(name), gpus.GPUS[name]
    assert "Data sheet of the" in text.replace("\n# ", " ") and text.count("{") == text.count("}")
    figures = dict(re.findall(r"^\s*(\w+): ([\d.]+)", text, re.M))
    float32 = float(figures["core_count"]) * float(figures["fpus_per_core"]) * 2 * float(figures["clock_rate_ghz"])
    assert float32 == pytest.approx(1000 * teraflops, rel=0.01) and int(figures["registers_per_core_limit"]) == 65536
    # what CUDA reports is a little less than what is sold
    sold = {"a100": 80, "h100": 80, "h200": 141, "b200": 180}[name] * GIB
    assert 0.98 * sold < gpu.hbm < sold and gpu.hbm_rate == float(figures["memory_bandwidth"])
    assert name.upper() in re.search(r'device_description_str: "(.*)"', text)[1]
    assert chips.peak_flops(re.search(r'device_description_str: "(.*)"', text)[1]) == gpu.bf16


def test_hosts_and_how_far_a_group_reaches():
    four = chips.topology("H100:8", hosts=4)
    assert (four.devices, four.chips, four.slices, str(four)) == (32, 32, 1, "4 hosts of h100:8")
    assert str(chips.topology("a100:2")) == "a100:2" and chips.topology("a100:2").one == "a100:2"
    devices = [SimpleNamespace(process_index=i // 8) for i in range(32)]
    assert four.reach(devices) == (4, 1) and four.reach(devices[8:12]) == (1, 1)
    assert four.reach(devices[::8]) == (4, 0) and four.reach(devices[::4]) == (4, 1)


def test_seconds_of_a_collective_over_nvlink_and_the_network():
    def seconds(kind, devices, hosts, links, name="h100"):
        c = {"kind": kind, "bytes": 8e9, "count": 1, "devices": devices, "slices": hosts, "links": links}
        return plan._timed(c | {"axis": "data", "op": ""}, gpus.GPUS[name])["seconds"]

    assert seconds("all-reduce", 8, 1, 1) == pytest.approx(2 * 8 * 7 / 8 / 450)
    assert seconds("all-gather", 8, 1, 1, "b200") == pytest.approx(8 * 7 / 8 / 900)
    # between hosts each GPU's card carries its eighth, while NVLink does the rest
    assert seconds("all-reduce", 32, 4, 1) == pytest.approx(max(2 * 8 * 7 / 8 / 450, 2 * 1 * 3 / 4 / 50))
    assert seconds("all-reduce", 4, 4, 0) == pytest.approx(2 * 8 * 3 / 4 / 50)  # one GPU of each host
    assert seconds("all-reduce", 4, 4, 0, "a100") == pytest.approx(2 * 8 * 3 / 4 / 25)
    assert seconds("all-gather", 1, 1, 0) == 0


@pytest.mark.parametrize("axis", ["data", "fsdp", "data and fsdp"])
def test_sums_without_a_name_are_gradients_that_were_joined(axis):
    """So they stand in a program of the pre-training step for h100:8 on a mesh of data 4 and fsdp 2."""
    c = {"kind": "all-reduce", "bytes": 4e4, "count": 1, "devices": 8, "slices": 1, "links": 1, "axis": axis, "op": ""}
    timed = plan._timed(c, gpus.GPUS["h100"])
    assert timed["moves"] == "gradients" and "slice" not in timed["why"] and "joined" in timed["why"]


@pytest.mark.parametrize(
    "given, share, said",
    [
        ({}, 0.75, ""),
        ({"XLA_CLIENT_MEM_FRACTION": "0.9"}, 0.9, ""),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".95"}, 0.95, ""),
        ({"XLA_CLIENT_MEM_FRACTION": "90"}, 0, "XLA_CLIENT_MEM_FRACTION is '90': it is the share"),
        ({"XLA_CLIENT_MEM_FRACTION": "most"}, 0, "'most'"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.9", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}, 0, "both set"),
    ],
)
def test_a_program_may_have_the_share_of_memory_that_jax_takes(given, share, said, monkeypatch):
    for name in gpus.FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    for name, text in given.items():
        monkeypatch.setenv(name, text)
    if said:
        with pytest.raises(ValueError, match=re.escape(said)):
            chips.topology("h100:8")
    else:
        assert chips.topology("h100:8").chip.usable == pytest.approx(share * gpus.GPUS["h100"].hbm)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--topology=h100:0"], r"'h100:0' does not exist: a host has 1 to 8 GPUs"),
        (["--topology=h100:9"], r"'h100:9' does not exist: .*h100:8 and --hosts"),
        (["--topology=h100"], r"one of a100, h100, h200, b200 and the GPUs of a host, as h100:8"),
        (["--topology=p100:8"], r"one of v4.*; or one of a100, h100, h200, b200"),
        (["--topology=h100:8", "--slices=2"], r"give --hosts"),
        (["--topology=v5e:2x2", "--hosts=2"], r"give --slices"),
        (["--topology=h100:8", "--hosts=0"], r"hosts"),
        (["--topology=h100:8", "--hosts=3", "--config.loss.queue=0"], r"train.batch is 64.*as 48 or 72"),
        (["--topology=h100:8", "--config.mesh.fsdp=3"], r"mesh .*3.* 8 are here"),
        (["--topology=h100:8", "--workload=evaluate", "--search"], r"--search is for training"),
    ],
)
def test_what_does_not_fit_together_is_said_before_anything_compiles(file, capsys, flags, said):
    assert main.main(["plan", file, *flags]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_without_the_compiler_nothing_is_said_to_fit(file, cfg, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpus, "installed", lambda: False)
    out = tmp_path / "plan.json"
    assert main.main(["plan", file, "--topology=h100:8", f"--out={out}"]) == 3
    text, made = capsys.readouterr().out, json.loads(out.read_text())
    assert "pip install 'blip-jax[cuda]'" in text and made["fits"] is None and made["memory_fraction"] == 0.75
    assert "NOT DECIDED" in text and "it fits" not in text and "only the GPU compiler says" in text
    assert re.search(r"of 59\.33 GiB per device: 59\.\d\d GiB free, before activations", text)
    assert made["programs"][0]["seconds"] == {"compute": pytest.approx(made["programs"][0]["flops"] / 990e12)}
    wide = ["--config.model.vit.width=32768", "--config.model.vit.mlp=131072", "--config.model.vit.heads=256"]
    assert main.main(["plan", file, "--topology=h100:8", *wide]) == 1
    assert "it does NOT fit" in capsys.readouterr().out
    four = chips.topology("h100:8", hosts=4)
    for call in (lambda: search.run(plan.request(cfg, four), 1), lambda: aot.compile_programs({"topology": "h100:8"})):
        with pytest.raises(ValueError, match=re.escape(gpus.MISSING)):
            call()


def test_what_the_compiler_found_becomes_a_plan(file, tmp_path, monkeypatch, capsys):
    asked = []

    def compiled(request, exact, timeout):
        asked.append(request)
        return {"programs": [FOUND]}

    monkeypatch.setattr(gpus, "installed", lambda: True)
    monkeypatch.setattr(gpus, "version", lambda: "jax-cuda12-plugin 1.2.3")
    monkeypatch.setattr(aot, "compile_programs", compiled)
    out = tmp_path / "plan.json"
    flags = ["plan", file, "--topology=h100:8", "--config.mesh.fsdp=8", "--hosts=4", f"--out={out}"]
    assert main.main(flags) == 0
    text, made = capsys.readouterr().out, json.loads(out.read_text())
    (request,), (row,) = asked, made["programs"]
    assert (request["topology"], request["hosts"], request["slices"]) == ("h100:8", 4, 1)
    assert request["mesh"] == [4, 8, 1] and made["mesh"] == {"data": 4, "fsdp": 8, "tensor": 1}
    assert made["topology"] == "4 hosts of h100:8" and made["compiler"].startswith("jax-cuda12-plugin 1.2.3, jax ")
    assert row["memory"]["activations and temporaries"] == 20 * GIB and row["needed"] == sum(row["memory"].values())
    # the network carries an eighth of the gradients twice, NVLink all of them, and it is nine times as fast
    kernels, gradients, metrics = row["collectives"]
    assert gradients["dcn"] == 2 * 2 * 1e8 * 3 / 4 and gradients["ici"] == 2 * 2 * 8e8 * 7 / 8
    assert gradients["seconds"] == pytest.approx(max(3e8 / 50e9, 2.8e9 / 450e9)) and gradients["moves"] == "gradients"
    assert kernels["seconds"] == pytest.approx(12 * 4e8 * 7 / 8 / 450e9) and kernels["dcn"] == 0
    assert (kernels["moves"], metrics["moves"]) == ("parameters", "sums for losses and metrics")
    assert row["seconds"]["memory"] == pytest.approx(33.5e9 / 3.35e12) and row["bound"] == "interconnect"
    for words in (
        "32 GPUs, 32 devices, mesh (4, 8, 1)",
        "collective         axis                    times       NVLink      network       ms  what, why",
        "of 59.33 GiB per device: 39.",
        " a GPU, MFU at most",
        "it fits\nnote: compiled for a GPU that is not here: products are cuBLAS's",
        "attention is the plain one",
        "temporaries and memory traffic are upper bounds\nnote: of a GPU's memory 75 % are counted as a program's",
        "XLA_CLIENT_MEM_FRACTION",
    ):
        assert words in text, words
    assert "slice" not in text and "TPU" not in text and "-O0" not in text

    # with less of the memory it does not fit
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.25")
    assert main.main(flags) == 1
    assert re.search(r"of 19\.78 GiB per device: 0\.2\d GiB too much", capsys.readouterr().out)


def test_search_compiles_the_promising_meshes_of_gpus(cfg, monkeypatch, capsys):
    tried = []

    def compiled(request, exact, timeout):
        own = request.cfg
        rows = own.train.batch // 2
        tried.append((request.mesh, rows, own.model.remat))
        row = {"needed": rows * {"none": 1.0, "dots": 0.7, "full": 0.4}[own.model.remat] * GIB, "usable": 59.33 * GIB}
        return {"fits": row["needed"] < row["usable"], "programs": [row | {"bound": "compute"}], "images_per_s": rows}

    monkeypatch.setattr(gpus, "installed", lambda: True)
    monkeypatch.setattr(plan, "make", compiled)
    monkeypatch.setattr(plan, "table", lambda made: f"plan with {made['images_per_s']}")
    with cfg.unlocked():
        cfg.train.batch, cfg.loss.queue = 192, 1920
    found = search.run(plan.request(cfg, chips.topology("h100:2")), 3)
    assert tried == [((2, 1, 1), 64, "none"), ((2, 1, 1), 32, "none"), ((2, 1, 1), 64, "dots")]
    assert found["topology"] == "h100:2" and found["tried"][0]["batch_per_device"] == 64 and found["fits"]
    assert "candidates whose state fits h100:2" in capsys.readouterr().out


@pytest.mark.skipif(not gpus.installed(), reason="jax's CUDA plug-in is not installed: pip install 'blip-jax[cuda]'")
def test_a_small_plan_compiled_for_gpus_that_are_not_here(file, tmp_path, capsys):
    out = tmp_path / "plan.json"
    flags = ["--topology=h100:8", "--hosts=2", "--config.mesh.fsdp=2", f"--out={out}"]
    assert main.main(["plan", file, *flags]) == 0
    text, made = capsys.readouterr().out, json.loads(out.read_text())
    row = made["programs"][0]
    assert made["fits"] and made["devices"] == 16 and made["mesh"] == {"data": 8, "fsdp": 2, "tensor": 1}
    assert "plugin" in made["compiler"] and "it fits" in text and "network" in text
    assert row["memory"]["activations and temporaries"] > 0 and row["needed"] == sum(row["memory"].values())
    assert row["memory"].get("padding of these", 0) < 0.01 * row["needed"]
    # gradients in bfloat16: over fsdp inside a host, over data between the hosts, too
    sums = [c for c in row["collectives"] if c["kind"] in ("all-reduce", "reduce-scatter")]
    gradients = row["memory"]["parameters"] / 2
    over = lambda axis, wire: sum(c[wire] for c in sums if axis in c["axis"])
    assert over("fsdp", "ici") > 0.4 * gradients
    assert 0.4 * gradients / 4 < over("data", "dcn") < 4 * gradients
    assert all(c["axis"] != "none" and c["seconds"] > 0 and c["why"] for c in row["collectives"])
    assert all(c["dcn"] == 0 for c in row["collectives"] if c["axis"] == "fsdp")
    assert any(c["moves"] == "parameters" and c["axis"] == "fsdp" for c in row["collectives"])
    assert row["bytes"] > row["memory"]["parameters"] and math.isfinite(row["best_seconds"])
