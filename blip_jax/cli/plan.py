"""blip-jax plan: flags become a request, a request goes to plan/plan.py or plan/search.py."""

from __future__ import annotations

import os

from absl import flags

from blip_jax import buckets
from blip_jax.cli import configs
from blip_jax.cli.parse import parse

UNDECIDED = 3  # exit status: the state fits, and nothing more is known


def plan(argv: list[str]) -> int:
    """blip-jax plan. Exit status 0: it fits, 1: it does not, 3: no compiler is there to tell."""
    values = flags.FlagValues()
    for name, text in (
        ("config", "what is planned; its leaves are flags"),
        ("captioner", "CapFilt: config of the captioner's training"),
        ("filter", "CapFilt: config of the filter's training"),
    ):
        argv = configs.take(values, argv, name, f"FILE.py or FILE.py:ARGUMENT: {text}")
    flags.DEFINE_string(
        "topology", None, "TPU and chips of a slice, as v5e:4x8; GPU and GPUs of a host, as h100:8", flag_values=values
    )
    flags.DEFINE_integer("slices", 1, "TPU: slices of this topology", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("hosts", 1, "GPU: hosts of this topology", lower_bound=1, flag_values=values)
    flags.DEFINE_enum(
        "workload", "", ["", "train", "evaluate", "capfilt"], "default: what the config is of", flag_values=values
    )
    flags.DEFINE_bool("search", False, "find mesh, batch per chip and remat policy", flag_values=values)
    flags.DEFINE_integer(
        "tries", 4, "search: how many of the candidates are compiled", lower_bound=1, flag_values=values
    )
    flags.DEFINE_bool("exact", False, "TPU: at the compiler's usual level, several times slower", flag_values=values)
    flags.DEFINE_integer("timeout", 3600, "seconds that one compilation may take", lower_bound=1, flag_values=values)
    flags.DEFINE_string("out", "", "JSON file to write", flag_values=values)
    parse(values, argv, required=("config", "topology"))
    if values.out:
        buckets.of(values.out, "--out")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what runs here only counts
    from blip_jax.plan import chips, search
    from blip_jax.plan import plan as planning

    topology = chips.topology(values.topology, values.slices, values.hosts)
    wanted = planning.request(values.config, topology, values.workload, values.captioner, values.filter)
    if values.search:
        found = search.run(wanted, values.tries, values.exact, values.timeout)
        print(search.table(found))
    else:
        found = planning.make(wanted, values.exact, values.timeout)
        print(planning.table(found))
    if values.out:
        planning.save(found, values.out)
        print(f"written to {values.out}")
    return UNDECIDED if found["fits"] is None else int(not found["fits"])
