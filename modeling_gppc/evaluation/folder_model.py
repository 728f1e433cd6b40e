"""A model folder that `train.py` left, applied to a screen."""

import json
from pathlib import Path

import numpy as np
import torch

from data_scripts.cells.screen_cells import technical_residuals
from data_scripts.cells.screens import CONTROL
from data_scripts.pairs.screen_pairs import SCREEN_PAIRING
from modeling_gppc.evaluation.response_size import ResponseSize
from modeling_gppc.evaluation.screen_baselines import ScreenContext, no_change
from modeling_gppc.evaluation.screen_scores import ScreenPrediction, scored_genes
from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.normalization_gppc import close_matches
from modeling_gppc.outputs_gppc import GppcOutput


def read_run(folder: str | Path) -> dict | None:
    """What `train.py` wrote of a run beside its model; `None` where a model comes without it."""
    file = Path(folder) / "run.json"
    return json.loads(file.read_text()) if file.is_file() else None


class FolderModel:
    """
    A trained model applied to a screen; the screen's genes that it knows are read and predicted.

    A model that never saw a perturbed cell answers to the change at the target as [`ResponseSize`] sizes it. One
    that was fine-tuned on perturbed cells learned the size: its response is the prediction of a perturbed cell at the
    target's level minus that of a control.

    Args:
        folder (`str`): Saved by `train.py`.
        size (`ResponseSize`, *optional*): Treatment of size.
        pairing (`str`, *optional*): Shared context to assume for controls; the model's default when absent.
        n_cells (`int`, *optional*, defaults to 256): Control cells whose responses are averaged.

    Raises:
        ValueError: For a pairing that the model does not have.
    """

    def __init__(self, folder: str, size: ResponseSize | None = None, pairing: str | None = None, n_cells: int = 256):
        self.model = GppcForPerturbationPrediction.from_pretrained(folder).eval()
        self.extractor = GppcFeatureExtractor.from_pretrained(folder)
        self.size, self.n_cells = size or ResponseSize(), n_cells
        pairings = list(self.model.config.pairings)
        if pairing is not None and pairing not in pairings:
            raise ValueError(f"`pairing` {pairing!r} is none of the model's{close_matches(pairing, pairings)}.")
        self.pairing_id = pairings.index(pairing or self.model.config.default_pairing)
        self.fine_tuned = SCREEN_PAIRING in pairings
        self.perturbed_id = pairings.index(SCREEN_PAIRING) if self.fine_tuned else self.pairing_id
        screen = (read_run(folder) or {}).get("screen") or {}
        self.regressed = bool(screen.get("regressed"))

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
        controls = screen.cells_of(CONTROL)
        values = technical_residuals(screen, controls) if self.regressed else screen.values[controls]
        deviation = values.std(axis=0)
        values = values[np.random.default_rng(0).permutation(len(controls))[: self.n_cells]]
        state = np.zeros((len(values), self.extractor.vocab_size), dtype=np.float32)
        measured = np.zeros((1, self.extractor.vocab_size), dtype=bool)
        found = columns >= 0
        state[:, columns[found]], measured[:, columns[found]] = values[:, found], True
        encoded = self.model.encode(**self.extractor.from_values(state, np.broadcast_to(measured, state.shape)))
        level = np.zeros(self.extractor.vocab_size)
        level[columns[found]] = screen.values[controls][:, found].mean(axis=0)

        def expected(at: np.ndarray, change: np.ndarray, pairing: int, familiarity=None) -> GppcOutput:
            ids = torch.as_tensor(at).expand(len(state), -1)
            imposed = torch.as_tensor((level[at] + change - state[:, at]).astype(np.float32))
            pairings = torch.full((len(state),), pairing, dtype=torch.long)
            return self.model.decode(encoded, ids, imposed, pairing_ids=pairings, familiarity=familiarity)

        prediction, size = no_change(context), self.size.of(screen)
        for row, label in enumerate(context.test):
            genes, changes = context.changes(label)
            inside = columns[genes] >= 0
            genes, changes = genes[inside], changes[inside]
            if not len(genes) and not self.fine_tuned:
                continue
            at = columns[genes]
            # A step of a natural size, scaled: a model of unperturbed cells learned nothing of larger ones.
            steps = np.abs(changes) / np.maximum(deviation[genes], 1e-6)
            scale = 1.0 if self.fine_tuned else max(float(steps.max()), 1e-6)
            after = expected(at, changes / scale, self.perturbed_id)
            before = expected(at, 0 * changes, self.pairing_id, after.familiarity)
            response = (after.logits.double() - before.logits.double()).mean(dim=0).numpy()
            prediction.delta[row, found] = scale * response[columns[found]]
            if not self.fine_tuned:
                prediction.delta[row] = size(prediction.delta[row], deviation, scored_genes(screen))
            prediction.delta[row, genes] = changes
        prediction.variance = np.tile((size.drift * deviation) ** 2, (len(context.test), 1))
        prediction.reads_perturbed_cells = self.fine_tuned
        return prediction
