"""What the TPU compiler needs of its environment; libtpu reads it when jax starts."""

from __future__ import annotations

import os

FLAG = "--fibers_default_thread_stack_size"  # found in libtpu 0.0.38, 0.0.42.1 and 0.0.52
STACK = 1 << 20  # bytes; with the default libtpu dies of SIGSEGV where a device gets some 10 to 32 rows of a batch


def with_stack(arguments: str) -> str:
    """LIBTPU_INIT_ARGS with a stack that is large enough for the compiler's threads, unless `arguments` set their own."""
    return arguments if FLAG in arguments else f"{arguments} {FLAG}={STACK}".strip()


def set_stack() -> None:
    """Sets LIBTPU_INIT_ARGS for this process and those it starts; without a TPU it means nothing."""
    os.environ["LIBTPU_INIT_ARGS"] = with_stack(os.environ.get("LIBTPU_INIT_ARGS", ""))
