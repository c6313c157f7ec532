"""Flags of the targets that run on cloud TPUs."""

from absl import flags

from mfjax.cluster.tpu import TpuSlice, parse_slice

_TPU = flags.DEFINE_string("tpu", None, "Type and topology of a slice, such as v5e:4x4.")
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Number of such slices.", lower_bound=1)
_IMAGE = flags.DEFINE_string(
  "image", None, "Container image with mfjax in it; launch/targets/Dockerfile makes one."
)
ENV = flags.DEFINE_multi_string("env", [], "NAME=VALUE for the processes' environment.")


def tpu_slice() -> TpuSlice:
  """Return the slice that --tpu names.

  Raises:
    ValueError: the flag is missing, or there is no such type or topology.
  """
  if not _TPU.value:
    raise ValueError("--tpu is missing: give a type and topology, such as --tpu=v5e:4x4")
  return parse_slice(_TPU.value)


def image() -> str:
  """Return the image that --image names.

  Raises:
    ValueError: the flag is missing.
  """
  if not _IMAGE.value:
    raise ValueError("--image is missing: give a container image with mfjax in it")
  return str(_IMAGE.value)
