"""A task that lies in a file of its own, and not in blip_jax/tasks/."""

import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict
from world.pictures import encode, noise

from blip_jax import tasks
from blip_jax.cli import configs, main
from blip_jax.config import base, source
from blip_jax.data.formats.array_record import write_array_record
from blip_jax.train import loop

OWN = """
from blip_jax import tasks
from blip_jax.config import base

def get_config():
    c = base("tiny")
    c.objective = tasks.bring(__file__)
    return c

def check(cfg, tokenizer=None):
    return ["no: {word}"]
"""


PICTURES = """
import functools

import jax.numpy as jnp
import numpy as np

from blip_jax.models import flops as counts
from blip_jax.models.blip import Blip

def check(cfg, tokenizer=None):
    return []

def build(cfg):
    return Blip.from_config(cfg.model, decoder=False)

def example(record, rng, cfg, tokenizer):
    return {"img": record["image"], "target": np.float32(len(record["captions"][0]) % 2), "notes": []}

def shapes(cfg):
    B, S = cfg.train.batch, cfg.model.img_size
    return {"img": ((B, S, S, 3), np.uint8), "target": ((B,), np.float32)}

def loss(model, cfg, params, extra, batch, keys):
    apply = functools.partial(model.apply, {"params": params})
    img_emb = apply(apply(batch["img"], method="encode_image"), method="project_image")
    total = jnp.mean((img_emb[:, 0] - batch["target"]) ** 2)
    return total, ({"loss": total}, {})

def flops(cfg, T=None):
    return counts.trained(cfg, {"vision": counts.vision(cfg.model)[0]})
"""


def objective(name: str) -> ConfigDict:
    return ConfigDict({"objective": name})


def test_a_config_brings_its_own_task_once(tmp_path):
    file = tmp_path / "own_once.py"
    file.write_text(OWN.format(word="first"))
    cfg = configs.load(str(file))
    assert cfg.objective == "own_once" and "own_once" in tasks.names()
    module = tasks.of(cfg)
    assert module.check(cfg) == ["no: first"] and module.__name__ == "blip_jax.tasks.own_once"
    assert configs.load(str(file)).objective == "own_once" and tasks.of(cfg) is module  # what jit keeps stays valid
    with pytest.raises(ValueError, match="no: first"):
        tasks.validate(cfg.unlock())


def test_a_name_alone_loads_no_file(tmp_path, monkeypatch):
    (tmp_path / "own_never.py").write_text("raise SystemExit('it was run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_never", "own_never.py", str(tmp_path / "own_never"), "json", "step", "..config"):
        file = {"own_never": "own_never.py", "json": "json.py", "step": "step.py"}.get(name, "FILE.py")
        with pytest.raises(ValueError, match=rf"choose one of .*; of a task of your own, .* give --config={file}, "):
            tasks.of(objective(name))
        with pytest.raises(ValueError, match="choose one of"):
            cfg = base("tiny").unlock()
            cfg.objective = name
            tasks.validate(cfg)
    assert "own_never" not in sys.modules


def test_a_workdir_alone_does_not_run_the_file_it_names_and_says_how_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    file, workdir = tmp_path / "mine" / "own_named.py", tmp_path / "run"
    file.write_text(OWN.format(word="first") + "\nevaluate = None\n")
    code = "import json, sys; from blip_jax.cli import configs; print(configs.load(sys.argv[1]).to_json())"
    saved = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True).stdout
    workdir.mkdir()
    (workdir / "config.json").write_text(saved)
    for folder in (tmp_path, workdir):
        (folder / "own_named.py").write_text("raise SystemExit('it was run')")
    assert main.main(["evaluate", "--workdir=run"]) == 2
    said = capsys.readouterr().err
    assert "error: objective is 'own_named': choose one of" in said and "give --config=own_named.py, and the" in said
    assert "own_named" not in tasks.names()

    # as it says
    assert main.main(["evaluate", "--workdir=run", f"--config={file}"]) == 2
    said = capsys.readouterr().err
    assert said.endswith(
        "error: data.eval is empty: add a source to the config, c.data.eval.name = source(kind, path)\n"
    )


def test_a_name_belongs_to_one_file(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for folder in (tmp_path, other):
        (folder / "own_twice.py").write_text(OWN.format(word=folder.name))
    assert tasks.bring(tmp_path / "own_twice.py") == "own_twice" == tasks.bring(tmp_path / "." / "own_twice.py")
    for name in ("own_twice", "caption", "step"):
        (other / f"{name}.py").write_text(OWN.format(word="other"))
        with pytest.raises(ValueError, match=f"there is a task {name} already: give the file another name"):
            tasks.bring(other / f"{name}.py")
    here = pathlib.Path(tasks.__file__).parent / "caption.py"
    before = tasks.of(objective("caption"))
    assert tasks.bring(here) == "caption" and tasks.of(objective("caption")) is before
    (other / "two words.py").write_text("")
    with pytest.raises(ValueError, match="a Python file with a name of letters"):
        tasks.bring(other / "two words.py")


def test_a_file_that_raises_is_no_task(tmp_path):
    file = tmp_path / "own_broken.py"
    file.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        tasks.bring(file)
    assert "own_broken" not in tasks.names() and "blip_jax.tasks.own_broken" not in sys.modules
    file.write_text(OWN.format(word="mended"))
    assert tasks.bring(file) == "own_broken"


def test_a_task_without_texts_is_trained_also_on_records_whose_keys_are_no_utf8(tiny_cfg, tmp_path):
    data, file = tmp_path / "a.array_record", tmp_path / "own_pictures.py"
    rows = ({"key": f"{i}\udce9", "image": encode(noise(i)), "captions": ["a" * (1 + i % 2)]} for i in range(16))
    write_array_record(data, rows)
    with tiny_cfg.data.unlocked():
        tiny_cfg.data.train = ConfigDict({"a": source("array_record", str(data))})
    file.write_text(PICTURES)
    tiny_cfg.objective, tiny_cfg.model.vit.depth, tiny_cfg.model.med.layers = tasks.bring(file), 1, 1
    tiny_cfg.loss.update(momentum=False, queue=0)
    tiny_cfg.train.steps = 1
    out = loop.fit(tiny_cfg, tmp_path / "run")
    assert out["step"] == 1 and 0 < out["log"]["loss"] < 4
