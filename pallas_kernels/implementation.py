"""Who computes an operation. Free of JAX, so that a configuration can name it cheaply."""

import enum
import logging
from collections.abc import Callable


class Implementation(enum.Enum):
  """Implementation of an operation; AUTO is resolved once, from the mesh's platform.

  `interpret` is the TPU kernel, interpreted: for tests, on any platform.
  """

  AUTO = "auto"
  REFERENCE = "reference"
  XLA = "xla"
  PALLAS_TPU = "pallas_tpu"
  PALLAS_GPU = "pallas_gpu"
  INTERPRET = "interpret"


_KERNEL_OF = {"tpu": Implementation.PALLAS_TPU, "gpu": Implementation.PALLAS_GPU}


def resolve(
  operation: str,
  implementation: Implementation,
  platform: str,
  probe: Callable[[Implementation], object],
) -> Implementation:
  """Return what AUTO means for an operation on a platform, or the explicit choice, checked.

  AUTO is the platform's kernel; where `probe` says that it cannot, XLA, and a warning says why.

  Args:
    operation: its name, for messages.
    implementation: the choice.
    platform: 'cpu', 'gpu' or 'tpu'.
    probe: traces the operation with an implementation at the sizes that it will be called with;
      raises NotImplementedError if it cannot do them.

  Raises:
    NotImplementedError: an explicit choice that cannot run on the platform or do the sizes.
  """
  kernel = _KERNEL_OF.get(platform)
  if implementation is Implementation.AUTO:
    if kernel is None:
      return Implementation.XLA
    try:
      probe(kernel)
    except NotImplementedError as error:
      logging.getLogger(__name__).warning("%s: xla, since %s", operation, error)
      return Implementation.XLA
    return kernel
  if implementation in _KERNEL_OF.values() and implementation is not kernel:
    names = ", ".join(i.value for i in (Implementation.AUTO, Implementation.XLA))
    raise NotImplementedError(
      f"{operation} by {implementation.value!r} does not run on {platform!r}: use {names}"
    )
  probe(implementation)
  return implementation


def not_callable(operation: str, implementation: Implementation) -> NotImplementedError:
  """Return the error of an api called with a choice that was not resolved."""
  names = ", ".join(i.value for i in Implementation if i is not Implementation.AUTO)
  return NotImplementedError(
    f"{operation} has no {implementation.value!r} implementation: use {names}"
  )
