"""A name that is no path: asked for on the hub, unless it looks like a path of this machine that was misspelled."""

import pathlib
import sys
import types

import pytest

from blip_jax.convert import hub, read


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Names that the hub was asked for, from a working folder that holds runs/captioner."""
    names = []

    def snapshot_download(name, **_):
        names.append(name)
        (tmp_path / "repository").mkdir(exist_ok=True)
        (tmp_path / "repository" / "model.safetensors").touch()
        return str(tmp_path / "repository")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    (tmp_path / "runs" / "captioner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return names


@pytest.mark.parametrize(
    "name, said",
    [
        ("runs/captionr", "did you mean runs/captioner? (hf://runs/captionr asks the Hugging Face hub)"),
        ("runs/nope", "runs holds captioner (hf://runs/nope asks the Hugging Face hub)"),
        ("./runs/captionr", "did you mean runs/captioner?"),
        ("./x", "holds runs"),
        ("../nope", "no file or folder here: "),
        ("~/no-such-folder-here/x", "there is no folder ~/no-such-folder-here"),
        ("/no/such", "there is no folder /no"),
        ("runs/captioner/nope", "runs/captioner holds nothing"),
    ],
)
def test_what_looks_like_a_path_is_sent_to_nobody(asked, name, said):
    for place in (hub.folder, read.locate):
        with pytest.raises(ValueError) as error:
            place(name)
        assert str(error.value).startswith(f"{name!r} is no file or folder here: ") and said in str(error.value)
    assert asked == []


def test_names_are_asked_for_and_it_is_said(asked, capsys, tmp_path):
    assert hub.folder("Salesforce/blip") == tmp_path / "repository"
    assert (
        capsys.readouterr().err
        == "Salesforce/blip: no file or folder here, so it is looked up on the Hugging Face hub\n"
    )
    for name in ("hf://runs/nope", pathlib.Path("hf://runs/nope")):  # whose slashes a path makes one
        assert hub.folder(str(name)) == tmp_path / "repository"
    assert asked == ["Salesforce/blip", "runs/nope", "runs/nope"]
    with pytest.raises(ValueError, match="no name of the form owner/name"):
        hub.folder("nope")
