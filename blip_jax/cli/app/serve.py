"""The page is shown: on this machine, without another one, and with nothing of it left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from blip_jax.cli.app.album import Album
from blip_jax.data.scenes.world import draw_scene, render
from blip_jax.inference import heat
from blip_jax.parallel.interrupt import Interrupt, Stopped

EXAMPLES = 4  # pictures below the photograph
MOST_BYTES = 32 << 20  # of an uploaded photograph
IN_MEMORY = "/dev/shm"  # Linux's file system without a disk


def serve(model, files: Sequence[str], kept: str, host: str, port: int) -> None:
    """Shows the page of a model until a signal ends it.

    Args:
      files: photographs to search in; kept: the file of their embeddings, "" for none.
      host, port: where; 0: any port that is free. The address is printed.
    ValueError: Gradio is not installed, or the port is taken.
    """
    album = Album(model, files, kept) if files else None
    with folder() as uploads:
        alone(uploads)
        from blip_jax.cli.app import page

        built = page.build(model, album, _examples(files, model.cfg.data.max_pixels, uploads))
        address = launched(built, host, port)
        print(f"the page is at {address}; uploads lie in {uploads} and are gone when Ctrl-C ends it", flush=True)
        try:
            with Interrupt():
                threading.Event().wait()
        except Stopped:
            print("ended", flush=True)
        finally:
            built.close(verbose=False)


def launched(built, host: str, port: int) -> str:
    """Serves a page of page.py from a thread: its address. ValueError: the port is taken."""
    from blip_jax.cli.app import page

    built.queue(max_size=64)
    try:
        _, address, _ = built.launch(
            server_name=host,
            server_port=port or _free(host),
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            pwa=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=MOST_BYTES,
            css=page.CSS,
        )
    except OSError as e:
        raise ValueError(f"--host={host} --port={port}: {e}; give another port, or 0 for any") from None
    return address


def _free(host: str) -> int:
    """A port that nobody listens at; Gradio's own 0 looks at a hundred from 7860 on."""
    with socket.socket() as found:
        found.bind((host, 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def folder() -> Iterator[pathlib.Path]:
    """A folder for uploads and what is drawn of them, readable by this user alone, gone at the end: in memory where the
    system has a file system for that, else among the temporary files."""
    memory = IN_MEMORY if os.path.isdir(IN_MEMORY) and os.access(IN_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="blip-jax-app-", dir=memory, ignore_cleanup_errors=True) as made:
        yield pathlib.Path(made)


def alone(uploads: pathlib.Path) -> None:
    """Gradio, before it is imported, is told to write to `uploads` alone and to ask nobody. ValueError: it is not
    installed."""
    os.environ |= {
        "GRADIO_TEMP_DIR": str(uploads),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Gradio asks its own page whether it is there, and would ask a proxy for it
        "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1,localhost"))),
    }
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("blip-jax app needs Gradio: pip install 'blip-jax[app]'")


def _examples(files: Sequence[str], max_pixels: int, into: pathlib.Path) -> list[str]:
    """Files of pictures that may be tried: the first of the photographs to search in that can be used, or drawn
    scenes."""
    if files:
        found = (_shrunk(file, max_pixels) for file in files[: 2 * EXAMPLES])
        photos = [photo for photo in found if photo is not None][:EXAMPLES]
    else:
        draw = lambda seed: draw_scene(np.random.default_rng(seed), 192, easy=True)
        photos = [render(draw(seed), 192) for seed in range(EXAMPLES)]
    out = [str(into / f"example {i}.png") for i, _ in enumerate(photos, 1)]
    for photo, file in zip(photos, out):
        photo.save(file)
    return out


def _shrunk(file: str, max_pixels: int) -> Image.Image | None:
    try:
        return heat.photograph(file, max_pixels, 1024)
    except ValueError:  # a search says so
        return None
