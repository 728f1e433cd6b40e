"""What `respond` says of knock-outs that others simulated or measured, from their unperturbed samples alone.

python benchmarks/external_interventions.py FILE.h5ad [FILE.h5ad ...]
python benchmarks/external_interventions.py --smoke

A file names a gene a row in `obs.perturbation`. Controls are rows with `obs.is_control` and X holds counts; or, as in
DREAM4, `obs.kind` tells `control`, `knockout` and `timeseries` apart, X holds levels, and the time series are what is
learned from. The change at the knocked-out gene is given; every other gene is scored.
"""

import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from bench_tools import parser_of, smoke_screen

from modeling_gppc import GppcConfig, GppcForPerturbationPrediction
from modeling_gppc.evaluation.metrics import normalised_squared_error, pearson_delta
from modeling_gppc.evaluation.report import markdown_table
from modeling_gppc.fitting.factor_mixture import fit_within_groups
from modeling_gppc.fitting.factor_model import Cells, choose_rank, fit_factor_model
from modeling_gppc.normalization_gppc import normalize_counts


def read(path: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    """Values `(n, V)` of unperturbed rows, their cell types (absent where none are named), the knocked-out genes `(P,)`
    and the responses `(P, V)`."""
    adata = anndata.read_h5ad(path)
    values = np.asarray(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X, dtype=np.float32)
    names = list(adata.var.get("symbol", adata.var_names))
    label = adata.obs["perturbation"].astype(str).to_numpy()
    if "kind" in adata.obs:
        kind = adata.obs["kind"].astype(str).to_numpy()
        control, observed, perturbed = kind == "control", kind == "timeseries", kind == "knockout"
    else:
        values = normalize_counts(values, np.maximum(values.sum(axis=1, keepdims=True), 1.0))
        control = adata.obs["is_control"].to_numpy() if "is_control" in adata.obs else label == "control"
        observed, perturbed = control, ~control
    genes = [gene for gene, name in enumerate(names) if (label[perturbed] == name).any()]
    rows = [values[perturbed & (label == names[gene])].mean(axis=0) for gene in genes]
    types = adata.obs["cell_type"].astype(str).to_numpy()[observed] if "cell_type" in adata.obs else None
    return values[observed], types, np.array(genes), np.stack(rows) - values[control].mean(axis=0)


@torch.no_grad()
def fitted_model(values: np.ndarray, types: np.ndarray | None) -> GppcForPerturbationPrediction:
    """The closed form of unperturbed rows, as training fits it: within cell types, where they are named."""
    cells = Cells(values, np.zeros(len(values), dtype=int), np.ones((1, values.shape[1]), dtype=bool))
    factors = fit_factor_model(cells, choose_rank(values))
    rank = factors.loadings.shape[1]
    config = GppcConfig.from_size(
        "tiny",
        vocab_size=values.shape[1],
        num_factors=rank,
        num_components=1,
        num_references=0,
        use_network=False,
    )
    model = GppcForPerturbationPrediction(config).eval()
    response = model.model.linear_response
    response.gene_mean.copy_(torch.as_tensor(factors.mean))
    response.loadings.copy_(torch.as_tensor(factors.loadings))
    response.noise.copy_(torch.as_tensor(factors.noise))
    if types is not None:
        response.within_root.copy_(torch.as_tensor(np.linalg.cholesky(fit_within_groups(factors, cells, types))))
    return model


def gppc(values: np.ndarray, types: np.ndarray | None, genes: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Responses `(P, V)` of the model to changes `(P,)` at genes `(P,)`."""
    asked = torch.as_tensor(genes)[:, None], torch.as_tensor(changes, dtype=torch.float32)[:, None]
    return fitted_model(values, types).respond(None, *asked).change.double().numpy()


def covariance(values: np.ndarray, types: np.ndarray | None, genes: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """The same of the covariance rule: change of the gene x covariance with it / its variance."""
    frame = pd.DataFrame(values.astype(np.float64))
    centred = (frame - (frame.mean() if types is None else frame.groupby(types).transform("mean"))).to_numpy()
    shared = centred.T @ centred[:, genes] / len(centred)
    return (shared * changes / np.maximum(shared[genes, np.arange(len(genes))], 1e-12)).T


def score(path: str) -> list[list[str]]:
    """A row a method: name, knock-outs, mean correlation and mean size error, each with its standard error."""
    values, types, genes, truth = read(path)
    changes = truth[np.arange(len(genes)), genes]
    answers = {
        "gppc": gppc(values, types, genes, changes),
        "covariance": covariance(values, None, genes, changes),
        "mean of the other knock-outs": (truth.sum(axis=0) - truth) / max(len(truth) - 1, 1),
        "nothing": np.zeros_like(truth),
    }
    if types is not None:
        answers["gppc, types not given"] = gppc(values, None, genes, changes)
        answers["covariance within types"] = covariance(values, types, genes, changes)
    rows = []
    for name, answer in answers.items():
        others = [np.delete(np.arange(truth.shape[1]), gene) for gene in genes]
        pairs = [(answer[row, kept][None], truth[row, kept][None]) for row, kept in enumerate(others)]
        figures = []
        for metric in (pearson_delta, normalised_squared_error):
            found = np.nan_to_num(np.concatenate([metric(*pair) for pair in pairs]))
            figures.append(f"{found.mean():.3f} +- {found.std() / np.sqrt(len(found)):.3f}")
        rows.append([Path(path).stem, name, str(len(genes)), *figures])
    return rows


def main() -> None:
    """Scores every file and prints one table; a size error of 1 is that of predicting nothing."""
    parser = parser_of(__doc__)
    parser.add_argument("files", nargs="*", help="AnnData files with unperturbed and knocked-out rows (.h5ad)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.smoke:
            smoke_screen(Path(folder) / "smoke.h5ad")
            arguments.files = [str(Path(folder) / "smoke.h5ad")]
        if not arguments.files:
            parser.error("`files` names no file; give one or more, or --smoke.")
        rows = [row for path in arguments.files for row in score(path)]
    print(markdown_table(("file", "method", "knock-outs", "r", "size error"), rows))


if __name__ == "__main__":
    main()
