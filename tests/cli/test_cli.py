"""The command line: mistakes are one line, commands do what they say."""

import json
import pathlib
import re

import numpy as np
import pytest
from absl import flags
from world.runs import write_config

import blip_jax
from blip_jax import trees
from blip_jax.cli import bench, configs, main, score, usage
from blip_jax.cli.parse import parse
from blip_jax.config import base, source
from blip_jax.console import plain
from blip_jax.data.text.wordpiece import Tokenizer
from blip_jax.demo import stages
from blip_jax.eval import recall
from blip_jax.parallel import processes

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


def test_a_misspelled_command_is_told_what_was_meant(capsys):
    assert "unknown command 'trian': did you mean train?" in fails(capsys, "trian")
    assert "did you mean evaluate?" in fails(capsys, "eval")
    assert "did you mean caption?" in fails(capsys, "captions", "x.jpg")
    assert "--workdir=x comes before a command" in fails(capsys, "--workdir=x", "train")
    assert "the commands are train, evaluate" in fails(capsys, "qqq")
    assert "did you mean train?" in fails(capsys, "bench", "trian")


@pytest.mark.parametrize("command", usage.COMMANDS)
@pytest.mark.parametrize("ask", ["--help", "-h"])
def test_every_command_explains_its_flags(command, ask, capsys):
    assert main.main([*command.split(), ask]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: blip-jax {command}") and not err
    assert usage.COMMANDS[command][1][:40] in out and max(map(len, out.splitlines())) <= 120
    flags = re.findall(r"^  (--\S+)", out, re.M)
    assert len(flags) == len(set(flags)) and (flags or command in ("bench", "score"))


def test_help_names_every_flag_with_its_default(capsys):
    assert main.main(["caption", "x.jpg", "--help"]) == 0  # also where something is missing
    out = capsys.readouterr().out
    for flag in ("n", "method", "beams", "prompt", "min_length", "max_length", "top_p", "top_k", "length_penalty"):
        assert f"--{flag}=..." in out, flag
    assert re.search(r"--top_p=\.\.\. +of nucleus \[0.9\]", out) and "--[no]json" in out
    assert main.main(["train", "--help"]) == 0 and "--config.LEAF=..." in capsys.readouterr().out
    assert main.main(["evaluate", "--config=nowhere.py", "--help"]) == 0
    assert "Without --config, DIR/config.json is used" in " ".join(capsys.readouterr().out.split())
    assert main.main(["help", "vocab"]) == 0 and capsys.readouterr().out.startswith("usage: blip-jax vocab ")
    below = [*(f"bench {w}" for w in bench.WORKLOADS), *(f"score {task}" for task in score.TASKS)]
    assert set(usage.COMMANDS) == {*main.COMMANDS, "capfilt refilter", *below}
    assert all(re.search(rf"^  {name} ", usage.OVERVIEW, re.M) for name in main.COMMANDS)


def test_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"blip-jax {blip_jax.__version__}, revision ")


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(main.COMMANDS, "vocab", lambda argv: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert main.main(["vocab"]) == 130 and capsys.readouterr().err == "stopped by Ctrl-C\n"


@pytest.mark.parametrize(
    "flag, meant",
    [
        ("--config.optim.learning_rate=1", "did you mean optim.lr?"),
        ("--config.learning_rate=1", "did you mean optim.lr?"),
        ("--config.lr=1", "did you mean optim.lr?"),
        ("--config.train.batch_size=1", "did you mean train.batch (examples of all devices together)?"),
        ("--config.train.epochs=1", "did you mean train.steps (a run's length is in steps; an epoch is"),
        ("--config.data.num_workers=1", "did you mean data.threads?"),
        ("--config.model.image_size=1", "did you mean model.img_size?"),
        ("--config.warmup=1", "did you mean optim.warmup_steps"),
        ("--config.optim.depth=1", "did you mean model.vit.depth?"),
        ("--learning_rate=1", "Unknown command line flag 'learning_rate': did you mean --config.optim.lr?"),
        ("--batch-size=1", "did you mean --config.train.batch (examples"),
        ("--optim.lr=1", "did you mean --config.optim.lr?"),
        ("--output_dir=x", "did you mean --workdir?"),
        ("--wrkdir=x", "did you mean --workdir?"),
        ("--qqqqq=x", "Unknown command line flag 'qqqqq': `blip-jax train --help` lists them"),
    ],
)
def test_other_programs_names_lead_to_our_leaves(config_file, capsys, flag, meant):
    assert meant in fails(capsys, "train", f"--config={config_file}", "--workdir=x", flag)


def test_every_alias_leads_to_a_leaf():
    leaves = trees.flat(base().to_dict())
    assert {leaf for leaf in configs.ALIASES.values()} <= leaves.keys() and configs.UNITS.keys() <= leaves.keys()
    assert not configs.ALIASES.keys() & {name.split(".")[-1] for name in leaves} - {"lr", "momentum"}


BAD_CONFIGS = {  # source -> what the line says
    "import nowhere": "line 1: ModuleNotFoundError: No module named 'nowhere'",
    "def get_config(:": "line 1: SyntaxError: ",
    "def get_config():\n    return base('tiny')": "line 2: NameError: name 'base' is not defined",
    "from blip_jax.config import base\ndef get_config():\n    base('tinny')": "line 3: model size 'tinny' is unknown",
    "def get_config():\n    return {}['x']": "line 2: KeyError: 'x'",
    "def get_config():\n    raise SystemExit(3)": "line 2: SystemExit: 3",
    "def get_config():\n    return get_config()": "line 2: RecursionError: ",
    "def get_config():\n    open('/not/there')": "line 2: FileNotFoundError: ",
    "def get_config():\n    raise ValueError('a\\nb')": "line 2: a b",
    "def get_config():\n    assert False": "line 2: AssertionError",
    "config = 1": "has no function get_config()",
    "def get_config():\n    pass": "get_config() returned NoneType, expected a ConfigDict",
    "def get_config():\n    return {'a': 1}": "get_config() returned dict, expected a ConfigDict",
    "def get_config(which):\n    pass": "its get_config takes an argument: give --config=",
}


@pytest.mark.parametrize("text", BAD_CONFIGS)
@pytest.mark.parametrize("command", [["train", "--workdir=x"], ["capfilt", "--out=x"], ["plan", "--topology=v5e:2x2"]])
def test_a_config_that_raises_is_one_line_that_names_it(tmp_path, capsys, text, command):
    file = tmp_path / "of mine.py"
    file.write_text(text)
    err = fails(capsys, *command, f"--config={file}")
    assert err.startswith(f"error: {file}") and BAD_CONFIGS[text] in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]  # nothing is made, no __pycache__ either


def test_a_misspelled_config_is_one_line_with_what_is_near(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(PRETRAIN.parents[1])
    line = lambda path: fails(capsys, "train", f"--config={path}", "--workdir=x")
    assert line("configs/scene.py").endswith("did you mean configs/scenes.py or configs/scenes_tasks.py?\n")
    assert "did you mean configs/scenes.py" in line("configs/scenes") and "configs/photos.py?" in line("photos.py")
    assert "configs is a folder: give a file of it, as configs/blip2_caption_coco.py" in line("configs")
    assert "which has no folder nowhere" in line("nowhere/x.py")
    assert "no argument: give --config=configs/scenes_tasks.py" in line("configs/scenes_tasks.py:vitb")
    for err in (line("configs/scene.py:vitb,14m"), line(""), line(tmp_path / "a:b.py")):
        assert err.count("\n") == 1 and "no such file" in err
    monkeypatch.chdir(tmp_path)
    assert "did you mean configs/scenes.py?" in line("scenes.py")  # which is the package's own from anywhere


def test_a_config_is_read_before_other_processes_are_waited_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "start", lambda: pytest.fail("it waits for others before it reads its config"))
    for command in (["train", "--workdir=x"], ["evaluate", "--workdir=x"], ["capfilt", "--out=x"], ["bench", "train"]):
        assert "no such file" in fails(capsys, *command, f"--config={tmp_path / 'x.py'}")


def test_a_config_file_at_a_strange_place(config_file, tmp_path):
    for name in ("a[1] %é", "a:b"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "my config?.py"
        file.write_text(pathlib.Path(config_file).read_text())
        assert configs.load(str(file)).train.steps == configs.load(str(config_file)).train.steps
    with_argument = tmp_path / "two.py"
    with_argument.write_text(
        "from blip_jax.config import base\ndef get_config(a='0'):\n    c = base()\n    c.text.prompt = a\n    return c"
    )
    assert (
        configs.load(f"{with_argument}:a:b").text.prompt == "a:b"
        and configs.load(str(with_argument)).text.prompt == "0"
    )


def test_overrides_may_come_before_the_config_and_need_one(config_file, capsys):
    values = flags.FlagValues()
    argv = [
        "train",
        "--config.train.steps=9",
        "--config",
        str(config_file),
        "--noconfig.loss.momentum",
        "--config.loss.queue=0",
    ]
    rest = configs.take(values, argv, "config", "")
    parse(values, rest, ("config",))
    assert (values.config.train.steps, values.config.loss.momentum, values.config.is_locked) == (9, False, True)
    assert "--config.train.steps without --config" in fails(capsys, "train", "--config.train.steps=9")


def test_the_settings_that_a_run_left_are_used_without_a_config(config_file, tmp_path, capsys):
    """All of them, overrides too, as they were: tuples, sources, what the task added."""
    run = tmp_path / "run"
    run.mkdir()
    cfg = configs.load(str(config_file)).unlock()
    cfg.optim.lr_factors, cfg.text.buckets = (("vit/.*", (0.1, 0.2)), ("med/.*", 0.5)), (4, cfg.text.max_len)
    cfg.task.extra = 3
    (run / "vocab.txt").write_bytes(pathlib.Path(cfg.text.vocab).read_bytes())
    (run / "config.json").write_text(json.dumps(plain(cfg)))
    found, _ = main.config_of_run(["evaluate", f"--workdir={run}", "--config.eval.k=7"])
    assert found.eval.k == 7 and [*found.optim.lr_factors] == [*cfg.optim.lr_factors] and found.is_locked
    found = found.copy_and_resolve_references().unlock()
    found.eval.k = cfg.eval.k
    assert plain(found) == plain(cfg) and isinstance(found.data.crop_scale, tuple)
    assert f"the settings are those of {run / 'config.json'}" in capsys.readouterr().err

    line = fails(capsys, "evaluate", f"--workdir={tmp_path / 'ruhn'}")
    assert f"or the --workdir of a run: {tmp_path / 'ruhn'} is no folder; did you mean --workdir={run}?" in line
    assert "holds no config.json" in fails(capsys, "train", f"--workdir={tmp_path}")

    cfg.text.vocab = "gone/vocab.txt"
    (run / "config.json").write_text(json.dumps(plain(cfg)))
    assert main.config_of_run(["train", f"--workdir={run}"])[0].text.vocab == str(run / "vocab.txt")
    assert f"the copy {run / 'vocab.txt'} is used" in capsys.readouterr().err
    saved = plain(cfg)
    del saved["eval"]["rerank_texts"], saved["data"]["train"]["world"]["easy"]  # of a version that did not have them
    (run / "config.json").write_text(json.dumps(saved))
    assert main.config_of_run(["train", f"--workdir={run}"])[0].eval.rerank_texts == base().eval.rerank_texts


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", '{"data": 3}', '{"data": {"train": {}, "eval": {"x": {}}}}', "[" * 100_000, "\xff",
     '{"data": {"train": {}, "eval": {}}, "zzz": 1}', '{"data": {"train": {}, "eval": {}}, "seed": "x"}'],
)  # fmt: skip
def test_settings_of_a_run_that_are_none_are_one_line(tmp_path, capsys, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    err = fails(capsys, "evaluate", f"--workdir={tmp_path}")
    assert f"{tmp_path / 'config.json'} is no config of a training run" in err and "give --config=FILE.py" in err
    assert err.count("\n") == 1


def test_a_config_file_with_several_runs(capsys):
    assert fails(capsys, "train", f"--config={PRETRAIN}:vith", "--workdir=x") == (
        "error: configs/pretrain.py has no run 'vith': give one of :vitb,14m, :vitb,129m, :vitl,129m, "
        ":vitb,14m,bootstrapped, "
        ":vitb,129m,bootstrapped, :vitb,129m,capfilt_l, :vitl,129m,capfilt_l after it\n"
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
    assert main.main(["vocab", f"--captions={tmp_path / 'a.txt'}", "--size=300", f"--out={out}"]) == 0
    idle = out.read_text().count("[unused")
    told = f"300 entries from 6 captions, {idle} of them [unused] (--size={300 - idle} holds as much); set"
    assert idle > 100 and told in capsys.readouterr().out
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
        if name not in ("step", "time"):
            assert result[name.removeprefix("eval/")] == pytest.approx(value), name
    assert re.search(r"text to image, chance +5\.0 +25\.0 +50\.0", capsys.readouterr().out)
    assert main.main(["evaluate", *flags, f"--checkpoint={run / 'checkpoints' / '3'}"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["checkpoint"].endswith("/3")
    capsys.readouterr()


def test_demo_is_given_its_own_config_or_another(config_file, tmp_path, monkeypatch):
    given = []
    run = lambda cfg, workdir, quick: given.append((cfg, workdir, quick)) or {"stopped": False}
    monkeypatch.setattr(stages, "run", run)
    assert main.main(["demo", f"--config={config_file}", f"--workdir={tmp_path}", "--config.train.steps=5"]) == 0
    assert main.main(["demo", f"--workdir={tmp_path}", "--config.seed=3"]) == 0
    assert main.main(["demo", "--quick", f"--workdir={tmp_path}", "--config.seed=4"]) == 0
    (first, workdir, whole), (own, *_), (short, _, quick) = given
    assert (first.train.steps, workdir, whole) == (5, str(tmp_path), False) and own.seed == 3
    assert quick and short.seed == 4 and short.train.steps < own.train.steps
    assert set(own.data.train) == {"human", "web"} and own.data.train.web.noise > 0.5 > own.data.train.human.noise


def test_a_run_that_diverges_ends_with_status_1(config_file, tmp_path, capsys, monkeypatch):
    from blip_jax.train import loop, saving

    def diverges(cfg, workdir, profile):
        raise saving.NonFiniteLoss("step 7: a loss is not finite")

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
