"""Size of predicted responses on cells whose true responses are known: share and reach against the defaults.

python benchmarks/bench_response_size.py
python benchmarks/bench_response_size.py --smoke
"""

import argparse

import numpy as np

from data_scripts.screens import ScreenOptions, read_screen
from data_scripts.synthetic import make_network
from data_scripts.synthetic_cells import make_screen
from data_scripts.synthetic_config import SyntheticConfig
from data_scripts.synthetic_truth import true_response
from modeling_gppc.evaluation.in_context_model import InContextModel
from modeling_gppc.evaluation.metrics import normalised_squared_error, pearson_delta
from modeling_gppc.evaluation.report import text_table
from modeling_gppc.evaluation.response_size import ResponseSize
from modeling_gppc.evaluation.screen_baselines import ScreenContext, covariance

SHARES = (1.0, 0.5, 1 / 3, 0.2)
DRIFTS = (0.03, 0.06, 0.12, 1e6)


def screen_of(form: str, seed: int, n_control: int):
    """A screen of every regulator of a network, the true responses and the genes that are scored."""
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
    base = {name: float(network.base[network.gene_index([name])[0]]) for name in names}
    changes = {name: {name: "ko" if form == "count" else base[name] - 1.5} for name in names}
    options = ScreenOptions(
        value_kind="counts" if form == "count" else "log",
        batch_column="assay",
        cell_line_column="assay",
        symbol_column="feature_name",
    )
    screen = read_screen(make_screen(network, changes, n_control=n_control, n_cells=50), options)
    labels = sorted(screen.perturbations)
    columns = network.gene_index(screen.gene_ids)
    truth = np.stack([true_response(network, changes[label], n_states=1_000).delta[columns] for label in labels])
    mask = np.ones(len(columns), dtype=bool)
    mask[screen.panel_targets] = False
    return screen, ScreenContext.build(screen, [], labels), truth, mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=4, help="networks of each form")
    parser.add_argument("--smoke", action="store_true", help="one network, few cells, seconds")
    arguments = parser.parse_args()
    rows = []
    for form in ("count",) if arguments.smoke else ("linear", "count"):
        errors: dict[tuple, list[float]] = {}
        directions: dict[str, list[float]] = {"covariance": [], "gppc": []}
        for seed in range(1 if arguments.smoke else arguments.seeds):
            screen, context, truth, mask = screen_of(form, seed, 200 if arguments.smoke else 1_500)
            model = InContextModel(screen, n_factors=10)
            rule = covariance(context).delta
            directions["covariance"].append(pearson_delta(rule, truth, mask).mean())
            errors.setdefault(("covariance", ""), []).append(normalised_squared_error(rule, truth, mask).mean())
            for share in SHARES:
                for drift in DRIFTS:
                    model.size = ResponseSize(share, drift)
                    delta = model.predict(context).delta
                    key = (f"{share:.2f}", f"{drift:g}")
                    errors.setdefault(key, []).append(normalised_squared_error(delta, truth, mask).mean())
            model.size = ResponseSize()
            delta = model.predict(context).delta
            errors.setdefault(("default", "measured"), []).append(normalised_squared_error(delta, truth, mask).mean())
            directions["gppc"].append(pearson_delta(delta, truth, mask).mean())
        for (share, drift), values in errors.items():
            rows.append([form, share, drift, f"{np.mean(values):.3f}"])
        for name, values in directions.items():
            rows.append([form, name, "pearson_delta", f"{np.mean(values):.3f}"])
    print(text_table(["form", "share", "drift", "normalised squared error"], rows))


if __name__ == "__main__":
    main()
