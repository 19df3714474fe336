"""The page in a real Chromium: each tab used, on a desk and on a phone, light and dark, without an error in the console
and without a request to anywhere else. Needs Gradio, Playwright for Python and a Chromium or Chrome of the system.

SCREENSHOTS=DIR leaves pictures of each tab there, for people to look at.
"""

import io
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image
from world.language import on_scenes, tiny, vocabularies
from world.runs import begun
from world.verbs import QUESTIONS, photos, saved

import blip_jax
from blip_jax.cli.app import serve

ROOT = pathlib.Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WAIT = 180_000  # ms, for what compiles on a machine that has much else to do
SIZES = {"desk": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}

gradio = pytest.importorskip("gradio", reason="the page needs Gradio: pip install -e '.[app]'")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="a browser is driven by Playwright: pip install playwright"
)
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)} on PATH")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser):
    """(address, size, colours) -> a page that is open; at the end nothing has gone wrong in it."""
    opened = []

    def visit(address: str, size: str = "desk", colours: str = "light"):
        page = browser.new_context(viewport=SIZES[size], color_scheme=colours, has_touch=size == "phone").new_page()
        page.set_default_timeout(WAIT)
        page.wrong, page.hosts = [], set()
        page.on("console", lambda said: page.wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("request", lambda request: page.hosts.add(re.match(r"\w+:(//[^/]*/)?", request.url)[0]))
        page.goto(address)
        page.get_by_role("tab").first.wait_for()
        opened.append((page, address))
        return page

    yield visit
    for page, address in opened:
        assert not page.wrong, page.wrong
        assert page.hosts <= {address, "data:", "blob:"}, page.hosts
        page.context.close()


@pytest.fixture(scope="module")
def shown(tiny_vocab, tmp_path_factory, compilation_cache):
    """The page of a pre-trained model as the command shows it, and where it runs: address, folder, process."""
    at = tmp_path_factory.mktemp("page")
    saved(at / "model", "pretrain", 5, tiny_vocab, layers=2)
    for name in ("photos", "tmp"):
        (at / name).mkdir()
    for i, img in enumerate(photos(5)):
        Image.fromarray(img).save(at / "photos" / f"photo {i}.png")
    (at / "photos" / "bad.jpg").write_bytes(b"no picture")
    command = [sys.executable, "-m", "blip_jax", "app", f"--model={at / 'model'}", "--port=0"]
    command += [f"--photos={at / 'photos'}", f"--features={at / 'kept.npz'}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(at / "tmp")}
    # with a proxy that is not there: who asked anybody would fail
    env |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    line = next(line for line in process.stdout if "page is at" in line)
    address, uploads = re.fullmatch(r"the page is at (\S+); uploads lie in (\S+) .*", line.strip()).groups()
    yield types.SimpleNamespace(address=address, uploads=uploads, folder=at, process=process)
    process.terminate()  # killed, it would leave its folder behind
    process.wait(60)


def give(page, img: np.ndarray, name: str = "photo.png"):
    """A photograph, as a file that is dropped."""
    out = io.BytesIO()
    Image.fromarray(img).save(out, "PNG")
    upload(page, name, out.getvalue())
    page.locator(f"img[src*='{name}']").first.wait_for()


def upload(page, name: str, data: bytes):
    page.locator("input[type=file]").first.set_input_files({"name": name, "mimeType": "image/png", "buffer": data})


def press(page, name: str):
    page.get_by_role("button", name=name, exact=True).click()


def look(page, name: str):
    """What is seen is no wider than the window, on a desk and on a phone."""
    own, folder = page.viewport_size, os.environ.get("SCREENSHOTS")
    dark = page.evaluate("document.body.classList.contains('dark')")
    for size, window in SIZES.items():
        page.set_viewport_size(window)
        wide, room = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= room == window["width"], (name, size, wide)
        for colours in ("light", "dark") if folder else ():
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", colours == "dark")
            page.screenshot(path=f"{folder}/{name}-{size}-{colours}.png", full_page=True, animations="disabled")
    page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
    page.set_viewport_size(own)


def scores(page) -> list[list[str]]:
    """The rows of the table that is seen."""
    table = page.locator("table.scores:visible")
    table.wait_for()
    return [row.locator("td").all_inner_texts() for row in table.locator("tr").all()[1:]]


@pytest.mark.parametrize("size, colours", [("desk", "light"), ("phone", "dark")])
def test_captions_matching_and_search(shown, visit, size, colours):
    page = visit(shown.address, size, colours)
    assert page.get_by_role("tab").all_inner_texts() == ["Captions", "Matching", "Search"]  # what it can do, no more
    ink = page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).color")
    bright = np.mean([int(x) for x in re.findall(r"\d+", ink)[:3]]) > 128
    assert bright == (colours == "dark"), ink

    give(page, photos(1)[0])
    page.get_by_label("How many").first.fill("2")
    press(page, "Caption")
    rows = scores(page)
    assert len(rows) == 2 and all(text and float(p) < 0 for text, p in rows), rows
    look(page, "captions")

    page.get_by_role("tab", name="Matching").click()
    page.get_by_label("Texts, one a line").fill("a small red star\n<b>ring</b>\n\n")
    press(page, "Match")
    rows = scores(page)
    assert [row[0] for row in rows] == ["a small red star", "<b>ring</b>"] and 0 <= float(rows[0][1]) <= 1, rows
    best = max(rows, key=lambda row: float(row[1]))[0]
    words = re.sub(r"[<>/]", " ", best).split() if best == "<b>ring</b>" else best.split()
    page.get_by_text("What the words of the likeliest").wait_for()
    maps = page.locator("button.thumbnail-lg:visible")
    maps.nth(1).wait_for()
    assert maps.count() > 1 and (best[0] == "<" or maps.count() == 1 + len(words))
    look(page, "matching")

    page.get_by_role("tab", name="Search").click()
    page.get_by_label("What to look for").fill("a red star")
    press(page, "Search")
    page.get_by_text("1 could not be used: bad.jpg").wait_for()
    assert page.locator("button.thumbnail-lg:visible").count() == 5
    look(page, "search")
    page.locator("button.thumbnail-lg:visible").first.click()
    page.get_by_role("button", name=re.compile("full ?screen", re.IGNORECASE)).last.wait_for()
    assert not page.get_by_role("button", name=re.compile("share", re.IGNORECASE)).count(), "it would leave the machine"
    assert (shown.folder / "kept.npz").exists()


def test_what_cannot_be_done_is_said(shown, visit):
    page = visit(shown.address)
    press(page, "Caption")
    page.get_by_text("Give a photograph first.").wait_for()
    upload(page, "notes.png", b"hello")
    page.locator("img[src*='notes.png']").first.wait_for(state="attached")
    press(page, "Caption")
    page.get_by_text("not a picture: none of").wait_for()
    look(page, "mistakes")
    press(page, "Remove Image")
    upload(page, "big.png", bytes(serve.MOST_BYTES + 1))
    page.get_by_text("exceed the maximum allowed size").first.wait_for()
    page.wrong.clear()  # the browser, too, says that this is no picture


def test_uploads_lie_in_memory_and_are_gone_at_the_end(shown, visit):
    """The last test of the command's page: it ends it."""
    page, uploads = visit(shown.address), pathlib.Path(shown.uploads)
    assert uploads.stat().st_mode & 0o77 == 0  # nobody else's to read
    assert not os.path.isdir("/dev/shm") or str(uploads).startswith("/dev/shm/")
    give(page, photos(9)[8])
    held = [Image.open(path) for path in uploads.rglob("photo.png")]
    assert any(np.array_equal(img, photos(9)[8]) for img in held if img.size == photos(9)[8].shape[1::-1])
    assert not any(path.is_file() for path in (shown.folder / "tmp").rglob("*"))
    shown.process.send_signal(signal.SIGTERM)
    assert shown.process.wait(60) == 0 and not uploads.exists()


@pytest.fixture
def stand(monkeypatch, tmp_path):
    """model -> the address of its page, in this process, which asks nobody else."""
    from blip_jax.cli.app import page

    asked, connect, built = [], socket.socket.connect, []

    def noted(own, address):
        asked.append(address)
        return connect(own, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))

    def stand(model):
        built.append(page.build(model))
        return serve.launched(built[-1], "127.0.0.1", 0)

    yield stand
    for each in built:
        each.close(verbose=False)
    others = [address for address in asked if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1")]
    assert not others, others


def test_questions_are_answered(stand, visit, tiny_vocab, tmp_path):
    saved(tmp_path / "vqa", "vqa", 3, tiny_vocab)
    model = blip_jax.from_pretrained(tmp_path / "vqa")
    page = visit(stand(model), "phone")
    assert page.get_by_role("tab").all_inner_texts() == ["Questions"]
    give(page, photos(1)[0])
    page.get_by_label("Question", exact=True).fill(QUESTIONS[1])
    page.get_by_label("Question", exact=True).press("Enter")
    want = model.answer(photos(1)[0], QUESTIONS[1])
    assert scores(page) == [[want["answer"], f"{want['log_prob']:.3f}"]]
    page.get_by_text("Answers to choose from").click()
    page.get_by_label("One a line").fill("red\nblue")
    press(page, "Ask")
    page.get_by_role("columnheader", name="score").wait_for()
    want = model.answer(photos(1)[0], QUESTIONS[1], method="rank", answers=["red", "blue"])
    assert scores(page) == [[want["answer"], f"{want['score']:.3f}"]]
    look(page, "questions")


def test_a_conversation_remembers_what_was_said(stand, visit, tmp_path):
    cfg = on_scenes(tiny("opt", **{"train.steps": 1, "model.init_std": 0.2, "model.llm.positions": 256}))
    cfg.text.vocab = str(vocabularies(tmp_path)["opt"])
    model = blip_jax.from_pretrained(begun(cfg, tmp_path / "opt"))
    page = visit(stand(model), "desk", "dark")
    assert page.get_by_role("tab").all_inner_texts() == ["Captions", "Questions", "Conversation"]
    page.get_by_role("tab", name="Conversation").click()
    give(page, photos(1)[0])
    asked, prompts = ["what is red?", "and <b>blue</b>?"], []
    generate = model.generate
    model.generate = lambda image, prompt: prompts.append(prompt) or generate(image, prompt)
    for n, question in enumerate(asked, 1):
        page.get_by_label("Say").fill(question)
        press(page, "Send")
        page.locator("[data-testid='bot']").nth(n - 1).wait_for()
        assert page.get_by_text(question, exact=True).count()
    first = generate(photos(1)[0], "Question: what is red? Answer:")[0]["text"]
    assert prompts == [
        "Question: what is red? Answer:",
        f"Question: what is red? Answer: {first}. Question: and <b>blue</b>? Answer:",
    ]
    assert not page.get_by_role("button", name=re.compile("share", re.IGNORECASE)).count(), "it would leave the machine"
    look(page, "conversation")
    press(page, "Clear")  # the model forgets, too
    page.get_by_text(asked[0], exact=True).wait_for(state="detached")
    page.get_by_label("Say").fill(asked[0])
    press(page, "Send")
    page.locator("[data-testid='bot']").wait_for()
    assert prompts[2:] == prompts[:1]
    give(page, photos(2)[1], "other.png")  # another photograph: another conversation
    page.get_by_text(asked[0], exact=True).wait_for(state="detached")
