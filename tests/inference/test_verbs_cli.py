"""The verbs from the shell.

Same results, pictures that cannot be used beside others that can, one line for a mistake.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from world.verbs import QUESTIONS, close, folder, models, photos, tokens  # noqa: F401 (fixtures)

import blip_jax
from blip_jax.cli import main

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def files(tmp_path):
    for i, img in enumerate(photos(6)):
        Image.fromarray(img).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("hello")
    return [str(tmp_path / f"{i}.png") for i in range(6)]


def test_caption_from_the_shell(folder, models, files, capsys):
    want = [own[0]["caption"] for own in models("caption").caption(files)]
    assert main.main(["caption", *files, f"--model={folder / 'caption'}"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{file}: {text_}" for file, text_ in zip(files, want)]
    assert "first result" in err and "images/s" in err and "peak memory" in err and "6 images done" in err
    notes = files[0].replace("0.png", "notes.txt")
    assert (
        main.main(
            [
                "caption",
                files[0],
                notes,
                "--model",
                str(folder / "caption"),
                "gone.jpg",
                *files[1:],
                "--json",
                "--n=2",
                "--method=nucleus",
                "--seed=3",
            ]
        )
        == 1
    )
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    by_name = {row["image"]: row for row in rows}
    assert (
        len(rows) == 8 and "not a picture" in by_name[notes]["error"] and "no such file" in by_name["gone.jpg"]["error"]
    )
    want = models("caption").caption(files, 2, "nucleus", seed=3)
    for file, own in zip(files, want):
        assert [c["caption"] for c in by_name[file]["captions"]] == [c["caption"] for c in own]
    assert (
        f"error: {notes}: not a picture" in err
        and "error: gone.jpg: no such file" in err
        and "2 could not be used" in err
    )
    assert main.main(["caption", notes, f"--model={folder / 'caption'}"]) == 1 and capsys.readouterr().out == ""


def test_match_answer_and_features_from_the_shell(folder, models, files, tmp_path, capsys):
    assert (
        main.main(
            ["match", *files[:2], "--text=a red star", "--text", "ring", f"--model={folder / 'retrieval'}", "--json"]
        )
        == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    want = models("retrieval").match(files[:2], ["a red star", "ring"], every_pair=True)
    close([[m["probability"] for m in row["matches"]] for row in rows], want["probability"])
    close([[m["cosine"] for m in row["matches"]] for row in rows], want["cosine"])
    assert main.main(["match", files[0], "--text=ring", f"--model={folder / 'retrieval'}"]) == 0
    assert f"{files[0]}: probability {want['probability'][0, 1]:.4f}" in capsys.readouterr().out

    asked = [
        "answer",
        *files[:2],
        f"--question={QUESTIONS[0]}",
        "--question",
        QUESTIONS[1],
        f"--model={folder / 'vqa'}",
    ]
    assert main.main(asked) == 0
    want = models("vqa").answer([files[0], files[0], files[1], files[1]], QUESTIONS[:2] * 2)
    assert capsys.readouterr().out.splitlines() == [
        f"{files[i // 2]}: {QUESTIONS[i % 2]} {a['answer']}" for i, a in enumerate(want)
    ]
    (tmp_path / "answers.txt").write_text("red\n\nblue\na small star\n", encoding="utf-8-sig")
    assert main.main([*asked, f"--answers={tmp_path / 'answers.txt'}", "--json"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    want = models("vqa").answer(files[0], QUESTIONS[0], method="rank", answers=["red", "blue", "a small star"])
    assert row["answers"][0]["answer"] == want["answer"] and row["answers"][0]["question"] == QUESTIONS[0]

    out, notes = tmp_path / "f.npz", files[0].replace("0.png", "notes.txt")
    assert (
        main.main(
            [
                "features",
                files[0],
                notes,
                files[1],
                "--text=star",
                "--text=no",
                "--text=ring",
                f"--model={folder / 'pretrain'}",
                f"--out={out}",
            ]
        )
        == 1
    )
    assert "multimodal_embeds" in capsys.readouterr().out
    got = np.load(out)
    assert got["images"].tolist() == files[:2] and got["texts"].tolist() == ["star", "ring"]
    close(got["multimodal_embeds"], models("pretrain").features(files[:2], ["star", "ring"])["multimodal_embeds"])
    assert main.main(["features", "--text=ring", f"--model={folder / 'pretrain'}", f"--out={out}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arrays"]["text_embeds"] == [
        1,
        int(tokens(models("pretrain"), "ring")[1].sum()),
        32,
    ]


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["caption", "a.png"], "needs --model"),
        (["caption", "--model=x"], "needs pictures"),
        (["match", "a.png", "--model=x"], "needs --text"),
        (["answer", "--model=x"], "needs --question and pictures"),
        (["features", "--model=x", "--out=a.npz"], "needs pictures, or texts"),
        (["features", "--model=x", "a.png", "--out=a.npy"], "give a file ending in .npz"),
        (["caption", "a.png", "--model=x", "--n=two"], "--n=two"),
        (["caption", "a.png", "--model=x", "--nn=2"], "nn"),
        (["caption", "a.png", "--model=no/such/folder"], "is no file or folder here"),
    ],
)
def test_wrong_commands_are_one_line(argv, expected, capsys):
    assert main.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and expected in err and err.count("\n") == 1


def test_a_fresh_process_keeps_what_it_compiles_and_needs_no_torch(folder, files, tmp_path):
    """Lazy names, the user's cache folder, and no import of torch or transformers."""
    program = (
        "import sys, blip_jax\nassert 'jax' not in sys.modules and blip_jax.__version__ and 'from_pretrained' in "
        "dir(blip_jax)\n"
        "sys.modules.update(torch=None, transformers=None, huggingface_hub=None)\nfrom blip_jax.cli import main\n"
        f"status = main.main(['caption', {files[0]!r}, '--model={folder / 'caption'}'])\n"
        "assert blip_jax.Blip.__name__ == 'Blip'\nsys.exit(status)"
    )
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(files[0]) and any((tmp_path / "cache" / "blip_jax").iterdir())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = blip_jax.nothing


def test_a_folder_of_pictures_from_the_shell(folder, models, files, tmp_path, capsys):
    want = [own[0]["caption"] for own in models("caption").caption(files)]
    for given in (str(tmp_path), f"{tmp_path}/*.png", f"{tmp_path}/{{0..5}}.png"):
        assert main.main(["caption", given, f"--model={folder / 'caption'}"]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines() == [f"{file}: {text_}" for file, text_ in zip(files, want)] and "6 images done" in err
