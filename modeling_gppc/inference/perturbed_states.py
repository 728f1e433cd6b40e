"""Cells encoded once and predicted for many perturbations, block by block."""

from collections.abc import Iterator

import numpy as np
import torch

from modeling_gppc.inference.prediction_plan import Prediction
from modeling_gppc.normalization_gppc import change_of_log_value


def predicted_blocks(prediction: Prediction, batch_size: int) -> Iterator[tuple[int, slice, dict[str, np.ndarray]]]:
    """Yields (perturbation, cells, values); each cell is encoded once, then decoded for all perturbations in chunks."""
    n_cells, n_texts = len(prediction.cells), len(prediction.texts)
    for start in range(0, n_cells, batch_size):
        rows = slice(start, min(start + batch_size, n_cells))
        n_rows = rows.stop - rows.start
        states = EncodedCells(prediction, rows)
        at_once = max(1, batch_size // n_rows)
        for first in range(0, n_texts, at_once):
            chunk = range(first, min(first + at_once, n_texts))
            values = states.predict(chunk)
            for position, text in enumerate(chunk):
                part = slice(position * n_rows, (position + 1) * n_rows)
                yield text, rows, {name: array[part] for name, array in values.items()}


class EncodedCells:
    """Some cells, encoded once, and their prediction without a perturbation."""

    def __init__(self, prediction: Prediction, rows: slice):
        self.prediction = prediction
        self.model = prediction.model
        self.device = next(self.model.parameters()).device
        features = prediction.cells.features(prediction.extractor, rows)
        self.features = {name: tensor.to(self.device) for name, tensor in features.items()}
        self.n_cells = rows.stop - rows.start
        self.query = torch.from_numpy(prediction.query).to(self.device)
        pairings = list(self.model.config.pairings)
        self.pairing = pairings.index(prediction.pairing)
        with torch.inference_mode():
            self.encoded = self.model.encode(**self.features) if self.model.origin is None else None
            whole = np.array_equal(prediction.query, np.arange(self.model.config.vocab_size))
            self.asked = self.query if self.encoded is None else self.model.query(None if whole else self.query)
            self.levels = self._own_levels()
            self.unperturbed = None
            if prediction.reference == "unperturbed":
                # What a perturbation is compared with has its familiarity, between these two.
                self.unperturbed = [self._unperturbed(familiarity) for familiarity in (0.0, 1.0)]

    def _unperturbed(self, familiarity: float) -> dict[str, torch.Tensor]:
        """The cells as they are, as one Gaussian (0) or the whole model (1) sees them."""
        empty = np.zeros((self.n_cells, 0))
        given = torch.full((self.n_cells,), familiarity, device=self.device)
        return self._run(empty.astype(np.int64), empty, empty.astype(np.int64), given)

    def _before(self, after: dict[str, torch.Tensor], ids: np.ndarray, mask: np.ndarray) -> dict[str, torch.Tensor]:
        """What rows are compared with: the same cells and the same familiarity, nothing changed."""
        familiarity = after.get("familiarity")
        if self.unperturbed is None:
            return self._run(ids, np.zeros(ids.shape), mask, familiarity)
        repeats = len(ids) // self.n_cells
        none, whole = ({name: torch.cat([x] * repeats) for name, x in part.items()} for part in self.unperturbed)
        if familiarity is None:
            return whole
        # The mean is linear in the familiarity.
        return {
            name: torch.lerp(none[name], whole[name], familiarity[:, None]) for name in ("X", "linear_response_delta")
        }

    def _own_levels(self) -> np.ndarray:
        """Log values of the perturbed genes before the perturbation, estimated where not measured, `(n, genes)`."""
        genes = torch.from_numpy(self.prediction.perturbed).to(self.device).expand(self.n_cells, -1)
        if self.encoded is None:
            ids, values = self.features["input_ids"], self.features["expression_values"]
            dense = values.new_zeros(self.n_cells, self.model.config.vocab_size).scatter_add(1, ids, values)
            levels = dense.gather(1, genes)
        else:
            zeros = torch.zeros(genes.shape, device=self.device)
            levels = self.model.model.imposed_levels(self.encoded, genes, zeros)
        return levels.double().cpu().numpy()

    def _run(
        self, ids: np.ndarray, changes: np.ndarray, mask: np.ndarray, familiarity: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Model outputs for rows that repeat the cells, perturbation by perturbation."""
        index = torch.arange(len(ids), device=self.device) % self.n_cells
        inputs = {
            "perturbation_ids": torch.from_numpy(ids).to(self.device),
            "perturbation_values": torch.from_numpy(changes.astype(np.float32)).to(self.device),
            "perturbation_mask": torch.from_numpy(mask).to(self.device),
            "pairing_ids": torch.full_like(index, self.pairing),
            "query_ids": self.asked,
        }
        if self.encoded is None:
            repeated = {name: tensor[index] for name, tensor in self.features.items()}
            return {"X": self.model(**repeated, **inputs).logits.float()}
        output = self.model.decode(self.encoded, **inputs, state_index=index, familiarity=familiarity)
        return {
            "X": output.logits.float(),
            "std": (0.5 * output.logvar.float()).exp(),
            "linear_response_delta": output.linear_response.float(),
            "departure": output.departure.float(),
            "familiarity": output.familiarity.float(),
        }

    @torch.inference_mode()
    def predict(self, chunk: range) -> dict[str, np.ndarray]:
        """X, layers and columns of some of the perturbations, rows perturbation by perturbation, cell by cell."""
        prediction, n_cells = self.prediction, self.n_cells
        specs = [prediction.parsed[text] for text in chunk]
        width = max(map(len, specs))
        ids = np.zeros((len(specs), n_cells, width), dtype=np.int64)
        changes = np.zeros(ids.shape)
        mask = np.zeros(ids.shape, dtype=np.int64)
        column = {int(gene): place for place, gene in enumerate(prediction.perturbed)}
        for row, spec in enumerate(specs):
            for place, (gene, action, amount) in enumerate(spec):
                ids[row, :, place] = gene
                mask[row, :, place] = 1
                changes[row, :, place] = change_of_log_value(self.levels[:, column[gene]], action, amount)
        shape = (len(specs) * n_cells, width)
        ids, changes, mask = ids.reshape(shape), changes.reshape(shape), mask.reshape(shape)
        after = self._run(ids, changes, mask)
        before = self._before(after, ids, mask)
        values = {"X": after["X"], "delta": after["X"] - before["X"]}
        if "std" in after:
            rows, places = np.nonzero(mask)
            imposed = torch.zeros(len(ids), self.model.config.vocab_size, dtype=torch.bool, device=self.device)
            imposed[rows, ids[rows, places]] = True
            values["std"] = after["std"].masked_fill(imposed[:, self.query], 0.0)
            name = "linear_response_delta"
            values[name] = after[name] - before[name]
            values.update({name: after[name] for name in prediction.columns})
        return {name: tensor.cpu().numpy() for name, tensor in values.items()}
