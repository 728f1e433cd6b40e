"""The energy distance of two sets of cells by its definition, which the fast form is held against."""

import numpy as np
from scipy.spatial.distance import cdist


def energy_distance(first: np.ndarray, second: np.ndarray) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| between two sets of cells, Euclidean (Szekely and Rizzo 2013; as cell-eval)."""
    return 2 * cdist(first, second).mean() - cdist(first, first).mean() - cdist(second, second).mean()
