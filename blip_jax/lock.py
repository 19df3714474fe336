"""One run, one folder: a lock that says who holds it, and that a dead owner does not hold.

The lock of `path` is a file of JSON beside or in it: host, process, when that began, command, and a number that its
owner raises every BEAT seconds. It is made by link(2), or where a file system has no links by exclusive creation, which
hold on network file systems, too; flock, which does not hold on all of them, is not used.

Whether an owner is dead is known on the same host by its process, and its beginning, as numbers are used again. Of
another host, or another container, the file is watched: an owner whose number does not change within STALE seconds, by
the watcher's own clock, is dead. Files have generations, NAME.1, NAME.2, ...: who follows a dead owner makes the next
one, which only one can, and never removes what another may just have made; then it looks once more.

On a bucket the lock is one object, whose generation, which the store counts, takes the place of all that: it is made
only if there is none, raised and followed only if it is still the one that was seen.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import pathlib
import random
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from blip_jax import buckets

BEAT = 5.0  # seconds between two signs of life of an owner
STALE = 60.0  # seconds without one after which an owner on another host is dead
POLL = 1.0  # seconds between two looks at an owner that may be dead
DIGITS = 12  # of the number that is raised
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


class Share(NamedTuple):
    """Part `process` of the `processes` independent ones that work in one folder."""

    process: int
    processes: int


@contextlib.contextmanager
def held(path, share: Share | None = None) -> Iterator[None]:
    """While entered, this process alone holds `path`: a folder, which is made, or an output file or folder to be.

    share: it shares a folder with others of other numbers, but of as many processes.
    ValueError, in one line: another process holds it, who and since when. OSError: the place cannot be written.
    """
    if buckets.is_bucket(path):
        with _BucketLock(buckets.of(path) / "lock", share):
            yield
        return
    lock = _Lock(buckets.local(path) / "lock", share)
    folder = lock.path.parent
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock:
            yield
    finally:
        if made:  # what came to nothing leaves no empty folder
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def held_output(path) -> Iterator[None]:
    """As `held`, for an output that does not exist yet, a file or a folder: the lock lies beside it."""
    if buckets.is_bucket(path):
        path = buckets.of(path)
        with _BucketLock(path.with_name(f".{path.name}.lock"), None):
            yield
        return
    path = buckets.local(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _Lock(path.with_name(f".{path.name}.lock"), None):
        yield


class _Lock:
    def __init__(self, path: pathlib.Path, share: Share | None):
        self.path, self._share = path, share  # of the files without their endings
        self._token, self._mine, self._fd, self._end = _token(), None, None, threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True, name="lock")
        self._name = path.name + (f"-{share.process}-of-{share.processes}" if share else "")

    def __enter__(self) -> _Lock:
        self._take()
        self._fd = os.open(self._mine, os.O_WRONLY)
        self._beating.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._beating.join()  # it must not write into another file that gets this one's number
        os.close(self._fd)
        with contextlib.suppress(OSError):
            if (_read(self._mine) or {}).get("token") == self._token:
                self._mine.unlink()

    def _take(self) -> None:
        dead: dict[str, pathlib.Path] = {}  # token -> file
        while True:
            for file, record in self._others(dead):
                if _alive(file, record):
                    raise ValueError(_in_use(self.path, file, record))
                dead[record["token"]] = file
            mine = self.path.with_name(f"{self._name}.{1 + max(map(_generation, self._files()), default=0)}")
            if not self._make(mine):
                continue  # another was quicker
            if not self._others(dead, but=mine):
                break
            mine.unlink()  # two made different files at once: both try again
            time.sleep(random.uniform(0, POLL))
        for file in dead.values():
            file.unlink(missing_ok=True)
        self._mine = mine
        self._clear()

    def _clear(self) -> None:
        """Removes what processes left that were killed while they made a lock; whose is in the name."""
        token = "(([0-9a-f]{8})-([0-9]{1,9})-)?[0-9a-f]{32}"
        pattern = re.compile(rf"\.{re.escape(self.path.name)}(-[0-9]+-of-[0-9]+)?\.{token}")
        now = self._mine.stat().st_mtime  # of the clock that the others' times are of, too
        for file in self.path.parent.iterdir():
            if not (found := pattern.fullmatch(file.name)):
                continue
            with contextlib.suppress(OSError):  # it is gone meanwhile, or another user's
                here = found[3] == _site()
                if here and _started(int(found[4])) == "" or not here and now - file.stat().st_mtime > STALE:
                    file.unlink()

    def _files(self) -> list[pathlib.Path]:
        pattern = re.compile(re.escape(self.path.name) + r"(-[0-9]+-of-[0-9]+)?\.[0-9]+")
        return [file for file in self.path.parent.iterdir() if pattern.fullmatch(file.name)]

    def _others(self, dead, but: pathlib.Path | None = None) -> list[tuple[pathlib.Path, dict]]:
        """Files whose owners may stand in the way, with what they say."""
        found = [(file, _settled(file)) for file in self._files() if file != but]
        return [(f, r) for f, r in found if r and r["token"] not in dead and self._conflicts(r)]

    def _conflicts(self, record: dict) -> bool:
        return not _apart(self._share, record.get("share"))

    def _make(self, file: pathlib.Path) -> bool:
        """Makes the file with everything in it; False: it is there already."""
        beside = file.with_name(f".{self._name}.{self._token}")
        content = json.dumps({"beat": "0" * DIGITS, **_myself(), "token": self._token, "share": self._share})
        try:
            with open(beside, "w", encoding="utf-8") as f:
                f.write(content + "\n")
                f.flush()
                os.fsync(f.fileno())
            return exclusively(beside, file)
        except FileNotFoundError:
            if not file.parent.is_dir():
                raise
            return False  # the owner took this process, which stood still, for dead
        finally:
            beside.unlink(missing_ok=True)

    def _beat(self) -> None:
        """Raises the number, in place: of a file that another has removed it is nobody's."""
        number, at = 0, len('{"beat": "')
        while not self._end.wait(BEAT):
            number += 1
            with contextlib.suppress(OSError):  # a full disk or a host that cannot be reached: maybe the next time
                os.pwrite(self._fd, f"{number:0{DIGITS}}".encode(), at)
                os.fsync(self._fd)
            for file, record in self._newer():
                _leave(f"error: {_in_use(self.path, file, record)}; it took this process for dead, which ends now")

    def _newer(self) -> list[tuple[pathlib.Path, dict]]:
        """Locks of others, where this one's file is gone."""
        with contextlib.suppress(OSError):
            if (_read(self._mine) or {}).get("token") != self._token and not self._end.is_set():
                return self._others({})
        return []


class _BucketLock:
    def __init__(self, path, share: Share | None):
        from google.cloud import storage

        self._name = path.name + (f"-{share.process}-of-{share.processes}" if share else "")
        self.path, self._share, self._mine = path, share, path.with_name(self._name)
        self._record = {**_myself(), "token": _token(), "share": share}
        bucket, _, name = str(self._mine).removeprefix(buckets.SCHEME).partition("/")
        try:  # objects need no project, but without one the library does not begin
            self._object = (
                storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT") or "none").bucket(bucket).blob(name)
            )
        except Exception as e:  # of its credentials
            raise OSError(f"{path.parent} cannot be locked: {e}") from e
        self._generation, self._end = 0, threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True, name="lock")

    def __enter__(self) -> _BucketLock:
        try:
            self._take()
        except (ValueError, OSError):
            raise
        except Exception as e:  # whatever its library has for a network, a name, or rights that are missing
            raise OSError(f"{self.path.parent} cannot be locked: {' '.join(str(e).split())[:300]}") from e
        self._beating.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._beating.join()
        with contextlib.suppress(Exception):  # it is stale soon
            self._object.delete(if_generation_match=self._generation)

    def _take(self) -> None:
        while True:
            follows = 0
            for file, record in self._others():
                generation = self._seen(file)
                if _alive(file, record):
                    raise ValueError(_in_use(self.path, file, record))
                if file == self._mine:
                    follows = generation
                elif generation:
                    self._object.bucket.blob(self._place(file)).delete(if_generation_match=generation)
            if self._put(0, follows):
                if not [file for file, _ in self._others() if file != self._mine]:
                    return
                self._object.delete(if_generation_match=self._generation)  # two made different ones: both try again
            time.sleep(random.uniform(0, POLL))

    def _others(self) -> list[tuple]:
        """Objects whose owners may stand in the way, with what they say."""
        pattern = re.compile(re.escape(self.path.name) + r"(-[0-9]+-of-[0-9]+)?")
        folder = self.path.parent
        files = [f for f in folder.iterdir() if pattern.fullmatch(f.name)] if folder.is_dir() else []
        found = [(file, _read(file)) for file in files]
        return [(f, r) for f, r in found if r and not _apart(self._share, r.get("share"))]

    def _seen(self, file) -> int:
        """The generation of an object; 0: it is gone."""
        found = self._object.bucket.get_blob(self._place(file))
        return found.generation if found else 0

    def _place(self, file) -> str:
        return f"{self._object.name.rpartition('/')[0]}/{file.name}".lstrip("/")

    def _put(self, beat: int, follows: int) -> bool:
        """Writes the object if it is still of generation `follows`, 0: if there is none; False: it is not."""
        from google.api_core.exceptions import PreconditionFailed

        content = json.dumps({"beat": f"{beat:0{DIGITS}}", **self._record})
        try:
            self._object.upload_from_string(content, if_generation_match=follows, timeout=STALE / 4)
        except PreconditionFailed:
            # or it did, and its answer was lost
            if (_read(self._mine) or {}).get("token") != self._record["token"]:
                return False
            self._object.reload()
        self._generation = self._object.generation
        return True

    def _beat(self) -> None:
        number = 0
        while not self._end.wait(BEAT):
            number += 1
            with contextlib.suppress(Exception):  # no network: maybe the next time
                if not self._put(number, self._generation) and (record := _read(self._mine)):
                    _leave(f"error: {_in_use(self.path, self._mine, record)}; it took this process for dead")


def exclusively(beside: pathlib.Path, to: pathlib.Path) -> bool:
    """Gives the file `beside` the name `to`, never over something; False: there is something. `beside` may stay."""
    try:
        os.link(beside, to)
        return True
    except FileExistsError:
        return beside.stat().st_nlink > 1  # the answer of a network file system that did it got lost
    except OSError as e:
        if e.errno not in NO_LINKS:
            raise
    try:
        os.close(os.open(to, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    os.replace(beside, to)
    return True


def _apart(own: Share | None, theirs: list | None) -> bool:
    """Whether two share a folder without standing in each other's way."""
    return bool(own and theirs and theirs[1] == own[1] and theirs[0] != own[0])


def _token() -> str:
    """What no other lock has; it begins with where and which this process is."""
    return f"{_site()}-{os.getpid()}-{uuid.uuid4().hex}"


def _site() -> str:
    """`_here`, for names of files."""
    return f"{zlib.crc32(_here().encode()):08x}"


def _myself() -> dict:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "here": _here(),
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": shlex.join(sys.orig_argv)[:1000],
    }


def _here() -> str:
    """Where numbers of processes mean the same: this start of this kernel, this container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process began, as the system says it; None: it cannot be told, "": there is no such process any more."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass  # another user's
    try:
        state, *fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]  # Z: it is dead, and nobody has asked for its status
    except OSError:
        pass
    with contextlib.suppress(OSError):
        done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
        return done.stdout.strip() or None
    return None


def _alive(file: pathlib.Path, record: dict) -> bool:
    """Whether the owner of a lock lives; of another host this takes STALE seconds of watching where it does not."""
    if record.get("here") == _here() and isinstance(record.get("pid"), int) and 0 < record["pid"] < 2**31:
        now = _started(record["pid"])
        return now is None or now != "" and record.get("started") in (None, now)
    print(
        f"{file}: {_who(record)} held it; watching for up to {STALE:g} s whether it is alive",
        file=sys.stderr,
        flush=True,
    )
    until = time.monotonic() + STALE
    while time.monotonic() < until:
        time.sleep(POLL)
        now = _read(file)
        if now is None or now != record:  # it ended, or is alive; of one that ended there is no file to find
            return now is not None
    return False


def _read(file: pathlib.Path) -> dict | None:
    """What a lock says; None: it is gone. Of one without sense only "text", which changes when it does."""
    try:
        text = file.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    try:
        record = json.loads(text)
        share = record["share"]
        if isinstance(record["token"], str) and (share is None or isinstance(share, list) and len(share) == 2):
            return record
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    return {"token": f"{file} {text}", "text": text}


def _settled(file: pathlib.Path) -> dict | None:
    """As `_read`; one that is being made, where there are no links, gets a moment."""
    for _ in range(5):
        record = _read(file)
        if record is None or "text" not in record:
            break
        time.sleep(POLL / 5)
    return record


def _generation(file: pathlib.Path) -> int:
    return int(file.name.rpartition(".")[2])


def _who(record: dict) -> str:
    pid, host, since, command = (
        " ".join(str(record.get(n)).split())[:300] for n in ("pid", "host", "since", "command")
    )
    return f"process {pid} on host {host}, since {since} ({command})"


def _in_use(path: pathlib.Path, file: pathlib.Path, record: dict) -> str:
    what = path.parent if path.name == "lock" else path.with_name(path.name[1:].removesuffix(".lock"))
    return (
        f"{what} is in use by {_who(record)}: wait for its end, stop it, or use another place (its lock is {file}, "
        "which one that was killed does not hold)"
    )


def _leave(why: str) -> None:
    """Ends this process before it touches more of what is another's now."""
    with contextlib.suppress(OSError, ValueError):
        print(why, file=sys.stderr, flush=True)
    os._exit(2)
