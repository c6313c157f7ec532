"""Who computes an operation. Free of JAX, so that a configuration can name it cheaply."""

import enum


class Implementation(enum.Enum):
  """Implementation of an operation; AUTO is resolved once, from the mesh's platform."""

  AUTO = "auto"
  REFERENCE = "reference"
  XLA = "xla"
  PALLAS_TPU = "pallas_tpu"
  PALLAS_GPU = "pallas_gpu"
  INTERPRET = "interpret"


def check_available(
  operation: str, implementation: Implementation, available: tuple[Implementation, ...]
) -> None:
  """Raise NotImplementedError, naming what can, unless `implementation` is available."""
  if implementation not in available:
    names = ", ".join(choice.value for choice in available)
    raise NotImplementedError(
      f"{operation} has no {implementation.value!r} implementation: use {names}"
    )
