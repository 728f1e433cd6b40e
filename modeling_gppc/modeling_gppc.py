"""PyTorch GPPC model: cells are encoded once, perturbations act on them, any gene is read out."""

from typing import Unpack

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_gppc import GppcConfig
from .factors_gppc import GppcClosedForm, GppcPerturbation, rows_of
from .layers_gppc import (
    GppcAttention,
    GppcBlock,
    GppcPerturbationEmbeddings,
    GppcReadout,
    impose,
    scatter_tokens,
    where_imposed,
)
from .linear_response_gppc import GppcLinearResponse
from .outputs_gppc import GppcEncoderOutput, GppcModelOutput, GppcOutput
from .response_gppc import GppcResponseMixin
from .screen_response_gppc import GppcScreenResponse

IGNORED_LABEL = -100.0


class GppcDecodeKwargs(TransformersKwargs, total=False):
    """Keyword arguments of `decode`."""

    with_variance: bool


class GppcPreTrainedModel(PreTrainedModel):
    """Fresh weights, loading and saving."""

    config_class = GppcConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _input_embed_layer = "perturbation_embedding"
    _no_split_modules = ["GppcBlock"]
    _keep_in_fp32_modules_strict = ["linear_response"]
    _supports_sdpa = True
    # A dozen tokens: flex attention has nothing to save there, and ends the process on a CPU (torch 2.13).
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GppcBlock, "attentions": GppcAttention}

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
        elif isinstance(module, (GppcClosedForm, GppcScreenResponse)):
            module.reset()
        elif isinstance(module, GppcEncoder):
            init.normal_(module.latents, mean=0.0, std=spread)
        elif isinstance(module, GppcReadout):
            # Zero gene vectors: training starts at the linear response and leaves it where data asks for it.
            init.zeros_(module.gene_vectors)
            init.zeros_(module.gene_vectors_logvar)
            init.zeros_(module.gene_logvar)


class GppcEncoder(GppcPreTrainedModel):
    """Turns what the linear response knows of a cell into latents. That is all the network sees of the cell."""

    def __init__(self, config: GppcConfig):
        super().__init__(config)
        known = config.num_factors + config.num_components
        self.state_proj = nn.Linear(known, config.num_latents * config.hidden_size)
        self.latents = nn.Parameter(torch.zeros(config.num_latents, config.hidden_size))
        self.layers = nn.ModuleList([GppcBlock(config) for _ in range(config.encoder_layers)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, known: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        """Latents `(B, num_latents, hidden_size)` from factors and state probabilities `(B, num_factors + C)`."""
        projected = self.state_proj(known.to(self.state_proj.weight.dtype))
        hidden_states = projected.unflatten(1, self.latents.shape) + self.latents
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class GppcDecoder(GppcPreTrainedModel):
    """Lets latents, a token of what the linear response expects and tokens of perturbations attend to each other."""

    def __init__(self, config: GppcConfig):
        super().__init__(config)
        self.pairing_embedding = nn.Embedding(len(config.pairings), config.hidden_size)
        self.factor_proj = nn.Linear(config.num_factors + config.num_components, config.hidden_size)
        self.layers = nn.ModuleList([GppcBlock(config) for _ in range(config.decoder_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        latents: torch.Tensor,
        expected: torch.Tensor,
        tokens: torch.Tensor,
        perturbation: GppcPerturbation,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Args:
            latents (`torch.FloatTensor` of shape `(B, num_latents, hidden_size)`): From [`GppcEncoder`].
            expected (`torch.FloatTensor` of shape `(B, num_factors + num_components)`): Factors and state probabilities
                that the linear response expects.
            tokens (`torch.FloatTensor` of shape `(B, K, hidden_size)`): From [`GppcPerturbationEmbeddings`].
            perturbation ([`GppcPerturbation`]): What is imposed.

        Returns:
            `BaseModelOutput` with the latents and the linear response's token, `(B, num_latents + 1, hidden_size)`.
        """
        latents = latents + self.pairing_embedding(perturbation.pairing_ids)[:, None]
        linear = self.factor_proj(expected.to(latents.dtype))[:, None]
        hidden_states = torch.cat([latents, linear, tokens], dim=1)
        kept = latents.shape[1] + 1
        mask = nn.functional.pad(perturbation.mask, (kept, 0), value=1)
        attention_mask = create_bidirectional_mask(self.config, hidden_states, mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states[:, :kept]))


class GppcModel(GppcPreTrainedModel):
    """Encodes cells and lets perturbations act on them; [`GppcForPerturbationPrediction`] reads genes out of that."""

    def __init__(self, config: GppcConfig):
        super().__init__(config)
        self.linear_response = GppcLinearResponse(config)
        self.embeddings = GppcPerturbationEmbeddings(config)
        self.encoder = GppcEncoder(config)
        self.decoder = GppcDecoder(config)
        self.post_init()

    def encode(
        self,
        input_ids: torch.LongTensor,
        expression_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        measured_mask: torch.Tensor | None = None,
        panel_index: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GppcEncoderOutput:
        """
        Encodes cells once, for any number of perturbations.

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
        size, response = self.config.vocab_size, self.linear_response
        if measured_mask is None:
            tokens, panel_index = torch.ones_like(expression_values), None
            measured_mask = scatter_tokens(tokens, input_ids, attention_mask, size)
        panels = measured_mask.bool()
        measured = panels if panel_index is None else panels[panel_index]
        values = scatter_tokens(expression_values, input_ids, attention_mask, size).where(measured, 0)
        with torch.autocast(device_type=values.device.type, enabled=False):
            centred = (values.float() - response.gene_mean).where(measured, 0)
            factors = response.encode(centred, panels, panel_index)
            known = torch.cat([factors.states.mean, factors.states.log_weights.exp()], dim=-1)
        encoded = self.encoder(known, return_dict=True, **kwargs)
        return GppcEncoderOutput(
            last_hidden_state=encoded.last_hidden_state,
            state_values=values,
            measured=measured,
            factors=factors,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def perturbation(
        self,
        encoded: GppcEncoderOutput,
        perturbation_ids: torch.LongTensor | None = None,
        perturbation_values: torch.FloatTensor | None = None,
        perturbation_mask: torch.Tensor | None = None,
        pairing_ids: torch.LongTensor | None = None,
        state_index: torch.LongTensor | None = None,
    ) -> GppcPerturbation:
        """What is imposed on encoded cells; arguments and errors as in [`GppcForPerturbationPrediction.decode`].

        An imposed level is the cell's level plus the change. Where the cell did not measure a gene, its level is the one
        that the rest of the cell suggests.
        """
        if state_index is None:
            state_index = torch.arange(len(encoded.state_values), device=encoded.state_values.device)
            if len(state_index) == 1 and perturbation_ids is not None:
                state_index = state_index.expand(len(perturbation_ids))
        if perturbation_ids is None:
            perturbation_ids = state_index.new_zeros(len(state_index), 0)
            perturbation_values = encoded.state_values.new_zeros(len(state_index), 0)
        elif perturbation_values is None or perturbation_values.shape != perturbation_ids.shape:
            shape = None if perturbation_values is None else tuple(perturbation_values.shape)
            raise ValueError(
                f"`perturbation_values` has shape {shape}; wanted {tuple(perturbation_ids.shape)}, "
                "the change of log value of each of `perturbation_ids`."
            )
        if len(perturbation_ids) != len(state_index):
            raise ValueError(
                f"`perturbation_ids` has {len(perturbation_ids)} rows for {len(state_index)} encoded states; wanted one "
                "row a state, a single state, or `state_index`."
            )
        if pairing_ids is None:
            pairing_ids = torch.full_like(state_index, self.config.pairings.index(self.config.default_pairing))
        mask = torch.ones_like(perturbation_ids) if perturbation_mask is None else perturbation_mask
        # Padding may hold anything; what it holds must not reach a sum.
        ids, values = perturbation_ids.where(mask.bool(), 0), perturbation_values.where(mask.bool(), 0)
        cell, response = state_index[:, None], self.linear_response
        loadings = nn.functional.embedding(ids, response.loadings)
        suggested = response.gene_mean[ids] + (loadings * encoded.factors.states.mean[cell]).sum(-1)
        before = encoded.state_values[cell, ids].where(encoded.measured[cell, ids], suggested)
        return GppcPerturbation(state_index, pairing_ids, ids, values, mask, before + values)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        expression_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        measured_mask: torch.Tensor | None = None,
        panel_index: torch.LongTensor | None = None,
        perturbation_ids: torch.LongTensor | None = None,
        perturbation_values: torch.FloatTensor | None = None,
        perturbation_mask: torch.Tensor | None = None,
        pairing_ids: torch.LongTensor | None = None,
        encoder_outputs: GppcEncoderOutput | None = None,
        state_index: torch.LongTensor | None = None,
        familiarity: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GppcModelOutput:
        """
        Encodes cells, unless `encoder_outputs` holds encoded ones, and lets perturbations act on them.

        Arguments as in [`GppcForPerturbationPrediction.forward`] and [`GppcForPerturbationPrediction.decode`].
        """
        if encoder_outputs is None:
            encoder_outputs = self.encode(
                input_ids, expression_values, attention_mask, measured_mask, panel_index, **kwargs
            )
        response = self.linear_response
        with torch.autocast(device_type=response.loadings.device.type, enabled=False):
            perturbation = self.perturbation(
                encoder_outputs, perturbation_ids, perturbation_values, perturbation_mask, pairing_ids, state_index
            )
            factors = response.condition(encoder_outputs.factors, perturbation, familiarity)
            expected = torch.cat([factors.familiar_mean, factors.log_weights.exp()], dim=-1)
        latents = encoder_outputs.last_hidden_state.index_select(0, perturbation.state_index)
        surprise = perturbation.levels - response.gene_mean[perturbation.ids]
        tokens = self.embeddings(perturbation.ids, surprise, perturbation.values)
        decoded = self.decoder(latents, expected, tokens, perturbation, return_dict=True, **kwargs)
        return GppcModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            factors=factors,
            perturbation=perturbation,
            encoder_last_hidden_state=latents,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
        )


class GppcForPerturbationPrediction(GppcPreTrainedModel, GppcResponseMixin):
    """
    Predicts the expression of every gene after levels were imposed on some, with a variance.

    The prediction is a closed-form linear response ([`GppcLinearResponse`]) plus a contribution of the network, as far as
    the imposed levels are familiar ([`GppcFamiliarity`]).

    Example:

    ```python
    >>> inputs = extractor(counts, gene_ids=names)  # cells x genes, raw counts
    >>> encoded = model.encode(**inputs)
    >>> change = extractor.perturbation_features("STAT1=ko", encoded.state_values.numpy())
    >>> output = model.decode(encoded, **change)
    >>> output.logits.shape  # expected log values after the perturbation
    torch.Size([8, 2000])
    ```
    """

    # Trainer then passes the number of scored genes in all batches of an optimiser step, on all processes.
    accepts_loss_kwargs = True

    def __init__(self, config: GppcConfig):
        super().__init__(config)
        self.model = GppcModel(config)
        self.readout = GppcReadout(config)
        self.screen_response = GppcScreenResponse(config) if config.use_screen_response else None
        self.post_init()

    def encode(self, *args, **kwargs) -> GppcEncoderOutput:
        """Encodes cells once, for many calls of `decode`; see [`GppcModel.encode`]."""
        return self.model.encode(*args, **kwargs)

    def decode(
        self,
        encoded: GppcEncoderOutput,
        perturbation_ids: torch.LongTensor | None = None,
        perturbation_values: torch.FloatTensor | None = None,
        perturbation_mask: torch.Tensor | None = None,
        pairing_ids: torch.LongTensor | None = None,
        query_ids: torch.LongTensor | None = None,
        state_index: torch.LongTensor | None = None,
        familiarity: torch.FloatTensor | None = None,
        **kwargs: Unpack[GppcDecodeKwargs],
    ) -> GppcOutput:
        """
        Predicts expression after perturbations of encoded cells. Nothing as wide as the vocabulary is made for a row.

        Args:
            encoded ([`GppcEncoderOutput`]): From `encode`.
            perturbation_ids, perturbation_values, perturbation_mask, pairing_ids, query_ids: As in `forward`.
            state_index (`torch.LongTensor` of shape `(B,)`, *optional*): The encoded cell that each row acts on; defaults
                to one a row, or the only cell for all.
            familiarity (`torch.FloatTensor` of shape `(B,)`, *optional*): Taken instead of what the imposed levels say. A
                prediction is compared with another one at the same familiarity: without a perturbation, ask with that
                of the perturbed one, or the difference holds what two models say of the same cell.
            **kwargs: `with_variance` (`bool`, defaults to `True`): Whether to predict `logvar` too, a quarter to a half
                of the work for many rows. And those of `TransformersKwargs`, such as `output_hidden_states`.

        Returns:
            [`GppcOutput`] without a loss.

        Raises:
            ValueError: If rows do not fit the encoded cells, or `perturbation_values` does not fit `perturbation_ids`.
        """
        with_variance = kwargs.pop("with_variance", True)
        output = self.model(
            encoder_outputs=encoded,
            perturbation_ids=perturbation_ids,
            perturbation_values=perturbation_values,
            perturbation_mask=perturbation_mask,
            pairing_ids=pairing_ids,
            state_index=state_index,
            familiarity=familiarity,
            return_dict=True,
            **kwargs,
        )
        response, factors, perturbation = self.model.linear_response, output.factors, output.perturbation
        with torch.autocast(device_type=response.loadings.device.type, enabled=False):
            linear = response.expected(factors.factors, query_ids)
            logvar = response.variance(factors.factors, query_ids).log_() if with_variance else None
        if not self.config.use_linear_response:
            linear = rows_of(response.gene_mean, query_ids).expand_as(linear)
        imposed = where_imposed(perturbation.ids, perturbation.mask, query_ids, self.config.vocab_size)
        linear = impose(linear, perturbation.levels, imposed)
        logits = linear
        if self.config.use_network:
            mean, change = self.readout(output.last_hidden_state, factors.familiarity, query_ids, with_variance)
            logits = mean.to(linear.dtype).masked_fill_(imposed.any(1), 0).add_(linear)
            logvar = logvar.add_(change) if with_variance else None
        return GppcOutput(
            logits=logits,
            logvar=logvar,
            linear_response=linear,
            familiarity=factors.familiarity,
            encoder_last_hidden_state=output.encoder_last_hidden_state,
            encoder_hidden_states=output.encoder_hidden_states,
            encoder_attentions=output.encoder_attentions,
            decoder_last_hidden_state=output.last_hidden_state,
            decoder_hidden_states=output.decoder_hidden_states,
            decoder_attentions=output.decoder_attentions,
        )

    @can_return_tuple
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> GppcOutput:
        """
        Encodes cells and predicts their expression after perturbations.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, N)`): Vocabulary ids of the expressed genes.
            expression_values (`torch.FloatTensor` of shape `(B, N)`): Their normalised log values.
            attention_mask (`torch.Tensor` of shape `(B, N)`, *optional*): 1 for a gene, 0 for padding.
            measured_mask, panel_index (`torch.Tensor`, *optional*): See [`GppcModel.encode`].
            perturbation_ids (`torch.LongTensor` of shape `(B, K)`, *optional*): Genes whose expression is imposed.
            perturbation_values (`torch.FloatTensor` of shape `(B, K)`, *optional*): Change of their log values.
            perturbation_mask (`torch.Tensor` of shape `(B, K)`, *optional*): 1 for a perturbation, 0 for padding.
            pairing_ids (`torch.LongTensor` of shape `(B,)`, *optional*): Index into `config.pairings` of the context
                that the cells before and after share; defaults to `config.default_pairing`.
            query_ids (`torch.LongTensor` of shape `(Q,)`, *optional*): Genes to predict; defaults to all.
            labels (`torch.FloatTensor` of shape `(B, Q)`, *optional*): Log values of the target, -100 where not
                measured there.
            label_weights (`torch.FloatTensor` of shape `(Q,)`, *optional*): Weight of each gene in the loss, where
                genes were queried with unequal chances; defaults to 1.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Scored genes that the loss is divided by, where
                this batch is one of several that make an optimiser step; defaults to those of this batch.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            [`GppcOutput`]
        """
        encoded = self.encode(input_ids, expression_values, attention_mask, measured_mask, panel_index, **kwargs)
        output = self.decode(
            encoded, perturbation_ids, perturbation_values, perturbation_mask, pairing_ids, query_ids, **kwargs
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
        squared = (output.logits - labels).where(scored, 0).float().square()
        total = squared
        if output.logvar is not None and self.config.variance_loss_weight > 0 and self.config.use_network:
            logvar = output.logvar.float()
            likelihood = 0.5 * (logvar + squared.detach() * torch.exp(-logvar))
            total = squared + self.config.variance_loss_weight * likelihood.where(scored, 0)
        if label_weights is not None:
            total = total * label_weights
        return total.sum() / count


__all__ = ["GppcForPerturbationPrediction", "GppcModel", "GppcPreTrainedModel"]
