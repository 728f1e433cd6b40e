"""Whether cells like a given one were seen to take the imposed levels."""

import torch

from .configuration_gppc import GppcConfig
from .factors_gppc import GppcClosedForm, GppcFactorDistribution, GppcImposedLevels, GppcPerturbation, log_density

# Log odds of a familiarity of one: no reference pair is asked.
ALWAYS = 1e4
# Change of a log value below which nothing was imposed, and nothing is familiar: training shows genes that differ.
LEAST_CHANGE = 0.05


class GppcFamiliarity(GppcClosedForm):
    """
    Probability that imposed levels were drawn from what cells like the source were seen to take.

    Two hypotheses. The levels come from partners of the reference pairs (training pairs, kept as factors), weighted by
    how near the reference's source is to this cell; or from the single Gaussian, which is wide enough for anything.

    Buffers, with `P` pairings and `N` reference pairs of each: factors of both cells as the single Gaussian sees them,
    `source` in terms of its own factors and `target` of the linear response's, both `(P, N, num_factors)`; their log
    weights `logits` `(P, N)`; what the targets leave open, `covariance` `(num_factors, num_factors)`; how near a
    reference has to be in units of what both posteriors leave open, `width` `(P,)`; and the log odds before levels are
    looked at, `prior_logit` `(P,)`.
    """

    START = {"width": 1.0, "prior_logit": ALWAYS}

    def __init__(self, config: GppcConfig):
        super().__init__()
        pairings, references, factors = len(config.pairings), config.num_references, config.num_factors
        self.add_buffers(
            source=(pairings, references, factors),
            target=(pairings, references, factors),
            logits=(pairings, references),
            covariance=(factors, factors),
            width=(pairings,),
            prior_logit=(pairings,),
        )

    def log_weights(
        self, mean: torch.Tensor, precision: torch.Tensor, panel_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Log weights of the reference pairs for `n` cells under each of `P` pairings, `(n x P, N)`.

        Args:
            mean (`torch.FloatTensor` of shape `(n, num_factors)`): Factors of the cells.
            precision, panel_index (`torch.Tensor`): As in [`GppcFactorMixture.posterior`].
        """
        points = self.source.flatten(0, 1)
        # |source - mean|^2 in the metric of the precision, without a tensor of cells x references x factors.
        length = ((points @ precision) * points).sum(-1)
        if panel_index is not None:
            length, precision = length[panel_index], precision[panel_index]
        distance = length - 2 * torch.einsum("nrs,ns->nr", precision, mean) @ points.T
        distance = distance.unflatten(1, self.logits.shape)
        return torch.log_softmax(self.logits - 0.25 * distance / self.width[:, None], dim=2).flatten(0, 1)

    def forward(
        self,
        log_weights: torch.Tensor,
        perturbation: GppcPerturbation,
        levels: GppcImposedLevels,
        single: GppcFactorDistribution,
    ) -> torch.Tensor:
        """Familiarity `(n,)`, from 0 to 1; 1 in training: a network that knew of it would make up for it.

        Args:
            log_weights (`torch.FloatTensor` of shape `(n, N)`): Rows of [`GppcFamiliarity.log_weights`].
            perturbation ([`GppcPerturbation`]): What is imposed on `n` rows.
            levels ([`GppcImposedLevels`]): The same as observations.
            single ([`GppcFactorDistribution`]): What the single Gaussian expects of the cells before levels are imposed.
        """
        pairing_ids = perturbation.pairing_ids
        if self.training or log_weights.shape[1] == 0:
            return torch.ones_like(self.prior_logit[pairing_ids])
        design, centred, log_volume = levels.whitened(self.covariance)
        # References of all pairings meet every row, which is less than copying those of its own pairing for each.
        expected = torch.einsum("nkr,pmr->npkm", design, self.target)
        expected = expected[torch.arange(len(pairing_ids), device=pairing_ids.device), pairing_ids]
        seen = log_density(centred - expected, log_volume)
        design, centred, log_volume = levels.whitened(single.covariance)
        other = log_density(centred - design @ single.means.mT, log_volume)[:, 0]
        familiarity = torch.sigmoid(torch.logsumexp(log_weights + seen, 1) - other + self.prior_logit[pairing_ids])
        real = perturbation.mask.bool()
        unchanged = real.any(1) & ~(real & (perturbation.values.abs() >= LEAST_CHANGE)).any(1)
        return familiarity.masked_fill(unchanged & (self.prior_logit < ALWAYS)[pairing_ids], 0.0)
