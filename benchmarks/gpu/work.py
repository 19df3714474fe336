"""One measurement on one GPU, in a process of its own: `python benchmarks/gpu/work.py '{"kind": "step", ...}'`, as
run.py starts it.

What needs no GPU - imports, compilation, random weights - is done beside the other processes; what is timed holds a
lock, so that the GPU does nothing else. Each figure is appended to a file as soon as it is there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
HELD = 75  # seconds that one measurement may hold the GPU; then its process ends


def main(argv: list[str]) -> int:
    case = json.loads(argv[0])
    tell = functools.partial(told, case["name"], pathlib.Path(case["out"]), time.perf_counter())
    if case.get("attention") == "plain":
        plainly()
    KINDS[case["kind"]](case, tell, functools.partial(alone, case["lock"]))
    return 0


def told(name: str, out: pathlib.Path, start: float, **found) -> None:
    """Appends what was found to the file of results and says it."""
    row = {"name": name, "at_s": round(time.perf_counter() - start, 1)} | found
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row)[:1000], flush=True)


def plainly() -> None:
    """Attention that writes its scores, everywhere: what cuDNN's is worth."""
    from blip_jax.models.layers import gpu

    gpu.available = lambda: False


@contextlib.contextmanager
def alone(lock: str) -> Iterator[None]:
    """While no other process times anything on the GPU. After HELD seconds the process ends by SIGALRM."""
    with open(lock, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        signal.alarm(HELD)
        yield
        signal.alarm(0)


def card(case: dict, tell: Callable, alone: Callable) -> None:
    """Device, versions, and what it reaches: a bfloat16 product and a copy."""
    asked = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    with contextlib.suppress(OSError):
        done = subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"], capture_output=True, text=True)
        tell(smi=done.stdout.strip().splitlines())

    import jax
    import jax.numpy as jnp

    from blip_jax.bench import throughput

    tell(**throughput.about())
    n, size = case["matrix"], case["bytes"] // 4
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    x = jnp.ones(size, jnp.float32)
    product, copy = jax.jit(lambda a, b: a @ b), jax.jit(lambda x: x + 1)
    jax.block_until_ready((product(a, b), copy(x)))
    with alone():
        tell(product_tflops=2 * n**3 / several(lambda: product(a, b)) / 1e12)
        tell(copy_gb_per_s=8 * size / several(lambda: copy(x)) / 1e9)


def several(job: Callable, n: int = 10) -> float:
    """Seconds of one of n calls one behind another: the median of three goes."""
    import jax

    out = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(n):
            last = job()
        jax.block_until_ready(last)
        out.append((time.perf_counter() - start) / n)
    return sorted(out)[1]


def golden(case: dict, tell: Callable, alone: Callable) -> None:
    """The original's losses and gradients of a small model, against ours on this device; its sequences are too short
    for cuDNN's attention, except where `least` says otherwise: there the texts' looks at pictures are cuDNN's."""
    import jax

    from blip_jax.models.layers import gpu
    from blip_jax.tasks import build

    goldens = tests_of_goldens()
    ways = [("float32", "highest", None), ("float32", "default", None), ("bfloat16", "default", None)]
    for dtype, precision, least in [*ways, ("bfloat16", "default", 2)]:
        if least:
            gpu.LEAST = {"queries": least, "keys": least}
        made = goldens.Case("pretrain", "pretrain")
        with made.cfg.unlocked():
            made.cfg.model.dtype = dtype
        made.model = build(made.cfg)
        start = time.perf_counter()
        with jax.default_matmul_precision(precision):
            metrics, grads, *_ = goldens.loss_and_grads(made)
        losses = {k: abs(float(x) - float(made.io[k])) for k, x in metrics.items() if k in made.io}
        names = [k.removeprefix("grad/") for k in made.io.files if k.startswith("grad/") and "key.bias" not in k]
        far = {k: np.abs(grads[k] - (want := made.io["grad/" + k])).max() / np.abs(want).max() for k in names}
        worst = max(far, key=far.get)
        tell(
            golden="pretrain",
            dtype=dtype,
            precision=precision,
            least=least,
            device=jax.devices()[0].device_kind,
            loss_differences=losses,
            gradient_difference={"of": worst, "share_of_largest": float(far[worst])},
            seconds=time.perf_counter() - start,
        )


def tests_of_goldens():
    """The module of the tests of BLIP's goldens."""
    tests = HERE.parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "models")]  # as pytest has them
    import test_golden_blip

    return test_golden_blip


def attention(case: dict, tell: Callable, alone: Callable) -> None:
    """cuDNN's attention against the plain one: values and gradients, each side's largest difference from float32 as a
    share of the largest number, and milliseconds forward and with gradients."""
    import jax
    import jax.numpy as jnp

    from blip_jax.models.layers import attention as plain
    from blip_jax.models.layers import gpu

    plainly()
    if "implementation" in case:  # where there is no cuDNN
        gpu.cudnn = functools.partial(jax.nn.dot_product_attention, implementation=case["implementation"])
    sides = {"plain": plain.attention, "cudnn": gpu.attention}

    def graded(function):
        def run(g, *inputs):
            y, back = jax.vjp(function, *inputs)
            return y, *back(g)

        return jax.jit(run)

    for T, S in case["shapes"]:
        keys = jax.random.split(jax.random.key(T + S), 4)
        shape = lambda n: (case["batch"], n, case["heads"], 64)
        args = [jax.random.normal(key, shape(n), jnp.bfloat16) for key, n in zip(keys, (T, T, S, S))]
        with jax.default_matmul_precision("highest"):
            exact = [np.asarray(x) for x in graded(sides["plain"])(*(x.astype(jnp.float32) for x in args))]
        for name, function in sides.items():
            forward, both = jax.jit(function), graded(function)
            found = [np.asarray(x, np.float32) for x in both(*args)]
            far = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, exact, strict=True)]
            jax.block_until_ready(forward(*args[1:]))
            with alone():
                ms = [1e3 * several(job) for job in (lambda: forward(*args[1:]), lambda: both(*args))]
            tell(
                side=name,
                queries=T,
                keys=S,
                differences=dict(zip(("out", "dq", "dk", "dv"), far)),
                forward_ms=ms[0],
                with_gradients_ms=ms[1],
            )


def configured(case: dict):
    """The paper's pre-training of the case's size."""
    from blip_jax.bench import train

    cfg = train.sized(case["size"], "pretrain", case["img_size"], case["dtype"], case["batch"])
    with cfg.unlocked():
        cfg.model.med.layers = case.get("text_layers") or cfg.model.med.layers
        cfg.text.max_len = case.get("positions") or cfg.text.max_len
        cfg.data.epoch_examples = train.EPOCH_STEPS * cfg.train.batch
        if case["size"] == "tiny":
            cfg.loss.queue = 8 * cfg.train.batch
    return cfg


def step(case: dict, tell: Callable, alone: Callable) -> None:
    """Our training step: seconds to compile it and the creation of the state, side by side; then steps."""
    import jax

    from blip_jax.bench import throughput, train
    from blip_jax.parallel import sharding

    cfg = configured(case)
    mesh, T = sharding.make_mesh(cfg.mesh, jax.devices()[:1]), cfg.text.max_len
    with concurrent.futures.ThreadPoolExecutor(1) as pool, jax.set_mesh(mesh):
        ahead = case.get("ahead")
        coming = pool.submit(loaded_step, ahead, cfg, mesh) if ahead else pool.submit(compiled_step, cfg, mesh, tell)
        start = time.perf_counter()
        program = train.Program(cfg, mesh)
        jax.block_until_ready(program.state)
        tell(state_s=time.perf_counter() - start, state_gb=train.state_bytes(program.shapes) / 1e9)
        program.compiled[T] = coming.result()

        with alone():
            batches = train.forever(program.place(train.random_batch(cfg, T)))
            start = time.perf_counter()
            program.run(next(batches))
            tell(first_step_s=time.perf_counter() - start)
            seconds = [found["seconds"] for found in program.timed(batches, case["steps"])]
            found = throughput.figures(seconds, cfg.train.batch, train.step_flops(cfg, T))
            tell(side="ours", **said(case), **found, memory=throughput.peak_memory())
            if case.get("profile"):
                with tempfile.TemporaryDirectory() as folder:
                    with jax.profiler.trace(folder):
                        for _ in range(2):
                            program.run(next(batches))
                    profiled(case, folder, 2, tell)


def loaded_step(path: str, cfg, mesh):
    """The step that `compile.py --save` compiled on another machine, with the same jax and for such a GPU."""
    import jax
    from jax.experimental import serialize_executable

    from blip_jax.plan import programs

    with jax.set_mesh(mesh):
        (made,) = programs.train(cfg, mesh)
        takes, gives = made.args, jax.eval_shape(made.function, *made.args)
    return serialize_executable.deserialize_and_load(
        pathlib.Path(path).read_bytes(),
        jax.tree.structure((takes, {})),
        jax.tree.structure(gives),
        execution_devices=list(mesh.devices.flat),
    )


def compiled_step(cfg, mesh, tell: Callable):
    """The compiled step, from shapes alone."""
    import jax

    from blip_jax.plan import programs

    with jax.set_mesh(mesh):
        (made,) = programs.train(cfg, mesh)
        start = time.perf_counter()
        lowered = jax.jit(made.function, **made.jit).trace(*made.args).lower()
        ready = time.perf_counter()
        compiled = lowered.compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
    tell(
        lower_s=ready - start,
        compile_s=time.perf_counter() - ready,
        temporary_gb=memory.temp_size_in_bytes / 1e9,
        fusions=text.count(" fusion("),
        cublas=text.count('custom_call_target="__cublas'),
    )
    return compiled


def said(case: dict) -> dict:
    """What of a case stands beside its figures."""
    names = (
        "kind",
        "size",
        "img_size",
        "dtype",
        "batch",
        "text_layers",
        "positions",
        "compiled",
        "captions",
        "flags",
        "attention",
    )
    return {name: case[name] for name in names if name in case}


def profiled(case: dict, folder: str, steps: int, tell: Callable) -> None:
    """The profile of some steps as a table, beside the results."""
    import kernels

    found = kernels.reduced(kernels.newest(folder), steps)
    pathlib.Path(case["out"]).with_name(f"kernels-{case['name']}.md").write_text(kernels.table(found), encoding="utf-8")
    tell(busy_ms=found["busy_ms"], span_ms=found["span_ms"], classes=found["classes"], about=found["example"])


def step_of_torch(case: dict, tell: Callable, alone: Callable) -> None:
    """The step in PyTorch: SDPA, autocast, fused AdamW, eager or compiled."""
    import torch

    sys.path.insert(0, str(HERE.parent))
    import torch_step

    from blip_jax.bench import throughput, train
    from blip_jax.models import flops

    cfg = configured(case)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    peer = torch_step.Step(cfg, None, device, case.get("compiled", False), case["dtype"])
    if case.get("compiled") and device == "cpu":  # rehearsed: C++, which a GPU does not get, would compile for minutes
        peer.losses = torch.compile(peer.net, backend="aot_eager")
    batch = train.random_batch(cfg, cfg.text.max_len)
    batch = peer.batch(batch["img"], batch["ids"], batch["txt_mask"])
    tell(ready=True)

    def steps(n: int) -> float:
        """Seconds of each of n steps one behind another, as in training."""
        start = time.perf_counter()
        for _ in range(n):
            losses = peer(batch, cfg.loss.alpha, cfg.optim.warmup_lr)
        wait()
        if not all(np.isfinite(float(x)) for x in losses.values()):
            raise ValueError(f"the losses of PyTorch's step are {losses}")
        return (time.perf_counter() - start) / n

    if case.get("compiled"):  # minutes, mostly of the CPU
        tell(first_step_s=steps(1))
        torch.cuda.empty_cache()
    with alone():
        tell(first_step_s=steps(1))
        steps(2)
        seconds = [steps(5) for _ in range(max(1, case["steps"] // 5))]
        found = throughput.figures(seconds, cfg.train.batch, flops.pretrain_step(cfg, original=True)["step"])
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        tell(side="torch", **said(case), **found, memory={"bytes": peak, "of": "device"})
        if case.get("profile") and device == "cuda":
            with torch.profiler.profile() as found:
                steps(2)
            text = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)
            pathlib.Path(case["out"]).with_name(f"kernels-{case['name']}.md").write_text(text, encoding="utf-8")


def caption(case: dict, tell: Callable, alone: Callable) -> None:
    """Captions from pixels on the device to ids, beside transformers' generate."""
    import jax

    sys.path.insert(0, str(HERE.parent))
    from blip_jax.bench import caption, throughput
    from blip_jax.models import flops

    size, px, dtype, batch = case["size"], case["img_size"], case["dtype"], case["batch"]
    settings = caption.Settings(size, (px,), (dtype,), tuple(case["captions"]), batch, 20, case["rounds"], 0)
    start = time.perf_counter()
    ours = caption.Ours(size, px, dtype)
    tell(weights_s=time.perf_counter() - start)
    img = np.random.default_rng(0).integers(0, 256, (batch, px, px, 3), np.uint8)
    args = jax.device_put((ours.weights, img, caption.keys_of(img)))
    programs = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = lambda n: throughput.compiled(ours.whole(caption.sampling(settings, ours, n)), *args)
        for n, (program, seconds) in zip(settings.captions, pool.map(made, settings.captions)):
            tell(captions=n, compile_s=seconds)
            programs[n] = program

    import against_transformers as against
    import transformers_peer

    params = jax.tree.map(np.asarray, ours.params)
    peer = transformers_peer.Peer(ours.config, params, dtype, eos=caption.EOS, pad=caption.PAD)
    pixels, length = peer.pixels(img), len(ours.prompt) + settings.tokens
    how = dict(do_sample=True, top_p=0.9, top_k=50, repetition_penalty=1.1)
    how |= dict(max_new_tokens=settings.tokens, min_new_tokens=settings.tokens)
    for n in settings.captions:
        generate = functools.partial(peer.generate, pixels, ours.prompt, num_return_sequences=n, **how)
        jobs = {
            "ours": caption.waiting(programs[n], *args),
            "transformers": functools.partial(against.exactly, length, generate),
        }
        count = flops.caption_image(ours.config, len(ours.prompt), settings.tokens, n)
        with alone():
            compared(case | {"captions": n}, jobs, case["rounds"], count, tell)
    tell(agreement=against.same_captions(ours, peer, img[:2], dtype))


def filtering(case: dict, tell: Callable, alone: Callable) -> None:
    """CapFilt's filter beside transformers."""
    import jax

    sys.path.insert(0, str(HERE.parent))
    from blip_jax.bench import inference, throughput

    size, px, dtype, batch = case["size"], case["img_size"], case["dtype"], case["batch"]
    settings = inference.Settings("filter", size, (px,), (dtype,), batch, rounds=case["rounds"])
    start = time.perf_counter()
    ours = inference.Ours(settings, px, dtype)
    tell(weights_s=time.perf_counter() - start)
    images = ours.batch(batch)
    args = jax.device_put((ours.weights, images))
    program, seconds = throughput.compiled(jax.jit(ours.job), *args)
    tell(compile_s=seconds)
    job = lambda: jax.block_until_ready(program(*args))

    import against_transformers as against

    with alone():
        agreed, others = against.outputs(settings, ours, images, job)
        tell(agreement=agreed)
        compared(case, {"ours": job} | others, case["rounds"], ours.image_flops(), tell)


def compared(case: dict, jobs: dict[str, Callable], rounds: int, image_flops: float, tell: Callable) -> None:
    """Times jobs that take turns: figures of each, and how many times as fast ours is."""
    from blip_jax.bench import throughput

    _, times = throughput.rounds(jobs, rounds, print)
    for name, seconds in times.items():
        tell(side=name, **said(case), **throughput.figures(seconds, case["batch"], image_flops))
    for name in set(times) - {"ours"}:
        tell(**said(case), ours_over={name: throughput.ratio(times[name], times["ours"])})


KINDS = {
    "card": card,
    "attention": attention,
    "golden": golden,
    "step": step,
    "torch": step_of_torch,
    "caption": caption,
    "filter": filtering,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
