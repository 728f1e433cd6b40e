"""PerturbationPredictionPipeline: counts and a perturbation in, predicted expression of every gene out."""

from collections.abc import Mapping

import numpy as np
import torch
from transformers import Pipeline

from .feature_extraction_gppc import change_of_log_value, close_matches

REFERENCES = ("unperturbed", "held")
OPTIONS = ("top_k", "reference", "batch_size")
INPUTS = ("counts", "gene_ids", "perturbation", "library_size", "measured", "pairing")


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
    - `measured` (`list[bool]`, *optional*): which columns were measured;
    - `pairing` (`str`, *optional*): the context that the cell before and the cell after share, one of the model's
      `config.pairings`.

    The result of one cell and one perturbation is a `dict`, of several a `list` of them:

    - `gene_ids`, `gene_symbols` (`list[str]`): the genes of the model;
    - `expression` (`np.ndarray` of shape `(vocab_size,)`): expected log values afterwards;
    - `change` (`np.ndarray` of shape `(vocab_size,)`): difference to the reference, see `reference`;
    - `std` (`np.ndarray` of shape `(vocab_size,)`): predicted standard deviation of the log value of a single cell,
      zero where a level was imposed; `None` where the model predicts none.

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

    def _sanitize_parameters(self, top_k=None, reference=None, cells_per_batch=None, **unknown):
        if unknown:
            name = next(iter(unknown))
            raise ValueError(f"`{name}` is not an option{close_matches(name, OPTIONS)}")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"`top_k` is {top_k!r}; wanted a number of genes.")
        if reference is not None and reference not in REFERENCES:
            raise ValueError(f"`reference` is {reference!r}; wanted one of {', '.join(REFERENCES)}.")
        forward = {"reference": reference, "cells_per_batch": cells_per_batch}
        forward = {name: value for name, value in forward.items() if value is not None}
        return {}, forward, {} if top_k is None else {"top_k": top_k}

    def __call__(self, inputs, batch_size: int | None = None, **kwargs):
        """
        Args:
            inputs (mapping, or list of mappings): See the class.
            batch_size (`int`, *optional*, defaults to 64): Cells that the model sees at once.
            reference (`str`, *optional*, defaults to `"unperturbed"`): What `change` is the difference from: the
                prediction for the same cell without a perturbation, or (`"held"`) with the same genes imposed at the
                cell's own level, which removes what merely knowing their level says.
            top_k (`int`, *optional*): Return instead the records (`gene_id`, `gene_symbol`, `expression`, `change`,
                `std`) of the `top_k` genes that change most.

        Raises:
            ValueError: For unknown keys, genes or contexts and for values that are not raw counts.
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
        parsed = {repr(spec): self.feature_extractor.parse_perturbation(spec) for spec in specs}
        return {
            "state": dict(features),
            "state_index": torch.from_numpy(state_index),
            "perturbations": [parsed[repr(spec)] for spec in specs],
            "pairing": self._pairing(inputs.get("pairing")),
            "single": single,
        }

    def _pairing(self, name: str | None) -> int:
        pairings = list(self.model.config.pairings)
        if name is None:
            name = self.model.config.default_pairing
        if name not in pairings:
            raise ValueError(
                f"`pairing` is {name!r}, which this model was not trained on{close_matches(name, pairings)}"
            )
        return pairings.index(name)

    def _forward(self, model_inputs, reference: str = "unperturbed", cells_per_batch: int = 64):
        """Predicts with the perturbation and without it, batch by batch."""
        state_index = model_inputs["state_index"]
        parts = []
        for start in range(0, len(state_index), cells_per_batch):
            rows = slice(start, start + cells_per_batch)
            states, index = torch.unique(state_index[rows], return_inverse=True)
            state = {name: tensor[states] for name, tensor in model_inputs["state"].items()}
            encoded = self.model.encode(**state) if self.model.config.architecture == "latents" else None

            def run(ids, changes, mask, familiarity=None, state=state, encoded=encoded, index=index):
                inputs = {
                    "perturbation_ids": ids,
                    "perturbation_values": changes,
                    "perturbation_mask": mask,
                    "pairing_ids": torch.full_like(index, model_inputs["pairing"]),
                }
                if encoded is not None:
                    return self.model.decode(encoded, **inputs, state_index=index, familiarity=familiarity)
                return self.model(**{name: tensor[index] for name, tensor in state.items()}, **inputs)

            ids, changes, mask = self._imposed(model_inputs["perturbations"][rows], state, encoded, index)
            after = run(ids, changes, mask)
            if reference == "held":
                before = run(ids, torch.zeros_like(changes), mask, after.familiarity)
            else:
                before = run(ids[:, :0], changes[:, :0], mask[:, :0], after.familiarity)
            std = None
            if after.logvar is not None:
                imposed = torch.zeros(after.logvar.shape, device=ids.device).scatter_add(1, ids, mask.float())
                std = (0.5 * after.logvar.float()).exp().masked_fill(imposed > 0, 0.0)
            parts.append((after.logits.float(), after.logits.float() - before.logits.float(), std))
        expression, change, std = zip(*parts)
        return {
            "expression": torch.cat(expression),
            "change": torch.cat(change),
            "std": None if std[0] is None else torch.cat(std),
            "single": model_inputs["single"],
        }

    def _imposed(self, parsed, state, encoded, index):
        """Ids, changes of log value and mask, each `(rows, K)`, from the levels that the genes have in each cell."""
        width = max(map(len, parsed))
        device = index.device
        ids = torch.zeros(len(parsed), width, dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        for row, spec in enumerate(parsed):
            mask[row, : len(spec)] = 1
            for column, (gene, _, _) in enumerate(spec):
                ids[row, column] = gene
        changes = torch.zeros(ids.shape, device=device)
        if encoded is not None:
            # Where the cell did not measure a gene, the model says which level the rest of the cell suggests.
            levels = self.model.model.imposed_levels(encoded, ids, changes, index)
        else:
            tokens, values = state["input_ids"], state["expression_values"]
            dense = values.new_zeros(len(values), self.model.config.vocab_size).scatter_add(1, tokens, values)
            levels = dense[index].gather(1, ids)
        levels = levels.double().cpu().numpy()
        for row, spec in enumerate(parsed):
            for column, (_, action, amount) in enumerate(spec):
                changes[row, column] = change_of_log_value(levels[row, column], action, amount)
        return ids, changes, mask

    def postprocess(self, model_outputs, top_k: int | None = None):
        """Arrays a cell, or records of the genes that change most."""
        expression, change = (model_outputs[name].numpy() for name in ("expression", "change"))
        std = None if model_outputs["std"] is None else model_outputs["std"].numpy()
        results = []
        for row in range(len(expression)):
            result = {
                "gene_ids": self.feature_extractor.gene_ids,
                "gene_symbols": self.feature_extractor.gene_symbols,
                "expression": expression[row],
                "change": change[row],
                "std": None if std is None else std[row],
            }
            results.append(result if top_k is None else _records(result, top_k))
        return results[0] if model_outputs["single"] else results


def _records(result: dict, top_k: int) -> list[dict]:
    order = np.argsort(-np.abs(result["change"]), kind="stable")[:top_k]
    return [
        {
            "gene_id": result["gene_ids"][gene],
            "gene_symbol": result["gene_symbols"][gene],
            "expression": float(result["expression"][gene]),
            "change": float(result["change"][gene]),
            "std": None if result["std"] is None else float(result["std"][gene]),
        }
        for gene in order.tolist()
    ]


__all__ = ["PerturbationPredictionPipeline"]
