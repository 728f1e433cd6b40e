"""Responses on cells whose true responses are known: direction against the covariance rule, size against the defaults.

python benchmarks/bench_response_size.py
python benchmarks/bench_response_size.py --smoke

Differences are paired over networks; intervals: 95 %, Student's t over seeds.
"""

import argparse

import numpy as np
import scipy.stats
from tqdm.auto import tqdm

from data_scripts.synthetic.interventions import regulators_screen
from modeling_gppc.evaluation.evaluate_options import EvaluateOptions
from modeling_gppc.evaluation.in_context_model import InContextModel
from modeling_gppc.evaluation.metrics import normalised_squared_error, pearson_delta
from modeling_gppc.evaluation.report import text_table
from modeling_gppc.evaluation.response_size import ResponseSize
from modeling_gppc.evaluation.screen_baselines import covariance

SHARES = (1.0, 0.5, 1 / 3, 0.2)
DRIFTS = (0.03, 0.06, 0.12, 1e6)
HOLDS = (0.0, 1.0, 5.0)
DEFAULT = "gppc, shipped defaults"


def network_scores(form: str, seed: int, n_control: int, steps: int) -> tuple[dict[str, float], dict[tuple, float]]:
    """Directions by method and errors of size by treatment, each a mean over the regulators of one network."""
    _, screen, context, truth, mask = regulators_screen(form, seed, n_control, n_cells=50)
    model = InContextModel(screen, seed=seed)
    rule = covariance(context).delta
    directions = {"covariance": pearson_delta(rule, truth, mask).mean()}
    errors = {("covariance", ""): normalised_squared_error(rule, truth, mask).mean()}
    for share in SHARES:
        for drift in DRIFTS:
            model.size = ResponseSize(share, drift)
            delta = model.predict(context).delta
            errors[f"{share:.2f}", f"{drift:g}"] = normalised_squared_error(delta, truth, mask).mean()
    model.size = ResponseSize()
    default, hold = model.predict(context).delta, model.hold
    errors["default", "measured"] = normalised_squared_error(default, truth, mask).mean()
    directions["closed form, shipped defaults"] = pearson_delta(default, truth, mask).mean()
    for firmness in HOLDS:
        model.hold = firmness
        directions[f"closed form, hold {firmness:g}"] = pearson_delta(model.predict(context).delta, truth, mask).mean()
    trained = InContextModel(screen, steps=steps, n_factors=model.n_factors, seed=seed, hold=hold)
    directions[DEFAULT] = pearson_delta(trained.predict(context).delta, truth, mask).mean()
    return {name: float(value) for name, value in directions.items()}, {k: float(v) for k, v in errors.items()}


def interval(values: list[float]) -> str:
    """Mean and its 95 % interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.3f}"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="networks of each form")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--controls", type=int, default=1_500, help="control cells")
    parser.add_argument("--smoke", action="store_true", help="one network, few cells, seconds")
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + (1 if arguments.smoke else arguments.seeds))
    n_control, steps = (200, 5) if arguments.smoke else (arguments.controls, EvaluateOptions().steps)
    sizes, directions = [], []
    for form in ("count",) if arguments.smoke else ("linear", "count"):
        runs = [network_scores(form, seed, n_control, steps) for seed in tqdm(seeds, desc=form, unit="network")]
        for share, drift in runs[0][1]:
            values = [errors[share, drift] for _, errors in runs]
            sizes.append([form, share, drift, f"{np.mean(values):.3f}"])
        for name in runs[0][0]:
            gaps = [found[name] - found["covariance"] for found, _ in runs]
            difference = "" if name == "covariance" else interval(gaps)
            directions.append([form, name, interval([found[name] for found, _ in runs]), difference])
    print(text_table(["form", "share", "drift", "normalised squared error"], sizes))
    print()
    print(text_table(["form", "method", "pearson_delta", "method - covariance"], directions))


if __name__ == "__main__":
    main()
