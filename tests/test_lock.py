"""One run, one folder: who holds a lock is named, a dead owner holds none, and of many that try at once one gets it."""

import errno
import json
import multiprocessing
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from blip_jax import lock
from blip_jax.lock import Share


def files(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if "lock" in p.name)


def record(folder) -> dict:
    (file,) = folder.glob("lock*")
    return json.loads(file.read_text())


def left_behind(folder, **other) -> None:
    """A lock of an owner that is not there any more: this process's, with `other` entries."""
    with lock.held(folder):
        text = json.dumps(record(folder) | {"token": "of another"} | other)
    (folder / "lock.1").write_text(text)


def test_it_names_its_owner_and_goes_with_it(tmp_path):
    with lock.held(tmp_path / "run"):
        held = record(tmp_path / "run")
        assert held["host"] == socket.gethostname() and held["pid"] == os.getpid() and held["started"]
        with pytest.raises(ValueError) as e, lock.held(tmp_path / "run"):
            pass
    for part in (
        f"{tmp_path / 'run'} is in use by process {os.getpid()} on host {socket.gethostname()}, since 20",
        "pytest",
        str(tmp_path / "run" / "lock.1"),
    ):
        assert part in str(e.value), str(e.value)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()  # made for the lock alone
    (tmp_path / "mine").mkdir()
    with lock.held(tmp_path / "mine"):
        assert files(tmp_path / "mine") == ["lock.1"]
    assert (tmp_path / "mine").is_dir() and not files(tmp_path / "mine")


def test_an_output_to_be_is_locked_beside_it(tmp_path):
    with lock.held_output(tmp_path / "a.pth"), lock.held_output(tmp_path / "b.pth"):
        assert files(tmp_path) == [".a.pth.lock.1", ".b.pth.lock.1"]
        with pytest.raises(ValueError, match=f"{tmp_path}/a.pth is in use by"), lock.held_output(tmp_path / "a.pth"):
            pass
    assert not files(tmp_path)


def test_a_dead_owner_on_this_host_holds_nothing(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for other in ({"pid": int(gone.stdout)}, {"started": "12"}):  # the number is free, or another's now
        left_behind(tmp_path, **other)
        with lock.held(tmp_path):
            assert files(tmp_path) == ["lock.2"]
        assert not files(tmp_path)


def test_a_process_that_died_and_was_not_asked_for_its_status_holds_nothing(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    with lock.held(tmp_path):
        begun = lock._started(child.pid)
        text = json.dumps(record(tmp_path) | {"token": "of another", "pid": child.pid, "started": begun})
    (tmp_path / "lock.1").write_text(text)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    with lock.held(tmp_path):
        pass
    child.wait()


@pytest.fixture
def quick(monkeypatch):
    """Watches of a tenth of a second, on a clock of their own."""
    monkeypatch.setattr(lock, "STALE", 0.1)
    monkeypatch.setattr(lock, "POLL", 0.01)


def test_an_owner_elsewhere_that_stands_still_holds_nothing(tmp_path, quick, capsys):
    left_behind(tmp_path, host="other", here="other 1 2")
    with lock.held(tmp_path):
        assert files(tmp_path) == ["lock.2"]
    assert "process" in (said := capsys.readouterr().err) and "on host other" in said and "watching" in said


def test_an_owner_elsewhere_that_moves_is_alive_whatever_its_clock_says(tmp_path, quick, monkeypatch):
    left_behind(tmp_path, host="other", here="other 1 2", since="1970-01-01 00:00:00")
    beats = iter(range(1, 10))

    def beat(seconds):
        text = (tmp_path / "lock.1").read_text()
        (tmp_path / "lock.1").write_text(text.replace('"beat": "', f'"beat": "{next(beats)}'))

    monkeypatch.setattr(lock.time, "sleep", beat)
    with pytest.raises(ValueError, match="in use by process .* on host other"), lock.held(tmp_path):
        pass
    assert files(tmp_path) == ["lock.1"]


def test_an_owner_gives_signs_of_life_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.001)
    with lock.held(tmp_path):
        before = record(tmp_path)
        while (now := record(tmp_path))["beat"] == before["beat"]:
            time.sleep(0.001)
    assert now == before | {"beat": now["beat"]} and int(now["beat"]) > 0


def test_an_owner_whose_lock_was_taken_over_ends(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(lock, "_leave", ended.append)
    monkeypatch.setattr(lock, "BEAT", 0.001)
    with lock.held(tmp_path):
        text = json.dumps(record(tmp_path) | {"token": "another", "host": "other"})
        (tmp_path / "lock.2").write_text(text)
        (tmp_path / "lock.1").unlink()
        while not ended:
            time.sleep(0.001)
    assert "in use by" in ended[0] and "on host other" in ended[0] and "took this process for dead" in ended[0]
    assert files(tmp_path) == ["lock.2"]


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"token": 7, "share": null}', '{"token": "a", "share": 3}', "\0" * 9]
)
def test_a_lock_without_sense_is_watched_like_any_other(tmp_path, quick, text):
    (tmp_path / "lock.1").write_text(text)
    with lock.held(tmp_path):
        assert files(tmp_path) == ["lock.2"]
    assert not files(tmp_path)


def test_shares_of_one_folder(tmp_path):
    """Processes of different numbers, of as many, share it; nobody else does."""
    with lock.held(tmp_path, Share(0, 3)), lock.held(tmp_path, Share(2, 3)):
        for other in (Share(2, 3), Share(1, 2), None):
            with pytest.raises(ValueError, match="in use by"), lock.held(tmp_path, other):
                pass
    with lock.held(tmp_path):
        with pytest.raises(ValueError, match="in use by"), lock.held(tmp_path, Share(1, 3)):
            pass
    assert not files(tmp_path)


def test_without_links(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", link)
    test_it_names_its_owner_and_goes_with_it(tmp_path)
    (tmp_path / "beside").write_text("new")
    (tmp_path / "there").write_text("old")
    assert not lock.exclusively(tmp_path / "beside", tmp_path / "there")
    assert lock.exclusively(tmp_path / "beside", tmp_path / "free")
    assert (tmp_path / "there").read_text() == "old" and (tmp_path / "free").read_text() == "new"


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), lock.held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def contend(folder: str, wins: str, start, left) -> None:
    """Tries once; who holds it is alone, and keeps it until all have tried."""
    start.wait()
    try:
        with lock.held(folder):
            os.close(os.open(pathlib.Path(wins) / str(os.getpid()), os.O_CREAT))
            left.wait()
    except ValueError:
        left.wait()


@pytest.mark.parametrize("after", ["nothing", "a dead owner"])
def test_of_many_at_once_one_gets_it(tmp_path, after):
    fork, tries, n = multiprocessing.get_context("fork"), 3, 5
    for attempt in range(tries):
        folder, wins = tmp_path / f"run-{attempt}", tmp_path / f"wins-{attempt}"
        folder.mkdir(), wins.mkdir()
        if after == "a dead owner":
            left_behind(folder, started="12")
        start, left = fork.Barrier(n), fork.Barrier(n)
        children = [fork.Process(target=contend, args=(str(folder), str(wins), start, left)) for _ in range(n)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [0] * n
        assert len(list(wins.iterdir())) == 1 and not files(folder)


# dies where its argument says: before the text of the lock is written, behind it, or when the lock has its name
KILLED = """
import os, signal, sys
from blip_jax import lock
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "empty":
    lock.os.fsync, lock.json.dumps = die, lambda *_: ""
elif sys.argv[2] == "written":
    lock.exclusively = die
else:
    made = lock.exclusively
    lock.exclusively = lambda *args: (made(*args), die())
with lock.held(sys.argv[1], lock.Share(0, 2)):
    pass
"""


@pytest.mark.parametrize("moment", ["empty", "written", "made"])
def test_what_one_leaves_that_is_killed_while_it_takes_the_lock_is_removed(tmp_path, moment):
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment]).returncode == -9
    (left,) = tmp_path.glob(".lock-0-of-2.*")
    with lock.held(tmp_path):
        (own,) = tmp_path.iterdir()
        assert own.name.startswith("lock.")


def test_what_one_elsewhere_may_still_need_stays_for_a_minute(tmp_path):
    here, other = (tmp_path / f".lock.{place}-{os.getpid()}-{'0' * 32}" for place in (lock._site(), "0" * 8))
    early = tmp_path / f".lock.{'1' * 32}"  # as versions before wrote it
    for file in (here, other, early):
        file.write_text("")
    with lock.held(tmp_path):
        assert here.exists() and other.exists() and early.exists()
    for file in (here, other, early):
        os.utime(file, (0, time.time() - lock.STALE - 5))
    with lock.held(tmp_path):
        assert here.exists() and not other.exists() and not early.exists()
