"""GppcTrainer: the Trainer of transformers with exact held-out errors and checkpoints that are whole or ignored."""

import json
import logging
import math
import time
from pathlib import Path

import torch
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_gppc.modeling_gppc import IGNORED_LABEL, GppcForPerturbationPrediction
from modeling_gppc.training.arguments import TrainingOptions
from modeling_gppc.training.data_collator import PairCollator
from modeling_gppc.training.pair_dataset import PairDataset

logger = logging.getLogger(__name__)
# Written in this order; the last one tells that the others are there.
CHECKPOINT_FILES = ("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


class GppcTrainer(Trainer):
    """
    Trains on pair rows.

    Args:
        eval_collator ([`PairCollator`], *optional*): Collator of evaluation rows: stored perturbations, all genes.
    """

    def __init__(self, *args, eval_collator: PairCollator | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator

    def get_eval_dataloader(self, eval_dataset=None):
        """As in transformers, with the collator of evaluation."""
        train_collator, self.data_collator = self.data_collator, self.eval_collator or self.data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

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


def row_errors(model: GppcForPerturbationPrediction, output, labels: torch.Tensor) -> torch.Tensor:
    """Sums over the scored genes of each row: squared error, that of the linear response, that of the gene mean,
    Gaussian negative log-likelihood, and the number of scored genes; shape `(B, 5)`."""
    scored = labels != IGNORED_LABEL
    target = torch.where(scored, labels, torch.zeros_like(labels)).float()

    def squared(predicted: torch.Tensor) -> torch.Tensor:
        return torch.where(scored, predicted.float() - target, torch.zeros_like(target)).square()

    error = squared(output.logits)
    linear = error if output.linear_response is None else squared(output.linear_response)
    mean = model.model.linear_response.gene_mean if model.model is not None else torch.zeros_like(target[0])
    likelihood = torch.zeros_like(error)
    if output.logvar is not None:
        logvar = output.logvar.float()
        likelihood = 0.5 * (logvar + error * torch.exp(-logvar) + math.log(2 * math.pi))
        likelihood = torch.where(scored, likelihood, torch.zeros_like(likelihood))
    parts = (error, linear, squared(mean.expand_as(target)), likelihood, scored.float())
    return torch.stack([part.sum(1) for part in parts], dim=1)


def training_arguments(options: TrainingOptions, output_dir: str | Path, seed: int) -> TrainingArguments:
    """Arguments of the Trainer for the options of a run."""
    return TrainingArguments(
        output_dir=str(output_dir),
        seed=seed,
        data_seed=seed,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        adam_beta2=options.adam_beta2,
        max_grad_norm=options.max_grad_norm,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=options.warmup_steps,
        per_device_train_batch_size=options.per_device_train_batch_size,
        per_device_eval_batch_size=options.per_device_eval_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        logging_steps=options.logging_steps,
        load_best_model_at_end=True,
        metric_for_best_model="eval_mse",
        greater_is_better=False,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_num_workers=options.dataloader_num_workers,
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        gradient_checkpointing=options.gradient_checkpointing,
        torch_compile=options.torch_compile,
        report_to=options.report_to or "none",
        use_cpu=options.use_cpu or not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )


def make_trainer(
    model: GppcForPerturbationPrediction,
    options: TrainingOptions,
    output_dir: str | Path,
    seed: int,
    train: PairDataset,
    validation: PairDataset,
    train_collator: PairCollator,
    eval_collator: PairCollator,
) -> GppcTrainer:
    """A trainer over pair rows; evaluation reads at most `options.max_validation_pairs` evenly spaced rows."""
    if len(train) < options.per_device_train_batch_size:
        raise ValueError(
            f"`training.per_device_train_batch_size` is {options.per_device_train_batch_size} with {len(train)} "
            "training pairs; wanted at most as many, or more `pairs.matching.pairs_per_cell`."
        )
    step = max(1, math.ceil(len(validation) / options.max_validation_pairs))
    callbacks = []
    if options.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=options.early_stopping_patience))
    return GppcTrainer(
        model=model,
        args=training_arguments(options, output_dir, seed),
        train_dataset=train,
        eval_dataset=validation if step == 1 else Subset(validation, range(0, len(validation), step)),
        data_collator=train_collator,
        eval_collator=eval_collator,
        callbacks=callbacks,
    )


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that is whole; half-written ones are skipped with a warning."""
    found = []
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rsplit("-", 1)[1]
        if step.isdigit():
            found.append((int(step), path))
    for _, path in sorted(found, reverse=True):
        if is_whole(path):
            return path
        logger.warning("checkpoint %s is half-written and skipped", path.name)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is there and its last one, the trainer's state, can be read."""
    if not all((checkpoint / name).is_file() for name in CHECKPOINT_FILES):
        return False
    try:
        return "global_step" in json.loads((checkpoint / CHECKPOINT_FILES[-1]).read_text())
    except ValueError:
        return False
