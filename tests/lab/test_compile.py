"""benchmarks/compile.py: a program really compiled for a TPU.

And what becomes of one that is refused, crashes or hangs.
"""

import importlib.util
import json
import pathlib
import re
import subprocess

import jax
import pytest

from blip_jax.parallel import sharding
from blip_jax.plan import aot, gpus

path = pathlib.Path(__file__).parents[2] / "benchmarks" / "compile.py"
# not by name, which is a built-in function's, too
spec = importlib.util.spec_from_file_location("benchmarks_compile", path)
compiling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiling)

TINY = ["--size=tiny", "--img_size=16", "--batch=8"]


@pytest.mark.skipif(not aot.installed(), reason="libtpu is not installed: pip install 'blip-jax[tpu]'")
def test_the_creation_of_a_state_is_compiled_for_a_tpu(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert compiling.main(["--platform=v5e:2x2", "--program=state", "--text_layers=1", *TINY, f"--out={out}"]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert "error" not in row, row
    assert row["compile_cpu_s"] > 0 and row["hlo_lines"] > 100 and row["fusions"] > 0 and row["arguments_gib"] < 1e-6
    assert "| state | pretrain | v5e:2x2 | 8 | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["caption", "view", "match"])
def test_the_programs_of_capfilt_are_those_of_a_size(program):
    args = compiling.parser().parse_args(["--task=vqa,nlvr", f"--program={program},state", *TINY])
    case, *states = compiling.cases(args)
    assert case["task"] == "capfilt" and [c["task"] for c in states] == ["vqa", "nlvr"]
    mesh = jax.sharding.AbstractMesh((1, 1, 1), sharding.MESH, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    made = compiling.program(case, mesh)
    assert made.images == 8 and made.name == compiling.OF_CAPFILT[program]


@pytest.mark.parametrize("task", ["retrieval", "caption", "vqa", "nlvr", "blip2_stage1_tiny", "blip2_opt_tiny"])
def test_a_task_has_a_state_and_a_step(task):
    args = compiling.parser().parse_args([f"--task={task}", *TINY])
    mesh = jax.sharding.AbstractMesh((1, 1, 1), sharding.MESH, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    state, step = (compiling.program(case, mesh) for case in compiling.cases(args))
    assert step.images == 8 and jax.eval_shape(state.function, *state.args) == jax.eval_shape(lambda x: x, step.args[0])


def test_an_objective_of_blip2_alone_says_no_model():
    (case,) = compiling.cases(compiling.parser().parse_args(["--task=blip2_stage2", "--program=step", *TINY]))
    with pytest.raises(ValueError, match="--task=blip2_stage2: .*model has no llm.* give one of .*blip2_opt2.7b"):
        compiling.program(case, None)


def test_cases_are_all_combinations_but_a_state_has_no_batch():
    args = compiling.parser().parse_args(["--platform=h100,v5e:2x2", "--text_layers=12,24", "--batch=8,128"])
    found = [(c["platform"], c["program"], c["text_layers"], c["batch"]) for c in compiling.cases(args)]
    assert len(found) == len(set(found)) == 2 * 2 * (1 + 2)
    assert ("h100", "step", 24, 128) in found and ("h100", "state", 24, 128) not in found
    with pytest.raises(ValueError, match="loss is none of state, step, caption"):
        compiling.cases(compiling.parser().parse_args(["--program=state,loss"]))


@pytest.mark.parametrize(
    "outcome, message",
    [
        (subprocess.TimeoutExpired("python", 70.0), "not done after 70 s"),
        (subprocess.CompletedProcess("python", -24, "", ""), "not done after 7 processor s"),
        (subprocess.CompletedProcess("python", -11, "", "noise\n"), r"the compiler crashed \(signal 11\): noise"),
        (
            subprocess.CompletedProcess("python", 1, "", "Traceback:\n  File x\nKeyError: 'tensor'\n"),
            "KeyError: 'tensor'",
        ),
        (None, "'scf.if' does not match"),
    ],
)
def test_what_does_not_compile_is_a_row_and_the_others_go_on(outcome, message, monkeypatch, tmp_path, capsys):
    def run(command, **how):
        case = json.loads(command[2].removeprefix("--worker="))
        out = pathlib.Path(command[3].removeprefix("--out="))
        if case["program"] == "state":
            out.write_text(
                json.dumps(
                    {"lower_cpu_s": 3.0, "compile_cpu_s": 12.34, "hlo_lines": 69558, "fusions": 76, "products": 0}
                )
            )
        elif outcome is None:
            out.write_text(json.dumps({"lower_cpu_s": 4.0, "error": "'scf.if' does not match"}))
        elif isinstance(outcome, Exception):
            raise outcome
        return outcome if case["program"] == "step" and outcome else subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(compiling.subprocess, "run", run)
    assert compiling.main([*TINY, "--program=step,state", "--limit=7", f"--out={tmp_path / 'out.json'}"]) == 0
    refused, compiled = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert re.search(message, refused["error"]) and compiled["hlo_lines"] == 69558 and "error" not in compiled
    text = capsys.readouterr().out
    assert "| state | pretrain | h100 | 8 | 0 | 3.00 | 12.3 | 69,558 | 76 | 0 | – | – |" in text
    assert re.search(rf"^\[1\] .*{message}", text, re.M)


def test_a_gpu_is_compiled_for_as_plans_do():
    """With what the environment adds behind the flags of plans."""
    case = {"platform": "h100", "exact": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_mine=1")
        made = compiling.environment(case)
    assert made["XLA_FLAGS"] == f"{gpus.FLAGS} --xla_mine=1" and made["JAX_PLATFORMS"] == "cpu"
