"""Manifests against the published models of JobSet and Kubernetes; JAX's GKE detection for real."""

import copy
import dataclasses
import json
import subprocess

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from mfjax.cluster import gke, tpu
from tests.cluster import network_lab, tiny_run

KUBERNETES = "1.33"
PROGRAM = ["mfjax", "train", "--config=quickstart", "--workdir=gs://runs/first"]
BASE = gke.GkeJob(
  name="molm",
  slice=tpu.parse_slice("v5e:4x4"),
  image="europe-docker.pkg.dev/project/images/mfjax:1",
  grace_seconds=120,
  max_restarts=10,
)
ONE = BASE
TWO = dataclasses.replace(
  BASE,
  slice=tpu.parse_slice("v5p:4x4x8"),
  num_slices=2,
  namespace="research",
  queue="tpus",
  service_account="trainer",
  buckets=(("corpus", "/data"), ("runs", "/runs")),
  environment=(("JAX_LOG_COMPILES", "1"),),
  node_selector=(("cloud.google.com/gke-spot", "true"),),
)
EIGHT = dataclasses.replace(BASE, slice=tpu.parse_slice("v6e:16x16"), num_slices=8, queue="tpus")
SHAPES = pytest.mark.parametrize("job", [ONE, TWO, EIGHT], ids=["one", "two", "eight"])


def check_jobset(manifest):
  """Raise unless JobSet's models hold all of the manifest; they pass over what they do not know."""
  found = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(manifest)).to_dict()
  assert json.loads(json.dumps(found, default=str)) == manifest


def check_pods(manifest):
  """Raise unless the job and its pod pass Kubernetes' own schema, unknown fields refused."""
  for replicated in manifest["spec"]["replicatedJobs"]:
    spec = replicated["template"]["spec"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
    kubernetes_validate.validate(pod | {"spec": spec["template"]["spec"]}, KUBERNETES, strict=True)


@SHAPES
def test_manifests_pass_the_models_of_jobset_and_kubernetes(job):
  manifest = gke.manifest(job, PROGRAM)
  assert yaml.safe_load(gke.to_yaml(manifest)) == manifest
  check_jobset(manifest)
  check_pods(manifest)


def broken(path, value):
  manifest = gke.manifest(TWO, PROGRAM)
  place = manifest
  for key in path[:-1]:
    place = place[key]
  place[path[-1]] = value
  return manifest


TEMPLATE = ("spec", "replicatedJobs", 0, "template", "spec")
POD = (*TEMPLATE, "template", "spec")


@pytest.mark.parametrize(
  ("path", "value"),
  [
    (("spec", "failurePolicy", "maxRestart"), 3),
    (("spec", "failurePolicy", "maxRestarts"), "3"),
    (("spec", "replicatedJobs", 0, "replica"), 2),
    ((*TEMPLATE, "backoffLimits"), 0),
    (("metadata", "label"), {}),
  ],
)
def test_broken_jobsets_are_found(path, value):
  with pytest.raises((AssertionError, ValueError)):
    check_jobset(broken(path, value))


@pytest.mark.parametrize(
  ("path", "value"),
  [
    ((*TEMPLATE, "paralelism"), 2),
    ((*POD, "nodeSelectors"), {}),
    ((*POD, "containers", 0, "image"), 3),
    ((*POD, "containers", 0, "resources", "limit"), {}),
    ((*POD, "terminationGracePeriodSeconds"), "2m"),
  ],
)
def test_broken_pods_are_found(path, value):
  with pytest.raises(kubernetes_validate.ValidationError):
    check_pods(broken(path, value))


@SHAPES
def test_there_is_a_pod_for_each_host_of_each_slice(job):
  spec = gke.manifest(job, PROGRAM)["spec"]
  [replicated] = spec["replicatedJobs"]
  work = replicated["template"]["spec"]
  pod = work["template"]["spec"]
  assert replicated["replicas"] == job.num_slices
  assert work["parallelism"] == work["completions"] == job.slice.hosts
  assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": job.slice.chips_per_host}
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == job.slice.topology
  assert spec["failurePolicy"]["maxRestarts"] == 10
  assert pod["terminationGracePeriodSeconds"] == 120


def test_optional_parts_are_in_the_manifest():
  manifest = gke.manifest(TWO, PROGRAM)
  pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
  container = pod["spec"]["containers"][0]
  assert manifest["metadata"]["namespace"] == "research"
  assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
  assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
  assert pod["spec"]["serviceAccountName"] == "trainer"
  assert pod["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert {"name": "JAX_LOG_COMPILES", "value": "1"} in container["env"]
  mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
  buckets = {
    mounts[volume["name"]]: volume["csi"]["volumeAttributes"]["bucketName"]
    for volume in pod["spec"]["volumes"]
    if "csi" in volume
  }
  assert buckets == {"/data": "corpus", "/runs": "runs"}


def test_only_exit_code_2_ends_the_jobset():
  spec = gke.manifest(ONE, PROGRAM)["spec"]
  [rule] = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob"
  assert rule["onExitCodes"]["values"] == [2]
  [answer] = spec["failurePolicy"]["rules"]
  assert answer["action"] == "FailJobSet"
  assert answer["onJobFailureReasons"] == ["PodFailurePolicy"]  # What FailJob gives a job.


def kubernetes_expands(word):
  """Return `word` after Kubernetes' expansion of variables, as its documentation has it."""
  return word.replace("$$(", "\0").replace("$(MFJAX_RESTARTS)", "3").replace("\0", "$(")


def test_the_container_pauses_before_a_restart_and_passes_words_on_unchanged(tmp_path):
  words = ["a b", "$HOME", "$(HOME)", "it's", '"', "*"]
  pod = gke.manifest(ONE, ["printf", r"%s\n", *words])["spec"]["replicatedJobs"][0]["template"][
    "spec"
  ]["template"]["spec"]
  container = pod["containers"][0]
  (tmp_path / "sleep").write_text('#!/bin/sh\necho "slept $1"\n')
  (tmp_path / "sleep").chmod(0o755)
  done = subprocess.run(
    [kubernetes_expands(word) for word in (*container["command"], *container["args"])],
    env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    capture_output=True,
    text=True,
  )
  assert done.stdout.splitlines() == ["slept 40", *words]
  assert done.stderr == ""


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"name": "Molm"}, "name='Molm': Kubernetes takes lower-case"),
    ({"name": "m" * 43}, "up to 42 characters"),
    ({"image": ""}, "image='': give one"),
    ({"buckets": (("corpus", "data"),)}, "bucket 'corpus' on 'data': give .* absolute path"),
  ],
)
def test_what_kubernetes_refuses_is_refused_before(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(BASE, **changes)


MISSING = network_lab.missing()


@pytest.fixture(scope="module")
def hosts():
  """Four hosts of one network."""
  with network_lab.network(4) as made:
    yield made


def start_as_gke(hosts, words):
  """Start `words` on each host with the variables of a JobSet of two slices of two hosts each."""
  started = []
  for index, host in enumerate(hosts):
    slice_index, worker = divmod(index, 2)
    environment = tiny_run.environment(
      JAX_FORCE_TPU_INIT="1",  # JAX takes this for a TPU machine, and its detection for GKE's.
      TPU_WORKER_ID=str(worker),
      TPU_WORKER_HOSTNAMES=",".join(h.name for h in hosts[2 * slice_index :][:2]),
      MEGASCALE_NUM_SLICES="2",
      MEGASCALE_SLICE_ID=str(slice_index),
      MEGASCALE_COORDINATOR_ADDRESS=f"{hosts[0].name}:8080",
    )
    started.append(host.start(words, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
  outputs = [process.communicate(timeout=600)[0] for process in started]
  assert [process.returncode for process in started] == [0] * len(hosts), "\n".join(outputs)
  return outputs


@pytest.mark.cluster
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_hosts_of_two_slices_find_each_other(hosts):
  outputs = start_as_gke(hosts, tiny_run.WHO_AM_I)
  assert [tiny_run.said(output) for output in outputs] == [[line] for line in tiny_run.SAID]


@pytest.mark.cluster
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_run_on_two_slices_has_the_losses_of_any_other_start(hosts, tmp_path):
  outputs = start_as_gke(hosts, tiny_run.mfjax(*tiny_run.train(tmp_path / "run")))
  assert "host3" in outputs[3]
  assert tiny_run.losses(tmp_path / "run") == tiny_run.undisturbed()
