"""What imposed expression does to cells."""

import torch

from .layers_gppc import impose, where_imposed
from .outputs_gppc import GppcEncoderOutput
from .screen_response_gppc import CORRELATION, GppcResponseOutput

# Rows that are computed at once: memory grows with rows x genes and rows x factors^2.
CHUNK = 512


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
    def respond(
        self,
        encoded: GppcEncoderOutput | None = None,
        perturbation_ids: torch.LongTensor | None = None,
        perturbation_values: torch.FloatTensor | None = None,
        perturbation_mask: torch.Tensor | None = None,
        query_ids: torch.LongTensor | None = None,
        state_index: torch.LongTensor | None = None,
    ) -> GppcResponseOutput:
        """
        What changes when expression is imposed on cells.

        `decode` says what cells with such levels look like: a monocyte without CST3 is hardly one. Here the cell stays in
        its state, and only what varies within states responds, in closed form (see [`GppcLinearResponse.respond`]). The
        answer depends on the cell through the change of the imposed genes alone: where their level is what it was,
        nothing changes. A model of a CRISPR screen answers with what its perturbations were seen to do, see
        [`GppcScreenResponse`].

        Args:
            encoded ([`GppcEncoderOutput`], *optional*): Cells, from `encode`, to tell their expression afterwards.
            perturbation_ids (`torch.LongTensor` of shape `(B, K)`): Genes whose expression is imposed. A model of a
                screen also knows ids beyond the vocabulary, see [`GppcFeatureExtractor.target_index`].
            perturbation_values (`torch.FloatTensor` of shape `(B, K)`): Change of their log values.
            perturbation_mask, query_ids, state_index: As in `decode`.

        Returns:
            [`GppcResponseOutput`]

        Raises:
            ValueError: If nothing is asked, or rows do not fit the encoded cells.

        Example:

        ```python
        features = extractor.perturbation_features("STAT1=ko", model.levels())  # in the mean cell
        model.respond(**features).change  # of the log value of every gene, (1, vocab_size)
        ```
        """
        if perturbation_ids is None or perturbation_values is None:
            raise ValueError("`perturbation_ids` and `perturbation_values` are missing; wanted both, of shape (B, K).")
        mask = torch.ones_like(perturbation_ids) if perturbation_mask is None else perturbation_mask
        parts = [part.split(CHUNK) for part in (perturbation_ids, perturbation_values, mask.bool())]
        outputs = [self._respond(*rows, query_ids) for rows in zip(*parts)]
        output = GppcResponseOutput(**{name: torch.cat([one[name] for one in outputs]) for name in outputs[0]})
        if encoded is not None:
            levels = self.levels(encoded)
            levels = levels if query_ids is None else levels[:, query_ids]
            levels = levels if state_index is None else levels[state_index]
            if len(levels) not in (1, len(output.change)):
                raise ValueError(
                    f"`perturbation_ids` has {len(output.change)} rows for {len(levels)} encoded states; wanted one row a "
                    "state, a single state, or `state_index`."
                )
            output["expression"] = levels + output.change
        return output

    def _respond(self, ids, values, mask, query_ids) -> GppcResponseOutput:
        """The response of some rows, without `expression`."""
        linear_response, screen = self.model.linear_response, self.screen_response
        if screen is not None and len(screen.own):
            output = screen(linear_response, ids, values, mask)
        else:
            held = None if screen is None else screen.held
            change, variance, direction = linear_response.respond(ids, values, mask, held)
            source = torch.full_like(ids[:, 0], CORRELATION)
            output = GppcResponseOutput(change=change, variance=variance, direction=direction, source=source)
        if query_ids is not None:
            for name in ("change", "variance", "direction"):
                output[name] = output[name][:, query_ids]
        # Nothing perturbed: nothing changes, surely. And what is imposed changes by what is imposed.
        perturbed = mask.any(dim=1, keepdim=True)
        where = where_imposed(ids, mask, query_ids, self.config.vocab_size)
        imposed = where.any(1)
        output.change = impose(output.change * perturbed, values, where)
        output.variance = (output.variance * perturbed).masked_fill(imposed, 0)
        output.direction = output.direction.masked_fill(~perturbed, 0.5).masked_fill(imposed, 1)
        return output
