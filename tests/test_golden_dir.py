"""Goldens of elsewhere: the cases that a folder has come from it, the others are the project's own."""

import pytest
from world import golden


def test_golden_cases_come_from_the_folder_that_has_them(tmp_path, monkeypatch):
    monkeypatch.setenv("GOLDEN_DIR", str(tmp_path))
    (tmp_path / "blip" / "vqa").mkdir(parents=True)
    assert golden.folder("blip/vqa") == tmp_path / "blip" / "vqa"
    for case in ("blip/nlvr", "blip2/keys", "scores/visdial"):
        assert golden.folder(case) == golden.OWN / case and golden.folder(case).is_dir()
    monkeypatch.setenv("GOLDEN_DIR", "")
    assert golden.folder("blip/vqa") == golden.OWN / "blip" / "vqa"


def test_a_folder_without_cases_is_no_folder_of_goldens(tmp_path, monkeypatch):
    monkeypatch.setenv("GOLDEN_DIR", str(tmp_path / "golde"))
    with pytest.raises(ValueError, match=r"golde': it has no folder blip, blip2 or scores"):
        golden.folder("blip/vqa")
