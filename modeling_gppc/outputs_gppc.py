"""What a GPPC model returns."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .factors_gppc import GppcPerturbation
from .linear_response_gppc import GppcSourceFactors, GppcTargetFactors


@dataclass
class GppcEncoderOutput(ModelOutput):
    """
    Encoded cells; give them to `decode` for as many perturbations as wanted.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, num_latents, hidden_size)`): Latents.
        state_values (`torch.FloatTensor` of shape `(B, vocab_size)`): Log values, zero where not measured.
        measured (`torch.BoolTensor` of shape `(B, vocab_size)`): Which genes were measured.
        factors ([`GppcSourceFactors`]): What the linear response knows of the cells.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*): Before and after every block of the encoder,
            and its attention weights; with `output_hidden_states=True` and `output_attentions=True`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    state_values: torch.FloatTensor | None = None
    measured: torch.BoolTensor | None = None
    factors: GppcSourceFactors | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class GppcModelOutput(ModelOutput):
    """
    Cells after a perturbation, before genes are read out.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, num_latents + 1, hidden_size)`): Latents after the
            perturbation, and the token of the linear response.
        factors ([`GppcTargetFactors`]): What the linear response expects.
        perturbation ([`GppcPerturbation`]): What was imposed, with the levels.
        encoder_last_hidden_state (`torch.FloatTensor` of shape `(B, num_latents, hidden_size)`): Latents before it.
        encoder_hidden_states, encoder_attentions, decoder_hidden_states, decoder_attentions
            (`tuple(torch.FloatTensor)`, *optional*): As in [`GppcOutput`].
    """

    last_hidden_state: torch.FloatTensor | None = None
    factors: GppcTargetFactors | None = None
    perturbation: GppcPerturbation | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class GppcOutput(ModelOutput):
    """
    Predicted expression.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): Squared error per scored gene plus the variance's term.
        logits (`torch.FloatTensor` of shape `(B, Q)`): Expected log value of every queried gene.
        logvar (`torch.FloatTensor` of shape `(B, Q)`, *optional*): Log of its predicted variance.
        linear_response (`torch.FloatTensor` of shape `(B, Q)`): The closed-form part of `logits`; the rest is the network's.
        familiarity (`torch.FloatTensor` of shape `(B,)`): From 0, nothing like the imposed levels was seen in cells like
            this one and the prediction is the single Gaussian's, to 1.
        encoder_last_hidden_state (`torch.FloatTensor` of shape `(B, num_latents, hidden_size)`), decoder_last_hidden_state
            (`torch.FloatTensor` of shape `(B, num_latents + 1, hidden_size)`): Latents before and after the perturbation.
        encoder_hidden_states, decoder_hidden_states (`tuple(torch.FloatTensor)`, *optional*): Tokens before and after
            every block, `(B, tokens, hidden_size)`; with `output_hidden_states=True`. Encoded cells keep their own rows.
        encoder_attentions, decoder_attentions (`tuple(torch.FloatTensor)`, *optional*): Attention weights of every
            block, `(B, heads, tokens, tokens)`; with `output_attentions=True` and `attn_implementation="eager"`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    logvar: torch.FloatTensor | None = None
    linear_response: torch.FloatTensor | None = None
    familiarity: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    encoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    encoder_attentions: tuple[torch.FloatTensor, ...] | None = None
    decoder_last_hidden_state: torch.FloatTensor | None = None
    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None
