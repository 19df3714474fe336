"""benchmarks/gpu: processes side by side with limits, what is kept of compiled programs, kernels of a profile."""

import io
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu"))
import kernels  # noqa: E402
import run  # noqa: E402
import work  # noqa: E402


def test_a_process_that_hangs_is_ended_at_its_limit_and_the_others_go_on(tmp_path, monkeypatch):
    program = "import json, sys, time; name = json.loads(sys.argv[1])['name']; time.sleep(60 * (name == 'hangs'))"
    (tmp_path / "work.py").write_text(program)
    monkeypatch.setattr(run, "HERE", tmp_path)
    log, start = io.StringIO(), time.monotonic()
    cases = [{"name": name, "env": {}, "limit": 2 if name == "hangs" else 40} for name in ("hangs", "ends", "last")]
    first = run.Group(tmp_path, {}, log, start, at_once=2)
    first.run(cases, start + 100)
    said = log.getvalue()
    assert "hangs: ended at its limit" in said and "ends: exit status 0" in said and "last: exit status 0" in said
    late = {"name": "late", "env": {}, "limit": 2, "late": True}
    group = run.Group(tmp_path, {}, log, start, at_once=2)
    assert group.due(cases[0], [(late,)]) and group.due(late, [(late,)]) and not group.due(late, [(cases[0],)])
    no_time = run.Group(tmp_path, {}, log, start, at_once=1)
    no_time.run(cases[1:], time.monotonic())
    assert (first.failed, no_time.failed) == (["hangs"], ["ends", "last"])
    assert "last: not started: no time is left" in log.getvalue()


def test_a_process_without_memory_is_started_once_more_when_the_others_are_done(tmp_path, monkeypatch):
    program = "import json, sys; sys.exit('RESOURCE_EXHAUSTED' if json.loads(sys.argv[1])['name'] == 'large' else 1)"
    (tmp_path / "work.py").write_text(program)
    monkeypatch.setattr(run, "HERE", tmp_path)
    log, start = io.StringIO(), time.monotonic()
    cases = [{"name": name, "env": {}, "limit": 20} for name in ("large", "broken")]
    group = run.Group(tmp_path, {}, log, start, at_once=2)
    group.run(cases, start + 50)
    assert sorted(group.failed) == ["broken", "large"]
    assert log.getvalue().count("large: exit status 1") == 2 and log.getvalue().count("broken: exit status 1") == 1


def test_a_rehearsal_fails_where_a_measurement_did(tmp_path, monkeypatch, capsys):
    (tmp_path / "work.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(run, "HERE", tmp_path / "gpu")
    (tmp_path / "gpu").mkdir(), (tmp_path / "work.py").rename(tmp_path / "gpu" / "work.py")
    out = ["card", f"--out={tmp_path / 'out'}", "--seconds=60"]
    assert (run.main([*out, "--rehearse"]), run.main(out)) == (1, 0)
    assert capsys.readouterr().out.count("without a result: card") == 2


def test_every_measurement_has_a_kind_and_a_name_of_its_own():
    for full in (True, False):
        cases = run.cases(full)
        assert len({case["name"] for case in cases}) == len(cases) and {case["kind"] for case in cases} == set(
            work.KINDS
        )
        assert {case["part"] for case in cases} == set(run.parser().parse_args([]).parts)
        json.dumps(cases)


def test_compiled_programs_come_back_from_their_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PART", 1000)
    cache, out = tmp_path / "cache", tmp_path / "out"
    (cache / "sub").mkdir(parents=True), out.mkdir()
    (cache / "sub" / "small").write_bytes(bytes(range(256)))
    (cache / "large").write_bytes(bytes(4000))
    run.pack(cache, out, most=3)
    assert [path.name for path in out.iterdir()] == ["compiled.tar.0"]
    found = run.unpack(out)
    assert (found / "sub" / "small").read_bytes() == bytes(range(256)) and not (found / "large").exists()


def test_goldens_are_found_by_a_process_that_is_no_test(tmp_path):
    code = "import work; print(work.tests_of_goldens().Case('pretrain', 'pretrain').cfg.objective)"
    root = pathlib.Path(work.__file__).parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "benchmarks" / "gpu")])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "pretrain\n", done.stderr


def test_kernels_are_summed_by_name_and_class_and_overlaps_count_once():
    events = [("loop_add_fusion_1", 0, 2e6), ("loop_add_fusion_22", 1e6, 2e6), ("nvjet_tst_128", 5e6, 4e6)]
    found = kernels.summed(events, steps=2)
    assert found["kernels"] == {"loop_add_fusion": (2.0, 1.0), "nvjet_tst": (2.0, 0.5)}
    assert found["classes"] == {"other fusions": 2.0, "products": 2.0}
    assert found["busy_ms"] == pytest.approx(3.5) and found["span_ms"] == pytest.approx(4.5)
    assert "| nvjet_tst | 2.000 | 0.5 | 50.0 % |" in kernels.table(found)
