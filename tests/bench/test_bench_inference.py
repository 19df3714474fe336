"""The benchmarks of the vision tower and of the filter on tiny models, through the command line."""

import json

import pytest

from blip_jax.bench import inference
from blip_jax.cli import main
from blip_jax.models import flops


def bench(tmp_path, workload, *flags, size="tiny"):
    out = tmp_path / "x.json"
    small = [f"--size={size}", "--img_size=16", "--dtype=float32", "--batch=2", "--rounds=2"]
    assert main.main(["bench", workload, *small, *flags, f"--out={out}"]) == 0
    result = json.loads(out.read_text())
    assert result["workload"] == workload and result["settings"]["batch"] == 2
    (case,) = result["cases"]
    for found in case["sides"].values():
        assert found["images_per_s"] == pytest.approx(2 * case["images"] / sum(found["step_s"]["all"]))
    assert case["compile_s"] > 0 and case["memory"]["bytes"] > 0
    return case


def test_all_devices_work_and_more_texts_cost_more(tmp_path):
    case = bench(tmp_path, "filter", "--texts=3", "--positions=12")
    assert (
        case["images"] == 16 and case["mesh"]["data"] == 8 and list(case["sides"]) == ["ours"] and not case["ours_over"]
    )
    model = inference.Ours(inference.Settings("filter", "tiny", texts=3, positions=12), 16, "float32").config
    assert case["sides"]["ours"]["gflop_per_image"] == pytest.approx(flops.filter_image(model, 12, 3) / 1e9)


def test_answers_by_rank(tmp_path):
    case = bench(tmp_path, "rank", "--positions=12", "--candidates=9", "--k=4", "--answer=6")
    model = inference.Ours(inference.Settings("rank", "tiny"), 16, "float32").config
    needed = flops.rank_image(model, 12, 6, 4, 9)
    assert case["sides"]["ours"]["gflop_per_image"] == pytest.approx(needed / 1e9)


def test_a_round_of_a_dialog(tmp_path, capsys):
    case = bench(tmp_path, "dialog", "--positions=12", "--texts=3", "--caption=6", size="small")
    model = inference.Ours(inference.Settings("dialog", "small"), 16, "float32").config
    needed = sum(flops.dialog(model, 6, 12, 3).values())
    assert case["sides"]["ours"]["gflop_per_image"] == pytest.approx(needed / 1e9)
    assert main.main(["bench", "dialog", "--size=large"]) == 2
    assert "--size=large: dialogs need one width of image and text, not 1024 and 768" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [(["--img_size=17"], "multiple of the patch of 8 pixels"), (["--positions=60"], "texts have 5 to 40")],
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    assert main.main(["bench", "filter", "--size=tiny", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
