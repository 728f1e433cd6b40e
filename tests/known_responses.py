"""Interventions on a known network, for tests: cells of a screen, and the responses that are true."""

import dataclasses
from collections.abc import Mapping

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.special import digamma, ndtri
from scipy.stats import nbinom, poisson

from data_scripts.synthetic.network import GeneNetwork
from data_scripts.synthetic.network_cells import make_obs, make_var, sample_chunk

TARGET_SUM = 10_000.0
# Log rate of a gene that is knocked out: exp(-30) molecules are none, and 0 * -30 is not NaN.
SILENT = -30.0


@dataclasses.dataclass(frozen=True)
class PerturbedNetwork(GeneNetwork):
    """A network under the do-operator: the genes take new values, everything downstream follows.

    Attributes:
        interventions (`dict`): Gene index -> (`"level"` or `"shift"`, number in units of `eta`).
    """

    interventions: dict = dataclasses.field(default_factory=dict)

    def activities(self, innovations: np.ndarray) -> np.ndarray:
        """Regulator activities `(n, R)`; interventions cut the incoming edges."""
        activity = np.array(innovations, dtype=np.float64)
        signal = np.zeros_like(activity)
        for rank, gene in enumerate(self.regulators.tolist()):
            activity[:, rank] += signal @ self.coupling[rank]
            kind, amount = self.interventions.get(gene, ("shift", 0.0))
            activity[:, rank] = amount - self.base[gene] if kind == "level" else activity[:, rank] + amount
            signal[:, rank] = activity[:, rank] if self.config.form == "linear" else np.tanh(activity[:, rank])
        return activity

    def eta(self, innovations: np.ndarray, genes: np.ndarray | slice = slice(None)) -> np.ndarray:
        eta = super().eta(innovations, genes)
        columns = np.arange(self.config.n_genes)[genes]
        for gene, (kind, amount) in self.interventions.items():
            if gene not in self.regulators:
                at = columns == gene
                eta[:, at] = amount if kind == "level" else eta[:, at] + amount
        return eta


def intervene(network: GeneNetwork, changes: Mapping[str, str | float | tuple[str, float]]) -> PerturbedNetwork:
    """The network under changes: gene (id or symbol) -> `"ko"`, a log level (`float`), or `("factor", f)`, the gene's
    own rate times `f` on top of what its regulators say. Levels are log values of the linear form directly, of the
    count form log(1 + molecules per 10,000)."""
    interventions = dict(getattr(network, "interventions", {}))
    for gene, change in zip(network.gene_index(list(changes)).tolist(), changes.values()):
        interventions[gene] = parse_change(network, change)
    fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(GeneNetwork)}
    return PerturbedNetwork(**fields, interventions=interventions)


def parse_change(network: GeneNetwork, change) -> tuple[str, float]:
    if isinstance(change, tuple):
        return "shift", float(np.log(change[1]))
    level = 0.0 if change == "ko" else change
    if network.config.form == "linear":
        return "level", float(level)
    return "level", float(np.log(np.expm1(level) / TARGET_SUM * reference_total(network))) if level else SILENT


def reference_total(network: GeneNetwork) -> float:
    """Count form: the summed rate of an average cell, the unit in which levels are fractions."""
    rng = np.random.default_rng([network.config.seed, 3])
    states = network.sample_innovations(rng, *network.sample_labels(rng, 512))
    return float(np.exp(GeneNetwork.eta(network, states)).sum(axis=1).mean())


def make_screen(
    network: GeneNetwork,
    perturbations: Mapping[str, Mapping],
    *,
    n_control: int = 500,
    n_cells: int = 100,
    dataset: int = 0,
    seed: int = 0,
) -> anndata.AnnData:
    """A screen on cells of one data set: controls, and cells of the network under each intervention.

    Args:
        network ([`GeneNetwork`]): The unperturbed network.
        perturbations (`Mapping`): Name of each perturbation -> changes, see [`intervene`].
        n_control (`int`, *optional*, defaults to 500): Control cells.
        n_cells (`int`, *optional*, defaults to 100): Cells of each perturbation.
        dataset (`int`, *optional*, defaults to 0): Whose types, donors and measured genes.
        seed (`int`, *optional*, defaults to 0): On top of the network's.

    Returns:
        `AnnData`: X holds log values (linear) or raw counts (count); `obs["perturbation"]` (`"control"` for controls),
        `obs["is_control"]`.
    """
    rng = np.random.default_rng([network.config.seed, 5, seed])
    measured = network.measured[dataset]
    matrices, tables = [], []
    for name, net, n in [
        ("control", network, n_control),
        *((str(name), intervene(network, changes), n_cells) for name, changes in perturbations.items()),
    ]:
        labels = network.sample_labels(rng, n, dataset)
        matrices.append(sample_chunk(net, rng, labels, measured))
        tables.append(make_obs(labels, [f"{name}_{index}" for index in range(n)]).assign(perturbation=name))
    obs = pd.concat(tables)
    obs["is_control"] = obs["perturbation"] == "control"
    return anndata.AnnData(sp.vstack(matrices, format="csr"), obs=obs, var=make_var(network, measured))


def true_means(
    network: GeneNetwork,
    changes: Mapping[str, str | float | tuple[str, float]],
    *,
    dataset: int = 0,
    n_states: int = 4_000,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean log value of every gene without and with an intervention; the difference is the true response.

    The linear form is exact. The count form averages over `n_states` simulated cells, the same ones with and without
    the intervention, each gene's expected log value given its rate being exact; unmeasured genes get what would have
    been seen had they been measured.

    Args:
        network ([`GeneNetwork`]): The unperturbed network.
        changes (`Mapping`): See [`intervene`].
        dataset (`int`, *optional*, defaults to 0): Data set of the cells.
        n_states (`int`, *optional*, defaults to 4,000): Simulated cells, count form only.

    Returns:
        Two `np.ndarray` of shape `(G,)` in network gene order.
    """
    networks = (network, intervene(network, changes))
    if network.config.form == "linear":
        donors = network.donor_effects[network.donor_dataset == dataset]
        types = network.type_shares @ network.type_effects
        state = (network.dataset_effects[dataset] + types + donors.mean(axis=0))[None]
        return tuple(net.eta(state)[0].astype(np.float64) for net in networks)
    rng = np.random.default_rng([network.config.seed, 4])
    states = network.sample_innovations(rng, *network.sample_labels(rng, n_states, dataset))
    expectation = ExpectedLogValue(network)
    libraries = rng.integers(0, len(expectation.libraries), n_states)
    totals = np.zeros((2, network.config.n_genes))
    for total, net in zip(totals, networks):
        for start in range(0, n_states, 512):
            rows = slice(start, start + 512)
            library = expectation.libraries[libraries[rows]]
            rates = expectation.log_means(net.eta(states[rows]), network.measured[dataset], library)
            total += expectation(rates, libraries[rows]).sum(axis=0)
    return tuple(totals / n_states)


class ExpectedLogValue:
    """
    Expected normalised log value of a count given its mean: a table for some library sizes, by default 24 even
    quantiles of their distribution, interpolated linearly in the log mean.
    """

    low, step, size = -14.0, 0.05, 440  # log means from 8e-7 to 3,000

    def __init__(self, network: GeneNetwork, libraries: np.ndarray | None = None):
        config = network.config
        self.dropout = config.dropout
        if libraries is None:
            spread = config.library_spread
            libraries = config.mean_library * np.exp(spread * ndtri((np.arange(24) + 0.5) / 24) - 0.5 * spread**2)
        self.libraries = np.asarray(libraries, dtype=np.float64)
        self.table = self._tabulate(config.dispersion, self.libraries)

    @classmethod
    def _tabulate(cls, dispersion: float, libraries: np.ndarray) -> np.ndarray:
        """Expected log value before dropout, `(n_libraries, size)`."""
        table = np.empty((len(libraries), cls.size))
        for row in range(cls.size):
            mean = np.exp(cls.low + row * cls.step)
            if mean < 300:
                counts = np.arange(1, int(mean + 12 * np.sqrt(mean + dispersion * mean**2) + 12))
                if dispersion > 0:
                    chance = nbinom.pmf(counts, 1 / dispersion, 1 / (1 + dispersion * mean))
                else:
                    chance = poisson.pmf(counts, mean)
                table[:, row] = np.log1p(TARGET_SUM * counts / libraries[:, None]) @ chance
            else:  # many molecules: the mean of the log of a gamma variable
                shift = digamma(1 / dispersion) + np.log(dispersion) if dispersion > 0 else 0.0
                table[:, row] = np.log1p(TARGET_SUM * mean * np.exp(shift - 0.5 / mean) / libraries)
        return table

    def log_means(self, eta: np.ndarray, measured: np.ndarray, library: np.ndarray) -> np.ndarray:
        """Log mean molecules before dropout of genes with log rates `eta` `(..., G)` in cells of these libraries."""
        peak = eta.max(axis=-1, keepdims=True)
        total = np.log(np.exp(eta - peak) @ measured.astype(eta.dtype))[..., None] + peak
        return eta - total + np.log(library / (1 - self.dropout)).astype(eta.dtype)[..., None]

    def __call__(self, log_means: np.ndarray, library_index: np.ndarray) -> np.ndarray:
        """Expected normalised log values, shaped like `log_means` `(..., G)`, for libraries given by index `(...)`."""
        position = np.clip((log_means - self.low) / self.step, 0, self.size - 1.001)
        left = position.astype(np.int32)
        flat = (1 - self.dropout) * self.table.astype(np.float32).ravel()
        at = left + (np.asarray(library_index, dtype=np.int32) * self.size)[..., None]
        below = flat[at]
        return below + (position - left).astype(np.float32) * (flat[at + 1] - below)
