"""The names of what the parameters of a run come from."""

from blip_jax.convert import origins


def test_a_comma_separates_only_what_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b,c", " d", "e, f, g"):
        (tmp_path / name).mkdir()
    expected = {
        "": [],
        "a": ["a"],
        "a, x/y": ["a", "x/y"],
        "b,c": ["b,c"],
        "a,b,c": ["a", "b,c"],
        "b,c , a": ["b,c", "a"],
        " d": [" d"],
        "e, f, g,a": ["e, f, g", "a"],
        "e, f": ["e", "f"],
        f"a,{'n' * 300}": ["a", "n" * 300],
    }
    assert {text: origins.names(text) for text in expected} == expected
