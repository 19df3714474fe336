"""JSON in pieces is what json.loads gives, for what is JSON and for what is not."""

import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_jax.data.pieces import parsed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=4),
    max_leaves=12,
)


def both(text):
    """What json.loads and `parsed` make of a text: the value, or the kind of error."""
    for read in (json.loads, parsed):
        try:
            yield read(text)
        except ValueError as e:
            yield type(e)


@settings(max_examples=300, deadline=None)
@given(VALUES, st.sampled_from([None, 1]), st.integers(0, 99), st.sampled_from(' \n,:[]{}"x1'))
def test_it_is_what_json_gives(value, indent, at, mark):
    text = json.dumps(value, indent=indent)
    assert parsed(f" {text}\n") == value
    at = at % len(text)
    for broken in (text[:at], text[:at] + mark + text[at:], text[:at] + text[at + 1 :]):
        first, second = both(broken)
        assert first == second


@pytest.mark.parametrize(
    "text", ["", " ", "[1,]", '{"a":1,}', "[1 2]", '{"a" 1}', "{1:2}", "[]]", "{}{}", "[[]", "[,1]"]
)
def test_what_is_none_is_refused_as_json_refuses_it(text):
    first, second = both(text)
    assert first is second is json.JSONDecodeError


def test_other_threads_have_their_turn():
    """While some seconds of parsing go by, a thread that wakes every 2 ms never waits for all of it."""
    text = json.dumps({"rows": [{"id": i, "answers": [{"answer": "yes"}] * 10} for i in range(20_000)]})
    done, gaps = threading.Event(), []

    def tick():
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.002)
            gaps.append((now := time.perf_counter()) - last)
            last = now

    ticking = threading.Thread(target=tick)
    ticking.start()
    parsed(text)
    done.set()
    ticking.join()
    assert len(gaps) > 5
