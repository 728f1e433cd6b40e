"""What a GPPC model returns, and the prepared queries that `decode` takes."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class GppcEncoderOutput(ModelOutput):
    """
    An encoded cell state; give it to `decode` for as many perturbations as wanted.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, L, hidden_size)`): Latents.
        state_values (`torch.FloatTensor` of shape `(B, vocab_size)`): Log values, zero where not measured.
        measured (`torch.BoolTensor` of shape `(B, vocab_size)`): Which genes were measured.
        component_logits (`torch.FloatTensor` of shape `(B, num_components)`): Log probability of each cell state.
        factor_mean (`torch.FloatTensor` of shape `(B, num_factors)`): Posterior mean of the cell's factors.
        factor_residual (`torch.FloatTensor` of shape `(B, num_factors)`): The same around the state's own mean.
        factor_covariance (`torch.FloatTensor` of shape `(B, num_factors, num_factors)`): Posterior covariance
            within a state.
        plain_mean (`torch.FloatTensor` of shape `(B, num_factors)`), plain_covariance (`torch.FloatTensor` of shape `(B,
            num_factors, num_factors)`): The same of one Gaussian for all cells, where there are several states.
        likeness (`torch.FloatTensor` of shape `(B, pairings, num_references)`): Log weights of the reference pairs for
            this source under every pairing.
    """

    last_hidden_state: torch.FloatTensor | None = None
    state_values: torch.FloatTensor | None = None
    measured: torch.BoolTensor | None = None
    component_logits: torch.FloatTensor | None = None
    factor_mean: torch.FloatTensor | None = None
    factor_residual: torch.FloatTensor | None = None
    factor_covariance: torch.FloatTensor | None = None
    plain_mean: torch.FloatTensor | None = None
    plain_covariance: torch.FloatTensor | None = None
    likeness: torch.FloatTensor | None = None


@dataclass
class GppcQuery(ModelOutput):
    """
    What queried genes are read out with, gathered once for many calls of `decode`; see `query`.

    Args:
        query_ids (`torch.LongTensor` of shape `(Q,)`, *optional*): The genes; absent for all.
        place (`torch.LongTensor` of shape `(vocab_size + 1,)`, *optional*): Column of each gene, `Q` where it is none;
            absent for all genes.
        gene_mean, noise (`torch.FloatTensor` of shape `(Q,)`), loadings (`torch.FloatTensor` of shape
            `(Q, num_factors)`), pairs (`torch.FloatTensor` of shape `(Q, num_factors (num_factors + 1) / 2)`): Of the
            linear response.
        vectors, vectors_logvar (`torch.FloatTensor` of shape `(Q, readout_size)`), gene_logvar (`torch.FloatTensor` of
            shape `(Q,)`): Of the read-out.
    """

    query_ids: torch.LongTensor | None = None
    place: torch.LongTensor | None = None
    gene_mean: torch.FloatTensor | None = None
    loadings: torch.FloatTensor | None = None
    noise: torch.FloatTensor | None = None
    pairs: torch.FloatTensor | None = None
    vectors: torch.FloatTensor | None = None
    vectors_logvar: torch.FloatTensor | None = None
    gene_logvar: torch.FloatTensor | None = None


@dataclass
class GppcModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, L, hidden_size)`): Latents after the perturbation.
        encoder_last_hidden_state (`torch.FloatTensor` of shape `(B, L, hidden_size)`): Latents before it.
        factor_mean (`torch.FloatTensor` of shape `(B, num_factors)`): Factors expected after the perturbation.
        factor_covariance (`torch.FloatTensor` of shape `(B, num_factors, num_factors)`): Their covariance.
        familiarity (`torch.FloatTensor` of shape `(B,)`): As in [`GppcOutput`].
    """

    last_hidden_state: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    factor_mean: torch.FloatTensor | None = None
    factor_covariance: torch.FloatTensor | None = None
    familiarity: torch.FloatTensor | None = None


@dataclass
class GppcOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): Squared error per scored gene plus the variance term.
        logits (`torch.FloatTensor` of shape `(B, Q)`): Expected log value of every queried gene.
        logvar (`torch.FloatTensor` of shape `(B, Q)`, *optional*): Log of the predicted variance.
        linear_response (`torch.FloatTensor` of shape `(B, Q)`): The closed-form part of `logits`.
        departure (`torch.FloatTensor` of shape `(B,)`): How far the prediction departed from linear: root mean square
            over the queried genes of `logits - linear_response`, in log value.
        familiarity (`torch.FloatTensor` of shape `(B,)`): From 0, nothing like the imposed levels was seen in cells like
            this one and the prediction is one Gaussian's, to 1.
        encoder_last_hidden_state, decoder_last_hidden_state (`torch.FloatTensor` of shape `(B, L, hidden_size)`).
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    logvar: torch.FloatTensor | None = None
    linear_response: torch.FloatTensor | None = None
    departure: torch.FloatTensor | None = None
    familiarity: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    decoder_last_hidden_state: torch.FloatTensor | None = None
