"""A GPPC model asked about the perturbations of a screen, in the words that `gppc predict` takes."""

import json
from pathlib import Path

import numpy as np
import torch

from data_scripts.cells.screens import CONTROL, Perturbation
from modeling_gppc.evaluation.screen_baselines import ScreenContext, zeros
from modeling_gppc.evaluation.screen_scores import ScreenPrediction
from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction

# Control cells whose responses are averaged, where a model answers cell by cell.
N_CELLS = 256


def read_run(folder: str | Path) -> dict | None:
    """What `train.py` wrote of a run beside its model; `None` where a model comes without it."""
    file = Path(folder) / "run.json"
    return json.loads(file.read_text()) if file.is_file() else None


class ScreenModel:
    """
    Responses of a model to the perturbations of a screen; the genes that both know are predicted.

    Args:
        model ([`GppcForPerturbationPrediction`]), extractor ([`GppcFeatureExtractor`]): Fitted on this screen, or any
            other model.
        change (`str`, *optional*, defaults to `"measured"`): See [`EvaluateOptions`].
    """

    def __init__(
        self, model: GppcForPerturbationPrediction, extractor: GppcFeatureExtractor, change: str = "measured"
    ):
        self.model, self.extractor, self.change = model.eval(), extractor, change

    @classmethod
    def load(cls, folder: str | Path, change: str = "measured") -> "ScreenModel":
        """From a folder that `train.py` or `save_pretrained` wrote."""
        return cls(
            GppcForPerturbationPrediction.from_pretrained(folder),
            GppcFeatureExtractor.from_pretrained(folder),
            change,
        )

    def text(self, context: ScreenContext, label: str) -> str:
        """A perturbation as `gppc predict` reads it, without the targets that the model does not know."""
        perturbation = context.screen.perturbations[label]
        genes, changes = context.changes(label)
        parts = [self._imposed(context, perturbation, gene, change) for gene, change in zip(genes, changes.tolist())]
        parts += [f"{gene}=ko" for gene, column in zip(perturbation.genes, perturbation.gene_index) if column < 0]
        known = self.extractor.find_targets([part.partition("=")[0] for part in parts]) >= 0
        return "+".join(part for part, one in zip(parts, known) if one)

    def _imposed(self, context: ScreenContext, perturbation: Perturbation, column: int, change: float) -> str:
        screen = context.screen
        name, symbol = screen.gene_ids[column], screen.gene_symbols[column]
        name = name if self.extractor.find_genes([name])[0] >= 0 else symbol
        if self.change == "measured":
            return f"{name}=delta:{change!r}"
        if symbol in screen.guide_efficiency:
            return f"{name}=kd:{screen.guide_efficiency[symbol]!r}"
        if perturbation.modality in ("CRISPRa", "overexpression"):
            raise ValueError(
                f"`change` is 'stated', but how much {perturbation.modality} of `{symbol}` raises it is not; give "
                "`change` 'measured'."
            )
        return f"{name}=ko"

    @torch.inference_mode()
    def predict(self, context: ScreenContext) -> ScreenPrediction:
        """Mean responses of the control cells to the test perturbations.

        Genes and targets that the model does not know are predicted not to change.

        Raises:
            ValueError: If the model knows none of the screen's genes, or its values are normalised otherwise.
        """
        screen, extractor = context.screen, self.extractor
        by_id, by_symbol = extractor.find_genes(screen.gene_ids), extractor.find_genes(screen.gene_symbols)
        columns = np.where(by_id >= 0, by_id, by_symbol)
        found = np.flatnonzero(columns >= 0)
        if not len(found):
            raise ValueError("`model` knows none of the screen's genes; use a model of the same species.")
        if (extractor.normalization, extractor.target_sum) != (screen.normalization, screen.target_sum):
            raise ValueError(
                f"`model` reads values normalised by {extractor.normalization} to {extractor.target_sum:g}, the screen "
                f"was read by {screen.normalization} to {screen.target_sum:g}; read it with the same `target_sum` and "
                "`value_kind`."
            )
        encoded, values = self._cells(context, columns, found)
        texts = [self.text(context, label) for label in context.test]
        if encoded is None:
            # A model of a screen answers for its mean control cell: all perturbations at once.
            change, variance = self._answer(None, texts, values.expand(len(texts), -1))
        else:
            means = [[part.mean(dim=0) for part in self._answer(encoded, text, values)] for text in texts]
            change, variance = (torch.stack(part) for part in zip(*means))
        prediction = zeros(context)
        prediction.variance = np.zeros_like(prediction.delta)
        prediction.delta[:, found] = change[:, columns[found]].numpy()
        prediction.variance[:, found] = variance[:, columns[found]].numpy()
        prediction.reads_perturbed_cells = self.model.config.num_perturbations > 0
        return prediction

    def _answer(self, encoded, texts: str | list[str], values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Change and variance `(n, vocab_size)` of every row of log values `(n, vocab_size)` under its perturbation."""
        output = self.model.respond(encoded, **self.extractor.perturbation_features(texts, values))
        return output.change.double(), output.variance.double()

    def _cells(self, context: ScreenContext, columns: np.ndarray, found: np.ndarray):
        """What the model answers for: encoded cells and their log values. A model of a screen has its own controls."""
        if self.model.screen_response is not None:
            return None, self.model.levels()
        screen = context.screen
        controls = screen.cells_of(CONTROL)
        controls = controls[np.random.default_rng(0).permutation(len(controls))[:N_CELLS]]
        state = np.zeros((len(controls), self.extractor.vocab_size), dtype=np.float32)
        measured = np.zeros(state.shape, dtype=bool)
        state[:, columns[found]], measured[:, columns[found]] = screen.values[controls][:, found], True
        encoded = self.model.encode(**self.extractor.from_values(state, measured))
        return encoded, self.model.levels(encoded)
