"""The command line: mistakes are one line, commands do what they say."""

import json
import pathlib
import re

import numpy as np
import pytest
from world.runs import write_config

from blip_jax.cli import main
from blip_jax.config import source
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.demo import stages
from blip_jax.eval import recall

PRETRAIN = pathlib.Path(__file__).parents[2] / "configs" / "pretrain.py"


@pytest.fixture
def config_file(tiny_cfg, tmp_path):
    with tiny_cfg.data.unlocked():
        tiny_cfg.data.eval.world = source("scenes", count=20, size=32, seed=1)
    tiny_cfg.eval.batch, tiny_cfg.eval.k = 16, 4
    return write_config(tiny_cfg, tmp_path / "config.py")


def fails(capsys, *argv) -> str:
    """The one line that the command says before it ends with status 2."""
    assert main.main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    "flag, expected",
    [
        ("--config.optim.lrr=1", "optim has no key 'lrr'; did you mean optim.lr?"),
        ("--config.optm.lr=1", "the config has no key 'optm'; did you mean optim?"),
        ("--config.loss.zzz=1", "loss has no key 'zzz'; it has alpha,"),
        ("--config.optim.lr.x=1", "optim.lr has no key 'x'; it has no leaves"),
        ("--config.data.train.web.path=x", "data.train has no key 'web'; it has world"),
        ("--noconfig.loss.momentun", "did you mean loss.momentum?"),
        ("--config.optim.lr=fast", "could not convert string to float: 'fast'"),
        ("--config.train.batch=8.5", "--config.train.batch=8.5"),
        ("--workdi=x", "workdi"),
        ("extra", "unexpected argument 'extra'"),
        ("--config.loss.queue=7", "loss.queue is 7"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(config_file, tmp_path, capsys, flag, expected):
    err = fails(capsys, "train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}", flag)
    assert expected in err
    assert err.count("\n") == 1 or "problem" in err
    assert not (tmp_path / "run").exists()


def test_wrong_commands_and_files(config_file, tmp_path, capsys):
    assert "unknown command 'trian'" in fails(capsys, "trian")
    assert "needs --config and --workdir" in fails(capsys, "train")
    assert "needs --workdir" in fails(capsys, "evaluate", f"--config={config_file}")
    assert "nowhere.py" in fails(capsys, "train", f"--config={tmp_path / 'nowhere.py'}", "--workdir=x")
    flags = [f"--config={config_file}", f"--workdir={tmp_path}"]
    assert "holds no complete checkpoint" in fails(capsys, "evaluate", *flags)
    bad = tmp_path / "bad.py"
    bad.write_text("from blip_jax.config import base\ndef get_config():\n    c = base('tiny')\n    c.optim.lrr = 1\n")
    assert "lrr" in fails(capsys, "train", f"--config={bad}", "--workdir=x")
    assert main.main([]) == 2 and main.main(["--help"]) == 0 and "usage" in capsys.readouterr().out


def test_a_config_file_with_several_runs(capsys):
    assert fails(capsys, "train", f"--config={PRETRAIN}:vith", "--workdir=x") == (
        "error: configs/pretrain.py has no run 'vith': give one of :vitb,14m, :vitb,129m, :vitl,129m, "
        ":vitb,14m,bootstrapped, "
        ":vitb,129m,capfilt_l after it\n"
    )
    for command in (["train", "--workdir=x"], ["plan", "--topology=v5e:2x2"], ["bench", "train"]):
        err = fails(capsys, *command, f"--config={PRETRAIN}:vitl,129m", "--config.model.vit.widht=8")
        assert "model.vit has no key 'widht'; did you mean model.vit.width?" in err


def test_debug_shows_where_an_error_came_from(monkeypatch):
    monkeypatch.setenv("BLIP_JAX_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown command"):
        main.main(["trian"])


def test_vocab_from_files_and_scenes(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a red dog\na red cat\n" * 3)
    (tmp_path / "b.json").write_text(json.dumps([{"caption": ["blue zebra"] * 4}, {"caption": "blue zebra"}]))
    out = tmp_path / "vocab.txt"
    assert (
        main.main(
            [
                "vocab",
                f"--captions={tmp_path / 'a.txt'}",
                f"--captions={tmp_path / 'b.json'}",
                "--size=60",
                f"--out={out}",
            ]
        )
        == 0
    )
    assert "60 entries from 11 captions" in capsys.readouterr().out
    words = out.read_text().split("\n")
    assert "zebra" in words and "dog" in words
    assert main.main(["vocab", "--scenes=200", "--size=100", f"--out={out}"]) == 0
    assert "model.med.vocab_size=102" in capsys.readouterr().out and Tokenizer(out).vocab_size == 102
    assert "give captions" in fails(capsys, "vocab", "--size=60", f"--out={out}")
    (tmp_path / "c.json").write_text('{"caption": "x"}')
    assert "c.json is no list of rows" in fails(capsys, "vocab", f"--captions={tmp_path / 'c.json'}", f"--out={out}")
    assert "gone.txt" in fails(capsys, "vocab", f"--captions={tmp_path / 'gone.txt'}", f"--out={out}")


def test_train_and_evaluate(config_file, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [f"--config={config_file}", f"--workdir={run}"]
    assert main.main(["train", *flags, "--config.train.log_every=3"]) == 0
    assert '"log_every": 3' in (run / "config.json").read_text()
    evaluated = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()

    assert main.main(["evaluate", *flags]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert result["checkpoint"] == str(run / "checkpoints" / "6")
    for name, value in evaluated.items():
        if name != "step":
            assert result[name.removeprefix("eval/")] == pytest.approx(value), name
    assert re.search(r"text to image, chance +5\.0 +25\.0 +50\.0", capsys.readouterr().out)
    assert main.main(["evaluate", *flags, f"--checkpoint={run / 'checkpoints' / '3'}"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["checkpoint"].endswith("/3")
    capsys.readouterr()


def test_demo_is_given_its_own_config_or_another(config_file, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(stages, "run", lambda cfg, workdir: given.append((cfg, workdir)) or {"stopped": False})
    assert main.main(["demo", f"--config={config_file}", f"--workdir={tmp_path}", "--config.train.steps=5"]) == 0
    assert main.main(["demo", f"--workdir={tmp_path}", "--config.seed=3"]) == 0
    (first, workdir), (own, _) = given
    assert (first.train.steps, workdir) == (5, str(tmp_path)) and own.seed == 3
    assert set(own.data.train) == {"human", "web"} and own.data.train.web.noise > 0.5 > own.data.train.human.noise


def test_a_run_that_diverges_ends_with_status_1(config_file, tmp_path, capsys, monkeypatch):
    from blip_jax.train import loop

    def diverges(cfg, workdir):
        raise loop.NonFiniteLoss("step 7: a loss is not finite")

    monkeypatch.setattr(loop, "fit", diverges)
    assert main.main(["train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]) == 1
    assert capsys.readouterr().err == "error: step 7: a loss is not finite\n"


def test_chance():
    """Against counting: 10 images with 5 texts each; a random order of 50 texts has one of 5 among the first k."""
    assert recall.chance_recall(10, 50, 5, "img") == 50
    rng = np.random.default_rng(0)
    hits = np.mean([(rng.permutation(50)[:5] < 5).any() for _ in range(20_000)])
    assert recall.chance_recall(10, 50, 5, "txt") == pytest.approx(100 * hits, abs=1.2)
    assert recall.chance_recall(4, 4, 10, "txt") == recall.chance_recall(4, 4, 10, "img") == 100
