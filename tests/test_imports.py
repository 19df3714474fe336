"""Who may import whom: arrows point down the table, never in a circle.

No name with a leading underscore crosses a file.
The table is explained in docs/design.md. A module is at the level of its longest matching entry.
"""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "blip_jax"
LEVELS = (
    "trees buckets console lock losses config decode.sampling data",
    "checkpoint models.layers tasks.momentum parallel",
    "models.vision models.text models.flops data.batches data.evaluation decode eval",
    "models convert.apply convert.layouts convert.rules inference.batching inference.programs inference.language",
    "tasks",
    "inference convert",
    "train capfilt bench plan",
    "cli demo",
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
ALONE = {  # what a room may import besides the standard library and itself: nothing of these
    "data": {"jax", "flax", "torch", "tensorflow"},
    "eval": {"jax", "flax", "torch", "tensorflow"},
    "losses": {"flax", "torch", "blip_jax"},
    "decode": {"flax", "torch"},
    "train": {"torch", "tensorflow"},
    "capfilt": {"torch", "tensorflow"},
    "inference": {"torch", "tensorflow"},
}
NAMED_TUPLE = ("_replace", "_asdict", "_fields", "_make")  # public in spite of their names
FLAX = ("models", "train.state", "train.summary")  # the only rooms that import flax; the summary says its version


def modules() -> dict[str, ast.Module]:
    """Name below blip_jax -> its syntax tree; a package is its __init__ file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in ("", "__main__"):
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.Module, known) -> set[tuple[str, str]]:
    """(module, name taken from it or "") of every import, also inside functions; ours without "blip_jax."."""
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full.removeprefix("blip_jax.") in known
                out.add((full, "") if is_module else (node.module, alias.name))
    return {(module.removeprefix("blip_jax."), name) for module, name in out}


def level(module: str) -> int:
    parts = module.split(".")
    return next(LEVEL[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in LEVEL)


def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: {to for to, _ in imports(tree, known) if to in known and to != name} for name, tree in known.items()}


def test_every_arrow_points_down():
    up = [f"{a} -> {b}" for a, to in arrows().items() for b in to if level(b) > level(a)]
    assert not up, f"these import from a higher level: {sorted(up)}"


def test_no_circle():
    graph, done, path = arrows(), set(), []

    def visit(name):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            path.append(name)
            for to in sorted(graph[name]):
                visit(to)
            done.add(path.pop())

    for name in graph:
        visit(name)


def test_no_private_name_crosses_a_file():
    known, found = modules(), []
    for name, tree in known.items():
        ours = {to.split(".")[-1] for to, _ in imports(tree, known) if to in known}
        found += [
            f"{name}: {to}.{x}" for to, x in imports(tree, known) if to in known and x.startswith("_") and x[1] != "_"
        ]
        found += [
            f"{name}: {node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours
            if node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in NAMED_TUPLE
        ]
    assert not found, f"private names of other files: {sorted(found)}"


def test_rooms_that_stay_free_of_libraries():
    known, found = modules(), []
    for name, tree in known.items():
        libraries = {to.split(".")[0] if to not in known else "blip_jax" for to, _ in imports(tree, known)}
        found += [
            f"{name} imports {bad}"
            for room, refused in ALONE.items()
            if f"{name}.".startswith(f"{room}.")
            for bad in libraries & refused
        ]
        if "flax" in libraries and not any(f"{name}.".startswith(f"{room}.") for room in FLAX):
            found.append(f"{name} imports flax")
    assert not found, sorted(found)


def test_losses_and_decoding_know_arrays_alone():
    """They are handed functions, never models: of ours they import their own room alone."""
    known, found = modules(), []
    for room in ("losses", "decode", "tasks.momentum"):
        for name, tree in known.items():
            if f"{name}.".startswith(f"{room}."):
                outside = {to for to, _ in imports(tree, known) if to in known and not f"{to}.".startswith(f"{room}.")}
                found += [f"{name} -> {to}" for to in outside]
    assert not found, sorted(found)


def test_the_package_has_few_entries():
    entries = [p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 24, sorted(entries)
