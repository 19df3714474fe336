"""`blip-jax convert`: any checkpoint in; ours, the originals' .pth or a Hugging Face folder out.

It is written whole or not at all; on a bucket a folder is copied file by file, and counts for nothing until
the last one is there.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import resource
import shutil
import time
from collections.abc import Mapping

from blip_jax import buckets, checkpoint, lock, trees
from blip_jax.convert import apply, blip2, hf, hf_blip2, origins, torch_io, vocabulary
from blip_jax.convert.read import locate, read
from blip_jax.convert.rules.families import WORDS
from blip_jax.convert.source import PADDED, Source, official, vocab_sizes
from blip_jax.parallel.interrupt import Interrupt

FORMATS = ("ours", "official", "hf")


def convert(
    path,
    out,
    *,
    to: str = "",
    vocab: str = "",
    family: str = "",
    img_size: int = 0,
    heads: Mapping[str, int] | None = None,
    drop_token_types: bool = False,
    verify: bool = False,
) -> None:
    """Converts the checkpoint `path` into `out`, which must not exist, and says what it does.

    to: ours (a workdir that train.init_from, CapFilt and from_pretrained take) | official (a .pth) | hf (a folder for
    transformers); "": official if `out` ends in .pth, else ours. verify: read what was written again, compare every
    tensor with the origin bit by bit, and run both models where transformers is installed. The other arguments are
    those of `read.read`.
    Raises: ValueError: `path` cannot be read, `out` exists, another process writes it or it cannot hold this family, or
      the two differ; `out` then stays as it was.
    """
    out = buckets.of(out, "OUT")
    to = to or ("official" if out.suffix == ".pth" else "ours")
    if to not in FORMATS:
        raise ValueError(f"--to={to}: choose one of {', '.join(FORMATS)}")
    if buckets.exists(out) if buckets.is_bucket(out) else os.path.lexists(out):
        raise _exists(out)
    with lock.held_output(out), Interrupt():
        _convert(path, out, to, vocab, family, img_size, heads, drop_token_types, verify)


def _exists(out: pathlib.Path) -> ValueError:
    below = [pathlib.PurePosixPath(name).name for name in buckets.names(out)] if buckets.is_bucket(out) else []
    cut = f"without {' and '.join(buckets.LAST)}, as a convert that was killed leaves it; "
    cut = cut * bool(any(below) and not set(buckets.LAST) & set(below))
    return ValueError(f"{out} exists already: {cut}give another OUT, or remove it first")


def _convert(path, out: pathlib.Path, to: str, vocab, family, img_size, heads, drop_token_types, verify: bool) -> None:
    began = time.perf_counter()
    source = read(
        path,
        family=family,
        img_size=img_size,
        heads=heads,
        vocab=vocab,
        drop_token_types=drop_token_types,
    )
    print(f"{path}: {describe(source)}", flush=True)
    here = buckets.folder_for(out.parent) if buckets.is_bucket(out) else out.parent
    beside = here / f".{out.name}.{os.getpid()}.tmp"
    try:
        if to == "ours":
            write_ours(beside, source, pathlib.Path(path).name)
        elif to == "official":
            write_official(beside, source, consume=not verify)
        else:
            (hf_blip2 if blip2.is_one(source.family) else hf).write(beside, source)
        for note in source.notes:
            print(f"  {note}")
        if verify:
            from blip_jax.convert.verify import verify as check

            one = buckets.is_bucket(path) and len(origins.names(str(path))) == 1
            check(source, beside, to, pathlib.Path(locate(path) if one else path))
        size = sum(f.stat().st_size for f in ([beside] if beside.is_file() else beside.rglob("*")) if f.is_file())
        _name(beside, out)
    finally:
        shutil.rmtree(beside) if beside.is_dir() else beside.unlink(missing_ok=True)
    print(
        f"{out}: {size / 1e9:.3f} GB written in {time.perf_counter() - began:.1f} s, peak memory "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB"
    )


def _name(beside: pathlib.Path, out: pathlib.Path) -> None:
    """Gives what is `beside` its name. ValueError: something has it; nothing is ever written over."""
    if buckets.is_bucket(out):
        return _send(beside, out)
    if beside.is_dir():
        try:
            out.mkdir()  # which only one can; an empty folder may be replaced
        except FileExistsError:
            raise _exists(out) from None
        os.rename(beside, out)
    elif not lock.exclusively(beside, out):
        raise _exists(out)


def _send(beside: pathlib.Path, out) -> None:
    """As `_name`, on a bucket: files one after the other, last the one without which the others count for nothing."""
    if buckets.exists(out):
        raise _exists(out)
    try:
        buckets.send(beside, out, over=False)
    except FileExistsError:
        raise _exists(out) from None
    except BaseException:  # a signal, too
        if beside.is_dir():
            out.rmtree(missing_ok=True)
        raise


def describe(source: Source) -> str:
    """What a source is, in a line."""
    m, parts = source.cfg.model, source.state["params"]
    sizes = []
    if "vit" in parts:
        kind = f"{m.vit.kind.upper()} " if "kind" in m.vit else ""
        sizes.append(f"{kind}ViT {m.vit.depth} x {m.vit.width}, {m.vit.heads} heads, {m.img_size} px")
    if "med" in parts:
        sizes.append(f"MED {m.med.layers} x {m.med.width}, {m.med.heads} heads, {m.med.vocab_size} entries")
    if "qformer" in parts:
        q = m.qformer
        text = f"{q.vocab_size} entries" if "word" in parts["qformer"]["embed"] else "no text"
        sizes.append(f"Q-Former {q.layers} x {q.width}, {q.heads} heads, {q.queries} queries, {text}")
    if "llm" in parts:
        llm = m.llm
        sizes.append(f"{llm.kind.upper()} {llm.layers} x {llm.width}, {llm.heads} heads, {llm.vocab_size} entries")

    count, entries = 0, vocab_sizes(source.cfg)
    for path, x in trees.paths(parts):
        shape = list(x.shape)
        if re.search(PADDED, path):  # without padding
            shape[path.endswith("kernel")] = entries[apply.part(path)]
        count += math.prod(shape)

    momentum = source.state.get("momentum", {})
    queue = f" and queues of {len(momentum['queue']['img'])}" if "queue" in momentum else ""
    return f"{WORDS[source.family][0]} (family {source.family}), {'; '.join(sizes)}; {count:,} parameters" + (
        f", with momentum encoder{queue}" if "params" in momentum else queue
    )


def write_ours(workdir: pathlib.Path, source: Source, origin: str) -> None:
    """A workdir with the source as checkpoint 0, and its vocabulary. `origin`: the name to record."""
    cfg = source.cfg.copy_and_resolve_references()
    workdir.mkdir()
    if source.vocab:
        kept = checkpoint.vocabulary(workdir, like=source.vocab)
        vocabulary.copy(source.vocab, kept)
        cfg.text.vocab = kept.name
    if source.questions:
        vocabulary.copy(source.questions, checkpoint.vocabulary(workdir, like=source.questions, name="questions"))
    momentum = source.state.get("momentum")
    state = {
        "params": source.state["params"],
        "frozen": {},
        "extra": momentum and {"params": None, "queue": None} | momentum,
    }
    record = {"family": source.family, "origin": origin, "notes": source.notes, "absent": list(source.absent)}
    record |= {"kept": dict(source.kept)} if source.kept else {}
    checkpoint.write(
        workdir, state, {"step": 0, "crc": 0, "sums": None, "converted": record}, json.loads(cfg.to_json())
    )


def write_official(path: pathlib.Path, source: Source, consume: bool = False) -> None:
    """A .pth of the originals, tied copies and position buffers included.

    What the file that this came from did not have is left out.

    consume: as in `apply.to_torch`; the source is of no use afterwards. Arrays that are still to be read wait in a file
    beside `path`, as large as the model, for torch to write them all at once.
    """
    left = _left_out(source)
    if any(isinstance(x, trees.Lazy) for _, x in trees.paths(source.state)):
        with torch_io.spool(path.with_name(f"{path.name}.arrays")) as keep:
            torch_io.save_pth(path, official(source, keep=keep))
    else:
        torch_io.save_pth(path, official(source, consume=consume))
    if source.frozen:
        source.notes.append(f"left out, as in LAVIS's files: {', '.join(source.frozen)}, which the run held frozen")
    if left:
        source.notes.append(f"the originals' files have no place for {', '.join(left)}")


def _left_out(source: Source) -> list[str]:
    """Paths of the state that no row of the family's table takes."""
    return [path for path, _ in trees.paths(source.state) if not re.fullmatch(apply.paths_of(source.family), path)]
