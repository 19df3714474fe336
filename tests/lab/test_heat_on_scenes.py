"""benchmarks/localize.py: what it asks for, and what it counts as found."""

import localize as script
import numpy as np
from absl import flags


def test_a_hit_is_the_named_objects_cell():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["localize", "--count=20"])
    scenes = script.pictures(48)
    assert len(scenes) == script.COUNT.value and len({o["colour"] for _, pair in scenes for o in pair}) > 3
    for img, (one, other) in scenes:
        text = script.swapped([one, other]).split()
        assert text[1::4][:2] == [other["colour"], one["colour"]] and text[2::4] == [one["shape"], other["shape"]]
        assert img.shape == (48, 48, 3) and one["colour"] != other["colour"]
        for cell in range(9):
            heat = np.eye(9)[cell].reshape(3, 3)
            assert script.hit(heat, 48, one) == (divmod(cell, 3) == (one["row"], one["col"]))
