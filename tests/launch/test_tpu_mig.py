"""launch/tpu_mig.sh: what it asks of gcloud, and how it numbers the hosts of a slice."""

import re
import subprocess

import pytest
from world.launching import CODE, POD, ROOT, RUN, dry_run, program, shell

PLACE = ["pod", "--project=my-project"]
ZONE, REGION = "--zone=us-west4-a", "--region=us-west4"


def test_a_slice_is_policy_template_and_group():
    policy, template, group, wait = dry_run(
        "tpu_mig.sh", "create", *POD, "--type=tpu7x", "--topology=2x4x4", "--capacity=reservation=ours"
    )
    assert policy == [
        *("gcloud", "compute", "resource-policies", "create", "workload-policy", *PLACE, REGION),
        *("--type=high-throughput", "--accelerator-topology=2x4x4"),
    ]
    assert template[:4] == ["gcloud", "compute", "instance-templates", "create"]
    assert {"--machine-type=tpu7x-standard-4t", "--reservation=ours", "--boot-disk-type=hyperdisk-balanced"} <= set(
        template
    )
    assert {"--maintenance-policy=TERMINATE", "--provisioning-model=RESERVATION_BOUND"} <= set(template)
    assert group[:5] == ["gcloud", "compute", "instance-groups", "managed", "create"] and ZONE in group
    assert {"--size=8", "--template=pod", "--target-size-policy-mode=bulk"} <= set(group)
    assert group[-1] == "--workload-policy=projects/my-project/regions/us-west4/resourcePolicies/pod"
    assert wait[4:] == ["wait-until", *PLACE, ZONE, "--stable"]

    template, group, _ = dry_run("tpu_mig.sh", "create", *POD, "--type=v6e", "--topology=2x2")  # one host: no policy
    assert not [word for word in (*template, *group) if "policy=projects" in word or word.startswith("--prov")]
    lent = dry_run(
        "tpu_mig.sh", "create", *POD, "--type=v5p", "--topology=2x2x2", "--capacity=flex-start", "--hours=168"
    )[1]
    flags = {"--provisioning-model=FLEX_START", "--max-run-duration=168h", "--instance-termination-action=DELETE"}
    assert flags <= set(lent)
    verbs = [words[2:5] for words in dry_run("tpu_mig.sh", "delete", *POD)]
    assert verbs == [
        ["instance-groups", "managed", "delete"],
        ["instance-templates", "delete", "pod"],
        ["resource-policies", "delete", "pod"],
    ]


GCLOUD = """
cd {folder}
case "$*" in
    *list-instances*format*) printf '%s\\n' $HOSTS ;;
    *list-instances*) echo listed ;;
    *" ssh "*worker-id) [ "$3" != "$DEAF" ] && echo "${{3#*-}}" ;;
    *" ssh "*) for word; do case "$word" in --command=*) echo "$3 ${{word#--command=}}" >> said ;; esac; done
        [ "$3" != "$FAILS" ] ;;
esac"""


def test_hosts_are_numbered_as_their_tpus_are(tmp_path):
    """The list of a group is in no order."""
    gcloud = program(tmp_path / "bin", "gcloud", GCLOUD.format(folder=tmp_path))
    hosts = {"HOSTS": "vm-2 vm-0 vm-1"}
    on = lambda *args, **env: shell("tpu_mig.sh", args[0], *POD, *args[1:], path=gcloud, **hosts | env)
    said = lambda: dict(line.split(" ", 1) for line in sorted((tmp_path / "said").read_text().splitlines()))

    assert on("run", "--env=A=two words", "--", *RUN, "{}").returncode == 0
    assert sorted(said()) == ["vm-0", "vm-1", "vm-2"]
    for host, line in said().items():
        where = f"BLIP_JAX_COORDINATOR=vm-0:8476 BLIP_JAX_PROCESSES=3 BLIP_JAX_PROCESS={host[-1]} "
        assert f"'A=two words' {where}" in line or f"A='two words' {where}" in line, line
        assert line.endswith("{}") or line.endswith("'{}'")  # what the user runs stays as it is
    (tmp_path / "said").unlink()
    done = on("logs", "--worker=1")
    assert done.returncode == 0 and list(said()) == ["vm-1"]
    (tmp_path / "said").unlink()
    assert on("install", *CODE).returncode == 0 and all("install_project tpu" in line for line in said().values())
    assert on("stop", FAILS="vm-2").returncode == 1  # one of them
    done = on("status", DEAF="vm-1")
    assert done.returncode == 2 and "host vm-1 has no worker-id ('')" in done.stderr
    assert "has no hosts: `create` asks for them" in on("status", HOSTS="").stderr

    (tmp_path / "said").unlink()
    assert on("run", "--", *RUN, HOSTS="vm-7", DEAF="vm-7").returncode == 0  # alone, it is asked for no number
    assert "BLIP_JAX" not in said()["vm-7"] and "worker.sh resume -- blip-jax train" in said()["vm-7"]


def test_both_ways_to_a_tpu_install_alike():
    commands = [dry_run(script, "install", *POD, *CODE)[-1][-1] for script in ("tpu_vm.sh", "tpu_mig.sh")]
    assert commands[0] == commands[1] and commands[0].endswith("install_project tpu")
    done = subprocess.run(["bash", "-n", "-c", commands[0].removeprefix("--command=")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["tpu_vm.sh", "tpu_mig.sh", "gke_xpk.sh"])
def test_help_names_every_flag(name):
    script = (ROOT / "launch" / name).read_text()
    known = {f"--{flag}=" for flag in [*re.search(r'^parse "(.*?)" ', script, re.M)[1].split(), "env"]}
    assert known == set(re.findall(r"--[a-z]+=(?=[ A])", script.split("END")[1]))
