"""Gaussian distributions of a cell's factors: what measured genes, a partner and imposed levels say of them."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init

from .configuration_gppc import GppcConfig

# Most that imposed levels can add to the log odds of one cell state against another. Unbounded, a few of them carry a
# cell over to the state of another cell type: up to 40 % more squared error where a type's response was held out.
MAX_EVIDENCE = 4.0


class GppcClosedForm(nn.Module):
    """A module of buffers that are fitted in closed form, never by gradient. Fresh ones hold `START`, those of
    `IDENTITIES` the identity, others zero."""

    START: dict[str, float] = {}
    IDENTITIES: tuple[str, ...] = ()

    def add_buffers(self, **shapes: tuple[int, ...]) -> None:
        """Registers fresh buffers of these shapes."""
        for name, shape in shapes.items():
            self.register_buffer(name, torch.empty(shape))
        self.reset()

    def reset(self) -> None:
        """Fills the buffers afresh; those that were loaded keep what they hold."""
        for name, buffer in self.named_buffers(recurse=False):
            if name in self.IDENTITIES:
                init.eye_(buffer)
            else:
                init.constant_(buffer, self.START.get(name, 0.0))

    def _apply(self, fn, recurse=True):
        """Moves the buffers and keeps their precision: matrices are factorised here, whatever `half()` asks for."""

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)


def rows_of(table: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Rows `index` of a table, or all of it."""
    return table if index is None else table.index_select(0, index)


@dataclass
class GppcPerturbation:
    """
    Genes whose expression is imposed, in `B` rows.

    Args:
        state_index (`torch.LongTensor` of shape `(B,)`): The encoded cell that each row acts on.
        pairing_ids (`torch.LongTensor` of shape `(B,)`): Context that the cells before and after share.
        ids (`torch.LongTensor` of shape `(B, K)`): The genes, 0 where the mask is zero.
        values (`torch.FloatTensor` of shape `(B, K)`): Change of their log values, 0 where the mask is zero.
        mask (`torch.Tensor` of shape `(B, K)`): 1 for a gene, 0 for padding.
        levels (`torch.FloatTensor` of shape `(B, K)`): Log values that the genes are set to.
    """

    state_index: torch.Tensor
    pairing_ids: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    levels: torch.Tensor


@dataclass
class GppcFactorDistribution:
    """
    What is known of the factors of `n` cells: a mixture of `C` Gaussians that share one covariance.

    Args:
        log_weights (`torch.FloatTensor` of shape `(n, C)`): Log probability of each Gaussian.
        means (`torch.FloatTensor` of shape `(n, C, num_factors)`): Their means.
        covariance (`torch.FloatTensor` of shape `(n, num_factors, num_factors)`): The covariance of each of them.
    """

    log_weights: torch.Tensor
    means: torch.Tensor
    covariance: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """Mean of the mixture, `(n, num_factors)`."""
        return torch.einsum("nc,ncr->nr", self.log_weights.exp(), self.means)

    def rows(self, index: torch.Tensor) -> "GppcFactorDistribution":
        """The distribution of the cells `index`."""
        parts = (self.log_weights, self.means, self.covariance)
        return GppcFactorDistribution(*(rows_of(part, index) for part in parts))

    def merged(self) -> "GppcFactorDistribution":
        """One Gaussian with the mean and the covariance of the mixture."""
        mean = self.mean[:, None]
        around = self.means - mean
        between = (self.log_weights.exp()[:, :, None] * around).mT @ around
        return GppcFactorDistribution(torch.zeros_like(self.log_weights[:, :1]), mean, self.covariance + between)

    def averaged(self, other: "GppcFactorDistribution", share: torch.Tensor) -> "GppcFactorDistribution":
        """One Gaussian with the mean and the covariance of two, the other one taken with probability `share` `(n,)`."""
        share = share[:, None, None]
        apart = other.means - self.means
        covariance = torch.lerp(self.covariance, other.covariance, share) + share * (1 - share) * apart.mT @ apart
        return GppcFactorDistribution(self.log_weights, self.means + share * apart, covariance)

    def turned(self, root: torch.Tensor) -> "GppcFactorDistribution":
        """The distribution of `root @ factors`."""
        return GppcFactorDistribution(self.log_weights, self.means @ root.T, root @ self.covariance @ root.T)


@dataclass
class GppcImposedLevels:
    """
    Imposed levels as observations of the factors: level = gene mean + design x factors + noise.

    Args:
        design (`torch.FloatTensor` of shape `(n, K, num_factors)`): Loadings of the imposed genes; zero for padding.
        noise (`torch.FloatTensor` of shape `(n, K)`): Variance of their noise; one for padding.
        centred (`torch.FloatTensor` of shape `(n, K)`): Level minus gene mean; zero for padding.
    """

    design: torch.Tensor
    noise: torch.Tensor
    centred: torch.Tensor

    def whitened(self, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Design `(n, K, num_factors)` and centred levels `(n, K, 1)` in units of the levels' own spread, given the
        covariance of the factors; and the log of the volume of that spread, `(n, 1)`."""
        spread = torch.linalg.cholesky(self.design @ covariance @ self.design.mT + torch.diag_embed(self.noise))
        both = torch.cat([self.design, self.centred[:, :, None]], dim=2)
        white = torch.linalg.solve_triangular(spread, both, upper=False)
        return white[:, :, :-1], white[:, :, -1:], spread.diagonal(dim1=1, dim2=2).log().sum(1, keepdim=True)


def log_density(surprise: torch.Tensor, log_volume: torch.Tensor) -> torch.Tensor:
    """Log densities `(n, C)` of whitened levels around what `C` hypotheses expect, up to a constant of K.

    `surprise` `(n, K, C)` is what is left of the levels, see [`GppcImposedLevels.whitened`].
    """
    return -0.5 * surprise.square().sum(1) - log_volume


class GppcFactorMixture(GppcClosedForm):
    """
    How the factors of cells are distributed, and how those of a partner follow from those of a cell.

    In state c factors are N(component_means[c], I). Two partners are coupled between states by transition
    probabilities and within them by Cov(partner's factors, cell's factors) = coupling, one of each a pairing.
    """

    START = {"evidence_scale": 1.0}

    def __init__(self, config: GppcConfig, components: int):
        super().__init__()
        pairings, factors = len(config.pairings), config.num_factors
        self.add_buffers(
            component_means=(components, factors),
            component_logits=(components,),
            transition_logits=(pairings, components, components),
            coupling=(pairings, factors, factors),
            # Counts are not Gaussian: what imposed levels say about the state is trusted only so far.
            evidence_scale=(pairings,),
        )

    def distribution(self) -> GppcFactorDistribution:
        """Factors of a cell of which nothing is known."""
        identity = torch.eye(self.coupling.shape[-1], dtype=self.coupling.dtype, device=self.coupling.device)
        log_weights = torch.log_softmax(self.component_logits, dim=0)
        return GppcFactorDistribution(log_weights[None], self.component_means[None], identity[None])

    def posterior(
        self, information: torch.Tensor, precision: torch.Tensor, panel_index: torch.Tensor | None = None
    ) -> GppcFactorDistribution:
        """Factors of cells given their measured genes.

        Args:
            information (`torch.FloatTensor` of shape `(n, num_factors)`): Loadings' x (value - gene mean) / noise.
            precision (`torch.FloatTensor` of shape `(P, num_factors, num_factors)`): Inverse of the posterior covariance
                of every panel of measured genes.
            panel_index (`torch.LongTensor` of shape `(n,)`, *optional*): Panel of each cell; defaults to one a cell.
        """
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        if panel_index is not None:
            covariance = covariance[panel_index]
        information = information[:, None] + self.component_means
        means = torch.einsum("nrs,ncs->ncr", covariance, information)
        evidence = 0.5 * ((information * means).sum(-1) - self.component_means.square().sum(-1))
        return GppcFactorDistribution(torch.log_softmax(evidence + self.component_logits, -1), means, covariance)

    def partner(self, cell: GppcFactorDistribution) -> GppcFactorDistribution:
        """Factors of partners of `n` cells under each of `P` pairings, `n x P` rows, before a level is imposed.

        The cell's deviation from its state is averaged over states, which is exact where the state is known.
        """
        identity = self.distribution().covariance
        transition = torch.log_softmax(self.transition_logits, dim=-1)
        log_weights = torch.logsumexp(cell.log_weights[:, None, :, None] + transition, dim=2)
        deviation = cell.mean - cell.log_weights.exp() @ self.component_means
        means = self.component_means + torch.einsum("prs,ns->npr", self.coupling, deviation)[:, :, None]
        covariance = identity - self.coupling @ (identity - cell.covariance[:, None]) @ self.coupling.mT
        return GppcFactorDistribution(log_weights.flatten(0, 1), means.flatten(0, 1), covariance.flatten(0, 1))

    def impose(
        self, prior: GppcFactorDistribution, levels: GppcImposedLevels, pairing_ids: torch.Tensor
    ) -> GppcFactorDistribution:
        """Factors given imposed levels too; rows of all arguments belong together."""
        design, centred, log_volume = levels.whitened(prior.covariance)
        surprise = centred - design @ prior.means.mT
        gain = design @ prior.covariance
        evidence = self.evidence_scale[pairing_ids, None] * log_density(surprise, log_volume)
        # Levels choose among the states that such cells were seen to go to; they invent no other.
        evidence = (evidence - evidence.amax(dim=1, keepdim=True)).clamp(min=-MAX_EVIDENCE)
        return GppcFactorDistribution(
            torch.log_softmax(prior.log_weights + evidence, dim=-1),
            prior.means + surprise.mT @ gain,
            prior.covariance - gain.mT @ gain,
        )
