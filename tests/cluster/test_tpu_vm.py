"""The gcloud commands for TPU VMs, and a cloud that answers them from memory."""

import dataclasses
import re
import shlex
import subprocess

import pytest

from mfjax.cluster import tpu, tpu_vm

PROGRAM = ["mfjax", "train", "--config=it's mine", "--workdir=gs://runs/$first"]


def job(tmp_path, **changes):
  base = tpu_vm.TpuVmJob(
    name="molm",
    slice=tpu.parse_slice("v5e:4x4"),
    image="europe-docker.pkg.dev/project/images/mfjax:1",
    zone="us-west4-a",
    grace_seconds=60,
    max_restarts=2,
    log_directory=str(tmp_path),
  )
  return dataclasses.replace(base, **changes)


def test_one_slice_is_ordered_by_its_type_and_chips(tmp_path):
  assert tpu_vm.create(job(tmp_path, project="p", options=("--spot",))) == shlex.split(
    "gcloud compute tpus queued-resources create molm --zone=us-west4-a --project=p "
    "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --node-id=molm --spot"
  )


def test_slices_in_three_dimensions_are_ordered_by_topology(tmp_path):
  slices = job(tmp_path, slice=tpu.parse_slice("v5p:4x4x8"), num_slices=2, runtime_version="v")
  assert tpu_vm.create(slices) == shlex.split(
    "gcloud compute tpus queued-resources create molm --zone=us-west4-a --type=v5p "
    "--topology=4x4x8 --runtime-version=v --node-count=2 --node-prefix=molm"
  )


def test_the_lines_are_what_runs_and_quote_what_the_user_gave(tmp_path):
  two = job(tmp_path, num_slices=2, environment=(("NOTE", "a b"),))
  lines = tpu_vm.lines(two, PROGRAM)
  ran = [shlex.split(line.removesuffix(" &"), comments=True) for line in lines]
  commands = [tpu_vm.create(two), tpu_vm.describe(two), *tpu_vm.install(two)]
  commands += [*tpu_vm.execute(two, PROGRAM, 0), tpu_vm.delete(two)]
  assert [words for words in ran if words[0] == "gcloud"] == commands
  assert sum(line.endswith(" &") for line in lines) == 2
  assert subprocess.run(["bash", "-n"], input="\n".join(lines), text=True).returncode == 0


def run_remotely(command, tmp_path):
  """Run what a worker gets, with programs in place of sudo that say what they are given."""
  [remote] = [word.removeprefix("--command=") for word in command if word.startswith("--command=")]
  (tmp_path / "sudo").write_text('#!/bin/sh\n[ "$2" = rm ] || printf "%s\\n" "$@"; exit 75\n')
  (tmp_path / "sudo").chmod(0o755)
  path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
  done = subprocess.run(["sh", "-c", remote], env=path, capture_output=True, text=True)
  return done.stdout.splitlines()


def test_a_worker_gets_the_words_unchanged_and_says_how_it_ended(tmp_path):
  [command] = tpu_vm.execute(job(tmp_path, environment=(("NOTE", "a b"),)), PROGRAM, 0)
  said = run_remotely(command, tmp_path)
  assert said[-len(PROGRAM) - 2 :] == [
    "europe-docker.pkg.dev/project/images/mfjax:1",
    *PROGRAM,
    "mfjax exit code 75",
  ]
  assert "--env=NOTE=a b" in said


class Cloud:
  """Answers gcloud's commands; `endings` has the workers' codes of each start, None for none."""

  def __init__(self, endings, states=("WAITING_FOR_RESOURCES", "ACTIVE"), later=()):
    self.endings, self.states, self.later = list(endings), list(states), list(later)
    self.verbs = []

  def __call__(self, commands):
    return [self.answer(list(command)) for command in commands]

  def answer(self, command):
    remote = next((word for word in command if word.startswith("--command=")), "")
    verb = command[4] if not remote else "run" if "docker run" in remote else "install"
    self.verbs.append(verb)
    if verb == "describe":
      return 0, self.states.pop(0) + "\n"
    if verb == "run":
      [directory] = [word.partition("=")[2] for word in command if "--output-directory" in word]
      for worker, code in enumerate(self.endings.pop(0)):
        ending = "" if code is None else f"mfjax exit code {code}\n"
        with open(f"{directory}/{worker}.log", "w") as log:
          log.write(f"step 1\n{ending}")
      self.states += self.later[:1] or ["ACTIVE"]
      self.later = self.later[1:]
    if verb == "create" and self.verbs.count("create") > 1:
      self.states = ["ACTIVE"]
    return 0, ""


def run(job, cloud):
  said, slept = [], []
  code = tpu_vm.run(job, PROGRAM, cloud, said.append, slept.append)
  return code, said, slept


def test_a_run_orders_installs_runs_and_gives_back(tmp_path):
  cloud = Cloud([(0, 0, 0, 0)])
  code, said, slept = run(job(tmp_path), cloud)
  assert code == 0
  assert cloud.verbs == ["create", "describe", "describe", "install", "run", "delete"]
  assert slept == [30]
  assert "molm is WAITING_FOR_RESOURCES" in said
  assert (tmp_path / "molm" / "attempt-0" / "molm" / "3.log").exists()


def test_a_preempted_run_is_started_again_on_the_same_machines(tmp_path):
  cloud = Cloud([(75,) * 4, (0,) * 4], states=["ACTIVE"])
  code, said, slept = run(job(tmp_path), cloud)
  assert code == 0
  assert cloud.verbs == ["create", "describe", "install", "run", "describe", "run", "delete"]
  assert slept == [10]
  assert "ended with code 75: restart 1 in 10 s" in said


def test_machines_that_were_taken_away_are_ordered_again(tmp_path):
  cloud = Cloud([(None,) * 4, (0,) * 4], states=["ACTIVE"], later=["SUSPENDED"])
  code, _, _ = run(job(tmp_path), cloud)
  assert code == 0
  assert cloud.verbs[3:] == [
    "run", "describe", "delete", "create", "describe", "install", "run", "delete",
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("endings", "code"),
  [
    ([(134, 2, 134, 134)], 2),  # A user's mistake: no other start.
    ([(1, 134, 134, 134)] * 3, 134),  # Two restarts, no more.
    ([(0, 0, 0)] * 3, 255),  # One of four workers did not say.
  ],
)
def test_failures_end_with_the_code_of_the_run(tmp_path, endings, code):
  cloud = Cloud(endings, states=["ACTIVE"])
  assert run(job(tmp_path), cloud)[0] == code
  assert cloud.verbs.count("run") == len(endings)
  assert cloud.verbs[-1] == "delete"


def test_an_order_that_fails_is_an_error_and_is_given_back(tmp_path):
  cloud = Cloud([], states=["PROVISIONING", "FAILED"])
  with pytest.raises(tpu_vm.TpuVmError, match="the order molm is FAILED"):
    run(job(tmp_path), cloud)
  assert cloud.verbs[-1] == "delete"


def test_a_command_that_fails_is_named(tmp_path):
  with pytest.raises(tpu_vm.TpuVmError, match=re.escape("code 3: gcloud compute tpus queued-res")):
    run(job(tmp_path), lambda commands: [(3, "") for _ in commands])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"slice": tpu.parse_slice("tpu7x:4x4x4")}, "tpu7x cannot be ordered as TPU VMs: .* gke"),
    ({"name": "Molm"}, "name='Molm': Google Cloud takes lower-case"),
    ({"zone": ""}, "zone is missing"),
    ({"options": ("spot",)}, "option 'spot': write it as gcloud has it"),
  ],
)
def test_what_the_service_refuses_is_refused_before(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    job(tmp_path, **changes)
