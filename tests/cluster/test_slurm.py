"""The batch script: what is in it, and what a real Slurm of four nodes makes of it."""

import dataclasses
import pathlib
import re
import shlex
import subprocess

import pytest

from mfjax.cluster import slurm, start
from mfjax.config import ClusterConfig
from tests.cluster import slurm_lab, tiny_run

JOB = slurm.SlurmJob(
  name="molm", nodes=4, grace_seconds=60, max_restarts=3, log_directory="/shared/it's here"
)
GPU_JOB = dataclasses.replace(
  JOB,
  gpus_per_node=8,
  cpus_per_task=96,
  time="1-12:00:00",
  account="science",
  partition="gpu",
  options=("--qos=high", "--constraint=a&b"),
  container_image="registry#team/mfjax:1",
  container_mounts="/data:/data",
)
PROGRAM = ["mfjax", "train", "--config=a b", "--workdir=$HOME/`x`", "it's"]


def headers(script):
  return re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)


@pytest.mark.parametrize("job", [JOB, GPU_JOB], ids=["plain", "gpus"])
def test_a_script_is_valid_bash_and_quotes_what_the_user_gave(job):
  script = slurm.script(job, PROGRAM)
  checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
  assert (checked.returncode, checked.stderr) == (0, "")
  [command] = [line for line in script.splitlines() if "--config=" in line]
  assert shlex.split(command) == PROGRAM


def test_options_of_a_job():
  assert headers(slurm.script(JOB, PROGRAM)) == [
    "--job-name=molm",
    "--nodes=4",
    "--ntasks-per-node=1",
    "--signal=TERM@60",
    "--open-mode=append",
    f"--output={shlex.quote('/shared/it' + chr(39) + 's here/job-%j.log')}",
    "--requeue",
  ]
  found = headers(slurm.script(GPU_JOB, PROGRAM))
  assert {
    "--gpus-per-node=8", "--cpus-per-task=96", "--time=1-12:00:00", "--account=science",
    "--partition=gpu", "--qos=high", "--constraint=a&b",
  } <= set(found)  # fmt: skip
  assert "--container-mounts=/data:/data" in slurm.script(GPU_JOB, PROGRAM)


def test_a_process_drives_all_gpus_of_its_node_or_one(monkeypatch):
  script = slurm.script(GPU_JOB, PROGRAM)
  assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7" in script
  each = slurm.script(dataclasses.replace(GPU_JOB, task_per_gpu=True), PROGRAM)
  assert "--ntasks-per-node=8" in headers(each)
  assert "JAX_LOCAL_DEVICE_IDS" not in each
  for name, value in {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
  }.items():  # fmt: skip
    monkeypatch.setenv(name, value)
  one = start.find(ClusterConfig())
  assert one is not None
  assert one.local_device_ids == (0,)
  all_of_them = start.find(ClusterConfig(), local_device_ids=range(8))
  assert all_of_them is not None
  assert all_of_them.local_device_ids == tuple(range(8))
  assert all_of_them.coordinator == one.coordinator


def run_script(tmp_path, codes, restarts=0, job=JOB):
  """Run a script with stand-ins for Slurm's commands; `codes` are the ranks'."""
  job = dataclasses.replace(job, log_directory=str(tmp_path / "log files"))
  tools = {
    "srun": "shift 3; worst=0; for rank in $RANKS; do\n  SLURM_PROCID=${rank%:*} CODE=${rank#*:} "
    '"$@"; code=$?; [ $code -gt $worst ] && worst=$code\ndone; exit $worst',
    "scontrol": f'echo "$@" >> {tmp_path}/scontrol.words',
    "program": 'exit "$CODE"',
  }
  for name, text in tools.items():
    (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
    (tmp_path / name).chmod(0o755)
  ranks = " ".join(f"{rank}:{code}" for rank, code in enumerate(codes))
  environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "RANKS": ranks}
  if restarts:
    environment["SLURM_RESTART_COUNT"] = str(restarts)
  done = subprocess.run(
    ["bash", "-c", slurm.script(job, ["program"])],
    env=environment, capture_output=True, text=True,
  )  # fmt: skip
  words = tmp_path / "scontrol.words"
  asked = words.read_text().splitlines() if words.exists() else []
  return done, asked


@pytest.mark.parametrize("codes", [(75, 75), (76, 1), (0, 137), (1, 134)])
def test_a_job_that_did_not_finish_is_requeued_after_a_pause(tmp_path, codes):
  done, asked = run_script(tmp_path, codes, restarts=1)
  assert asked == ["requeue 7", "update JobId=7 StartTime=now+20"]
  assert f"ended with code {max(codes)}: restart 2 in 20 s" in done.stdout
  assert (tmp_path / "log files/job-7/attempt-1/rank-1.exit").read_text() == f"{codes[1]}\n"


@pytest.mark.parametrize(("codes", "code"), [((0, 0), 0), ((2, 2), 2), ((137, 2), 2)])
def test_a_finished_job_and_a_users_mistake_are_final(tmp_path, codes, code):
  done, asked = run_script(tmp_path, codes)
  assert (done.returncode, asked) == (code, [])


def test_restarts_end(tmp_path):
  done, asked = run_script(tmp_path, (75, 75), restarts=3)
  assert (done.returncode, asked) == (75, [])
  assert "after 3 restarts, and is not started again" in done.stdout


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"account": "a b"}, "account='a b': it must be one word"),
    ({"name": "x\n#SBATCH --uid=0"}, "it must be one word"),
    ({"options": ("qos=high",)}, "write it as sbatch has it, such as --qos=high"),
    ({"task_per_gpu": True}, "a task per GPU needs GPUs"),
    ({"container_mounts": "/a:/a"}, "container_mounts needs a container_image"),
    ({"log_directory": "/a%b"}, "log_directory='/a%b': Slurm gives % and"),
  ],
)
def test_what_slurm_would_misread_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(JOB, **changes)


MISSING = slurm_lab.missing()
real = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def lab():
  """A running Slurm: the environment in which its commands find it."""
  with slurm_lab.cluster() as environment:
    yield environment


def slurm_command(lab, *words):
  done = subprocess.run(words, env=lab, capture_output=True, text=True)
  return done.stdout + done.stderr


def state(lab, job_id):
  found = re.search(r"JobState=(\w+)", slurm_command(lab, "scontrol", "show", "job", job_id))
  return found.group(1) if found else ""


def ended(lab, job_id, describe):
  """Wait until a job has ended for good."""
  final = {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"}
  tiny_run.wait_until(lambda: state(lab, job_id) in final, 300, "the job's end", describe)


@pytest.mark.cluster
@real
def test_ranks_of_a_job_find_each_other(lab, tmp_path):
  job = dataclasses.replace(JOB, log_directory=str(tmp_path / "it's here"))
  (tmp_path / "it's here").mkdir()
  (tmp_path / "job").write_text(slurm.script(job, tiny_run.WHO_AM_I))
  environment = lab | tiny_run.environment(SLURM_CONF=lab["SLURM_CONF"])
  job_id = slurm_command(environment, "sbatch", "--parsable", str(tmp_path / "job")).strip()
  directory = pathlib.Path(job.log_directory, f"job-{job_id}", "attempt-0")
  ended(lab, job_id, lambda: tiny_run.read_all(directory.glob("*.log")))
  logs = sorted(directory.glob("*.log"))
  assert state(lab, job_id) == "COMPLETED", tiny_run.read_all(logs)
  assert [tiny_run.said(log.read_text()) for log in logs] == [[line] for line in tiny_run.SAID]


@pytest.mark.cluster
@real
@pytest.mark.slow
def test_a_preempted_run_is_requeued_and_ends_with_the_losses_of_an_undisturbed_one(lab, tmp_path):
  undisturbed = tiny_run.undisturbed()
  workdir, logs = tmp_path / "run", tmp_path / "logs"
  environment = lab | tiny_run.environment(SLURM_CONF=lab["SLURM_CONF"])
  launch = ["launch", "slurm", "--nodes=4", "--max_restarts=2", f"--logs={logs}", "--"]
  submitted = subprocess.run(
    tiny_run.mfjax(*launch, *tiny_run.train(workdir)),
    env=environment, capture_output=True, text=True,
  )  # fmt: skip
  assert submitted.returncode == 0, submitted.stderr
  [job_id] = re.findall(r"Submitted batch job (\d+)", submitted.stdout)

  def describe():
    return tiny_run.read_all([logs / f"job-{job_id}.log", *sorted(logs.glob("job-*/*/*.log"))])

  def steps():
    return len(tiny_run.losses(workdir))

  tiny_run.wait_until(lambda: steps() >= 5, 300, "step 5", describe)
  slurm_command(lab, "scancel", "--signal=TERM", f"{job_id}.0")
  first = logs / f"job-{job_id}" / "attempt-0"
  tiny_run.wait_until(lambda: len(list(first.glob("*.exit"))) == 4, 120, "the end", describe)
  assert [file.read_text() for file in sorted(first.glob("*.exit"))] == ["75\n"] * 4
  assert steps() < tiny_run.STEPS, "the run had finished before it was preempted"
  # After Slurm's own pause of two minutes this would be too late.
  tiny_run.wait_until((first.parent / "attempt-1").exists, 60, "the restart", describe)
  ended(lab, job_id, describe)
  assert state(lab, job_id) == "COMPLETED", describe()
  assert (first.parent / "attempt-1" / "rank-3.exit").read_text() == "0\n"
  assert tiny_run.losses(workdir) == undisturbed
