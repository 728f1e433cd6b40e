"""PerturbationPredictionPipeline: counts and a perturbation in, predicted expression of every gene out."""

from collections.abc import Mapping

import numpy as np
import torch
from transformers import Pipeline

from .normalization_gppc import close_matches

OPTIONS = ("top_k", "batch_size")
# What is predicted of every gene.
FIGURES = ("expression", "change", "std", "direction")
INPUTS = ("counts", "gene_ids", "perturbation", "library_size", "measured")


class PerturbationPredictionPipeline(Pipeline):
    r"""
    Predicts expression after imposed expression changes.

    ```python
    predict = pipeline("perturbation-prediction", model=repository, trust_remote_code=True)
    predict({"counts": counts, "gene_ids": gene_ids, "perturbation": "STAT1=ko"})
    ```

    An input is a mapping (or a list of mappings) with

    - `counts` (array, list or scipy sparse matrix): raw counts (log values where the model's normalisation is
      `"none"`) of one cell, shape `(n_vars,)`, or of several, shape `(n_obs, n_vars)`;
    - `gene_ids` (`list[str]`, *optional*): Ensembl id or symbol of each column; defaults to the model's genes in order;
    - `perturbation` (`str`, mapping or list, *optional*): such as `"STAT1=ko"` or `"STAT1=kd:0.8+IRF1=x3"`, one for all
      cells, one a cell, or several for one cell; absent or `"control"` changes nothing;
    - `library_size` (`float` or `list[float]`, *optional*): counts over *all* genes of each cell;
    - `measured` (`list[bool]`, *optional*): which columns were measured.

    The result of one cell and one perturbation is a `dict`, of several a `list` of them:

    - `gene_ids`, `gene_symbols` (`list[str]`): the genes of the model;
    - `expression` (`np.ndarray` of shape `(vocab_size,)`): log values of the cell afterwards;
    - `change` (`np.ndarray` of shape `(vocab_size,)`): their change by the perturbation;
    - `std` (`np.ndarray` of shape `(vocab_size,)`): standard deviation of that change, zero where it was imposed;
    - `direction` (`np.ndarray` of shape `(vocab_size,)`): probability that its sign is right if the gene changes at all.

    These are the numbers of `gppc predict`.
    """

    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_processor = False
    _load_feature_extractor = None  # tried; whether there is one is checked below, in words that say how to get one

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.feature_extractor is None:
            raise ValueError(
                "`feature_extractor` is missing: the model's folder has no readable `preprocessor_config.json`, which "
                "names its genes; save the extractor beside the model (`extractor.save_pretrained(folder)`, or "
                "`Trainer(processing_class=extractor)`) or pass `feature_extractor=`."
            )

    def _sanitize_parameters(self, top_k=None, cells_per_batch=None, **unknown):
        if unknown:
            name = next(iter(unknown))
            raise ValueError(f"`{name}` is not an option{close_matches(name, OPTIONS)}")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"`top_k` is {top_k!r}; wanted a number of genes.")
        forward = {} if cells_per_batch is None else {"cells_per_batch": cells_per_batch}
        return {}, forward, {} if top_k is None else {"top_k": top_k}

    def __call__(self, inputs, batch_size: int | None = None, **kwargs):
        """
        Args:
            inputs (mapping, or list of mappings): See the class.
            batch_size (`int`, *optional*, defaults to 64): Cells that the model sees at once.
            top_k (`int`, *optional*): Return instead the records (`gene_id`, `gene_symbol`, `expression`, `change`,
                `std`, `direction`) of the `top_k` genes that change most.

        Raises:
            ValueError: For unknown keys or genes and for values that are not raw counts.
        """
        if isinstance(inputs, list) and not inputs:
            return []
        cells = batch_size if batch_size is not None else self._batch_size
        if cells is not None:
            if cells < 1:
                raise ValueError(f"`batch_size` is {cells}; wanted at least 1.")
            kwargs["cells_per_batch"] = cells
        # Inputs hold different numbers of cells: batches are cut from the cells of each, not from the list.
        return super().__call__(inputs, batch_size=1, **kwargs)

    def preprocess(self, inputs):
        """Normalises the counts and reads the perturbations of one input."""
        if not isinstance(inputs, Mapping):
            raise ValueError(f"`inputs` holds {type(inputs).__name__}; wanted a mapping with `counts`.")
        for key in inputs:
            if key not in INPUTS:
                raise ValueError(f"`{key}` is not an input{close_matches(str(key), INPUTS)}")
        if "counts" not in inputs:
            raise ValueError("`counts` is missing; wanted raw counts of shape (n_vars,) or (n_obs, n_vars).")
        counts = inputs["counts"]
        counts = counts.toarray() if hasattr(counts, "toarray") else np.asarray(counts)
        perturbation = inputs.get("perturbation") or ""
        single = counts.ndim == 1 and isinstance(perturbation, (str, Mapping))
        counts = np.atleast_2d(counts)
        specs = [perturbation] * len(counts) if isinstance(perturbation, (str, Mapping)) else list(perturbation)
        # One cell and several perturbations: the cell is encoded once.
        state_index = np.zeros(len(specs), dtype=np.int64) if len(counts) == 1 else np.arange(len(counts))
        if len(specs) != len(state_index):
            raise ValueError(f"`perturbation` has {len(specs)} entries; wanted one, or {len(counts)}, one a cell.")
        library_size = inputs.get("library_size")
        if library_size is not None:
            library_size = np.broadcast_to(np.asarray(library_size, dtype=np.float64), (len(counts),))
        features = self.feature_extractor(
            counts, inputs.get("gene_ids"), library_size=library_size, measured=inputs.get("measured")
        )
        for spec in {repr(spec): spec for spec in specs}.values():
            self.feature_extractor.parse_perturbation(spec)
        return {
            "state": dict(features),
            "state_index": torch.from_numpy(state_index),
            "perturbations": specs,
            "single": single,
        }

    def _forward(self, model_inputs, cells_per_batch: int = 64):
        """Responses of the cells, batch by batch."""
        state_index, specs = model_inputs["state_index"], model_inputs["perturbations"]
        parts = []
        for start in range(0, len(state_index), cells_per_batch):
            rows = slice(start, start + cells_per_batch)
            states, index = torch.unique(state_index[rows], return_inverse=True)
            encoded = self.model.encode(**{name: tensor[states] for name, tensor in model_inputs["state"].items()})
            features = self.feature_extractor.perturbation_features(specs[rows], self.model.levels(encoded)[index])
            output = self.model.respond(
                encoded,
                **{name: tensor.to(index.device) for name, tensor in features.items()},
                state_index=index,
            )
            parts.append((output.expression, output.change, output.variance.sqrt(), output.direction))
        figures = {name: torch.cat(part).float() for name, part in zip(FIGURES, zip(*parts))}
        return {**figures, "single": model_inputs["single"]}

    def postprocess(self, model_outputs, top_k: int | None = None):
        """Arrays a cell, or records of the genes that change most."""
        figures = {name: model_outputs[name].numpy() for name in FIGURES}
        ids, symbols = self.feature_extractor.gene_ids, self.feature_extractor.gene_symbols
        results = []
        for row in range(len(figures["change"])):
            values = {name: array[row] for name, array in figures.items()}
            if top_k is None:
                results.append({"gene_ids": ids, "gene_symbols": symbols, **values})
                continue
            order = np.argsort(-np.abs(values["change"]), kind="stable")[:top_k].tolist()
            numbers = [{name: float(array[gene]) for name, array in values.items()} for gene in order]
            results.append(
                [
                    {"gene_id": ids[gene], "gene_symbol": symbols[gene], **of_gene}
                    for gene, of_gene in zip(order, numbers)
                ]
            )
        return results[0] if model_outputs["single"] else results


__all__ = ["PerturbationPredictionPipeline"]
