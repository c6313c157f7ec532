"""`mfjax launch` on other machines: dry runs, files, missing tools, mistakes."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

import launch

SLURM = ("launch", "slurm", "--nodes=4")
GKE = ("launch", "gke", "--tpu=v5e:4x4", "--image=host/mfjax")
TPU_VM = ("launch", "tpu_vm", "--tpu=v5e:4x4", "--zone=us-west4-a", "--image=host/mfjax")
COMMAND = ("--", "train", "--config=quickstart", "--workdir=runs/it's mine")


@pytest.fixture
def tools(tmp_path, monkeypatch):
  """Programs that note how they are called, alone on the PATH."""

  def install(*names, script=""):
    for name in names:
      (tmp_path / "bin").mkdir(exist_ok=True)
      program = tmp_path / "bin" / name
      program.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >> {tmp_path}/{name}.words\n{script}')
      program.chmod(0o755)

  monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
  return install


@pytest.mark.parametrize("target", [SLURM, GKE, TPU_VM], ids=lambda target: target[1])
def test_a_dry_run_shows_and_writes_the_same_and_runs_nothing(mfjax, tmp_path, target, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  done = mfjax(*target, "--dry_run", "--out=made/file", *COMMAND)
  assert (done.code, done.err) == (0, "")
  assert done.out.startswith((tmp_path / "made" / "file").read_text())
  assert "it's mine" in done.out or "'it'\"'\"'s mine'" in done.out or "'\"'\"'s mine" in done.out
  assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize(
  ("target", "tool"), [(SLURM, "sbatch"), (GKE, "kubectl"), (TPU_VM, "gcloud")], ids=str
)
def test_a_missing_tool_is_one_sentence(mfjax, tmp_path, target, tool, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  done = mfjax(*target, *COMMAND)
  assert done.code == 2
  assert done.err == (
    f"mfjax launch: error: {tool} is not on this machine's PATH: install it or launch from a "
    "machine that has it; --dry_run shows what would run\n"
  )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ((*SLURM[:2], "--task_per_gpu"), "a task per GPU needs GPUs"),
    ((*SLURM, "--sbatch=qos=high"), "option 'qos=high': write it as sbatch has it"),
    ((*SLURM, "--account=a b"), "account='a b': it must be one word"),
    ((*SLURM, "--container_mounts=/data:/data"), "container_mounts needs a container_image"),
    (("launch", "gke", "--image=i"), "--tpu is missing"),
    (("launch", "gke", "--tpu=v5e:4x4"), "--image is missing"),
    (("launch", "gke", "--tpu=v5e:4x5", "--image=i"), "known: 1x1, 2x2, 2x4, 4x4"),
    (("launch", "tpu_vm", "--tpu=v7:4x4", "--image=i"), "known types, each with a topology: v4"),
    ((*GKE, "--bucket=corpus"), "--bucket=corpus: write NAME=VALUE"),
    ((*TPU_VM[:3], "--image=i"), "zone is missing"),
  ],
)
def test_mistakes_are_one_sentence(mfjax, words, message):
  done = mfjax(*words, "--dry_run", *COMMAND)
  assert done.code == 2
  assert message in done.err
  assert done.err.count("\n") == 1


def test_what_goes_on_after_gke_took_it_can_be_followed(mfjax, tools):
  tools("kubectl", script="cat > /dev/null")
  done = mfjax(*GKE, "--job_name=molm", *COMMAND)
  assert (done.code, done.err) == (0, "")
  assert done.out == "logs: kubectl logs --follow --namespace=default job/molm-slice-0\n"


def test_slurm_gets_the_script_that_a_dry_run_shows(mfjax, tmp_path, tools):
  shown = mfjax(*SLURM, "--dry_run", *COMMAND).out.splitlines()
  tools("sbatch", script="echo Submitted batch job 7")
  done = mfjax(*SLURM, "--nodry_run", *COMMAND)
  assert done.code == 0
  [file] = (tmp_path / "sbatch.words").read_text().splitlines()
  assert file == str(tmp_path / "slurm" / "mfjax.sbatch")
  *script, submission = shown
  assert pathlib.Path(file).read_text().splitlines() == script
  assert submission == f"# sbatch {file}"


def test_kubectl_gets_the_manifest_that_a_dry_run_shows(mfjax, tmp_path, tools):
  shown = mfjax(*GKE, "--dry_run", *COMMAND).out
  tools("kubectl", script=f"cat > {tmp_path}/applied; exit 3")
  assert mfjax(*GKE, "--nodry_run", *COMMAND).code == 3
  assert (tmp_path / "kubectl.words").read_text() == "apply\n--filename=-\n"
  assert (tmp_path / "applied").read_text() == shown
  container = yaml.safe_load(shown)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"][
    "spec"
  ]["containers"][0]
  assert container["args"] == ["mfjax", *COMMAND[1:]]


GCLOUD = """\
case "$4" in describe) echo ACTIVE;; esac
for word in "$@"; do case "$word" in --output-directory=*)
  for worker in 0 1 2 3; do echo "mfjax exit code $CODE" > "${word#*=}/$worker.log"; done
esac; done
"""


@pytest.mark.parametrize("code", [0, 2])
def test_gcloud_is_run_to_the_end(mfjax, tmp_path, tools, code, monkeypatch):
  monkeypatch.setenv("CODE", str(code))
  tools("gcloud", script=GCLOUD)
  done = mfjax(*TPU_VM, *COMMAND)
  assert done.code == code
  words = (tmp_path / "gcloud.words").read_text().splitlines()
  assert [word for word in words if word in ("create", "describe", "ssh", "delete")] == [
    "create", "describe", "ssh", "ssh", "delete",
  ]  # fmt: skip
  assert f"ended with code {code}" in done.out


def test_a_cloud_that_refuses_is_one_sentence(mfjax, tools):
  tools("gcloud", script='[ "$4" = delete ]')
  done = mfjax(*TPU_VM, *COMMAND)
  assert done.code == 1
  assert done.err.startswith("mfjax launch tpu_vm: error: gcloud ended with code 1: gcloud compute")


def test_slurm_runs_the_command_with_this_python_or_in_the_container(mfjax):
  words = shlex.join(COMMAND[1:])
  assert f"-m launch.main {words}" in mfjax(*SLURM, "--dry_run", *COMMAND).out
  contained = mfjax(*SLURM, "--container_image=image", "--dry_run", *COMMAND).out
  assert f"  mfjax {words}\n" in contained


def test_tpu_vms_run_the_command_in_the_image(mfjax):
  lines = mfjax(*TPU_VM, "--dry_run", *COMMAND).out.splitlines()
  words = [word for line in lines for word in shlex.split(line)]
  [remote] = [word for word in words if word.startswith("--command=") and "docker run" in word]
  assert shlex.join(["host/mfjax", "mfjax", *COMMAND[1:]]) in remote


@pytest.mark.parametrize("target", [SLURM, TPU_VM], ids=lambda target: target[1])
def test_scripts_and_lines_are_valid_shell(mfjax, target):
  text = mfjax(*target, "--dry_run", *COMMAND).out
  assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_launcher_that_is_stopped_gives_the_machines_back(tmp_path, tools, number, code):
  tools(
    "gcloud",
    script='case "$4" in describe) echo ACTIVE;; esac\n'
    # Without the trap a shell that is interrupted while `touch` runs goes on to sleep.
    'trap "exit 130" INT\n'
    f'case "$*" in *"docker run"*) touch {tmp_path}/runs; exec sleep 60;; esac',
  )
  launcher = subprocess.Popen(
    [sys.executable, "-m", "launch.main", *TPU_VM, *COMMAND],
    env=os.environ | {"PYTHONPATH": str(pathlib.Path(launch.__file__).parents[1])},
    cwd=tmp_path,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    process_group=0,
  )
  deadline = time.monotonic() + 60
  while not (tmp_path / "runs").exists() and time.monotonic() < deadline:
    time.sleep(0.1)
  os.killpg(launcher.pid, number)  # As a terminal does.
  assert launcher.wait(60) == code
  assert "delete" in (tmp_path / "gcloud.words").read_text().splitlines()
