"""GppcTrainer: the Trainer of transformers with exact held-out errors, exact resumption and exact parallel runs."""

import contextlib
import dataclasses
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import IterableDataset, Sampler, Subset
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import TrainerControl
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import SAFE_WEIGHTS_NAME

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.modeling_gppc import IGNORED_LABEL
from modeling_gppc.training.arguments import TrainingOptions
from modeling_gppc.training.checkpoints import UNFINISHED, clear_unfinished, publish, rotate
from modeling_gppc.training.throughput import Throughput, summarize

logger = logging.getLogger(__name__)
STATE_FILE = "trainer_state.json"
MODEL_FOLDER = "model"  # of a run's folder: the finished model and all that is known of it
LINUX = sys.platform == "linux"


class EpochSampler(Sampler):
    """A new order of the rows in every epoch, cut to whole optimiser steps of `rows_per_step` pairs over all
    processes.

    It depends on seed and epoch alone, whatever the number of processes or accumulated batches, also after resumption.
    The epoch is the data set's: the loaders of accelerate do not reach a sampler behind skipped batches.
    """

    def __init__(self, dataset: PairDataset, rows_per_step: int, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.n_rows = len(dataset) // rows_per_step * rows_per_step

    def __len__(self) -> int:
        return self.n_rows

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.dataset.epoch]).permutation(len(self.dataset))
        return iter(order[: self.n_rows].tolist())


class PlainProgress(ProgressCallback):
    """The bar of transformers with a line a person can read for each evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Loss and speed go beside the bar; validation errors get a line."""
        if self.training_bar is None or not logs:
            return
        if "loss" in logs and "cells_per_second" in logs:
            self.training_bar.set_postfix_str(
                f"loss {logs['loss']:.4f}, {logs['cells_per_second']:,.0f} cells/s, "
                f"data wait {logs['data_wait_share']:.1%}"
            )
        if "eval_mse" in logs:
            self.training_bar.write(
                f"step {state.global_step}: validation mse {logs['eval_mse']:.5f} "
                f"(linear response {logs['eval_linear_mse']:.5f}), r2 {logs['eval_r2']:.4f}"
            )


class GppcTrainer(Trainer):
    """
    Trains on pair rows, or on batches that a [`~data_scripts.batches.stream_pairs.PairStream`] hands out.

    The loss of an optimiser step is a mean over the scored genes of all its pairs, however they are spread over
    processes and accumulated batches. Checkpoints appear whole or not at all; the best and the last ones stay.

    Args:
        eval_collator ([`PairCollator`], *optional*): Collator of evaluation rows: stored perturbations, all genes.
    """

    def __init__(self, *args, eval_collator: PairCollator | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator
        self.throughput = Throughput()
        self.began = time.monotonic()
        self._writing = False

    @property
    def stream(self):
        """The stream of pairs that is trained on, `None` where rows are stored."""
        return self.train_dataset if isinstance(self.train_dataset, IterableDataset) else None

    def get_train_dataloader(self):
        """As in transformers; a stream is its own loader, for every process reads cells of its own: nothing is left
        to be shared out among processes or fetched ahead."""
        return super().get_train_dataloader() if self.stream is None else self.stream

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return EpochSampler(
            self.train_dataset if train_dataset is None else train_dataset,
            self.get_total_train_batch_size(self.args),
            self.args.data_seed,
        )

    def get_eval_dataloader(self, eval_dataset=None):
        """As in transformers, with the collator of evaluation."""
        train_collator, self.data_collator = self.data_collator, self.eval_collator or self.data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in transformers, with the time that waiting for data takes."""
        self.throughput.start()
        # Other processes are waited for in there as well, when the scored genes are counted: that is no lack of data.
        batches, num_items_in_batch = super().get_batch_samples(
            self.throughput.timed(epoch_iterator), num_batches, device
        )
        self.throughput.fetched(batches)
        return batches, num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """As in transformers; the operations of the first step are counted."""
        # A compiled step hides its operations from the counter, a sharded one cannot run under it.
        counted = self.throughput.flop_per_cell > 0 or self.args.torch_compile or self.is_fsdp_enabled
        cells = inputs["input_ids"].shape[0]
        with contextlib.nullcontext() if counted else self.throughput.measure(cells):
            return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs) -> float:
        """Operations of a training step on these pairs, as counted in the first one."""
        return self.throughput.flop_per_cell * inputs["input_ids"].shape[0]

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        self.throughput.stop()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers; entries with a loss also say how fast training was, all processes together."""
        if "loss" in logs:
            totals = self.throughput.totals().to(self.args.device, torch.float32)
            logs.update(summarize(self.accelerator.gather(totals[None]).cpu()))
            self.throughput.reset()
        if self.stream is not None:  # which has no length to take a share of
            self.state.epoch = float(self.stream.epoch)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Exact errors over all evaluation pairs, for any number of processes and an uneven last batch.

        Returns:
            `dict` with `<prefix>_mse` (per scored gene), `<prefix>_linear_mse` (of the linear response alone),
            `<prefix>_r2` (against the gene means of the model) and `<prefix>_nll` (Gaussian, per scored gene).
        """
        start = time.monotonic()
        model = self._wrap_model(self.model, training=False)
        model.eval()
        core = self.accelerator.unwrap_model(model)
        totals = torch.zeros(5, dtype=torch.float64)
        loader = self.get_eval_dataloader(eval_dataset)
        for batch in tqdm(loader, desc="validation", leave=False, disable=not self.is_local_process_zero()):
            batch = self._prepare_inputs(batch)
            labels = batch.pop("labels")
            with self.compute_loss_context_manager():
                output = model(**batch)
            sums = row_errors(core, output, labels)
            totals += self.accelerator.gather_for_metrics(sums).double().cpu().sum(0)
        squared, linear, around_mean, likelihood, count = totals.tolist()
        count = max(count, 1.0)
        metrics = {
            f"{metric_key_prefix}_mse": squared / count,
            f"{metric_key_prefix}_linear_mse": linear / count,
            f"{metric_key_prefix}_r2": 1.0 - squared / around_mean if around_mean > 0 else math.nan,
            f"{metric_key_prefix}_nll": likelihood / count,
            f"{metric_key_prefix}_runtime": round(time.monotonic() - start, 3),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics, trial) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        # The best is kept, also where a checkpoint was not due.
        self.control.should_save |= best and self.args.save_strategy != SaveStrategy.NO
        return best

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / UNFINISHED) if self._writing else folder

    def _save_checkpoint(self, model, trial) -> None:
        self._writing = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing = False
        self.accelerator.wait_for_everyone()
        self.state.best_model_checkpoint = None if self.state.best_global_step is None else str(self._best_folder())
        if self.args.should_save:
            written = Path(self.args.output_dir) / UNFINISHED / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.state.save_to_json(str(written / STATE_FILE))
            publish(written, self.args.output_dir)
            rotate(self.args.output_dir, self.args.save_total_limit, self.state.best_global_step)
        self.accelerator.wait_for_everyone()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.stream is not None:
            self.stream.save(output_dir)

    def _best_folder(self) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"

    def train_or_load(self, checkpoint: Path | None) -> None:
        """Trains, goes on from a checkpoint, or takes the best model of a run that had come to its end."""
        if self.is_world_process_zero():
            clear_unfinished(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        if checkpoint is None or not is_finished(checkpoint, self.args.max_steps):
            if self.stream is not None and checkpoint is not None:
                self.stream.restore(checkpoint)
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            return
        # One more call of `train` would take one step too many.
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        best = self._best_folder() if self.state.best_global_step is not None else checkpoint
        self.model.load_state_dict(load_file(best / SAFE_WEIGHTS_NAME))

    def create_model_card(self, **_) -> None:
        """Renders the card of the run's model folder from what the run wrote, not the card of transformers."""
        from hub_card.model_card import write_model_card  # only wanted here

        write_model_card(self._model_folder())

    def push_to_hub(self, repo_id: str, **options):
        """Pushes the run's model folder, as `gppc push` does, neither checkpoints nor logs; options and errors are those
        of [`~hub_card.push.push_model`]."""
        from hub_card.push import push_model

        return push_model(self._model_folder(), repo_id, **options)

    def _model_folder(self) -> Path:
        return Path(self.args.output_dir) / MODEL_FOLDER

    def whole_model(self) -> GppcForPerturbationPrediction:
        """The model with all its weights in one place; on every process, for sharded weights have to be gathered."""
        if not isinstance(self.model, FSDPModule):
            return self.model
        weights = self.accelerator.get_state_dict(self.model)
        model = GppcForPerturbationPrediction(self.model.config)
        if self.is_world_process_zero():
            model.load_state_dict(weights)
        return model.eval()


def is_finished(checkpoint: Path, max_steps: int) -> bool:
    """Whether training had come to its end, or stopped early, when the checkpoint was written."""
    state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    control = state.stateful_callbacks.get(TrainerControl.__name__, {}).get("args", {})
    return state.global_step >= max_steps or bool(control.get("should_training_stop"))


def row_errors(model: GppcForPerturbationPrediction, output, labels: torch.Tensor) -> torch.Tensor:
    """Sums over the scored genes of each row: squared error, that of the linear response, that of the gene mean,
    Gaussian negative log-likelihood, and the number of scored genes; shape `(B, 5)`."""
    scored = labels != IGNORED_LABEL
    predictions = (output.logits, output.linear_response, model.model.linear_response.gene_mean)
    errors = [(predicted.float() - labels.float()).where(scored, 0).square() for predicted in predictions]
    logvar = output.logvar.float()
    likelihood = 0.5 * (logvar + errors[0] * torch.exp(-logvar) + math.log(2 * math.pi))
    return torch.stack([part.sum(1) for part in (*errors, likelihood.where(scored, 0), scored.float())], dim=1)


def make_trainer(
    model: GppcForPerturbationPrediction,
    options: TrainingOptions,
    output_dir: str | Path,
    seed: int,
    train: PairDataset | IterableDataset,
    validation: PairDataset,
    train_collator: PairCollator | None,
    eval_collator: PairCollator,
) -> GppcTrainer:
    """A trainer over pair rows, or over a stream of batches, which are collated already; evaluation reads at most
    `options.max_validation_pairs` evenly spaced rows.

    Raises:
        ValueError: If the training pairs do not fill one optimiser step, or there is no validation pair.
    """
    if not len(validation):
        raise ValueError("`pairs` hold no validation pair; give `pairs.splits` a share for `validation`.")
    step = max(1, math.ceil(len(validation) / options.max_validation_pairs))
    known = TrainingArguments.__dataclass_fields__.keys() - {"report_to", "use_cpu"}
    arguments = TrainingArguments(
        **{name: value for name, value in dataclasses.asdict(options).items() if name in known},
        output_dir=str(output_dir),
        run_name=Path(output_dir).name,
        project="gppc",
        seed=seed,
        data_seed=seed,
        full_determinism=options.deterministic,
        eval_strategy="steps",
        save_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="eval_mse",
        greater_is_better=False,
        remove_unused_columns=False,
        ignore_data_skip=isinstance(train, IterableDataset),  # a stream goes on where it stood by itself
        report_to=options.report_to or "none",
        use_cpu=options.use_cpu or not torch.cuda.is_available(),
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        disable_tqdm=False,  # the bar belongs to the main process alone
        # Forked workers share the mapped rows; others would get a copy of them. They touch numpy only.
        dataloader_multiprocessing_context="fork" if options.dataloader_num_workers and LINUX else None,
        # The variance's parameters get no gradient where its likelihood has no weight.
        ddp_find_unused_parameters=model.config.variance_loss_weight == 0 or not model.config.use_network,
        ddp_broadcast_buffers=False,  # they are equal from the start and never change
    )
    patience = options.early_stopping_patience
    trainer = GppcTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation if step == 1 else Subset(validation, range(0, len(validation), step)),
        data_collator=train_collator or eval_collator,
        eval_collator=eval_collator,
        callbacks=[] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)],
    )
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(PlainProgress)
    rows_per_step = trainer.get_total_train_batch_size(arguments)
    if trainer.stream is None and len(train) < rows_per_step:
        raise ValueError(
            f"`training.per_device_train_batch_size` is {options.per_device_train_batch_size}, {rows_per_step} pairs in "
            f"a step over {arguments.world_size} process(es), with {len(train)} training pairs; wanted at most as "
            "many, or more `pairs.matching.pairs_per_cell`."
        )
    return trainer
