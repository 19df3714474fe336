"""blip-jax app: a page in the browser for a model."""

from __future__ import annotations

import pathlib

from absl import flags

from blip_jax.cli.infer import output, pictures
from blip_jax.cli.parse import parse


def app(argv: list[str]) -> int:
    """blip-jax app."""
    values = flags.FlagValues()
    text = {
        "model": (None, "workdir, checkpoint, Hugging Face folder or name"),
        "photos": ("", "folder or pattern of photographs to search in"),
        "features": ("", "file.npz that keeps their embeddings from one start to the next"),
        "host": ("127.0.0.1", "address to listen at; 0.0.0.0: of all networks, for everybody there"),
        "vocab": ("", "default: what comes with the model"),
        "dtype": ("", "float32 or bfloat16; default: by device"),
    }
    for name, (default, about) in text.items():
        flags.DEFINE_string(name, default, about, flag_values=values)
    flags.DEFINE_integer("port", 7860, "0: any that is free", 0, 65535, flag_values=values)
    flags.DEFINE_integer("batch", 0, "photographs per pass; default: by device", flag_values=values)
    parse(values, argv, required=("model",))
    if values.features and not values.photos:
        raise ValueError(f"--features={values.features} without --photos: it keeps what a search looks through")
    if values.features:
        output("--features", values.features, ".npz")
    files = pictures([values.photos]) if values.photos else []
    if missing := [file for file in files if not pathlib.Path(file).is_file()]:
        raise ValueError(f"--photos={values.photos}: no such file or folder as {missing[0]!r}")
    from blip_jax.cli.app.serve import serve
    from blip_jax.inference.pretrained import from_pretrained

    model = from_pretrained(values.model, dtype=values.dtype or None, vocab=values.vocab, batch=values.batch)
    serve(model, files, values.features, values.host, values.port)
    return 0
