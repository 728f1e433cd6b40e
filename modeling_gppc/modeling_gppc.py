"""PyTorch GPPC model: state encoder, perturbation decoder, linear response and read-outs."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_gppc import GppcConfig
from .layers_gppc import MAX_LOG_VARIANCE_CHANGE, GppcBlock, GppcReadout, dense_state, impose
from .linear_response_gppc import ALWAYS, GppcLinearResponse
from .origin_form_gppc import GppcOriginForm
from .outputs_gppc import GppcEncoderOutput, GppcModelOutput, GppcOutput, GppcQuery
from .screen_response_gppc import GppcResponseOutput, GppcScreenResponse

IGNORED_LABEL = -100.0
# How far pseudobulks of control cells of one batch lie from those of all, in units of a gene's standard deviation: the mean
# over three public screens. So far true responses are expected to lie from predicted ones where nothing better is known.
USUAL_DRIFT = 0.06
# Names of what the linear response says of a source.
POSTERIOR = (
    "component_logits",
    "factor_mean",
    "factor_residual",
    "factor_covariance",
    "plain_mean",
    "plain_covariance",
    "likeness",
)
# Fields of a query that the linear response is read with.
RESPONSE_READ = ("gene_mean", "loadings", "noise", "pairs")


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
            init.zeros_(module.reference_source)
            init.zeros_(module.reference_target)
            init.zeros_(module.reference_logits)
            init.zeros_(module.reference_covariance)
            init.ones_(module.reference_width)
            init.constant_(module.familiarity_logit, ALWAYS)
            init.ones_(module.evidence_scale)
        elif isinstance(module, GppcScreenResponse):
            module.reset()
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
        self.state_proj = nn.Linear(config.num_factors + config.num_components, config.num_latents * width)
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
        """The embedding of perturbed genes."""
        return self.perturbation_embedding

    def set_input_embeddings(self, value: nn.Module):
        """Replaces the embedding of perturbed genes."""
        self.perturbation_embedding = value

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
        # What the linear response knows of the cell is all that the network sees of it: a projection of the genes that
        # was fitted in closed form, and not one that noisy cells have to teach it.
        logits, factors, *_ = posterior
        known = torch.cat([factors, logits.exp()], dim=-1).to(self.state_proj.weight.dtype)
        hidden_states = self.state_proj(known).view(-1, self.config.num_latents, self.config.hidden_size)
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
        shift = (nn.functional.embedding(perturbation_ids, response.loadings) * factors[:, None]).sum(-1)
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
        padded: bool = True,
        familiarity: torch.Tensor | None = None,
    ) -> tuple[GppcModelOutput, torch.Tensor]:
        """
        Lets perturbations act on encoded states; arguments as in `forward`.

        Nothing as wide as the vocabulary is copied for a row that shares its state with others.

        Args:
            state_index (`torch.LongTensor` of shape `(B,)`, *optional*): Which encoded state each row acts on;
                defaults to one a row.
            padded (`bool`, *optional*, defaults to `True`): Whether `perturbation_mask` may hold zeros; attention is
                faster without a mask.
            familiarity (`torch.FloatTensor` of shape `(B,)`, *optional*): As in
                [`GppcForPerturbationPrediction.decode`].

        Returns:
            [`GppcModelOutput`] and the imposed levels `(B, K)`.
        """
        levels = self.imposed_levels(encoded, perturbation_ids, perturbation_values, state_index)
        with torch.autocast(device_type=levels.device.type, enabled=False):
            component_logits, factor_mean, factor_covariance, familiarity, whole = self.linear_response.condition(
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
                # A network that is trained behind it would learn to make up for it.
                None if self.training else encoded.likeness,
                perturbation_values,
                familiarity,
            )
        response = self.linear_response
        identity = self.perturbation_embedding(perturbation_ids)
        surprise = (levels - response.gene_mean[perturbation_ids]).to(identity.dtype)[:, :, None]
        change = perturbation_values.to(identity.dtype)[:, :, None]
        tokens = self.perturbation_proj(torch.cat([identity, surprise * identity, change * identity], dim=-1))
        expected = torch.cat([whole, component_logits.exp()], dim=-1)
        linear_token = self.factor_proj(expected.to(identity.dtype))[:, None]
        states = encoded.last_hidden_state
        if state_index is not None:
            states = states.index_select(0, state_index)
        latents = states + self.pairing_embedding(pairing_ids)[:, None]
        shared, pairings = None, len(self.config.pairings)
        if state_index is not None and encoded.last_hidden_state.shape[0] * pairings < len(state_index):
            # Fewer states and pairings than rows: the first block projects the latents of each once.
            every = encoded.last_hidden_state[:, None] + self.pairing_embedding.weight[:, None]
            shared = every.flatten(0, 1), state_index * pairings + pairing_ids
        hidden_states = torch.cat([latents, linear_token, tokens], dim=1)
        attention_mask = None
        if padded:
            ones = perturbation_mask.new_ones(perturbation_mask.shape[0], latents.shape[1] + 1)
            visible = torch.cat([ones, perturbation_mask], dim=1).bool()
            attention_mask = torch.zeros(visible.shape, dtype=hidden_states.dtype, device=visible.device)
            attention_mask = attention_mask.masked_fill(~visible, torch.finfo(hidden_states.dtype).min)[:, None, None]
            attention_mask = attention_mask.expand(-1, -1, hidden_states.shape[1], -1)
        # Nothing reads what the last block would make of the perturbations' own tokens.
        kept = latents.shape[1] + 1
        for place, block in enumerate(self.decoder):
            keep = kept if place == len(self.decoder) - 1 else None
            mask = None if attention_mask is None else attention_mask[:, :, :keep]
            hidden_states = block(hidden_states, mask, keep, None if place else shared)
        hidden_states = self.final_norm(hidden_states[:, :kept])
        output = GppcModelOutput(
            last_hidden_state=hidden_states,
            encoder_last_hidden_state=states,
            factor_mean=factor_mean,
            factor_covariance=factor_covariance,
            familiarity=familiarity,
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


class GppcForPerturbationPrediction(GppcPreTrainedModel):
    """Predicts the expression of every gene after imposed changes, with a variance."""

    # Trainer then passes the number of scored genes in all batches of an optimiser step, on all processes.
    accepts_loss_kwargs = True

    def __init__(self, config: GppcConfig):
        super().__init__(config)
        self.model = GppcModel(config) if config.architecture == "latents" else None
        self.readout = GppcReadout(config) if config.architecture == "latents" else None
        self.origin = GppcOriginForm(config) if config.architecture == "origin" else None
        self.screen_response = GppcScreenResponse(config) if config.use_screen_response else None
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
        # Laid out as the matrix products want them, which read them many times.
        found = {name: table.T.contiguous().T if table.ndim == 2 else table for name, table in found.items()}
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
        familiarity: torch.Tensor | None = None,
        with_variance: bool = True,
    ) -> GppcOutput:
        """
        Predicts expression after perturbations of encoded states.

        Args:
            encoded ([`GppcEncoderOutput`]): From `encode`.
            perturbation_ids, perturbation_values, perturbation_mask, pairing_ids, query_ids: As in `forward`; many
                calls for the same genes are faster with `query_ids=model.query(query_ids)`.
            state_index (`torch.LongTensor` of shape `(B,)`, *optional*): Which encoded state each perturbation acts
                on; defaults to one state a perturbation, or the only state for all.
            familiarity (`torch.FloatTensor` of shape `(B,)`, *optional*): Taken instead of what the imposed levels say.
                What a prediction is compared with should be asked for with that prediction's `familiarity`: else the
                difference holds what one Gaussian and the whole model say of the same cell.
            with_variance (`bool`, *optional*, defaults to `True`): Whether to predict `logvar` too, a quarter to a half
                of the work of a large screen.

        Returns:
            [`GppcOutput`] without a loss; without `logvar` if that was not wanted.

        Raises:
            ValueError: If rows do not fit the encoded states, or `perturbation_values` does not fit `perturbation_ids`.
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
        padded = perturbation_mask is not None
        output, levels = self.model.decode(encoded, *perturbations, state_index, padded, familiarity)
        response = self.model.linear_response
        with torch.autocast(device_type=device.type, enabled=False):
            # For a few rows the products of loadings cost more than they save.
            pairs = with_variance and rows > 2 * self.config.num_factors
            gathered = response.gather(query_ids, pairs) if query is None else query
            read = {name: gathered[name] for name in RESPONSE_READ}
            covariance = output.factor_covariance if with_variance else None
            expected, variance = response.read(output.factor_mean, covariance, **read)
        ids, _, mask, _ = perturbations
        place = None if query is None else query.place

        def put(levels: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return impose(values, query_ids, ids, levels, mask, self.config.vocab_size, place)

        # Done in place as far as can be: every pass below is over a tensor as large as the answer.
        base = expected if self.config.use_linear_response else read["gene_mean"].expand_as(expected).clone()
        base = put(levels, base)
        logits, logvar, size = base, None if variance is None else variance.log_(), base.new_zeros(rows)
        if self.config.use_departure:
            departure, logvar_change = self.readout(
                output.last_hidden_state, output.familiarity, query_ids, query, with_variance
            )
            departure = put(torch.zeros_like(levels), departure.to(base.dtype))
            size = torch.linalg.vector_norm(departure.detach().float(), dim=1) / departure.shape[1] ** 0.5
            logits = departure.add_(base)
            if logvar is not None:
                logvar = logvar.add_(logvar_change, alpha=2.0 * MAX_LOG_VARIANCE_CHANGE).sub_(MAX_LOG_VARIANCE_CHANGE)
        return GppcOutput(
            logits=logits,
            logvar=logvar,
            linear_response=base,
            departure=size,
            familiarity=output.familiarity,
            encoder_last_hidden_state=output.encoder_last_hidden_state,
            decoder_last_hidden_state=output.last_hidden_state,
        )

    def levels(self, encoded: GppcEncoderOutput | None = None) -> torch.Tensor:
        """
        Log values of encoded cells, `(B, vocab_size)`; where a gene was not measured, what the rest of the cell suggests.

        Without cells the mean of the cells that the linear response was fitted on, `(1, vocab_size)`: of a screen, its
        controls.
        """
        response = self.model.linear_response
        if encoded is None:
            return response.gene_mean[None]
        expected = response.gene_mean + encoded.factor_mean.to(response.loadings.dtype) @ response.loadings.T
        return torch.where(encoded.measured, encoded.state_values, expected.to(encoded.state_values.dtype))

    @torch.no_grad()
    def respond(
        self,
        encoded: GppcEncoderOutput | None = None,
        perturbation_ids: torch.LongTensor | None = None,
        perturbation_values: torch.FloatTensor | None = None,
        perturbation_mask: torch.Tensor | None = None,
        pairing_ids: torch.LongTensor | None = None,
        query_ids: torch.LongTensor | None = None,
        state_index: torch.LongTensor | None = None,
    ) -> GppcResponseOutput:
        """
        What changes when expression is imposed: the prediction with the imposed levels minus that without.

        The only place that subtracts. Both predictions are asked for in one frame, at the same familiarity. A model of
        a CRISPR screen answers with what its perturbations were seen to do, see [`GppcScreenResponse`]; its answer does
        not depend on the cells, beyond the level of the imposed genes in them.

        Args:
            encoded ([`GppcEncoderOutput`], *optional*): Cells, from `encode`. Only a model of a screen answers without,
                for its own control cells.
            perturbation_ids (`torch.LongTensor` of shape `(B, K)`): Genes whose expression is imposed. A model of a
                screen also knows ids beyond the vocabulary, see [`GppcFeatureExtractor.target_index`].
            perturbation_values (`torch.FloatTensor` of shape `(B, K)`): Change of their log values.
            perturbation_mask, pairing_ids, query_ids, state_index: As in `decode`.

        Returns:
            [`GppcResponseOutput`]

        Raises:
            ValueError: If nothing is asked, or cells are missing where they are needed.

        Example:

        ```python
        features = extractor.perturbation_features("STAT1=ko", model.levels())  # in the mean control cell of a screen
        model.respond(**features).change  # of the log value of every gene, (1, vocab_size)
        ```
        """
        if perturbation_ids is None or perturbation_values is None:
            raise ValueError("`perturbation_ids` and `perturbation_values` are missing; wanted both, of shape (B, K).")
        if encoded is None and self.screen_response is None:
            raise ValueError("`encoded` is missing; only a model of a screen knows the cells that it answers for.")
        rows = len(perturbation_ids)
        if encoded is not None and state_index is None:
            states = len(encoded.state_values)
            state_index = torch.arange(rows, device=perturbation_ids.device) if states == rows else None
            state_index = torch.zeros_like(perturbation_ids[:, 0]) if states == 1 else state_index
        if pairing_ids is None:
            default = self.config.pairings.index(self.config.default_pairing)
            pairing_ids = torch.full((rows,), default, dtype=torch.long, device=perturbation_ids.device)
        mask = torch.ones_like(perturbation_ids) if perturbation_mask is None else perturbation_mask
        if self.screen_response is not None:
            output = self.screen_response(self.model.linear_response, perturbation_ids, perturbation_values, mask)
            if query_ids is not None:
                output.change, output.variance = output.change[:, query_ids], output.variance[:, query_ids]
            if encoded is not None:
                output.expression = self._unperturbed(encoded, pairing_ids, query_ids, state_index) + output.change
            return output
        after = self.decode(
            encoded,
            perturbation_ids,
            perturbation_values,
            perturbation_mask,
            pairing_ids,
            query_ids,
            state_index,
            with_variance=False,
        )
        before = self._unperturbed(encoded, pairing_ids, query_ids, state_index, after.familiarity)
        variance = (USUAL_DRIFT * self.model.linear_response.deviation()) ** 2
        variance = variance if query_ids is None else variance[query_ids]
        # Nothing perturbed: nothing changes, surely. And what is imposed changes by what is imposed.
        asked = mask.bool().any(dim=1, keepdim=True)
        at = {"query_ids": query_ids, "perturbation_ids": perturbation_ids, "mask": mask}
        at["vocab_size"] = self.config.vocab_size
        return GppcResponseOutput(
            change=impose((after.logits - before) * asked, levels=perturbation_values, **at),
            variance=impose(variance * asked, levels=torch.zeros_like(perturbation_values), **at),
            expression=after.logits,
            familiarity=after.familiarity,
        )

    def _unperturbed(self, encoded, pairing_ids, query_ids, state_index, familiarity=None) -> torch.Tensor:
        """Prediction without a perturbation for rows `(B,)` of states and pairings, at their familiarity (1 if absent).

        The mean is linear in the familiarity: each state and pairing is decoded twice, however many rows share it.
        """
        pairs, row = torch.unique(torch.stack([state_index, pairing_ids]), dim=1, return_inverse=True)
        none, whole = (
            self.decode(
                encoded,
                pairing_ids=pairs[1],
                query_ids=query_ids,
                state_index=pairs[0],
                familiarity=torch.full_like(pairs[0], share, dtype=torch.float32),
                with_variance=False,
            ).logits[row]
            for share in (0.0, 1.0)
        )
        return whole if familiarity is None else torch.lerp(none, whole, familiarity[:, None])

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
            values, _ = dense_state(
                self.config.vocab_size, input_ids, expression_values, attention_mask, measured_mask, panel_index
            )
            output = GppcOutput(
                logits=self.origin(values, perturbation_ids, perturbation_values, perturbation_mask, query_ids)
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


__all__ = ["GppcForPerturbationPrediction", "GppcModel", "GppcPreTrainedModel"]
