"""Several processes as one run.

They find each other, check that they are the same, and none outlives another in silence.

`start` reads where this process stands from the environment:
  explicit           BLIP_JAX_COORDINATOR=host:port of process 0, BLIP_JAX_PROCESSES=n, BLIP_JAX_PROCESS=0..n-1
  Slurm              srun with more than one task: as JAX finds it
  Cloud TPU and GKE  slices of more than one host: as JAX finds it
Without any of them there is one process, and nothing happens. BLIP_JAX_TIMEOUT is how long to wait for the others, in
seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping

import jax

from blip_jax import __version__, buckets
from blip_jax.console import plain, revision, say
from blip_jax.parallel import peers
from blip_jax.parallel.interrupt import Stopped
from blip_jax.parallel.peers import GRACE, Lifeline, Place
from blip_jax.trees import flat

EXPLICIT = ("BLIP_JAX_COORDINATOR", "BLIP_JAX_PROCESSES", "BLIP_JAX_PROCESS")
TIMEOUT = 300.0  # seconds that processes wait for each other
HEARTBEAT = 120  # seconds after which JAX gives a process up, with an abort: ours, which says why, is sooner
SKEW = 5.0  # seconds between two clocks that are worth a word
VISIBLE = 10.0  # seconds that a network file system may take to show a new file elsewhere

_line: Lifeline | None = None  # of this process


def place(env: Mapping[str, str]) -> Place | None:
    """Where this process stands, by the environment `env`; None: it is alone.

    ValueError: a variable is missing or wrong.
    """
    if not any(env.get(name) for name in EXPLICIT):
        return _detected(env)
    if missing := [name for name in EXPLICIT if not env.get(name)]:
        given = ", ".join(f"{name}={env[name]}" for name in EXPLICIT if env.get(name))
        raise ValueError(f"{given} without {' and '.join(missing)}: set all three of {', '.join(EXPLICIT)}, or none")
    address, count, number = (env[name] for name in EXPLICIT)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"BLIP_JAX_COORDINATOR={address}: host:port of process 0 was expected, as 10.0.0.2:8476")
    if not count.isdecimal() or not number.isdecimal() or not int(number) < int(count):
        raise ValueError(
            f"BLIP_JAX_PROCESSES={count}, BLIP_JAX_PROCESS={number}: how many processes there are, and which of them "
            "this is, numbered from 0, were expected"
        )
    return Place(address, int(count), int(number), None) if int(count) > 1 else None


def _detected(env: Mapping[str, str]) -> Place | None:
    """As `place`, from what JAX knows of Slurm and of TPU slices."""
    clusters = known_to_jax()
    name, found = next(((name, kind) for name, kind in clusters.items() if kind.is_env_present()), ("", None))
    if found is None or found.get_process_count() < 2:
        return None
    own = None
    if name == "slurm" and found.get_process_count() > int(env.get("SLURM_STEP_NUM_NODES", "1")):
        own = (found.get_local_process_id(),)  # several tasks share a node: each takes one of its devices
    address = found.get_coordinator_address(int(_timeout(env)), env.get("JAX_COORDINATOR_PORT"))
    return Place(address, found.get_process_count(), found.get_process_id(), own)


def known_to_jax() -> dict:
    """JAX's own detectors, which jax.distributed.initialize() asks too, in the order in which they are asked.

    JAX keeps them private, and this is the only place that knows where; tests/test_private.py says when an upgrade
    moves or changes them.
    """
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster, SlurmCluster

    return {"slurm": SlurmCluster, "gke": GkeTpuCluster, "gce": GceTpuCluster}


def _timeout(env: Mapping[str, str]) -> float:
    text = env.get("BLIP_JAX_TIMEOUT") or str(TIMEOUT)
    try:
        if (seconds := float(text)) > 0:
            return seconds
    except ValueError:
        pass
    raise ValueError(f"BLIP_JAX_TIMEOUT={text}: seconds were expected, more than 0")


@contextlib.contextmanager
def start() -> Iterator[None]:
    """Joins the other processes before anything is computed, and leaves with them. Alone, does nothing.

    While entered, each process ends with a message when another one does: with status 75 (run the same command again)
    when that was killed or its host is lost, with that one's own when it ended with an error.
    ValueError: the environment, or the roll call (peers.join).
    """
    global _line
    where = place(os.environ)
    if where is None:
        yield
        return
    # our own roll call comes first: it can say who is missing, where JAX's would only time out
    _line = peers.join(where, _timeout(os.environ))
    peers.hold_aborts()
    try:
        jax.distributed.initialize(
            coordinator_address=where.address,
            num_processes=where.processes,
            process_id=where.process,
            local_device_ids=where.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(TIMEOUT),
            heartbeat_timeout_seconds=HEARTBEAT,
        )
        yield
        _line.finish()
        jax.distributed.shutdown()
    except Stopped:
        stop()
    except (Exception, KeyboardInterrupt) as e:
        _fail(e)
    finally:
        _line = None


def _fail(e: BaseException) -> None:
    """Ends this process because of `e`, after telling the others.

    A collective that broke because another process is gone says so first.
    """
    if isinstance(e, jax.errors.JaxRuntimeError):
        time.sleep(GRACE)  # the news that another process is gone ends this one meanwhile
    mistake = isinstance(e, (ValueError, OSError)) and not os.environ.get("BLIP_JAX_DEBUG")
    if mistake:
        print(f"error: {e}", file=sys.stderr, flush=True)
    else:
        traceback.print_exc()
    _line.leave(2 if isinstance(e, (ValueError, OSError)) else 1, str(e) or type(e).__name__)


def stop() -> None:
    """Ends this process and all others with status 75, after a signal that only this one may have got.

    Alone, it does nothing.
    """
    if _line is not None:
        _line.leave(peers.AGAIN, "stopped by a signal")


def stops(asked: bool) -> bool:
    """Whether all processes of the run stop here, since some of them are `asked` to; see `peers.Lifeline.stops`."""
    return _line.stops(asked) if _line is not None else asked


def gather(fact) -> list:
    """The JSON-able `fact` of every process, by number. All of them call it, in the same order."""
    if jax.process_count() == 1:
        return [fact]
    if _line is None:
        raise ValueError(
            "several processes share this run, but they have not met: call it within "
            "blip_jax.parallel.processes.start()"
        )
    return _line.gather(fact)


@contextlib.contextmanager
def holding(lock: contextlib.AbstractContextManager, each: bool = False) -> Iterator[None]:
    """Enters a lock for the run: process 0 does, and the others rely on it; or `each` does, once process 0 has.

    ValueError or OSError, on every process: what process 0 was told where it could not.
    """
    with contextlib.ExitStack() as stack:
        failed = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(lock)
            except (ValueError, OSError) as e:
                failed = e
        if problem := gather(failed and str(failed))[0]:
            raise failed or ValueError(problem)
        if each and jax.process_index() != 0:
            stack.enter_context(lock)
        yield


@contextlib.contextmanager
def remedy(text: Callable[[], str]) -> Iterator[None]:
    """While entered, `text()` is what a process advises when another one is gone."""
    if _line is not None:
        _line.remedy = text
    yield


def agree(cfg, folder, **more) -> None:
    """Checks that all processes run the same: config, source, versions, the facts `more`; and that all see `folder`.

    Clocks more than 5 s apart are warned of. ValueError, on every process: what differs on which hosts, or which do not
    see the folder that process 0 writes to.
    """
    if jax.process_count() == 1:
        return
    facts = {
        **{f"config.{name}": value for name, value in flat(plain(cfg)).items()},
        "git revision": revision(),
        "blip_jax": __version__,
        "jax": jax.__version__,
        **more,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    if len(set(gather(digest))) > 1:
        raise ValueError(
            "the processes differ:\n  "
            + "\n  ".join(differences(gather(facts), _line.hosts))
            + "\nstart all of them with the same command, source and versions"
        )
    if unseen := _blind(buckets.of(folder)):
        names = ", ".join(f"{k} (host {_line.hosts[k]})" for k in unseen)
        raise ValueError(
            f"{folder} is not one folder for all: processes {names} do not see there what process 0 (host "
            f"{_line.hosts[0]}) writes; give a folder that every host shares: a network file system, or gs://"
        )
    if warning := skew(gather(_line.offset), _line.hosts):
        say(warning)


def differences(facts: list[dict], hosts: list[str]) -> list[str]:
    """A line for each name whose value is not the same in all of `facts`.

    It gives the values and the processes that have them.
    """
    lines = []
    for name in sorted({name for own in facts for name in own}):
        groups: dict[str, list[int]] = {}
        for k, own in enumerate(facts):
            groups.setdefault(repr(own[name]) if name in own else "absent", []).append(k)
        if len(groups) > 1:
            lines.append(f"{name}: " + "; ".join(f"{value} on {_named(ks, hosts)}" for value, ks in groups.items()))
    return lines[:20] + ([f"... and {len(lines) - 20} more"] if len(lines) > 20 else [])


def _named(processes: list[int], hosts: list[str]) -> str:
    shown = ", ".join(f"{k} (host {hosts[k]})" for k in processes[:8])
    more = f" and {len(processes) - 8} more" if len(processes) > 8 else ""
    return f"process{'es' * (len(processes) > 1)} {shown}{more}"


def _blind(folder: pathlib.Path) -> list[int]:
    """The processes that do not see a file that process 0 writes into `folder`."""
    name = gather(f".seen-by-all-{uuid.uuid4().hex}")[0]
    if jax.process_index() == 0:
        (folder / name).write_text("")
    gather("written")
    deadline = time.monotonic() + VISIBLE
    while not (seen := (folder / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [k for k, sees in enumerate(gather(seen)) if not sees]
    if jax.process_index() == 0:
        (folder / name).unlink()
    return blind


def skew(offsets: list[float], hosts: list[str]) -> str:
    """A warning that names the hosts whose clock is more than 5 s from the median, or "". offsets: seconds."""
    middle = sorted(offsets)[(len(offsets) - 1) // 2]
    off = [
        f"{offset - middle:+.1f} s on process {k} (host {hosts[k]})"
        for k, offset in enumerate(offsets)
        if abs(offset - middle) > SKEW
    ]
    return f"warning: clocks differ: {', '.join(off)}; times in logs are off there, nothing else is" if off else ""
