"""A temporary folder of a process, for copies of what lies on a bucket.

It goes with its process; what one leaves that is killed, the next process of its user removes that needs such a folder.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import pathlib
import shutil
import socket
import stat
import sys
import tempfile

OWN = "blip_jax-gs-"  # how such folders begin
HELD, FILES = "lock", "files"  # in such a folder: what its process holds as long as it lives, and what it is for
_FOLDER: list[str] = []


def own_folder() -> str:
    """A folder on this machine that is removed when the process ends; of one that is killed, by the next process of
    this user that asks for its own."""
    if not _FOLDER:
        _remove_left()
        _FOLDER.append(_own_folder())
    return _FOLDER[0]


def _own_folder() -> str:
    folder = pathlib.Path(tempfile.mkdtemp(prefix=OWN))
    atexit.register(_remove_own, folder)
    (folder / FILES).mkdir()
    # It lasts as long as this process, and those forked from it. A file called HELD was locked before it had that name.
    fd = os.open(folder / f"{HELD}.new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(fd, "\n".join(_machine()).encode())
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / f"{HELD}.new").rename(folder / HELD)
    except OSError:  # no locks on this file system: without that name it stays for ever where this process is killed
        os.close(fd)
    return str(folder / FILES)


def _machine() -> set[str]:
    """By what another process knows that it sees this one's locks: the host, also after it was started anew, and the
    start of its kernel, which containers share."""
    names = {socket.gethostname()}
    with contextlib.suppress(OSError):
        names.add(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    return names


def _remove_left() -> None:
    """Removes the folders that killed processes of this user left on this machine, and says so in one line."""
    place = pathlib.Path(tempfile.gettempdir())
    sizes: list[int] = []
    with contextlib.suppress(OSError):
        sizes += [size for folder in place.glob(f"{OWN}*") if (size := _removed(folder)) is not None]
    if sizes:
        print(
            f"removed {len(sizes)} temporary folder{'s' * (len(sizes) > 1)} of killed processes, {place}/{OWN}*, "
            f"{sum(sizes) / 1e6:.1f} MB",
            file=sys.stderr,
            flush=True,
        )


def _removed(folder: pathlib.Path) -> int | None:
    """Removes a folder of a process that is gone, of whose lock the kernel has let go; bytes of what was in it. None:
    it is not removed."""
    with contextlib.suppress(OSError):
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
            return None
        fd = os.open(folder / HELD, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / HELD).lstat()  # else another process has just removed it
            if not _machine() & set(os.read(fd, 1000).decode("utf-8", "replace").split("\n")):
                return None
            size = sum(
                os.lstat(os.path.join(path, name)).st_size for path, _, names in os.walk(folder) for name in names
            )
            _remove_own(folder)
            return None if folder.exists() else size
        finally:
            os.close(fd)
    return None


def _remove_own(folder: pathlib.Path) -> None:
    """Removes such a folder as far as that is possible, the lock at last: what is left still shows whose it was."""
    shutil.rmtree(folder / FILES, ignore_errors=True)
    if not (folder / FILES).exists():
        shutil.rmtree(folder, ignore_errors=True)
