"""A Trainer that reads a stream of pairs, stopped and resumed, ends with the weights of an uninterrupted one."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from pair_store import make_store
from transformers import Trainer, TrainingArguments

from data_scripts.batches.stream_checkpoint import StreamCheckpoint, restore_stream
from data_scripts.batches.stream_pairs import PairStream, StreamOptions
from data_scripts.options import from_mapping
from data_scripts.pairs.census_pairs import plan_pairs
from data_scripts.pairs.pair_options import PairOptions


def tensors(table: pa.Table) -> dict[str, torch.Tensor]:
    """Library sizes of both cells, standing for what a collator makes."""
    sides = [table.column(f"{side}_library_size").to_numpy() for side in ("source", "target")]
    return {"x": torch.from_numpy(np.log(sides[0])), "y": torch.from_numpy(np.log(sides[1]))}


class Line(torch.nn.Module):
    """y = a x + b, and every x it saw."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x, y):
        """Squared error of the line."""
        return {"loss": ((self.weights[0] * x + self.weights[1] - y) ** 2).mean()}


def first(items: list) -> dict:
    """The stream hands out whole batches."""
    return items[0]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    mapping = {"query": {"uri": str(make_store(folder / "store"))}, "shard_cells": 15, "splits": {"rules": []}}
    return plan_pairs(from_mapping(PairOptions, mapping), folder / "plan", progress=False).out


def train(plan, out, max_steps, resume=None):
    torch.manual_seed(0)
    stream = PairStream(plan, StreamOptions(batch_size=7), transform=tensors, endless=True)
    checkpoint = StreamCheckpoint(stream)
    if resume is not None:
        restore_stream(stream, resume)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=max_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        save_steps=11,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        ignore_data_skip=True,
        remove_unused_columns=False,
    )
    model = Line()
    trainer = Trainer(model, arguments, train_dataset=stream, data_collator=first, callbacks=[checkpoint])
    trainer.train(resume_from_checkpoint=resume)
    return model.weights.detach().numpy()


def test_resumed_training_is_the_uninterrupted_one(plan, tmp_path):
    # 120 cells in batches of at most 7: 33 steps of two batches cross several epochs.
    whole = train(plan, tmp_path / "whole", 33)
    train(plan, tmp_path / "parts", 22)
    resumed = train(plan, tmp_path / "parts", 33, resume=str(tmp_path / "parts" / "checkpoint-22"))
    np.testing.assert_allclose(resumed, whole, rtol=1e-6)
    assert not np.allclose(whole, 0)


def test_checkpoint_without_a_stream(plan, tmp_path):
    with pytest.raises(ValueError, match=r"has no pair_stream-0\.json"):
        restore_stream(PairStream(plan), tmp_path)
