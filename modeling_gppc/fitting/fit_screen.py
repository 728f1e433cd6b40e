"""From a CRISPR screen to a model: the one way, for `train.py` and for `gppc evaluate`."""

from collections.abc import Sequence

import numpy as np
import torch

from data_scripts.cells.screen_cells import TechnicalCovariates
from data_scripts.cells.screens import BATCH_PREFIX, Screen
from modeling_gppc import GppcConfig, GppcFeatureExtractor, GppcForPerturbationPrediction
from modeling_gppc.fitting.fit_controls import ControlFit, fit_controls
from modeling_gppc.fitting.fit_screen_options import ScreenFitOptions
from modeling_gppc.fitting.fit_screen_response import SeenPerturbations, fit_screen_response
from modeling_gppc.fitting.gene_features import GeneFeatures

CONTROL_PAIRING = "same_type"


def fit_screen(
    screen: Screen,
    labels: Sequence[str],
    options: ScreenFitOptions | None = None,
    features: GeneFeatures | None = None,
    controls: ControlFit | None = None,
) -> tuple[GppcForPerturbationPrediction, GppcFeatureExtractor]:
    """
    A model of a screen's control cells and of what some of its perturbations do.

    Everything is closed form. A network trained on pairs of control cells was compared on every screen at hand and
    changed nothing (docs/experiments.md).

    Args:
        screen (`Screen`): Only control cells and cells of `labels` are read; all its targets may be asked about.
        labels (`Sequence[str]`): Perturbations that are seen; none for a model of the controls alone. One alone says
            nothing of others, which are then predicted not to respond.
        options ([`ScreenFitOptions`], *optional*): How.
        features ([`GeneFeatures`], *optional*): Read from `options.gene_features`.
        controls ([`ControlFit`], *optional*): Of the same screen, where several models share it.
    """
    options = options or ScreenFitOptions()
    controls = controls or fit_controls(screen, options.n_factors, options.seed)
    extractor = screen_extractor(screen, labels, features, controls)
    inputs = target_inputs(screen, labels, extractor)
    config = GppcConfig(
        vocab_size=extractor.vocab_size,
        num_factors=controls.factors.loadings.shape[1],
        num_components=1,
        num_references=0,
        pairings=[CONTROL_PAIRING],
        use_screen_response=True,
        num_perturbations=len(labels),
        num_members=inputs[0].shape[1],
        num_targets=len(extractor.target_ids),
        # No network: the closed forms are all there is.
        use_network=False,
        hidden_size=1,
        num_latents=1,
        readout_size=1,
        intermediate_size=1,
        num_attention_heads=1,
        encoder_layers=0,
        decoder_layers=0,
    )
    model = GppcForPerturbationPrediction(config).eval()
    linear_response, part = model.model.linear_response, model.screen_response
    held = np.zeros(extractor.vocab_size)
    held[screen.panel_targets] = options.hold_targets
    counted = np.ones(extractor.vocab_size, dtype=bool)
    counted[screen.panel_targets] = False
    with torch.no_grad():
        for module, name, value in (
            (linear_response, "gene_mean", controls.factors.mean),
            (linear_response, "loadings", controls.factors.loadings),
            (linear_response, "noise", controls.factors.noise),
            (linear_response.states, "coupling", controls.coupling[None]),
            (linear_response, "drift", controls.drift),
            (part, "held", held),
            (part, "counted", counted),
        ):
            getattr(module, name).copy_(torch.as_tensor(value))
    if len(labels):
        likeness = target_likeness(screen, labels, extractor, features)
        seen = SeenPerturbations(list(labels), *inputs, likeness)
        fit_screen_response(part, linear_response, screen, seen, options)
    return model, extractor


def screen_extractor(
    screen: Screen, labels: Sequence[str], features: GeneFeatures | None, controls: ControlFit
) -> GppcFeatureExtractor:
    """The feature extractor of a screen: its genes, the further genes that may be asked about, its normalisation and
    the technical covariates that were taken out."""
    known = {name.casefold() for name in [*screen.gene_ids, *screen.gene_symbols]}
    measured = {p.genes[place] for p in screen.perturbations.values() for place in np.flatnonzero(p.gene_index >= 0)}
    asked = [gene for label in sorted(screen.perturbations) for gene in screen.perturbations[label].genes]
    asked += features.genes if features is not None and len(labels) else []
    targets = []
    for gene in asked:
        if gene not in measured and gene.casefold() not in known:
            known.add(gene.casefold())
            targets.append(gene)
    return GppcFeatureExtractor(
        gene_ids=screen.gene_ids,
        gene_symbols=screen.gene_symbols,
        normalization=screen.normalization,
        target_sum=screen.target_sum,
        target_ids=targets,
        seen_perturbations=list(labels),
        **portable(controls.covariates),
    )


def portable(covariates: TechnicalCovariates) -> dict[str, list]:
    """The covariates that cells of others have too, as the feature extractor keeps them: batches are the screen's own."""
    kept = [place for place, name in enumerate(covariates.names) if not name.startswith(BATCH_PREFIX)]
    return {
        "covariate_names": [covariates.names[place] for place in kept],
        "covariate_center": covariates.center[kept].tolist(),
        "covariate_slopes": covariates.slopes[kept].tolist(),
    }


def target_ids_of(screen: Screen, label: str, extractor: GppcFeatureExtractor) -> np.ndarray:
    """Ids of the targets of a perturbation among the genes that may be asked about, in the order of its genes."""
    perturbation = screen.perturbations[label]
    unmeasured = perturbation.gene_index < 0
    ids = np.array(perturbation.gene_index, dtype=np.int64)
    if unmeasured.any():
        ids[unmeasured] = extractor.target_index([perturbation.genes[place] for place in np.flatnonzero(unmeasured)])
    return ids


def target_inputs(
    screen: Screen, labels: Sequence[str], extractor: GppcFeatureExtractor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, measured changes of log value (0 where not measured) and mask of the targets of perturbations, `(T, K)`."""
    found = [target_ids_of(screen, label, extractor) for label in labels]
    width = max([len(ids) for ids in found], default=1)
    ids, changes = np.zeros((len(labels), width), dtype=np.int64), np.zeros((len(labels), width))
    mask = np.zeros(ids.shape, dtype=bool)
    for row, label in enumerate(labels):
        ids[row, : len(found[row])], mask[row, : len(found[row])] = found[row], True
        change = {column: amount for column, amount, _ in screen.target_changes(label)}
        changes[row, : len(found[row])] = [change.get(int(gene), 0.0) for gene in found[row]]
    return ids, changes, mask


def target_likeness(
    screen: Screen, labels: Sequence[str], extractor: GppcFeatureExtractor, features: GeneFeatures | None
) -> np.ndarray:
    """Cosine of the features of every gene that may be asked about with those of the targets of each perturbation,
    summed over its targets; `(V + E, T)`, zero where nothing is known."""
    n_genes = extractor.vocab_size + len(extractor.target_ids)
    if features is None:
        return np.zeros((n_genes, len(labels)))
    by_id = features.rows([*extractor.gene_ids, *extractor.target_ids])
    by_symbol = features.rows([*extractor.gene_symbols, *extractor.target_ids])
    unknown = np.asarray(abs(by_id).sum(axis=1)).ravel() == 0
    rows = (by_id + by_symbol.multiply(unknown[:, None])).tocsr()
    norms = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
    rows = rows.multiply(np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)[:, None]).tocsr()
    targets = [target_ids_of(screen, label, extractor) for label in labels]
    return np.stack([np.asarray((rows @ rows[ids].T).sum(axis=1)).ravel() for ids in targets], axis=1)
