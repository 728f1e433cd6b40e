"""Size of a predicted response, and how far the truth may lie from it, without any perturbed cell."""

import dataclasses

import numpy as np

from data_scripts.cells.screens import CONTROL, Screen

# Where a screen has one batch: the mean over three public screens of what their batches of controls drift.
USUAL_DRIFT = 0.06


@dataclasses.dataclass
class ResponseSize:
    """Size of a response whose direction is known; no number in it was fitted to a response.

    sized = share x response / sqrt(1 + (|response| / reach)^2), reach = drift x |standard deviations of the genes|.

    - Control cells say which genes go together, not why. Of the three explanations of a correlation (the target acts on
      the gene, the gene on the target, something on both; Reichenbach 1956) one is an effect of the target: `share` is
      a third.
    - They say it within the range in which cells vary. How far pseudobulks move is seen among the controls themselves:
      `drift` is how far those of one batch lie from those of all, beyond sampling error. An extrapolated response
      levels off there, and the same number is how far true responses are expected to lie from predicted ones.

    Args:
        share (`float`, *optional*, defaults to 1/3): See above.
        drift (`float`, *optional*): Root mean square over genes, in units of their standard deviation among controls;
            measured among the controls of the screen when absent, 0.06 where they are of one batch.
    """

    share: float = 1 / 3
    drift: float | None = None

    def of(self, screen: Screen) -> "ResponseSize":
        """The same with `drift` measured where it is absent."""
        return self if self.drift is not None else dataclasses.replace(self, drift=batch_drift(screen))

    def __call__(self, response: np.ndarray, deviation: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
        """The response sized, `(V,)`; `deviation` of the genes among controls, `counted` those that make the length."""
        counted = slice(None) if counted is None else counted
        reach = max(self.drift * float(np.linalg.norm(deviation[counted])), 1e-12)
        return self.share * response / np.sqrt(1 + (float(np.linalg.norm(response[counted])) / reach) ** 2)


def batch_drift(screen: Screen, min_cells: int = 30) -> float:
    """Distance of pseudobulks of control cells of one batch from that of all controls, beyond sampling error.

    Returns:
        `float`: Root mean square over batches and genes, in units of the gene's standard deviation among controls.
    """
    controls = screen.cells_of(CONTROL)
    values, batch = screen.values[controls].astype(np.float64), screen.batch[controls]
    names, counts = np.unique(batch, return_counts=True)
    names, counts = names[counts >= min_cells], counts[counts >= min_cells]
    deviation = values.std(axis=0)
    varied = deviation > 1e-3
    if len(names) < 2 or not varied.any():
        return USUAL_DRIFT
    inside = np.isin(batch, names)
    centre = values[inside].mean(axis=0)
    squares = []
    for name, count in zip(names, counts):
        cells = values[batch == name]
        # A batch is part of the whole it is compared with.
        error = cells.var(axis=0, ddof=1) / count * (1 - count / inside.sum())
        squares.append(((cells.mean(axis=0) - centre) ** 2 - error)[varied] / deviation[varied] ** 2)
    return float(np.sqrt(max(np.mean(squares), 1e-6)))
