"""Seeing is not doing: a cell whose marker is taken away stays what it is."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from gaussian_pairs import GENES, PAIRINGS, RANK, pair_table, started

import train
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.pair_folder import PairFolder
from modeling_gppc import GppcFeatureExtractor, GppcForPerturbationPrediction


def agreement(change: np.ndarray, apart: np.ndarray, gene: int) -> tuple[float, float]:
    """Correlation of a response with the difference of two cell types, and the share of it that is covered."""
    change, apart = np.delete(change, gene), np.delete(apart, gene)
    return float(np.corrcoef(change, apart)[0, 1]), float(change @ apart / (apart @ apart))


@pytest.mark.parametrize("named", [True, False])
def test_types_are_held_named_or_not(named):
    """Two types far apart; the gene that marks them best is lowered by their difference."""
    states = np.array([[6.0, 0, 0], [-6.0, 0, 0]])
    train_pairs, validation = (pair_table(n, seed=seed, states=states) for n, seed in ((4000, 20), (800, 21)))
    values = PairDataset(train_pairs, PAIRINGS).dense_cells("source", np.arange(4000), GENES)
    loadings = np.random.default_rng(1).normal(size=(GENES, RANK))
    first = values @ loadings[:, 0] > 0
    if named:
        place = train_pairs.schema.get_field_index("cell_type")
        train_pairs = train_pairs.set_column(place, "cell_type", pa.array(np.where(first, "a", "b").tolist()))
    model = started(train_pairs, validation, components=4)
    apart = values[~first].mean(axis=0) - values[first].mean(axis=0)
    gene = int(np.argmax(np.abs(apart)))
    asked = torch.tensor([[gene]]), torch.tensor([[apart[gene]]])
    encoded = model.encode(
        torch.arange(GENES)[None], torch.from_numpy(values[first][:1]), measured_mask=torch.ones(1, GENES)
    )
    done = model.respond(encoded, *asked).change[0].numpy()
    seen = (model.decode(encoded, *asked).logits - model.levels(encoded)).detach()[0].numpy()
    assert agreement(seen, apart, gene)[1] > 0.5
    # Within a type the loadings of that gene say what follows, and the first factor counts no more than the others.
    wanted = loadings @ loadings[gene]
    assert np.corrcoef(np.delete(done, gene), np.delete(wanted, gene))[0, 1] > 0.98
    assert agreement(done, apart, gene)[1] < 0.05


@pytest.mark.slow
def test_a_monocyte_without_cst3_is_a_monocyte(tmp_path):
    """The default run: its closed form is fitted before the first step."""
    words = ["--training.max_steps", "1", "--training.use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    assert train.main(words) == 0
    model = GppcForPerturbationPrediction.from_pretrained(tmp_path / "run" / "model").eval()
    extractor = GppcFeatureExtractor.from_pretrained(tmp_path / "run" / "model")
    folder = PairFolder(tmp_path / "run" / "pairs")
    cells, types = [], []
    for split in folder.splits:
        table = folder.split(split)
        _, rows = np.unique(table.column("source_soma_joinid").to_numpy(), return_index=True)
        cells.append(PairDataset(table, folder.pairings).dense_cells("source", rows, extractor.vocab_size))
        types += table.column("cell_type").take(rows).to_pylist()
    values, types = np.concatenate(cells), np.array(types)
    monocyte = types == "CD14+ Monocyte"
    lymphoid = np.array([name.startswith(("CD4+", "CD8+", "CD19+", "CD56+")) for name in types])
    assert monocyte.sum() > 100 and lymphoid.sum() > 300
    encoded = model.encode(**extractor.from_values(values, np.ones(values.shape, dtype=bool)))
    response = model.respond(encoded, **extractor.perturbation_features("CST3=ko", values))
    change, gene = response.change.numpy(), int(extractor.gene_index(["CST3"])[0])
    apart = values[lymphoid].mean(axis=0) - values[monocyte].mean(axis=0)
    correlation, covered = agreement(change[monocyte].mean(axis=0), apart, gene)
    assert abs(correlation) < 0.3 and abs(covered) < 0.05
    without = values[:, gene] == 0
    assert without.sum() > 200 and not change[without].any()
    assert torch.equal(response.expression[torch.from_numpy(without)], torch.from_numpy(values[without]))
