import json
import re

import pytest

from blip_jax.bench import input
from blip_jax.cli import main


def test_bench_prints_and_writes_rate_shares_and_memory(tmp_path, capsys):
    out = tmp_path / "input.json"
    flags = ["bench", "input", "--examples=200", "--timed=20", "--img_size=32", "--threads=2", f"--out={out}"]
    assert main.main(flags) == 0
    text, result = capsys.readouterr().out, json.loads(out.read_text())
    rate = int(re.search(r"(\d+) images/s per core", text).group(1))
    milliseconds, shares = zip(*((float(a), float(b)) for a, b in re.findall(r"([\d.]+) ms +([\d.]+) %", text)))
    assert len(shares) == 5 and abs(sum(shares) - 100) < 0.5
    assert abs(1000 / sum(milliseconds) - rate) < 0.05 * rate + 1
    for stage, ms, share in zip(result["stage_s"], milliseconds, shares, strict=True):
        seconds = result["stage_s"][stage]
        assert (
            seconds > 0
            and ms == pytest.approx(1000 * seconds, abs=0.006)
            and re.search(rf"{re.escape(stage)} .* {share:.1f} %", text)
        ), stage
        assert share == pytest.approx(100 * seconds / sum(result["stage_s"].values()), abs=0.06)
    assert re.search(r"grew [\d.]+ MB \(limit 50\)", text)
    assert (
        result["images_per_s_per_core"] == pytest.approx(1 / sum(result["stage_s"].values()))
        and result["settings"]["timed"] == 20
    )
    assert result["grew_mb"] == pytest.approx(result["resident_mb"][1] - result["resident_mb"][0])


def test_memory_that_grows_beyond_the_limit_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(input, "memory", lambda data, examples: (100.0, 151.0, 1.0))
    assert main.main(["bench", "input", "--examples=64", "--timed=2", "--img_size=32", "--threads=1"]) == 1
    assert "grew 51.0 MB (limit 50)" in capsys.readouterr().out


def test_pictures_are_of_the_size_and_detail_of_photographs(tmp_path):
    input.write_pictures(tmp_path)
    sizes = [f.stat().st_size for f in tmp_path.glob("*.jpg")]
    assert len(sizes) == 64 and 30_000 < sum(sizes) / 64 < 90_000
