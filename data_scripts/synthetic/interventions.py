"""Interventions on a known network: cells of a screen, and the responses that are true."""

from collections.abc import Mapping

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from data_scripts.cells.screens import Screen, ScreenOptions, read_screen
from data_scripts.synthetic.best_predictor import ExpectedLogValue
from data_scripts.synthetic.network import GeneNetwork, make_network
from data_scripts.synthetic.network_cells import make_obs, make_var, sample_chunk
from data_scripts.synthetic.network_config import SyntheticConfig


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
        perturbations (`Mapping`): Name of each perturbation -> changes, see [`GeneNetwork.intervene`].
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
        *((str(name), network.intervene(changes), n_cells) for name, changes in perturbations.items()),
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
        changes (`Mapping`): See [`GeneNetwork.intervene`].
        dataset (`int`, *optional*, defaults to 0): Data set of the cells.
        n_states (`int`, *optional*, defaults to 4,000): Simulated cells, count form only.

    Returns:
        Two `np.ndarray` of shape `(G,)` in network gene order.
    """
    networks = (network, network.intervene(changes))
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


def regulators_screen(
    form: str, seed: int, n_control: int = 1_500, n_cells: int = 30
) -> tuple[GeneNetwork, Screen, np.ndarray, np.ndarray]:
    """Cells of a network of 100 genes, six of them regulators, each knocked out (count form) or lowered by 1.5 log units.

    Args:
        form (`str`): `"linear"` or `"count"`.
        seed (`int`): Of the network and the cells.
        n_control, n_cells (`int`, *optional*, defaults to 1,500 and 30): Control cells, and cells a perturbation.

    Returns:
        The network, the screen, the true mean responses in log value `(P, V)`, perturbations in the order of their
        labels, and the genes that are scored, bool of shape `(V,)`.
    """
    config = SyntheticConfig(
        form=form,
        n_genes=100,
        n_regulators=6,
        n_datasets=1,
        n_donors=10,
        measured_share=1.0,
        regulator_measured_share=1.0,
        library_mean=3_000.0,
        seed=seed,
    )
    network = make_network(config)
    changes = {}
    for index in network.regulators:
        name = network.gene_symbols[index]
        changes[name] = {name: "ko" if form == "count" else float(network.base[index] - 1.5)}
    options = ScreenOptions(
        value_kind="counts" if form == "count" else "log",
        batch_column="assay",
        cell_line_column="assay",
        symbol_column="feature_name",
    )
    screen = read_screen(make_screen(network, changes, n_control=n_control, n_cells=n_cells), options)
    means = [true_means(network, changes[label], n_states=1_000) for label in sorted(screen.perturbations)]
    columns = network.gene_index(screen.gene_ids)
    truth = np.stack([perturbed - control for control, perturbed in means])[:, columns]
    mask = np.ones(len(columns), dtype=bool)
    mask[screen.panel_targets] = False
    return network, screen, truth, mask
