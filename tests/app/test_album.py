"""Search by words: embeddings computed once and kept, of photographs and a model that are the same."""

import os

import numpy as np
import pytest
from PIL import Image
from world.verbs import close, folder, models, photos  # noqa: F401 (fixtures)

from blip_jax.cli import main
from blip_jax.cli.app.album import Album


@pytest.fixture
def files(tmp_path):
    for i, img in enumerate(photos(11)):
        Image.fromarray(img).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    return [str(tmp_path / f"{i}.png") for i in range(11)] + [str(tmp_path / "bad.jpg")]


class Counted:
    """A model that counts the photographs it looks at."""

    def __init__(self, model):
        self._model, self.looked = model, 0

    def __getattr__(self, name):
        return getattr(self._model, name)

    def features(self, images=None, texts=None):
        self.looked += 0 if images is None else len(images)
        return self._model.features(images, texts)


def test_the_best_are_those_of_match(models, files):
    album, told = Album(models("retrieval"), files), []
    found = album.search("a red star", 5, lambda *at: told.append(at))
    cosines = models("retrieval").match(files[:11], "a red star")["cosine"]
    order = np.argsort(-cosines)[:5]
    assert [file for file, _ in found] == [files[i] for i in order]
    close([cos for _, cos in found], cosines[order])
    assert told[0] == (0, 12) and all(of == 12 and at < 12 for at, of in told)
    assert list(album.bad) == files[11:] and album.bad[files[11]].startswith("not a picture")
    with pytest.raises(ValueError, match="texts is empty"):
        album.search(" ", 5)
    with pytest.raises(ValueError, match="none of the 1 photographs can be used, as .*bad.jpg: not a picture"):
        Album(models("retrieval"), files[11:]).search("a star", 5)


def test_what_was_kept_is_not_computed_again(models, files, tmp_path):
    kept = str(tmp_path / "kept.npz")
    first = Counted(models("retrieval"))
    found = Album(first, files, kept).search("ring", 11)
    assert first.looked == 11 + 1  # and the picture that tells models apart
    again = Counted(models("retrieval"))
    album = Album(again, files, kept)
    assert dict(album.search("ring", 11)) == pytest.approx(dict(found)) and again.looked == 1
    assert album.search("a blue ring", 2) and again.looked == 1

    Image.fromarray(photos(12)[11]).save(files[3])  # one changes, one is new, one goes
    os.utime(files[3], ns=(1, 1))
    Image.fromarray(photos(13)[12]).save(new := str(tmp_path / "new.png"))
    changed = Counted(models("retrieval"))
    found = dict(Album(changed, [*files[1:], new], kept).search("ring", 20))
    assert changed.looked == 2 + 2 and len(found) == 11 and files[0] not in found
    close(found[files[3]], models("retrieval").match(files[3], "ring")["cosine"])

    other = Counted(models("pretrain"))  # another model's are not taken
    found = dict(Album(other, files[:5], kept).search("ring", 20))
    assert other.looked == 1 + 5 + 1
    close(found[files[0]], models("pretrain").match(files[0], "ring")["cosine"])


def test_a_file_of_something_else_is_refused(models, tmp_path):
    for name, content in (("a.npz", b"no archive"), ("b.npz", None)):
        if content:
            (tmp_path / name).write_bytes(content)
        else:
            np.savez(tmp_path / name, x=np.zeros(1))
        with pytest.raises(ValueError, match="is not what `blip-jax app --features` writes"):
            Album(models("retrieval"), ["a.png"], str(tmp_path / name))


def test_models_say_what_they_can_do(models):
    assert models("pretrain").verbs() == ("caption", "match")  # of one text layer: no maps of words
    assert models("caption").verbs() == ("caption",) and models("vqa").verbs() == ("answer",)
    assert models("retrieval").verbs() == ("match",) and models("nlvr").verbs() == ()


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "0.png")
    for wrong, told in (
        ([], "needs --model"),
        (["--model=x", "--features=a.npz"], "without --photos"),
        (["--model=x", f"--photos={tmp_path / 'photos'}", "--features=a.txt"], "ending in .npz"),
        (["--model=x", f"--photos={tmp_path}/none/"], "no such file or folder"),
    ):
        status = main.main(["app", *wrong])
        err = capsys.readouterr().err
        assert status == 2 and told in err, err
