"""What each setting of the pre-training step is worth: `python benchmarks/ablation.py --size=base --batch=4`.

The base is the step that trains; every other row is that step with one leaf of the config set otherwise. All rows start
from one state and batch, without dropout; where the arithmetic is to be the same, so must the metrics be. Then all take
turns in every round. What has no leaf was measured once, at a revision that ablation.md names.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from blip_jax import config
from blip_jax.bench import throughput, train
from blip_jax.parallel import sharding

LIMIT = 1e-4  # relative difference of a metric from the base's, where the arithmetic is the same and in float32
TEXT = 16  # positions of the texts that hold words; the batch is padded to cfg.text.max_len


class Settings(NamedTuple):
    """What is measured."""

    size: str = "small"  # of blip_jax.config
    img_size: int = 224
    batch: int = 4
    dtype: str = "float32"
    rounds: int = 3  # in which all rows take turns
    threads: int = 0  # on a CPU; 0: all cores


class Row(NamedTuple):
    """The step with one thing changed."""

    lever: str
    instead: str  # what is done
    leaves: dict = {}  # of the config -> value
    positions: int = 0  # that the texts are cut to; 0: none
    same: bool = True  # the arithmetic is that of the base, to rounding of its dtype


BASE = Row("the step", "as it trains")
AGAIN = Row("the step", "the same program, measured again")


def rows(settings: Settings) -> list[Row]:
    """The base, then every lever."""
    other = "bfloat16" if settings.dtype == "float32" else "float32"
    padded = config.base().text.max_len
    return [
        BASE,
        AGAIN,
        Row("model.remat: none", "dots", {"model.remat": "dots"}),
        Row("model.remat: none", "full", {"model.remat": "full"}),
        Row("text.buckets", f"here {TEXT} positions, not {padded}", positions=TEXT),
        Row(f"model.dtype: {settings.dtype}", other, {"model.dtype": other}, same=False),
        Row("loss.momentum, loss.queue", "neither", {"loss.momentum": False, "loss.queue": 0}, same=False),
        Row("loss.queue", "none", {"loss.queue": 0}, same=False),
        Row("optim.accumulate: 1", "2", {"optim.accumulate": 2, "loss.group_size": settings.batch // 2}, same=False),
    ]


def configured(settings: Settings):
    """The paper's pre-training of the size, without dropout; wide enough at the start for pictures to matter."""
    cfg = train.sized(settings.size, "pretrain", settings.img_size, settings.dtype, settings.batch)
    with cfg.unlocked():
        cfg.model.update(dropout=0.0, drop_path=0.0, init_std=0.6 * cfg.model.med.width**-0.5)
    return cfg


class Side:
    """A row's step, ready to take its turn; between turns it holds no state."""

    def __init__(self, row: Row, cfg, mesh):
        cfg = cfg.copy_and_resolve_references()
        with cfg.unlocked():
            cfg.update_from_flattened_dict(row.leaves)
        batch = train.random_batch(cfg, cfg.text.max_len, longest=TEXT)
        if row.positions:
            batch = {name: x[:, : row.positions] if x.ndim == 2 else x for name, x in batch.items()}

        self.program = train.Program(cfg, mesh)
        self.program.state = None
        self.batch = self.program.place(batch)

    def turn(self) -> tuple[dict, float, float]:
        """(metrics, seconds, processor seconds) of the first step of a new state whose soft targets have their
        full weight."""
        program = self.program
        state = program.create(jax.random.key(program.cfg.seed))
        program.state = jax.block_until_ready(state.replace(step=state.step + 2 * train.EPOCH_STEPS))
        program.program(self.batch)  # compiled, the first time

        wall, cpu = time.perf_counter(), time.process_time()
        metrics = program.run(self.batch)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        program.state = None
        return {name: float(value) for name, value in metrics.items()}, wall, cpu

    def known(self) -> dict:
        """Counts of the compiled program."""
        (about,) = self.program.about.values()
        return {
            "gflop": about["traced_gflop_per_image"],
            "temporary_bytes": about["temporary_bytes"],
            "compile_s": about["compile_s"],
        }


def difference(row: Row, found: dict, base: dict, dtype: str) -> float:
    """The largest relative difference of a row's metrics from the base's. ValueError: it should be the same step
    and is not."""
    off = max(abs(found[name] - base[name]) / max(abs(base[name]), 1e-3) for name in base if name in found)
    if row.same and dtype == "float32" and not off <= LIMIT or off != off:
        raise ValueError(
            f"{row.lever}: {row.instead}: its metrics {found} are not those of the base, {base}: it is not the same "
            f"step, "
            "and its time means nothing"
        )
    return off


def run(settings: Settings, command: str, out: str = "", say: Callable = print, only: list[Row] | None = None) -> dict:
    """Measures all rows (or `only` these; the first is the base), says the table, writes JSON to `out`; returns what is
    in it.

    ValueError: a row that should be the same step has other metrics.
    """
    throughput.limit_threads(settings.threads)
    throughput.check_out(out)
    cfg, todo = configured(settings), only or rows(settings)
    result = {"command": command, "workload": "ablation", "settings": settings._asdict(), **throughput.about()}
    say(throughput.headline(result, settings.threads))

    mesh, sides, found = sharding.make_mesh(cfg.mesh), [], []
    with jax.set_mesh(mesh):
        for row in todo:
            side = sides[0] if row is AGAIN else Side(row, cfg, mesh)
            metrics, _, _ = side.turn()
            off = difference(row, metrics, found[0]["metrics"] if found else metrics, settings.dtype)
            found.append(
                {
                    "lever": row.lever,
                    "instead": row.instead,
                    **side.known(),
                    "metrics": metrics,
                    "difference": off,
                    "same": row.same,
                    "seconds": [],
                    "cpu_seconds": [],
                }
            )
            sides.append(side)
            say(
                f"{row.lever}: {row.instead}: "
                + ", ".join(f"{k} {v:.4g}" for k, v in side.known().items())
                + f"; differs by {off:.1e}"
            )

        for i in range(settings.rounds):
            for side, row in zip(sides, found):
                _, wall, cpu = side.turn()
                row["seconds"].append(wall)
                row["cpu_seconds"].append(cpu)
            say(
                f"round {i + 1} of {settings.rounds}: " + ", ".join(f"{row['seconds'][-1]:.3g}" for row in found) + " s"
            )

    result["rows"] = found
    if out:
        pathlib.Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(table(found))
    return result


def table(found: list[dict]) -> str:
    """Each row against the base: FLOPs, memory, time, metrics."""
    base = found[0]

    def cells(row: dict) -> list[str]:
        median = lambda name: statistics.median(a / b for a, b in zip(row[name], base[name], strict=True))
        amounts = [
            f"{row[name] / unit:.4g} ({row[name] / base[name]:.2f})"
            for name, unit in (("gflop", 1.0), ("temporary_bytes", 1e9))
        ]
        return [
            row["lever"],
            row["instead"],
            *amounts,
            f"{median('seconds'):.2f}",
            f"{median('cpu_seconds'):.2f}",
            f"{row['difference']:.0e}",
        ]

    head = ["lever", "instead", "GFLOP a pair", "temporaries GB", "time / base", "CPU time / base", "metrics differ"]
    return throughput.markdown(head, [cells(row) for row in found])


def main(argv: list[str]) -> None:
    """The command line."""
    made = argparse.ArgumentParser(prog="python benchmarks/ablation.py")
    for name, value in Settings()._asdict().items():
        made.add_argument(f"--{name}", type=type(value), default=value)
    made.add_argument("--out", default="", help="JSON file to write")
    args = vars(made.parse_args(argv))
    out = args.pop("out")
    run(Settings(**args), " ".join(["python benchmarks/ablation.py", *argv]), out)


if __name__ == "__main__":
    main(sys.argv[1:])
