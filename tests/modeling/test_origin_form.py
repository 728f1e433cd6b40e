"""The form that GPPC grew out of, for the record: it cannot tell unperturbed genes apart, so it learns nothing of them."""

import numpy as np
import pytest
import torch
from gaussian_pairs import GENES, PAIRINGS, errors, pair_table, started
from torch import nn

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from modeling_gppc.layers_gppc import scatter_tokens
from modeling_gppc.modeling_gppc import IGNORED_LABEL

PANELS = np.ones((1, GENES), dtype=bool)


class OriginForm(nn.Module):
    """Tokens are gene embedding x value; a gene that is not perturbed asks with the zero vector, as all others do."""

    def __init__(self, width: int = 16):
        super().__init__()
        options = {"d_model": width, "nhead": 2, "dim_feedforward": 2 * width, "dropout": 0.0, "batch_first": True}
        self.embedding = nn.Embedding(GENES, width)
        self.encoder = nn.TransformerEncoderLayer(**options)
        self.decoder = nn.TransformerDecoderLayer(**options)
        self.head = nn.Linear(width, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Expected log values `(B, GENES)`."""
        values = scatter_tokens(batch["expression_values"], batch["input_ids"], batch["attention_mask"], GENES)
        changes = torch.zeros_like(values).scatter_add(1, batch["perturbation_ids"], batch["perturbation_values"])
        state, tokens = (self.embedding.weight * scale[:, :, None] for scale in (values, changes))
        return self.head(self.decoder(tokens, self.encoder(state)))[:, :, 0]


def squared_error(form: OriginForm, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over the genes that are not perturbed."""
    scored = batch["labels"] != IGNORED_LABEL
    return (form(batch) - batch["labels"])[scored].square().mean()


@pytest.fixture(scope="module")
def trained() -> OriginForm:
    """After 300 steps, warm-up included."""
    torch.manual_seed(0)
    form, data = OriginForm(), PairDataset(pair_table(3000, seed=10), PAIRINGS)
    optimizer = torch.optim.Adam(form.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.02, total_iters=50)
    collate, rng = PairCollator(PANELS), np.random.default_rng(0)
    for _ in range(300):
        squared_error(form, collate(data[rng.integers(len(data), size=64)])).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return form.eval()


@torch.no_grad()
def test_it_fails_where_the_default_succeeds(trained):
    table = pair_table(600, seed=12)
    data = PairDataset(table, PAIRINGS)
    batch = PairCollator(PANELS)(data[np.arange(len(data))])
    scored = batch["labels"] != IGNORED_LABEL
    spread = batch["labels"][scored].var()
    assert 1 - squared_error(trained, batch) / spread < 0.02
    default = errors(started(pair_table(3000, seed=10), pair_table(600, seed=11), components=1), table)
    assert 1 - np.mean([default[name] for name in PAIRINGS]) / float(spread) > 0.3


@torch.no_grad()
def test_every_unperturbed_gene_gets_the_same_number(trained):
    data = PairDataset(pair_table(32, seed=13), PAIRINGS)
    batch = PairCollator(PANELS)(data[np.arange(32)])
    predicted, scored = trained(batch), batch["labels"] != IGNORED_LABEL
    for row in range(32):
        assert np.ptp(predicted[row, scored[row]].numpy()) < 1e-5
    # Its perturbed genes it does tell apart.
    assert (predicted[~scored] - predicted[:, :1].expand_as(predicted)[~scored]).abs().max() > 1e-3
