"""Everything that commands import, some of it only when they need it: for servers that fork processes of them, of which
each would do it again. Imported once and for all, it is left out of every collection of garbage."""

import gc
import importlib

from PIL import Image

import blip_jax.capfilt.run
import blip_jax.cli.main
import blip_jax.convert.write
import blip_jax.inference.pretrained
import blip_jax.train.evaluation
import blip_jax.train.loop  # noqa: F401
from blip_jax import tasks

for name in tasks.names():
    importlib.import_module(f"blip_jax.tasks.{name}")
Image.preinit()  # its readers of common formats
gc.freeze(), gc.set_threshold(50_000, 20, 50)  # as conftest.py
