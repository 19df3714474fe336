"""The HTML report at the end of a demo: tables beside the paper's, noise, pictures, curves, in one file."""

from blip_jax.demo.report.page import write

__all__ = ["write"]
