"""BLIP-2 beside KerasHub at a tiny size: logits agree, then both take turns."""

import importlib.util
import json

import against_kerashub
import numpy as np
import pytest

# It brings TensorFlow, so that the extras which the tests install are without it.
needs_keras_hub = pytest.mark.skipif(
    importlib.util.find_spec("keras_hub") is None, reason="keras-hub is not installed; pip install -e '.[kerashub]'"
)


@needs_keras_hub
@pytest.mark.parametrize("llm", ["opt", "t5"])
def test_logits_agree_and_both_take_turns(llm, tmp_path, capsys):
    out = tmp_path / "x.json"
    flags = [f"--llm={llm}", "--size=tiny", "--captions=2", "--batch=2", "--tokens=3", "--rounds=2", f"--out={out}"]
    assert against_kerashub.main(flags) == 0, capsys.readouterr().err
    (case,) = json.loads(out.read_text())["cases"]
    assert case["logit_difference"] <= 1e-4 and list(case["captions"]) == ["2"]
    told = case["captions"]["2"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in told["s"].values())
    assert told["median"] == pytest.approx(np.median(np.array(told["s"]["kerashub"]) / told["s"]["ours"]))
    assert "first call" in capsys.readouterr().out


def test_an_unknown_language_model_is_a_line(capsys):
    assert against_kerashub.main(["--llm=llama"]) == 2
    assert "error: --llm names llama: choose of opt, t5" in capsys.readouterr().err
