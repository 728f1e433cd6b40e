"""A small screen of a linear network of three programs."""

import anndata
import numpy as np
import pandas as pd

N_GENES = 30


def make_adata(labels=("control", "G0", "G1", "G2", "G3", "G4", "G5"), n=60, controls=400, seed=0):
    """Cells of a linear network of three programs; knocking a gene down moves its program."""
    generator = np.random.default_rng(seed)
    loadings = np.random.default_rng(7).normal(size=(N_GENES, 3)) * 0.3
    names = np.repeat(labels, [controls if label == "control" else n for label in labels])
    state = generator.normal(size=(len(names), 3))
    for label in labels[1:]:
        for gene in label.split("+"):
            state[names == label] -= 2.0 * loadings[int(gene[1:])] / np.linalg.norm(loadings[int(gene[1:])])
    values = np.maximum(1.5 + state @ loadings.T + 0.3 * generator.normal(size=(len(names), N_GENES)), 0)
    adata = anndata.AnnData(values.astype(np.float32))
    adata.var_names = [f"G{i}" for i in range(N_GENES)]
    adata.obs_names = [f"c{i}" for i in range(len(names))]
    adata.obs["perturbation"] = pd.Categorical(names)
    adata.obs["batch"] = np.where(np.arange(len(names)) % 2, "b1", "b2")
    return adata
