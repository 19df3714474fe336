"""Temporary folders end with their process, and those of a killed one with the next process that needs its own."""

import errno
import fcntl
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from blip_jax.data import temporary


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder for temporary ones, in which this process has none of its own yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(temporary, "_FOLDER", [])
    monkeypatch.setattr(temporary.atexit, "register", lambda *_: None)  # the test's end comes first
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def work(pipe) -> None:
    """A process with a folder of 3 MB, until somebody ends it."""
    (pathlib.Path(temporary.own_folder()) / "inner").mkdir()
    (pathlib.Path(temporary.own_folder()) / "inner" / "copy").write_bytes(bytes(3_000_000))
    pipe.send(str(pathlib.Path(temporary.own_folder()).parent))
    time.sleep(600)


@pytest.fixture
def working():
    """Starts such a process; (it, its folder)."""
    fork, made = multiprocessing.get_context("fork"), []

    def start():
        here, there = fork.Pipe(duplex=False)
        made.append(fork.Process(target=work, args=(there,), daemon=True))
        made[-1].start()
        assert here.poll(60)
        return made[-1], pathlib.Path(here.recv())

    yield start
    for process in made:
        kill(process)


def kill(process) -> None:
    process.kill()
    process.join()


def test_the_folders_of_killed_processes_go_and_those_of_living_ones_stay(place, working, capfd):
    (killed, left), (other, too), (_, stays) = working(), working(), working()
    kill(killed), kill(other)
    assert left.is_dir() and too.is_dir()
    own = pathlib.Path(temporary.own_folder())
    assert sorted(place.iterdir()) == sorted([stays, own.parent]) and own.is_dir()
    assert (stays / "files" / "inner" / "copy").stat().st_size == 3_000_000
    said = capfd.readouterr().err
    assert said == f"removed 2 temporary folders of killed processes, {place}/blip_jax-gs-*, 6.0 MB\n"
    assert temporary.own_folder() == str(own) and capfd.readouterr().err == ""


def test_a_process_that_stands_still_keeps_its_folder(place, working):
    process, folder = working()
    os.kill(process.pid, signal.SIGSTOP)
    temporary.own_folder()
    assert (folder / "files" / "inner" / "copy").exists()


def test_one_that_was_forked_from_a_killed_process_keeps_its_folder(place):
    here, there = multiprocessing.Pipe(duplex=False)
    if (pid := os.fork()) == 0:
        try:
            temporary.own_folder()
            if (child := os.fork()) == 0:
                time.sleep(600)
            there.send((child, temporary.own_folder()))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert here.poll(60)
    child, files = here.recv()
    try:
        temporary.own_folder()
        assert os.path.isdir(files)
    finally:
        os.kill(child, signal.SIGKILL)


def leave(place, name: str = "left", machine: set[str] | None = None) -> pathlib.Path:
    """A folder as a killed process leaves it."""
    files = place / f"blip_jax-gs-{name}" / "files"
    files.mkdir(parents=True)
    (files / "copy").write_text("of a file")
    (files.parent / "lock").write_text("\n".join(temporary._machine() if machine is None else machine))
    return files.parent


def test_links_are_removed_and_not_followed(place, tmp_path, capfd):
    for name in ("precious", "real"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    left = leave(place)
    (left / "files" / "link").symlink_to(tmp_path / "precious")
    (left / "files" / "to_file").symlink_to(tmp_path / "precious" / "file")
    leave(tmp_path / "real")
    (place / "blip_jax-gs-link").symlink_to(tmp_path / "real" / "blip_jax-gs-left")
    (to_lock := leave(place, "to_lock")).joinpath("lock").unlink()
    (to_lock / "lock").symlink_to(tmp_path / "real" / "blip_jax-gs-left" / "lock")
    temporary.own_folder()
    assert not left.exists() and "removed 1 temporary folder of" in capfd.readouterr().err
    assert (tmp_path / "precious" / "file").read_text() == "mine"
    assert (tmp_path / "real" / "blip_jax-gs-left" / "files" / "copy").exists() and to_lock.is_dir()


def test_what_may_be_anothers_stays(place, monkeypatch, capfd):
    (place / "blip_jax-gs-file").write_text("a file")
    (place / "blip_jax-gs-new").mkdir()  # one that is being made, or of a version without locks
    leave(place, "elsewhere", {"another-host", "of another kernel"})  # whose locks may not be seen here
    leave(place, "empty", set())
    temporary.own_folder()
    assert len(list(place.iterdir())) == 5
    leave(place, "user")
    monkeypatch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
    temporary._remove_left()
    assert len(list(place.iterdir())) == 6 and capfd.readouterr().err == ""


@pytest.mark.parametrize("known", [0, 1])
def test_this_host_before_its_last_start_and_another_container_count_as_here(place, known):
    machine = sorted(temporary._machine())  # without /proc the host alone
    left = leave(place, machine={machine[known % len(machine)], "another"})
    temporary.own_folder()
    assert not left.exists()


def test_what_cannot_be_removed_fails_nothing_and_is_not_said_to_be(place, monkeypatch, capfd):
    left = leave(place)
    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", lambda *_, **__: None)
        assert os.path.isdir(temporary.own_folder())
    assert (left / "lock").exists() and capfd.readouterr().err == ""
    temporary._remove_left()
    assert not left.exists() and "removed 1 " in capfd.readouterr().err


def test_one_that_is_killed_while_it_removes_leaves_the_lock(place, monkeypatch):
    left = leave(place)

    def die(path, *_, **__):
        os.unlink(pathlib.Path(path) / "copy")
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            temporary._remove_left()
    assert (left / "lock").exists() and not (left / "files" / "copy").exists()
    temporary._remove_left()
    assert not left.exists()


def test_of_two_that_remove_one_does(place, monkeypatch, capfd):
    left, lock = leave(place), fcntl.flock

    def first(*args):  # the other was quicker
        monkeypatch.setattr(fcntl, "flock", lock)
        shutil.rmtree(left)
        lock(*args)

    monkeypatch.setattr(fcntl, "flock", first)
    temporary._remove_left()
    assert capfd.readouterr().err == "" and fcntl.flock is lock


def test_without_locks_it_works_and_is_never_removed(place, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as m:
        m.setattr(fcntl, "flock", none)
        left = leave(place)
        own = pathlib.Path(temporary.own_folder())
        assert own.is_dir() and left.is_dir() and not (own.parent / "lock").exists()
    temporary._remove_left()
    assert own.is_dir() and not left.exists()


def test_they_end_with_their_process(tmp_path):
    code = "from blip_jax.data.temporary import own_folder as own; open(own() + '/copy', 'w').close(); print(own())"
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path}/blip_jax-gs-") and not list(tmp_path.iterdir())
