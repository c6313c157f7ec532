"""Shuffled order without a table: the document at a position is computed from the position."""

import hashlib

import numpy as np

_ROUNDS = 6


def permute(positions: np.ndarray, size: int, key: tuple[int | str, ...]) -> np.ndarray:
  """Return where a permutation of range(size), chosen by `key`, sends each position.

  A Feistel network over the bits of size - 1, walked along its cycle until below `size`
  (Black and Rogaway, 'Ciphers with arbitrary finite domains', 2002): memory does not grow with
  the number of documents, and no library's random stream can change it.

  Args:
    positions: int64 values in [0, size).
  """
  digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
  round_keys = np.frombuffer(digest, "<u8")
  bits = max(size - 1, 1).bit_length()
  values = _feistel(positions.astype(np.uint64), bits, round_keys)
  while (outside := values >= size).any():
    values[outside] = _feistel(values[outside], bits, round_keys)
  return values.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, round_keys: np.ndarray) -> np.ndarray:
  low_bits = np.uint64(bits // 2)
  low_mask = np.uint64((1 << bits // 2) - 1)
  high_mask = np.uint64((1 << bits - bits // 2) - 1)
  low, high = values & low_mask, values >> low_bits
  for number, key in enumerate(round_keys):
    if number % 2:
      low = low ^ (_mix(high, key) & low_mask)
    else:
      high = high ^ (_mix(low, key) & high_mask)
  return high << low_bits | low


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
  """Scramble 64 bits (the finaliser of splitmix64, Steele et al. 2014)."""
  values = values ^ key
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))
