"""benchmarks/towers.py: a row for each size of picture, without and with scores (tests/parallel/test_libtpu.py compiles
the kernel)."""

import os

import pytest
import towers


def test_every_picture_size_is_compiled_both_ways(monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(towers, "compiled", lambda args, px, batch, attention: (px, batch, attention, args.exact))
    assert towers.main(["--img_size=224,384", "--batch=64,16"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 224 | 64 | plain | False |",
        "| 224 | 64 | splash | False |",
        "| 384 | 16 | plain | False |",
        "| 384 | 16 | splash | False |",
    ]
    assert os.environ["JAX_OPTIMIZATION_LEVEL"] == "O0"
    with pytest.raises(SystemExit):
        towers.main(["--img_size=224,384", "--batch=64"])
    assert "give one for each" in capsys.readouterr().err
