"""PairCollator: exact tensors, labels without what was revealed, redraws that depend on the row alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_rows import N_GENES, PAIRINGS, PANELS, ROWS, pair_table

from data_scripts.batches.data_collator import PairCollator, draw_queries
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.pair_options import PerturbationOptions

X = -100.0
SOURCE = np.array([[row[0].get(gene, 0.0) for gene in range(N_GENES)] for row in ROWS])
TARGET = np.array([[row[1].get(gene, 0.0) for gene in range(N_GENES)] for row in ROWS])
BOTH = np.array([PANELS[row[2][0]] & PANELS[row[2][1]] for row in ROWS])


def dataset(epoch=0):
    output = PairDataset(pair_table(), PAIRINGS)
    output.set_epoch(epoch)
    return output


def test_stored_perturbations_as_tensors():
    batch = PairCollator(PANELS)(dataset().__getitems__([2, 0, 3]))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 4], [0, 3, 0], [3, 0, 0]],
        "expression_values": [[0.25, 3.0, 1.0], [1.0, 2.0, 0.0], [4.0, 0.0, 0.0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0], [1, 0, 0]],
        "measured_mask": PANELS.tolist(),
        "panel_index": [0, 0, 1],
        "perturbation_ids": [[1, 3], [3, 0], [0, 0]],
        "perturbation_values": [[-0.25, 0.75], [-2.0, 0.0], [0.0, 0.0]],
        "perturbation_mask": [[1, 1], [1, 0], [0, 0]],
        "pairing_ids": [1, 0, 0],
        # -100 at genes that the target did not measure and at revealed genes.
        "labels": [[0.0, X, X, X, X], [0.5, 1.5, 0.0, X, 0.0], [1.0, 0.0, X, 4.0, X]],
    }
    assert batch["labels"].dtype == batch["expression_values"].dtype == torch.float32
    assert batch["input_ids"].dtype == batch["pairing_ids"].dtype == torch.int64
    assert batch["measured_mask"].dtype == torch.bool


def test_only_the_panels_of_the_batch_are_given():
    batch = PairCollator(PANELS)(dataset().__getitems__([3, 4]))
    assert batch["measured_mask"].tolist() == [PANELS[1].tolist()]
    assert batch["panel_index"].tolist() == [0, 0]


def revealed(batch, row):
    """Revealed genes of a row with their changes."""
    mask = batch["perturbation_mask"][row].bool()
    return dict(zip(batch["perturbation_ids"][row][mask].tolist(), batch["perturbation_values"][row][mask].tolist()))


REDRAWS = [
    PerturbationOptions(min_genes=0, max_genes=3),
    PerturbationOptions(min_genes=2, max_genes=2),
]


@pytest.mark.parametrize("redraw", REDRAWS, ids=lambda options: f"{options.min_genes} to {options.max_genes}")
@settings(max_examples=30)
@given(
    st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=6, unique=True), st.integers(0, 50), st.integers(0, 9)
)
def test_a_redraw_depends_on_the_row_alone(redraw, rows, epoch, seed):
    data, collator = dataset(epoch), PairCollator(PANELS, redraw=redraw, seed=seed)
    together, backwards = collator(data.__getitems__(rows)), collator(data.__getitems__(rows[::-1]))
    for place, row in enumerate(rows):
        alone = collator(data.__getitems__([row]))
        found = revealed(together, place)
        assert found == revealed(alone, 0) == revealed(backwards, len(rows) - 1 - place)
        assert torch.equal(together["labels"][place], alone["labels"][0])
        candidates = np.flatnonzero(BOTH[row] & (SOURCE[row] != TARGET[row]))
        assert set(found) <= set(candidates.tolist())
        assert len(found) <= redraw.max_genes
        assert len(found) >= min(redraw.min_genes, len(candidates))
        for gene, change in found.items():
            assert change == TARGET[row, gene] - SOURCE[row, gene]  # of dyadic numbers, exact in single precision
        wanted = np.where(PANELS[ROWS[row][2][1]], TARGET[row], X)
        wanted[list(found)] = X
        np.testing.assert_array_equal(together["labels"][place].numpy(), wanted)


def test_epochs_and_seeds_draw_anew():
    def drawn(epoch, seed):
        collator = PairCollator(PANELS, redraw=PerturbationOptions(max_genes=3), seed=seed)
        batch = collator(dataset(epoch).__getitems__(range(len(ROWS))))
        return [revealed(batch, row) for row in range(len(ROWS))]

    assert drawn(0, 0) == drawn(0, 0)
    assert len({str(drawn(epoch, 0)) for epoch in range(8)}) > 4
    assert len({str(drawn(0, seed)) for seed in range(8)}) > 4


def test_every_candidate_is_drawn_sooner_or_later():
    collator = PairCollator(PANELS, redraw=PerturbationOptions(max_genes=1))
    seen = set()
    for epoch in range(60):
        seen |= set(revealed(collator(dataset(epoch).__getitems__([0])), 0))
    assert seen == {0, 1, 3}


def test_some_queried_genes():
    data, whole = dataset(), PairCollator(PANELS)(dataset().__getitems__([0, 2, 4]))
    collator = PairCollator(PANELS, n_query_genes=2, seed=1)
    batch = collator(data.__getitems__([0, 2, 4]))
    assert batch["query_ids"].shape == (2,)
    assert torch.equal(batch["labels"], whole["labels"][:, batch["query_ids"]])
    assert torch.equal(batch["query_ids"], collator(data.__getitems__([0, 2, 4]))["query_ids"])
    asked = {gene for epoch in range(300) for gene in collator(dataset(epoch).__getitems__([0]))["query_ids"].tolist()}
    assert asked == set(range(N_GENES))
    assert "query_ids" not in PairCollator(PANELS, n_query_genes=N_GENES)(data.__getitems__([0]))


def test_a_redraw_is_uniform_over_the_candidates():
    data, counts = dataset(), np.zeros(N_GENES)
    collator = PairCollator(PANELS, redraw=PerturbationOptions(max_genes=1))
    for epoch in range(3000):
        data.set_epoch(epoch)
        counts[collator(data.__getitems__([0]))["perturbation_ids"][0, 0]] += 1
    np.testing.assert_allclose(counts / 3000, [1 / 3, 1 / 3, 0, 1 / 3, 0], atol=0.04)


@settings(max_examples=60)
@given(st.integers(2, 30), st.data())
def test_chances_of_queries(n_genes, data):
    n = data.draw(st.integers(1, n_genes - 1))
    expressed = np.array(
        data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=n_genes, max_size=n_genes))
    )
    counts, chance = np.zeros(n_genes), np.zeros(n_genes)
    for seed in range(400):
        genes, own = draw_queries(expressed, n, np.random.default_rng(seed))
        assert len(genes) == n and (np.diff(genes) > 0).all()
        assert (own > 0).all() and (own <= 1 + 1e-9).all()
        counts[genes] += 1
        chance[genes] = own
    # Six standard deviations of a share of 400 draws, and three draws where the chance is almost none.
    assert (np.abs(counts / 400 - chance) < 6 * np.sqrt(chance * (1 - chance).clip(0) / 400) + 3 / 400).all()
    # Of two genes, the one that more targets express is not less likely.
    known = np.flatnonzero(counts)
    order = known[np.argsort(expressed[known], kind="stable")]
    assert (np.diff(chance[order]) >= -1e-9).all()


def test_weights_make_the_loss_that_of_all_genes():
    rng = np.random.default_rng(0)
    predicted = torch.from_numpy(rng.normal(0, 1, (len(ROWS), N_GENES)).astype(np.float32))
    rows = dataset().__getitems__(range(len(ROWS)))
    whole = PairCollator(PANELS)(rows)["labels"]
    full = (predicted - whole)[whole != X].square().mean().item()
    losses = []
    for seed in range(4000):
        batch = PairCollator(PANELS, n_query_genes=3, seed=seed)(rows)
        scored = batch["labels"] != X
        error = torch.where(scored, predicted[:, batch["query_ids"]] - batch["labels"], torch.zeros(()))
        losses.append(((error.square() * batch["label_weights"]).sum() / scored.sum()).item())
    assert np.mean(losses) == pytest.approx(full, abs=4 * np.std(losses) / np.sqrt(len(losses)))
    assert np.std(losses) > 0


def test_nothing_of_the_target_reaches_the_inputs():
    """Invariant 5: another target with the same revealed changes gives the same inputs."""
    changed = [(source, {0: 9.0, 2: 9.0, **target}, panels, *rest) for source, target, panels, *rest in ROWS]
    rows = range(len(ROWS))
    left = PairCollator(PANELS)(dataset().__getitems__(rows))
    right = PairCollator(PANELS)(PairDataset(pair_table(changed), PAIRINGS).__getitems__(rows))
    for name in left:
        assert torch.equal(left[name], right[name]) == (name != "labels"), name
