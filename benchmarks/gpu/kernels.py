"""A profile of JAX as a table: which kernels a GPU's time goes to."""

from __future__ import annotations

import pathlib
import re
from collections import defaultdict

CLASSES = (  # name -> class, first match wins
    (r"flash|fmha|cudnn|sdpa", "attention"),
    (r"nvjet|cublas|cutlass|xmma|gemm|_dot", "products"),
    (r"memcpy|memset|copy|slice|concat|transpose|gather|scatter", "moving data"),
    (r"reduce|softmax", "reductions"),
    (r"threefry|rng", "random numbers"),
    (r"fusion|loop|wrapped|triton", "other fusions"),
)


def newest(folder: str) -> pathlib.Path:
    """The profile in a folder of `jax.profiler.trace`. FileNotFoundError: there is none."""
    found = sorted(pathlib.Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no *.xplane.pb below {folder}")
    return found[-1]


def reduced(path: pathlib.Path, steps: int) -> dict:
    """What ran on the GPU in `steps` steps, milliseconds of one: {"kernels": {name: (ms, calls)}, "classes": {class:
    ms}, "busy_ms": at least one kernel ran, "span_ms": from the first to the last}. Without a GPU: of the host."""
    from jax.profiler import ProfileData

    planes = list(ProfileData.from_file(str(path)).planes)
    gpus = [p for p in planes if p.name.startswith("/device:GPU")]
    events, example = [], {}
    for plane in gpus or planes:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue  # the same kernels again, by module or name scope
            for event in line.events:
                events.append((event.name, event.start_ns, event.duration_ns))
                example = example or {str(key): str(value)[:200] for key, value in event.stats if key}
    return summed(events, steps) | {"example": example}


def summed(events: list[tuple[str, float, float]], steps: int) -> dict:
    """`reduced` of events (name, start, duration in ns)."""
    spent, calls, classes = defaultdict(float), defaultdict(int), defaultdict(float)
    for name, _, duration in events:
        group = re.sub(r"([._]\d+)+$", "", name)
        spent[group] += duration / 1e6 / steps
        calls[group] += 1
        kind = next((kind for pattern, kind in CLASSES if re.search(pattern, name, re.IGNORECASE)), "rest")
        classes[kind] += duration / 1e6 / steps

    busy, end = 0.0, float("-inf")
    for _, start, duration in sorted(events, key=lambda event: event[1]):
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    span = end - min(start for _, start, _ in events) if events else 0.0
    ordered = sorted(spent, key=spent.get, reverse=True)
    return {
        "kernels": {name: (spent[name], calls[name] / steps) for name in ordered},
        "classes": dict(sorted(classes.items(), key=lambda item: -item[1])),
        "busy_ms": busy / 1e6 / steps,
        "span_ms": span / 1e6 / steps,
    }


def table(found: dict, most: int = 60) -> str:
    """The kernels that took longest, and the classes, in Markdown."""
    total = sum(found["classes"].values()) or 1.0
    lines = [
        f"busy {found['busy_ms']:.2f} of {found['span_ms']:.2f} ms a step",
        "",
        "| class | ms | share |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {ms:.2f} | {100 * ms / total:.1f} % |" for name, ms in found["classes"].items()]
    lines += ["", "| kernel | ms | calls | share |", "|---|---|---|---|"]
    lines += [
        f"| {name[:110]} | {ms:.3f} | {calls:g} | {100 * ms / total:.1f} % |"
        for name, (ms, calls) in list(found["kernels"].items())[:most]
    ]
    return "\n".join(lines) + "\n"
