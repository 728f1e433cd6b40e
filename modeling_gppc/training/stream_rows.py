"""Training straight from the store: which pairs a run streams, and how a batch of them becomes model inputs."""

import numpy as np
import pyarrow as pa
import torch

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.pair_folder import PairFolder
from modeling_gppc.training.arguments import RunOptions


class TableCollator:
    """
    Turns a table of pair rows into model inputs, as training from a folder does; runs in a stream's workers.

    Args:
        collator ([`PairCollator`]): Without redrawing: a stream draws the revealed genes itself.
        pairings (`list[str]`): Names of the pairings, in the order of the model's ids.
    """

    def __init__(self, collator: PairCollator, pairings: list[str]):
        self.collator = collator
        self.pairings = pairings

    def __call__(self, table: pa.Table) -> dict[str, torch.Tensor]:
        """Model inputs of all rows of a table in `PAIR_SCHEMA`, as [`PairCollator`] makes them."""
        rows = PairDataset(table, self.pairings).__getitems__(np.arange(table.num_rows))
        # Positions mean nothing here; the cells tell batches apart where the collator draws query genes.
        rows.rows = table.column("source_soma_joinid").to_numpy()
        return self.collator(rows)


def sample_rows_of(options: RunOptions) -> int | None:
    """Training rows that a streaming run writes beside its stream, about; `None` where all are written."""
    if not options.data.stream:
        return None
    n_pairings = len(options.pairs.matching.pairings)
    return n_pairings * max(options.training.linear_start_cells, options.evaluation.max_floor_pairs)


def open_stream(options: RunOptions, folder: PairFolder, rank: int = 0, world_size: int = 1):
    """The training pairs of one process, batch after batch without end.

    Args:
        options (`RunOptions`): The run; `data.stream` is true.
        folder ([`PairFolder`]): What `prepare_pairs` made for it.
        rank, world_size (`int`, *optional*): This process among those that train.

    Returns:
        [`~data_scripts.batches.stream_pairs.PairStream`] of batches of model inputs.

    Raises:
        ValueError: If the store makes fewer shards than there are readers.
    """
    # Reads cells, with the libraries that this takes.
    from data_scripts.batches.stream_pairs import PairStream, StreamOptions

    settings = options.training
    collator = PairCollator(folder.panels, seed=options.seed, n_query_genes=settings.n_query_genes)
    return PairStream(
        folder.path,
        StreamOptions(
            batch_size=settings.per_device_train_batch_size,
            pool_shards=options.data.stream_pool_shards,
            seed=options.seed,
        ),
        num_workers=settings.dataloader_num_workers,
        rank=rank,
        world_size=world_size,
        transform=TableCollator(collator, folder.pairings),
        endless=True,
    )
