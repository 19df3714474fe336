"""Where a process stands, how processes meet, what they compare.

And what they say when one is missing, differs or dies.
"""

import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from world.processes import ROOT, Pod, Server, free_port
from world.runs import write_config

from blip_jax.parallel import peers, processes, sharding
from blip_jax.parallel.peers import Place

local_processes = importlib.import_module("local_processes")


def explicit(address="10.0.0.2:8476", count="4", number="3"):
    return {"BLIP_JAX_COORDINATOR": address, "BLIP_JAX_PROCESSES": count, "BLIP_JAX_PROCESS": number}


def test_place_by_the_environment(monkeypatch):
    assert processes.place({}) is None
    assert processes.place(explicit()) == Place("10.0.0.2:8476", 4, 3, None)
    assert processes.place(explicit(count="1", number="0")) is None
    slurm = {
        "SLURM_JOB_ID": "4097",
        "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_NODES": "2",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert processes.place(os.environ) == Place("gpu03:61441", 4, 3, (1,))
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "4")
    assert processes.place(os.environ).devices is None  # a node of its own
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert processes.place(os.environ) is None


@pytest.mark.parametrize(
    "env, parts",
    [
        (
            {"BLIP_JAX_PROCESSES": "2"},
            ("BLIP_JAX_PROCESSES=2 without BLIP_JAX_COORDINATOR and BLIP_JAX_PROCESS", "all three"),
        ),
        (explicit(address="10.0.0.2"), ("BLIP_JAX_COORDINATOR=10.0.0.2: host:port",)),
        (explicit(address="host:http"), ("BLIP_JAX_COORDINATOR=host:http",)),
        (explicit(address="host:70000"), ("host:70000",)),
        (explicit(number="4"), ("BLIP_JAX_PROCESSES=4, BLIP_JAX_PROCESS=4", "numbered from 0")),
        (explicit(count="many"), ("BLIP_JAX_PROCESSES=many",)),
        (explicit(number="-1"), ("BLIP_JAX_PROCESS=-1",)),
    ],
)
def test_a_wrong_environment_is_named(env, parts):
    with pytest.raises(ValueError) as e:
        processes.place(env)
    assert all(part in str(e.value) for part in parts), str(e.value)


def test_a_wrong_timeout_is_named():
    assert processes._timeout({}) == 300 and processes._timeout({"BLIP_JAX_TIMEOUT": "2.5"}) == 2.5
    for text in ("soon", "0", "-1"):
        with pytest.raises(ValueError, match=f"BLIP_JAX_TIMEOUT={text}: seconds"):
            processes._timeout({"BLIP_JAX_TIMEOUT": text})


def meet(places, timeout=10.0):
    """What `peers.join` gives or raises at each of the places, at the same time."""
    results = [None] * len(places)

    def one(i):
        try:
            results[i] = peers.join(places[i], timeout)
        except ValueError as e:
            results[i] = str(e)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def places(numbers, n, **told):
    address = f"127.0.0.1:{free_port()}"
    return [Place(address, told.get(f"p{k}", n), k, None) for k in numbers]


def test_a_roll_call_and_an_exchange():
    stranger_first = places(range(3), 3)
    with socket.socket() as stranger:  # something else that knocks

        def knock():
            while stranger.connect_ex(("127.0.0.1", int(stranger_first[0].address.split(":")[1]))):
                time.sleep(0.01)
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")

        threading.Thread(target=knock, daemon=True).start()
        time.sleep(0.1)
        lines = meet(stranger_first)
    assert [line.place.process for line in lines] == [0, 1, 2] and lines[1].hosts == [socket.gethostname()] * 3
    assert all(abs(line.offset) < 1 for line in lines)
    found = [None] * 3

    def exchange(k):
        found[k] = [lines[k].gather({"from": k}), lines[k].gather(k * "x")]
        lines[k].finish()

    threads = [threading.Thread(target=exchange, args=(k,)) for k in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [[[{"from": 0}, {"from": 1}, {"from": 2}], ["", "x", "xx"]]] * 3


@pytest.mark.parametrize("asking", [0, 2])
def test_all_stop_at_the_same_call(asking):
    """Whoever is asked, and however far ahead of the others some are."""
    for attempt in range(8):
        lines, n = meet(places(range(3), 3)), 1 + attempt % 4
        ended = [None] * 3

        def calls(k):
            for call in range(1, 400):
                if lines[k].stops(k == asking and call >= n):
                    ended[k] = call
                    break
                time.sleep((k == 1) * 0.0005)
            lines[k].finish()

        threads = [threading.Thread(target=calls, args=(k,)) for k in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(set(ended)) == 1 and ended[0] >= n, (attempt, ended)


def test_a_wish_to_stop_that_comes_too_late_holds_nobody():
    lines = meet(places(range(2), 2))
    assert not lines[0].stops(False)  # the last call of 0, before 1's
    found = []
    late = threading.Thread(target=lambda: found.append(lines[1].stops(True)))
    late.start()
    late.join(30)
    ends = [threading.Thread(target=line.finish) for line in lines]
    for end in ends:
        end.start()
    for end in ends:
        end.join(30)
    assert found == [False] and not any(end.is_alive() for end in ends)


def test_who_does_not_come_is_named_to_all():
    zero, two = meet(places([0, 2], 4), timeout=1.0)
    host = socket.gethostname()
    assert f"2 of 4 processes came within 1 s: 0 (host {host}), 2 (host {host}); missing: 1, 3" in zero and two == zero
    assert "raise BLIP_JAX_TIMEOUT" in zero


def test_numbers_that_do_not_fit_are_refused():
    twice = meet(places([0, 1, 1], 3))
    assert (
        all("two processes have number 1, on hosts" in said for said in twice[:2]) and "number 1" in twice[2] + twice[1]
    )
    told = meet(places([0, 1], 2, p1=3))
    assert (
        told[0] == told[1] and "was told of 3 processes, process 0" in told[0] and "of 2: give all of them" in told[0]
    )


def test_a_coordinator_that_cannot_be_reached():
    (alone,) = meet(places([1], 2), timeout=0.8)
    assert "process 1 cannot reach process 0 at 127.0.0.1:" in alone and "within 0.8 s" in alone and "refused" in alone
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (said,) = meet([Place(f"127.0.0.1:{port}", 2, 0, None)], timeout=0.5)
    assert f"cannot listen on port {port} of host" in said and "choose another port" in said


def test_differences_name_the_leaf_the_values_and_the_hosts():
    facts = [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 1}]
    assert processes.differences(facts, ["h0", "h1", "h2"]) == [
        "b: 'x' on process 0 (host h0); 'y' on process 1 (host h1); absent on process 2 (host h2)"
    ]
    many = processes.differences([{str(i): 0 for i in range(30)}, {str(i): 1 for i in range(30)}], ["h0", "h1"])
    assert len(many) == 21 and many[-1] == "... and 10 more"


def test_clocks():
    hosts = ["h0", "h1", "h2"]
    assert processes.skew([0.0, 4.9, -0.1], hosts) == ""
    assert "clocks differ: +30.2 s on process 1 (host h1); times in logs" in processes.skew([0.0, 30.2, 0.0], hosts)
    assert "-30.0 s on process 0 (host h0)" in processes.skew([0.0, 30.0, 30.0], hosts)


def test_rows_follow_the_mesh_and_not_the_numbers_of_the_processes(monkeypatch):
    """8 devices of 4 processes, two each: as a torus lays them out, and with a tensor axis that spans processes."""

    def held(order, shape):
        devices = np.array(jax.devices())[order].reshape(shape)
        mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        owner = {device: device.id // 2 for device in jax.devices()}
        monkeypatch.setattr(sharding, "process_of", owner.__getitem__)
        return [[x.tolist() for x in sharding.rows(mesh, 16, process)] for process in range(4)]

    for k, (rows, first) in enumerate(held(range(8), (8, 1, 1))):
        assert rows == list(range(4 * k, 4 * k + 4)) and all(first)
    wired = held([0, 2, 1, 3, 4, 6, 5, 7], (4, 2, 1))
    assert [rows for rows, _ in wired] == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    spanned = held(range(8), (2, 1, 4))
    assert [rows for rows, _ in spanned] == [list(range(8))] * 2 + [list(range(8, 16))] * 2
    assert [first[0] for _, first in spanned] == [True, False, True, False]


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


def test_one_of_three_is_killed_and_the_others_say_so(server, tmp_path):
    pod = Pod(server, tmp_path, 3, 1, ["stay"])
    for k in range(3):
        pod.wait_for("met", k)
    begun = time.monotonic()
    pod.kill(1)
    assert pod.ends() == [75, -signal.SIGKILL, 75] and time.monotonic() - begun < 60
    for k in (0, 2):
        assert (
            f"error: process 1 of 3 (host {socket.gethostname()}) is gone: killed, out of memory, or its host cannot "
            "be reached; this process ends too: take another"
        ) in pod.text(k)


def test_process_0_is_killed_and_the_other_says_so(server, tmp_path):
    pod = Pod(server, tmp_path, 2, 1, ["stay"])
    pod.wait_for("met", 1)
    begun = time.monotonic()
    pod.kill(0)
    assert pod.ends() == [-signal.SIGKILL, 75] and time.monotonic() - begun < 60
    assert pod.text(1).rstrip().endswith("this process ends too: take another") and "process 0 of 2 (host" in pod.text(
        1
    )


@pytest.mark.parametrize("still", [0, 1])
def test_one_that_is_alive_and_stands_still_is_gone(server, tmp_path, still):
    pod = Pod(server, tmp_path, 2, 1, ["stay", 0.1, 0.5])
    for k in range(2):
        pod.wait_for("met", k)
    pod.kill(still, signal.SIGSTOP)
    assert pod.end(1 - still) == 75
    assert (
        f"error: process {still} of 2 (host {socket.gethostname()}) has stood still for 0.5 s: stopped (SIGSTOP), or "
        "its host is overloaded or swaps; this process ends too: take another"
    ) in pod.text(1 - still)
    pod.kill(still, signal.SIGCONT)
    assert pod.end(still) == 75


def test_a_signal_to_one_stops_all(server, tmp_path):
    pod = Pod(server, tmp_path, 2, 1, ["stop_one"])
    assert pod.ends() == [75, 75]
    assert (
        f"(host {socket.gethostname()}) ended: stopped by a signal; this process ends too: run the same command"
        in pod.text(0)
    )


def test_hosts_that_differ_are_refused_by_name(server, tiny_cfg, tmp_path):
    config = write_config(tiny_cfg, tmp_path / "config.py")
    for name in ("shared", "private"):
        (tmp_path / name).mkdir()
    pod = Pod(server, tmp_path, 2, 1, ["disagree", str(config), str(tmp_path / "shared"), str(tmp_path / "private")])
    assert pod.ends() == [2, 2]
    host = socket.gethostname()
    for k in range(2):
        text = pod.text(k)
        for part in (
            "the same: agreed",
            "config: the processes differ:",
            f"config.optim.lr: 0.0003 on process 0 (host {host}); 0.5 on process 1 (host {host})",
            "config.train.batch: 16 on process 0",
            "vocabulary: False on process 0",
            "revision: the processes differ",
            "'0123abc' on process 1",
            f"one folder for all: processes 1 (host {host}) do not see there what process 0",
            "start all of them with the same command",
        ):
            assert part in text, (part, text)
    assert re.search(rf"warning: clocks differ: \+(29\.\d|30\.\d) s on process 1 \(host {host}\)", pod.text(0))
    assert "error: a broken file\nin two lines" in pod.text(1)
    assert f"error: process 1 of 2 (host {host}) ended: a broken file; this process ends too" in pod.text(0)
    assert not list((tmp_path / "shared").iterdir())  # the token is gone


def test_a_command_whose_coordinator_does_not_answer(server, tiny_cfg, tmp_path):
    config = write_config(tiny_cfg, tmp_path / "config.py")
    pod = Pod(
        server,
        tmp_path,
        3,
        1,
        ["command", "train", f"--config={config}", f"--workdir={tmp_path / 'run'}"],
        started=2,
        BLIP_JAX_TIMEOUT="1.5",
    )
    assert pod.ends() == [2, 2]
    assert all("2 of 3 processes came within 1.5 s" in pod.text(k) and "missing: 2." in pod.text(k) for k in range(2))
    assert "Traceback" not in pod.text(0) + pod.text(1) and not (tmp_path / "run").exists()


CHILD = """
import os, signal, sys, time
k = int(os.environ["BLIP_JAX_PROCESS"])
print("here", k, os.environ["BLIP_JAX_PROCESSES"], os.environ.get("XLA_FLAGS"), flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
what = sys.argv[1]
if what == "die" and k == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if what == "fail" and k == 0:
    sys.exit(2)
time.sleep(0 if what == "pass" else 60)
"""


def launch(*args, **kw):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "local_processes.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kw,
    )


def test_local_processes(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    done = launch("-n", "3", "--devices", "4", "--", sys.executable, str(child), "pass")
    out = done.communicate(timeout=60)[0].splitlines()
    assert done.returncode == 0 and sorted(line[:10] for line in out) == ["[0] here 0", "[1] here 1", "[2] here 2"]
    assert all("--xla_force_host_platform_device_count=4" in line and "count=8" not in line for line in out)

    waiting = launch("-n", "2", "--", sys.executable, str(child), "wait")
    assert waiting.stdout.readline() and waiting.stdout.readline()
    time.sleep(0.5)  # the handlers come after the lines
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(30) == 75
    late = launch("-n", "2", "--timeout", "1", "--", sys.executable, str(child), "wait")
    assert late.wait(30) == 124 and "1 s are over: killing the others" in late.stdout.read()

    monkeypatch.setattr(local_processes, "PATIENCE", 0.3)
    monkeypatch.setattr(local_processes.signal, "signal", lambda *_: None)
    for what, status in (("die", 128 + 9), ("fail", 2)):
        assert local_processes.Processes([sys.executable, str(child), what], 2, 0).run(0) == status
    assert (
        local_processes.worst([0, 75, 0]) == 75
        and local_processes.worst([75, -9]) == 137
        and local_processes.worst([-9, 75, 2]) == 2
    )
