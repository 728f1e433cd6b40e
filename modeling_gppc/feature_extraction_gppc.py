"""GppcFeatureExtractor: gene vocabulary, normalisation and masks, saved with the checkpoint."""

import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin

from .normalization_gppc import (
    NORMALIZATIONS,
    VALUE_KINDS,
    bare_gene_name,
    change_of_log_value,
    check_raw_counts,
    close_matches,
    normalize_counts,
)

# The technical covariate that is known of every cell.
LOG_LIBRARY_SIZE = "log library size"


class GppcFeatureExtractor(FeatureExtractionMixin):
    r"""
    Turns counts of cells and wished-for changes into the inputs of a GPPC model.

    Args:
        gene_ids (`list[str]`): The vocabulary in id order: Ensembl ids where known, else symbols.
        gene_symbols (`list[str]`, *optional*): Names for people, same order; defaults to `gene_ids`.
        normalization (`str`, *optional*, defaults to `"log1p"`): See [`normalize_counts`].
        target_sum (`float`, *optional*, defaults to 10,000): See [`normalize_counts`].
        gene_lengths (`list[float]`, *optional*): Bases, same order; needed for `log_tpm`.
        organism (`str`, *optional*, defaults to `"homo_sapiens"`): Census name of the species.
        target_ids (`list[str]`, *optional*): Genes that may be perturbed without being measured, numbered after the
            vocabulary.
        seen_perturbations (`list[str]`, *optional*): Perturbations that a model of a screen saw.
        covariate_names (`list[str]`, *optional*), covariate_center (`list[float]`, *optional*), covariate_slopes
            (`list[list[float]]`, *optional*): Technical covariates that were regressed out of the training values, their
            means, and the change of each gene's log value a unit of each; see `__call__`.
    """

    model_input_names = ["input_ids", "expression_values", "attention_mask", "measured_mask"]

    def __init__(
        self,
        gene_ids: Sequence[str] = (),
        gene_symbols: Sequence[str] | None = None,
        normalization: str = "log1p",
        target_sum: float = 10_000.0,
        gene_lengths: Sequence[float] | None = None,
        organism: str = "homo_sapiens",
        target_ids: Sequence[str] = (),
        seen_perturbations: Sequence[str] = (),
        covariate_names: Sequence[str] = (),
        covariate_center: Sequence[float] = (),
        covariate_slopes: Sequence[Sequence[float]] = (),
        **kwargs,
    ):
        super().__init__(**kwargs)
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"`normalization` is {normalization!r}; wanted one of {', '.join(NORMALIZATIONS)}.")
        self.gene_ids = list(gene_ids)
        self.gene_symbols = list(gene_ids if gene_symbols is None else gene_symbols)
        if len(self.gene_symbols) != len(self.gene_ids):
            raise ValueError(
                f"`gene_symbols` has {len(self.gene_symbols)} entries; wanted {len(self.gene_ids)}, one per gene id."
            )
        if len(set(self.gene_ids)) != len(self.gene_ids):
            raise ValueError("`gene_ids` holds duplicates; every gene of the vocabulary needs one id.")
        self.normalization = normalization
        self.target_sum = float(target_sum)
        self.gene_lengths = list(gene_lengths) if gene_lengths is not None else None
        self.organism = organism
        self.target_ids, self.seen_perturbations = list(target_ids), list(seen_perturbations)
        self.covariate_names, self.covariate_center = list(covariate_names), list(covariate_center)
        self.covariate_slopes = [list(row) for row in covariate_slopes]

    @property
    def vocab_size(self) -> int:
        """Number of genes the model knows."""
        return len(self.gene_ids)

    @functools.cached_property
    def _genes_of(self) -> dict[str, list[int]]:
        """Vocabulary ids of every gene name: one of an id, several of a symbol that genes share."""
        genes: dict[str, list[int]] = {}
        for index, symbol in enumerate(self.gene_symbols):
            genes.setdefault(symbol, []).append(index)
        # An id is surer than a symbol.
        return genes | {gene: [index] for index, gene in enumerate(self.gene_ids)}

    def to_dict(self) -> dict:
        """The JSON form; the look-up table is rebuilt on loading."""
        return {name: value for name, value in super().to_dict().items() if name != "_genes_of"}

    def find_genes(self, names: Sequence[str]) -> np.ndarray:
        """Vocabulary ids of genes given by Ensembl id or symbol (see [`bare_gene_name`]), int64; -1 where unknown.

        Raises:
            ValueError: If a symbol stands for several genes of the vocabulary.
        """
        found = np.full(len(names), -1, dtype=np.int64)
        for position, name in enumerate(map(str, names)):
            genes = self._genes_of.get(name) or self._genes_of.get(bare_gene_name(name), [])
            if len(genes) > 1:
                ids = ", ".join(self.gene_ids[gene] for gene in genes)
                raise ValueError(f"`{name}` stands for several genes of the model: {ids}; give the id.")
            found[position : position + len(genes)] = genes
        return found

    def gene_index(self, names: Sequence[str]) -> np.ndarray:
        """Like [`find_genes`], but every gene must be known.

        Raises:
            ValueError: Naming the unknown genes and their close matches.
        """
        found = self.find_genes(names)
        unknown = [str(name) for name, index in zip(names, found) if index < 0]
        if unknown:
            hint = close_matches(unknown[0], [*self.gene_symbols, *self.gene_ids])
            more = f" (and {len(unknown) - 1} more unknown genes)" if len(unknown) > 1 else ""
            raise ValueError(f"gene `{unknown[0]}` is not among the {self.vocab_size} genes of the model{more}{hint}")
        return found

    def find_targets(self, names: Sequence[str]) -> np.ndarray:
        """Ids of genes that may be perturbed: those of the vocabulary, then `target_ids` (case ignored); -1 where unknown."""
        found = self.find_genes(names)
        further = {gene.casefold(): self.vocab_size + place for place, gene in enumerate(self.target_ids)}
        for place in np.flatnonzero(found < 0):
            found[place] = further.get(str(names[place]).casefold(), -1)
        return found

    def target_index(self, names: Sequence[str]) -> np.ndarray:
        """Like [`find_targets`], but every gene must be known.

        Raises:
            ValueError: Naming an unknown gene, what of it is missing, and close matches.
        """
        found = self.find_targets(names)
        unknown = [str(name) for name, index in zip(names, found) if index < 0]
        if unknown and self.seen_perturbations:
            hint = close_matches(unknown[0], [*self.gene_symbols, *self.gene_ids, *self.target_ids])
            raise ValueError(
                f"gene `{unknown[0]}` is not among the {self.vocab_size} measured genes of the model, was not perturbed "
                f"in its screen and has no features{hint if 'did you mean' in hint else ''}: nothing is known of it; fit "
                "the screen with `gene_features` that know it."
            )
        if unknown:
            self.gene_index(names)
        return found

    def __call__(
        self,
        counts,
        gene_ids: Sequence[str] | None = None,
        library_size: np.ndarray | None = None,
        measured: np.ndarray | None = None,
        covariates: Mapping[str, np.ndarray] | None = None,
        return_tensors: str | None = "pt",
        value_kind: str = "counts",
    ) -> BatchFeature:
        """Builds model inputs from cells.

        Args:
            counts (array or scipy sparse matrix): Raw counts (log values if `normalization` is `"none"`), shape
                `(n_obs, n_vars)`.
            gene_ids (`Sequence[str]`, *optional*): Id or symbol of each column; defaults to the vocabulary in order.
                Columns of unknown genes count towards the library size and are otherwise ignored.
            library_size (`np.ndarray`, *optional*): Counts over *all* genes of each cell, shape `(n_obs,)`; defaults
                to the sum of what is given.
            measured (`np.ndarray` of bool, *optional*): Which entries were measured, shape `(n_vars,)` or
                `(n_obs, n_vars)`; defaults to all that are given.
            covariates (`Mapping[str, np.ndarray]`, *optional*): Technical covariates of the cells by the names in
                `covariate_names`, each `(n_obs,)`. What they explain is taken out, as it was in training; the library
                size is known in any case, and a covariate that is not given is taken at its training mean.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"` or `"np"`.
            value_kind (`str`, *optional*, defaults to `"counts"`): `"estimated_counts"` where counts have fractions,
                `"log"` where the values are normalised as the model's `normalization` says.

        Returns:
            `BatchFeature` with `input_ids` `(n_obs, N)` (expressed genes only), `expression_values` `(n_obs, N)`,
            `attention_mask` `(n_obs, N)` and `measured_mask` `(n_obs, vocab_size)` of bool.

        Raises:
            ValueError: For shapes that disagree, values that are not raw counts, or no known gene at all.
        """
        dense = counts.toarray() if hasattr(counts, "toarray") else np.asarray(counts)
        if dense.ndim != 2:
            raise ValueError(f"`counts` has {dense.ndim} dimensions; wanted 2: (n_obs, n_vars).")
        names = self.gene_ids if gene_ids is None else list(gene_ids)
        if len(names) != dense.shape[1]:
            raise ValueError(
                f"`gene_ids` has {len(names)} names; wanted {dense.shape[1]}, one per column of `counts`."
            )
        columns = self.find_genes(names)
        known = columns >= 0
        if not known.any():
            raise ValueError(
                f"`gene_ids`: none of the {len(names)} genes (e.g. `{names[0] if names else ''}`) is among the "
                f"{self.vocab_size} genes of the model (e.g. `{self.gene_ids[0]}`, `{self.gene_symbols[0]}`); "
                "give Ensembl ids or symbols of the same species."
            )
        kept = columns[known]
        if len(np.unique(kept)) != len(kept):
            ids, times = np.unique(kept, return_counts=True)
            raise ValueError(f"`gene_ids` names `{self.gene_ids[ids[times > 1][0]]}` more than once; sum or drop one.")
        mask = np.ones(dense.shape, dtype=bool) if measured is None else np.broadcast_to(measured, dense.shape)
        dense = np.where(mask, dense, 0)
        values = self.normalize(dense, names, library_size, value_kind)
        if library_size is None and value_kind != "log":
            library_size = dense.sum(axis=1)
        values[:, known] -= self._explained_by(covariates, library_size, len(dense))[:, kept]
        state = np.zeros((dense.shape[0], self.vocab_size), dtype=np.float32)
        state[:, kept] = values[:, known]
        measured_mask = np.zeros(state.shape, dtype=bool)
        measured_mask[:, kept] = mask[:, known]
        return self.from_values(state, measured_mask, return_tensors)

    def _explained_by(self, covariates, library_size, n_obs: int) -> np.ndarray:
        """What technical covariates explain of the log values, `(n_obs, vocab_size)`; zero where none were regressed."""
        explained = np.zeros((n_obs, self.vocab_size), dtype=np.float32)
        given = dict(covariates or {})
        if self.normalization == "log1p" and library_size is not None:
            size = np.asarray(library_size, dtype=np.float64)
            given.setdefault(LOG_LIBRARY_SIZE, np.log(np.maximum(size, 1.0)))
        for name, center, slopes in zip(self.covariate_names, self.covariate_center, self.covariate_slopes):
            if name in given:
                explained += np.outer(np.asarray(given[name]) - center, slopes).astype(np.float32)
        return explained

    def normalize(
        self, counts: np.ndarray, names: Sequence[str], library_size: np.ndarray | None, value_kind: str = "counts"
    ) -> np.ndarray:
        """Checks and normalises dense counts `(n_obs, n_vars)` of the named genes; see [`normalize_counts`]."""
        if value_kind not in VALUE_KINDS:
            raise ValueError(f"`value_kind` is {value_kind!r}; wanted one of {', '.join(VALUE_KINDS)}.")
        if self.normalization == "none" or value_kind == "log":
            if not np.isfinite(counts).all():
                raise ValueError("`counts` holds NaN or infinite values.")
            return np.asarray(counts, dtype=np.float32)
        check_raw_counts(counts, estimated=value_kind == "estimated_counts")
        lengths, rates = None, counts
        if self.normalization == "log_tpm":
            index = self.find_genes(names)
            lengths = np.where(index >= 0, np.asarray(self.gene_lengths, dtype=np.float64)[index], np.nan)
            rates = np.nan_to_num(counts / (lengths / 1_000.0))
        if library_size is None:
            library_size = rates.sum(axis=1)
        library_size = np.asarray(library_size, dtype=np.float64)
        if library_size.shape != (counts.shape[0],):
            raise ValueError(
                f"`library_size` has shape {library_size.shape}; wanted ({counts.shape[0]},), one a cell."
            )
        short = rates.sum(axis=1) > library_size * (1 + 1e-6) + 1e-6
        if self.normalization == "log1p" and short.any():
            row = int(np.flatnonzero(short)[0])
            raise ValueError(
                f"`library_size` of cell {row} is {library_size[row]:g}, less than the {rates[row].sum():g} counts "
                "given for it; it is the sum of counts over all genes."
            )
        return normalize_counts(
            counts,
            library_size[:, None],
            normalization=self.normalization,
            target_sum=self.target_sum,
            gene_lengths=lengths,
        )

    def from_values(
        self, values: np.ndarray, measured_mask: np.ndarray, return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """Builds model inputs from normalised values `(n_obs, vocab_size)` and the mask of measured genes."""
        expressed = (values != 0) & measured_mask
        width = max(int(expressed.sum(axis=1).max(initial=0)), 1)
        # A stable sort brings the expressed genes to the front in ascending id order.
        order = np.argsort(~expressed, axis=1, kind="stable")[:, :width]
        attention = np.take_along_axis(expressed, order, axis=1)
        features = {
            "input_ids": np.where(attention, order, 0),
            "expression_values": np.where(attention, np.take_along_axis(values, order, axis=1), 0).astype(np.float32),
            "attention_mask": attention.astype(np.int64),
            "measured_mask": np.array(measured_mask, dtype=bool),
        }
        return BatchFeature(features, tensor_type=return_tensors)

    def parse_perturbation(self, spec: str | Mapping[str, str | float]) -> list[tuple[int, str, float]]:
        """Reads a perturbation such as `"STAT1=ko"`, `"STAT1=kd:0.8+IRF1=x3"` or `{"STAT1": -1.3}`.

        Actions: `ko` (to zero), `kd:SHARE` (SHARE of the expression removed, 0 to 1), `xFACTOR` (expression times
        FACTOR), `level:VALUE` (to that log value), `delta:CHANGE` or a plain number (change of the log value).
        `control`, or an empty text, is the empty perturbation.

        Returns:
            `list` of (id of the gene, see [`target_index`], action, amount), action one of `factor`, `level`, `delta`.

        Raises:
            ValueError: For a malformed text, an amount out of range, an unknown gene or one named twice.
        """
        if isinstance(spec, Mapping):
            parts = [(str(gene), str(action)) for gene, action in spec.items()]
        else:
            text = spec.strip()
            # A plus sign joins genes only where a `GENE=` follows: `A=+1.2+B=ko`.
            pieces = [] if text in ("", "control") else re.split(r"\+(?=[^+=]+=)", text)
            parts = []
            for piece in pieces:
                gene, equals, action = piece.partition("=")
                if not equals or not gene.strip() or not action.strip():
                    raise ValueError(
                        f"`perturbation` {piece!r} is not `GENE=ACTION`; actions are ko, kd:0.8, x3, level:2.0, "
                        "delta:-1.3; join genes with `+`."
                    )
                parts.append((gene.strip(), action.strip()))
        index = self.target_index([gene for gene, _ in parts])
        if len(set(index.tolist())) != len(index):
            raise ValueError(f"`perturbation` {spec!r} names a gene twice; give each gene one action.")
        return [(int(gene), *_parse_action(name, action)) for gene, (name, action) in zip(index, parts)]

    def perturbation_features(
        self,
        specs: str | Sequence[str],
        values: np.ndarray,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Perturbation inputs for cells: the change of log value that each action means for each cell.

        Args:
            specs (`str` or `Sequence[str]`): One text for all cells, or one a cell; see [`parse_perturbation`].
            values (`np.ndarray` or `torch.Tensor`): Log values of the cells, shape `(n_obs, vocab_size)`, such as
                `model.levels(encoded)`.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"` or `"np"`.

        Returns:
            `BatchFeature` with `perturbation_ids`, `perturbation_values` and `perturbation_mask`, each `(n_obs, K)`.
        """
        values = values.numpy(force=True) if isinstance(values, torch.Tensor) else np.asarray(values)
        specs = [specs] * len(values) if isinstance(specs, (str, Mapping)) else list(specs)
        if len(specs) != len(values):
            raise ValueError(f"`specs` has {len(specs)} entries; wanted one text, or {len(values)}, one a cell.")
        rows_of: dict[str, list[int]] = {}
        for row, spec in enumerate(specs):
            rows_of.setdefault(repr(spec), []).append(row)
        parsed = {key: self.parse_perturbation(specs[rows[0]]) for key, rows in rows_of.items()}
        width = max([1, *map(len, parsed.values())])
        ids = np.zeros((len(values), width), dtype=np.int64)
        changes = np.zeros((len(values), width), dtype=np.float32)
        mask = np.zeros((len(values), width), dtype=np.int64)
        for key, rows in rows_of.items():
            for column, (gene, action, amount) in enumerate(parsed[key]):
                ids[rows, column], mask[rows, column] = gene, 1
                # Of a gene that is not measured there is no level to change.
                if gene < self.vocab_size:
                    changes[rows, column] = change_of_log_value(values[rows, gene], action, amount)
        features = {"perturbation_ids": ids, "perturbation_values": changes, "perturbation_mask": mask}
        return BatchFeature(features, tensor_type=return_tensors)


def _parse_action(gene: str, action: str) -> tuple[str, float]:
    """What an action such as `ko`, `kd:0.8`, `x3` or `3x`, `level:2.0`, `delta:-1.3` or `-1.3` does, and how much."""
    lowered = action.casefold()
    if lowered == "ko":
        return "factor", 0.0
    if re.fullmatch(r"x[\d.].*|[\d.].*x", lowered):
        lowered = f"x:{lowered.strip('x')}"
    name, _, number = lowered.rpartition(":")
    try:
        amount = float(number)
    except ValueError:
        amount = float("nan")
    wanted = None
    if name not in ("", "kd", "x", "level", "delta") or not np.isfinite(amount):
        wanted = "wanted ko, kd:SHARE, xFACTOR, level:VALUE, delta:CHANGE or a number (change of the log value)"
    elif name == "kd" and not 0 <= amount <= 1:
        wanted = "the share removed lies between 0 and 1"
    elif name == "x" and amount < 0:
        wanted = "a factor is not negative"
    if wanted:
        raise ValueError(f"`perturbation` of `{gene}` is {action!r}; {wanted}.")
    if name in ("kd", "x"):
        return "factor", 1.0 - amount if name == "kd" else amount
    return name or "delta", amount
