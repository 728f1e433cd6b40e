"""Training straight from the store: which pairs a run streams, and how a batch of them becomes model inputs."""

import dataclasses

import numpy as np
import pyarrow as pa
import torch

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.pair_options import PairOptions
from modeling_gppc.training.arguments import TrainingOptions


@dataclasses.dataclass
class TableCollator:
    """Turns a table of pair rows into model inputs, as training from a folder does, in a stream's workers. It redraws
    nothing: a stream draws the imposed genes itself. Pairings are in the order of the model's ids."""

    collator: PairCollator
    pairings: list[str]

    def __call__(self, table: pa.Table) -> dict[str, torch.Tensor]:
        """Model inputs of all rows of a table in `PAIR_SCHEMA`, as [`PairCollator`] makes them."""
        rows = PairDataset(table, self.pairings).__getitems__(np.arange(table.num_rows))
        # Positions mean nothing here; the cells tell batches apart where the collator draws query genes.
        rows.rows = table.column("source_soma_joinid").to_numpy()
        return self.collator(rows)


def sample_rows(pairs: PairOptions, training: TrainingOptions) -> int:
    """Training rows that a streaming run writes beside its stream, about: what the closed-form start reads."""
    return len(pairs.matching.pairings) * training.linear_start_cells


def open_stream(
    folder: PairFolder,
    training: TrainingOptions,
    pool_shards: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
):
    """The training pairs of process `rank`, batch after batch of model inputs without end, each batch drawn from
    `pool_shards` shards; `ValueError` if the store makes fewer shards than there are readers."""
    # Reads cells, with the libraries that this takes.
    from data_scripts.batches.stream_pairs import PairStream

    collator = PairCollator(folder.panels, seed=seed, n_query_genes=training.n_query_genes)
    return PairStream(
        folder.path,
        batch_size=training.per_device_train_batch_size,
        pool_shards=pool_shards,
        seed=seed,
        num_workers=training.dataloader_num_workers,
        rank=rank,
        world_size=world_size,
        transform=TableCollator(collator, folder.pairings),
        endless=True,
    )
