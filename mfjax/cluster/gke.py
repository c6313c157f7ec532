"""The JobSet that runs a command on TPU slices of a GKE cluster, and restarts it."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import yaml

from mfjax.cluster import exit_codes, requeue
from mfjax.cluster.tpu import TpuSlice

_CONTAINER = "mfjax"
_REPLICATED_JOB = "slice"
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
# Pods are called NAME-slice-SLICE-HOST-xxxxx, in at most 63 characters.
_LONGEST_NAME = 63 - len("-slice-999-9999-xxxxx")
_PORTS = {"coordinator": 8482, "tpu": 8471, "megascale": 8080}
_RESTARTS = "jobset.sigs.k8s.io/restart-attempt"
# $0 is the number of restarts so far. The JobSet controller itself starts again at once.
_START = f'if [ "$0" -gt 0 ]; then sleep {requeue.shell_pause("$0 - 1")}; fi; exec "$@"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeJob:
  """What a job asks of a GKE cluster with JobSet, and of Kueue if it names a queue.

  `buckets` are (bucket, path) pairs: Cloud Storage FUSE mounts them, as `service_account` may.
  Paths such as gs://bucket/runs need no mount. `environment` and `node_selector` are further
  variables and labels.
  """

  name: str
  slice: TpuSlice
  num_slices: int = 1
  image: str
  namespace: str = "default"
  queue: str | None = None
  service_account: str | None = None
  buckets: tuple[tuple[str, str], ...] = ()
  environment: tuple[tuple[str, str], ...] = ()
  node_selector: tuple[tuple[str, str], ...] = ()
  grace_seconds: int
  max_restarts: int

  def __post_init__(self) -> None:
    if not _LABEL.fullmatch(self.name) or len(self.name) > _LONGEST_NAME:
      raise ValueError(
        f"name={self.name!r}: Kubernetes takes lower-case letters, digits and -, beginning with a "
        f"letter, up to {_LONGEST_NAME} characters"
      )
    if not self.image or re.search(r"\s", self.image):
      raise ValueError(
        f"image={self.image!r}: give one that the nodes can pull, such as HOST/mfjax"
      )
    for bucket, path in self.buckets:
      if not bucket or not path.startswith("/"):
        raise ValueError(f"bucket {bucket!r} on {path!r}: give a bucket and an absolute path")


def first_job(job: GkeJob) -> str:
  """Return the name of the Kubernetes job of the first slice, in which process 0 is."""
  return f"{job.name}-{_REPLICATED_JOB}-0"


def to_yaml(manifest: dict[str, Any]) -> str:
  """Return a manifest as text."""
  return str(yaml.safe_dump(manifest, sort_keys=False, width=100))


def manifest(job: GkeJob, program: Sequence[str]) -> dict[str, Any]:
  """Return the JobSet that runs `program`, a list of words, on every host of every slice.

  GKE itself tells the processes about each other (TPU_WORKER_*, MEGASCALE_*), and JAX detects that.
  """
  metadata: dict[str, Any] = {
    "name": job.name,
    "namespace": job.namespace,
    # A slice's pods on one node pool, which is one slice, and no other pods there.
    "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
  }
  if job.queue:
    metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": metadata,
    "spec": {
      "failurePolicy": {
        "maxRestarts": job.max_restarts,
        # A job's reason when one of its pods ended with a code of its podFailurePolicy.
        "rules": [
          {
            "name": "unusable",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
          }
        ],
      },
      "replicatedJobs": [
        {
          "name": _REPLICATED_JOB,
          "replicas": job.num_slices,
          "template": {"spec": _job_spec(job, program)},
        }
      ],
    },
  }


def _job_spec(job: GkeJob, program: Sequence[str]) -> dict[str, Any]:
  template: dict[str, Any] = {"spec": _pod_spec(job, program)}
  if job.buckets:
    template["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
  return {
    "parallelism": job.slice.hosts,
    "completions": job.slice.hosts,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [
        {
          "action": "FailJob",
          "onExitCodes": {
            "containerName": _CONTAINER,
            "operator": "In",
            "values": [exit_codes.USAGE],
          },
        }
      ]
    },
    "template": template,
  }


def _pod_spec(job: GkeJob, program: Sequence[str]) -> dict[str, Any]:
  volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
  mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
  for index, (bucket, path) in enumerate(job.buckets):
    volumes.append({"name": f"bucket-{index}", "csi": _bucket(bucket)})
    mounts.append({"name": f"bucket-{index}", "mountPath": path})
  restart = {"fieldRef": {"fieldPath": f"metadata.annotations['{_RESTARTS}']"}}
  container = {
    "name": _CONTAINER,
    "image": job.image,
    "command": ["sh", "-c", _literal(_START), "$(MFJAX_RESTARTS)"],
    "args": [_literal(word) for word in program],
    "env": [
      {"name": "MFJAX_RESTARTS", "valueFrom": restart},
      *({"name": name, "value": _literal(value)} for name, value in job.environment),
    ],
    "ports": [
      {"name": name, "containerPort": port, "protocol": "TCP"} for name, port in _PORTS.items()
    ],
    "resources": {"limits": {"google.com/tpu": job.slice.chips_per_host}},
    "volumeMounts": mounts,
  }
  spec: dict[str, Any] = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": job.grace_seconds,
    "hostNetwork": True,
    "dnsPolicy": "ClusterFirstWithHostNet",
    "nodeSelector": {
      "cloud.google.com/gke-tpu-accelerator": job.slice.type.gke_accelerator,
      "cloud.google.com/gke-tpu-topology": job.slice.topology,
      **dict(job.node_selector),
    },
    "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
    "containers": [container],
    "volumes": volumes,
  }
  if job.service_account:
    spec["serviceAccountName"] = job.service_account
  return spec


def _bucket(name: str) -> dict[str, Any]:
  return {
    "driver": "gcsfuse.csi.storage.gke.io",
    "volumeAttributes": {
      "bucketName": name,
      "mountOptions": "implicit-dirs",
      "hostNetworkPodKSA": "true",  # On the host's network it would take the node's account.
    },
  }


def _literal(word: str) -> str:
  """Return `word` so that Kubernetes does not replace a $(NAME) in it."""
  return word.replace("$(", "$$(")
