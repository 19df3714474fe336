"""blip-jax report: what a workdir holds, as one HTML file."""

from __future__ import annotations

from absl import flags

from blip_jax import buckets
from blip_jax.cli import configs
from blip_jax.cli.parse import parse


def report(argv: list[str]) -> int:
    """blip-jax report."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of a run: of train, or of capfilt", flag_values=values)
    flags.DEFINE_string("out", "", "file to write; default: report.html in the workdir", flag_values=values)
    flags.DEFINE_string(
        "against", "", "FILE.py or FILE.py:ARGUMENT whose settings the run's are compared with", flag_values=values
    )
    text = "samples of data.eval with what the model says of them; 0: none, and no model is loaded"
    flags.DEFINE_integer("samples", 12, text, lower_bound=0, flag_values=values)
    parse(values, argv, required=("workdir",))
    workdir = buckets.of(values.workdir, "--workdir")
    out = buckets.of(values.out, "--out") if values.out else workdir / "report.html"
    against = configs.load(values.against) if values.against else None
    from blip_jax.cli.report import bootstrapped, page, records, samples
    from blip_jax.console import say
    from blip_jax.demo.report.page import put

    if bootstrapped.is_one(workdir):
        put(out, bootstrapped.page(workdir))
    else:
        run = records.read(workdir, against)
        said = samples.of(run, values.samples) if values.samples else samples.Said([], [], "")
        if said.problem:
            say(f"without samples: {said.problem}")
        put(out, page.of(run, said))
    print(f"written to {out}")
    return 0
