"""benchmarks/revisions.py on two checkouts that only say how long they took."""

import json

import pytest
import revisions

SAYS = """
import json, os, pathlib, sys
flags = dict(arg[2:].split("=", 1) for arg in sys.argv[3:])
assert sys.argv[1:3] == ["bench", "{workload}"] and flags["batch"] == "4"
assert pathlib.Path.cwd() == pathlib.Path(os.environ["PYTHONPATH"])
log = pathlib.Path("../order")
log.write_text((log.read_text() if log.exists() else "") + pathlib.Path.cwd().name[0])
found = {{"step_s": {{"all": [{seconds}, 9.0, {seconds}]}}}}
case = {{"texts": {{"30": found}}}} if "{workload}" == "train" else {{"ours": found}}
pathlib.Path(flags["out"]).write_text(json.dumps({{"cases": [case]}}))
"""


def checkouts(tmp_path, workload, **seconds):
    for name, value in seconds.items():
        package = tmp_path / name / "blip_jax"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(SAYS.format(workload=workload, seconds=value))
    return [str(tmp_path / name) for name in seconds]


@pytest.mark.parametrize("workload", ["train", "caption"])
def test_both_take_turns_and_the_ratio_is_the_median_within_rounds(tmp_path, workload, capsys):
    both = checkouts(tmp_path, workload, old=3.0, new=2.0)
    flags = [f"--workload={workload}", "--dtype=float32", "--rounds=3", f"--out={tmp_path / 'out.json'}"]
    flags += [f"--cache={tmp_path / 'kept'}"]
    assert revisions.main([*both, *flags, "--least=1.5"]) == 0
    assert (tmp_path / "order").read_text() == "on" + "on" + "no" + "on"  # the first two only compile
    (case,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert case["seconds"] == {"old": [3.0] * 3, "new": [2.0] * 3} and case["ratio"] == 1.5
    assert f"| {workload} | base | float32 | 4 | 3 | 2 | 1.500, 1.500, 1.500 | 1.500 |" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["new", "old"]
    assert revisions.main([*both, *flags, "--least=1.6"]) == 1


def test_a_checkout_that_is_none_or_fails_is_named(tmp_path):
    old, new = checkouts(tmp_path, "train", old=1.0, new="nonsense")
    with pytest.raises(ValueError, match="elsewhere is no checkout of blip_jax"):
        revisions.main([old, str(tmp_path / "elsewhere")])
    with pytest.raises(ValueError, match="new failed .status 1.: NameError: name 'nonsense'"):
        revisions.main([old, new, "--workload=train", "--dtype=float32", "--rounds=1"])


def test_seconds_are_those_of_ours():
    step = lambda *seconds: {"step_s": {"all": list(seconds)}}
    assert revisions.steps_of({"texts": {"12": step(1.0), "30": step(2.0, 3.0)}}) == [1.0, 2.0, 3.0]
    assert revisions.steps_of({"ours": step(4.0), "ours_over": {}}) == [4.0]
    assert revisions.steps_of({"sides": {"ours": step(5.0), "transformers": step(6.0)}}) == [5.0]
