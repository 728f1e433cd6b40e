"""Factor analysis of cells with unmeasured genes, the coupling of paired cells, and the exact predictor they imply."""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

Blocks = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
RANKS = (3, 5, 10, 20, 40)  # numbers of factors that are compared where none is stated


@dataclasses.dataclass
class FactorModel:
    """x_j = mean_j + loadings_j z + e_j with z ~ N(0, I) and e_j ~ N(0, noise_j).

    Args:
        mean (`np.ndarray`): Shape `(V,)`.
        loadings (`np.ndarray`): Shape `(V, r)`, columns in order of falling signal, zero for genes measured nowhere.
        noise (`np.ndarray`): Variance of each gene that the factors do not explain, shape `(V,)`.
        log_likelihood (`list[float]`, *optional*): Per cell, before each iteration of the fit.
    """

    mean: np.ndarray
    loadings: np.ndarray
    noise: np.ndarray
    log_likelihood: list[float] = dataclasses.field(default_factory=list)

    @property
    def covariance(self) -> np.ndarray:
        """Dense covariance of the genes, shape `(V, V)`; for few genes."""
        return self.loadings @ self.loadings.T + np.diag(self.noise)


@dataclasses.dataclass
class PairCoupling:
    """Factors of the target cell given those of the source: z_B | z_A ~ N(matrix z_A + shift, I - matrix matrix').

    Args:
        matrix (`np.ndarray`): Cov(z_target, z_source), shape `(r, r)`, singular values at most 1.
        shift (`np.ndarray`): Shape `(r,)`.
    """

    matrix: np.ndarray
    shift: np.ndarray


def posterior_by_panel(model: FactorModel, panels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior covariance of z and the information L' D^-1 L that each panel carries, both of shape `(P, r, r)`."""
    weighted = model.loadings / model.noise[:, None]
    rank = model.loadings.shape[1]
    information = np.stack([(model.loadings[row].T @ weighted[row]) for row in panels]).reshape(-1, rank, rank)
    return np.linalg.inv(np.eye(rank) + information), information


def factor_information(
    model: FactorModel, values: np.ndarray, panel_index: np.ndarray, panels: np.ndarray
) -> np.ndarray:
    """The vectors h = L' D^-1 (x - mean) over the measured genes, shape `(n, r)`; unmeasured values are not read."""
    weighted = model.loadings / model.noise[:, None]
    output = np.empty((len(values), model.loadings.shape[1]))
    for panel in np.unique(panel_index):
        rows = np.flatnonzero(panel_index == panel)
        measured = panels[panel]
        if measured.all():
            output[rows] = (values[rows] - model.mean) @ weighted
        else:
            output[rows] = (values[np.ix_(rows, measured)] - model.mean[measured]) @ weighted[measured]
    return output


def factor_posterior_mean(
    model: FactorModel, values: np.ndarray, panel_index: np.ndarray, panels: np.ndarray
) -> np.ndarray:
    """E[z | measured values] of each cell, shape `(n, r)`."""
    covariance, _ = posterior_by_panel(model, panels)
    output = factor_information(model, values, panel_index, panels)
    for panel in np.unique(panel_index):
        rows = panel_index == panel
        output[rows] = output[rows] @ covariance[panel]
    return output


def fit_factor_model(
    values: np.ndarray | Blocks,
    panel_index: np.ndarray | None,
    panels: np.ndarray,
    n_factors: int,
    n_iterations: int = 30,
    seed: int = 0,
    noise_floor: float = 1e-2,
    block_size: int = 4096,
) -> FactorModel:
    """Maximum-likelihood factor analysis by parameter-expanded EM (Liu, Rubin and Wu, Biometrika 1998).

    Genes that a cell's panel does not measure are missing, not zero: its posterior uses the panel's own precision, and
    the regression of a gene uses the second moments of the cells that measure it. Costs n V r a pass.

    Args:
        values (`np.ndarray` or callable): Normalised values, shape `(n, V)`; or a function that returns a fresh
            iterator of `(values, panel_index)` blocks, for cells that do not fit in memory.
        panel_index (`np.ndarray`, *optional*): Row of `panels` for each cell; absent with a function.
        panels (`np.ndarray` of bool): Measured-gene sets, shape `(P, V)`.
        n_factors (`int`): r, at least 1 and less than V.
        n_iterations (`int`, *optional*, defaults to 30): Passes over the cells.
        seed (`int`, *optional*, defaults to 0): Chooses the cells of the starting point.
        noise_floor (`float`, *optional*, defaults to 0.01): Least share of a gene's variance left to its noise.
        block_size (`int`, *optional*, defaults to 4096): Cells taken at once from an array.

    Returns:
        `FactorModel` in float64, its factors orthogonal in the noise-weighted metric and signed.

    Raises:
        ValueError: For shapes that disagree, fewer than two cells or an impossible `n_factors`.
    """
    panels = np.asarray(panels, dtype=bool)
    if not 1 <= n_factors < panels.shape[1]:
        raise ValueError(
            f"`n_factors` is {n_factors}; wanted between 1 and {panels.shape[1] - 1}, less than the genes."
        )
    if callable(values):
        blocks = values
    else:
        if values.ndim != 2 or values.shape[1] != panels.shape[1] or len(values) != len(panel_index):
            raise ValueError(
                f"`values` has shape {values.shape} and `panel_index` {len(panel_index)} entries; wanted "
                f"(n, {panels.shape[1]}) and n, the width of `panels`."
            )
        panel_index = np.asarray(panel_index)

        def blocks():
            for start in range(0, len(values), block_size):
                yield values[start : start + block_size], panel_index[start : start + block_size]

    center, variance, counts, sample = _first_pass(blocks, panels, n_factors, seed)
    n_cells = int(counts.sum())
    if n_cells < 2:
        raise ValueError(f"`values` holds {n_cells} cells; a factor model needs at least 2.")
    floor = np.maximum(noise_floor * variance, 1e-6)
    measured_anywhere = panels[counts > 0].any(axis=0)
    loadings = _starting_loadings(sample, variance, n_factors)
    model = FactorModel(
        mean=center.copy(),
        loadings=loadings,
        noise=np.maximum(np.maximum(variance - (loadings**2).sum(axis=1), 0.1 * variance), floor),
    )
    patterns, pattern_of_gene = np.unique(panels, axis=1, return_inverse=True)
    pattern_of_gene = pattern_of_gene.ravel()
    for _ in range(n_iterations):
        likelihood = _em_step(model, blocks, panels, counts, center, variance, floor, patterns, pattern_of_gene)
        model.log_likelihood.append(likelihood)
    return _canonical(model, measured_anywhere)


def choose_rank(values: np.ndarray, seed: int = 0, ranks=RANKS, n_parts: int = 3) -> int:
    """Number of factors with the highest likelihood of held-out cells: `n_parts` fifths of them in turn.

    Args:
        values (`np.ndarray`): Values of the cells, all genes measured, shape `(n_cells, V)`; for few genes.
        seed (`int`, *optional*, defaults to 0): Of the division and the fits.
        ranks (`Sequence[int]`, *optional*): What is compared; numbers too large for the cells are left out.
        n_parts (`int`, *optional*, defaults to 3): Parts that are held out.
    """
    order = np.random.default_rng(seed).permutation(len(values))
    panel = np.ones((1, values.shape[1]), dtype=bool)
    usable = [rank for rank in ranks if rank < min(values.shape[1] // 3, len(values) // 2)] or [1]
    likelihoods = np.zeros(len(usable))
    for part in range(n_parts):
        held, rest = values[order[part::5]], values[np.delete(order, np.s_[part::5])]
        for index, rank in enumerate(usable):
            model = fit_factor_model(rest, np.zeros(len(rest), int), panel, rank, 20, seed)
            covariance, centred = model.covariance, held - model.mean
            distance = np.einsum("nv,nv->", centred, np.linalg.solve(covariance, centred.T).T) / len(held)
            likelihoods[index] -= distance + np.linalg.slogdet(covariance)[1]
    return usable[int(np.argmax(likelihoods))]


def _first_pass(blocks: Blocks, panels: np.ndarray, n_factors: int, seed: int):
    """Gene means and variances, cells per panel, and some centred cells for the starting point."""
    n_panels, n_genes = panels.shape
    wanted = int(min(max(1_000, 4 * n_factors), max(2 * n_factors, 4e7 // n_genes)))
    counts = np.zeros(n_panels, dtype=np.int64)
    total, total_squared = np.zeros(n_genes), np.zeros(n_genes)
    generator = np.random.default_rng(seed)
    kept_values, kept_panels, kept_keys = [], [], []
    for values, panel_index in blocks():
        keys = generator.random(len(values))
        kept_values.append(np.asarray(values))
        kept_panels.append(panel_index)
        kept_keys.append(keys)
        if sum(map(len, kept_keys)) > 2 * wanted:  # keep the cells with the smallest keys: a uniform sample
            keys = np.concatenate(kept_keys)
            chosen = np.sort(np.argpartition(keys, wanted)[:wanted])
            kept_values = [np.concatenate(kept_values)[chosen]]
            kept_panels = [np.concatenate(kept_panels)[chosen]]
            kept_keys = [keys[chosen]]
        counts += np.bincount(panel_index, minlength=n_panels)
        for panel in np.unique(panel_index):
            measured = panels[panel]
            rows = np.asarray(values[panel_index == panel][:, measured], dtype=np.float64)
            total[measured] += rows.sum(axis=0)
            total_squared[measured] += (rows**2).sum(axis=0)
    n_measured = np.maximum(counts @ panels.astype(np.int64), 1)
    center = total / n_measured
    variance = np.maximum(total_squared / n_measured - center**2, 0.0)
    if not kept_values:
        return center, variance, counts, np.zeros((0, n_genes))
    sample = np.where(panels[np.concatenate(kept_panels)], np.concatenate(kept_values) - center, 0.0)
    return center, variance, counts, sample[:wanted] if len(sample) > wanted else sample


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


def _em_step(model, blocks, panels, counts, center, variance, floor, patterns, pattern_of_gene) -> float:
    """One pass: expectation of z a cell, regression of every gene on z, expansion of z absorbed. Updates in place."""
    rank = model.loadings.shape[1]
    posterior, information = posterior_by_panel(model, panels)
    moments = np.zeros((len(panels), rank + 1, rank + 1))  # sums of [z, 1][z, 1]' over the cells of each panel
    cross = np.zeros((panels.shape[1], rank + 1))  # sums of (x - center) [z, 1]' over the cells measuring each gene
    quadratic = 0.0
    weighted = model.loadings / model.noise[:, None]
    offset = model.mean - center
    for values, panel_index in blocks():
        for panel in np.unique(panel_index):
            measured = panels[panel]
            rows = values if (panel_index == panel).all() else values[panel_index == panel]
            dtype = np.result_type(rows.dtype, np.float32)
            if not measured.all():
                rows = rows[:, measured]
            rows = rows - center[measured].astype(dtype)
            weights = weighted[measured]
            h = (rows @ weights.astype(dtype)).astype(np.float64) - offset[measured] @ weights
            z = h @ posterior[panel]
            extended = np.concatenate([z, np.ones((len(z), 1))], axis=1)
            moments[panel] += extended.T @ extended
            cross[measured] += rows.T @ extended.astype(dtype)
            quadratic += float((h * z).sum())
    n_measured = counts @ panels.astype(np.int64)
    for panel in np.flatnonzero(counts):
        moments[panel, :rank, :rank] += counts[panel] * posterior[panel]
    likelihood = _log_likelihood(model, panels, counts, information, quadratic, n_measured, variance, center)
    total = moments.sum(axis=0)
    for index, pattern in enumerate(patterns.T):
        genes = np.flatnonzero(pattern_of_gene == index)
        if not counts[pattern].any():
            model.loadings[genes], model.mean[genes], model.noise[genes] = 0.0, center[genes], 1.0
            continue
        second = moments[pattern].sum(axis=0)
        # A ridge far below one cell's worth keeps the system solvable when cells are fewer than factors.
        second = second + 1e-8 * np.trace(second) / (rank + 1) * np.eye(rank + 1)
        weights = np.linalg.solve(second, cross[genes].T).T
        residual = variance[genes] * n_measured[genes] - (weights * cross[genes]).sum(axis=1)
        model.noise[genes] = np.maximum(residual / n_measured[genes], floor[genes])
        model.loadings[genes], model.mean[genes] = weights[:, :rank], center[genes] + weights[:, rank]
    # The expanded model lets z have any mean and covariance; folding them back speeds up EM several times.
    z_mean = total[:rank, rank] / total[rank, rank]
    z_covariance = total[:rank, :rank] / total[rank, rank] - np.outer(z_mean, z_mean)
    model.mean += model.loadings @ z_mean
    model.loadings = model.loadings @ np.linalg.cholesky(z_covariance)
    return likelihood


def _log_likelihood(model, panels, counts, information, quadratic, n_measured, variance, center) -> float:
    """Mean log density of a cell's measured values under the model before the step."""
    rank = model.loadings.shape[1]
    squares = (n_measured * (variance + (model.mean - center) ** 2) / model.noise).sum()
    log_noise = (n_measured * np.log(2 * np.pi * model.noise)).sum()
    log_factor = sum(
        counts[panel] * np.linalg.slogdet(np.eye(rank) + information[panel])[1] for panel in np.flatnonzero(counts)
    )
    return float(-0.5 * (squares - quadratic + log_noise + log_factor) / counts.sum())


def _canonical(model: FactorModel, measured: np.ndarray) -> FactorModel:
    """Rotates the factors: L' D^-1 L diagonal and falling, the largest loading of each factor positive."""
    model.loadings[~measured], model.noise[~measured] = 0.0, 1.0
    _, vectors = np.linalg.eigh(model.loadings.T @ (model.loadings / model.noise[:, None]))
    loadings = model.loadings @ vectors[:, ::-1]
    signs = np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(loadings.shape[1])])
    model.loadings = loadings * np.where(signs == 0, 1.0, signs)
    return model


def fit_pair_coupling(
    model: FactorModel,
    source_values: np.ndarray,
    source_panel: np.ndarray,
    target_values: np.ndarray,
    target_panel: np.ndarray,
    panels: np.ndarray,
    n_iterations: int = 200,
    tolerance: float = 1e-6,
    with_shift: bool = False,
) -> PairCoupling:
    """Covariance of the true factors of two paired cells, free of the attenuation that posterior means suffer.

    EM over the pairs with joint prior N(m, K) of (z_A, z_B); K is rescaled so that either cell has unit covariance.
    Needs one pass over the cells, after which only sums over pairs of panels are kept.

    Args:
        model (`FactorModel`): Fitted on the cells of the pairs.
        source_values, target_values (`np.ndarray`): Shape `(n, V)`.
        source_panel, target_panel (`np.ndarray`): Rows of `panels`, shape `(n,)`.
        panels (`np.ndarray` of bool): Shape `(P, V)`.
        n_iterations (`int`, *optional*, defaults to 200): At most.
        tolerance (`float`, *optional*, defaults to 1e-6): Largest change of an entry at which iterations stop.
        with_shift (`bool`, *optional*, defaults to `False`): Whether to estimate the factors' means over the pairs.

    Returns:
        `PairCoupling` in float64.
    """
    rank = model.loadings.shape[1]
    _, information = posterior_by_panel(model, panels)
    h = np.concatenate(
        [
            factor_information(model, source_values, source_panel, panels),
            factor_information(model, target_values, target_panel, panels),
            np.ones((len(source_values), 1)),
        ],
        axis=1,
    )
    groups, group_of_pair = np.unique(np.stack([source_panel, target_panel], 1), axis=0, return_inverse=True)
    group_of_pair = group_of_pair.ravel()
    sums = [h[group_of_pair == group].T @ h[group_of_pair == group] for group in range(len(groups))]
    n_pairs = len(h)
    joint, mean = np.eye(2 * rank), np.zeros(2 * rank)
    for _ in range(n_iterations):
        precision = np.linalg.inv(joint)
        second, first = np.zeros_like(joint), np.zeros_like(mean)
        for (a, b), total in zip(groups, sums):
            likelihood = np.zeros_like(joint)
            likelihood[:rank, :rank], likelihood[rank:, rank:] = information[a], information[b]
            covariance = np.linalg.inv(precision + likelihood)
            # E[z] = covariance (h + precision mean): linear in [h, 1].
            linear = np.concatenate([covariance, (covariance @ precision @ mean)[:, None]], axis=1)
            second += linear @ total @ linear.T + total[-1, -1] * covariance
            first += linear @ total[:, -1]
        mean = first / n_pairs if with_shift else mean
        raw = second / n_pairs - np.outer(mean, mean)
        scale_a, scale_b = _inverse_root(raw[:rank, :rank]), _inverse_root(raw[rank:, rank:])
        matrix = scale_b @ raw[rank:, :rank] @ scale_a
        left, singular, right = np.linalg.svd(matrix)
        matrix = (left * np.minimum(singular, 1.0 - 1e-9)) @ right
        change = np.abs(matrix - joint[rank:, :rank]).max()
        joint = np.block([[np.eye(rank), matrix.T], [matrix, np.eye(rank)]])
        if change < tolerance:
            break
    return PairCoupling(matrix=matrix, shift=mean[rank:] - matrix @ mean[:rank])


def _inverse_root(matrix: np.ndarray) -> np.ndarray:
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return (vectors / np.sqrt(np.maximum(eigenvalues, 1e-12))) @ vectors.T


def predict_factor_model(
    model: FactorModel,
    coupling: PairCoupling,
    source_values: np.ndarray,
    source_panel: np.ndarray,
    panels: np.ndarray,
    revealed_ids: np.ndarray,
    revealed_values: np.ndarray,
    revealed_mask: np.ndarray,
    with_variance: bool = True,
) -> tuple[np.ndarray, np.ndarray | None]:
    """E and Var of every gene of the target given the source cell and the revealed target values, exactly.

    z_B | A ~ N(R E[z_A|A] + shift, I - R R' + R Var[z_A|A] R'), conditioned on b_S = mean_S + L_S z_B + e_S.

    Args:
        model (`FactorModel`), coupling (`PairCoupling`): Fitted.
        source_values (`np.ndarray`): Shape `(n, V)`; unmeasured entries are not read.
        source_panel (`np.ndarray`): Rows of `panels`, shape `(n,)`.
        panels (`np.ndarray` of bool): Shape `(P, V)`.
        revealed_ids, revealed_values, revealed_mask (`np.ndarray`): Gene, *value in the target* (source + change) and
            whether the entry is real; shape `(n, K)`, K may be 0.
        with_variance (`bool`, *optional*, defaults to `True`): Whether to return variances, which cost n K V more.

    Returns:
        Mean and variance, each `(n, V)`, in the precision of `source_values`; the variance includes the gene's noise.
    """
    dtype = np.result_type(source_values.dtype, np.float32)
    rank = model.loadings.shape[1]
    posterior, _ = posterior_by_panel(model, panels)
    matrix = coupling.matrix
    z = factor_posterior_mean(model, source_values, source_panel, panels) @ matrix.T + coupling.shift
    prior = np.eye(rank) - matrix @ matrix.T + matrix @ posterior @ matrix.T
    mask = np.asarray(revealed_mask, dtype=bool)
    ids = np.where(mask, revealed_ids, 0)
    prior_of_pair = prior[source_panel]
    half = None
    if ids.shape[1]:
        loadings = model.loadings[ids] * mask[..., None]  # (n, K, r)
        expected = model.mean[ids] + np.einsum("nkr,nr->nk", loadings, z)
        residual = np.where(mask, np.asarray(revealed_values, dtype=np.float64) - expected, 0.0)
        projected = loadings @ prior_of_pair  # (n, K, r)
        covariance = projected @ loadings.transpose(0, 2, 1)
        diagonal = np.arange(ids.shape[1])
        covariance[:, diagonal, diagonal] += np.where(mask, model.noise[ids], 1.0)
        lower = np.linalg.cholesky(covariance)
        half = np.linalg.solve(lower, projected)  # (n, K, r)
        whitened = np.linalg.solve(lower, residual[..., None])[..., 0]
        z = z + np.einsum("nkr,nk->nr", half, whitened)
    mean = (model.mean + z @ model.loadings.T).astype(dtype)
    if not with_variance:
        return mean, None
    variance_by_panel = np.einsum("vr,prs,vs->pv", model.loadings, prior, model.loadings, optimize=True) + model.noise
    variance = variance_by_panel[source_panel]
    if half is not None:
        for position in range(ids.shape[1]):
            variance -= (half[:, position] @ model.loadings.T) ** 2
    return mean, variance.astype(dtype)
