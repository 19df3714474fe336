"""`blip-jax push`: a model to the Hugging Face hub, as a folder that transformers loads, with a model card.

Everything goes up in one commit through `huggingface_hub`, whose own login is used: `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Iterator

from blip_jax import buckets, checkpoint
from blip_jax.console import revision
from blip_jax.convert import bucket, hf, hub, write

SENT = (*hub.TEXTS, "*.safetensors")  # of a folder; what is pickled stays here
CARD = "README.md"
SNIPPETS = {  # verb -> (classes of transformers that have it, the hub's word for the task, a call)
    "caption": (
        ("BlipForConditionalGeneration", "Blip2ForConditionalGeneration"),
        "image-to-text",
        'print(model.caption("photo.jpg"))',
    ),
    "answer": (
        ("BlipForQuestionAnswering", "InstructBlipForConditionalGeneration"),
        "visual-question-answering",
        'print(model.answer("photo.jpg", "What is in the picture?"))',
    ),
    "match": (
        ("BlipForImageTextRetrieval", "Blip2ForImageTextRetrieval"),
        "",
        'print(model.match("photo.jpg", "a dog runs over the grass"))',
    ),
}


def push(
    path, name: str, *, family: str = "", private: bool = False, licence: str = "", card="", dry_run: bool = False
) -> str:
    """Uploads the model `path` to the repository `name`, which is made where there is none; returns its address.

    path: a Hugging Face folder, which goes up as it is, or anything that `write.convert` reads, which is converted
    first, in a temporary folder. Of a folder only settings, vocabularies and safetensors are sent. It may lie on a
    bucket, as `card` may.
    family: the part of it to take, as `write.convert` has it.
    name: owner/name. private: of a repository that is made. licence: the hub's word for one, "apache-2.0"; "": none is
    stated. card: a README.md to send; "": the folder's, or one made from the settings and evaluation of a workdir.
    dry_run: says what would be sent, and needs no network.
    Raises: ValueError: no such name or model, no safetensors, huggingface_hub is missing, or the hub refused.
    """
    if not hub.NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name on the Hugging Face hub: give owner/name, as me/blip-birds")
    library = hub.library(f"to send a model to {name}")
    with tempfile.TemporaryDirectory() as beside:
        folder = buckets.of(path, "MODEL") if buckets.is_bucket(path) else pathlib.Path(path)
        if not _is_folder_of_hf(folder):
            folder = pathlib.Path(beside, "hf")
            write.convert(path, folder, to="hf", family=family)
        elif buckets.is_bucket(folder):
            if (own := folder / CARD).exists():
                card = card or own
            folder = bucket.copy(folder)
        files = _files(folder)
        text = _card(path, folder, files, name, library, licence, card)
        sent = [(file, folder / file) for file in files if file != CARD] + [(CARD, text.encode())]
        size = sum(len(what) if isinstance(what, bytes) else what.stat().st_size for _, what in sent)
        names = ", ".join(file for file, _ in sent)
        if dry_run:
            print(f"would send {len(sent)} files, {size / 1e9:.3f} GB, to {name}: {names}\n\n{text}", flush=True)
            return ""
        print(f"sending {len(sent)} files, {size / 1e9:.3f} GB, to {name}: {names}", flush=True)
        try:
            address = library.create_repo(name, private=private or None, exist_ok=True)
            library.create_commit(
                name,
                [library.CommitOperationAdd(file, what) for file, what in sent],
                commit_message=f"{pathlib.Path(path).name}, by blip_jax",
            )
        # a dozen types of its own and of the network libraries below it, which change with their versions
        except Exception as e:
            remedy = "log in with `hf auth login`, or set HF_TOKEN to a token that may write; check owner and name"
            raise ValueError(
                f"{name}: the Hugging Face hub did not take it ({type(e).__name__}: {checkpoint.short(e)}): {remedy}"
            ) from None
    print(f"{address}: sent")
    return str(address)


def _is_folder_of_hf(folder: pathlib.Path) -> bool:
    there = buckets.is_file if buckets.is_bucket(folder) else os.path.lexists
    return buckets.is_file(folder / "config.json") and any(there(folder / weights) for weights in hf.WEIGHTS)


def _files(folder: pathlib.Path) -> list[str]:
    """What is sent of `folder`. ValueError: no weights that the hub's users can read without running them."""
    found = sorted({str(file.relative_to(folder)) for pattern in SENT for file in folder.glob(pattern)})
    if not any(file.endswith(".safetensors") for file in found):
        named = buckets.spelled(folder)
        raise ValueError(
            f"{named} holds no safetensors, and pickled weights are not sent: write them anew, blip-jax convert "
            f"{named} OUT --to=hf"
        )
    return found + [CARD] * (folder / CARD).is_file()


def _card(path, folder: pathlib.Path, files: list[str], name: str, library, licence: str, card) -> str:
    """The README.md that goes up, with the hub's table of facts at its head."""
    if card or CARD in files:
        own = card or folder / CARD
        try:
            return buckets.fetched(own).read_text(encoding="utf-8")
        except (OSError, ValueError) as e:
            raise ValueError(f"--card={own} cannot be read as text ({e})") from e
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = [(kind, row) for kind in settings.get("architectures", ()) for row in SNIPPETS.values() if kind in row[0]]
    kind, (_, task, call) = known[0] if known else ("", ((), "", ""))
    facts = library.ModelCardData(
        license=licence or None,
        library_name="transformers",
        pipeline_tag=task or None,
        tags=["blip", "vision-language"],
    )
    lines = ["---", facts.to_yaml().strip(), "---", f"# {name.split('/')[1]}", ""]
    lines += [f"{kind or 'A model'}, written by blip_jax ({revision()}).", ""]
    if call:
        lines += ["```python", "import blip_jax", "", f'model = blip_jax.from_pretrained("{name}")', call, "```", ""]
    if kind:
        lines += [f"transformers loads it as `{kind}.from_pretrained({name!r})`.", ""]
    lines += _trained(path)
    return "\n".join(lines)


def _trained(path) -> Iterator[str]:
    """How a run of ours came to it and what was measured: names of data, never where they lie."""
    workdir = buckets.of(path) if buckets.is_bucket(path) else pathlib.Path(path)
    if not (workdir / "config.json").is_file() or checkpoint.newest_complete(workdir) is None:
        return
    cfg = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    train, optim = cfg["train"], cfg["optim"]
    sources = ", ".join(f"{source} ({leaves['kind'] or 'files'})" for source, leaves in cfg["data"]["train"].items())
    yield "## Training"
    yield ""
    yield f"- objective: {cfg['objective']}; data: {sources or 'none'}"
    yield f"- step {checkpoint.newest_complete(workdir)} of {train['steps']}, batch {train['batch']}"
    yield f"- learning rate {optim['lr']}, {optim['schedule']}, weight decay {optim['weight_decay']}"
    if train["init_from"]:
        begun = ", ".join(pathlib.Path(origin).name for origin in train["init_from"].split(","))
        yield f"- started from {begun}"
    yield ""
    found = workdir / "evaluation.json"
    if not found.is_file():
        return
    numbers = json.loads(found.read_text(encoding="utf-8"))
    yield "## Evaluation"
    yield ""
    yield "| measure | value |"
    yield "|---|---|"
    for measure, value in numbers.items():
        if isinstance(value, (int, float)):
            yield f"| {measure} | {value:g} |"
    yield ""
