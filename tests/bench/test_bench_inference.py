"""The benchmarks of the vision tower and of the filter on tiny models, through the command line."""

import importlib.util
import json

import numpy as np
import pytest

from blip_jax.bench import inference
from blip_jax.cli import main
from blip_jax.models import flops

PEER = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
needs_peer = pytest.mark.skipif(not PEER, reason="torch and transformers are not installed; pip install -e '.[peers]'")


@pytest.fixture
def one_torch_thread():
    """More would wait for those of the other tests."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bench(tmp_path, workload, *flags):
    out = tmp_path / "x.json"
    small = ["--size=tiny", "--img_size=16", "--dtype=float32", "--batch=2", "--rounds=2"]
    assert main.main(["bench", workload, *small, *flags, f"--out={out}"]) == 0
    result = json.loads(out.read_text())
    assert result["workload"] == workload and result["settings"]["batch"] == 2
    (case,) = result["cases"]
    for found in case["sides"].values():
        assert found["images_per_s"] == pytest.approx(2 * case["images"] / sum(found["step_s"]["all"]))
    assert case["compile_s"] > 0 and case["memory"]["bytes"] > 0
    return case


@needs_peer
@pytest.mark.parametrize("workload, outputs", [("encode", {"states"}), ("filter", {"itm", "itc"})])
def test_outputs_are_the_peers_before_both_take_turns(tmp_path, capsys, one_torch_thread, workload, outputs):
    case = bench(tmp_path, workload, "--against=transformers")
    assert set(case["agreement"]) == outputs and all(x <= 1e-4 for x in case["agreement"].values())
    assert case["images"] == 2 and list(case["sides"]) == ["ours", "transformers"]
    ours, theirs = (np.array(case["sides"][s]["step_s"]["all"]) for s in case["sides"])
    assert case["ours_over"]["transformers"] == pytest.approx(np.median(theirs / ours))
    assert f"ours is {np.median(theirs / ours):.2f} times as fast as transformers" in capsys.readouterr().out


def test_without_a_peer_all_devices_work_and_more_texts_cost_more(tmp_path):
    case = bench(tmp_path, "filter", "--texts=3", "--positions=12")
    assert (
        case["images"] == 16 and case["mesh"]["data"] == 8 and list(case["sides"]) == ["ours"] and not case["ours_over"]
    )
    model = inference.Ours(inference.Settings("filter", "tiny", texts=3, positions=12), 16, "float32").config
    assert case["sides"]["ours"]["gflop_per_image"] == pytest.approx(flops.filter_image(model, 12, 3) / 1e9)


def test_a_peer_that_differs_is_refused():
    mine = {"itm": np.array([0.1, 0.9, 0.4], np.float32)}

    class Tensor:  # as torch's
        def __init__(self, x):
            self.x = np.array(x, np.float32)

        float = cpu = lambda self: self
        numpy = lambda self: self.x

    assert inference.agreement(mine, {"itm": Tensor([0.1, 0.9, 0.4])}, "float32") == {"itm": 0.0}
    with pytest.raises(ValueError, match="is not our model: itm differs by"):
        inference.agreement(mine, {"itm": Tensor([0.1, 0.9, 0.41])}, "float32")


@pytest.mark.parametrize(
    "flags, message",
    [(["--img_size=17"], "multiple of the patch of 8 pixels"), (["--positions=60"], "texts have 5 to 40")],
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    assert main.main(["bench", "filter", "--size=tiny", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
