import re

from blip_jax.bench import input as bench


def test_bench_prints_rate_shares_and_memory(capsys):
    assert bench.main(["--examples", "200", "--timed", "20", "--img-size", "32", "--threads", "2"]) == 0
    out = capsys.readouterr().out
    rate = int(re.search(r"(\d+) images/s per core", out).group(1))
    milliseconds, shares = zip(*((float(a), float(b)) for a, b in re.findall(r"([\d.]+) ms +([\d.]+) %", out)))
    assert len(shares) == 5 and abs(sum(shares) - 100) < 0.5
    assert abs(1000 / sum(milliseconds) - rate) < 0.05 * rate + 1
    assert shares[1] == max(shares)  # decoding
    assert re.search(r"grew [\d.]+ MB \(limit 50\)", out)


def test_pictures_are_of_the_size_and_detail_of_photographs(tmp_path):
    bench.write_pictures(tmp_path)
    sizes = [f.stat().st_size for f in tmp_path.glob("*.jpg")]
    assert len(sizes) == 64 and 30_000 < sum(sizes) / 64 < 90_000
