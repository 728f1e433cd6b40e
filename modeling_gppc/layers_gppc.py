"""Layers of the network: attention blocks and the bilinear read-out; values of tokens and of imposed genes in place."""

from collections.abc import Callable
from typing import Unpack

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs

from .configuration_gppc import GppcConfig
from .factors_gppc import rows_of

# The learned log variance stays within this distance of the linear response's.
MAX_LOG_VARIANCE_CHANGE = 4.0


def scatter_tokens(
    values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, vocab_size: int
) -> torch.Tensor:
    """Values `(B, N)` of tokens at their genes, zero elsewhere, `(B, vocab_size)`.

    The order of tokens and the padding vanish.
    """
    if attention_mask is not None:
        # Padding goes to an extra column that is cut off.
        input_ids = torch.where(attention_mask.bool(), input_ids, vocab_size)
    return values.new_zeros(len(values), vocab_size + 1).scatter(1, input_ids, values)[:, :-1]


def where_imposed(
    perturbation_ids: torch.Tensor, mask: torch.Tensor, query_ids: torch.Tensor | None, vocab_size: int
) -> torch.Tensor:
    """Which queried gene `(Q,)`, or which of all, each of the perturbed ones `(B, K)` is, padding none, `(B, K, Q)`."""
    if query_ids is None:
        query_ids = torch.arange(vocab_size, device=mask.device)
    return query_ids == perturbation_ids.where(mask.bool(), -1)[:, :, None]


def impose(predicted: torch.Tensor, values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Puts `values` `(B, K)` of the perturbed genes themselves in the place of predictions `(B, Q)`."""
    for own, value in zip(where.unbind(1), values.to(predicted.dtype).unbind(1)):
        predicted = torch.where(own, value[:, None], predicted)
    return predicted


class GppcPerturbationEmbeddings(nn.Module):
    """One token an imposed gene: its embedding, the same times the level's distance from the mean and times the change."""

    def __init__(self, config: GppcConfig):
        super().__init__()
        self.perturbation_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.perturbation_proj = nn.Linear(3 * config.hidden_size, config.hidden_size)

    def forward(self, ids: torch.Tensor, surprise: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
        """Tokens `(B, K, hidden_size)` of genes, level minus the gene's mean and change of log value, each `(B, K)`."""
        identity = self.perturbation_embedding(ids)
        scales = [scale[:, :, None].to(identity.dtype) for scale in (surprise, changes)]
        return self.perturbation_proj(torch.cat([identity, *(scale * identity for scale in scales)], dim=-1))


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out; the reference for the fused kernels. Shapes `(B, heads, tokens, head size)`."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class GppcAttention(nn.Module):
    """Multi-headed self-attention; the order of tokens carries no meaning."""

    def __init__(self, config: GppcConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        # A bias of the keys moves no output: its gradient is rounding noise, which Adam would turn into steps.
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(hidden_shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1)), attn_weights


class GppcBlock(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward; the residual stream keeps magnitudes that a post-norm would erase."""

    def __init__(self, config: GppcConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = GppcAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.attention(self.attention_norm(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        expanded = self.activation(self.up_proj(self.mlp_norm(hidden_states)))
        return hidden_states + self.dropout(self.down_proj(expanded))


class GppcReadout(nn.Module):
    """Bilinear read-out: the latents become one vector, which every queried gene meets with its own."""

    def __init__(self, config: GppcConfig):
        super().__init__()
        self.proj = nn.Linear((config.num_latents + 1) * config.hidden_size, config.readout_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.gene_vectors = nn.Parameter(torch.zeros(config.vocab_size, config.readout_size))
        self.gene_vectors_logvar = nn.Parameter(torch.zeros(config.vocab_size, config.readout_size))
        self.gene_logvar = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        familiarity: torch.Tensor,
        query_ids: torch.Tensor | None = None,
        with_variance: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the network adds to the expected log values and, if asked, to their log variance, each `(B, Q)`.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(B, num_latents + 1, hidden_size)`): From the decoder.
            familiarity (`torch.FloatTensor` of shape `(B,)`): What the contribution to the mean is multiplied by.
            query_ids (`torch.LongTensor` of shape `(Q,)`, *optional*): Genes to read out; defaults to all.
            with_variance (`bool`, *optional*, defaults to `True`): Whether to read out `logvar` too.
        """
        state = self.dropout(self.activation(self.proj(hidden_states.flatten(1))))
        mean = (familiarity[:, None].to(state.dtype) * state) @ rows_of(self.gene_vectors, query_ids).T
        if not with_variance:
            return mean, None
        # The likelihood moves no latent: the mean is fitted by squared error alone.
        vectors, bias = rows_of(self.gene_vectors_logvar, query_ids), rows_of(self.gene_logvar, query_ids)
        bound = MAX_LOG_VARIANCE_CHANGE
        # bound x tanh(x / bound) in words of a sigmoid, which takes a fifth of the time.
        share = torch.addmm(2 / bound * bias, 2 / bound * state.detach(), vectors.T).sigmoid_()
        return mean, torch.add(share.new_full((), -bound), share, alpha=2 * bound)
