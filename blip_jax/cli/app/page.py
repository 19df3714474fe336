"""The page: a photograph, and a tab for each thing that the model can do. Of Gradio's parts; serve.py shows it."""

from __future__ import annotations

import functools
import html
import pathlib
from collections.abc import Callable, Sequence

import gradio as gr

from blip_jax.cli.app import talk
from blip_jax.cli.app.album import Album
from blip_jax.inference import heat

MOST_TEXTS, MOST_CHARACTERS = 32, 2000  # of a question, a prompt, or all texts that are matched at once
MOST_FOUND = 24  # photographs that a search shows
SIDE = 480  # pixels of a photograph's longer side under a heat map, and of one that was found
CSS = """
table.scores {width: 100%; border-collapse: collapse; color: var(--body-text-color)}
table.scores, table.scores tr {border: none}
table.scores tr > * {text-align: left; padding: .4em .6em; overflow-wrap: anywhere; border: none;
  border-bottom: 1px solid var(--border-color-primary)}
table.scores .number {text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap}
.pictures .grid-wrap {min-height: 0; max-height: none}
@media (max-width: 640px) {.pictures .grid-container {grid-template-columns: repeat(2, minmax(0, 1fr))}}
"""


def build(model, album: Album | None = None, examples: Sequence[str] = ()) -> gr.Blocks:
    """The page of a model of `from_pretrained`. album: photographs to search in; examples: files of pictures.

    ValueError: the model has nothing that the page shows.
    """
    verbs = model.verbs()
    if not verbs:
        raise ValueError(f"{model!r} neither writes nor matches texts, which is all that the page shows")
    with gr.Blocks(title="blip_jax", analytics_enabled=False, delete_cache=(60, 3600)) as page:
        gr.Markdown(f"## blip_jax\n{_named(model)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                photo = gr.Image(
                    label="Photograph",
                    type="filepath",
                    height=340,
                    sources=["upload", "clipboard"],
                    buttons=["fullscreen"],
                )
                # the file as it was uploaded: what it is, and whether it can be afforded, blip_jax.data.image says
                photo.preprocess = lambda payload: payload and payload.path
                if examples:
                    gr.Examples([[file] for file in examples], photo, label="Examples", cache_examples=False)
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                if "caption" in verbs:
                    with gr.Tab("Captions"):
                        captions(model, photo)
                if "match" in verbs:
                    with gr.Tab("Matching"):
                        matching(model, photo, "localize" in verbs)
                if "answer" in verbs:
                    with gr.Tab("Questions"):
                        questions(model, photo)
                if "generate" in verbs:
                    with gr.Tab("Conversation"):
                        conversation(model, photo)
                if album is not None and "match" in verbs:
                    with gr.Tab("Search"):
                        search(album)
    return page


def _named(model) -> str:
    """What stands below the title."""
    name = ", ".join(pathlib.PurePath(part).name for part in str(model.origin).split(",")).replace("`", "")
    return f"`{name}`, {model.cfg.objective}, {model.cfg.model.img_size} px, {model.cfg.model.dtype}"


# --- tabs -------------------------------------------------------------------------------------------------------------
def captions(model, photo) -> None:
    later = "generate" in model.verbs()  # whose lengths are new tokens
    with gr.Row():
        n = gr.Slider(1, 10, 3, step=1, label="How many")
        method = gr.Radio([("beam search", "beam"), ("nucleus sampling", "nucleus")], value="beam", label="Method")
    prompt = gr.Textbox(label="Prompt", placeholder="as the model was trained", max_length=MOST_CHARACTERS)
    with gr.Accordion("More", open=False):
        with gr.Row():
            beams = gr.Slider(1, 16, 5, step=1, label="Beams")
            least = gr.Slider(0, 40, 0 if later else 5, step=1, label="Least tokens")
            most = gr.Slider(2, 100, 30 if later else 20, step=1, label="Most tokens")
        with gr.Row():
            top_p = gr.Slider(0.05, 1.0, 0.9, label="Share of the probability (nucleus)")
            temperature = gr.Slider(0.1, 2.0, 1.0, label="Temperature (nucleus)")
            seed = gr.Number(0, precision=0, label="Seed (nucleus)")
    button, out = gr.Button("Caption", variant="primary"), gr.HTML()

    def run(file, n, method, prompt, beams, least, most, top_p, temperature, seed):
        given = {"top_p": top_p, "temperature": temperature, "seed": int(seed or 0)}
        given |= {"beams": max(int(beams), int(n)), "min_length": int(least), "max_length": int(most)}
        found = model.caption(bytes_of(file), int(n), method, prompt=prompt or None, **given)
        return table(("Caption", "log-probability"), [(row["caption"], row["log_prob"]) for row in found])

    on(button, [prompt], run, [photo, n, method, prompt, beams, least, most, top_p, temperature, seed], [out])


def matching(model, photo, maps: bool) -> None:
    texts = gr.Textbox(label="Texts, one a line", lines=3, max_lines=8, max_length=MOST_CHARACTERS)
    button, out = gr.Button("Match", variant="primary"), gr.HTML()
    seen = []
    if maps:
        told = gr.Markdown(visible=False)
        seen = [told, pictures("Where each word is", 3)]

    def run(file, texts):
        lines, data = lines_of(texts), bytes_of(file)
        found = model.match([data], lines, every_pair=True)
        rows = list(zip(lines, found["probability"][0].tolist(), found["cosine"][0].tolist()))
        out = table(("Text", "probability", "cosine"), rows)
        if not maps:
            return out
        best = max(rows, key=lambda row: row[1])[0]
        where, small = model.localize(data, best), heat.photograph(data, model.cfg.data.max_pixels, SIDE)
        named = [("all words", where["text_map"]), *zip(where["words"], where["maps"])]
        drawn = [(heat.overlay(small, one), word) for word, one in named]
        note = f"What the words of the likeliest text look at: **{html.escape(best)}**"
        return out, gr.Markdown(note, visible=True), drawn

    on(button, [], run, [photo, texts], [out, *seen])


def questions(model, photo) -> None:
    question = gr.Textbox(label="Question", max_length=MOST_CHARACTERS)
    with gr.Accordion("Answers to choose from", open=False):
        choices = gr.Textbox(
            label="One a line; none: the answer is written freely", lines=4, max_length=MOST_CHARACTERS
        )
    button, out = gr.Button("Ask", variant="primary"), gr.HTML()

    def run(file, question, choices):
        data = bytes_of(file)
        if (choices or "").strip():
            found = model.answer(data, question, method="rank", answers=lines_of(choices))
            return table(("Answer", "score"), [(found["answer"], found["score"])])
        found = model.answer(data, question)
        return table(("Answer", "log-probability"), [(found["answer"], found["log_prob"])])

    on(button, [question], run, [photo, question, choices], [out])


def conversation(model, photo) -> None:
    said = gr.State([])  # (question, answer) of the turns until now
    shown = gr.Chatbot(
        label="Conversation about the photograph",
        show_label=False,  # it would hide a part of what is said, as would the buttons, of which one shares it
        buttons=[],
        height=360,
        render_markdown=False,
        feedback_options=None,
    )
    with gr.Row():
        question = gr.Textbox(label="Say", scale=4, max_length=MOST_CHARACTERS)
        button = gr.Button("Send", variant="primary", scale=1, min_width=90)

    def run(file, question, said):
        said = talk.turn(model, bytes_of(file), question, said)
        spoken = [pair for turn in said for pair in zip(("user", "assistant"), turn)]
        # a chatbot reads HTML even where it renders no Markdown
        return said, [{"role": role, "content": html.escape(text, quote=False)} for role, text in spoken], ""

    on(button, [question], run, [photo, question, said], [said, shown, question], working=shown)
    photo.change(lambda: ([], []), None, [said, shown], api_visibility="private")  # a new one begins a new one
    shown.clear(lambda: [], None, said, api_visibility="private")


def search(album: Album) -> None:
    words = gr.Textbox(label=f"What to look for in {len(album.files)} photographs", max_length=MOST_CHARACTERS)
    button, out = gr.Button("Search", variant="primary"), pictures("Found", 4)
    told = gr.Markdown(visible=False)

    def run(text, progress=gr.Progress()):  # noqa: B008 (how Gradio is told that there is progress)
        tell = lambda done, of: progress((done, of), desc="looking at the photographs", unit="photographs")
        found = album.search(text, MOST_FOUND, tell)
        limit = album.model.cfg.data.max_pixels
        drawn = [(heat.photograph(file, limit, SIDE), f"{cos:.3f}  {pathlib.Path(file).name}") for file, cos in found]
        bad = "; ".join(f"{pathlib.Path(file).name}: {reason}" for file, reason in list(album.bad.items())[:5])
        note = f"{len(album.bad)} could not be used: {html.escape(bad)}" if bad else ""
        return drawn, gr.Markdown(note, visible=bool(note))

    on(button, [words], run, [words], [out, told])


# --- pieces -----------------------------------------------------------------------------------------------------------
def on(button, boxes: list, run: Callable, inputs: list, outputs: list, working=None) -> None:
    """`run` when the button is pressed or Enter in one of the boxes; what it raises as ValueError is shown.

    working: the part of the page that says so meanwhile; None: all outputs.
    """

    @functools.wraps(run)  # Gradio looks at the arguments
    def told(*given):
        try:
            return run(*given)
        except ValueError as e:
            raise gr.Error(str(e).removeprefix("images: "), duration=None, print_exception=False) from None

    begins = [button.click, *(box.submit for box in boxes)]
    # one model, one piece of work at a time
    alone = {"concurrency_limit": 1, "concurrency_id": "model"}
    gr.on(begins, told, inputs, outputs, show_progress_on=working, api_visibility="private", **alone)


def pictures(name: str, columns: int) -> gr.Gallery:
    """Pictures with a line below each, on a phone two beside each other. Its name, which would hide a part of the first
    one, is not shown."""
    return gr.Gallery(
        label=name,
        show_label=False,
        columns=columns,
        object_fit="contain",
        height="auto",
        buttons=["download", "fullscreen"],  # none that shares them
        elem_classes="pictures",
    )


def bytes_of(file: str | None) -> bytes:
    """The photograph that was uploaded to `file`. ValueError: there is none."""
    if not file:
        raise ValueError("Give a photograph first.")
    try:
        return pathlib.Path(file).read_bytes()
    except OSError:
        raise ValueError("The photograph is no longer here: uploads are kept for an hour. Give it again.") from None


def lines_of(texts: str | None) -> list[str]:
    """Texts, one a line. ValueError: none, or too many."""
    lines = [line.strip() for line in (texts or "").splitlines() if line.strip()]
    if not 1 <= len(lines) <= MOST_TEXTS:
        raise ValueError(f"Give 1 to {MOST_TEXTS} texts, one a line; there are {len(lines)}.")
    return lines


def table(heads: Sequence[str], rows: Sequence[tuple]) -> str:
    """HTML: the first column is text, the others are numbers."""
    kind = lambda i: ' class="number"' if i else ""
    head = "".join(f'<th scope="col"{kind(i)}>{html.escape(name)}</th>' for i, name in enumerate(heads))
    shown = lambda x: f"{x:.3f}" if isinstance(x, float) else html.escape(str(x))
    cells = ["".join(f"<td{kind(i)}>{shown(x)}</td>" for i, x in enumerate(row)) for row in rows]
    return f'<table class="scores"><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in cells)}</table>'
