"""What changes when expression is imposed: the only place where predictions are subtracted."""

import torch

from .layers_gppc import impose, where_imposed
from .outputs_gppc import GppcEncoderOutput
from .screen_response_gppc import GppcResponseOutput

# How far pseudobulks of control cells of one batch lie from those of all, in units of a gene's standard deviation: the mean
# over three public screens. So far true responses are expected to lie from predicted ones where nothing better is known.
USUAL_DRIFT = 0.06


class GppcResponseMixin:
    """Responses of [`GppcForPerturbationPrediction`]: levels before, and changes."""

    def levels(self, encoded: GppcEncoderOutput | None = None) -> torch.Tensor:
        """
        Log values of encoded cells, `(B, vocab_size)`; where a gene was not measured, what the rest of the cell suggests.

        Without cells the mean of the cells that the linear response was fitted on, `(1, vocab_size)`: of a screen, its
        controls.
        """
        response = self.model.linear_response
        if encoded is None:
            return response.gene_mean[None]
        expected = response.expected(encoded.factors.states)
        return torch.where(encoded.measured, encoded.state_values, expected.to(encoded.state_values.dtype))

    @torch.no_grad()
    def unperturbed(
        self,
        encoded: GppcEncoderOutput,
        pairing_ids: torch.LongTensor | None = None,
        query_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """
        Predictions for encoded cells without a perturbation, at no familiarity and at full: `(2, B, Q)`.

        Familiarity enters a prediction linearly, so these two tell that at any. Give them to [`respond`] where it is
        called often for the same cells.
        """
        asked = {"pairing_ids": pairing_ids, "query_ids": query_ids, "with_variance": False}
        none = encoded.state_values.new_zeros(len(encoded.state_values))
        return torch.stack([self.decode(encoded, familiarity=share, **asked).logits for share in (none, none + 1)])

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
        before: torch.Tensor | None = None,
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
            before (`torch.FloatTensor` of shape `(2, B, Q)`, *optional*): From [`unperturbed`], for the same pairing and
                queries. Computed for every row when absent.

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
        mask = torch.ones_like(perturbation_ids) if perturbation_mask is None else perturbation_mask
        if before is None and encoded is not None and self.screen_response is not None:
            before = self.unperturbed(encoded, query_ids=query_ids)
        if before is not None and state_index is not None:
            before = before[:, state_index]
        if self.screen_response is not None:
            output = self.screen_response(self.model.linear_response, perturbation_ids, perturbation_values, mask)
            if query_ids is not None:
                output.change, output.variance = output.change[:, query_ids], output.variance[:, query_ids]
            if before is not None:
                output.expression = before[1] + output.change
            return output
        asked = {
            "pairing_ids": pairing_ids,
            "query_ids": query_ids,
            "state_index": state_index,
            "with_variance": False,
        }
        after = self.decode(encoded, perturbation_ids, perturbation_values, mask, **asked)
        if before is None:
            nothing = perturbation_ids[:, :0], perturbation_values[:, :0]
            without = self.decode(encoded, *nothing, familiarity=after.familiarity, **asked).logits
        else:
            without = torch.lerp(*before, after.familiarity[:, None])
        variance = (USUAL_DRIFT * self.model.linear_response.deviation()) ** 2
        variance = variance if query_ids is None else variance[query_ids]
        # Nothing perturbed: nothing changes, surely. And what is imposed changes by what is imposed.
        perturbed = mask.bool().any(dim=1, keepdim=True)
        imposed = where_imposed(perturbation_ids, mask, query_ids, self.config.vocab_size)
        return GppcResponseOutput(
            change=impose((after.logits - without) * perturbed, perturbation_values, imposed),
            variance=(variance * perturbed).masked_fill(imposed.any(1), 0),
            expression=after.logits,
            familiarity=after.familiarity,
        )
