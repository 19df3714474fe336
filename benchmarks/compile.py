"""What a compiler makes of the models for a device that is not here: `python benchmarks/compile.py --platform=h100
--batch=128`.

The creation of a task's state, its training step, captions and the filter are compiled, not run, for one GPU (pip
install -e ".[cuda]" and nothing else; blip_jax/plan/targets describes them) or for a slice of TPUs (".[tpu]";
--platform=v5e:4x8). Each program gets a process of its own with a limit, so that a refusal, a crash or a hang is a row
of the table and the others go on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
OF_TASK = ("state", "step")
# those of CapFilt, of the captioner and the filter of a size -> the name that `plan.programs.capfilt` gives them
OF_CAPFILT = {"caption": "caption", "view": "view", "match": "score"}
PROGRAMS = (*OF_TASK, *OF_CAPFILT)

# name in the JSON -> head of the table
COLUMNS = {
    "program": "program",
    "task": "task",
    "platform": "platform",
    "batch": "batch",
    "text_layers": "text layers",
    "lower_cpu_s": "lowering, processor s",
    "compile_cpu_s": "compiling, processor s",
    "hlo_lines": "HLO lines",
    "fusions": "fusions",
    "products": "products",
    "temporaries_gib": "temporaries GiB",
    "arguments_gib": "arguments GiB",
}


def main(argv: list[str]) -> int:
    """The command line. Exit status 0 also where a compiler refused: that is a row."""
    args = parser().parse_args(argv)
    if args.worker:
        resource.setrlimit(resource.RLIMIT_CPU, (args.limit, args.limit + 60))
        found = compile_case(json.loads(args.worker))
        pathlib.Path(args.out).write_text(json.dumps(found), encoding="utf-8")
        return 0

    rows = []
    for case in cases(args):
        row = case | measured(case, args.limit)
        print(words(row), flush=True)
        rows.append(row)

        if args.out:  # after each, so that a run that is stopped leaves what it has
            result = {
                "command": " ".join(["python benchmarks/compile.py", *argv]),
                "versions": versions(),
                "processor": processor(),
                "rows": rows,
            }
            pathlib.Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    print(table(rows))
    return 0


def parser() -> argparse.ArgumentParser:
    """Flags; those that list may have several values, with commas."""
    made = argparse.ArgumentParser(prog="python benchmarks/compile.py")
    made.add_argument("--platform", type=listed, default=["h100"], help="h100 or another GPU, or TPUs as v5e:4x8")
    made.add_argument("--program", type=listed, default=list(OF_TASK), help=", ".join(PROGRAMS))
    made.add_argument(
        "--task", type=listed, default=["pretrain"], help="objectives of BLIP, or BLIP-2 as blip2_stage1, blip2_opt2.7b"
    )
    made.add_argument("--size", default="base", help="of the model, where it is no BLIP-2")
    made.add_argument("--text_layers", type=numbers, default=[0], help="of MED; 0: the size's own")
    made.add_argument("--batch", type=numbers, default=[8], help="global, pictures; the state has none")
    made.add_argument("--img_size", type=int, default=224, help="pixels")
    made.add_argument("--dtype", default="bfloat16", help="of the computation")
    made.add_argument("--remat", default="none", help="none, dots, full")
    made.add_argument(
        "--exact", action="store_true", help="TPU: the compiler's usual level, not -O0, as of blip-jax plan"
    )
    made.add_argument("--save", default="", help="folder for the compiled programs, as gpu.sh --ahead takes the step's")
    made.add_argument("--limit", type=int, default=1800, help="processor seconds that a program may take")
    made.add_argument("--out", default="", help="JSON file to write")
    made.add_argument("--worker", default="", help=argparse.SUPPRESS)  # a case: this is the process that compiles it
    return made


def listed(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def cases(args: argparse.Namespace) -> list[dict]:
    """A case for each platform, program, number of text layers and, but of states, batch; of states and steps for each
    task. ValueError: a program that there is not."""
    if unknown := set(args.program) - set(PROGRAMS):
        raise ValueError(
            f"--program={','.join(args.program)}: {', '.join(sorted(unknown))} is none of {', '.join(PROGRAMS)}"
        )

    same = {"size": args.size, "img_size": args.img_size, "dtype": args.dtype, "remat": args.remat, "exact": args.exact}
    same["save"] = args.save
    out = []
    for platform, program, layers in itertools.product(args.platform, args.program, args.text_layers):
        for task in args.task if program in OF_TASK else ["capfilt"]:
            for batch in args.batch[:1] if program == "state" else args.batch:
                case = {"program": program, "task": task, "platform": platform, "batch": batch, "text_layers": layers}
                out.append(case | same)
    return out


def measured(case: dict, limit: int) -> dict:
    """What `compile_case` finds in a process of its own, or {"error": why it found nothing}; with "wall_s"."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "found.json")
        command = [sys.executable, __file__, f"--worker={json.dumps(case)}", f"--out={out}", f"--limit={limit}"]
        start = time.perf_counter()
        try:  # one that hangs takes no processor time
            done = subprocess.run(command, capture_output=True, text=True, env=environment(case), timeout=10 * limit)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {10 * limit} s", "wall_s": 10.0 * limit}

        if done.returncode == -signal.SIGXCPU:
            found = {"error": f"not done after {limit} processor s"}
        elif done.returncode < 0:
            found = {"error": f"the compiler crashed (signal {-done.returncode}): {last_line(done.stderr)}"}
        elif done.returncode or not out.exists():
            found = {"error": last_line(done.stderr)}
        else:
            found = json.loads(out.read_text(encoding="utf-8"))
        return found | {"wall_s": time.perf_counter() - start}


def environment(case: dict) -> dict[str, str]:
    """What the process of a case has to find before it imports jax."""
    # else it measures the cache
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), env.get("PYTHONPATH", "")]))
    from blip_jax.plan import aot, gpus

    if case["platform"] in gpus.GPUS:
        own = gpus.environment_of_compiler()
        return env | own | {"XLA_FLAGS": f"{own['XLA_FLAGS']} {env.get('XLA_FLAGS', '')}".strip()}

    env.pop("XLA_FLAGS", None)  # those of other platforms are unknown to libtpu, and end it
    level = {} if case["exact"] else {"JAX_OPTIMIZATION_LEVEL": "O0"}
    return env | aot.environment_of_compiler() | level


def last_line(text: str) -> str:
    """The last line that says something, shortened."""
    lines = [
        line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("File ", "@", "#"))
    ]
    return lines[-1][:600] if lines else "it said nothing"


def compile_case(case: dict) -> dict:
    """Lowers and compiles the program of a case: processor seconds, counts of the compiled program, memory of one
    device.

    A refusal of the compiler is {"error": its message}.
    """
    import jax

    from blip_jax.parallel import sharding

    started = spent()
    devices = described(case["platform"])
    mesh = sharding.mesh_of((len(devices), 1, 1), devices)
    made = program(case, mesh)

    begun = spent()
    with jax.set_mesh(mesh):
        lowered = jax.jit(made.function, **made.jit).trace(*made.args).lower()
        ready = spent()
        found = {
            "prepare_cpu_s": begun - started,
            "lower_cpu_s": ready - begun,
            "stablehlo_lines": lines_of(lowered.as_text()),
        }
        ready = spent()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return found | {"error": " ".join(str(error).split())[:2000], "compile_cpu_s": spent() - ready}

    found["compile_cpu_s"] = spent() - ready
    if case["save"]:
        from jax.experimental import serialize_executable

        path = pathlib.Path(case["save"], f"{case['program']}-{case['task']}-{case['size']}-{case['batch']}.bin")
        path.write_bytes(serialize_executable.serialize(compiled)[0])
    return found | counted(compiled.as_text()) | memory_of(compiled, devices[0].platform)


def described(platform: str) -> list:
    """The devices of a platform, which need not be here. ValueError: there is no such platform, or its compiler is
    missing."""
    from blip_jax.plan import aot, chips, gpus

    topology = chips.topology(f"{platform}:1" if platform in gpus.GPUS else platform)
    if how := aot.missing(topology):
        raise ValueError(how)
    return list(aot.mesh_of(topology, (topology.devices, 1, 1)).devices.flat)


def spent() -> float:
    """Processor seconds of this process, all its threads together, and of those that it started and that are done:
    XLA has NVIDIA's ptxas in processes of their own."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def configured(case: dict, task: str):
    """The paper's training of an objective on the case's size, or of a BLIP-2 by its stage. ValueError: an objective of
    BLIP-2, which says no model."""
    from blip_jax import config, tasks
    from blip_jax.bench import train

    model = task if task in config.BLIP2_MODELS else ""
    cfg = train.sized(case["size"], task, case["img_size"], case["dtype"], case["batch"], (), model)
    with cfg.unlocked():
        cfg.model.remat = case["remat"]
        if not model:
            cfg.model.med.layers = case["text_layers"] or cfg.model.med.layers
    try:
        tasks.validate(cfg)
    except ValueError as error:
        names = ", ".join(config.BLIP2_MODELS)
        raise ValueError(f"--task={task}: {' '.join(str(error).split())}; of BLIP-2 give one of {names}") from None
    return cfg


def program(case: dict, mesh):
    """The `plan.programs.Program` of a case."""
    from blip_jax import config
    from blip_jax.plan import programs

    if case["program"] in OF_CAPFILT:
        cfg = config.capfilt()
        with cfg.unlocked():
            cfg.device_batch, cfg.dtype = case["batch"] // mesh.size, case["dtype"]
        made = programs.capfilt(cfg, mesh, configured(case, "caption"), configured(case, "retrieval"))
        return next(p for p in made if p.name == OF_CAPFILT[case["program"]])

    cfg = configured(case, case["task"])
    return programs.create(cfg, mesh) if case["program"] == "state" else programs.train(cfg, mesh)[0]


def counted(text: str) -> dict[str, int]:
    """Lines, fusions and products of an optimised program: calls of cuBLAS on a GPU, convolutions, which products
    become, on a TPU."""
    products = text.count('custom_call_target="__cublas') or text.count(" convolution(")
    return {"hlo_lines": lines_of(text), "fusions": text.count(" fusion("), "products": products}


def lines_of(text: str) -> int:
    return text.count("\n")


def memory_of(compiled, platform: str) -> dict[str, float]:
    """GiB on one device, of what is needed beside the arguments, and of the arguments."""
    from blip_jax.plan import aot

    memory = compiled.memory_analysis()
    return {
        "temporaries_gib": aot.temporaries(memory, platform) / 2**30,
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
    }


def versions() -> dict[str, str]:
    """Of what compiles, where it is installed."""
    from importlib import metadata

    out = {"python": sys.version.split()[0]}
    for name in ("jax", "jaxlib", "jax-cuda12-plugin", "libtpu"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return out


def processor() -> str:
    """Its name and the cores that are here."""
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{name}, {os.cpu_count()} cores"


def words(row: dict) -> str:
    """A row in one line."""
    layers = f"{row['text_layers'] or 'all'} text layers"
    name = f"{row['program']} of {row['task']} on {row['platform']}, batch {row['batch']}, {layers}"
    if "error" in row:
        return f"{name}: {row['error'][:300]}"
    return (
        f"{name}: lowered in {row['lower_cpu_s']:.0f}, compiled in {row['compile_cpu_s']:.0f} processor s "
        f"({row['wall_s']:.0f} s in all)"
    )


def table(rows: list[dict]) -> str:
    """All rows, in Markdown; what a compiler said instead stands below."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    notes = []
    for row in rows:
        cells = [cell(row.get(name)) for name in COLUMNS]
        if "error" in row:
            notes.append(f"[{len(notes) + 1}] {row['error'][:600]}")
            cells[list(COLUMNS).index("compile_cpu_s")] += f" [{len(notes)}]"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines + notes)


def cell(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
