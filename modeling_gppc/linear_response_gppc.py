"""Closed-form linear response: a factor model of expression with cell states, conditioned exactly."""

from dataclasses import dataclass

import torch
from torch import nn

from .configuration_gppc import GppcConfig
from .factors_gppc import (
    GppcClosedForm,
    GppcFactorDistribution,
    GppcFactorMixture,
    GppcImposedLevels,
    GppcPerturbation,
    rows_of,
)
from .familiarity_gppc import GppcFamiliarity
from .layers_gppc import where_imposed

# Of the three explanations of a correlation one is an effect of the imposed gene: it acts on the gene, the gene acts on
# it, or something acts on both (Reichenbach 1956).
SHARE = 1 / 3
# How far pseudobulks of control cells of one batch lie from those of all, in units of a gene's standard deviation: the
# mean over three public screens. No response is taken to be much longer where nothing better is known.
USUAL_DRIFT = 0.06
# Probability that the sign of a response is right: sigmoid(first x |correlation|^second), fitted on simulated systems.
DIRECTION = (7.7, 0.85)


@dataclass
class GppcSourceFactors:
    """
    What the linear response knows of `B` cells; rows of partners are `B` cells x `P` pairings.

    Args:
        states, single ([`GppcFactorDistribution`] of `B` cells): Their factors, by cell states and by the single
            Gaussian, here in terms of its own factors.
        partner_states, partner_single ([`GppcFactorDistribution`] of `B x P` rows): Factors of a partner before levels
            are imposed, by the same two.
        reference_weights (`torch.FloatTensor` of shape `(B x P, num_references)`): See [`GppcFamiliarity`].
    """

    states: GppcFactorDistribution
    single: GppcFactorDistribution
    partner_states: GppcFactorDistribution
    partner_single: GppcFactorDistribution
    reference_weights: torch.Tensor


@dataclass
class GppcTargetFactors:
    """
    What the linear response expects of `B` cells after levels were imposed.

    Args:
        log_weights (`torch.FloatTensor` of shape `(B, num_components)`): Log probabilities of the cell states.
        familiar_mean (`torch.FloatTensor` of shape `(B, num_factors)`): Factors if the levels were familiar.
        factors ([`GppcFactorDistribution`]): One Gaussian: their distribution as far as the levels are familiar.
        familiarity (`torch.FloatTensor` of shape `(B,)`): From 0 to 1, see [`GppcFamiliarity`].
    """

    log_weights: torch.Tensor
    familiar_mean: torch.Tensor
    factors: GppcFactorDistribution
    familiarity: torch.Tensor


class GppcLinearResponse(GppcClosedForm):
    """
    Closed-form part: expression = gene_mean + loadings x factors + noise, conditioned exactly on the measured genes of
    the source and on the imposed levels.

    Factors follow a mixture of cell states (`states`), each of which responds linearly, and the levels tell how
    probable each is. Beside it a single Gaussian for all cells (`single`) does not lead a cell astray that is like none
    seen: the response is the average of both, the single one with weight `single_share`, and returns to the single one
    as far as the levels are not familiar. Its own factors u are seen as `single_root` u.

    All that is what such levels say about a cell. What imposing them *does* to a cell is another question (`respond`):
    its state is held, and only what varies within a state responds. There factors have the covariance
    `within_root` `within_root`'.

    The buffers are fitted from training cells without labels, see `fitting/fit_linear_response.py`. Any set of measured
    genes and any number of imposed genes is exact. Cost a cell: O(V r) for the state, O(k r^2 + k^3 + C k r) for k
    imposed genes, V genes, r factors and C states.
    """

    START = {"noise": 1.0, "share": SHARE, "drift": USUAL_DRIFT}
    IDENTITIES = ("within_root",)

    def __init__(self, config: GppcConfig):
        super().__init__()
        size, factors = config.vocab_size, config.num_factors
        self.add_buffers(gene_mean=(size,), loadings=(size, factors), noise=(size,))
        self.add_buffers(single_root=(factors, factors), single_share=())
        self.add_buffers(within_root=(factors, factors), share=(), drift=())
        self.states = GppcFactorMixture(config, config.num_components)
        self.single = GppcFactorMixture(config, 1)
        self.familiarity = GppcFamiliarity(config)

    def encode(
        self, centred: torch.Tensor, measured: torch.Tensor, panel_index: torch.Tensor | None = None
    ) -> GppcSourceFactors:
        """What measured genes say of cells and of their partners.

        Args:
            centred (`torch.FloatTensor` of shape `(B, vocab_size)`): Value minus gene mean, zero where not measured.
            measured (`torch.BoolTensor` of shape `(P, vocab_size)`): Panels, or one mask a cell (P = B).
            panel_index (`torch.LongTensor` of shape `(B,)`, *optional*): Panel of each cell; defaults to one a cell.
        """
        weighted = self.loadings / self.noise[:, None]
        information, root = centred @ weighted, self.single_root
        precision = self.precision(weighted, measured)
        identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
        states = self.states.posterior(information, identity + precision, panel_index)
        precision = identity + root.T @ precision @ root
        single = self.single.posterior(information @ root, precision, panel_index)
        return GppcSourceFactors(
            states,
            single,
            self.states.partner(states),
            self.single.partner(single).turned(root),
            self.familiarity.log_weights(single.mean, precision, panel_index),
        )

    def precision(self, weighted: torch.Tensor, measured: torch.Tensor) -> torch.Tensor:
        """Precision of the factors from each panel of measured genes, `(P, num_factors, num_factors)`."""
        factors = self.loadings.shape[1]
        measured = measured.to(weighted.dtype)
        if len(measured) <= factors:
            return (measured[:, :, None] * weighted).mT @ self.loadings
        # Many panels: one product over a table of genes x factors^2, which is smaller than panels x genes x factors.
        return (measured @ (weighted[:, :, None] * self.loadings[:, None]).flatten(1)).unflatten(1, (factors, factors))

    def condition(
        self,
        source: GppcSourceFactors,
        perturbation: GppcPerturbation,
        familiarity: torch.Tensor | None = None,
    ) -> GppcTargetFactors:
        """What imposed levels say of partners of cells.

        Args:
            source ([`GppcSourceFactors`]): From `encode`.
            perturbation ([`GppcPerturbation`]): Of `B` rows.
            familiarity (`torch.FloatTensor` of shape `(B,)`, *optional*): Instead of what the levels say.
        """
        ids, mask, pairing_ids = perturbation.ids, perturbation.mask.to(self.noise.dtype), perturbation.pairing_ids
        levels = GppcImposedLevels(
            design=nn.functional.embedding(ids, self.loadings) * mask[:, :, None],
            noise=self.noise[ids] * mask + (1 - mask),
            centred=(perturbation.levels.float() - self.gene_mean[ids]) * mask,
        )
        rows = perturbation.state_index * len(self.states.coupling) + pairing_ids
        single = source.partner_single.rows(rows)
        if familiarity is None:
            weights = rows_of(source.reference_weights, rows)
            familiarity = self.familiarity(weights, perturbation, levels, single)
        states = self.states.impose(source.partner_states.rows(rows), levels, pairing_ids)
        single = self.single.impose(single, levels, pairing_ids)
        merged = states.merged()
        return GppcTargetFactors(
            log_weights=states.log_weights,
            familiar_mean=torch.lerp(merged.mean, single.mean, self.single_share),
            factors=merged.averaged(single, 1 - familiarity * (1 - self.single_share)),
            familiarity=familiarity,
        )

    def within_state(
        self, ids: torch.Tensor, changes: torch.Tensor, mask: torch.Tensor, held: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Linear response of cells that stay in their state: with loadings L within a state and noise N, W = L L',
        change_j = W_jS (W_SS + N_S)^-1 (imposed change at the genes S).

        Args:
            ids, changes, mask (`torch.Tensor` of shape `(P, K)`): Imposed genes, changes of their log values and 1 for a
                gene, 0 for padding. Ids beyond the vocabulary are genes that are not measured: they say nothing.
            held (`torch.FloatTensor` of shape `(vocab_size,)`, *optional*): How firmly genes that are not imposed stay
                where they are, relative to their noise: they are observed at no change with noise / `held`.

        Returns:
            The response `(P, vocab_size)`, its correlation with what is imposed `(P, vocab_size)`, zero where no change is
            imposed, and the standard deviation of every gene within a state `(vocab_size,)`, in double precision.
        """
        loadings, noise = self.loadings.double() @ self.within_root.double(), self.noise.double()
        measured = mask.bool() & (ids < len(loadings))
        ids = ids.where(measured, 0)
        design = loadings[ids] * measured[:, :, None]
        projected = design.mT
        if held is not None:
            firmness = held.double() / noise
            precision = torch.eye(loadings.shape[1]).to(loadings) + (loadings * firmness[:, None]).T @ loadings
            # A gene that is imposed is not held.
            precision = precision - (design * firmness[ids][:, :, None]).mT @ design
            projected = torch.linalg.solve(precision, projected)
        spread = design @ projected + torch.diag_embed(noise[ids].where(measured, 1.0))
        imposed = changes.double().where(measured, 0.0)[:, :, None]
        weights = torch.linalg.solve(spread, imposed)
        linear = (projected @ weights)[:, :, 0] @ loadings.T
        deviation = (loadings.square().sum(1) + noise).sqrt()
        strength = (imposed * weights).sum(1).clamp(min=1e-24).sqrt()
        return linear, linear / (strength * deviation), deviation

    def respond(
        self, ids: torch.Tensor, changes: torch.Tensor, mask: torch.Tensor, held: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        What imposed changes do to cells that stay in their state; arguments as in [`within_state`].

        The linear response is sized by what no perturbed cell was needed for: a `share` of it, levelling off where its
        root mean square over the genes that are not imposed reaches `drift` standard deviations within a state. The true
        change may be nothing, or twice as large: variance = (drift x deviation)^2 + change^2.

        Returns:
            Change of every gene, variance of the true change about it, and the probability that its sign is right if the
            gene changes, each `(P, vocab_size)`.
        """
        linear, correlation, deviation = self.within_state(ids, changes, mask, held)
        others = ~where_imposed(ids, mask, None, len(deviation)).any(1)
        length = (linear.square() * others).sum(1, keepdim=True) / (deviation.square() * others).sum(1, keepdim=True)
        change = self.share * linear / (1 + length / self.drift.double().square()).sqrt()
        variance = (self.drift * deviation).square() + change.square()
        factor, power = DIRECTION
        direction = torch.sigmoid(factor * correlation.abs() ** power)
        return tuple(part.to(self.loadings.dtype) for part in (change, variance, direction))

    def expected(self, factors: GppcFactorDistribution, query_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Expected log values `(B, Q)` of genes `query_ids` `(Q,)`, or of all."""
        return torch.addmm(rows_of(self.gene_mean, query_ids), factors.mean, rows_of(self.loadings, query_ids).T)

    def variance(self, factors: GppcFactorDistribution, query_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Variance `(B, Q)` of the log values of genes `query_ids` `(Q,)`, or of all."""
        loadings, noise = rows_of(self.loadings, query_ids), rows_of(self.noise, query_ids)
        covariance = factors.covariance
        if len(covariance) <= loadings.shape[1]:
            variance = noise + ((loadings @ covariance) * loadings).sum(-1)
        else:
            # Many rows: one product over pairs of factors, and nothing as large as rows x genes x factors.
            first, second = torch.triu_indices(loadings.shape[1], loadings.shape[1], device=loadings.device)
            products = loadings.index_select(1, first) * loadings.index_select(1, second)
            twice = covariance[:, first, second] * (2 - (first == second).to(covariance.dtype))
            variance = torch.addmm(noise, twice, products.T)
        return variance.clamp_(min=noise)
