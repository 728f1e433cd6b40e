"""The trainer: exact errors, kept checkpoints, what it logs, workers that change nothing."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_runs import N_GENES, arguments, distance, last_weights, logged, train_module, write_run_pairs

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.pair_folder import PairFolder
from modeling_gppc import GppcConfig, GppcForPerturbationPrediction
from modeling_gppc.modeling_gppc import IGNORED_LABEL
from modeling_gppc.training import throughput as throughput_module
from modeling_gppc.training.arguments import TrainingOptions
from modeling_gppc.training.throughput import Throughput, summarize
from modeling_gppc.training.trainer import make_trainer

SIZES = {"num_factors": 3, "num_components": 2, "num_latents": 2, "hidden_size": 8, "intermediate_size": 16}
SMALL = {**SIZES, "readout_size": 8, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_run_pairs(tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture(scope="module")
def folder(pairs):
    return PairFolder(pairs)


def trainer_for(folder, out, **options):
    torch.manual_seed(0)
    model = GppcForPerturbationPrediction(GppcConfig(vocab_size=N_GENES, pairings=folder.pairings, **SMALL))
    for tensor in (model.readout.gene_vectors, model.readout.gene_vectors_logvar, model.readout.gene_logvar):
        torch.nn.init.normal_(tensor, std=0.1)
    settings = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 2, "use_cpu": True}
    sizes = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 8, "dataloader_num_workers": 0}
    return make_trainer(
        model,
        TrainingOptions(**{**settings, **sizes, **options}),
        out,
        0,
        PairDataset(folder.split("train"), folder.pairings),
        PairDataset(folder.split("validation"), folder.pairings),
        PairCollator(folder.panels),
        PairCollator(folder.panels),
    )


def by_hand(model, folder, name="validation"):
    """Errors over all rows at once, in float64."""
    rows = PairDataset(folder.split(name), folder.pairings)
    batch = PairCollator(folder.panels)(rows.__getitems__(range(len(rows))))
    labels = batch.pop("labels").double().numpy()
    with torch.no_grad():
        output = model.eval()(**batch)
    scored = labels != IGNORED_LABEL
    logits, logvar, linear = (
        tensor.double().numpy()[scored] for tensor in (output.logits, output.logvar, output.linear_response)
    )
    target = labels[scored]
    mean = np.broadcast_to(model.model.linear_response.gene_mean.double().numpy(), labels.shape)[scored]
    squared = (logits - target) ** 2
    return {
        "eval_mse": squared.mean(),
        "eval_linear_mse": ((linear - target) ** 2).mean(),
        "eval_r2": 1 - squared.sum() / ((mean - target) ** 2).sum(),
        "eval_nll": (0.5 * (logvar + squared * np.exp(-logvar) + math.log(2 * math.pi))).mean(),
    }


@pytest.mark.parametrize("batch", [8, 45, 64, 7])
def test_evaluation_is_exact_for_any_batch(folder, tmp_path, batch):
    trainer = trainer_for(folder, tmp_path, per_device_eval_batch_size=batch)
    found, wanted = trainer.evaluate(), by_hand(trainer.model, folder)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)


def test_loss_of_a_step_is_the_mean_over_its_scored_genes(folder):
    rows = PairDataset(folder.split("train"), folder.pairings)
    collate = PairCollator(folder.panels)
    torch.manual_seed(0)
    model = GppcForPerturbationPrediction(GppcConfig(vocab_size=N_GENES, pairings=["same_type"], **SMALL)).eval()
    whole = collate(rows.__getitems__(range(30)))
    parts = [collate(rows.__getitems__(range(*ends))) for ends in ((0, 3), (3, 30))]
    counts = [int((part["labels"] != IGNORED_LABEL).sum()) for part in parts]
    assert counts[0] / 3 != counts[1] / 27  # a mean of means would be another number
    summed = sum(model(**part, num_items_in_batch=torch.tensor(sum(counts))).loss for part in parts)
    torch.testing.assert_close(summed, model(**whole).loss, atol=1e-6, rtol=0)
    means = [model(**part).loss.item() for part in parts]
    assert abs(np.mean(means) - summed.item()) > 1e-4
    torch.testing.assert_close(
        model(**whole, num_items_in_batch=10**6).loss * 10**6 / sum(counts), model(**whole).loss
    )


def with_errors(trainer, errors):
    """Lets evaluations find the given errors."""
    coming = iter(errors)

    def evaluate(*_, **__):
        metrics = {"eval_mse": next(coming), "eval_linear_mse": 1.0, "eval_r2": 0.0}
        trainer.log(dict(metrics))
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    trainer.evaluate = evaluate


def test_best_and_last_are_kept(folder, tmp_path):
    trainer = trainer_for(folder, tmp_path, max_steps=10, save_total_limit=2)
    with_errors(trainer, [0.5, 0.3, 0.4, 0.6, 0.7])
    trainer.train_or_load(None)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = GppcForPerturbationPrediction.from_pretrained(tmp_path / "checkpoint-4")
    assert distance(best.state_dict(), trainer.model.state_dict()) == 0  # what is scored and saved in the end
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")
    names = {path.name for path in (tmp_path / "checkpoint-10").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "checkpoint.json"} <= names


def test_the_best_is_saved_where_no_checkpoint_was_due(folder, tmp_path):
    trainer = trainer_for(folder, tmp_path, max_steps=6, eval_steps=1, save_steps=6)
    with_errors(trainer, [0.5, 0.2, 0.4, 0.6, 0.7, 0.8])
    trainer.train_or_load(None)
    assert trainer.state.best_global_step == 2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]


def test_log_says_how_fast_training_is(folder, tmp_path):
    trainer = trainer_for(folder, tmp_path, max_steps=6)
    trainer.train_or_load(None)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    rows = PairDataset(folder.split("train"), folder.pairings)
    tokens_per_cell = np.mean([len(row) for row in rows.table.column("source_gene_ids").to_pylist()])
    for entry in entries:
        assert entry["cells_per_second"] > 0 and 0 <= entry["data_wait_share"] < 1
        assert entry["tokens_per_second"] / entry["cells_per_second"] == pytest.approx(tokens_per_cell, rel=0.3)
        assert 0.05 < entry["peak_memory_gb"] < 50 and entry["tflop_per_second"] >= 0
    assert trainer.state.total_flos == pytest.approx(trainer.throughput.flop_per_cell * 6 * 16)


def test_operations_are_those_of_the_matrix_products():
    weight = torch.randn(5, 7, requires_grad=True)
    throughput = Throughput()
    with throughput.measure(cells=3):
        (torch.randn(3, 5) @ weight).sum().backward()
    assert throughput.flop_per_cell == 2 * (2 * 5 * 7)  # forward, and backward to the weight


def test_waiting_for_others_is_no_waiting_for_data(monkeypatch):
    """Two batches that take 2 s each to come; then 5 s for the other processes and 10 s for the step itself."""
    clock = [0.0]
    monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: clock[0])

    def batches():
        for _ in range(2):
            clock[0] += 2
            yield {"input_ids": torch.zeros(3, 4), "attention_mask": torch.ones(3, 4)}

    throughput = Throughput()
    throughput.start()
    found = list(throughput.timed(batches()))
    clock[0] += 5
    throughput.fetched(found)
    clock[0] += 10
    throughput.stop()
    assert (throughput.waited, throughput.elapsed) == (4, 19)
    assert (throughput.cells, int(throughput.tokens)) == (6, 24)


def test_summary_of_processes():
    totals = torch.tensor([[10, 100, 2.0, 0.5, 4e12, 1.5], [30, 200, 4.0, 0.0, 8e12, 1.0]], dtype=torch.float64)
    assert summarize(totals) == {
        "cells_per_second": 10.0,
        "tokens_per_second": 75.0,
        "data_wait_share": 0.125,
        "tflop_per_second": 3.0,
        "peak_memory_gb": 1.5,
    }


@pytest.mark.parametrize(
    ("name", "value"), [("dataloader_num_workers", 2), ("gradient_checkpointing", "true"), ("deterministic", "true")]
)
def test_how_it_is_computed_changes_nothing(pairs, tmp_path, name, value):
    outs = []
    for index, flags in enumerate(({}, {f"training__{name}": value})):
        outs.append(tmp_path / str(index))
        steps = {"training__max_steps": 16, "training__eval_steps": 8, "training__save_steps": 8}
        assert train_module().main(arguments(pairs, outs[-1], model__hidden_dropout_prob=0.2, **steps, **flags)) == 0
    torch.use_deterministic_algorithms(False)
    assert logged(outs[0], "loss") == pytest.approx(logged(outs[1], "loss"), abs=1e-6)
    assert distance(last_weights(outs[0]), last_weights(outs[1])) < 1e-6


@pytest.mark.parametrize("schedule", ["linear", "constant_with_warmup", "cosine_with_min_lr"])
def test_schedules_and_bf16(folder, tmp_path, schedule):
    extra = {"lr_scheduler_kwargs": {"min_lr": 1e-4}} if "min_lr" in schedule else {}
    trainer = trainer_for(folder, tmp_path, lr_scheduler_type=schedule, precision="bf16", warmup_steps=1, **extra)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train_or_load(None)
    assert distance(before, trainer.model.state_dict()) > 1e-4
    assert all(tensor.dtype == torch.float32 for tensor in trainer.model.state_dict().values())
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())


def test_gradients_are_clipped(folder, tmp_path):
    free = trainer_for(folder, tmp_path / "free", max_grad_norm=0.0)
    clipped = trainer_for(folder, tmp_path / "clipped", max_grad_norm=1e-3)
    norms = {}
    for name, trainer in (("free", free), ("clipped", clipped)):
        step = trainer.create_optimizer()
        before, seen = step.step, []

        def recorded(*args, seen=seen, trainer=trainer, before=before, **kwargs):
            squares = [p.grad.square().sum() for p in trainer.model.parameters() if p.grad is not None]
            seen.append(float(torch.stack(squares).sum().sqrt()))
            return before(*args, **kwargs)

        step.step = recorded
        trainer.train()
        norms[name] = seen
    assert max(norms["clipped"]) <= 1.001e-3 < min(norms["free"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 300}, "300 pairs in a step over 1 process"),
        ({"per_device_train_batch_size": 100, "gradient_accumulation_steps": 3}, "300 pairs in a step"),
    ],
)
def test_too_few_pairs_for_a_step(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_for(folder, tmp_path, **options)


def test_no_validation_pairs(tmp_path):
    folder = PairFolder(write_run_pairs(tmp_path / "pairs", {"train": 40, "validation": 0, "test": 5}))
    with pytest.raises(ValueError, match="validation"):
        trainer_for(folder, tmp_path / "out")
