"""Layers of the model: states as vectors, attention blocks, the bilinear read-out."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_gppc import GppcConfig
from .outputs_gppc import GppcQuery

# The learned log variance stays within this distance of the linear response's.
MAX_LOG_VARIANCE_CHANGE = 4.0


def dense_state(
    vocab_size: int,
    input_ids: torch.Tensor,
    expression_values: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    measured_mask: torch.Tensor | None = None,
    panel_index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and measured mask over the vocabulary, each `(B, vocab_size)`.

    Scattering makes the order of tokens, the padding and anything written into unmeasured genes vanish.
    """
    tokens = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    # Padding goes to an extra column that is cut off.
    columns = torch.where(tokens.bool(), input_ids, vocab_size)
    values = expression_values.new_zeros(input_ids.shape[0], vocab_size + 1).scatter(1, columns, expression_values)
    values = values[:, :vocab_size]
    if measured_mask is None:
        measured = torch.zeros(values.shape[0], vocab_size + 1, dtype=torch.bool, device=values.device)
        measured = measured.scatter(1, columns, True)[:, :vocab_size]
    else:
        measured = measured_mask.bool() if panel_index is None else measured_mask.bool()[panel_index]
    return torch.where(measured, values, torch.zeros_like(values)), measured


def impose(
    predicted: torch.Tensor,
    query_ids: torch.Tensor | None,
    perturbation_ids: torch.Tensor,
    levels: torch.Tensor,
    mask: torch.Tensor,
    vocab_size: int,
    place: torch.Tensor | None = None,
) -> torch.Tensor:
    """Puts the imposed levels `(B, K)` in the place of predictions `(B, Q)` of the perturbed genes themselves.

    The predictions may be changed in place.
    """
    if perturbation_ids.shape[1] == 0:
        return predicted
    # Padding is no gene: it equals no query.
    columns = torch.where(mask.bool(), perturbation_ids, vocab_size)
    levels = levels.to(predicted.dtype)
    if query_ids is None or place is not None:
        columns = columns if place is None else place[columns]
        asked = columns < predicted.shape[1]
        where = columns.clamp(max=predicted.shape[1] - 1)
        # Indexed, for `gather` would keep all predictions for its gradient.
        there = predicted[torch.arange(len(predicted), device=predicted.device)[:, None], where]
        values = torch.where(asked, levels, there)
        # All others of a row write once more what its first one that is asked for writes, or what is there already;
        # the gradient flows once.
        first = asked.int().argmax(dim=1, keepdim=True)
        own = asked | (torch.arange(columns.shape[1], device=columns.device) == first)
        where = torch.where(own, where, where.gather(1, first))
        values = torch.where(own, values, values.gather(1, first).detach())
        return predicted.scatter_(1, where, values)
    for column in range(columns.shape[1]):
        one = slice(column, column + 1)
        predicted = torch.where(query_ids == columns[:, one], levels[:, one], predicted)
    return predicted


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out; the reference for the fused kernels. Shapes `(B, heads, tokens, head size)`."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class GppcAttention(nn.Module):
    """Self-attention over latents and perturbation tokens; order carries no meaning."""

    def __init__(self, config: GppcConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        keep: int | None = None,
        shared: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        qkv = nn.functional.linear(hidden_states, self.qkv_proj.weight)
        if shared is not None:
            tokens, row = shared
            first = nn.functional.linear(tokens, self.qkv_proj.weight)
            qkv = torch.cat([first.index_select(0, row), qkv], dim=1)
        batch, tokens, width = *qkv.shape[:2], hidden_states.shape[2]
        query, key, value = qkv.view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        # A bias of the keys moves no output: its gradient is rounding noise, which Adam would turn into steps that
        # differ between one process and two.
        query_bias, _, value_bias = (
            self.qkv_proj.bias.to(qkv.dtype).view(3, self.num_heads, 1, self.head_dim).unbind(0)
        )
        query, value = query[:, :, :keep] + query_bias, value + value_bias
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        return self.o_proj(output.reshape(batch, query.shape[2], width))


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
        keep: int | None = None,
        shared: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.FloatTensor` of shape `(B, T, hidden_size)`): Tokens.
            attention_mask (`torch.FloatTensor` of shape `(B, 1, keep, T)`, *optional*): Added to the attention logits.
            keep (`int`, *optional*): How many of the first tokens are returned; the others are attended to all the
                same. Defaults to all.
            shared (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Tokens `(U, L, hidden_size)` and the `(B,)` index
                that the first L of each row are taken from, where few differ: they are projected once.
        """
        own = hidden_states
        if shared is not None:
            own, shared = hidden_states[:, shared[0].shape[1] :], (self.attention_norm(shared[0]), shared[1])
        attended = self.attention(self.attention_norm(own), attention_mask, keep, shared)
        hidden_states = hidden_states[:, :keep] + self.dropout(attended)
        expanded = self.activation(self.up_proj(self.mlp_norm(hidden_states)))
        return hidden_states + self.dropout(self.down_proj(expanded))


class GppcReadout(nn.Module):
    """Bilinear read-out: latents -> a vector that every queried gene meets with its own."""

    def __init__(self, config: GppcConfig):
        super().__init__()
        self.proj = nn.Linear((config.num_latents + 1) * config.hidden_size, config.readout_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.gene_vectors = nn.Parameter(torch.zeros(config.vocab_size, config.readout_size))
        self.gene_vectors_logvar = nn.Parameter(torch.zeros(config.vocab_size, config.readout_size))
        self.gene_logvar = nn.Parameter(torch.zeros(config.vocab_size))

    def gather(self, query_ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What genes `query_ids` `(Q,)`, or all, are read with: `vectors`, `vectors_logvar`, `gene_logvar`."""
        vectors, vectors_logvar, gene_logvar = self.gene_vectors, self.gene_vectors_logvar, self.gene_logvar
        if query_ids is not None:
            # Rows are copied whole; an index would go value by value, and so would its gradient.
            vectors, vectors_logvar = (nn.functional.embedding(query_ids, rows) for rows in (vectors, vectors_logvar))
            gene_logvar = gene_logvar[query_ids]
        return {"vectors": vectors, "vectors_logvar": vectors_logvar, "gene_logvar": gene_logvar}

    def forward(
        self,
        hidden_states: torch.Tensor,
        familiarity: torch.Tensor,
        query_ids: torch.Tensor | None,
        query: GppcQuery | None = None,
        with_variance: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Departure of the mean from the linear response, as far as `familiarity` `(B,)` lets it, and, `with_variance`,
        the log variance's place between its bounds, from 0 to 1, each `(B, Q)`; `hidden_states` are `(B, num_latents + 1,
        hidden_size)`."""
        state = self.dropout(self.activation(self.proj(hidden_states.flatten(1))))
        # Gathered in here, where sharded weights are whole, unless it was done before.
        found = self.gather(query_ids) if query is None else query
        vectors, vectors_logvar, gene_logvar = found["vectors"], found["vectors_logvar"], found["gene_logvar"]
        departure = (familiarity[:, None].to(state.dtype) * state) @ vectors.T
        if not with_variance:
            return departure, None
        # The hyperbolic tangent of what is learned over the bound, as a sigmoid: a sixth of its time on a CPU.
        scale = 2.0 / MAX_LOG_VARIANCE_CHANGE
        logvar = (scale * state.detach() @ vectors_logvar.T).to(gene_logvar.dtype).add_(scale * gene_logvar)
        return departure, torch.sigmoid_(logvar)
