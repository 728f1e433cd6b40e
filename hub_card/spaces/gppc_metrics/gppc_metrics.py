"""Scores predicted gene expression after a perturbation against the expression that was observed.

Every row is a cell (or an average of cells), every column a gene, values are log values. Genes that were not measured,
and genes whose change was imposed, are left out: set their reference to -100 (or NaN), or give `mask`.
"""

import datasets
import evaluate
import numpy as np

IGNORED = -100.0


def row_pearson(first, second, mask):
    """Pearson correlation of each row over the entries where `mask` is true; NaN where either side does not vary."""
    count = mask.sum(axis=1)
    safe = np.maximum(count, 1)
    kept = [np.where(mask, values, 0.0) for values in (first, second)]
    centred = [np.where(mask, values - (values.sum(axis=1) / safe)[:, None], 0.0) for values in kept]
    product = np.einsum("nv,nv->n", *centred)
    squares = [np.einsum("nv,nv->n", values, values) for values in centred]
    scales = [np.einsum("nv,nv->n", values, values) for values in kept]
    varied = (count >= 2) & (squares[0] > 1e-12 * scales[0]) & (squares[1] > 1e-12 * scales[1])
    return np.where(varied, product / np.sqrt(np.where(varied, squares[0] * squares[1], 1.0)), np.nan)


class GppcMetrics(evaluate.Metric):
    """
    Squared error, r2 and correlation of the change.

    Args:
        predictions (`list[list[float]]`): Predicted log values, shape `(n, V)`.
        references (`list[list[float]]`): Observed log values, shape `(n, V)`; -100 or NaN where a gene is not scored.
        sources (`list[list[float]]`): Log values before the perturbation, shape `(n, V)`.
        mask (`list[list[bool]]`, *optional*): True where a gene is scored.
        means (`list[float]`, *optional*): Mean of every gene over the training cells, shape `(V,)`; needed for `r2`.

    Returns:
        `mse` (`float`): squared error summed over the scored entries, divided by their number.
        `pearson_delta` (`float`): mean over rows of the Pearson correlation of predicted with observed change
            (prediction minus source, reference minus source); rows where it is not defined do not count.
        `r2` (`float`): 1 - mse / mse of predicting `means`; only with `means`.
        `n_scored` (`int`): number of scored entries.

    Examples:
        >>> metric = evaluate.load("gppc_metrics")
        >>> metric.compute(predictions=[[1.0, 2.0, 3.0]], references=[[1.0, 2.0, 4.0]], sources=[[0.0, 2.0, 1.0]])
    """

    def _info(self):
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation="GPPC developers. GPPC: Gene Perturbation Predictor from Correlates.",
            inputs_description=type(self).__doc__,
            features=datasets.Features({"predictions": row, "references": row, "sources": row}),
        )

    def _compute(self, predictions, references, sources, mask=None, means=None):
        predictions, references, sources = (
            np.asarray(values, dtype=np.float64) for values in (predictions, references, sources)
        )
        for name, values in (("predictions", predictions), ("sources", sources)):
            if values.shape != references.shape or values.ndim != 2:
                raise ValueError(f"`{name}` has shape {values.shape}; wanted {references.shape}, as `references`.")
        scored = np.isfinite(references) & (references != IGNORED)
        if mask is not None:
            scored &= np.asarray(mask, dtype=bool)
        if not scored.any():
            raise ValueError("`references` holds no scored value; every entry is -100, NaN or masked.")
        observed = np.where(scored, references, 0.0)
        correlation = row_pearson(predictions - sources, observed - sources, scored)
        defined = np.isfinite(correlation)
        scores = {
            "mse": float(np.square(predictions - observed)[scored].mean()),
            "pearson_delta": float(correlation[defined].mean()) if defined.any() else None,
            "n_scored": int(scored.sum()),
        }
        if means is not None:
            scores["r2"] = 1 - scores["mse"] / float(np.square(np.asarray(means)[None] - observed)[scored].mean())
        return scores
