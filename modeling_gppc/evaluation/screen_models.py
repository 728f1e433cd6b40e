"""GPPC on a screen: adapted on its control cells, fine-tuned on some perturbations, or as it comes from an atlas."""

import dataclasses

import numpy as np
import torch
from tqdm.auto import tqdm

from data_scripts.screens import CONTROL, Screen
from modeling_gppc.configuration_gppc import GppcConfig
from modeling_gppc.evaluation.screen_baselines import ScreenContext, no_change
from modeling_gppc.evaluation.screen_scores import ScreenPrediction
from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor, close_matches
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.training.factor_model import FactorModel, fit_factor_model, fit_pair_coupling

RANKS = (3, 5, 10, 20, 40)


@dataclasses.dataclass
class ResponseSize:
    """From a change at the target to the size of the response; the direction is not touched.

    share x saturation x tanh(change / saturation) takes the place of the change. Control cells say how genes go
    together, not which of them causes the other (`share`), and they say it within the range in which the target varies
    among them (`saturation`, in units of log value): beyond it an extrapolated response grows and the real one does
    not. The defaults were chosen on three public screens together; docs/evaluation.md has what each screen scores when
    they are chosen on the other two.

    Args:
        share (`float`, *optional*, defaults to 0.35): Share of the response that follows.
        saturation (`float`, *optional*, defaults to 0.5): Change at which the response levels off.
        unexplained (`float`, *optional*, defaults to 0.06): Standard deviation of true responses about predicted ones,
            in units of the gene's standard deviation among controls.
    """

    share: float = 0.35
    saturation: float = 0.5
    unexplained: float = 0.06

    def __call__(self, change: np.ndarray) -> np.ndarray:
        """The change that the response answers to."""
        return self.share * self.saturation * np.tanh(change / self.saturation)


def technical_residuals(screen: Screen, cells: np.ndarray) -> np.ndarray:
    """Values of cells without what technical covariates of the whole transcriptome explain linearly; means are kept.

    Library size, detected genes, mitochondrial share and batch move many genes at once; left in, they pass for
    regulation. Covariates are held fixed when a gene is changed. On a targeted panel, whose depth is itself a
    response, batches cannot be told from states by their depth, and nothing is taken out.
    """
    values = screen.values[cells].astype(np.float64)
    if not screen.library_is_complete:
        return values
    covariates = screen.covariates[cells]
    covariates = covariates - covariates.mean(axis=0)
    scale = covariates.std(axis=0)
    covariates = covariates[:, scale > 1e-9] / scale[scale > 1e-9]
    if covariates.shape[1] == 0:
        return values
    mean = values.mean(axis=0)
    return values - covariates @ np.linalg.lstsq(covariates, values - mean, rcond=None)[0]


def choose_rank(values: np.ndarray, seed: int = 0, ranks=RANKS, n_parts: int = 3) -> int:
    """Number of factors with the highest likelihood of held-out control cells: `n_parts` fifths of them in turn."""
    order = np.random.default_rng(seed).permutation(len(values))
    panel = np.ones((1, values.shape[1]), dtype=bool)
    usable = [rank for rank in ranks if rank < min(values.shape[1] // 3, len(values) // 2)] or [1]
    likelihoods = np.zeros(len(usable))
    for part in range(n_parts):
        held, rest = values[order[part::5]], values[np.delete(order, np.s_[part::5])]
        for index, rank in enumerate(usable):
            model = fit_factor_model(rest, np.zeros(len(rest), int), panel, rank, 20, seed)
            covariance, centred = model.covariance, held - model.mean
            distance = np.einsum("nv,nv->", centred, np.linalg.solve(covariance, centred.T).T) / len(held)
            likelihoods[index] -= distance + np.linalg.slogdet(covariance)[1]
    return usable[int(np.argmax(likelihoods))]


class InContextModel:
    """
    GPPC adapted on the control cells of a screen; no perturbed cell is read.

    The linear response is fitted in closed form on controls freed of technical covariates; with `steps` > 0 the network
    then learns its departure on pairs of controls.

    Args:
        screen (`Screen`): Only its control cells are read.
        steps (`int`, *optional*, defaults to 0): Training steps of the departure.
        n_factors (`int`, *optional*): Chosen by held-out likelihood when absent.
        seed (`int`, *optional*, defaults to 0): Everything random.
        size (`ResponseSize`, *optional*): Treatment of size.
        hold (`float`, *optional*, defaults to 0.1): How firmly the other targets of the panel are held at the controls'
            level while one is changed: 0 not at all, 1 as firmly as a measurement, more than that nearly fixed. Where
            the panel holds the network's regulators, and they correlate without acting on each other, holding them
            takes most of the confounding away; where targets act through each other it hides what they do.
        resample (`bool`, *optional*, defaults to `False`): Fit on controls drawn with replacement, to see the spread.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a bar.

    Attributes:
        factors (`FactorModel`): Of the controls.
        model ([`GppcForPerturbationPrediction`] or `None`): The network where it was trained.
    """

    def __init__(
        self,
        screen: Screen,
        steps: int = 0,
        n_factors: int | None = None,
        seed: int = 0,
        size: ResponseSize | None = None,
        hold: float = 0.1,
        resample: bool = False,
        progress: bool = False,
    ):
        self.screen, self.seed, self.hold = screen, seed, hold
        self.size = size or ResponseSize()
        cells = screen.cells_of(CONTROL)
        if resample:
            cells = np.sort(np.random.default_rng(seed).choice(cells, len(cells)))
        self.batch = screen.batch[cells]
        self.values = technical_residuals(screen, cells)
        self.n_factors = n_factors or choose_rank(self.values, seed)
        panel = np.ones((1, self.values.shape[1]), dtype=bool)
        self.factors: FactorModel = fit_factor_model(
            self.values, np.zeros(len(self.values), int), panel, self.n_factors, 200, seed
        )
        self.deviation = self.values.std(axis=0)
        self.model = self._train(steps, progress) if steps else None

    def slope(self, genes: np.ndarray, changes: np.ndarray) -> np.ndarray:
        """Response of all genes to imposed changes, from the factors; shape `(V,)`.

        The other targets of the panel are imposed too, at no change and with their noise divided by `hold`.
        """
        loadings, noise = self.factors.loadings, self.factors.noise
        held = np.setdiff1d(self.screen.panel_targets, genes) if self.hold > 0 else np.zeros(0, dtype=int)
        imposed = np.concatenate([genes, held])
        error = np.concatenate([noise[genes], noise[held] / self.hold]) if len(held) else noise[genes]
        within = loadings[imposed] @ loadings[imposed].T + np.diag(error)
        changes = np.concatenate([changes, np.zeros(len(held))])
        return loadings @ (loadings[imposed].T @ np.linalg.solve(within, changes))

    def predict(self, context: ScreenContext) -> ScreenPrediction:
        """Responses of the test perturbations: prediction with their targets' level minus prediction without."""
        prediction = no_change(context)
        for row, label in enumerate(context.test):
            genes, changes = context.changes(label)
            if len(genes):
                sized = self.size(changes)
                prediction.delta[row] = self.slope(genes, sized)
                if self.model is not None:
                    prediction.delta[row] += self.departure(genes, sized)
        prediction.variance = np.tile((self.size.unexplained * self.deviation) ** 2, (len(context.test), 1))
        return prediction

    @torch.inference_mode()
    def departure(self, genes: np.ndarray, changes: np.ndarray, n_cells: int = 256) -> np.ndarray:
        """What the trained network adds to the linear response, `(V,)`: its departure at the changed level minus that at
        the controls' mean level, averaged over control cells."""
        generator = np.random.default_rng(self.seed)
        cells = generator.choice(len(self.values), min(n_cells, len(self.values)), replace=False)
        source = torch.as_tensor(self.values[cells], dtype=torch.float32)
        encoded = self._encode(source)
        ids = torch.as_tensor(genes).expand(len(cells), -1)
        level = torch.as_tensor(self.values[:, genes].mean(axis=0), dtype=torch.float32)
        change = torch.as_tensor(changes, dtype=torch.float32)
        # The step is taken at a natural size and scaled back, so that a shrunken change is not lost in the network.
        step = torch.as_tensor(self.deviation[genes], dtype=torch.float32)
        scale = float(change.abs().div(step).max().clamp(min=1e-6))
        added = []
        for sign in (1, 0):
            output = self.model.decode(encoded, ids, level + sign * change / scale - source[:, genes])
            added.append((output.logits - output.linear_response).double().mean(dim=0).numpy())
        return scale * (added[0] - added[1])

    def _encode(self, source: torch.Tensor):
        n_genes = source.shape[1]
        ids = torch.arange(n_genes).expand(len(source), -1)
        panel = torch.ones(1, n_genes, dtype=torch.bool)
        return self.model.encode(ids, source, None, panel, torch.zeros(len(source), dtype=torch.long))

    def _train(self, steps: int, progress: bool) -> GppcForPerturbationPrediction:
        """Departure learned on pairs of controls of one batch, one to five genes revealed."""
        torch.manual_seed(self.seed)
        generator = np.random.default_rng(self.seed)
        n_cells, n_genes = self.values.shape
        config = GppcConfig(
            vocab_size=n_genes,
            num_factors=self.n_factors,
            hidden_size=64,
            pool_size=64,
            num_latents=4,
            readout_size=64,
            intermediate_size=128,
            decoder_layers=1,
            hidden_dropout_prob=0.2,
            variance_loss_weight=0.0,
        )
        self.model = model = GppcForPerturbationPrediction(config)
        panel = np.ones((1, n_genes), dtype=bool)
        source, target = self._pairs(generator, 4 * n_cells)
        zeros = np.zeros(len(source), int)
        coupling = fit_pair_coupling(self.factors, self.values[source], zeros, self.values[target], zeros, panel)
        response = model.model.linear_response
        with torch.no_grad():
            for name, value in (
                ("gene_mean", self.factors.mean),
                ("loadings", self.factors.loadings),
                ("noise", self.factors.noise),
                ("coupling", coupling.matrix[None]),
            ):
                getattr(response, name).copy_(torch.as_tensor(value))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
        values = torch.as_tensor(self.values, dtype=torch.float32)
        model.train()
        for _ in tqdm(range(steps), desc="adapting to controls", unit="step", disable=not progress):
            first, second = self._pairs(generator, 64)
            a, b = values[first], values[second]
            size = int(generator.integers(1, 6))
            ids = torch.as_tensor(np.argsort(generator.random((64, n_genes)), axis=1)[:, :size].copy())
            labels = b.scatter(1, ids, -100.0)
            output = model.decode(self._encode(a), ids, b.gather(1, ids) - a.gather(1, ids))
            loss = model.loss(output, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return model.eval()

    def _pairs(self, generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of different control cells of the same batch."""
        order = np.argsort(self.batch, kind="stable")
        _, start, count = np.unique(self.batch[order], return_index=True, return_counts=True)
        position = generator.integers(0, len(order), n)
        group = np.searchsorted(start, position, side="right") - 1
        shift = 1 + (generator.random(n) * np.maximum(count[group] - 1, 1)).astype(int)
        partner = start[group] + (position - start[group] + shift) % count[group]
        return order[position], order[partner]


class FineTunedModel:
    """
    GPPC adapted on the controls, then on the training perturbations.

    response = size x (common direction + weight x in-context response of the target). The common direction is the mean
    of the training responses, each divided by `norm ** power`, so that strong perturbations do not drown the others;
    weight and size are chosen by leave-one-out over the training perturbations, whose errors give the uncertainty.

    Args:
        in_context ([`InContextModel`]): Adapted on the controls of the same screen.
        weights (`tuple[float, ...]`, *optional*): Candidates for the weight, both directions having unit length.
        power (`float`, *optional*, defaults to 0.75): 0 is the plain mean, 1 gives every perturbation the same length.
    """

    def __init__(
        self,
        in_context: InContextModel,
        weights: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6),
        power: float = 0.75,
    ):
        self.in_context, self.weights, self.power = in_context, weights, power

    def predict(self, context: ScreenContext) -> ScreenPrediction:
        """Responses of the test perturbations.

        Raises:
            ValueError: If there are fewer than two training perturbations.
        """
        train = context.train_delta
        if len(train) < 2:
            raise ValueError(
                f"`train` holds {len(train)} perturbations; fine-tuning needs at least 2: use fewer folds."
            )
        mask = np.ones(train.shape[1], dtype=bool)
        mask[context.screen.panel_targets] = False
        norms = np.maximum(np.linalg.norm(train[:, mask], axis=1, keepdims=True), 1e-12)
        votes = train / norms**self.power
        own = _unit(self._responses(context, context.train), mask)
        other = _unit(self._responses(context, context.test), mask)
        common_without = _unit(votes.sum(axis=0) - votes, mask)
        agreement = [_cosine(common_without + weight * own, train, mask).mean() for weight in self.weights]
        self.weight = self.weights[int(np.argmax(agreement))]
        guess = common_without + self.weight * own
        # Least squares with weights between "every gene alike" and "every perturbation alike".
        weights = 1 / norms[:, 0]
        products, squares = (guess * train)[:, mask].sum(axis=1), (guess**2)[:, mask].sum(axis=1)
        self.scale = max(float(weights @ products / (weights @ squares)), 0.0)
        delta = self.scale * (_unit(votes.sum(axis=0)[None], mask) + self.weight * other)
        alone = self._seen_alone(context, mask)
        for row, label in enumerate(context.test):
            members = context.screen.perturbations[label].genes
            if len(members) > 1 and any(member in alone for member in members):
                # A member not seen alone is expected to do what perturbations of this screen do on average.
                delta[row] = sum(alone.get(member, delta[row]) for member in members)
            genes, changes = context.changes(label)
            delta[row, genes] = changes
        variance = self._variance(context, train - self.scale * guess, mask)
        return ScreenPrediction(delta, np.tile(variance, (len(delta), 1)), reads_perturbed_cells=True)

    def _seen_alone(self, context: ScreenContext, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Response to each gene seen alone, drawn towards zero by the share of its size that sampling error explains."""
        controls = context.screen.values[context.screen.cells_of(CONTROL)]
        alone = {}
        for label, response in zip(context.train, context.train_delta):
            members = context.screen.perturbations[label].genes
            if len(members) == 1:
                cells = context.screen.values[context.screen.cells_of(label)]
                error = cells.var(axis=0) / len(cells) + controls.var(axis=0) / len(controls)
                size = max(float((response[mask] ** 2).sum()), 1e-12)
                alone[members[0]] = response * max(1 - float(error[mask].sum()) / size, 0.0)
        return alone

    def _variance(self, context: ScreenContext, residual: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Variance of true responses about predicted ones, a gene, from leave-one-out errors; shape `(V,)`.

        Half the gene's own error, half what genes of its spread have: a variance from a handful of perturbations is
        itself noisy. Scaled so that 90 % of the errors lie within the 90 % interval, then freed of the sampling error
        that the errors contain.
        """
        deviation = np.maximum(self.in_context.deviation, 1e-6)
        shared = np.mean((residual[:, mask] / deviation[mask]) ** 2) * deviation**2
        spread = np.sqrt(0.5 * (residual**2).mean(axis=0) + 0.5 * shared)
        widening = np.quantile(np.abs(residual[:, mask]) / np.maximum(spread[mask], 1e-9), 0.9) / 1.6448536
        variance = (spread * widening) ** 2
        cells = [context.screen.cells_of(label) for label in context.train]
        sampling = np.mean([context.screen.values[rows].var(axis=0) / len(rows) for rows in cells], axis=0)
        return np.maximum(variance - sampling, 0.05 * variance)

    def _responses(self, context: ScreenContext, labels: list[str]) -> np.ndarray:
        return self.in_context.predict(dataclasses.replace(context, test=list(labels))).delta


def _unit(rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows[:, mask], axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-12)


def _cosine(first: np.ndarray, second: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return (_unit(first, mask)[:, mask] * _unit(second, mask)[:, mask]).sum(axis=1)


class ZeroShotModel:
    """
    A trained model folder applied to a screen as it is; the screen's genes that it knows are read and predicted.

    Args:
        folder (`str`): Saved by `train.py`.
        size (`ResponseSize`, *optional*): Treatment of size.
        pairing (`str`, *optional*): Shared context to assume; the model's default when absent.
        n_cells (`int`, *optional*, defaults to 256): Control cells whose responses are averaged.
    """

    def __init__(self, folder: str, size: ResponseSize | None = None, pairing: str | None = None, n_cells: int = 256):
        self.model = GppcForPerturbationPrediction.from_pretrained(folder).eval()
        self.extractor = GppcFeatureExtractor.from_pretrained(folder)
        self.size, self.n_cells = size or ResponseSize(share=1.0), n_cells
        pairings = list(self.model.config.pairings)
        if pairing is not None and pairing not in pairings:
            raise ValueError(f"`pairing` {pairing!r} is none of the model's{close_matches(pairing, pairings)}.")
        self.pairing_id = pairings.index(pairing or self.model.config.default_pairing)

    @torch.inference_mode()
    def predict(self, context: ScreenContext) -> ScreenPrediction:
        """Responses of the test perturbations; genes the model does not know are predicted not to change.

        Raises:
            ValueError: If the model knows none of the screen's genes.
        """
        screen = context.screen
        known = self.extractor.find_genes(screen.gene_ids)
        by_symbol = self.extractor.find_genes(screen.gene_symbols)
        columns = np.where(known >= 0, known, by_symbol)
        if (columns < 0).all():
            raise ValueError("`model` knows none of the screen's genes; use a model of the same species.")
        generator = np.random.default_rng(0)
        controls = generator.permutation(screen.cells_of(CONTROL))[: self.n_cells]
        state = np.zeros((len(controls), self.extractor.vocab_size), dtype=np.float32)
        measured = np.zeros((1, self.extractor.vocab_size), dtype=bool)
        found = columns >= 0
        state[:, columns[found]], measured[:, columns[found]] = screen.values[controls][:, found], True
        features = self.extractor.from_values(state, np.broadcast_to(measured, state.shape))
        encoded = self.model.encode(**features)
        mean = state.mean(axis=0)
        pairing = torch.full((len(controls),), self.pairing_id, dtype=torch.long)
        prediction = no_change(context)
        for row, label in enumerate(context.test):
            genes, changes = context.changes(label)
            genes, changes = genes[columns[genes] >= 0], changes[columns[genes] >= 0]
            if not len(genes):
                continue
            at = columns[genes]
            ids = torch.as_tensor(at).expand(len(controls), -1)
            outputs = [
                self.model.decode(
                    encoded,
                    ids,
                    torch.as_tensor((mean[at] + change - state[:, at]).astype(np.float32)),
                    pairing_ids=pairing,
                ).logits
                for change in (self.size(changes), 0 * changes)
            ]
            response = (outputs[0] - outputs[1]).double().mean(dim=0).numpy()
            prediction.delta[row, found] = response[columns[found]]
        return prediction
