"""Closed-form linear response: a factor model of expression with cell states, conditioned exactly."""

import torch
from torch import nn

from .configuration_gppc import GppcConfig

# What imposed levels can add to the log odds of one cell state against another. Unbounded, a few of them carry a cell
# over to the state of another cell type whose cells have such levels: right within the training data, and up to 40 %
# more squared error than one Gaussian where a type's response was held out.
MAX_EVIDENCE = 4.0
# Log odds of a familiarity of one: no reference pair is asked.
ALWAYS = 1e4
# Change of a log value below which nothing was imposed; training reveals genes that differ between two cells.
LEAST_CHANGE = 0.05


class GppcLinearResponse(nn.Module):
    """
    Closed-form part: a factor model of expression, conditioned exactly on the source state and the imposed levels.

    Expression = gene_mean + loadings z + noise. The factors z follow a mixture of `num_components` cell states that
    share one covariance, z | c ~ N(component_means[c], I). Source and target are coupled between states by transition
    probabilities and within them by Cov(z_target, z_source) = coupling, one of each a pairing. With one component this
    is the conditional Gaussian; with more, each state responds linearly and the levels tell how probable it is.

    The parameters are fitted from training cells without labels, see `fitting/fit_linear_response.py`; any set of measured
    genes and any number of imposed genes is exact. Cost a cell: O(V r) for the state, O(k r^2 + k^3 + C k r) for k
    imposed genes.
    """

    def __init__(self, config: GppcConfig):
        super().__init__()
        size, factors, components = config.vocab_size, config.num_factors, config.num_components
        pairings = len(config.pairings)
        self.register_buffer("gene_mean", torch.zeros(size))
        self.register_buffer("loadings", torch.zeros(size, factors))
        self.register_buffer("noise", torch.ones(size))
        self.register_buffer("component_means", torch.zeros(components, factors))
        self.register_buffer("component_logits", torch.zeros(components))
        self.register_buffer("transition_logits", torch.zeros(pairings, components, components))
        self.register_buffer("coupling", torch.zeros(pairings, factors, factors))
        # Counts are not Gaussian: what the levels say about the state is trusted only so far.
        self.register_buffer("evidence_scale", torch.ones(pairings))
        # One Gaussian for all cells, whose response is averaged with that of the states: its factors in terms of those
        # above, its coupling and its share. Zero where there is none.
        self.register_buffer("plain_root", torch.zeros(factors, factors))
        self.register_buffer("plain_coupling", torch.zeros(pairings, factors, factors))
        self.register_buffer("plain_share", torch.zeros(()))
        # Some training pairs as the plain Gaussian sees them: factors of the source, factors of the target, what the
        # latter leave open. They tell which levels cells like the source were seen to take; see `familiarity`.
        references = config.num_references
        self.register_buffer("reference_source", torch.zeros(pairings, references, factors))
        self.register_buffer("reference_target", torch.zeros(pairings, references, factors))
        self.register_buffer("reference_logits", torch.zeros(pairings, references))
        self.register_buffer("reference_covariance", torch.zeros(factors, factors))
        self.register_buffer("reference_width", torch.ones(pairings))
        self.register_buffer("familiarity_logit", torch.full((pairings,), ALWAYS))

    def _apply(self, fn, recurse=True):
        """Moves the buffers and keeps their precision: matrices are factorised here, whatever `half()` asks for."""

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)

    def deviation(self) -> torch.Tensor:
        """Standard deviation of every gene among all cells, `(vocab_size,)`."""
        shares = self.component_logits.softmax(0)
        around = self.component_means - shares @ self.component_means
        between = (around @ self.loadings.T).square().mul(shares[:, None]).sum(0)
        return (self.noise + self.loadings.square().sum(1) + between).sqrt()

    def encode(
        self, centred: torch.Tensor, measured: torch.Tensor, panel_index: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Posterior of the source's state and factors.

        Args:
            centred (`torch.FloatTensor` of shape `(B, vocab_size)`): Value minus gene mean, zero where not measured.
            measured (`torch.BoolTensor` of shape `(P, vocab_size)`): Panels, or one mask a cell (P = B).
            panel_index (`torch.LongTensor` of shape `(B,)`, *optional*): Panel of each cell.

        Returns:
            Log probabilities of the components `(B, C)`, mean of the factors `(B, r)`, mean around the component's
            own mean `(B, r)` and covariance within a component `(B, r, r)`; then mean `(B, r)` and covariance
            `(B, r, r)` of the plain Gaussian's factors, `None` with a single component; the weights of the reference
            pairs, see `likeness`, `None` where there are none.
        """
        factors = self.loadings.shape[1]
        weighted = self.loadings / self.noise[:, None]
        if measured.shape[0] <= factors:
            # A few panels: one product each.
            precision = (measured.to(weighted.dtype)[:, :, None] * weighted).transpose(1, 2) @ self.loadings
        else:
            # Many: one product for all, over a table of V r^2 values.
            products = (weighted[:, :, None] * self.loadings[:, None, :]).flatten(1)
            precision = (measured.to(products.dtype) @ products).view(-1, factors, factors)
        identity = torch.eye(factors, dtype=precision.dtype, device=precision.device)
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision + identity))
        observed = centred @ weighted
        means = self.component_means
        plain_mean = plain_covariance = None
        if len(means) > 1:
            root = self.plain_root
            plain_precision = root.T @ precision @ root + identity
            plain_covariance = torch.cholesky_inverse(torch.linalg.cholesky(plain_precision))
            if panel_index is not None:
                plain_covariance = plain_covariance[panel_index]
            plain_mean = torch.einsum("brs,bs->br", plain_covariance, observed @ root)
        if panel_index is not None:
            covariance = covariance[panel_index]
        information = observed[:, None] + means
        by_component = torch.einsum("brs,bcs->bcr", covariance, information)
        evidence = 0.5 * ((information * by_component).sum(-1) - means.square().sum(-1))
        logits = torch.log_softmax(evidence + self.component_logits, dim=-1)
        shares = logits.exp()
        mean = torch.einsum("bc,bcr->br", shares, by_component)
        likeness = None
        if self.reference_source.shape[1] > 0:
            one = len(means) == 1
            likeness = self.likeness(
                mean if one else plain_mean, precision + identity if one else plain_precision, panel_index
            )
        return logits, mean, mean - shares @ means, covariance, plain_mean, plain_covariance, likeness

    def prior(
        self,
        component_logits: torch.Tensor,
        factor_residual: torch.Tensor,
        factor_covariance: torch.Tensor,
        pairing_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the source says of the target before a level is imposed; arguments as in `condition`.

        Returns:
            Log probabilities of the components `(B, C)`, their means `(B, C, r)` and their covariance `(B, r, r)`.
        """
        coupling = self.coupling[pairing_ids]
        transition = torch.log_softmax(self.transition_logits, dim=-1)[pairing_ids]
        logits = torch.logsumexp(component_logits[:, :, None] + transition, dim=1)
        within = torch.einsum("brs,bs->br", coupling, factor_residual)
        means = self.component_means + within[:, None]
        identity = torch.eye(coupling.shape[-1], dtype=means.dtype, device=means.device)
        covariance = identity - coupling @ (identity - factor_covariance) @ coupling.transpose(1, 2)
        return logits, means, covariance

    def plain_prior(
        self, plain_mean: torch.Tensor, plain_covariance: torch.Tensor, pairing_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the plain Gaussian: mean `(B, 1, r)` and covariance `(B, r, r)` of the factors."""
        root, coupling = self.plain_root, self.plain_coupling[pairing_ids]
        identity = torch.eye(coupling.shape[-1], dtype=coupling.dtype, device=coupling.device)
        mean = torch.einsum("brs,bs->br", coupling, plain_mean) @ root.T
        covariance = identity - coupling @ (identity - plain_covariance) @ coupling.transpose(1, 2)
        return mean[:, None], root @ covariance @ root.T

    def condition(
        self,
        component_logits: torch.Tensor,
        factor_residual: torch.Tensor,
        factor_covariance: torch.Tensor,
        pairing_ids: torch.Tensor,
        ids: torch.Tensor,
        levels: torch.Tensor,
        mask: torch.Tensor,
        state_index: torch.Tensor | None = None,
        plain_mean: torch.Tensor | None = None,
        plain_covariance: torch.Tensor | None = None,
        likeness: torch.Tensor | None = None,
        changes: torch.Tensor | None = None,
        familiarity: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Posterior of the target's state and factors given the source's and the imposed levels.

        What cell states add to one Gaussian is multiplied by how familiar the levels are, see `familiarity`.

        Args:
            component_logits, factor_residual, factor_covariance (`torch.FloatTensor`): From `encode`.
            pairing_ids (`torch.LongTensor` of shape `(B,)`): Shared context.
            ids, levels, mask (`torch.Tensor` of shape `(B, K)`): Imposed genes, their log values, 1 where real.
            state_index (`torch.LongTensor` of shape `(B,)`, *optional*): Which of the sources each row is about;
                defaults to one a row.
            plain_mean, plain_covariance (`torch.FloatTensor`, *optional*): From `encode`; with several components.
            likeness (`torch.FloatTensor` of shape `(B, pairings, N)`, *optional*): From `encode`; without it all levels
                are taken for familiar.
            changes (`torch.FloatTensor` of shape `(B, K)`, *optional*): What the levels were changed by; where nothing
                was, nothing is familiar.
            familiarity (`torch.FloatTensor` of shape `(B,)`, *optional*): Instead of what the levels say.

        Returns:
            Log probabilities of the components `(B, C)`, mean `(B, r)` and covariance `(B, r, r)` of the factors,
            familiarity of the levels `(B,)`, between 0 and 1, and what the mean would be if they were familiar `(B, r)`.
        """
        sources = (component_logits, factor_residual, factor_covariance)
        plain_sources = () if plain_mean is None else (plain_mean, plain_covariance)
        if state_index is None:
            logits, means, covariance = self.prior(*sources, pairing_ids)
            plain = self.plain_prior(*plain_sources, pairing_ids) if plain_sources else None
        else:
            # Every source under every pairing once, for however many rows.
            pairings = self.coupling.shape[0]
            every = torch.arange(pairings, device=pairing_ids.device).repeat(component_logits.shape[0])
            row = state_index * pairings + pairing_ids
            sources, plain_sources = (
                [tensor.repeat_interleave(pairings, dim=0) for tensor in tensors]
                for tensors in (sources, plain_sources)
            )
            # Rows are copied whole; an index would go value by value.
            logits, means, covariance = (tensor.index_select(0, row) for tensor in self.prior(*sources, every))
            if plain_sources:
                plain = [tensor.index_select(0, row) for tensor in self.plain_prior(*plain_sources, every)]
            else:
                plain = None
        judged = familiarity is None and likeness is not None
        if familiarity is None:
            familiarity = torch.sigmoid(self.familiarity_logit[pairing_ids])
            familiarity = familiarity if judged else torch.ones_like(familiarity)
        if ids.shape[1] > 0:
            mask = mask.to(means.dtype)
            design = nn.functional.embedding(ids, self.loadings) * mask[:, :, None]
            # A padded entry becomes an observation of nothing: zero row, unit noise, zero surprise.
            noise = self.noise[ids] * mask + (1 - mask)
            centred = (levels - self.gene_mean[ids]) * mask
            if judged:
                like = likeness.flatten(0, 1)
                if len(like) > 1:
                    state = torch.arange(len(ids), device=ids.device) if state_index is None else state_index
                    like = like.index_select(0, state * likeness.shape[1] + pairing_ids)
                familiarity = self.familiarity(like, pairing_ids, design, noise, centred, plain or (means, covariance))
                if changes is not None:
                    real = mask > 0
                    same = real.any(dim=1) & ~(real & (changes.abs() >= LEAST_CHANGE)).any(dim=1)
                    familiarity = familiarity * ~(same & (self.familiarity_logit < ALWAYS)[pairing_ids])
            means, explained, evidence = update(means, covariance, design, noise, centred)
            covariance = torch.baddbmm(covariance, explained.transpose(1, 2), explained, alpha=-1)
            evidence = self.evidence_scale[pairing_ids, None] * evidence
            # Levels choose among the states that cells like the source were seen to go to; they invent no other.
            evidence = (evidence - evidence.max(dim=1, keepdim=True).values).clamp(min=-MAX_EVIDENCE)
            logits = torch.log_softmax(logits + evidence, dim=-1)
            if plain is not None:
                plain_means, explained, _ = update(*plain, design, noise, centred)
                plain = plain_means, torch.baddbmm(plain[1], explained.transpose(1, 2), explained, alpha=-1)
        shares = logits.exp()
        mean = torch.einsum("bc,bcr->br", shares, means)
        around = means - mean[:, None]
        covariance = torch.baddbmm(covariance, (shares[:, :, None] * around).transpose(1, 2), around)
        whole = mean
        if plain is not None:
            share = (1 - familiarity * (1 - self.plain_share))[:, None, None]
            apart = plain[0] - mean[:, None]
            whole, mean = mean + self.plain_share * apart[:, 0], mean + (share * apart)[:, 0]
            covariance = torch.lerp(covariance, plain[1], share)
            covariance = torch.baddbmm(covariance, share * (1 - share) * apart.transpose(1, 2), apart)
        return logits, mean, covariance, familiarity, whole

    def likeness(self, mean: torch.Tensor, precision: torch.Tensor, panel_index: torch.Tensor | None) -> torch.Tensor:
        """Log weights of the reference pairs of every pairing `(B, pairings, N)` for sources with factors `mean` `(B,
        r)`: how near the reference's source is, in units of what both posteriors leave open.

        `precision` is that of the posterior, of each panel or of each source, as in `encode`.
        """
        pairings, references, factors = self.reference_source.shape
        points = self.reference_source.view(-1, factors)
        # |a - s|^2 in the metric of the precision, without a tensor of sources x references x factors.
        own = ((points @ precision) * points).sum(-1)
        if panel_index is not None:
            own, precision = own[panel_index], precision[panel_index]
        scaled = torch.einsum("brs,bs->br", precision, mean)
        distance = (own - 2 * scaled @ points.T).view(-1, pairings, references)
        return torch.log_softmax(self.reference_logits - 0.25 * distance / self.reference_width[:, None], dim=2)

    def familiarity(
        self,
        like: torch.Tensor,
        pairing_ids: torch.Tensor,
        design: torch.Tensor,
        noise: torch.Tensor,
        centred: torch.Tensor,
        plain: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """
        Whether the levels are such as cells like the source were seen to take, `(B,)`, between 0 and 1.

        The probability that the levels were drawn from a mixture over the partners of the reference pairs, weighted by
        how like their sources are to this one, and not from the one Gaussian, which is wide enough for anything.

        Args:
            like (`torch.FloatTensor` of shape `(B, N)` or `(1, N)`): From `likeness`.
            pairing_ids (`torch.LongTensor` of shape `(B,)`): Shared context.
            design (`torch.FloatTensor` of shape `(B, K, r)`), noise, centred (`torch.FloatTensor` of shape `(B, K)`): As
                in `update`.
            plain (`tuple`): Mean `(B, 1, r)` and covariance `(B, r, r)` of the plain Gaussian's factors.
        """
        own = design if len(self.component_means) == 1 else design @ self.plain_root
        pairings, references, factors = self.reference_target.shape
        # In units of what is left open, before anything is as wide as the references: every pass over those costs as
        # much as their product.
        spread = own @ self.reference_covariance @ own.transpose(1, 2) + torch.diag_embed(noise)
        white, log_unit = whitened(torch.cat([own, centred[:, :, None]], dim=2), spread)
        # Every pairing's references meet every row, which is less than copying those of its own for each.
        white, targets = white.flatten(0, 1), self.reference_target.view(-1, factors)
        surprise = torch.addmm(white[:, -1:], white[:, :-1], targets.T, alpha=-1)
        if pairings > 1:
            rows = torch.arange(len(surprise), device=own.device) * pairings
            rows = rows + pairing_ids.repeat_interleave(own.shape[1])
            surprise = surprise.view(-1, references).index_select(0, rows)
        for part in surprise.view(*own.shape[:2], references).unbind(1):
            like = torch.addcmul(like, part, part, value=-0.5)
        referred = torch.logsumexp(like, dim=1) - log_unit
        mean, covariance = plain
        spread = design @ covariance @ design.transpose(1, 2) + torch.diag_embed(noise)
        white, log_unit = whitened(centred[:, :, None] - design @ mean.transpose(1, 2), spread)
        one = -0.5 * white.square().sum((1, 2)) - log_unit
        return torch.sigmoid(referred - one + self.familiarity_logit[pairing_ids])

    def gather(self, query_ids: torch.Tensor | None, pairs: bool = True) -> dict[str, torch.Tensor | None]:
        """What genes `query_ids` `(Q,)`, or all, are read with: `gene_mean`, `loadings`, `noise` and, if `pairs`, the
        products of two loadings, each pair once, `(Q, r (r + 1) / 2)`."""
        loadings = self.loadings if query_ids is None else nn.functional.embedding(query_ids, self.loadings)
        factors = range(loadings.shape[1])
        return {
            "gene_mean": self.gene_mean if query_ids is None else self.gene_mean[query_ids],
            "loadings": loadings,
            "noise": self.noise if query_ids is None else self.noise[query_ids],
            "pairs": torch.cat([loadings[:, i : i + 1] * loadings[:, i:] for i in factors], dim=1) if pairs else None,
        }

    def read(
        self,
        mean: torch.Tensor,
        covariance: torch.Tensor | None,
        gene_mean: torch.Tensor,
        loadings: torch.Tensor,
        noise: torch.Tensor,
        pairs: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Expected log value and, given a covariance, its variance, each `(B, Q)`, at the genes of `gather`."""
        expected = torch.addmm(gene_mean, mean, loadings.T)
        if covariance is None:
            return expected, None
        if pairs is None:
            spread = ((loadings @ covariance) * loadings).sum(-1)
        else:
            # One matrix product, and nothing as large as (B, Q, r).
            factors = loadings.shape[1]
            first, second = torch.triu_indices(factors, factors, device=mean.device)
            twice = covariance * (2.0 - torch.eye(factors, dtype=covariance.dtype, device=covariance.device))
            spread = twice.flatten(1).index_select(1, first * factors + second) @ pairs.T
        return expected, spread.clamp_(min=0).add_(noise)


def whitened(values: torch.Tensor, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `(B, K, N)` in units of their covariance `(B, K, K)`, and half the log determinant of that, `(B,)`."""
    if values.shape[1] == 1:
        unit = covariance.sqrt()
        return values / unit, unit[:, 0, 0].log()
    factor = torch.linalg.cholesky(covariance)
    return (
        torch.linalg.solve_triangular(factor, values, upper=False),
        factor.diagonal(dim1=1, dim2=2).log().sum(1),
    )


def update(
    means: torch.Tensor, covariance: torch.Tensor, design: torch.Tensor, noise: torch.Tensor, centred: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gaussian update of factors by observed levels.

    Args:
        means (`torch.FloatTensor` of shape `(B, C, r)`), covariance (`torch.FloatTensor` of shape `(B, r, r)`): Before.
        design (`torch.FloatTensor` of shape `(B, K, r)`), noise, centred (`torch.FloatTensor` of shape `(B, K)`):
            Loadings of the observed genes, their noise, their levels minus the genes' means.

    Returns:
        Means after; vectors `(B, K, r)` whose squares the covariance loses; the log likelihood of each component
        `(B, C)` up to a constant of the row.
    """
    surprise = centred[:, :, None] - design @ means.transpose(1, 2)
    projected = design @ covariance
    spread = projected @ design.transpose(1, 2) + torch.diag_embed(noise)
    if design.shape[1] == 1:
        # One gene a row, as in most screens: no matrices to factorise, whose answers have a layout besides that the
        # products after this take three times as long with.
        solved, explained = surprise / spread, projected * spread.rsqrt()
    else:
        factor = torch.linalg.cholesky(spread)
        solved = torch.cholesky_solve(surprise, factor)
        explained = torch.linalg.solve_triangular(factor, projected, upper=False)
    means = torch.baddbmm(means, solved.transpose(1, 2), projected)
    return means, explained, -0.5 * (surprise * solved).sum(1)
