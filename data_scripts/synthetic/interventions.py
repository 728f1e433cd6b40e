"""A CRISPR screen of every regulator of a known network, with the responses that are true."""

import numpy as np

from data_scripts.cells.screens import Screen, ScreenOptions, read_screen
from data_scripts.synthetic.best_predictor import true_response
from data_scripts.synthetic.network import GeneNetwork, make_network
from data_scripts.synthetic.network_cells import make_screen
from data_scripts.synthetic.network_config import SyntheticConfig


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
    names = [network.gene_symbols[index] for index in network.regulators]
    levels = {name: float(network.base[network.gene_index([name])[0]] - 1.5) for name in names}
    changes = {name: {name: "ko" if form == "count" else levels[name]} for name in names}
    options = ScreenOptions(
        value_kind="counts" if form == "count" else "log",
        batch_column="assay",
        cell_line_column="assay",
        symbol_column="feature_name",
    )
    screen = read_screen(make_screen(network, changes, n_control=n_control, n_cells=n_cells), options)
    labels = sorted(screen.perturbations)
    columns = network.gene_index(screen.gene_ids)
    truth = np.stack([true_response(network, changes[label], n_states=1_000).delta[columns] for label in labels])
    mask = np.ones(len(columns), dtype=bool)
    mask[screen.panel_targets] = False
    return network, screen, truth, mask
