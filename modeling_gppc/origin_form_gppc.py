"""The form that GPPC grew out of, for comparison."""

import torch
from torch import nn

from .configuration_gppc import GppcConfig


class GppcOriginForm(nn.Module):
    """The form GPPC grew out of, kept for the record: it cannot tell unperturbed genes apart."""

    def __init__(self, config: GppcConfig):
        super().__init__()
        self.scale = config.hidden_size**0.5
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        shared = {
            "d_model": config.hidden_size,
            "nhead": config.num_attention_heads,
            "dim_feedforward": config.intermediate_size,
            "dropout": config.hidden_dropout_prob,
            "batch_first": True,
        }
        self.encoder = nn.ModuleList([nn.TransformerEncoderLayer(**shared) for _ in range(config.encoder_layers)])
        self.decoder = nn.ModuleList([nn.TransformerDecoderLayer(**shared) for _ in range(config.decoder_layers)])
        self.head = nn.Linear(config.hidden_size, 1)

    def forward(
        self,
        values: torch.Tensor,
        perturbation_ids: torch.Tensor | None,
        perturbation_values: torch.Tensor | None,
        perturbation_mask: torch.Tensor | None,
        query_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Expected log values `(B, Q)` from values over the whole vocabulary `(B, V)` and perturbations `(B, K)`."""
        changes = torch.zeros_like(values)
        if perturbation_ids is not None:
            mask = torch.ones_like(perturbation_ids) if perturbation_mask is None else perturbation_mask
            # Padding may hold anything, NaN included.
            given = torch.where(mask.bool(), perturbation_values, torch.zeros_like(perturbation_values))
            changes = changes.scatter_add(1, perturbation_ids, given)
        state = self.embedding.weight * values[:, :, None] * self.scale
        for layer in self.encoder:
            state = layer(state)
        tokens = self.embedding.weight * changes[:, :, None] * self.scale
        for layer in self.decoder:
            tokens = layer(tokens, state)
        predicted = self.head(tokens)[:, :, 0]
        return predicted if query_ids is None else predicted[:, query_ids]
