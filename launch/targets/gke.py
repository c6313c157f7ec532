"""Run a command on TPU slices of a GKE cluster, as a JobSet.

mfjax launch gke --tpu=v5e:4x4 --image=HOST/mfjax --max_restarts=10 -- train --config=quickstart ...

Applies the manifest with kubectl, to the cluster that kubectl is set up for. The cluster needs the
JobSet controller, and Kueue where --queue is given.
"""

import subprocess
from collections.abc import Sequence

from absl import flags

from launch.targets import _cloud, _remote
from launch.targets import flags as shared
from mfjax.cluster import gke

_NAMESPACE = flags.DEFINE_string("namespace", "default", "Namespace of the JobSet.")
_QUEUE = flags.DEFINE_string("queue", None, "Kueue's local queue that admits it.")
_SERVICE_ACCOUNT = flags.DEFINE_string(
  "service_account", None, "Kubernetes service account of the pods, which may use the buckets."
)
_BUCKET = flags.DEFINE_multi_string(
  "bucket", [], "BUCKET=/PATH to mount with Cloud Storage FUSE; gs:// paths need no mount."
)
_NODE_SELECTOR = flags.DEFINE_multi_string(
  "node_selector", [], "LABEL=VALUE that nodes must have, such as cloud.google.com/gke-spot=true."
)


def run(command: Sequence[str]) -> int:
  """Apply a JobSet that runs `command` and return kubectl's exit code: it goes on without us."""
  job = gke.GkeJob(
    name=_remote.JOB_NAME.value,
    slice=_cloud.tpu_slice(),
    num_slices=_cloud.NUM_SLICES.value,
    image=_cloud.image(),
    namespace=_NAMESPACE.value,
    queue=_QUEUE.value,
    service_account=_SERVICE_ACCOUNT.value,
    buckets=_remote.pairs("bucket", _BUCKET.value),
    environment=_remote.pairs("env", _cloud.ENV.value),
    node_selector=_remote.pairs("node_selector", _NODE_SELECTOR.value),
    grace_seconds=_remote.GRACE_SECONDS.value,
    max_restarts=shared.MAX_RESTARTS.value,
  )
  manifest = gke.to_yaml(gke.manifest(job, ["mfjax", *command]))
  _remote.show(manifest, printed=shared.DRY_RUN.value)
  if shared.DRY_RUN.value:
    return 0
  _remote.require("kubectl")
  apply = ["kubectl", "apply", "--filename=-"]
  code = subprocess.run(apply, input=manifest, text=True).returncode
  if code == 0:
    print(f"logs: kubectl logs --follow --namespace={job.namespace} job/{gke.first_job(job)}")
  return code
