"""What perturbations of a screen were seen to do, and what that says of one that was not seen."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from .configuration_gppc import GppcConfig

# Where an answer comes from, by the number in `GppcResponseOutput.source`.
OWN, MEMBERS, RELATIVES, CORRELATION, COMMON = range(5)
SOURCES = (
    "own response: this perturbation was seen in the screen",
    "members: responses of the genes of this combination that were seen alone, added up",
    "relatives: perturbations that were seen, weighted by how alike the features of their targets are",
    "correlation: what varies with the perturbed gene among unperturbed cells of one state",
    "common response: the mean of the perturbations that were seen",
)


@dataclass
class GppcResponseOutput(ModelOutput):
    """
    What changes when expression is imposed; see [`GppcForPerturbationPrediction.respond`].

    Args:
        change (`torch.FloatTensor` of shape `(P, Q)`): Change of the log value of every queried gene.
        variance (`torch.FloatTensor` of shape `(P, Q)`): Variance of the true mean change about it; 0 where imposed.
        direction (`torch.FloatTensor` of shape `(P, Q)`): Probability that the sign of the change is right if the gene
            changes at all, from .5 to 1.
        expression (`torch.FloatTensor` of shape `(P, Q)`, *optional*): Log value of the cells afterwards, where cells
            were given.
        source (`torch.LongTensor` of shape `(P,)`): Where the answer comes from, an index into `SOURCES`.
    """

    change: torch.FloatTensor | None = None
    variance: torch.FloatTensor | None = None
    direction: torch.FloatTensor | None = None
    expression: torch.FloatTensor | None = None
    source: torch.LongTensor | None = None


class GppcScreenResponse(nn.Module):
    """
    Mean response of a population of cells to a perturbation.

    With T perturbations seen, the response to another one, g, is

        scale x (shared(g) + weight x |shared(g)| x direction of the linear response to the change at g)

    where `shared` is the posterior mean of a Gaussian process over perturbations: their mean response, moved towards
    those whose targets have features like g's. A perturbation that was seen answers with its own response, shrunk by
    its sampling error, and a combination with the sum of its members' own responses, where some of them were seen.
    With none seen all there is is [`GppcLinearResponse.respond`].

    Genes are numbered 0 to V - 1 if they are measured (the vocabulary), and V to V + E - 1 if they may only be asked
    about: targets that the panel does not measure, and genes of a table of features. Everything here is closed form,
    see `fitting/fit_screen_response.py`; nothing is trained by gradient.
    """

    def __init__(self, config: GppcConfig):
        super().__init__()
        genes, seen, targets = config.vocab_size, config.num_perturbations, config.vocab_size + config.num_targets
        buffers = {
            # Genes that lengths of responses are measured over: no target of the screen.
            "counted": torch.ones(genes, dtype=torch.bool),
            # How firmly each target is held at the controls' level while another is changed, relative to its noise.
            "held": torch.zeros(genes),
            "variance": torch.ones(genes),
            "mean": torch.zeros(genes),
            # K^-1 (responses - mean), and how like each gene that may be asked about is to each perturbation seen.
            "votes": torch.zeros(seen, genes),
            "likeness": torch.zeros(targets, seen),
            "weight": torch.zeros(()),
            "scale": torch.ones(()),
            "seen_targets": torch.full((seen, config.num_members), -1, dtype=torch.long),
            "own": torch.zeros(seen, genes),
            # Variance of an own response: between replicates x the first factor + of single cells x the second.
            "between": torch.zeros(genes),
            "within": torch.zeros(genes),
            "own_between": torch.zeros(seen),
            "own_within": torch.zeros(seen),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def reset(self):
        """Fresh buffers: no perturbation seen, no change anywhere."""
        for name, buffer in self.named_buffers():
            buffer.fill_({"counted": True, "seen_targets": -1, "variance": 1, "scale": 1}.get(name, 0))

    def forward(
        self,
        linear_response: nn.Module,
        perturbation_ids: torch.LongTensor,
        perturbation_values: torch.FloatTensor,
        perturbation_mask: torch.Tensor,
    ) -> GppcResponseOutput:
        """
        Args:
            linear_response ([`GppcLinearResponse`]): Of the control cells.
            perturbation_ids (`torch.LongTensor` of shape `(P, K)`): Perturbed genes, 0 to V + E - 1.
            perturbation_values (`torch.FloatTensor` of shape `(P, K)`): Change of their log values; not read where a
                gene is not measured.
            perturbation_mask (`torch.Tensor` of shape `(P, K)`): 1 for a gene, 0 for padding.

        Returns:
            [`GppcResponseOutput`] over the vocabulary.
        """
        mask = perturbation_mask.bool()
        linear, _, _ = linear_response.within_state(perturbation_ids, perturbation_values, mask, self.held)
        linear = linear.to(self.mean.dtype)
        length = linear[:, self.counted].norm(dim=1, keepdim=True)
        # Padding is like nothing.
        known = self.likeness[perturbation_ids.clamp(max=len(self.likeness) - 1)]
        likeness = (known * mask[:, :, None]).sum(dim=1)
        shared = self.mean + likeness @ self.votes
        size = shared[:, self.counted].norm(dim=1, keepdim=True)
        along = torch.where(length > 1e-12, linear / length, torch.zeros_like(linear))
        change = self.scale * (shared + self.weight * size * along)
        source = torch.where(likeness.abs().amax(dim=1) > 0, RELATIVES, COMMON)
        variance = self.variance.expand_as(change).clone()
        change, variance, source = self._seen(perturbation_ids, mask, change, variance, source)
        direction = torch.special.ndtr(change.abs() / variance.sqrt().clamp(min=1e-12))
        return GppcResponseOutput(change=change, variance=variance, direction=direction, source=source)

    def _seen(self, ids, mask, change, variance, source):
        """Puts own responses in the place of predicted ones, and sums of members' where some were seen alone."""
        seen = {frozenset(row[row >= 0].tolist()): index for index, row in enumerate(self.seen_targets)}
        for row, (genes, real) in enumerate(zip(ids.tolist(), mask.tolist())):
            genes = frozenset(gene for gene, one in zip(genes, real) if one)
            if genes in seen:
                index = seen[genes]
                change[row], source[row] = self.own[index], OWN
                variance[row] = self.between * self.own_between[index] + self.within * self.own_within[index]
            elif len(genes) > 1:
                alone = [seen.get(frozenset([gene])) for gene in genes]
                if any(index is not None for index in alone):
                    # A member that was not seen alone is expected to do what is predicted for the whole.
                    change[row] = sum(change[row] if index is None else self.own[index] for index in alone)
                    source[row] = MEMBERS
        return change, variance, source


__all__ = ["SOURCES", "GppcResponseOutput", "GppcScreenResponse"]
