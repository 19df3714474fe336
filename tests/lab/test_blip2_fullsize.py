"""BLIP-2 beside transformers, as benchmarks/blip2_fullsize.py has it at full size, at a tiny one."""

import blip2_fullsize
import numpy as np
import pytest
from PIL import Image
from world.pictures import noise

pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[peers]'")
pytest.importorskip("transformers", reason="transformers is not installed; pip install -e '.[peers]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("weights")
    blip2_fullsize.write_weights(at, blip2_fullsize.settings("eva_tiny", "tiny", "opt_tiny"))
    Image.fromarray(np.asarray(noise(0, 40, 30))).save(at / "photo.png")
    return at


def test_both_sides_do_the_work_and_agree(folder):
    sides, told, jobs = {}, {}, ["caption/1", "answer"]
    for name in ("ours", "transformers"):
        sides[name] = blip2_fullsize.side(name, folder, folder / "photo.png", 1, told, jobs)
        told = sides["ours"]["checked"]
    for side in sides.values():
        assert list(side["s"]) == jobs and all(len(seconds) == 1 for seconds in side["s"].values())
        assert side["load_s"] > 0 and 0.1 < side["peak_gb"] < 100
    assert "a token apart" in blip2_fullsize.agreement(sides)
    assert (
        blip2_fullsize.ratio(sides, "answer")
        == sides["transformers"]["s"]["answer"][0] / sides["ours"]["s"]["answer"][0]
    )
    sides["transformers"]["checked"]["log_prob"] -= 5
    with pytest.raises(ValueError, match="transformers with the same weights is not our model"):
        blip2_fullsize.agreement(sides)


def test_wrong_commands_are_a_line(tmp_path, capsys):
    assert blip2_fullsize.main(["side", "ours", str(tmp_path / "no"), "--image=x.png"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
