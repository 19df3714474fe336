"""The documents, without a network.

They build as a site, their links lead somewhere, and the commands and configs that they name exist.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from blip_jax.cli import bench, main

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BESIDE = [
    ROOT / name
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "configs/README.md", "launch/README.md", "benchmarks/README.md")
]
DOCUMENTS = {str(path.relative_to(ROOT)): path for path in [README, *BESIDE, *sorted((ROOT / "docs").rglob("*.md"))]}
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
every_document = pytest.mark.parametrize("name", DOCUMENTS)


def text(name: str) -> str:
    return DOCUMENTS[name].read_text(encoding="utf-8")


def prose(markdown: str) -> str:
    """A document without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", markdown))


def links(markdown: str) -> list[str]:
    """Targets of links and pictures that are neither addresses nor mail."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(markdown))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(markdown: str) -> set[str]:
    """What `#...` may follow the name of a document: its headings, as both mkdocs and repository sites write them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", markdown), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def dead_links(path: pathlib.Path, markdown: str) -> list[str]:
    out = []
    for target in links(markdown):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or not there.is_relative_to(ROOT):
            out.append(target)
        elif anchor and anchor not in anchors(there.read_text(encoding="utf-8")):
            out.append(target)
    return out


def paths(markdown: str) -> set[str]:
    """Files and folders of the project that the text names in code font.

    A word in capitals in them stands for any name.
    """
    named = re.findall(r"`((?:blip_jax|benchmarks|configs|docs|launch|tests)/[\w./-]*)`", FENCE.sub("", markdown))
    return {name for name in named if not re.search(r"[A-Z]{4}", name.replace("README", ""))}


def commands(markdown: str) -> list[list[str]]:
    """The command lines of the code blocks, each split into words.

    Without `$`, variables set in front, and comments.
    """
    out = []
    for block in FENCE.findall(markdown):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"^\$ ", "", line)
            if re.match(r"(\w+=\S+ )*(blip-jax|python|bash|sbatch) ", line) or " -- blip-jax " in line:
                words = shlex.split(line, comments=True)
                out.append(words[next(i for i, word in enumerate(words) if not re.match(r"\w+=", word)) :])
    return out


def ours(words: list[str]) -> list[str]:
    """The part of a command line from `blip-jax` on, without it; [] where it runs something else."""
    return words[words.index("blip-jax") + 1 :] if "blip-jax" in words else []


def load(path: str) -> ConfigDict:
    """The config of `configs/x.py` or `configs/x.py:argument`, read as the flag --config reads it."""
    file, _, argument = path.partition(":")
    spec = importlib.util.spec_from_file_location("a_config", ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def has(cfg: ConfigDict, leaf: str) -> bool:
    for name in leaf.split("."):
        if not isinstance(cfg, ConfigDict) or name not in cfg:
            return False
        cfg = cfg[name]
    return True


def test_the_pages_build_without_a_warning_and_fetch_nothing(tmp_path):
    site = tmp_path / "site"
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}
    assert pages >= {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]+)"', page.read_text(encoding="utf-8")
        )
        assert not fetched, f"{page.name} fetches {fetched}"


def test_the_readme_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150, f"README.md has {len(lines)} lines: move what is not for a first visit to docs/"
    assert max(map(len, lines)) <= 160


def test_a_dead_link_is_found():
    assert dead_links(
        README,
        "[a](docs/index.md) [b](docs/none.md) [c](docs/index.md#words) [d](docs/index.md#none) [e](../x) `[f](g)`",
    ) == ["docs/none.md", "docs/index.md#none", "../x"]


@every_document
def test_links_lead_somewhere(name):
    assert not dead_links(DOCUMENTS[name], text(name))


@every_document
def test_files_that_are_named_exist(name):
    assert not [file for file in sorted(paths(text(name))) if not (ROOT / file).exists()]


@every_document
def test_commands_exist(name):
    for words in commands(text(name)):
        argv = ours(words)
        if argv and not argv[0].startswith("-"):
            assert argv[0] in main.COMMANDS, words
            if argv[0] == "bench":
                assert argv[1] in bench.WORKLOADS, words
        if words[0] in ("python", "bash", "sbatch") and words[1].endswith((".py", ".sh", ".sbatch")):
            assert (ROOT / words[1]).is_file(), words


@every_document
def test_configs_that_are_named_exist_and_load(name):
    for file, argument in sorted(set(re.findall(r"(?:configs/)?\b(\w+\.py):(\w+(?:[.,]\w+)*)", text(name)))):
        load(f"configs/{file}:{argument}")
    for file in sorted(set(re.findall(r"\bconfigs/(\w+\.py)", text(name)))):
        assert (ROOT / "configs" / file).is_file() or file in ("NAME.py", "x.py"), file


@every_document
def test_leaves_that_commands_set_exist(name):
    for words in commands(text(name)):
        argv = ours(words)
        configs = [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
        leaves = [match[1] for word in argv if (match := re.match(r"--config\.([\w.]+)=", word))]
        for leaf in leaves if configs else ():
            assert has(load(configs[0]), leaf), f"{configs[0]} has no {leaf}: {shlex.join(words)}"
