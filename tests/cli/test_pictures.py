"""Arguments that name pictures: files, folders with all below them, patterns."""

import pytest

from blip_jax.cli.infer import pictures


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jpg", "a.PNG", "sub/c.webp", "sub/deep/d.Jpeg", "z.tiff", "notes.txt", ".hidden.jpg", ".x/e.jpg"):
        (tmp_path / "p[1]" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p[1]" / name).touch()
    (tmp_path / "p[1]" / "loop").symlink_to(tmp_path / "p[1]")
    return tmp_path / "p[1]"


def test_a_folder_is_all_pictures_below_it(folder, capsys):
    names = ["a.PNG", "b.jpg", "z.tiff", "sub/c.webp", "sub/deep/d.Jpeg"]
    assert pictures([str(folder)]) == [str(folder / name) for name in names]
    assert capsys.readouterr().err == f"{folder}: 5 pictures; 1 other files are left out\n"
    assert pictures([f"{folder}/"]) == [f"{folder}/{name}" for name in names]


def test_patterns_and_what_does_not_exist(folder, capsys):
    assert pictures([f"{folder}/*.jpg", "gone.jpg", f"{folder}/{{a.PNG,z.tiff}}", f"{folder}/notes.txt"]) == [
        f"{folder}/b.jpg", "gone.jpg", f"{folder}/a.PNG", f"{folder}/z.tiff", f"{folder}/notes.txt"
    ]  # fmt: skip
    assert pictures([f"{folder}/*.gif"]) == [f"{folder}/*.gif"] and capsys.readouterr().err == ""
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' holds no picture"):
        pictures([str(folder / "empty")])
