"""The scripts in tpu/, against stand-ins for gcloud, kubectl, xpk and Slurm that check and record their arguments."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tpu").rglob("*.sh"))
SETTINGS = """\
NAME=mine
TRAIN=(configs/quickstart.yaml "methods.0.length=5" "task={name: boolq, with_prefix: true}")
OUT={out}
PROJECT=project ZONE=zone ACCELERATOR=v5litepod-16 RUNTIME=runtime SPOT=yes QUEUE_FOR=6h SLICES=2 IMAGE=host/image
NODES=2 GPUS_PER_NODE=4 PARTITION= TIME_LIMIT=1:00:00 POLL_S=0
"""
# The options that the programs have, as their own help lists them.
OPTIONS = {
    "gcloud compute tpus queued-resources create": (
        "project zone node-id accelerator-type runtime-version spot valid-until-duration"
    ),
    "gcloud compute tpus queued-resources describe": "project zone format",
    "gcloud compute tpus queued-resources delete": "project zone force quiet",
    "gcloud compute tpus tpu-vm describe": "project zone format",
    "gcloud compute tpus tpu-vm ssh": "project zone worker quiet command",
    "gcloud compute tpus tpu-vm scp": "project zone worker quiet",
    "xpk cluster create": "cluster project zone tpu-type num-slices spot on-demand",
    "xpk cluster delete": "cluster project zone",
    "xpk workload create": (
        "cluster project zone workload tpu-type num-slices docker-image max-restarts restart-on-exit-codes command"
    ),
    "xpk workload list": "cluster project zone",
    "xpk workload delete": "cluster project zone workload",
    "docker build": "file build-arg tag",
    "docker push": "",
    "kubectl apply": "",
    "kubectl get": "output",
    "kubectl logs": "follow selector",
    "kubectl delete": "",
    "sbatch": "job-name nodes ntasks-per-node gpus-per-node partition time signal requeue open-mode output chdir",
    "squeue": "me name",
    "scancel": "me name",
    "srun": "kill-on-bad-exit",
    "scontrol": "",
}
# Records its arguments, refuses options that the program has not, and gives the first answer that is left for them.
STAND_IN = f"""#!{sys.executable} -SE
import json, os, pathlib, re, sys
folder = pathlib.Path(os.environ["STAND_IN"])
options = json.loads((folder / "options.json").read_text())
called = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
text = " ".join(called)
with (folder / "calls.jsonl").open("a") as file:
    file.write(json.dumps(called) + "\\n")
known = [name for name in options if text.startswith(name)]
if not known:
    sys.exit(f"no such command: {{text}}")
own = called[: next((i for i, word in enumerate(called) if word in ("job", "task")), None)]
for word in own:
    if word.startswith("--") and word[2:].partition("=")[0] not in options[known[0]].split():
        sys.exit(f"unrecognized option {{word}} of {{known[0]}}")
if "-" in called[-1:]:
    (folder / "stdin").write_text(sys.stdin.read())
path = folder / "answers.json"
answers = json.loads(path.read_text())
for answer in answers:
    if re.search(answer[0], text):
        answers.remove(answer)
        path.write_text(json.dumps(answers))
        print(answer[1], end="")
        print(answer[3] if len(answer) > 3 else "", end="", file=sys.stderr)
        sys.exit(answer[2] if len(answer) > 2 else 0)
"""


class Place:
    """A folder with stand-ins on the PATH, settings, and the calls that were made."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()
        for name in {command.split()[0] for command in OPTIONS}:
            (folder / "bin" / name).write_text(STAND_IN)
            (folder / "bin" / name).chmod(0o755)
        (folder / "options.json").write_text(json.dumps(OPTIONS))
        self.settings()

    def settings(self, out: str = "gs://bucket/runs/mine", **changes: str) -> None:
        lines = "".join(f"{name}={value}\n" for name, value in changes.items())
        (self.folder / "settings.sh").write_text(SETTINGS.replace("{out}", out) + lines)

    def run(self, script: str, *arguments: str, answers: list | None = None, **environment: str):
        """Run a script and return the finished process."""
        (self.folder / "answers.json").write_text(json.dumps(answers or []))
        (self.folder / "calls.jsonl").write_text("")
        command = ["bash", str(ROOT / "tpu" / script), "--settings", str(self.folder / "settings.sh"), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment() | environment, timeout=120
        )

    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"PATH": path, "STAND_IN": str(self.folder), "TMPDIR": str(self.folder)}

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    def verbs(self) -> list[str]:
        """Say of each call what it was: `create`, `ssh all start`."""
        found = []
        for call in self.calls():
            words = [word for word in call if not word.startswith("--")]
            verb = words[4] if call[0] == "gcloud" else " ".join(words[:3])
            worker = next((word.partition("=")[2] for word in call if word.startswith("--worker=")), "")
            command = next((word.partition("worker.sh ")[2] for word in call if word.startswith("--command=")), "")
            found.append(" ".join([verb, worker, *command.split()[:1]]).strip())
        return found


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


ABSENT = ["queued-resources describe", "", 1, "ERROR: (gcloud) NOT_FOUND: Resource not found"]
WAITING = ["queued-resources describe", "WAITING_FOR_RESOURCES\n"]
ACTIVE = ["queued-resources describe", "ACTIVE\n"]
SUSPENDED = ["queued-resources describe", "SUSPENDED\n"]
READY = ["tpu-vm describe", "READY\n"]
BROKEN = ["tpu-vm ssh", "", 255, "ssh: connect to host: Connection refused"]


def outcome(text: str) -> list:
    return ["worker.sh outcome", f"{text}\n"]


def test_all_goes_from_no_tpu_to_a_finished_run_and_gives_it_back(place):
    answers = [ABSENT, WAITING, ACTIVE, READY, ACTIVE, READY, outcome("running"), ACTIVE, READY, outcome("0")]
    done = place.run("tpu.sh", "all", answers=answers)
    assert done.returncode == 0, done.stderr
    looks = ["describe", "describe", "ssh 0 outcome"]
    waited = ["describe", "create", "describe", "describe", "describe"]
    assert place.verbs() == [*waited, "scp all", "ssh all install", "ssh all start", *looks, *looks, "delete"]
    (create,) = (call for call in place.calls() if "create" in call)
    assert create[5:] == [
        *("mine", "--node-id=mine", "--accelerator-type=v5litepod-16", "--runtime-version=runtime", "--spot"),
        *("--valid-until-duration=6h", "--project=project", "--zone=zone"),
    ]
    (start,) = (call[-3] for call in place.calls() if any("worker.sh start" in word for word in call))
    assert start.endswith(
        r"start .venv/bin/softprompt train configs/quickstart.yaml methods.0.length=5 "
        r"task=\{name:\ boolq\,\ with_prefix:\ true\} --out gs://bucket/runs/mine"
    )
    assert "WAITING_FOR_RESOURCES: waiting" in done.stderr
    names = subprocess.run(["tar", "-tzf", place.folder / "mine.tar.gz"], capture_output=True, text=True).stdout.split()
    assert {"pyproject.toml", "tpu/worker.sh", "softprompt_jax/run.py"} <= set(names)
    assert not any(name.startswith((".venv", "runs")) for name in names)


def test_a_checkout_with_spaces_and_deleted_files_is_copied(place):
    checkout = place.folder / "my checkout"
    shutil.copytree(ROOT / "tpu", checkout / "tpu")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    (checkout / "tpu" / "README.md").unlink()
    (checkout / "tpu" / "my own.yaml").touch()
    done = place.run(str(checkout / "tpu" / "tpu.sh"), "install")
    assert done.returncode == 0, done.stderr
    bundle = place.folder / "mine.tar.gz"
    names = subprocess.run(["tar", "-tzf", bundle], capture_output=True, text=True).stdout.splitlines()
    assert {"tpu/worker.sh", "tpu/my own.yaml"} <= {*names}
    assert "tpu/README.md" not in names


def test_a_preempted_tpu_is_replaced_and_the_run_goes_on(place):
    again = [SUSPENDED, SUSPENDED, ACTIVE, READY, ACTIVE, READY, outcome("0")]
    done = place.run("tpu.sh", "watch", answers=[ACTIVE, READY, outcome("running"), *again])
    assert done.returncode == 0, done.stderr
    assert place.verbs()[3:10] == [
        *("describe", "describe", "delete", "create", "describe", "describe", "scp all"),
    ]
    assert place.verbs()[10:12] == ["ssh all install", "ssh all start"]
    assert "taken away" in done.stderr


def test_a_machine_that_is_gone_before_the_queue_knows_is_replaced_too(place):
    lost = [ACTIVE, ["tpu-vm describe", "PREEMPTED\n"]]
    answers = [*lost, *lost, ACTIVE, READY, ACTIVE, READY, outcome("0")]
    assert place.run("tpu.sh", "watch", answers=answers).returncode == 0
    assert place.verbs()[4:6] == ["delete", "create"]


def test_a_lost_connection_ends_nothing(place):
    answers = [ACTIVE, READY, BROKEN, ACTIVE, READY, outcome("running"), ACTIVE, READY, outcome("0")]
    done = place.run("tpu.sh", "watch", answers=answers)
    assert done.returncode == 0, done.stderr
    assert place.verbs().count("ssh 0 outcome") == 3
    assert "delete" not in place.verbs()


def test_what_a_connection_said_before_it_broke_is_not_believed(place):
    cut = ["worker.sh outcome", "running\n", 255]
    done = place.run("tpu.sh", "watch", answers=[ACTIVE, READY, cut, ACTIVE, READY, outcome("0")])
    assert done.returncode == 0, done.stderr
    assert place.verbs().count("ssh 0 outcome") == 2


def test_a_run_that_was_never_started_there_is_started(place):
    answers = [ACTIVE, READY, outcome("absent"), ACTIVE, READY, outcome("0")]
    assert place.run("tpu.sh", "watch", answers=answers).returncode == 0
    assert "ssh all start" in place.verbs()


def test_a_run_that_failed_is_told_and_the_cost_with_it(place):
    answers = [ACTIVE, READY, outcome("2"), ["worker.sh tail", "softprompt: bad\n"]]
    done = place.run("tpu.sh", "watch", answers=answers)
    assert done.returncode == 1
    assert "softprompt: bad" in done.stdout
    assert "exit code 2: see above; the TPU still costs money" in done.stderr


def test_a_tpu_that_exists_is_not_asked_for_again(place):
    done = place.run("tpu.sh", "create", answers=[ACTIVE, READY, ACTIVE, READY])
    assert done.returncode == 0
    assert "create" not in place.verbs()
    assert "exists already" in done.stderr


def test_a_fresh_machine_may_refuse_connections_for_a_while(place):
    done = place.run("tpu.sh", "run", answers=[BROKEN, BROKEN])
    assert done.returncode == 0
    assert place.verbs() == ["ssh all start"] * 3


def test_no_quota_is_told_with_where_to_ask(place):
    refusal = ["queued-resources create", "", 1, "ERROR: RESOURCE_EXHAUSTED: Quota limit exceeded"]
    done = place.run("tpu.sh", "create", answers=[ABSENT, refusal])
    assert done.returncode == 2
    assert "Quota limit exceeded" in done.stderr
    assert "iam-admin/quotas" in done.stderr
    failed = ["queued-resources describe", "FAILED\n"]
    done = place.run("tpu.sh", "create", answers=[ABSENT, failed])
    assert done.returncode == 2
    assert "mine: FAILED; expected a TPU" in done.stderr


@pytest.mark.parametrize(
    ("script", "command"),
    [
        *(("tpu.sh", verb) for verb in ("all", "logs", "status", "stop")),
        *(("gke.sh", verb) for verb in ("image", "create", "run", "status", "logs", "stop", "delete")),
        *((f"gpu/{name}.sh", verb) for name in ("slurm", "kubernetes") for verb in ("run", "status", "logs", "stop")),
    ],
)
def test_a_dry_run_prints_every_command_and_runs_none(place, script, command):
    done = place.run(script, "--dry-run", command)
    assert done.returncode == 0, done.stderr
    assert place.calls() == []
    assert not (place.folder / "mine.tar.gz").exists()
    printed = done.stdout.splitlines()
    assert printed
    if command == "all":
        verbs = ("describe", "create", "describe", "tar", "scp", "ssh", "ssh", "describe", "ssh", "delete")
        assert len(printed) == len(verbs)
        assert all(verb in line for verb, line in zip(verbs, printed, strict=True))


def test_gke_gets_a_cluster_and_a_workload_that_restarts(place):
    for command in ("image", "create", "run", "status", "logs", "stop", "delete"):
        done = place.run("gke.sh", command)
        assert done.returncode == 0, (command, done.stderr)
        if command == "run":
            (call,) = place.calls()
            assert "--restart-on-exit-codes=1,75" in call
            assert "--max-restarts=10" in call  # of defects too, which bill while they are tried
            assert "--num-slices=2" in call
            assert next(word for word in call if word.startswith("--command=")).startswith(
                "--command=softprompt train configs/quickstart.yaml"
            )
    place.settings(out="/local")
    assert "a container's disk ends with it" in place.run("gke.sh", "run").stderr


@pytest.mark.parametrize(
    ("command", "missing"),
    [("image", "docker"), ("logs", "kubectl"), *(("run", it) for it in ("xpk", "gcloud", "kubectl"))],
)
def test_gke_names_the_program_that_is_missing(place, command, missing):
    (place.folder / "bin" / missing).unlink()
    for name in ("bash", "dirname", "basename"):
        (place.folder / "bin" / name).symlink_to(shutil.which(name))
    done = place.run("gke.sh", command, PATH=str(place.folder / "bin"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"gke.sh: {missing}: not found; expected it on the PATH;")
    assert done.stderr.count("\n") == 1
    assert place.calls() == []


def test_the_jobset_restarts_the_preempted_for_ever_and_failures_five_times_and_names_every_process(place):
    done = place.run("gpu/kubernetes.sh", "run")
    assert done.returncode == 0, done.stderr
    jobset = yaml.safe_load((place.folder / "stdin").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (2, 2, 0)
    bad_input, told_to_go, taken_away = job["podFailurePolicy"]["rules"]
    assert [rule["onExitCodes"]["values"] for rule in (bad_input, told_to_go)] == [[2], [75]]
    assert taken_away["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert {rule["action"] for rule in (bad_input, told_to_go, taken_away)} == {"FailJob"}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 5  # what no rule names
    final, endless = jobset["spec"]["failurePolicy"]["rules"]
    assert (final["action"], endless["action"]) == ("FailJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    assert {*final["onJobFailureReasons"], *endless["onJobFailureReasons"]} == {"PodFailurePolicy"}
    (pattern,) = final["onJobFailureMessagePatterns"]
    told = "Container train for pod default/mine-nodes-0-1 failed with exit code {} matching FailJob rule at index {}"
    assert re.search(pattern, told.format(2, 0))
    assert not re.search(pattern, told.format(75, 1))
    assert "onJobFailureMessagePatterns" not in endless
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert container["command"] + container["args"] == [
        *("softprompt", "train", "configs/quickstart.yaml", "methods.0.length=5"),
        *("task={name: boolq, with_prefix: true}", "--out", "gs://bucket/runs/mine"),
        *("--coordinator", "mine-nodes-0-0.mine:8476", "--processes", "2", "--process", "$(JOB_COMPLETION_INDEX)"),
    ]
    for command in ("status", "logs", "stop"):
        assert place.run("gpu/kubernetes.sh", command).returncode == 0


PREDICT = "(--input gs://bucket/in.jsonl --output 'gs://bucket/my out.jsonl')"
ASKED = {
    "eval": ["eval", "gs://bucket/runs/mine", "--split", "test"],
    "predict": ["predict", "gs://bucket/runs/mine", *("--input", "gs://bucket/in.jsonl", "--output")],
}


@pytest.mark.parametrize("script", ["tpu.sh", "gke.sh", "gpu/slurm.sh", "gpu/kubernetes.sh"])
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_every_script_evaluates_and_predicts_as_it_trains(place, script, command):
    place.settings(COMMAND=command, EVAL="(--split test)", PREDICT=PREDICT)
    done = place.run(script, "run")
    assert done.returncode == 0, done.stderr
    wanted = [*ASKED[command], *(["gs://bucket/my out.jsonl"] if command == "predict" else [])]
    (call,) = place.calls()
    if script == "gpu/slurm.sh":
        assert call[call.index("job") + 1 :] == wanted
    elif script == "gpu/kubernetes.sh":
        jobset = yaml.safe_load((place.folder / "stdin").read_text())
        (container,) = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
        assert [*container["command"], *container["args"]][1 : 1 + len(wanted)] == wanted
        assert "--coordinator" in container["args"]
    else:
        (told,) = (word.partition("=")[2] for word in call if word.startswith("--command="))
        assert shlex.split(told)[-len(wanted) - 1 :] in (["softprompt", *wanted], [".venv/bin/softprompt", *wanted])


def test_the_command_may_come_from_the_environment_and_another_is_refused(place):
    settings = (ROOT / "tpu" / "settings.sh").read_text()
    (place.folder / "settings.sh").write_text(f"{settings}OUT=gs://bucket/x PROJECT=project\n")
    shown = place.run("tpu.sh", "--dry-run", "run", COMMAND="eval").stdout
    assert "softprompt eval gs://bucket/x --split test" in shown.replace("\\", "")
    done = place.run("tpu.sh", "run", COMMAND="serve")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "COMMAND is serve; expected train, eval or predict" in done.stderr


@pytest.mark.parametrize(("code", "queued_again"), [(0, False), (75, True), (2, False), (1, False)])
def test_slurm_queues_a_preempted_job_again(place, code, queued_again):
    place.settings(out="/shared/mine")
    done = place.run("gpu/slurm.sh", "run")
    assert done.returncode == 0, done.stderr
    (call,) = place.calls()
    script = call.index(str(ROOT / "tpu" / "gpu" / "slurm.sh"))
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--requeue", "--signal=TERM@120"} <= {*call}
    (place.folder / "answers.json").write_text(json.dumps([["srun", "", code]]))
    (place.folder / "calls.jsonl").write_text("")
    assert slurm(place, *call[script:]).returncode == code
    started, *rest = place.calls()
    assert started[2:] == ["bash", "tpu/gpu/slurm.sh", "task", *call[script + 2 :]]
    assert rest == ([["scontrol", "requeue", "7"]] if queued_again else [])


def slurm(place: Place, *command: str) -> subprocess.CompletedProcess:
    """Run a part of a job in a checkout whose programs are the stand-ins, as Slurm would."""
    for name, target in (("tpu", ROOT / "tpu"), (".venv", place.folder)):
        if not (place.folder / name).exists():
            (place.folder / name).symlink_to(target)
    environment = place.environment() | {"SLURM_JOB_ID": "7"}
    return subprocess.run(
        ["bash", *command], cwd=place.folder, env=environment, capture_output=True, text=True, timeout=60
    )


def stand_in(place: Place, name: str, script: str) -> None:
    (place.folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
    (place.folder / "bin" / name).chmod(0o755)


@pytest.mark.parametrize("others", [0, 1, 137, 143])
def test_slurm_queues_a_job_again_whose_first_task_has_saved_whatever_becomes_of_the_others(place, others):
    stand_in(place, "softprompt", "exit 75")
    stand_in(place, "srun", f'shift; "$@" || exit 9; exit {others}')  # one task; then the highest code of the others
    (place.folder / "answers.json").write_text("[]")
    for _ in range(2):  # the mark of the first time is gone by the second
        job = slurm(place, "tpu/gpu/slurm.sh", "job", "train", "mine.yaml", "--out", "/shared/mine")
        assert job.returncode == 75, job.stderr
        assert place.calls() == [["scontrol", "requeue", "7"]]
        assert not list((place.folder / "runs").iterdir())
        (place.folder / "calls.jsonl").unlink()


@pytest.mark.parametrize("code", [0, 1, 2, 134])
def test_a_task_under_slurm_ends_as_its_run_did_and_leaves_no_mark(place, code):
    stand_in(place, "softprompt", f'[ "$*" = "train mine.yaml a=\'b c\'" ] && exit {code}; exit 99')
    assert slurm(place, "tpu/gpu/slurm.sh", "task", "train", "mine.yaml", "a='b c'").returncode == code
    assert not (place.folder / "runs").exists()


def test_a_task_under_slurm_waits_for_a_run_that_saves(place):
    stand_in(place, "softprompt", "trap 'sleep 0.3; exit 75' TERM; kill -TERM $PPID $$; sleep 5")
    assert slurm(place, "tpu/gpu/slurm.sh", "task", "train", "mine.yaml").returncode == 0
    assert (place.folder / "runs" / "saved-7").exists()


def test_the_image_is_built_of_what_the_checkout_pins():
    """Its Python is one that we state and test, and every pip obeys the constraints and names extras that exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "tpu" / "Dockerfile").read_text().splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert [step for step, _ in steps] == ["FROM", "ARG", "WORKDIR", "COPY", "RUN"]
    told = dict(steps)
    version = re.fullmatch(r"python:(\d\.\d+)-slim", told["FROM"])[1]
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]
    assert told["COPY"] == ". ."
    assert "--constraint constraints.txt" in told["RUN"]
    (wanted,) = re.findall(r"\[(.*?)\]", told["RUN"])
    name, default = told["ARG"].split("=")
    assert {default if extra == f"${name}" else extra for extra in wanted.split(",")} <= {
        *project["optional-dependencies"]
    }
    stated = [re.match(r"[\w-]+", each)[0] for each in project["optional-dependencies"]["kubernetes"]]
    pinned = re.findall(r"^([\w-]+)==\d", (ROOT / "constraints.txt").read_text(), re.M)
    assert {*stated} <= {*pinned}


def test_the_image_leaves_out_what_git_ignores_and_nothing_that_is_kept():
    ignored = [line for line in (ROOT / "tpu" / "Dockerfile.dockerignore").read_text().splitlines() if line[0] != "#"]
    assert {".git", ".venv*", "runs", ".pytest_cache", "**/__pycache__"} <= {*ignored}
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    left_out = [name for name in kept for rule in ignored if fnmatch.fnmatch(name.split("/")[0], rule)]
    assert left_out == []
    assert "constraints.txt" in kept


def test_skypilots_file_restarts_what_was_preempted_and_its_command_is_whole(tmp_path):
    job = yaml.safe_load((ROOT / "tpu" / "gpu" / "skypilot.yaml").read_text())
    assert job["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    stand_in = tmp_path / ".venv" / "bin" / "softprompt"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    environment = os.environ | {name: value for name, value in job["envs"].items() if value is not None}
    environment |= {"TRAIN": "mine.yaml steps=5", "OUT": "gs://bucket/run", "SKYPILOT_NODE_RANK": "1"}
    for nodes, expected in (
        ("10.0.0.1", []),
        ("10.0.0.1\n10.0.0.2", ["--coordinator", "10.0.0.1:8476", "--processes", "2", "--process", "1"]),
    ):
        told = {"SKYPILOT_NODE_IPS": nodes, "SKYPILOT_NUM_NODES": str(len(nodes.split()))}
        done = subprocess.run(
            ["bash", "-c", job["run"]], cwd=tmp_path, env=environment | told, capture_output=True, text=True
        )
        assert done.stdout.split() == ["train", "mine.yaml", "steps=5", "--out", "gs://bucket/run", *expected]
        told |= {"COMMAND": "predict", "ARGUMENTS": "--input a --output b"}
        done = subprocess.run(
            ["bash", "-c", job["run"]], cwd=tmp_path, env=environment | told, capture_output=True, text=True
        )
        assert done.stdout.split() == ["predict", "gs://bucket/run", "--input", "a", "--output", "b", *expected]


@pytest.mark.parametrize(
    ("script", "command", "changes", "message"),
    [
        ("tpu.sh", "create", {"PROJECT": ""}, "PROJECT is empty; expected a Google Cloud project; edit the file"),
        ("tpu.sh", "create", {"OUT": "/home/me"}, "a spot TPU takes its disk with it"),
        ("tpu.sh", "crate", {}, "found crate; expected all, create"),
        ("tpu.sh", "create", {"NAME": "My_TPU"}, "NAME is My_TPU; expected a-z, 0-9 and -"),
        ("gke.sh", "run", {"IMAGE": ""}, "IMAGE is empty"),
        ("gpu/slurm.sh", "", {"OUT": ""}, "OUT is empty"),
        ("gpu/kubernetes.sh", "", {}, "found no command; expected run"),
    ],
)
def test_bad_settings_are_told_in_one_line(place, script, command, changes, message):
    place.settings(**{"out": changes.pop("OUT", "gs://bucket/x")}, **changes)
    done = place.run(script, *([command] if command else []))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert place.calls() == []


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck; it is in the extra `dev`")
    done = subprocess.run([shellcheck, *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
