"""Eight fake CPU devices and quick compilation for every test: the environment is set before jax is imported.

What XLA compiles is kept from run to run, also for the processes that tests start.
"""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    # gone since 0.11, and a flag that XLA does not know ends the process
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10.")
)

import jax  # noqa: E402
import pytest  # noqa: E402

from blip_jax.config import base, source  # noqa: E402
from blip_jax.data.scenes.world import vocab_captions
from blip_jax.data.text.wordpiece import train_vocab  # noqa: E402

gc.set_threshold(50_000, 20, 50)  # tracing makes millions of objects and hardly a circle

# Linux gives a process 65,530 mappings of memory. A compiled program takes six or more; one too many ends the process.
MOST_MAPPINGS = 30_000

# The files that take longest, the longest first: a file goes to whichever worker is free, in this order.
LONGEST = ("test_processes", "test_kill", "test_steps", "test_train", "test_demo_blip2", "test_blip2_stage1")
LONGEST += ("test_transformers", "test_demo", "test_pretrained", "test_capfilt_kill", "test_vqa", "test_vqa_task")
LONGEST += ("test_blip2_vqa", "test_plan", "test_prompted", "test_frozen", "test_capfilt_blip2", "test_checkpoint")
LONGEST += ("test_tutorials",)


def pytest_addoption(parser):
    parser.addoption(
        "--blip-checkpoints", metavar="DIR", help="folder of released checkpoints, for the tests marked `released`"
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "released: expected numbers of the released checkpoints; needs --blip-checkpoints DIR"
    )
    config.addinivalue_line("markers", "lab: scripts of benchmarks/; .ci/run has them, launch/test.sh leaves them out")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--blip-checkpoints") is None:
        left_out = pytest.mark.skip(
            reason="expected numbers of the released weights: -m released --blip-checkpoints DIR"
        )
        for item in items:
            if item.get_closest_marker("released"):
                item.add_marker(left_out)
    for item in items:
        if item.path.parent.name == "lab":
            item.add_marker("lab")
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def set_aside():
    """What was imported, and what the tests of earlier files left in memory, is looked at by no further collection of
    garbage: each looks at all the rest, and reading what is damaged ends with several."""
    if mappings() > MOST_MAPPINGS:
        gc.unfreeze()
        jax.clear_caches()
    gc.collect()  # this one alone looks at what the last file left
    gc.freeze()


def mappings() -> int:
    """Pieces of memory that the system has mapped for this process; 0 where it does not tell."""
    try:
        return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


@pytest.fixture(scope="session", autouse=True)
def compilation_cache():
    """One cache of compiled programs for the tests, their workers and the processes they start; it outlives the run.

    Programs of another jax are removed, so that the folder holds one set for each Python. TEST_CACHE names another
    folder.
    """
    root = pathlib.Path(os.environ.get("TEST_CACHE") or pathlib.Path(__file__).resolve().parents[1] / ".cache")
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = root / f"compiled-jax{jax.__version__}-{python}"
    for other in root.glob(f"compiled-jax*-{python}"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_vocab(tmp_path_factory):
    """vocab.txt of 118 entries, from the captions of the built-in world."""
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    train_vocab(vocab_captions(300), 118, path)
    return path


@pytest.fixture
def tiny_cfg(tiny_vocab):
    """A complete config of the smallest model that has every part, on 64 scenes; 6 steps of 16."""
    c = base("tiny")
    c.model.vit.depth = c.model.med.layers = 1
    c.model.img_size = 16
    c.model.embed_dim = 16
    c.model.dtype = "float32"
    c.text.vocab = str(tiny_vocab)
    c.text.max_len = 12
    with c.data.unlocked():
        c.data.train.world = source("scenes", count=64, size=32)
    c.data.threads = c.data.prefetch = 2
    c.loss.queue = 32
    c.optim.warmup_steps = 2
    c.optim.eps = 1e-4  # else Adam turns the rounding noise of gradients that are zero into steps of lr
    c.train.batch = 16
    c.train.steps = 6
    c.train.log_every = 2
    c.train.save_every = 3
    c.eval.loss_examples = 0  # a program that few tests of evaluations are about
    return c
