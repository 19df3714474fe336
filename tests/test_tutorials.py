"""The tutorials' commands, each page from a clean folder, on small data in the same formats.

Every block of bash and Python is run, in the order of the page, in one shell, but those that the page's source marks
with a comment `<!-- not run: why -->`. A block marked `<!-- file: NAME -->` is written to that file. What is small
stands under the names that the pages use (tests/world/small.py): configs/ are the published ones with smaller models
and fewer steps, the hub's cache holds models of random values, and data are some pictures of noise. REPLACED is all
that is changed in the blocks themselves.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
from typing import NamedTuple

import pytest
from world import small
from world.pictures import encode, noise
from world.shell import Shell

from blip_jax.plan import aot

PAGES = pathlib.Path(__file__).resolve().parents[1] / "docs" / "tutorials"
REPLACED = {
    "captions": [("--config.train.steps=500", "--config.train.steps=2")],
    # the config that stands in the page itself
    "own_task": [
        (
            "    return c\n",
            "    c = __import__('world.small').small.smaller(c, 60)\n"
            "    c.optim.lr, c.eval.loss_examples = 3e-3, 32\n    return c\n",
        )
    ],
    # where the TPU's compiler is not installed, a plan is not decided
    "pretraining": [] if aot.installed() else [("--out=plan.json\n", "--out=plan.json || test $? -eq 3\n")],
    "blip_jax": [("--config.train.steps=600", "--config.train.steps=2")],
}
HUB = {"Salesforce__blip_image_captioning_base": "caption", "Salesforce__blip_itm_base_coco": "itm"}
needs = lambda *names: pytest.mark.skipif(
    not all(map(importlib.util.find_spec, names)), reason=f"needs {' and '.join(names)}"
)


class Block(NamedTuple):
    kind: str  # bash, python, json, ...
    text: str
    mark: str  # of the comment in front of it


def smaller(name: str) -> str:
    """The text of a page or notebook with what is REPLACED."""
    text = (PAGES / name).read_text(encoding="utf-8")
    for old, new in REPLACED.get(pathlib.Path(name).stem, ()):
        assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times"
        text = text.replace(old, new)
    return text


def blocks(page: str) -> list[Block]:
    text = smaller(f"{page}.md")
    found = re.findall(r"^(?:<!-- (.*?) -->\n)?```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [Block(kind, text, mark) for mark, kind, text in found]


def script(found: list[Block]) -> str:
    """The blocks as one script; what block i says stands behind a line "== i"."""
    lines = []
    for i, block in enumerate(found):
        what, _, name = block.mark.partition(": ")
        lines.append(f"echo '== {i}'")
        if what == "file":
            lines.append(f"cat > {name} <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK")
        elif what != "not run":
            here = {"python": f"python - <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK", "bash": block.text}
            lines.append(here.get(block.kind, ""))
    return "\n".join(lines)


@pytest.fixture(scope="module")
def shell(tmp_path_factory, compilation_cache):
    """bash for all pages, with the hub's cache; its folder holds configs/ and nothing else."""
    place, beside = tmp_path_factory.mktemp("clean"), tmp_path_factory.mktemp("beside")
    small.configs(place)
    vocab = small.vocabulary(beside / "vocab.txt")
    small.on_hub(beside / "huggingface", vocab, **HUB)
    env = {
        "HF_HOME": str(beside / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(beside / "cache"),
        "XLA_FLAGS": re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]),
    }
    opened = Shell(place, beside, env)
    opened.vocab = vocab
    yield opened
    opened.close()


@pytest.fixture
def told(shell, tmp_path, monkeypatch):
    """A function: page -> what each of its blocks said; what they wrote is in tmp_path."""
    (tmp_path / "configs").symlink_to(shell.place / "configs")
    monkeypatch.setattr(shell, "place", tmp_path)

    def run(page: str) -> list[str]:
        found = blocks(page)
        done = shell.run(script(found))
        print(done.stdout)
        parts = re.split(r"^== \d+\n", done.stdout, flags=re.M)[1:]
        assert done.returncode == 0, f"block {len(parts) - 1} of {page}.md:\n{parts[-1][-4000:]}"
        assert len(parts) == len(found)
        return parts

    return run


def saying(parts: list[str], *words: str) -> str:
    """What the one block said that said all of these."""
    [found] = [part for part in parts if all(word in part for word in words)]
    return found


def test_every_page_is_tested_and_every_mark_says_why():
    pages = {path.stem for path in PAGES.glob("*.md")}
    assert pages == {"captions", "from_pytorch", "pretraining", "own_task"}
    for page in pages:
        found = blocks(page)
        assert {block.kind for block in found} <= {"bash", "python", "json", "text"}
        for block in found:
            assert not block.mark or re.fullmatch(r"(not run|file): \S.*", block.mark), block.mark
            assert block.mark.startswith("not run") <= (block.kind == "bash"), "only what a shell does is left out"
        assert any(block.kind == "bash" and not block.mark for block in found), page


@needs("huggingface_hub")
def test_caption_your_photographs(told, tmp_path):
    small.photos(tmp_path / "photos", 40)
    parts = told("captions")
    for i in range(40):
        assert re.search(rf"^photos/{i}.jpg: \S", parts[1], re.M)
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == sorted(f"photos/{i}.jpg" for i in range(40))
    assert parts[3].splitlines() == [f"{row['image']} | {row['captions'][0]['caption']}" for row in rows]
    chosen = re.findall(r"^([01]\.\d\d)  (\d+)\.jpg: \S", parts[4], re.M)
    assert [name for _, name in chosen] == sorted(map(str, range(40)))
    lists = [json.loads((tmp_path / "photos" / f"{name}.json").read_text()) for name in ("train", "val")]
    assert [len(part) for part in lists] == [36, 4] and all(row["caption"] for part in lists for row in part)
    assert "goes on with a finished model" in parts[5] and "step 2" in parts[5]
    assert len(re.findall(r"^photos/\d+.jpg: \S", parts[6], re.M)) == 40
    assert "would send" in parts[7] and "to me/my-captions" in parts[7] and "objective: caption" in parts[7]


@needs("torch", "transformers")
def test_bring_a_checkpoint_from_pytorch(told, tmp_path, shell):
    small.pth(tmp_path / "model_base_capfilt_large.pth")
    (tmp_path / "vocab.txt").write_bytes(shell.vocab.read_bytes())
    (tmp_path / "photo.jpg").write_bytes(encode(noise(1, 60, 40)))
    parts = told("from_pytorch")
    assert "bit" in parts[1]
    assert "'probability'" in parts[3] and re.search(r"'caption': '\w+", parts[3])
    tensors = len(small.official.shapes("pretrain", small.SIZES, small.PIXELS))
    assert f"{tensors} tensors, bit for bit" in parts[5]
    assert re.search(r"^transformers: a picture of \S", parts[7], re.M)


def test_from_shards_to_a_trained_blip(told, tmp_path, shell):
    (tmp_path / "data").mkdir()
    small.cc12m(tmp_path / "cc12m")
    small.coco(tmp_path / "data")
    small.visual_genome(tmp_path / "data")
    (tmp_path / "data" / "bert-base-uncased-vocab.txt").write_bytes(shell.vocab.read_bytes())
    parts = told("pretraining")
    assert "7 captions of 7 pictures" in parts[1]
    assert (tmp_path / "data" / "ccs" / "00000.array_record").is_file()
    for name in ("pretrain_vitb_14m", "caption_coco_vitb", "retrieval_coco_vitb", "second", "second_retrieval"):
        assert (tmp_path / "runs" / name / "checkpoints" / "2").is_dir(), name
    assert re.findall(r"^(\d) itc [\d.]+ itm [\d.]+ lm [\d.]+$", parts[7], re.M) == ["1", "2"]
    summary = json.loads((tmp_path / "data" / "capfilt_14m" / "summary.json").read_text())
    for kind in ("web", "synthetic"):
        assert f"{kind}: {summary[kind]['kept']} of {summary[kind]['texts']} kept" in parts[10]
        leaves = json.loads((tmp_path / "runs" / "second" / "config.json").read_text())["data"]["train"]
        assert leaves[f"capfilt_14m_{kind}"]["weight"] == summary[kind]["kept"] > 0
    assert json.loads((tmp_path / "data" / "capfilt_14m_07" / "summary.json").read_text())["threshold"] == 0.7
    recalls = json.loads((tmp_path / "runs" / "second_retrieval" / "evaluation.json").read_text())
    assert recalls["images"] == 8 and 0 <= recalls["r_mean"] <= 100
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] is (True if aot.installed() else None)


@needs("huggingface_hub")
def test_your_own_task(told, tmp_path):
    small.alt_texts(tmp_path / "alt")
    (tmp_path / "photo.jpg").write_bytes(encode(noise(1, 60, 40)))
    parts = told("own_task")
    result = json.loads((tmp_path / "runs" / "alt_text" / "evaluation.json").read_text())
    assert result["examples"] == 48 and result["accuracy"] > 90
    assert f"48 texts, accuracy {result['accuracy']:.1f} %" in parts[3]
    assert "alt_text: examples 48.00" in parts[3] and "eval/loss is of 32 examples of data.eval" in parts[3]
    rows = json.loads((tmp_path / "runs" / "alt_text" / "predictions.json").read_text())
    right = [(row["good"] >= 0.5) == (row["verdict"] == "good") for row in rows]
    assert 100 * sum(right) / len(right) == pytest.approx(result["accuracy"])
    good, bad = (float(p) for p in re.findall(r"^([01]\.\d\d)  ", parts[4], re.M))
    assert good > bad


@needs("huggingface_hub")
def test_the_notebook(shell, tmp_path, monkeypatch):
    """Its cells as one program: lines that begin with ! go to a shell, %pip is left out."""
    notebook = json.loads(smaller("blip_jax.ipynb"))
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    text = re.sub(r"^%pip .*$", "", text, flags=re.M)
    text = re.sub(
        r"^!(.*)$", lambda found: f"subprocess.run(['bash', '-c', {found[1]!r}], check=True)", text, flags=re.M
    )
    (tmp_path / "notebook.py").write_text(f"import subprocess\n{text}\nassert strip.size == (768, 96)\n")
    (tmp_path / "configs").symlink_to(shell.place / "configs")
    monkeypatch.setattr(shell, "place", tmp_path)
    done = shell.run("python notebook.py")
    assert done.returncode == 0, done.stdout[-4000:]
    assert len(re.findall(r"^\{'caption': '\S.*', 'log_prob': -", done.stdout, re.M)) == 3
    assert re.findall(r"^(\d+) itc [\d.]+ itm [\d.]+ lm [\d.]+$", done.stdout, re.M) == ["1", "2"]
    assert re.search(r"own picture is nearest: \d of 8", done.stdout)
    assert len(re.findall(r"^.{40,} \| \w[\w ,]+$", done.stdout, re.M)) == 8
