"""Size of predicted responses on cells whose true responses are known: share and reach against the defaults.

python benchmarks/bench_response_size.py
python benchmarks/bench_response_size.py --smoke
"""

import argparse

import numpy as np

from modeling_gppc.evaluation.in_context_model import InContextModel
from modeling_gppc.evaluation.metrics import normalised_squared_error, pearson_delta
from modeling_gppc.evaluation.report import text_table
from modeling_gppc.evaluation.response_size import ResponseSize
from modeling_gppc.evaluation.screen_baselines import covariance
from modeling_gppc.evaluation.synthetic_screen import regulators_screen

SHARES = (1.0, 0.5, 1 / 3, 0.2)
DRIFTS = (0.03, 0.06, 0.12, 1e6)


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
            n_control = 200 if arguments.smoke else 1_500
            _, screen, context, truth, mask = regulators_screen(form, seed, n_control, n_cells=50)
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
