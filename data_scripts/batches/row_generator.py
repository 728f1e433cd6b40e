"""Random numbers that depend on the row they are drawn for and on nothing else."""

import numpy as np

# Constants of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))


class RowGenerator:
    """The part of `np.random.Generator` that perturbation sampling uses. What a row draws depends on the seed, the
    epoch and its position in the data set alone, not on its batch, the process that reads it or where training was
    resumed."""

    def __init__(self, seed: int, epoch: int, rows: np.ndarray):
        # Arrays, not scalars: on them 64-bit overflow, the arithmetic of the generator, passes without a warning.
        first, second = _mix(np.array([seed % 2**63, epoch], dtype=np.uint64) * _GAMMA + np.array([_GAMMA, _FIRST]))
        self._keys = _mix(np.asarray(rows, dtype=np.uint64) * _GAMMA + (first ^ second))
        self._draws = 0

    def random(self, size) -> np.ndarray:
        """Uniform numbers in [0, 1), shape `(B,)` or `(B, n)`."""
        shape = (size,) if isinstance(size, (int, np.integer)) else tuple(size)
        width = shape[1] if len(shape) == 2 else 1
        steps = (np.arange(1, width + 1, dtype=np.uint64) + np.uint64(self._draws)) * _GAMMA
        bits = _mix(self._keys[:, None] + steps[None, :])
        self._draws += width
        return ((bits >> np.uint64(11)).astype(np.float64) * 2**-53).reshape(shape)

    def integers(self, low: int, high: int, size) -> np.ndarray:
        """Integers from `low` to `high - 1`, int64."""
        return low + np.floor(self.random(size) * (high - low)).astype(np.int64)
