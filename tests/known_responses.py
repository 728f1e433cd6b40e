"""Interventions on a known network, for tests: cells of a screen, and the responses that are true."""

from collections.abc import Mapping

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from data_scripts.synthetic.best_predictor import ExpectedLogValue
from data_scripts.synthetic.network import GeneNetwork
from data_scripts.synthetic.network_cells import make_obs, make_var, sample_chunk


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
