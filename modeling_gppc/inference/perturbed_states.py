"""Cells encoded once and asked about many perturbations, block by block."""

from collections.abc import Iterator

import numpy as np
import torch

from modeling_gppc.inference.prediction_plan import Prediction


@torch.inference_mode()
def predicted_blocks(prediction: Prediction, batch_size: int) -> Iterator[tuple[int, slice, dict[str, np.ndarray]]]:
    """Yields (perturbation, cells, values): `X`, the layers and the columns of `prediction`, by name.

    Each cell is encoded once and decoded for all perturbations, `batch_size` rows at a time.
    """
    model, extractor = prediction.model, prediction.extractor
    device = next(model.parameters()).device
    n_cells, n_texts, vocab_size = len(prediction.cells), len(prediction.texts), extractor.vocab_size
    whole = np.array_equal(prediction.query, np.arange(vocab_size))
    query = None if whole else torch.from_numpy(prediction.query).to(device)
    pairing = list(model.config.pairings).index(prediction.pairing)
    for start in range(0, n_cells, batch_size):
        rows = slice(start, min(start + batch_size, n_cells))
        n_rows = rows.stop - rows.start
        features = prediction.cells.features(extractor, rows)
        encoded = model.encode(**{name: tensor.to(device) for name, tensor in features.items()})
        levels = model.levels(encoded).numpy(force=True)
        own_pairing = torch.full((n_rows,), pairing, device=device)
        # Two predictions a cell, which pay from the third perturbation on.
        before = model.unperturbed(encoded, own_pairing, query) if n_texts > 2 else None
        at_once = max(1, batch_size // n_rows)
        for first in range(0, n_texts, at_once):
            texts = prediction.texts[first : first + at_once]
            index = np.tile(np.arange(n_rows), len(texts))
            change = extractor.perturbation_features(np.repeat(texts, n_rows).tolist(), levels[index])
            state_index = torch.from_numpy(index).to(device)
            output = model.respond(
                encoded,
                **{name: tensor.to(device) for name, tensor in change.items()},
                pairing_ids=own_pairing[state_index],
                query_ids=query,
                state_index=state_index,
                before=before,
            )
            values = {"X": output.expression, "delta": output.change, "std": output.variance.sqrt()}
            if output.familiarity is not None:
                values["familiarity"] = output.familiarity
            arrays = {name: tensor.float().numpy(force=True) for name, tensor in values.items()}
            for position in range(len(texts)):
                part = slice(position * n_rows, (position + 1) * n_rows)
                yield first + position, rows, {name: array[part] for name, array in arrays.items()}
