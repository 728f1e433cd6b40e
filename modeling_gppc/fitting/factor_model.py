"""Factor analysis of cells with unmeasured genes, the coupling of paired cells, and the exact predictor they imply."""

import dataclasses
from collections.abc import Iterator

import numpy as np

RANKS = (3, 5, 10, 20, 40)  # numbers of factors that are compared where none is stated
BLOCK_SIZE = 4096  # cells taken at once from an array
LEAST_NOISE = 1e-2  # share of a gene's variance that is left to its noise
COUPLING_ITERATIONS = 200
TOLERANCE = 1e-6  # largest change of an entry of the coupling at which iterations stop


@dataclasses.dataclass
class Cells:
    """Normalised values of cells `(n, V)`, of which unmeasured ones are not read, and the measured genes of each: its
    row of `panels` `(P, V)`."""

    values: np.ndarray
    panel_index: np.ndarray
    panels: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def blocks(self) -> Iterator["Cells"]:
        """The cells, some at a time."""
        for start in range(0, len(self), BLOCK_SIZE):
            rows = slice(start, start + BLOCK_SIZE)
            yield Cells(self.values[rows], self.panel_index[rows], self.panels)

    def by_panel(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Each panel that occurs, which cells have it, bool of shape `(n,)`, and their measured values."""
        for panel in np.unique(self.panel_index):
            members = self.panel_index == panel
            # Most often all cells measure all genes: nothing is copied then.
            rows = self.values if members.all() else self.values[members]
            yield panel, members, rows if self.panels[panel].all() else rows[:, self.panels[panel]]


@dataclasses.dataclass
class FactorModel:
    """x_j = mean_j + loadings_j z + e_j with z ~ N(0, I) and e_j ~ N(0, noise_j). Columns of `loadings` `(V, r)` are
    in order of falling signal, zero for genes measured nowhere."""

    mean: np.ndarray
    loadings: np.ndarray
    noise: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """Dense covariance of the genes, shape `(V, V)`; for few genes."""
        return self.loadings @ self.loadings.T + np.diag(self.noise)


def posterior_by_panel(model: FactorModel, panels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior covariance of z and the information L' D^-1 L that each panel carries, both of shape `(P, r, r)`."""
    weighted = model.loadings / model.noise[:, None]
    rank = model.loadings.shape[1]
    information = np.stack([(model.loadings[row].T @ weighted[row]) for row in panels]).reshape(-1, rank, rank)
    return np.linalg.inv(np.eye(rank) + information), information


def factor_information(model: FactorModel, cells: Cells) -> np.ndarray:
    """The vectors h = L' D^-1 (x - mean) over the measured genes, shape `(n, r)`."""
    weighted = model.loadings / model.noise[:, None]
    output = np.empty((len(cells), model.loadings.shape[1]))
    for panel, members, rows in cells.by_panel():
        measured = cells.panels[panel]
        output[members] = (rows - model.mean[measured]) @ weighted[measured]
    return output


def factor_posterior_mean(model: FactorModel, cells: Cells) -> np.ndarray:
    """E[z | measured values] of each cell, shape `(n, r)`."""
    covariance, _ = posterior_by_panel(model, cells.panels)
    output = factor_information(model, cells)
    for panel in np.unique(cells.panel_index):
        members = cells.panel_index == panel
        output[members] = output[members] @ covariance[panel]
    return output


def fit_factor_model(cells: Cells, n_factors: int, n_iterations: int = 30, seed: int = 0) -> FactorModel:
    """Maximum-likelihood factor analysis by parameter-expanded EM (Liu, Rubin and Wu, Biometrika 1998).

    Genes that a cell's panel does not measure are missing, not zero: its posterior uses the panel's own precision, and
    the regression of a gene uses the second moments of the cells that measure it. Costs n V r a pass over the cells,
    of which there are `n_iterations`. `cells` may also be what has `panels` and hands out `blocks` of cells as often
    as asked; `seed` chooses the cells of the starting point. The factors of the result, in float64, are orthogonal
    in the noise-weighted metric and signed. Raises `ValueError` for fewer than two cells or an impossible `n_factors`.
    """
    n_genes = cells.panels.shape[1]
    if not 1 <= n_factors < n_genes:
        raise ValueError(f"`n_factors` is {n_factors}; wanted between 1 and {n_genes - 1}, less than the genes.")
    moments, sample = _first_pass(cells, n_factors, seed)
    n_cells = int(moments.counts.sum())
    if n_cells < 2:
        raise ValueError(f"`values` holds {n_cells} cells; a factor model needs at least 2.")
    loadings, variance = _starting_loadings(sample, moments.variance, n_factors), moments.variance
    noise = np.maximum(variance - (loadings**2).sum(axis=1), 0.1 * variance)
    model = FactorModel(moments.center.copy(), loadings, np.maximum(noise, moments.least_noise))
    for _ in range(n_iterations):
        _em_step(model, cells, moments)
    return _canonical(model, cells.panels[moments.counts > 0].any(axis=0))


def choose_rank(values: np.ndarray, seed: int = 0) -> int:
    """The one of [`RANKS`] with the highest likelihood of held-out cells, three fifths of them in turn; for few genes,
    all measured."""
    order = np.random.default_rng(seed).permutation(len(values))
    panel = np.ones((1, values.shape[1]), dtype=bool)
    usable = [rank for rank in RANKS if rank < min(values.shape[1] // 3, len(values) // 2)] or [1]
    likelihoods = np.zeros(len(usable))
    for part in range(3):
        held_out, rest = values[order[part::5]], values[np.delete(order, np.s_[part::5])]
        for index, rank in enumerate(usable):
            model = fit_factor_model(Cells(rest, np.zeros(len(rest), int), panel), rank, 20, seed)
            covariance, centred = model.covariance, held_out - model.mean
            distance = np.einsum("nv,nv->", centred, np.linalg.solve(covariance, centred.T).T) / len(held_out)
            likelihoods[index] -= distance + np.linalg.slogdet(covariance)[1]
    return usable[int(np.argmax(likelihoods))]


@dataclasses.dataclass
class _Moments:
    """Cells of every panel `(P,)`; mean, variance and number of cells of every gene `(V,)`."""

    counts: np.ndarray
    center: np.ndarray
    variance: np.ndarray
    n_measured: np.ndarray

    @property
    def least_noise(self) -> np.ndarray:
        return np.maximum(LEAST_NOISE * self.variance, 1e-6)


def _first_pass(cells: Cells, n_factors: int, seed: int) -> tuple[_Moments, np.ndarray]:
    """Moments of the genes, and some centred cells for the starting point, zero where not measured."""
    n_panels, n_genes = cells.panels.shape
    wanted = int(min(max(1_000, 4 * n_factors), max(2 * n_factors, 4e7 // n_genes)))
    counts = np.zeros(n_panels, dtype=np.int64)
    total, total_squared = np.zeros(n_genes), np.zeros(n_genes)
    generator = np.random.default_rng(seed)
    kept, kept_panels, keys = np.zeros((0, n_genes)), np.zeros(0, dtype=int), np.zeros(0)
    for block in cells.blocks():
        keys = np.append(keys, generator.random(len(block)))
        kept = np.concatenate([kept, block.values]) if len(kept) else block.values
        kept_panels = np.append(kept_panels, block.panel_index)
        if len(keys) > 2 * wanted:  # keep the cells with the smallest keys: a uniform sample
            chosen = np.sort(np.argpartition(keys, wanted)[:wanted])
            kept, kept_panels, keys = kept[chosen], kept_panels[chosen], keys[chosen]
        counts += np.bincount(block.panel_index, minlength=n_panels)
        for panel, _, rows in block.by_panel():
            rows = np.asarray(rows, dtype=np.float64)
            total[cells.panels[panel]] += rows.sum(axis=0)
            total_squared[cells.panels[panel]] += (rows**2).sum(axis=0)
    n_measured = counts @ cells.panels.astype(np.int64)
    center = total / np.maximum(n_measured, 1)
    variance = np.maximum(total_squared / np.maximum(n_measured, 1) - center**2, 0.0)
    sample = np.where(cells.panels[kept_panels[:wanted]], kept[:wanted] - center, 0.0)
    return _Moments(counts, center, variance, n_measured), sample


def _starting_loadings(sample: np.ndarray, variance: np.ndarray, n_factors: int) -> np.ndarray:
    """Leading principal axes of some cells, unmeasured values at the mean, scaled to half of what they explain."""
    gram = sample @ sample.T
    eigenvalues, vectors = np.linalg.eigh(gram)
    order = np.argsort(eigenvalues)[::-1][:n_factors]
    loadings = np.zeros((sample.shape[1], n_factors))
    positive = order[eigenvalues[order] > 1e-9 * max(eigenvalues.max(initial=0.0), 1e-300)]
    loadings[:, : len(positive)] = sample.T @ vectors[:, positive] / np.sqrt(len(sample))
    if len(positive) < n_factors:  # fewer independent cells than factors: the rest starts small and random
        rest = n_factors - len(positive)
        noise = np.random.default_rng(0).standard_normal((sample.shape[1], rest))
        loadings[:, len(positive) :] = 0.01 * np.sqrt(variance)[:, None] * noise
    return loadings * np.sqrt(0.5)


def _em_step(model: FactorModel, cells: Cells, moments: _Moments) -> None:
    """One pass: expectation of z a cell, regression of every gene on z, expansion of z absorbed. Updates in place."""
    rank, center = model.loadings.shape[1], moments.center
    posterior, _ = posterior_by_panel(model, cells.panels)
    second = np.zeros((len(cells.panels), rank + 1, rank + 1))  # sums of [z, 1][z, 1]' over the cells of each panel
    cross = np.zeros((len(center), rank + 1))  # sums of (x - center) [z, 1]' over the cells measuring each gene
    weighted = model.loadings / model.noise[:, None]
    offset = model.mean - center
    for block in cells.blocks():
        for panel, _, rows in block.by_panel():
            measured = cells.panels[panel]
            dtype = np.result_type(rows.dtype, np.float32)
            rows = rows - center[measured].astype(dtype)
            weights = weighted[measured]
            information = (rows @ weights.astype(dtype)).astype(np.float64) - offset[measured] @ weights
            extended = np.concatenate([information @ posterior[panel], np.ones((len(rows), 1))], axis=1)
            second[panel] += extended.T @ extended
            cross[measured] += rows.T @ extended.astype(dtype)
    second[:, :rank, :rank] += moments.counts[:, None, None] * posterior
    # Genes that the same panels measure are regressed on the same second moments.
    patterns, pattern_of_gene = np.unique(cells.panels, axis=1, return_inverse=True)
    for index, pattern in enumerate(patterns.T):
        genes = np.flatnonzero(pattern_of_gene.ravel() == index)
        if not moments.counts[pattern].any():
            model.loadings[genes], model.mean[genes], model.noise[genes] = 0.0, center[genes], 1.0
            continue
        regressors = second[pattern].sum(axis=0)
        # A ridge far below one cell's worth keeps the system solvable when cells are fewer than factors.
        regressors = regressors + 1e-8 * np.trace(regressors) / (rank + 1) * np.eye(rank + 1)
        weights = np.linalg.solve(regressors, cross[genes].T).T
        residual = moments.variance[genes] - (weights * cross[genes]).sum(axis=1) / moments.n_measured[genes]
        model.noise[genes] = np.maximum(residual, moments.least_noise[genes])
        model.loadings[genes], model.mean[genes] = weights[:, :rank], center[genes] + weights[:, rank]
    # The expanded model lets z have any mean and covariance; folding them back speeds up EM several times.
    total = second.sum(axis=0)
    z_mean = total[:rank, rank] / total[rank, rank]
    z_covariance = total[:rank, :rank] / total[rank, rank] - np.outer(z_mean, z_mean)
    model.mean += model.loadings @ z_mean
    model.loadings = model.loadings @ np.linalg.cholesky(z_covariance)


def _canonical(model: FactorModel, measured: np.ndarray) -> FactorModel:
    """Rotates the factors: L' D^-1 L diagonal and falling, the largest loading of each factor positive."""
    model.loadings[~measured], model.noise[~measured] = 0.0, 1.0
    _, vectors = np.linalg.eigh(model.loadings.T @ (model.loadings / model.noise[:, None]))
    loadings = model.loadings @ vectors[:, ::-1]
    signs = np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(loadings.shape[1])])
    model.loadings = loadings * np.where(signs == 0, 1.0, signs)
    return model


def fit_pair_coupling(model: FactorModel, source: Cells, target: Cells) -> np.ndarray:
    """Covariance of the true factors of two paired cells, free of the attenuation that posterior means suffer.

    EM over the pairs with joint prior N(0, K) of (z_A, z_B); K is rescaled so that either cell has unit covariance.
    Needs one pass over the cells, after which only sums over pairs of panels are kept. Returns C = Cov(z_target,
    z_source) `(r, r)`, singular values below 1, so that z_B | z_A ~ N(C z_A, I - C C').
    """
    rank = model.loadings.shape[1]
    _, information = posterior_by_panel(model, source.panels)
    h = np.concatenate([factor_information(model, source), factor_information(model, target)], axis=1)
    both = np.stack([source.panel_index, target.panel_index], axis=1)
    groups, group_of_pair = np.unique(both, axis=0, return_inverse=True)
    members = [np.flatnonzero(group_of_pair.ravel() == group) for group in range(len(groups))]
    sums = [h[rows].T @ h[rows] for rows in members]
    joint = np.eye(2 * rank)
    for _ in range(COUPLING_ITERATIONS):
        precision, second = np.linalg.inv(joint), np.zeros_like(joint)
        for (a, b), rows, total in zip(groups, members, sums):
            likelihood = np.zeros_like(joint)
            likelihood[:rank, :rank], likelihood[rank:, rank:] = information[a], information[b]
            covariance = np.linalg.inv(precision + likelihood)
            # E[z] = covariance h.
            second += covariance @ total @ covariance.T + len(rows) * covariance
        second /= len(h)
        scale_a, scale_b = _inverse_root(second[:rank, :rank]), _inverse_root(second[rank:, rank:])
        matrix = scale_b @ second[rank:, :rank] @ scale_a
        left, singular, right = np.linalg.svd(matrix)
        matrix = (left * np.minimum(singular, 1.0 - 1e-9)) @ right
        change = np.abs(matrix - joint[rank:, :rank]).max()
        joint = np.block([[np.eye(rank), matrix.T], [matrix, np.eye(rank)]])
        if change < TOLERANCE:
            break
    return matrix


def _inverse_root(matrix: np.ndarray) -> np.ndarray:
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return (vectors / np.sqrt(np.maximum(eigenvalues, 1e-12))) @ vectors.T


def predict_factor_model(
    model: FactorModel,
    coupling: np.ndarray,
    source: Cells,
    imposed_ids: np.ndarray,
    imposed_values: np.ndarray,
    imposed_mask: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact mean and variance of every gene of the target, `(n, V)`, given source cells and imposed target values.

    z_B | A ~ N(C E[z_A|A], I - C C' + C Var[z_A|A] C'), conditioned on b_S = mean_S + L_S z_B + e_S. C is the coupling
    of [`fit_pair_coupling`]; `imposed_ids`, `imposed_values` (*in the target*: source + change) and `imposed_mask`
    (whether the entry is real) have shape `(n, K)`, K may be 0. The variance includes the gene's noise.
    """
    dtype = np.result_type(source.values.dtype, np.float32)
    posterior, _ = posterior_by_panel(model, source.panels)
    z = factor_posterior_mean(model, source) @ coupling.T
    prior = np.eye(len(coupling)) - coupling @ coupling.T + coupling @ posterior @ coupling.T
    mask = np.asarray(imposed_mask, dtype=bool)
    ids = np.where(mask, imposed_ids, 0)
    loadings = model.loadings[ids] * mask[..., None]  # (n, K, r)
    expected = model.mean[ids] + np.einsum("nkr,nr->nk", loadings, z)
    residual = np.where(mask, np.asarray(imposed_values, dtype=np.float64) - expected, 0.0)
    projected = loadings @ prior[source.panel_index]  # (n, K, r)
    covariance = projected @ loadings.transpose(0, 2, 1)
    diagonal = np.arange(ids.shape[1])
    covariance[:, diagonal, diagonal] += np.where(mask, model.noise[ids], 1.0)
    lower = np.linalg.cholesky(covariance)
    half = np.linalg.solve(lower, projected)  # (n, K, r)
    whitened = np.linalg.solve(lower, residual[..., None])[..., 0]
    z = z + np.einsum("nkr,nk->nr", half, whitened)
    mean = (model.mean + z @ model.loadings.T).astype(dtype)
    variance = np.einsum("vr,prs,vs->pv", model.loadings, prior, model.loadings, optimize=True) + model.noise
    variance = variance[source.panel_index]
    for position in range(ids.shape[1]):
        variance -= (half[:, position] @ model.loadings.T) ** 2
    return mean, variance.astype(dtype)
