"""What keeps several processes together: roll call, exchange of small facts, news of one that is gone.

Process 0 and each other process hold one TCP connection from the roll call to the end. The kernel closes it when a
process dies in any way, and notices within half a minute that a host is unreachable; a process that is alive and stands
still is noticed by its silence. So every process can say who is missing and end, where it would wait for ever in a
collective. Messages are lines of JSON. No jax in here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

AGAIN = 75  # exit status, EX_TEMPFAIL of sysexits.h: stopped before the end, the same command goes on
GRACE = 5.0  # seconds in which a process that shares another's mistake may name its own
BEAT = 2.5  # seconds between two signs of life
STILL = 25.0  # seconds without one after which a process whose connection holds counts as gone; JAX aborts after 40
LINGER = 8.0  # seconds that process 0, which the others hang on, gives them to end first
RETRY = 0.3  # seconds between two tries to reach process 0


class Place(NamedTuple):
    """Where this process stands among how many, and how it reaches process 0."""

    address: str  # host:port of process 0
    processes: int
    process: int
    devices: tuple[int, ...] | None  # local devices that are its own; None: all


class Peer(NamedTuple):
    """The other end of a connection."""

    process: int
    host: str
    socket: socket.socket
    lines: Any  # what comes, a file
    came: float  # time of this host at which it came to the roll call


def join(place: Place, timeout: float) -> Lifeline:
    """Meets the other processes at `place.address`; returns once all are there.

    ValueError, on every process that came: process 0 cannot be reached or some did not come within `timeout` seconds,
    two have the same number, or they were told different numbers of processes.
    """
    deadline = time.monotonic() + timeout
    return _receive(place, timeout, deadline) if place.process == 0 else _report(place, timeout, deadline)


def _receive(place: Place, timeout: float, deadline: float) -> Lifeline:
    """The roll call of process 0."""
    port, here = int(place.address.rsplit(":", 1)[1]), socket.gethostname()
    try:
        family = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        server = socket.create_server(("", port), backlog=1024, **family)
    except OSError as e:
        raise ValueError(
            f"process 0 cannot listen on port {port} of host {here} ({e}): another program has it, or an earlier run "
            "still ends; choose another port for BLIP_JAX_COORDINATOR"
        ) from None
    came: dict[int, Peer] = {}
    with server:
        problem, misfit = _come(server, place, here, came, timeout, deadline)
    hosts = [here, *(came[k].host for k in sorted(came))]
    for peer in [*came.values(), *misfit]:
        reply = {"refused": problem} if problem else {"hosts": hosts, "came": peer.came, "now": time.time()}
        with contextlib.suppress(OSError):
            _send(peer.socket, reply)
    if problem:
        raise ValueError(problem)
    return Lifeline(place, hosts, list(came.values()), 0.0)


def _come(
    server, place: Place, here: str, came: dict[int, Peer], timeout: float, deadline: float
) -> tuple[str, list[Peer]]:
    """Fills `came` with every process but 0 by number.

    Returns ("", []), or what is wrong and who came that does not fit.
    """
    while len(came) < place.processes - 1:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            accepted, _ = server.accept()
        except TimeoutError:
            return _missing({0: here} | {k: peer.host for k, peer in came.items()}, place.processes, timeout), []
        if not (met := _hello(accepted)):
            continue
        peer, told = met
        if peer.process in came and _has_left(came[peer.process]):
            del came[peer.process]  # this one takes its place
        if told != place.processes:
            return (
                f"process {peer.process} (host {peer.host}) was told of {told} processes, process 0 (host {here}) of "
                f"{place.processes}: give all of them the same BLIP_JAX_PROCESSES"
            ), [peer]
        if peer.process in {0, *came}:
            first = here if peer.process == 0 else came[peer.process].host
            return (
                f"two processes have number {peer.process}, on hosts {first} and {peer.host}: number them 0 to "
                f"{place.processes - 1}, each once"
            ), [peer]
        came[peer.process] = peer
    return "", []


def _hello(accepted: socket.socket) -> tuple[Peer, int] | None:
    """The process that comes and the number of processes it was told of; None if it is no process of ours."""
    _keep_alive(accepted)
    accepted.settimeout(5)
    lines = accepted.makefile("r", encoding="utf-8")
    try:
        said = json.loads(lines.readline())
        peer = Peer(int(said["process"]), str(said["host"]), accepted, lines, time.time())
        accepted.settimeout(None)
        return peer, int(said["processes"])
    except (OSError, ValueError, TypeError, KeyError):
        accepted.close()
        return None


def _has_left(peer: Peer) -> bool:
    """Whether a process that waits has closed its connection; it says nothing while it waits."""
    try:
        return bool(select.select([peer.socket], [], [], 0)[0])
    except OSError:
        return True


def _missing(hosts: dict[int, str], processes: int, timeout: float) -> str:
    absent = ", ".join(str(k) for k in range(processes) if k not in hosts)
    came = ", ".join(f"{k} (host {host})" for k, host in sorted(hosts.items()))
    return (
        f"{len(hosts)} of {processes} processes came within {timeout:g} s: {came}; missing: {absent}. Start all of "
        "them with the same BLIP_JAX_COORDINATOR and BLIP_JAX_PROCESSES, see the output of the missing ones, or raise "
        "BLIP_JAX_TIMEOUT"
    )


def _report(place: Place, timeout: float, deadline: float) -> Lifeline:
    """The roll call of any other process."""
    host, port = place.address.rsplit(":", 1)
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        began, made = time.time(), None
        try:
            made = socket.create_connection((host.strip("[]"), int(port)), timeout=max(min(left, 10), 0.1))
            _keep_alive(made)
            lines = made.makefile("r", encoding="utf-8")
            _send(made, {"process": place.process, "processes": place.processes, "host": socket.gethostname()})
            made.settimeout(left + LINGER)  # process 0 gives up first, and says who is missing
            said = json.loads(lines.readline())
        except (OSError, ValueError) as e:  # ValueError: what answers is not process 0 of a run of ours
            why = str(e) if isinstance(e, OSError) else "what answers there is no process 0 that waits for others"
            with contextlib.suppress(OSError, AttributeError):  # AttributeError: it was not even made
                made.shutdown(socket.SHUT_RDWR)
            time.sleep(min(RETRY, max(left, 0)))
            continue
        if "refused" in said:
            raise ValueError(said["refused"])
        made.settimeout(None)
        offset = ((began - said["came"]) + (time.time() - said["now"])) / 2  # the waiting in between drops out
        return Lifeline(place, said["hosts"], [Peer(0, said["hosts"][0], made, lines, began)], offset)
    raise ValueError(
        f"process {place.process} cannot reach process 0 at {place.address} within {timeout:g} s ({why}): see whether "
        "process 0 runs there and the port is open between the hosts, correct BLIP_JAX_COORDINATOR, or raise "
        "BLIP_JAX_TIMEOUT"
    )


def _keep_alive(made: socket.socket) -> None:
    """The kernel asks after 10 s of silence, and gives a host up that has not answered for 20 s more."""
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, name):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(to: socket.socket, message: dict) -> None:
    to.sendall((json.dumps(message) + "\n").encode())


def hold_aborts() -> None:
    """Lets a thread that aborts the process sleep some seconds first.

    JAX aborts within a millisecond when its coordination service, in process 0, is gone: too soon for `Lifeline` to say
    what happened and to choose the exit status. The handler is C's sleep(), called with the number of the signal, 6:
    Python's own handlers run in the main thread, which may wait in a collective for ever. tests/test_private.py says
    when a thread's abort is no longer held up.
    """
    c = ctypes.CDLL(None)
    c.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    c.signal(signal.SIGABRT, ctypes.cast(c.sleep, ctypes.c_void_p))


class Lifeline:
    """The connections of a process after the roll call; threads listen to them.

    A call into C that keeps Python's lock keeps these threads, too: one of STILL seconds ends the run.

    hosts: name of every process's host. offset: seconds that this host's clock is ahead of process 0's. remedy: what to
    do when another process is gone, asked for at that moment.
    """

    def __init__(self, place: Place, hosts: list[str], peers: list[Peer], offset: float):
        self.place, self.hosts, self.offset, self._peers = place, hosts, offset, peers
        self.remedy: Callable[[], str] = lambda: "run the same command again"
        self._changed, self._sending = threading.Condition(), threading.Lock()
        self._round, self._parts, self._whole = 0, {}, {}  # of `gather`
        self._calls, self._places, self._held, self._stop_at, self._asked = 0, {}, False, None, False  # of `stops`
        self._heard, self._ended, self._closed, self._over, self._lost = set(), set(), set(), False, False
        for peer in peers:
            threading.Thread(target=self._listen, args=(peer,), daemon=True, name=f"lifeline-{peer.process}").start()
        threading.Thread(target=self._watch, daemon=True, name="lifeline-watch").start()

    def name(self, process: int) -> str:
        return f"process {process} of {len(self.hosts)} (host {self.hosts[process]})"

    def gather(self, fact) -> list:
        """The JSON-able `fact` of every process, by number; all call it, in the same order."""
        self._round += 1
        if self.place.process:
            self._tell({"fact": fact, "round": self._round})
        else:
            self._take_fact(0, self._round, fact)
        with self._changed:
            self._changed.wait_for(lambda: self._round in self._whole)
            return self._whole.pop(self._round)

    def stops(self, asked: bool) -> bool:
        """Whether all processes stop at this call, since some of them are `asked` to.

        All call it equally often. Nothing is sent before one is asked; then process 0 asks each at which call it is,
        which waits in its next one meanwhile, and names a call that none has passed.
        """
        with self._changed:
            if asked and not self._asked:
                self._asked = True
                self._tell({"stop": True}) if self.place.process else self._find_place()
            self._changed.wait_for(lambda: not self._held)
            self._calls += 1
            return self._stop_at is not None and self._calls >= self._stop_at

    def _find_place(self) -> None:
        """Process 0, once: asks all where they are."""
        if self._places:
            return
        self._held, self._places = True, {0: self._calls}
        self._tell({"where": True})

    def _take_stop(self, peer: Peer, said: dict) -> None:
        """What belongs to `stops`."""
        with self._changed:
            if "stop" in said:
                self._find_place()
            elif "where" in said:
                self._held = True
                self._tell({"at": self._calls})
            elif "at" in said:
                self._places[peer.process] = said["at"]
                if len(self._places) == len(self.hosts):
                    self._stop_at, self._held = max(self._places.values()) + 1, False
                    self._tell({"stop_at": self._stop_at})
            elif "stop_at" in said:
                self._stop_at, self._held = said["stop_at"], False
            self._changed.notify_all()

    def finish(self) -> None:
        """Says that this process has come to its end in good order, and waits until all have."""
        if self.place.process:
            self._tell({"end": 0})
        with self._changed:
            if self.place.process == 0:
                self._changed.wait_for(lambda: len(self._ended) == len(self._peers))
                self._over = True
                self._tell({"over": True})
            self._changed.wait_for(lambda: self._over)
        for peer in self._peers:
            with contextlib.suppress(OSError):  # the other end was quicker
                peer.socket.shutdown(socket.SHUT_RDWR)

    def leave(self, status: int, why: str) -> None:
        """Tells the others to end with `status`, too, because of `why`, and ends this process."""
        with self._changed:
            self._lost = True
        what = f"{self.name(self.place.process)} ended: {why.splitlines()[0]}"
        self._tell(
            {"end": status, "why": what} if self.place.process else {"lost": what, "status": status, "grace": GRACE}
        )
        self._exit(status)

    def _tell(self, message: dict) -> None:
        with self._sending:
            for peer in self._peers:
                with contextlib.suppress(OSError):  # its listener says so
                    _send(peer.socket, message)

    def _listen(self, peer: Peer) -> None:
        with contextlib.suppress(OSError, ValueError):  # the connection was given up, or ended within a line
            for line in peer.lines:
                self._heard.add(peer.process)
                self._take(peer, json.loads(line))
        with self._changed:
            self._closed.add(peer.process)
            self._changed.notify_all()
            expected = self._over or peer.process in self._ended
        if not expected:
            self._end(
                f"{self.name(peer.process)} is gone: killed, out of memory, or its host cannot be reached", AGAIN, 0.0
            )

    def _watch(self) -> None:
        """Gives signs of life, and notices who gives none. Beats are counted, not seconds: a host that slept is late
        itself."""
        silent = dict.fromkeys((peer.process for peer in self._peers), 0)
        while not self._over and not self._lost:
            time.sleep(BEAT)
            self._tell({})
            heard, self._heard = self._heard, set()
            for process in silent:
                silent[process] = 0 if process in heard | self._closed else silent[process] + 1
            if still := [process for process, beats in silent.items() if beats * BEAT >= STILL]:
                self._end(
                    f"{self.name(still[0])} has stood still for {STILL:g} s: stopped (SIGSTOP), or its host is "
                    "overloaded or swaps",
                    AGAIN,
                    0.0,
                )

    def _take(self, peer: Peer, said: dict) -> None:
        if said.keys() & {"stop", "where", "at", "stop_at"}:
            self._take_stop(peer, said)
        if "fact" in said:
            self._take_fact(peer.process, said["round"], said["fact"])
        elif "lost" in said:
            self._end(said["lost"], said["status"], said["grace"])
        elif said.get("end"):
            self._end(said["why"], said["end"], GRACE)
        with self._changed:
            if "facts" in said:
                self._whole[said["round"]] = said["facts"]
            elif said.get("end") == 0:
                self._ended.add(peer.process)
            elif "over" in said:
                self._over = True
            self._changed.notify_all()

    def _take_fact(self, process: int, number: int, fact) -> None:
        with self._changed:
            parts = self._parts.setdefault(number, {})
            parts[process] = fact
            if len(parts) == len(self.hosts):
                self._whole[number] = [parts[k] for k in range(len(parts))]
                del self._parts[number]
                self._tell({"facts": self._whole[number], "round": number})
                self._changed.notify_all()

    def _end(self, what: str, status: int, grace: float) -> None:
        """Ends this process because another one did, and passes the news on."""
        with self._changed:
            if self._lost:
                return
            self._lost = True
        if self.place.process == 0:
            self._tell({"lost": what, "status": status, "grace": grace})
        time.sleep(grace)
        advice = f": {self._advice()}" if status == AGAIN else ""
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            print(f"error: {what}; this process ends too{advice}", file=sys.stderr, flush=True)
        self._exit(status)

    def _advice(self) -> str:
        """What `remedy` says, if it does so soon: it may look into a file system that is gone with the other host."""
        found = ["run the same command again"]
        asked = threading.Thread(target=lambda: found.append(self.remedy()), daemon=True)
        asked.start()
        asked.join(LINGER)
        return found[-1]

    def _exit(self, status: int) -> None:
        """Ends at once: an orderly end would wait for the process that is gone. Process 0 goes last."""
        if self.place.process == 0:
            with self._changed:
                self._changed.wait_for(lambda: len(self._closed) == len(self._peers), LINGER)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
