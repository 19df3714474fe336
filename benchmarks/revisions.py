"""Two checkouts of the project against each other: `python benchmarks/revisions.py OLD NEW`, folders, as of `git
worktree add OLD 533b4d7`.

Both run `blip-jax bench` in the same environment, in processes that alternate within each round, and begin in turns. So
what the machine does beside falls on both; times are those of `bench`, which leaves compiling out. A ratio above 1 says
that NEW is faster. What is called is the command line alone, so the two may be laid out as differently as they like.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

# of glibc: a step's memory stays with the process (README.md)
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_ARENA_MAX": "1"}


def main(argv: list[str]) -> int:
    """The command line. Exit status 1 where NEW is slower than --least says in one of the cases."""
    made = argparse.ArgumentParser(prog="python benchmarks/revisions.py")
    made.add_argument("old", type=pathlib.Path)
    made.add_argument("new", type=pathlib.Path)
    made.add_argument("--workload", default="train,caption", help="of train, caption, encode, filter; with commas")
    made.add_argument("--dtype", default="float32,bfloat16", help="with commas")
    made.add_argument("--size", default="base", help="of the model; with commas")
    made.add_argument("--img_size", type=int, default=224, help="pixels")
    made.add_argument("--batch", type=int, default=4, help="images")
    made.add_argument("--steps", type=int, default=5, help="timed steps of each process")
    made.add_argument("--rounds", type=int, default=5, help="in which both take turns")
    made.add_argument("--threads", type=int, default=0, help="of each side; 0: all cores")
    made.add_argument("--least", type=float, default=0.0, help="ratio that is asked for, as 0.97")
    made.add_argument("--cache", default="", help="folder in which what both compile stays for the next run")
    made.add_argument("--out", default="", help="JSON file to write")
    args = made.parse_args(argv)

    result = {
        "command": " ".join(["python benchmarks/revisions.py", *argv]),
        "old": revision(args.old),
        "new": revision(args.new),
        "cases": [],
    }
    print(f"old {result['old']}, new {result['new']}", flush=True)
    with contextlib.nullcontext(args.cache) if args.cache else tempfile.TemporaryDirectory() as folder:
        for case in itertools.product(args.workload.split(","), args.size.split(","), args.dtype.split(",")):
            found = measure(args, *case, pathlib.Path(folder).resolve())
            result["cases"].append(found)
            print(words(found), flush=True)
            if args.out:
                pathlib.Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    print(table(result["cases"]))
    return int(any(case["ratio"] < args.least for case in result["cases"]))


def revision(folder: pathlib.Path) -> str:
    """What git calls a checkout. ValueError: it is none of this project."""
    if not (folder / "blip_jax" / "__main__.py").is_file():
        raise ValueError(f"{folder} is no checkout of blip_jax: make one with `git worktree add {folder} REVISION`")
    done = subprocess.run(["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or folder.name


def measure(args: argparse.Namespace, workload: str, size: str, dtype: str, folder: pathlib.Path) -> dict:
    """The case of one workload, size and dtype: seconds of a batch by round, and the ratio old / new."""
    sides = {"old": args.old.resolve(), "new": args.new.resolve()}
    flags = [
        f"--size={size}",
        f"--img_size={args.img_size}",
        f"--dtype={dtype}",
        f"--batch={args.batch}",
        f"--threads={args.threads}",
    ]
    flags += [f"--steps={args.steps}"] if workload == "train" else [f"--rounds={args.steps}"]
    flags += ["--captions=1"] if workload == "caption" else []

    seconds = {side: [] for side in sides}
    for side, checkout in sides.items():  # fills the side's cache of compiled programs, and the kernel's of its files
        timed(workload, flags, checkout, folder / side)
    for i in range(args.rounds):
        for side in ("old", "new") if i % 2 == 0 else ("new", "old"):
            seconds[side].append(timed(workload, flags, sides[side], folder / side))
        print(
            f"{workload}, {size}, {dtype}, round {i + 1} of {args.rounds}: old {seconds['old'][-1]:.4g} s, new "
            f"{seconds['new'][-1]:.4g} s, "
            f"ratio {seconds['old'][-1] / seconds['new'][-1]:.3f}",
            flush=True,
        )

    ratios = [old / new for old, new in zip(seconds["old"], seconds["new"], strict=True)]
    return {
        "workload": workload,
        "size": size,
        "dtype": dtype,
        "batch": args.batch,
        "seconds": seconds,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }


def timed(workload: str, flags: list[str], checkout: pathlib.Path, folder: pathlib.Path) -> float:
    """Median seconds of a batch, of one process of a checkout. ValueError: it failed; the last line that it said
    is in the message."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "found.json"
    command = [sys.executable, "-m", "blip_jax", "bench", workload, *flags, f"--out={out}"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env = os.environ | MALLOC | cache | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ValueError(f"{' '.join(command)} in {checkout} failed (status {done.returncode}): {said[-1]}")
    (case,) = json.loads(out.read_text(encoding="utf-8"))["cases"]
    return statistics.median(steps_of(case))


def steps_of(case: dict) -> list[float]:
    """Seconds of every timed batch of a case, as `blip-jax bench` writes it: of a training step's texts, of
    captions, of another side."""
    if "texts" in case:
        return [s for found in case["texts"].values() for s in found["step_s"]["all"]]
    found = case["ours"] if "ours" in case else case["sides"]["ours"]
    return found["step_s"]["all"]


def words(case: dict) -> str:
    """A case in one line."""
    return (
        f"{case['workload']}, {case['size']}, {case['dtype']}: new is {case['ratio']:.3f} times as fast "
        f"({min(case['ratios']):.3f} to {max(case['ratios']):.3f} by round)"
    )


def table(cases: list[dict]) -> str:
    """All cases, in Markdown."""
    lines = [
        "| work | size | dtype | batch | old s | new s | old / new by round | median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        old, new = (statistics.median(case["seconds"][side]) for side in ("old", "new"))
        ratios = ", ".join(f"{ratio:.3f}" for ratio in case["ratios"])
        lines.append(
            f"| {case['workload']} | {case['size']} | {case['dtype']} | {case['batch']} | {old:.4g} | {new:.4g} | "
            f"{ratios} | "
            f"{case['ratio']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
