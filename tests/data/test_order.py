"""Where a run stands in the order of examples, also when its batch or its windows of texts change on the way."""

import pytest
from world.pictures import encode, noise, write_json

from blip_jax import config
from blip_jax.data import pairs
from blip_jax.data.batches import TrainData
from blip_jax.data.order import Order
from blip_jax.data.text.wordpiece import SPECIAL, Tokenizer

N, LONGEST = 96, 12


def test_places_numbers_and_counts():
    order = Order(step=4, following=32, left=(3, 9), epoch=0.5)
    assert [order.number(place) for place in range(4)] == [3, 9, 32, 33]
    assert order.rest(1) == ((9,), 32) and order.rest(2) == ((), 32) and order.rest(5) == ((), 35)
    assert order.examples(4, 16) == 30 and order.examples(6, 16) == 62
    assert order.epochs(6, 8) == 0.75 and order.ahead(8) == 0 and order.ahead(16) == 4
    assert Order().number(7) == 7 and Order().examples(5, 8) == 40 and Order().ahead(9) == 0


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *(f"w{i}" for i in range(LONGEST))]) + "\n")
    return Tokenizer(path)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """Records with texts of 1 to 10 words."""
    rows = [
        {
            "key": f"{i:02d}",
            "image": encode(noise(i, 8, 8)),
            "image_id": f"id{i}",
            "captions": [" ".join(f"w{k}" for k in range(1 + i * 7 % 10))],
        }
        for i in range(N)
    ]
    return config.source("json", str(write_json(tmp_path_factory.mktemp("web"), rows)))


class Trained:
    """A run as far as its data go."""

    def __init__(self, web, tok, path):
        self.web, self.tok, self.path = web, tok, path
        self.step, self.order, self.keys, self.before = 0, Order(), [], None

    def data(self, batch, window, buckets):
        cfg = config.base("tiny")
        with cfg.unlocked():
            cfg.data.train.web = self.web
            cfg.model.img_size, cfg.text.max_len, cfg.train.batch = 8, LONGEST, batch
            cfg.text.buckets, cfg.text.bucket_window = buckets, window
            cfg.data.threads = cfg.data.prefetch = 1
        return TrainData(
            cfg, self.tok, pairs, process_index=0, process_count=1, skipped_path=self.path / "skipped.jsonl"
        )

    def go_on(self, steps, batch, window=1, buckets=()):
        """So many steps more with another batch."""
        data = self.data(batch, window, buckets)
        now = {"batch": batch, "bucket_window": window, "buckets": buckets, "max_len": LONGEST}
        if self.before not in (None, now):
            left, following = data.unseen(self.step, self.order, **self.before)
            self.order = Order(self.step, following, left)
        assert self.order.examples(self.step, batch) == len(self.keys)
        with data.batches(self.step, self.order) as batches:
            self.keys += [key for _ in range(steps) for key in next(batches)["key"]]
        self.step, self.before = self.step + steps, now
        return self


def test_another_batch_goes_on_at_the_next_example(web, tok, tmp_path):
    whole = Trained(web, tok, tmp_path).go_on(1, N).keys
    changed = Trained(web, tok, tmp_path).go_on(4, 8).go_on(1, 16).go_on(2, 4).go_on(5, 8)
    assert changed.keys == whole and len(set(whole)) == N
    assert changed.order == Order(7, 56)


def test_what_a_window_of_texts_has_left_comes_first(web, tok, tmp_path):
    """Each example of a window is seen once, whatever batch, window or buckets follow in its middle."""
    whole = Trained(web, tok, tmp_path).go_on(1, N).keys
    short = (6, LONGEST)
    run = Trained(web, tok, tmp_path).go_on(2, 8, 4, short)  # 16 of the first window's 32
    assert sorted(run.keys) != sorted(whole[:16])
    run.go_on(1, 4, 4, short)
    assert len(run.order.left) == 16 and set(run.keys) < set(whole[:32])
    run.go_on(3, 4, 4, short)  # to the end of a window of 16, those left
    assert set(run.keys) == set(whole[:32]) and len(run.keys) == 32
    run.go_on(1, 8, 3, (5, 8, LONGEST)).go_on(1, 8)  # and windows switched off
    assert len(set(run.keys)) == 48 and run.order.left and set(run.keys) < set(whole[:56])
    run.go_on(1, 8)
    assert set(run.keys) == set(whole[:56])


def test_a_run_that_is_cut_again_has_the_same_batches(web, tok, tmp_path):
    setting = (4, 4, (6, LONGEST))
    one = Trained(web, tok, tmp_path).go_on(2, 8, 4, (6, LONGEST)).go_on(5, *setting)
    two = Trained(web, tok, tmp_path).go_on(2, 8, 4, (6, LONGEST)).go_on(3, *setting).go_on(2, *setting)
    assert one.keys == two.keys and one.order == two.order
