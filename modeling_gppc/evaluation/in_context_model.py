"""GPPC adapted to a screen on its control cells."""

import numpy as np
import torch
from tqdm.auto import tqdm

from data_scripts.cells.screen_cells import technical_residuals
from data_scripts.cells.screens import CONTROL, Screen
from modeling_gppc.configuration_gppc import GppcConfig
from modeling_gppc.evaluation.response_size import ResponseSize
from modeling_gppc.evaluation.screen_baselines import ScreenContext, no_change
from modeling_gppc.evaluation.screen_scores import ScreenPrediction, scored_genes
from modeling_gppc.fitting.factor_model import FactorModel, choose_rank, fit_factor_model, fit_pair_coupling
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.training.response_check import ResponseCheck, check_responses


class InContextModel:
    """
    GPPC adapted on the control cells of a screen; no perturbed cell is read.

    The linear response is fitted in closed form on controls freed of technical covariates; with `steps` > 0 the network
    then learns its departure on pairs of four fifths of the controls, and it is kept if it brings the responses among
    the rest nearer to what they are.

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
        model ([`GppcForPerturbationPrediction`] or `None`): The network where its departure was learned and kept.
        check (`ResponseCheck` or `None`): Responses among the controls that were held out of training.
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
        self.model: GppcForPerturbationPrediction | None = None
        self.check: ResponseCheck | None = None
        if steps:
            held = np.random.default_rng(seed).permutation(len(self.values))[::5]
            network = self._train(steps, np.setdiff1d(np.arange(len(self.values)), held), progress)
            self.check = check_responses(network, self.values[held].astype(np.float32))
            if self.check.departure_pays:
                self.model = network

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
        """Responses of the test perturbations: prediction with their targets' level minus prediction without, sized."""
        prediction = no_change(context)
        size, counted = self.size.of(self.screen), scored_genes(self.screen)
        for row, label in enumerate(context.test):
            genes, changes = context.changes(label)
            if len(genes):
                response = self.slope(genes, changes)
                if self.model is not None:
                    response = response + self.departure(genes, changes)
                prediction.delta[row] = size(response, self.deviation, counted)
                prediction.delta[row, genes] = changes
        prediction.variance = np.tile((size.drift * self.deviation) ** 2, (len(context.test), 1))
        return prediction

    @torch.inference_mode()
    def departure(self, genes: np.ndarray, changes: np.ndarray, n_cells: int = 256) -> np.ndarray:
        """What the trained network adds to the linear response, `(V,)`: its departure at the changed level minus that at
        the controls' mean level, averaged over control cells."""
        generator = np.random.default_rng(self.seed)
        cells = generator.choice(len(self.values), min(n_cells, len(self.values)), replace=False)
        source = torch.as_tensor(self.values[cells], dtype=torch.float32)
        encoded = _encode(self.model, source)
        ids = torch.as_tensor(genes).expand(len(cells), -1)
        level = torch.as_tensor(self.values[:, genes].mean(axis=0), dtype=torch.float32)
        change = torch.as_tensor(changes, dtype=torch.float32)
        # The step is taken at a natural size and scaled: the network learned nothing of larger ones.
        step = torch.as_tensor(self.deviation[genes], dtype=torch.float32)
        scale = float(change.abs().div(step).max().clamp(min=1e-6))
        added = []
        for sign in (1, 0):
            output = self.model.decode(encoded, ids, level + sign * change / scale - source[:, genes])
            added.append((output.logits - output.linear_response).double().mean(dim=0).numpy())
        return scale * (added[0] - added[1])

    def _train(self, steps: int, cells: np.ndarray, progress: bool) -> GppcForPerturbationPrediction:
        """Departure learned on pairs of some controls, each pair of one batch, one to five genes revealed."""
        torch.manual_seed(self.seed)
        generator = np.random.default_rng(self.seed)
        n_cells, n_genes = self.values.shape
        config = GppcConfig(
            vocab_size=n_genes,
            num_factors=self.n_factors,
            num_references=0,
            hidden_size=64,
            num_latents=4,
            readout_size=64,
            intermediate_size=128,
            decoder_layers=1,
            hidden_dropout_prob=0.2,
            variance_loss_weight=0.0,
        )
        model = GppcForPerturbationPrediction(config)
        panel = np.ones((1, n_genes), dtype=bool)
        source, target = self._pairs(generator, 4 * n_cells, np.arange(n_cells))
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
            first, second = self._pairs(generator, 64, cells)
            a, b = values[first], values[second]
            size = int(generator.integers(1, 6))
            ids = torch.as_tensor(np.argsort(generator.random((64, n_genes)), axis=1)[:, :size].copy())
            labels = b.scatter(1, ids, -100.0)
            output = model.decode(_encode(model, a), ids, b.gather(1, ids) - a.gather(1, ids))
            loss = model.loss(output, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return model.eval()

    def _pairs(self, generator: np.random.Generator, n: int, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of different ones of these control cells, of the same batch."""
        order = cells[np.argsort(self.batch[cells], kind="stable")]
        _, start, count = np.unique(self.batch[order], return_index=True, return_counts=True)
        position = generator.integers(0, len(order), n)
        group = np.searchsorted(start, position, side="right") - 1
        shift = 1 + (generator.random(n) * np.maximum(count[group] - 1, 1)).astype(int)
        partner = start[group] + (position - start[group] + shift) % count[group]
        return order[position], order[partner]


def _encode(model: GppcForPerturbationPrediction, source: torch.Tensor):
    n_genes = source.shape[1]
    ids = torch.arange(n_genes).expand(len(source), -1)
    panel = torch.ones(1, n_genes, dtype=torch.bool)
    return model.encode(ids, source, None, panel, torch.zeros(len(source), dtype=torch.long))
