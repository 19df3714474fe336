"""A first hour on a GPU in eight minutes: `python benchmarks/gpu/run.py b c --out=DIR`; ../README.md says more.

Every measurement is a process (work.py). They compile side by side, since one program keeps few cores busy, and take
turns on the GPU. A process that is not done at its limit is ended and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
# Without autotuning a compilation does not time kernels on the GPU, where something else may be timed just then, and
# takes less long; products are cuBLAS's choice. Random bits by one kernel that is already compiled.
QUICK = {
    "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
    "JAX_THREEFRY_GPU_KERNEL_LOWERING": "true",
}
LATE = 0.6  # of the time for everything
PART = 15 * 2**20  # bytes of a piece of the compiled programs


def cases(full: bool, ahead: str = "") -> list[dict]:
    """All measurements, those that are worth most first.

    `env`: of the process; `late`: when all others are done, or after LATE of the time; limits: seconds from its start.
    Not `full`: small enough for a CPU. `ahead`: a file with our step, compiled already.
    """
    size = lambda name: name if full else "tiny"
    pixels = lambda n: n if full else 16
    rows = lambda n: n if full else 4

    def train(part, name, kind, model="base", batch=128, **more):
        env = {} if full and more.get("flags") == "default" else QUICK
        same = {"img_size": pixels(224), "dtype": "bfloat16", "steps": 20 if full else 5, "limit": 400}
        case = {"part": part, "name": name, "kind": kind, "size": size(model), "batch": rows(batch), "env": env} | same
        # rehearsed, most are one program, which is compiled once
        return case | more | ({} if full else {"text_layers": 1, "late": False})

    def infer(kind, batch, **more):
        same = {"img_size": pixels(384), "dtype": "bfloat16", "rounds": 5 if full else 2, "env": QUICK, "limit": 330}
        return {"part": "d", "name": kind, "kind": kind, "size": size("base"), "batch": rows(batch)} | same | more

    shapes = {"batch": rows(128), "heads": 12 if full else 2}
    shapes |= {"shapes": [(197, 197), (577, 577), (60, 577), (30, 577)]} if full else {"shapes": [(5, 7)]}
    shapes |= {} if full else {"implementation": "xla"}
    compiled = [train("b", "ours-ahead", "step", ahead=ahead)] if ahead else []
    return [
        {"part": "a", "name": "card", "kind": "card", "matrix": 8192 if full else 128}
        | {"bytes": 2**32 if full else 2**20, "env": QUICK, "limit": 150},
        *compiled,
        train("b", "ours", "step", profile=True),
        train("c", "torch", "torch", profile=True),
        {"part": "i", "name": "attention", "kind": "attention", "env": QUICK, "limit": 200} | shapes,
        {"part": "a", "name": "golden", "kind": "golden", "env": QUICK, "limit": 300},
        infer("filter", 128),
        infer("caption", 128, captions=[1, 4]),
        train("i", "ours-plain", "step", attention="plain", profile=True),
        infer("filter", 128, part="i", name="filter-plain", attention="plain"),
        train("b", "ours-2-text-layers", "step", text_layers=2, limit=250),
        train("c", "torch-2-text-layers", "torch", text_layers=2, limit=250),
        train("b", "ours-16-positions", "step", positions=16),
        train("e", "ours-large", "step", model="large", batch=64),
        train("e", "torch-large", "torch", model="large", batch=64),
        train("h", "ours-autotuned", "step", flags="default", profile=True, late=True),
        train("c", "torch-compiled", "torch", compiled=True, late=True),
        train("g", "ours-256", "step", batch=256, late=True),
        train("g", "torch-256", "torch", batch=256, late=True),
    ]


def main(argv: list[str]) -> int:
    """The command line. Exit status 0 also where a measurement failed: that is a row. Of a rehearsal 1."""
    args = parser().parse_args(argv)
    started = time.monotonic()
    out = pathlib.Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [
        case
        for case in cases(not args.rehearse, args.ahead)
        if case["part"] in args.parts or case["name"] in args.parts
    ]
    if unknown := set(args.parts) - {case[key] for case in chosen for key in ("part", "name")}:
        raise SystemExit(f"{', '.join(sorted(unknown))}: neither a part nor a measurement")
    cache = unpack(pathlib.Path(args.cache or out / "compiled"))
    # what a process that was ended left half written there, torch.compile takes for whole the next time
    with (out / "log.txt").open("a", encoding="utf-8") as log, tempfile.TemporaryDirectory() as inductor:
        env = environment(cache, args.rehearse) | {"TORCHINDUCTOR_CACHE_DIR": inductor}
        chosen = [case | {"lock": str(cache / "lock")} for case in chosen]
        # a rehearsal's programs are the same but for a few, and compiled once only where they come after each other
        at_once = args.at_once or (os.cpu_count() or 2 if args.rehearse else 8)
        group = Group(out, env, log, started, at_once, started + LATE * args.seconds)
        group.run(chosen, started + args.seconds)
    pack(cache, out, args.pieces)
    print(summary(out / "results.jsonl"), flush=True)
    if group.failed:
        print(f"without a result: {', '.join(group.failed)}", flush=True)
    return int(args.rehearse and bool(group.failed))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python benchmarks/gpu/run.py")
    made.add_argument(
        "parts", nargs="*", default=list("abcdeghi"), help="letters or names of measurements; default: all"
    )
    made.add_argument("--out", default="gpu-out", help="folder of results.jsonl, log.txt, kernels-*.md, compiled.tar.*")
    made.add_argument("--seconds", type=float, default=440, help="for everything; what then still runs is ended")
    made.add_argument("--at_once", type=int, default=0, help="processes side by side; 0: 8, of a rehearsal one a core")
    made.add_argument("--cache", default="", help="folder with compiled programs of an earlier run, or their pieces")
    made.add_argument(
        "--ahead", default="", help="file of `compile.py --batch=128 --save`: our step, compiled elsewhere"
    )
    made.add_argument("--pieces", type=int, default=2, help="at most so many pieces of compiled programs; 0: none")
    made.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    return made


def environment(cache: pathlib.Path, rehearse: bool) -> dict[str, str]:
    """What all processes find in their environment."""
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "OMP_NUM_THREADS": "2" if rehearse else "4",
    }
    return found | {"JAX_PLATFORMS": "cpu" if rehearse else "cuda,cpu"}


class Group:
    """Processes side by side, their output in one log. One that found no memory beside the others is started again
    once, when those that are not late are done."""

    def __init__(self, out: pathlib.Path, env: dict[str, str], log, started: float, at_once: int, late=float("inf")):
        self.out, self.env, self.log, self.started, self.at_once, self.late = out, env, log, started, at_once, late
        self.writing, self.without_memory = threading.Lock(), set()
        self.failed: list[str] = []  # measurements that did not end, or were not begun

    def run(self, chosen: list[dict], end: float) -> None:
        """Starts all, in order; returns when all have ended, by themselves or at their limit, at `end` at the
        latest."""
        waiting, running = list(chosen), []
        while waiting or running:
            if time.monotonic() > end - 5:
                for case in waiting:
                    self.say(case["name"], "not started: no time is left")
                    self.failed.append(case["name"])
                waiting = []
            while waiting and len(running) < self.at_once and self.due(waiting[0], running):
                running.append(self.start(waiting.pop(0), end))
            for item in list(running):
                case, process, limit, reader = item
                if process.poll() is None and time.monotonic() < limit:
                    continue
                if process.poll() is None:
                    self.say(case["name"], "ended at its limit")
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                reader.join(5)
                self.say(case["name"], f"exit status {process.returncode}")
                running.remove(item)
                if process.returncode and case["name"] in self.without_memory and not case.get("again"):
                    waiting.append(case | {"late": True, "again": True})
                elif process.returncode:
                    self.failed.append(case["name"])
            time.sleep(0.1)

    def due(self, case: dict, running: list) -> bool:
        """A late case waits for those that are not, until `late`."""
        early = any(not other.get("late") for other, *_ in running)
        return not case.get("late") or not early or time.monotonic() > self.late

    def start(self, case: dict, end: float) -> tuple:
        case = case | {"out": str(self.out / "results.jsonl")}
        process = subprocess.Popen(
            [sys.executable, str(HERE / "work.py"), json.dumps(case)],
            env=self.env | case["env"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        reader = threading.Thread(target=self.read, args=(case["name"], process.stdout), daemon=True)
        reader.start()
        return case, process, min(end, time.monotonic() + case["limit"]), reader

    def read(self, name: str, lines) -> None:
        for line in lines:
            if "OutOfMemoryError" in line or "RESOURCE_EXHAUSTED" in line:
                self.without_memory.add(name)
            if line.strip():
                self.say(name, line.rstrip()[:1500])

    def say(self, name: str, text: str) -> None:
        line = f"{time.monotonic() - self.started:6.1f} {name}: {text}"
        with self.writing:
            print(line[:400], flush=True)
            print(line, file=self.log, flush=True)


def unpack(cache: pathlib.Path) -> pathlib.Path:
    """The folder of compiled programs, made from the pieces in it that `pack` left."""
    cache.mkdir(parents=True, exist_ok=True)
    if pieces := sorted(cache.glob("compiled.tar.*")):
        joined = b"".join(piece.read_bytes() for piece in pieces)
        subprocess.run(["tar", "xzf", "-", "-C", str(cache)], input=joined, check=False)
    return cache


def pack(cache: pathlib.Path, out: pathlib.Path, most: int) -> None:
    """Compiled programs as compiled.tar.0, .1, ... of PART bytes: the newest that fit into `most` pieces, for a later
    run's --cache."""
    files = [path for path in cache.rglob("*") if path.is_file() and not path.name.startswith("compiled.tar")]
    taken, room = [], most * PART
    for path in sorted(files, key=lambda path: path.stat().st_size):
        if (room := room - path.stat().st_size) < 0:  # compressed they are smaller; this is on the safe side
            break
        taken.append(str(path.relative_to(cache)))
    if not taken:
        return
    done = subprocess.run(["tar", "czf", "-", "-C", str(cache), *taken], capture_output=True, check=False)
    for i in range(0, len(done.stdout), PART):
        (out / f"compiled.tar.{i // PART}").write_bytes(done.stdout[i : i + PART])


def summary(results: pathlib.Path) -> str:
    """What was found, a line each."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
    lines = ["", "== results"]
    for row in rows:
        name = row["name"]
        if "images_per_s" in row:
            mfu = f", MFU {100 * row['mfu']:.1f} %" if row["mfu"] else ""
            peak = f", {row['memory']['bytes'] / 2**30:.1f} GiB" if "memory" in row else ""
            captions = f", {row['captions']} captions" if isinstance(row.get("captions"), int) else ""
            lines.append(
                f"{name}, {row['side']}, batch {row['batch']}{captions}: {row['images_per_s']:.1f} images/s, p50 "
                f"{1e3 * row['step_s']['p50']:.1f} ms{mfu}{peak}"
            )
        else:
            about = {key: value for key, value in row.items() if key not in ("name", "at_s", "about")}
            lines.append(f"{name}: {json.dumps(about)[:300]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
