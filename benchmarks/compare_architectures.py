"""Other shapes of the departure, and the shipped one without each of its parts: same pairs, CPU seconds and seeds.

    python benchmarks/compare_architectures.py --cells kang2018_ctrl_pbmc_8684x2511.h5ad --out kang.json
    python benchmarks/compare_architectures.py --synthetic --out count.json
    python benchmarks/compare_architectures.py --cells FILE.h5ad --table parts     # the shipped form without its parts
    python benchmarks/compare_architectures.py --smoke                             # tiny cells, few steps

Every variant starts from the same closed-form linear response (or, marked, from the gene means) and has the same CPU
seconds, whatever a step costs it. r2 is against the gene means of the training cells, on pairs of held-out cells
(validation, by which forms are chosen) and of held-out donors (test).
"""

import argparse
import copy
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from architectures import VARIANTS, Batch, Variant, make_variant
from pair_tables import PAIRINGS, Cells, draw_revealed, read_cells, training_pairs, variable_genes, write_folder
from tqdm.auto import tqdm

from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.pair_options import PerturbationOptions
from data_scripts.synthetic.network import SyntheticConfig, make_network
from data_scripts.synthetic.network_cells import make_anndata
from modeling_gppc import GppcConfig, GppcForPerturbationPrediction
from modeling_gppc.evaluation.metrics import gaussian_crps, interval_coverage
from modeling_gppc.evaluation.pair_scores import write_results
from modeling_gppc.evaluation.report import markdown_table
from modeling_gppc.fitting.fit_linear_response import initialize_linear_response
from modeling_gppc.modeling_gppc import IGNORED_LABEL
from modeling_gppc.normalization_gppc import normalize_counts

REVEAL = PerturbationOptions(min_genes=1, max_genes=5)
WARMUP = 0.1  # share of the budget
SCORED = ("validation", "test")  # cells of the training donors, and donors of their own
SETTINGS = {
    "num_factors": 16,
    "num_components": 8,
    "num_latents": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "readout_size": 64,
    # Safety out of distribution is another question, and would hold every form back alike.
    "num_references": 0,
}


@dataclasses.dataclass
class Pairs:
    """Draws pairs of cells.

    Args:
        cells (`Cells`): All cells.
        rows (`np.ndarray`): Which of them pairs are made of.
        seed (`int`): Of the draws.
    """

    cells: Cells
    rows: np.ndarray
    seed: int

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)
        self.members = []
        for labels in (self.cells.cell_type, self.cells.donor):
            order = self.rows[np.argsort(labels[self.rows], kind="stable")]
            _, start, count = np.unique(labels[order], return_index=True, return_counts=True)
            self.members.append((order, start, count))

    def draw(self, n: int) -> dict[str, torch.Tensor]:
        """`n` pairs as dense tensors: the cells, what is revealed, the pairing."""
        pairing = self.rng.integers(0, 2, n)
        source, target = np.empty(n, int), np.empty(n, int)
        for which, (order, start, count) in enumerate(self.members):
            chosen = np.flatnonzero(pairing == which)
            place = self.rng.integers(0, len(order), len(chosen))
            group = np.searchsorted(start, place, side="right") - 1
            shift = 1 + (self.rng.random(len(chosen)) * np.maximum(count[group] - 1, 1)).astype(int)
            target[chosen] = order[place]
            source[chosen] = order[start[group] + (place - start[group] + shift) % count[group]]
        a, b = self.cells.values[source], self.cells.values[target]
        ids, changes, mask = draw_revealed(b - a, self.rng, REVEAL)
        arrays = {
            "source": a,
            "target": b,
            "ids": ids,
            "changes": changes,
            "mask": mask.astype(np.int64),
            "pairing": pairing,
        }
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def encoded(model: GppcForPerturbationPrediction, pairs: dict[str, torch.Tensor]):
    """The shipped encoder's output."""
    source = pairs["source"]
    ids = torch.arange(source.shape[1]).expand(len(source), -1)
    panel = torch.ones(1, source.shape[1], dtype=torch.bool)
    return model.encode(ids, source, None, panel, torch.zeros(len(source), dtype=torch.long))


def labels_of(pairs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Target values, -100 at what was revealed."""
    labels = pairs["target"].clone()
    rows, columns = torch.nonzero(pairs["mask"], as_tuple=True)
    labels[rows, pairs["ids"][rows, columns]] = IGNORED_LABEL
    return labels


@torch.no_grad()
def batch_of(model: GppcForPerturbationPrediction, pairs: dict[str, torch.Tensor], linear: bool) -> Batch:
    """What variants read."""
    response = model.model.linear_response
    source, ids, mask = pairs["source"], pairs["ids"], pairs["mask"]
    centred = source - response.gene_mean
    panel = torch.ones(1, source.shape[1], dtype=torch.bool)
    state = response.encode(centred, panel, torch.zeros(len(source), dtype=torch.long))
    levels = source.gather(1, ids) + pairs["changes"]
    logits, mean, *_ = response.condition(
        state[0], state[2], state[3], pairs["pairing"], ids, levels, mask, None, *state[4:6]
    )
    base = response.gene_mean + (mean @ response.loadings.T if linear else torch.zeros_like(source))
    labels = labels_of(pairs)
    factors = torch.cat([mean, logits.exp()], dim=1)
    return Batch(
        values=source,
        centred=centred,
        ids=ids,
        mask=mask,
        levels=(levels - response.gene_mean[ids]) * mask,
        changes=pairs["changes"] * mask,
        known=torch.cat([state[1], state[0].exp()], dim=1),
        factors=factors if linear else torch.zeros_like(factors),
        base=base,
        pairing=pairs["pairing"],
        labels=labels,
        scored=labels != IGNORED_LABEL,
    )


class Shipped(torch.nn.Module):
    """The shipped model behind the interface of the variants."""

    def __init__(self, model: GppcForPerturbationPrediction):
        super().__init__()
        self.model = model

    def output(self, pairs: dict[str, torch.Tensor]):
        """Of the model."""
        return self.model.decode(
            encoded(self.model, pairs), pairs["ids"], pairs["changes"], pairs["mask"], pairs["pairing"]
        )

    def loss(self, pairs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of the model."""
        return self.model.loss(self.output(pairs), labels_of(pairs))


# Parts of the shipped form: settings without them, or a hook that blanks them.
def _blank(name: str, columns: slice | None = None):
    def remove(model: GppcForPerturbationPrediction) -> None:
        module = model.model.get_submodule(name)
        if columns is None:
            module.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
            return
        third = module.in_features // 3

        def hide(module, inputs):
            kept = torch.ones(module.in_features)
            kept[columns.start * third : columns.stop * third] = 0
            return (inputs[0] * kept,)

        module.register_forward_pre_hook(hide)

    return remove


PARTS = {
    "all parts": ({}, None),
    "without cell states": ({"num_components": 1}, None),
    "without the departure": ({"use_departure": False}, None),
    "without the linear response": ({"use_linear_response": False}, None),
    "without the encoded state": ({}, _blank("state_proj")),
    "without the encoder block": ({"encoder_layers": 0}, None),
    "one latent": ({"num_latents": 1}, None),
    "one decoder block": ({"decoder_layers": 1}, None),
    "without decoder blocks": ({"decoder_layers": 0}, None),
    "without perturbation tokens": ({}, _blank("perturbation_proj")),
    "tokens without identity": ({}, _blank("perturbation_proj", slice(0, 1))),
    "tokens without the imposed level": ({}, _blank("perturbation_proj", slice(1, 2))),
    "tokens without the change": ({}, _blank("perturbation_proj", slice(2, 3))),
    "without the linear posterior's token": ({}, _blank("factor_proj")),
    "without the pairing's embedding": ({}, _blank("pairing_embedding")),
    "without the learned variance": ({"variance_loss_weight": 0.0}, None),
    "without familiarity": ({"num_references": 0}, None),
}


def start(
    cells: Cells, train: np.ndarray, validation: np.ndarray, seed: int, starts: dict, **settings
) -> GppcForPerturbationPrediction:
    """The shipped model with its closed-form start, which is fitted once for all forms with as many cell states."""
    torch.manual_seed(seed)
    config = GppcConfig(vocab_size=cells.values.shape[1], pairings=PAIRINGS, **(SETTINGS | settings))
    model = GppcForPerturbationPrediction(config)
    response, key = model.model.linear_response, (seed, config.num_components)
    if key not in starts:
        with tempfile.TemporaryDirectory() as scratch:
            splits = {"train": train, "validation": validation}
            tables = {name: training_pairs(cells, rows, 3, seed, REVEAL) for name, rows in splits.items()}
            folder = write_folder(Path(scratch) / "pairs", cells, tables)
            datasets = [PairDataset(folder.split(name), folder.pairings) for name in splits]
            initialize_linear_response(model, *datasets, folder.panels, max_cells=6_000, n_iterations=20, seed=seed)
        starts[key] = copy.deepcopy(response.state_dict())
    response.load_state_dict(starts[key])
    return model.eval()


def train_for(module, batches: Iterator, seconds: float, learning_rate: float = 1e-3) -> int:
    """Trains for so many CPU seconds, warm-up and cosine over them; returns the number of steps."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    module.train()
    began, steps = time.process_time(), 0
    while (share := (time.process_time() - began) / seconds) < 1:
        rate = min(share / WARMUP, 0.5 * (1 + np.cos(np.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * max(rate, 0.01)
        loss = module.loss(next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        steps += 1
    module.eval()
    return steps


@torch.inference_mode()
def score(predict, tests: list[dict[str, torch.Tensor]], mean: torch.Tensor) -> dict:
    """r2 of each pairing, and coverage and CRPS where there is a variance; `predict` gives mean and log variance."""
    sums = np.zeros((2, 3))
    spread = np.zeros(3)
    for pairs in tests:
        expected, logvar = predict(pairs)
        labels = labels_of(pairs)
        scored = labels != IGNORED_LABEL
        for which in (0, 1):
            kept = scored & (pairs["pairing"] == which)[:, None]
            errors = [((values - labels).square()[kept]).sum().item() for values in (expected, mean.expand_as(labels))]
            sums[which] += [*errors, kept.sum().item()]
        if logvar is not None:
            arguments = [tensor.numpy() for tensor in (expected, logvar.exp(), labels)]
            kept = scored.numpy()
            spread += [interval_coverage(*arguments)[kept].sum(), gaussian_crps(*arguments)[kept].sum(), kept.sum()]
    scores = {f"r2_{name}": 1 - sums[which, 0] / sums[which, 1] for which, name in enumerate(PAIRINGS)}
    scores["mse"] = sums[:, 0].sum() / sums[:, 2].sum()
    if spread[2]:
        scores |= {"coverage90": spread[0] / spread[2], "crps": spread[1] / spread[2]}
    return scores


def run_variant(name: str, cells: Cells, split: dict, arguments: argparse.Namespace, seed: int, starts: dict) -> dict:
    """Trains and scores one variant or the shipped form without a part; `starts` keeps what can be used again."""
    train = Pairs(cells, split["train"], seed)
    settings, remove = PARTS.get(name, ({}, None))
    model = start(cells, split["train"], split["validation"], seed, starts, **settings)
    scored = {
        name: [Pairs(cells, split[name], 1_000 + index).draw(256) for index in range(arguments.test_batches)]
        for name in SCORED
    }
    mean = model.model.linear_response.gene_mean
    shape = name.removesuffix(", no linear path")
    linear = shape == name
    torch.manual_seed(seed)
    if shape in PARTS or shape == "shipped":
        if remove is not None:
            remove(model)
        if not linear:
            model.config.use_linear_response = False
            _blank("factor_proj")(model)
        module = Shipped(model)
        batches = (train.draw(arguments.batch_size) for _ in itertools.count())

        def predict(pairs):
            output = module.output(pairs)
            return output.logits, output.logvar

    else:
        module: Variant = make_variant(shape, model.config, train.draw(1_024)["target"])
        batches = (batch_of(model, train.draw(arguments.batch_size), linear) for _ in itertools.count())

        def predict(pairs):
            return module(batch_of(model, pairs, linear)), None

    began = time.process_time()
    steps = train_for(module, batches, arguments.seconds) if model.config.use_departure else 0
    entry = {"name": name, "seed": seed, "steps": steps, "seconds": time.process_time() - began}
    parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    scores = {part: score(predict, pairs, mean) for part, pairs in scored.items()}
    return (
        entry | {"parameters": parameters} | {f"{part}_{key}": v for part in SCORED for key, v in scores[part].items()}
    )


def split_donors(cells: Cells, seed: int, share: float = 0.2) -> dict[str, np.ndarray]:
    """Rows for training, validation (cells) and test (at least one whole donor)."""
    donors = np.unique(cells.donor)
    rng = np.random.default_rng(seed)
    held = rng.permutation(donors)[: max(1, round(share * len(donors)))]
    test = np.isin(cells.donor, held)
    validation = ~test & (rng.random(len(test)) < 0.08)
    return {
        "train": np.flatnonzero(~test & ~validation),
        "validation": np.flatnonzero(validation),
        "test": np.flatnonzero(test),
    }


def synthetic_cells(n_cells: int, n_genes: int) -> Cells:
    """Cells of the count form, one data set that measures everything."""
    config = SyntheticConfig(
        form="count",
        n_genes=n_genes,
        n_cells=n_cells,
        n_cell_types=5,
        n_donors=10,
        n_datasets=1,
        measured_share=1.0,
        regulator_measured_share=1.0,
        library_mean=3_000,
        type_scale=1.5,
    )
    adata = make_anndata(make_network(config), 0)
    counts = adata.X.toarray()
    return Cells(
        values=normalize_counts(counts, counts.sum(1, dtype=np.float64)[:, None]),
        cell_type=adata.obs["cell_type"].astype(str).to_numpy(),
        donor=adata.obs["donor_id"].astype(str).to_numpy(),
        perturbed=np.zeros(len(counts), dtype=bool),
        symbols=[str(name) for name in adata.var_names],
    )


def spread(values: list[float], digits: int = 4) -> str:
    """Mean and standard deviation over the seeds."""
    return (
        f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"
        if len(values) > 1
        else f"{values[0]:.{digits}f}"
    )


def report(results: list[dict]) -> str:
    """Means over the seeds with their standard deviation: on validation the difference from the first row's seeds,
    which is what forms are chosen by; then the scores on the test."""
    rows = []
    first = {entry["seed"]: entry for entry in results if entry["name"] == results[0]["name"]}
    for name in dict.fromkeys(entry["name"] for entry in results):
        entries = [entry for entry in results if entry["name"] == name]
        row = [name, f"{entries[0]['parameters']:,}", f"{np.mean([entry['steps'] for entry in entries]):,.0f}"]
        for key in (f"validation_r2_{pairing}" for pairing in PAIRINGS):
            row.append(spread([entry[key] - first[entry["seed"]][key] for entry in entries]))
        row += [spread([entry[f"test_r2_{pairing}"] for entry in entries]) for pairing in PAIRINGS]
        for key in ("test_coverage90", "test_crps"):
            row.append(f"{np.mean([entry[key] for entry in entries]):.4f}" if key in entries[0] else "")
        rows.append(row)
    header = ["variant", "parameters", "steps"]
    header += [f"validation r2, {pairing}, - first row" for pairing in PAIRINGS]
    header += [f"test r2, {pairing}" for pairing in PAIRINGS]
    return markdown_table([*header, "90 % coverage", "CRPS"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, help="AnnData file of raw counts with `cell_type` and `donor_id`")
    parser.add_argument("--synthetic", action="store_true", help="made-up cells of the count form")
    parser.add_argument("--table", choices=("shapes", "parts"), default="shapes")
    parser.add_argument("--only", nargs="*", help="some of the rows")
    parser.add_argument("--genes", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=25, help="CPU seconds of training a variant and seed")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-batches", type=int, default=12)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--smoke", action="store_true", help="tiny cells, few steps, both tables")
    arguments = parser.parse_args()
    if not (arguments.smoke or arguments.synthetic or arguments.cells):
        parser.error("give --cells FILE.h5ad, --synthetic or --smoke")
    torch.set_num_threads(1)
    if arguments.smoke:
        arguments.genes, arguments.seconds, arguments.seeds, arguments.test_batches = 30, 0.05, 1, 1
        cells = synthetic_cells(600, arguments.genes)
    elif arguments.synthetic:
        cells = synthetic_cells(8_000, 300)
    else:
        cells = read_cells(arguments.cells)
    split = split_donors(cells, seed=0)
    cells = cells.with_genes(
        variable_genes(cells.values[split["train"]], arguments.genes, always=np.zeros(0, dtype=int))
    )
    shapes = [*VARIANTS, *(f"{name}, no linear path" for name in ("shipped", "queries cross-attend"))]
    names = shapes if arguments.table == "shapes" else list(PARTS)
    names = [*shapes, *PARTS] if arguments.smoke else arguments.only or names
    results, starts = [], {}
    for name, seed in tqdm(list(itertools.product(names, range(arguments.seeds))), desc="variants", unit="run"):
        results.append(run_variant(name, cells, split, arguments, seed, starts))
        if arguments.out is not None:
            write_results({"results": results, "seconds": arguments.seconds}, arguments.out)
    print(report(results))


if __name__ == "__main__":
    main()
