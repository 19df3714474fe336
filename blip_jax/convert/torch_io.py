"""Tensors of files that other programs wrote, read without running anything that is in them.

All checks of such files are here.

PyTorch's files (.pth, .bin) need torch, the extra "convert"; .safetensors and .npz do not.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import pathlib
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from blip_jax.convert.apply import MAX_TENSORS, listed
from blip_jax.convert.wrappers import unpack
from blip_jax.trees import Lazy

# an archive that unpacks to more than so many times its size holds no weights: random numbers hardly compress
BLOW_UP = 4
SPOOLED = 1 << 16  # bytes from which an array waits in a file
MAX_HEADER = MAX_TENSORS << 10  # bytes of names and shapes in a .safetensors
SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class Tensors(Mapping):
    """name -> array, or what numpy.asarray reads and has shape and dtype; notes: how it lay in the file, and what
    else that held."""

    def __init__(self, arrays: dict, notes: list[str] = ()):
        self._arrays, self.notes = arrays, list(notes)

    def __getitem__(self, name: str):
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def open_tensors(path) -> Tensors:
    """The tensors of a .pth or .bin (torch.save), .safetensors or .npz, whatever it is called; read when they are used.

    Dicts that a state dict is saved in (`wrappers.PACKED`) are unpacked; what stands beside it is in `notes`.
    ValueError: no such file, none of these kinds, truncated, or it holds more than plain tensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file: give a .pth, .bin, .safetensors or .npz")
    with path.open("rb") as file:
        head = file.read(512)
    if head[:4] == b"PK\x03\x04":
        return _open_zip(path)
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return _open_pickle(path, mmap=False)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _open_safetensors(path)
    raise ValueError(f"{path} is no checkpoint: {_guess(head)}; give a .pth, .bin, .safetensors or .npz")


def _guess(head: bytes) -> str:
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs, the weights themselves were not downloaded"
    if head.lstrip()[:1] == b"<":
        return "it is a web page, the download failed"
    return f"it begins with {head[:16]!r}"


def _open_zip(path: pathlib.Path) -> Tensors:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as e:
        raise ValueError(f"{path} is truncated or damaged, no complete zip ({e}): fetch it again") from None
    names, size, total = [m.filename for m in members], path.stat().st_size, sum(m.file_size for m in members)
    if len(set(names)) < len(names):
        raise ValueError(f"{path} holds members of the same name: no program that saves weights does that")
    pickles = [n for n in names if n.split("/")[1:] == ["data.pkl"] or n == "data.pkl"]
    if len(pickles) == 1:
        squeezed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
        if squeezed or total > size:
            raise ValueError(
                f"{path} is no file of torch.save: "
                f"{f'{squeezed[0]} is compressed' if squeezed else 'its members claim'} {total} bytes in a file of "
                f"{size}; torch stores tensors as they are"
            )
        return _open_pickle(path, mmap=True, records=[m.file_size for m in members])
    if names and all(n.endswith(".npy") for n in names):
        _not_too_many(path, names)
        if total > BLOW_UP * size:
            raise ValueError(
                f"{path} would unpack to {total} bytes, {total / size:.0f} times its size: these are no weights"
            )
        return Tensors({m.filename.removesuffix(".npy"): _npy(path, m) for m in members})
    raise ValueError(
        f"{path} is a zip but no checkpoint: it holds {', '.join(names[:5])}{', ...' * (len(names) > 5)}, neither the "
        "data.pkl of torch.save nor arrays of numpy"
    )


def _not_too_many(path: pathlib.Path, names) -> None:
    if len(names) > MAX_TENSORS:
        raise ValueError(f"{path} holds {len(names)} tensors: models here have at most {MAX_TENSORS}")


# --- torch ------------------------------------------------------------------------------------------------------------
def _torch():
    try:
        import torch
    except ImportError as e:
        raise ValueError(f"files of PyTorch need torch ({e}): pip install 'blip-jax[convert]'") from None
    return torch


def _open_pickle(path: pathlib.Path, mmap: bool, records: list[int] = ()) -> Tensors:
    """A file of torch.save: zip, which is mapped into memory, or the older plain pickle.

    records: sizes of the zip's members.
    """
    torch = _torch()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:  # whatever a damaged or hostile pickle makes torch raise
        raise ValueError(f"{path}: {refusal(e)}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, no dict of tensors")
    try:
        content, way, beside = unpack(content)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    _not_too_many(path, content)
    notes = [f"the state dict lies under {' > '.join(way)}"] * (way not in ([], ["model"]))
    notes += [f"left out what stands beside the weights: {listed(sorted(set(beside)))}"] * bool(beside)
    problems = [line for name, x in content.items() if (line := _no_tensor(torch, name, x))]
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ValueError("\n  ".join([f"{path} holds more than tensors:", *problems[:10], *more]))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in content.values()}
    stored, claimed = sum(storages.values()), sum(x.numel() * x.element_size() for x in content.values())
    if claimed > BLOW_UP * stored:
        raise ValueError(
            f"{path}: its {len(content)} tensors share {stored} bytes but claim {claimed}, "
            f"{claimed / stored:.0f} times as many: these are no weights"
        )
    if records:
        beyond = collections.Counter(storages.values()) - collections.Counter(records)
        if beyond - collections.Counter({0: len(content)}):
            raise ValueError(
                f"{path} is damaged: it declares storages of {sorted(beyond)} bytes that its zip does not hold"
            )
    return Tensors({name: _array(torch, x) for name, x in content.items()}, notes)


def refusal(error: Exception) -> str:
    """What torch says about a file that it does not read, in a line."""
    message = str(error).strip() or type(error).__name__
    if opcode := re.search(r"[Uu]nsupported operand (\d+)", message):
        return (
            f"a pickle with the instruction {opcode[1]}, which torch's safe reader does not have (newer protocols than "
            "torch.save's do): save it again with torch.save as it is by default, or as .safetensors"
        )
    names = re.findall(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class)[: ]+(?:GLOBAL )?([\w.]+)", message)
    if names:
        return (
            f"it asks for {next(filter(None, names[0]))}, which is code, not a tensor; nothing of it was run. Ask "
            "whoever made it for the state dict alone, best as .safetensors"
        )
    if "legacy .tar" in message or "TorchScript" in message:
        return "TorchScript and torch's oldest .tar format cannot be read safely: save its state dict with torch.save"
    first = message.split("\n")[0]
    return f"truncated, damaged, or no checkpoint (torch: {first[:200]}): fetch it again"


def _no_tensor(torch, name, x) -> str:
    """What is wrong with an entry of a state dict, or ""."""
    if not isinstance(name, str):
        return f"{name!r:.100} is the name of an entry: names are strings"
    if not isinstance(x, torch.Tensor):
        return f"{name[:100]} is a {type(x).__name__}"
    if x.layout != torch.strided or x.is_quantized or x.is_meta:
        return f"{name[:100]} is no dense tensor"
    if x.numel() * x.element_size() > x.untyped_storage().nbytes():
        return (
            f"{name[:100]} claims {list(x.shape)}, more than the {x.untyped_storage().nbytes()} bytes that are stored"
        )
    return ""


def _array(torch, x) -> np.ndarray:
    """The same memory as numpy."""
    x = x.detach()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def save_pth(path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes {"model": tensors} with torch.save, as the originals do.

    Names that share an array share its bytes in the file.
    """
    torch = _torch()
    shared = {id(x): torch.from_numpy(x if x.flags.writeable else x.copy()) for x in tensors.values()}
    with writing(path):
        torch.save({"model": collections.OrderedDict((name, shared[id(x)]) for name, x in tensors.items())}, path)


@contextlib.contextmanager
def spool(path: pathlib.Path) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """A function that lays an array into the file `path`, which is gone at the end, and returns it as it lies there: a
    model larger than the memory can be collected so. OSError: the disk is full."""
    try:
        with writing(path), path.open("xb") as file:

            def keep(x: np.ndarray) -> np.ndarray:
                if x.nbytes < SPOOLED:
                    return x
                at = file.tell()
                file.write(np.ascontiguousarray(x).data)
                file.flush()
                return np.memmap(path, x.dtype, "c", at, x.shape)  # torch takes no array that cannot be written

            yield keep
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path) -> Iterator[None]:
    """Around a library that writes `path`. OSError: what it says in its own ways where, say, the disk is full."""
    try:
        yield
    except (RuntimeError, SafetensorError) as e:
        free = shutil.disk_usage(pathlib.Path(path).parent).free
        raise OSError(
            f"{path} cannot be written ({str(e).strip().splitlines()[0][:200]}): {free / 1e9:.2f} GB are free there; "
            "make room, or give another OUT"
        ) from None


# --- without torch ----------------------------------------------------------------------------------------------------
def _open_safetensors(path: pathlib.Path) -> Tensors:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if MAX_HEADER < header < path.stat().st_size:
        raise ValueError(f"{path} has a header of {header} bytes: that of a model here has at most {MAX_HEADER}")
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()
            slices = {name: file.get_slice(name) for name in names[: MAX_TENSORS + 1]}
            kinds = {name: (s.get_shape(), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(
            f"{path} is truncated or damaged, no complete .safetensors ({str(e)[:200]}): fetch it again"
        ) from None
    _not_too_many(path, names)
    odd = [f"{name[:100]} is {dtype}" for name, (_, dtype) in kinds.items() if dtype not in SAFETENSORS_DTYPES]
    if odd:
        raise ValueError(f"{path} holds tensors of kinds that no BLIP has: {', '.join(odd[:5])}")

    def read(name):
        # opened anew each time: what it has read would stay mapped into memory
        with safe_open(path, framework="np") as file:
            return file.get_tensor(name)

    return Tensors(
        {
            name: Lazy(shape, SAFETENSORS_DTYPES[dtype], functools.partial(read, name))
            for name, (shape, dtype) in kinds.items()
        }
    )


def _npy(path: pathlib.Path, member: zipfile.ZipInfo) -> Lazy:
    """An array of an .npz. ValueError: Python objects in it, or another size than its member of the zip has."""
    where = f"{path}: {member.filename}"
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
            start = file.tell()
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as e:
        raise ValueError(f"{where} is truncated or damaged, no numpy array ({e}): fetch it again") from None
    if dtype.hasobject:
        raise ValueError(f"{where} holds Python objects, which is code, not numbers; nothing of it was run")
    if int(np.prod(shape, dtype=object)) * dtype.itemsize != member.file_size - start:
        raise ValueError(f"{where} claims {list(shape)} of {dtype}, but has {member.file_size - start} bytes")

    def read():
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except (zipfile.BadZipFile, ValueError, EOFError) as e:
            raise ValueError(f"{where} is damaged ({e}): fetch it again") from None

    return Lazy(shape, dtype, read)
