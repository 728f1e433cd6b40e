"""A known gene network: regulators, targets, cell types, donors and data sets."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.special import expit, ndtri
from scipy.stats import qmc

from data_scripts.files import write_atomically
from data_scripts.synthetic.network_config import SyntheticConfig
from modeling_gppc.normalization_gppc import close_matches

# State dimensions along which cell types differ, and along which donors differ.
TYPE_PROGRAMS = 2
DONOR_PROGRAMS = 2


@dataclass(frozen=True)
class GeneNetwork:
    r"""
    The truth behind synthetic cells.

    A cell's state is its *innovation* `e` (R,): the sum of its data set's, type's and donor's effect and of Gaussian
    variation within the type. Regulator activities follow in order, `z_r = e_r + sum_s C_rs h(z_s)`, with `h` the
    identity (linear) or tanh (count). A gene's log value (linear) or log rate (count) is
    `eta = base + phi(z) @ weights.T`. In the linear form `phi(z) = z`; in the count form `phi` stacks `z` (used by
    the regulators' own rows alone), Hill curves of each regulator, and switches (products of two thresholds).

    Donor effects are draws from `N(0, donor_cov)`; types and data sets are fixed.

    Attributes:
        base (`np.ndarray`): Mean log value or base log rate, shape `(G,)`.
        weights (`np.ndarray`): Shape `(G, F)`, F = R (linear) or 3 R (count).
        noise (`np.ndarray`): Standard deviation of gene noise, shape `(G,)`; zero in the count form.
        coupling (`np.ndarray`): Strictly lower triangular, shape `(R, R)`.
        regulators (`np.ndarray`): Gene index of each regulator, shape `(R,)`.
        hill (`np.ndarray`): Steepness and midpoint of each regulator's Hill curve, shape `(2, R)`.
        switches (`np.ndarray`): Partner and threshold of each regulator's switch, shape `(2, R)`.
        type_effects, dataset_effects, donor_effects (`np.ndarray`): Shapes `(T, R)`, `(K, R)`, `(n_donors, R)`.
        type_shares (`np.ndarray`): Composition of every donor, shape `(T,)`.
        donor_dataset (`np.ndarray`): Data set of each donor, shape `(n_donors,)`.
        donor_cov, within_cov (`np.ndarray`): Shape `(R, R)`.
        measured (`np.ndarray` of bool): Genes measured by each data set, shape `(K, G)`.
    """

    config: SyntheticConfig
    base: np.ndarray
    weights: np.ndarray
    noise: np.ndarray
    coupling: np.ndarray
    regulators: np.ndarray
    hill: np.ndarray
    switches: np.ndarray
    type_effects: np.ndarray
    dataset_effects: np.ndarray
    donor_effects: np.ndarray
    type_shares: np.ndarray
    donor_dataset: np.ndarray
    donor_cov: np.ndarray
    within_cov: np.ndarray
    measured: np.ndarray

    @property
    def gene_ids(self) -> list[str]:
        """Ids shaped like Ensembl's, in a range that Ensembl does not use."""
        return [f"ENSG9{index:010d}" for index in range(self.config.n_genes)]

    @property
    def gene_symbols(self) -> list[str]:
        """`REG1`, ... for regulators, `TGT1`, ... for targets."""
        symbols = np.empty(self.config.n_genes, dtype=object)
        symbols[self.regulators] = [f"REG{rank + 1}" for rank in range(len(self.regulators))]
        targets = np.setdiff1d(np.arange(self.config.n_genes), self.regulators)
        symbols[targets] = [f"TGT{rank + 1}" for rank in range(len(targets))]
        return symbols.tolist()

    def gene_index(self, names) -> np.ndarray:
        """Column of each gene, given by id or symbol; raises `ValueError` for one that the network does not have."""
        lookup = {symbol: index for index, symbol in enumerate(self.gene_symbols)}
        lookup.update({gene: index for index, gene in enumerate(self.gene_ids)})
        for name in names:
            if name not in lookup:
                raise ValueError(f"gene `{name}` is not in the network{close_matches(str(name), lookup)}")
        return np.array([lookup[name] for name in names], dtype=np.int64)

    def activities(self, innovations: np.ndarray) -> np.ndarray:
        """Regulator activities `(n, R)` of innovations `(n, R)`."""
        activity = np.array(innovations, dtype=np.float64)
        signal = np.zeros_like(activity)
        for rank, weights in enumerate(self.coupling):
            activity[:, rank] += signal @ weights
            signal[:, rank] = activity[:, rank] if self.config.form == "linear" else np.tanh(activity[:, rank])
        return activity

    def features(self, activities: np.ndarray) -> np.ndarray:
        """Regulatory features `phi(z)`, shape `(n, F)`, of activities `(n, R)`."""
        if self.config.form == "linear":
            return activities
        hill = expit(self.hill[0] * (activities - self.hill[1]))
        # Thresholds this steep act as switches; the product is an AND gate of two regulators.
        gates = expit(8.0 * (activities - self.switches[1]))
        return np.concatenate([activities, hill, gates * gates[:, self.switches[0].astype(int)]], axis=1)

    def eta(self, innovations: np.ndarray, genes: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Log values without noise (linear) or log rates (count), float32 `(n, G)`, of innovations `(n, R)`."""
        features = self.features(self.activities(innovations)).astype(np.float32)
        return features @ self.weights[genes].T.astype(np.float32) + self.base[genes].astype(np.float32)

    def loadings(self) -> np.ndarray:
        """Linear form: change of each log value per unit of innovation, `(G, R)`."""
        n = len(self.regulators)
        zero = self.eta(np.zeros((1, n)))
        return (self.eta(np.eye(n)) - zero).T.astype(np.float64)

    def sample_labels(
        self, rng: np.random.Generator, n: int, dataset: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Data set, cell type and donor of `n` cells, each of shape `(n,)`."""
        donors = (
            np.arange(len(self.donor_dataset)) if dataset is None else np.flatnonzero(self.donor_dataset == dataset)
        )
        donor = rng.choice(donors, size=n)
        cell_type = rng.choice(len(self.type_shares), size=n, p=self.type_shares)
        return self.donor_dataset[donor], cell_type, donor

    def sample_innovations(
        self, rng: np.random.Generator, dataset: np.ndarray, cell_type: np.ndarray, donor: np.ndarray | None
    ) -> np.ndarray:
        """Innovations `(n, R)` of cells with these labels; donors are drawn afresh where `donor` is None."""
        n = len(cell_type)
        draw = rng.standard_normal((n, len(self.regulators))) @ np.linalg.cholesky(self.within_cov).T
        if donor is None:
            donors = rng.standard_normal(draw.shape) @ matrix_root(self.donor_cov).T
        else:
            donors = self.donor_effects[donor]
        return self.dataset_effects[dataset] + self.type_effects[cell_type] + donors + draw

    def save(self, path: str | Path) -> None:
        """Writes the network as one safetensors file: arrays, and the config as JSON in the header."""
        arrays = {
            field.name: np.ascontiguousarray(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name != "config"
        }
        header = {"config": json.dumps(dataclasses.asdict(self.config), sort_keys=True)}
        with write_atomically(path) as temporary:
            save_file(arrays, temporary, metadata=header)


def matrix_root(covariance: np.ndarray) -> np.ndarray:
    """A root `r` with `r @ r.T = covariance`, for covariances of any rank."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.clip(values, 0, None))


def load_network(path: str | Path) -> GeneNetwork:
    """Reads what [`GeneNetwork.save`] wrote; raises `ValueError` if the file is missing or holds something else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`path` {path} does not exist; `gppc make-synthetic` writes it beside the store it makes.")
    with safe_open(path, framework="np") as file:
        header = file.metadata() or {}
        if "config" not in header:
            raise ValueError(f"`path` {path} holds no gene network; wanted a file written by `gppc make-synthetic`.")
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return GeneNetwork(config=SyntheticConfig(**json.loads(header["config"])), **arrays)


def make_network(config: SyntheticConfig) -> GeneNetwork:
    """Draws a network; the same config gives the same network."""
    rng = np.random.default_rng([config.seed, 0])
    n_genes, n_reg = config.n_genes, config.n_regulators
    regulators = np.sort(rng.choice(n_genes, n_reg, replace=False))

    def programs(width: int) -> np.ndarray:
        basis = rng.standard_normal((n_reg, width))
        return basis / np.sqrt((basis**2).sum() / n_reg)  # mean variance of a regulator: 1

    type_programs = programs(TYPE_PROGRAMS)
    # Evenly spread normal quantiles: together the types look Gaussian, and cells within a type vary along the same
    # programs, so that neighbouring types overlap.
    scores = ndtri(qmc.Halton(TYPE_PROGRAMS, seed=rng).random(config.n_cell_types))
    if config.n_cell_types > TYPE_PROGRAMS:
        scores -= scores.mean(axis=0)
        scores = scores @ np.linalg.inv(np.linalg.cholesky(scores.T @ scores / len(scores))).T
    donor_root = config.donor_scale * programs(DONOR_PROGRAMS)
    free = programs(max(2, n_reg // 2))
    within = config.within_scale**2 * (
        0.3 * np.eye(n_reg) + 0.4 * type_programs @ type_programs.T + 0.3 * free @ free.T
    )
    coupling = np.tril(rng.standard_normal((n_reg, n_reg)) * (rng.random((n_reg, n_reg)) < 0.3), k=-1)
    donor_dataset = np.arange(config.n_donors) % config.n_datasets

    measured = rng.random((config.n_datasets, n_genes)) < config.measured_share
    measured[:, regulators] = rng.random((config.n_datasets, n_reg)) < config.regulator_measured_share
    measured[:, regulators[0]] = True  # no data set is left without a gene

    width = n_reg if config.form == "linear" else 3 * n_reg
    weights = np.zeros((n_genes, width))
    targets = np.setdiff1d(np.arange(n_genes), regulators)
    n_parents = 1 + rng.integers(0, min(3, n_reg), size=len(targets))
    strength = rng.choice([-1.0, 1.0], (len(targets), 3), p=[0.35, 0.65]) * rng.uniform(0.5, 1.5, (len(targets), 3))
    switching = rng.random(len(targets)) < config.switching_share
    offset = np.zeros(len(targets), dtype=int) if config.form == "linear" else np.where(switching, 2, 1) * n_reg
    for parent in range(3):
        rows = np.flatnonzero(n_parents > parent)
        chosen = offset[rows] + rng.integers(0, n_reg, len(rows))
        np.add.at(weights, (targets[rows], chosen), strength[rows, parent])

    network = GeneNetwork(
        config=config,
        base=np.zeros(n_genes),
        weights=weights,
        noise=np.zeros(n_genes),
        coupling=config.coupling * coupling,
        regulators=regulators,
        hill=np.stack([rng.uniform(1.0, 2.5, n_reg), rng.normal(0.0, 0.5, n_reg)]),
        switches=np.stack([(np.arange(n_reg) + 1 + rng.integers(0, n_reg - 1)) % n_reg, rng.normal(0, 0.4, n_reg)]),
        type_effects=config.type_scale * scores @ type_programs.T,
        dataset_effects=config.dataset_scale * rng.standard_normal((config.n_datasets, n_reg)),
        donor_effects=rng.standard_normal((config.n_donors, DONOR_PROGRAMS)) @ donor_root.T,
        type_shares=np.full(config.n_cell_types, 1.0 / config.n_cell_types),
        donor_dataset=donor_dataset,
        donor_cov=donor_root @ donor_root.T,
        within_cov=within,
        measured=measured,
    )
    # Scale the targets' regulation and set the means from the network's own cells.
    dataset, cell_type, donor = network.sample_labels(rng, 4_096)
    features = network.features(network.activities(network.sample_innovations(rng, dataset, cell_type, donor)))
    spread = np.sqrt(np.einsum("gf,fh,gh->g", weights, np.cov(features, rowvar=False), weights))
    weights[targets] *= (config.target_scale / np.maximum(spread[targets], 1e-6))[:, None]
    weights[regulators, np.arange(n_reg)] = 1.0
    if config.form == "linear":
        base = rng.normal(3.0, 0.7, n_genes)
        noise = config.noise_scale * rng.uniform(0.7, 1.3, n_genes)
    else:
        # Regulators are measured well enough to be imposed: their base rates lie above the average.
        base = config.rate_spread * rng.standard_normal(n_genes)
        base[regulators] = 0.5 + 0.5 * np.abs(base[regulators])
        base[targets] -= weights[targets] @ features.mean(axis=0)
        noise = np.zeros(n_genes)
    return dataclasses.replace(network, base=base, weights=weights, noise=noise)
