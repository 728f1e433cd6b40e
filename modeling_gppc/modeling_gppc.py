"""PyTorch GPPC model: state encoder, perturbation decoder, linear response and read-outs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from .configuration_gppc import GppcConfig
from .linear_response_gppc import GppcLinearResponse

# The learned log variance stays within this distance of the linear response's.
MAX_LOG_VARIANCE_CHANGE = 4.0
IGNORED_LABEL = -100.0
# Names of what the linear response says of a source.
POSTERIOR = (
    "component_logits",
    "factor_mean",
    "factor_residual",
    "factor_covariance",
    "plain_mean",
    "plain_covariance",
)
# Fields of a query that the linear response is read with.
RESPONSE_READ = ("gene_mean", "loadings", "noise", "pairs")


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
    """

    last_hidden_state: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    factor_mean: torch.FloatTensor | None = None
    factor_covariance: torch.FloatTensor | None = None


@dataclass
class GppcOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): Squared error per scored gene plus the variance term.
        logits (`torch.FloatTensor` of shape `(B, Q)`): Expected log value of every queried gene.
        logvar (`torch.FloatTensor` of shape `(B, Q)`): Log of the predicted variance.
        linear_response (`torch.FloatTensor` of shape `(B, Q)`): The closed-form part of `logits`.
        departure (`torch.FloatTensor` of shape `(B,)`): How far the prediction departed from linear: root mean square
            over the queried genes of `logits - linear_response`, in log value.
        encoder_last_hidden_state, decoder_last_hidden_state (`torch.FloatTensor` of shape `(B, L, hidden_size)`).
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    logvar: torch.FloatTensor | None = None
    linear_response: torch.FloatTensor | None = None
    departure: torch.FloatTensor | None = None
    encoder_last_hidden_state: torch.FloatTensor | None = None
    decoder_last_hidden_state: torch.FloatTensor | None = None


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

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, tokens, width = hidden_states.shape
        qkv = nn.functional.linear(hidden_states, self.qkv_proj.weight)
        query, key, value = qkv.view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        # A bias of the keys moves no output: its gradient is rounding noise, which Adam would turn into steps that
        # differ between one process and two.
        query_bias, _, value_bias = (
            self.qkv_proj.bias.to(qkv.dtype).view(3, self.num_heads, 1, self.head_dim).unbind(0)
        )
        query, value = query + query_bias, value + value_bias
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
        return self.o_proj(output.reshape(batch, tokens, width))


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

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        attended = self.attention(self.attention_norm(hidden_states), attention_mask)
        hidden_states = hidden_states + self.dropout(attended)
        expanded = self.activation(self.up_proj(self.mlp_norm(hidden_states)))
        return hidden_states + self.dropout(self.down_proj(expanded))


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


class GppcGenePool(nn.Embedding):
    """Gene embedding that takes a whole state: the sum over genes of value times vector.

    A module of its own, called as one: sharded training gathers an input embedding only where its module is called.
    """

    def forward(self, centred: torch.Tensor) -> torch.Tensor:
        """From centred values `(B, vocab_size)` to `(B, pool_size)`."""
        return centred.to(self.weight.dtype) @ self.weight


class GppcPreTrainedModel(PreTrainedModel):
    """Weights, loading and saving."""

    config_class = GppcConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GppcBlock"]
    _keep_in_fp32_modules_strict = ["linear_response"]
    _supports_sdpa = True
    # A dozen tokens: flex attention has nothing to save there, and ends the process on a CPU (torch 2.13).
    _supports_flex_attn = False
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        spread = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=spread)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, GppcLinearResponse):
            init.zeros_(module.gene_mean)
            init.zeros_(module.loadings)
            init.ones_(module.noise)
            init.zeros_(module.component_means)
            init.zeros_(module.component_logits)
            init.zeros_(module.transition_logits)
            init.zeros_(module.coupling)
            init.zeros_(module.plain_root)
            init.zeros_(module.plain_coupling)
            init.zeros_(module.plain_share)
            init.ones_(module.evidence_scale)
        elif isinstance(module, GppcModel):
            init.normal_(module.latents, mean=0.0, std=spread)
        elif isinstance(module, GppcReadout):
            # Zero gene vectors: training starts at the linear response and departs where data asks for it.
            init.zeros_(module.gene_vectors)
            init.zeros_(module.gene_vectors_logvar)
            init.zeros_(module.gene_logvar)


class GppcModel(GppcPreTrainedModel):
    """Encodes a cell state into latents and lets perturbations act on them."""

    def __init__(self, config: GppcConfig):
        super().__init__(config)
        width = config.hidden_size
        self.linear_response = GppcLinearResponse(config)
        self.gene_pool = GppcGenePool(config.vocab_size, config.pool_size)
        self.pool_proj = nn.Linear(config.pool_size, config.num_latents * width)
        self.latents = nn.Parameter(torch.zeros(config.num_latents, width))
        self.encoder = nn.ModuleList([GppcBlock(config) for _ in range(config.encoder_layers)])
        self.perturbation_embedding = nn.Embedding(config.vocab_size, width)
        self.perturbation_proj = nn.Linear(3 * width, width)
        self.factor_proj = nn.Linear(config.num_factors + config.num_components, width)
        self.pairing_embedding = nn.Embedding(len(config.pairings), width)
        self.decoder = nn.ModuleList([GppcBlock(config) for _ in range(config.decoder_layers)])
        self.final_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding that pools the state of a cell."""
        return self.gene_pool

    def set_input_embeddings(self, value: nn.Module):
        """Replaces the embedding that pools the state of a cell."""
        self.gene_pool = value

    def encode(
        self,
        input_ids: torch.LongTensor,
        expression_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        measured_mask: torch.Tensor | None = None,
        panel_index: torch.LongTensor | None = None,
    ) -> GppcEncoderOutput:
        """
        Encodes cell states.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, N)`): Vocabulary ids of the expressed genes.
            expression_values (`torch.FloatTensor` of shape `(B, N)`): Their normalised log values.
            attention_mask (`torch.Tensor` of shape `(B, N)`, *optional*): 1 for a gene, 0 for padding.
            measured_mask (`torch.BoolTensor` of shape `(B, vocab_size)`, *optional*): Measured genes; those without
                a token are measured zeros. Defaults to the genes that have a token. With `panel_index`, shape
                `(P, vocab_size)`: the distinct panels of the batch.
            panel_index (`torch.LongTensor` of shape `(B,)`, *optional*): Row of `measured_mask` of each cell.

        Returns:
            [`GppcEncoderOutput`]
        """
        values, measured = dense_state(
            self.config.vocab_size, input_ids, expression_values, attention_mask, measured_mask, panel_index
        )
        centred = torch.where(measured, values - self.linear_response.gene_mean, torch.zeros_like(values))
        panels = measured if measured_mask is None or panel_index is None else measured_mask.bool()
        with torch.autocast(device_type=values.device.type, enabled=False):
            posterior = self.linear_response.encode(
                centred.float(), panels, None if measured_mask is None else panel_index
            )
        hidden_states = self.pool_proj(self.gene_pool(centred)).view(
            -1, self.config.num_latents, self.config.hidden_size
        )
        hidden_states = hidden_states + self.latents
        for block in self.encoder:
            hidden_states = block(hidden_states)
        return GppcEncoderOutput(
            last_hidden_state=hidden_states,
            state_values=values,
            measured=measured,
            **dict(zip(POSTERIOR, posterior)),
        )

    def imposed_levels(
        self,
        encoded: GppcEncoderOutput,
        perturbation_ids: torch.Tensor,
        perturbation_values: torch.Tensor,
        state_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Log values that the perturbed genes are set to, `(B, K)`: the source's level plus the change.

        Where the source did not measure a gene its level is the one that the rest of the state suggests.
        """
        if state_index is None:
            state_index = torch.arange(perturbation_ids.shape[0], device=perturbation_ids.device)
        source = encoded.state_values[state_index[:, None], perturbation_ids]
        response = self.linear_response
        factors = encoded.factor_mean[state_index].to(response.loadings.dtype)
        # Not a matrix product, which autocast would round.
        shift = (response.loadings[perturbation_ids] * factors[:, None]).sum(-1)
        expected = response.gene_mean[perturbation_ids] + shift
        known = encoded.measured[state_index[:, None], perturbation_ids]
        return torch.where(known, source, expected.to(source.dtype)) + perturbation_values

    def decode(
        self,
        encoded: GppcEncoderOutput,
        perturbation_ids: torch.LongTensor,
        perturbation_values: torch.FloatTensor,
        perturbation_mask: torch.Tensor,
        pairing_ids: torch.LongTensor,
        state_index: torch.LongTensor | None = None,
    ) -> tuple[GppcModelOutput, torch.Tensor]:
        """
        Lets perturbations act on encoded states; arguments as in `forward`.

        Nothing as wide as the vocabulary is copied for a row that shares its state with others.

        Args:
            state_index (`torch.LongTensor` of shape `(B,)`, *optional*): Which encoded state each row acts on;
                defaults to one a row.

        Returns:
            [`GppcModelOutput`] and the imposed levels `(B, K)`.
        """
        levels = self.imposed_levels(encoded, perturbation_ids, perturbation_values, state_index)
        with torch.autocast(device_type=levels.device.type, enabled=False):
            component_logits, factor_mean, factor_covariance = self.linear_response.condition(
                encoded.component_logits.float(),
                encoded.factor_residual.float(),
                encoded.factor_covariance.float(),
                pairing_ids,
                perturbation_ids,
                levels.float(),
                perturbation_mask,
                state_index,
                encoded.plain_mean,
                encoded.plain_covariance,
            )
        response = self.linear_response
        identity = self.perturbation_embedding(perturbation_ids)
        surprise = (levels - response.gene_mean[perturbation_ids]).to(identity.dtype)[:, :, None]
        change = perturbation_values.to(identity.dtype)[:, :, None]
        tokens = self.perturbation_proj(torch.cat([identity, surprise * identity, change * identity], dim=-1))
        expected = torch.cat([factor_mean, component_logits.exp()], dim=-1)
        linear_token = self.factor_proj(expected.to(identity.dtype))[:, None]
        states = encoded.last_hidden_state if state_index is None else encoded.last_hidden_state[state_index]
        latents = states + self.pairing_embedding(pairing_ids)[:, None]
        hidden_states = torch.cat([latents, linear_token, tokens], dim=1)
        ones = perturbation_mask.new_ones(perturbation_mask.shape[0], latents.shape[1] + 1)
        visible = torch.cat([ones, perturbation_mask], dim=1).bool()
        attention_mask = torch.zeros(visible.shape, dtype=hidden_states.dtype, device=visible.device)
        attention_mask = attention_mask.masked_fill(~visible, torch.finfo(hidden_states.dtype).min)[:, None, None]
        attention_mask = attention_mask.expand(-1, -1, hidden_states.shape[1], -1)
        for block in self.decoder:
            hidden_states = block(hidden_states, attention_mask)
        hidden_states = self.final_norm(hidden_states[:, : latents.shape[1] + 1])
        output = GppcModelOutput(
            last_hidden_state=hidden_states,
            encoder_last_hidden_state=states,
            factor_mean=factor_mean,
            factor_covariance=factor_covariance,
        )
        return output, levels

    def default_inputs(
        self,
        rows: int,
        device: torch.device,
        perturbation_ids: torch.Tensor | None = None,
        perturbation_values: torch.Tensor | None = None,
        perturbation_mask: torch.Tensor | None = None,
        pairing_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fills in what may be left out: no perturbation, all perturbations real, the default pairing."""
        if perturbation_ids is None:
            perturbation_ids = torch.zeros(rows, 0, dtype=torch.long, device=device)
            perturbation_values = torch.zeros(rows, 0, device=device)
        elif perturbation_values is None or perturbation_values.shape != perturbation_ids.shape:
            shape = None if perturbation_values is None else tuple(perturbation_values.shape)
            raise ValueError(
                f"`perturbation_values` has shape {shape}; wanted {tuple(perturbation_ids.shape)}, "
                "the change of log value of each of `perturbation_ids`."
            )
        if perturbation_mask is None:
            perturbation_mask = torch.ones_like(perturbation_ids)
        if pairing_ids is None:
            default = self.config.pairings.index(self.config.default_pairing)
            pairing_ids = torch.full((rows,), default, dtype=torch.long, device=device)
        # Padding may hold anything; what it holds must not reach a sum.
        real = perturbation_mask.bool()
        perturbation_ids = torch.where(real, perturbation_ids, torch.zeros_like(perturbation_ids))
        perturbation_values = torch.where(real, perturbation_values, torch.zeros_like(perturbation_values))
        return perturbation_ids, perturbation_values, perturbation_mask, pairing_ids

    def forward(
        self,
        input_ids: torch.LongTensor,
        expression_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        measured_mask: torch.Tensor | None = None,
        panel_index: torch.LongTensor | None = None,
        **perturbations,
    ) -> GppcModelOutput:
        """Encodes and decodes; see [`GppcForPerturbationPrediction.forward`] for the arguments."""
        encoded = self.encode(input_ids, expression_values, attention_mask, measured_mask, panel_index)
        given = self.default_inputs(input_ids.shape[0], input_ids.device, **perturbations)
        return self.decode(encoded, *given)[0]


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
        self, hidden_states: torch.Tensor, query_ids: torch.Tensor | None, query: GppcQuery | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Departure of the mean and of the log variance from the linear response, each `(B, Q)`."""
        state = self.dropout(self.activation(self.proj(hidden_states.flatten(1))))
        # Gathered in here, where sharded weights are whole, unless it was done before.
        found = self.gather(query_ids) if query is None else query
        vectors, vectors_logvar, gene_logvar = found["vectors"], found["vectors_logvar"], found["gene_logvar"]
        departure = state @ vectors.T
        logvar = state.detach() @ vectors_logvar.T + gene_logvar
        return departure, MAX_LOG_VARIANCE_CHANGE * torch.tanh(logvar / MAX_LOG_VARIANCE_CHANGE)


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

    def forward(self, values: torch.Tensor, changes: torch.Tensor, query_ids: torch.Tensor) -> torch.Tensor:
        """Expected log values `(B, Q)` from values and changes over the whole vocabulary, each `(B, V)`."""
        state = self.embedding.weight * values[:, :, None] * self.scale
        for layer in self.encoder:
            state = layer(state)
        tokens = self.embedding.weight * changes[:, :, None] * self.scale
        for layer in self.decoder:
            tokens = layer(tokens, state)
        return self.head(tokens)[:, query_ids, 0]


class GppcForPerturbationPrediction(GppcPreTrainedModel):
    """Predicts the expression of every gene after imposed changes, with a variance."""

    # Trainer then passes the number of scored genes in all batches of an optimiser step, on all processes.
    accepts_loss_kwargs = True

    def __init__(self, config: GppcConfig):
        super().__init__(config)
        self.model = GppcModel(config) if config.architecture == "latents" else None
        self.readout = GppcReadout(config) if config.architecture == "latents" else None
        self.origin = GppcOriginForm(config) if config.architecture == "origin" else None
        self.post_init()

    def encode(self, *args, **kwargs) -> GppcEncoderOutput:
        """Encodes cell states once, for many calls of `decode`; see [`GppcModel.encode`]."""
        return self.model.encode(*args, **kwargs)

    def query(self, query_ids: torch.LongTensor | None = None) -> GppcQuery:
        """Gathers what genes `query_ids` `(Q,)`, or all, are read out with, for many calls of `decode`.

        Raises:
            ValueError: If a gene is named twice.
        """
        found = {**self.model.linear_response.gather(query_ids), **self.readout.gather(query_ids)}
        if query_ids is None:
            return GppcQuery(**found)
        times = torch.bincount(query_ids)
        if times.max() > 1:
            raise ValueError(f"`query_ids` names gene {int(times.argmax())} {int(times.max())} times; give it once.")
        place = torch.full((self.config.vocab_size + 1,), len(query_ids), device=query_ids.device)
        place[query_ids] = torch.arange(len(query_ids), device=query_ids.device)
        return GppcQuery(query_ids=query_ids, place=place, **found)

    def decode(
        self,
        encoded: GppcEncoderOutput,
        perturbation_ids: torch.LongTensor | None = None,
        perturbation_values: torch.FloatTensor | None = None,
        perturbation_mask: torch.Tensor | None = None,
        pairing_ids: torch.LongTensor | None = None,
        query_ids: torch.LongTensor | GppcQuery | None = None,
        state_index: torch.LongTensor | None = None,
    ) -> GppcOutput:
        """
        Predicts expression after perturbations of encoded states.

        Args:
            encoded ([`GppcEncoderOutput`]): From `encode`.
            perturbation_ids, perturbation_values, perturbation_mask, pairing_ids, query_ids: As in `forward`; many
                calls for the same genes are faster with `query_ids=model.query(query_ids)`.
            state_index (`torch.LongTensor` of shape `(B,)`, *optional*): Which encoded state each perturbation acts
                on; defaults to one state a perturbation, or the only state for all.

        Returns:
            [`GppcOutput`] without a loss.
        """
        device = encoded.state_values.device
        states = encoded.state_values.shape[0] if state_index is None else state_index.shape[0]
        rows = states if perturbation_ids is None else perturbation_ids.shape[0]
        if state_index is None and states == 1 and rows > 1:
            states, state_index = rows, torch.zeros(rows, dtype=torch.long, device=device)
        if states != rows:
            raise ValueError(
                f"`perturbation_ids` has {rows} rows for {states} encoded states; wanted one row a "
                "state, a single state, or `state_index`."
            )
        perturbations = self.model.default_inputs(
            rows, device, perturbation_ids, perturbation_values, perturbation_mask, pairing_ids
        )
        query = query_ids if isinstance(query_ids, GppcQuery) else None
        query_ids = query_ids if query is None else query.query_ids
        output, levels = self.model.decode(encoded, *perturbations, state_index)
        response = self.model.linear_response
        with torch.autocast(device_type=device.type, enabled=False):
            # For a few rows the products of loadings cost more than they save.
            pairs = rows > 2 * self.config.num_factors
            gathered = response.gather(query_ids, pairs) if query is None else query
            read = {name: gathered[name] for name in RESPONSE_READ}
            expected, variance = response.read(output.factor_mean, output.factor_covariance, **read)
        base = expected if self.config.use_linear_response else read["gene_mean"].expand_as(expected)
        logits, logvar = base, variance.log()
        if self.config.use_departure:
            departure, logvar_change = self.readout(output.last_hidden_state, query_ids, query)
            logits = base + departure.to(base.dtype)
            logvar = logvar + logvar_change.to(base.dtype)
        ids, _, mask, _ = perturbations
        place = None if query is None else query.place
        logits, base = (
            impose(values, query_ids, ids, levels, mask, self.config.vocab_size, place) for values in (logits, base)
        )
        return GppcOutput(
            logits=logits,
            logvar=logvar,
            linear_response=base,
            departure=(logits - base).float().square().mean(dim=1).sqrt().detach(),
            encoder_last_hidden_state=output.encoder_last_hidden_state,
            decoder_last_hidden_state=output.last_hidden_state,
        )

    def forward(
        self,
        input_ids: torch.LongTensor,
        expression_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        measured_mask: torch.Tensor | None = None,
        panel_index: torch.LongTensor | None = None,
        perturbation_ids: torch.LongTensor | None = None,
        perturbation_values: torch.FloatTensor | None = None,
        perturbation_mask: torch.Tensor | None = None,
        pairing_ids: torch.LongTensor | None = None,
        query_ids: torch.LongTensor | None = None,
        labels: torch.FloatTensor | None = None,
        label_weights: torch.FloatTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> GppcOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, N)`): Vocabulary ids of the expressed genes.
            expression_values (`torch.FloatTensor` of shape `(B, N)`): Their normalised log values.
            attention_mask (`torch.Tensor` of shape `(B, N)`, *optional*): 1 for a gene, 0 for padding.
            measured_mask (`torch.BoolTensor`, *optional*): See [`GppcModel.encode`].
            panel_index (`torch.LongTensor` of shape `(B,)`, *optional*): See [`GppcModel.encode`].
            perturbation_ids (`torch.LongTensor` of shape `(B, K)`, *optional*): Genes whose expression is imposed.
            perturbation_values (`torch.FloatTensor` of shape `(B, K)`, *optional*): Change of their log values.
            perturbation_mask (`torch.Tensor` of shape `(B, K)`, *optional*): 1 for a perturbation, 0 for padding.
            pairing_ids (`torch.LongTensor` of shape `(B,)`, *optional*): Index into `config.pairings` of the context
                that source and target share; defaults to `config.default_pairing`.
            query_ids (`torch.LongTensor` of shape `(Q,)`, *optional*): Genes to predict; defaults to all.
            labels (`torch.FloatTensor` of shape `(B, Q)`, *optional*): Log values of the target, -100 where not
                measured there.
            label_weights (`torch.FloatTensor` of shape `(Q,)`, *optional*): Weight of each gene in the loss, where
                genes were queried with unequal chances; defaults to 1.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Scored genes that the loss is divided by, where
                this batch is one of several that make an optimiser step; defaults to those of this batch.

        Returns:
            [`GppcOutput`]
        """
        if self.origin is not None:
            output = self._forward_origin(
                input_ids,
                expression_values,
                attention_mask,
                measured_mask,
                panel_index,
                perturbation_ids,
                perturbation_values,
                perturbation_mask,
                query_ids,
            )
        else:
            encoded = self.encode(input_ids, expression_values, attention_mask, measured_mask, panel_index)
            output = self.decode(
                encoded, perturbation_ids, perturbation_values, perturbation_mask, pairing_ids, query_ids
            )
        if labels is not None:
            output.loss = self.loss(output, labels, num_items_in_batch, label_weights)
        return output

    def loss(
        self,
        output: GppcOutput,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        label_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean squared error over the scored genes; the variance's likelihood sees the mean as given.

        The mean is fitted by squared error alone: a Gaussian likelihood would let genes with a large predicted
        variance off.
        """
        scored = labels != IGNORED_LABEL
        count = (scored.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)).clamp(min=1)
        error = torch.where(scored, output.logits - labels, torch.zeros_like(labels)).float()
        squared = error.square() if label_weights is None else error.square() * label_weights
        loss = squared.sum() / count
        if output.logvar is not None and self.config.variance_loss_weight > 0 and self.config.use_departure:
            logvar = output.logvar.float()
            likelihood = 0.5 * (logvar + error.detach().square() * torch.exp(-logvar))
            likelihood = torch.where(scored, likelihood, torch.zeros_like(likelihood))
            if label_weights is not None:
                likelihood = likelihood * label_weights
            loss = loss + self.config.variance_loss_weight * likelihood.sum() / count
        return loss

    def _forward_origin(
        self,
        input_ids,
        expression_values,
        attention_mask,
        measured_mask,
        panel_index,
        perturbation_ids,
        perturbation_values,
        perturbation_mask,
        query_ids,
    ) -> GppcOutput:
        values, _ = dense_state(
            self.config.vocab_size, input_ids, expression_values, attention_mask, measured_mask, panel_index
        )
        changes = torch.zeros_like(values)
        if perturbation_ids is not None:
            mask = torch.ones_like(perturbation_ids) if perturbation_mask is None else perturbation_mask
            # Padding may hold anything, NaN included.
            given = torch.where(mask.bool(), perturbation_values, torch.zeros_like(perturbation_values))
            changes = changes.scatter_add(1, perturbation_ids, given)
        if query_ids is None:
            query_ids = torch.arange(self.config.vocab_size, device=values.device)
        return GppcOutput(logits=self.origin(values, changes, query_ids))


def impose(
    predicted: torch.Tensor,
    query_ids: torch.Tensor | None,
    perturbation_ids: torch.Tensor,
    levels: torch.Tensor,
    mask: torch.Tensor,
    vocab_size: int,
    place: torch.Tensor | None = None,
) -> torch.Tensor:
    """Puts the imposed levels `(B, K)` in the place of predictions `(B, Q)` of the perturbed genes themselves."""
    if perturbation_ids.shape[1] == 0:
        return predicted
    # Padding is no gene: it equals no query and goes, as genes that are not asked for, to a column that is cut off.
    columns = torch.where(mask.bool(), perturbation_ids, vocab_size)
    levels = levels.to(predicted.dtype)
    if query_ids is None or place is not None:
        columns = columns if place is None else place[columns]
        wider = torch.cat([predicted, predicted.new_zeros(predicted.shape[0], 1)], dim=1)
        return wider.scatter(1, columns, levels)[:, :-1]
    for column in range(columns.shape[1]):
        one = slice(column, column + 1)
        predicted = torch.where(query_ids == columns[:, one], levels[:, one], predicted)
    return predicted


__all__ = ["GppcForPerturbationPrediction", "GppcModel", "GppcPreTrainedModel"]
