"""Settings of a run beside each other over seeds: the same pairs, the same closed-form start, the error on validation.

    python benchmarks/compare_settings.py --table sweep                                      # embedded default
    python benchmarks/compare_settings.py --table muon --config synthetic --training.max_steps 600 ...
    python benchmarks/compare_settings.py --table parts --config synthetic --training.max_steps 1000 ...
    python benchmarks/compare_settings.py --smoke

Every setting is trained with every seed as `train.py` would; a run's error is that of its best evaluation on the
validation pairs. Test pairs are not read. Options of the run are flags, as of `train.py`; they hold for all settings.
"""

import argparse
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from compare_architectures import PARTS, spread
from tqdm.auto import tqdm
from transformers.trainer_utils import SaveStrategy

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.command_line import read_flags
from data_scripts.options import merge
from data_scripts.pairs.pair_folder import PairFolder
from gppc.run_options import RunOptions, parse_options
from gppc.sweep import SweepTrainer
from modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.evaluation.pair_scores import write_results
from modeling_gppc.evaluation.report import markdown_table
from modeling_gppc.fitting.fit_linear_response import initialize_linear_response
from modeling_gppc.training.trainer import make_trainer

# A run of seconds on made-up cells.
SMOKE = {
    "data.synthetic.n_genes": 20,
    "data.synthetic.n_cells": 600,
    "model.num_factors": 3,
    "model.num_components": 2,
    "model.hidden_size": 8,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 8,
    "model.readout_size": 8,
    "training.max_steps": 4,
    "training.warmup_steps": 1,
    "training.eval_steps": 2,
    "training.save_steps": 2,
    "training.per_device_train_batch_size": 16,
    "training.linear_start_iterations": 2,
}


@dataclasses.dataclass
class Setting:
    """What differs from the run as it is configured.

    Args:
        model, training (`dict`): Options.
        muon (`bool`): Muon instead of AdamW for the matrices of the blocks and projections.
        remove (`Callable`, *optional*): Blanks a part of the model.
    """

    model: dict = dataclasses.field(default_factory=dict)
    training: dict = dataclasses.field(default_factory=dict)
    muon: bool = False
    remove: Callable | None = None


# Parts that a small budget on real cells did not tell apart, beside all of them.
UNTOLD = (
    "all parts",
    "without the encoded state",
    "without the encoder block",
    "one latent",
    "one decoder block",
    "without decoder blocks",
    "without perturbation tokens",
    "tokens without identity",
    "tokens without the imposed level",
    "tokens without the change",
    "without the linear posterior's token",
    "without the pairing's embedding",
    "without familiarity",
)
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
WIDER = {"hidden_size": 128, "num_latents": 6, "encoder_layers": 1, "decoder_layers": 3, "hidden_dropout_prob": 0.06}
LINEAR = {"learning_rate": 9.3e-4, "weight_decay": 0.0, "lr_scheduler_type": "linear"}
TABLES = {
    "sweep": {
        "as configured": Setting(),
        "best trial of the sweep": Setting(model=WIDER, training=LINEAR),
        "its sizes alone": Setting(model=WIDER),
        "its learning rate, decay and schedule alone": Setting(training=LINEAR),
    },
    "muon": {
        f"{'Muon' if muon else 'AdamW'}, {rate:g}": Setting(training={"learning_rate": rate}, muon=muon)
        for muon in (False, True)
        for rate in RATES
    },
    "parts": {
        name: Setting(model=options, remove=remove) for name, (options, remove) in PARTS.items() if name in UNTOLD
    },
}


class Both(torch.optim.Optimizer):
    """Two optimisers, each of its own parameters, that a schedule sees as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure=None):
        """A step of each."""
        for optimizer in self.optimizers:
            optimizer.step()


def muon_and_adamw(model: GppcForPerturbationPrediction, options: RunOptions) -> Both:
    """Muon for the matrices between hidden states, AdamW for what belongs to single genes, for biases and norms.

    Muon's steps are scaled to the size of AdamW's, so that both take the same learning rate.
    """
    matrices = {
        module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad
    }
    others = [weight for weight in model.parameters() if weight.requires_grad and weight not in matrices]
    settings = {"lr": options.training.learning_rate, "weight_decay": options.training.weight_decay}
    return Both(
        torch.optim.Muon(list(matrices), adjust_lr_fn="match_rms_adamw", **settings),
        torch.optim.AdamW(others, betas=(0.9, options.training.adam_beta2), fused=True, **settings),
    )


class Comparison:
    """
    Trains settings on the pairs of one run.

    Args:
        options (`RunOptions`): The run as it is configured.
        folder (`PairFolder`): Its pairs.
        pairing (`str`, *optional*): Count the error on validation pairs of this pairing only.
    """

    def __init__(self, options: RunOptions, folder: PairFolder, pairing: str | None):
        self.options, self.folder = options, folder
        self.rows = PairDataset(folder.split("train"), folder.pairings)
        self.validation = PairDataset(folder.split("validation"), folder.pairings)
        self.scored = self.validation
        if pairing is not None:
            table = folder.split("validation")
            self.scored = PairDataset(
                table.filter([name == pairing for name in table.column("pairing").to_pylist()]), folder.pairings
            )
        # The closed-form start does not depend on what is compared here.
        self.starts: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
        self.evaluations: list[dict[str, float]] = []

    def note(self, metrics: dict[str, float]) -> None:
        """An evaluation of the run that is training."""
        self.evaluations.append(metrics)

    def run(self, name: str, setting: Setting, seed: int, scratch: str) -> dict:
        """Trains one setting with one seed."""
        options = dataclasses.replace(
            self.options,
            seed=seed,
            model=merge(self.options.model, setting.model),
            training=dataclasses.replace(self.options.training, dataloader_num_workers=0, **setting.training),
        )
        torch.manual_seed(seed)
        config = options.model_config(vocab_size=self.folder.genes.num_rows, pairings=self.folder.pairings)
        model = GppcForPerturbationPrediction(config)
        response, settings = model.model.linear_response, options.training
        start = (seed, config.num_components, config.num_references)
        if start not in self.starts:
            initialize_linear_response(
                model,
                self.rows,
                self.validation,
                self.folder.panels,
                max_cells=settings.linear_start_cells,
                n_iterations=settings.linear_start_iterations,
                seed=seed,
            )
            self.starts[start] = {key: tensor.clone() for key, tensor in response.state_dict().items()}
        response.load_state_dict(self.starts[start])
        if setting.remove is not None:
            setting.remove(model)
        trainer = make_trainer(
            model,
            settings,
            scratch,
            seed,
            self.rows,
            self.scored,
            PairCollator(self.folder.panels, options.pairs.perturbation, seed=seed),
            PairCollator(self.folder.panels),
            trainer_class=SweepTrainer,
        )
        trainer.sweep = self
        trainer.args.save_strategy, trainer.args.load_best_model_at_end = SaveStrategy.NO, False
        if setting.muon:
            trainer.optimizer = muon_and_adamw(model, options)
        self.evaluations = []
        began = time.process_time()
        trainer.train()
        best = min(self.evaluations, key=lambda metrics: metrics["eval_mse"])
        return {
            "name": name,
            "seed": seed,
            "mse": best["eval_mse"],
            "linear_mse": best["eval_linear_mse"],
            "nll": best["eval_nll"],
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds": time.process_time() - began,
        }


def report(results: list[dict]) -> str:
    """Means over the seeds with their standard deviation, and the same of the difference from the first row's seeds."""
    rows = []
    first = {entry["seed"]: entry["mse"] for entry in results if entry["name"] == results[0]["name"]}
    for name in dict.fromkeys(entry["name"] for entry in results):
        entries = [entry for entry in results if entry["name"] == name]
        rows.append(
            [
                name,
                spread([entry["mse"] for entry in entries], 5),
                spread([100 * (entry["mse"] / first[entry["seed"]] - 1) for entry in entries], 2),
                spread([100 * (entry["mse"] / entry["linear_mse"] - 1) for entry in entries], 2),
                f"{np.mean([entry['nll'] for entry in entries]):.4f}",
                f"{entries[0]['parameters']:,}",
                f"{np.mean([entry['seconds'] for entry in entries]):.0f}",
            ]
        )
    header = ["setting", "validation MSE", "against the first row, %", "against the linear response, %"]
    return markdown_table([*header, "NLL", "parameters", "CPU s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=tuple(TABLES), default="sweep")
    parser.add_argument("--only", nargs="*", help="some of the rows")
    parser.add_argument("--config", default="default", help="YAML file of the run, or the name of a shipped one")
    parser.add_argument("--pairing", help="count the error on validation pairs of this pairing only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="made-up cells, few steps, every table")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments, flags = parser.parse_known_args()
    if arguments.smoke:
        arguments.config, arguments.seeds, flags = "synthetic", 1, [f"--{key}={value}" for key, value in SMOKE.items()]
    torch.set_num_threads(1)
    tables = list(TABLES.values()) if arguments.smoke else [TABLES[arguments.table]]
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        if "output_dir" not in read_flags(flags, RunOptions):
            flags = [*flags, "--output_dir", f"{scratch}/run"]
        options = parse_options(arguments.config, flags)
        comparison = Comparison(options, options.prepare_pairs(), arguments.pairing)
        chosen = [
            item for table in tables for item in table.items() if not arguments.only or item[0] in arguments.only
        ]
        for (name, setting), seed in tqdm(
            list(itertools.product(chosen, range(arguments.seeds))), desc="settings", unit="run"
        ):
            results.append(comparison.run(name, setting, seed, scratch))
            if arguments.out is not None:
                write_results({"results": results}, arguments.out)
    print(report(results))


if __name__ == "__main__":
    main()
