"""What benchmarks share: models as if fitted, random cells, child processes, a small screen."""

import argparse
import math
import multiprocessing
import os
import platform
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from modeling_gppc import GppcConfig, GppcForPerturbationPrediction

EXPRESSED_SHARE = 0.08
N_IMPOSED = 5


def fitted_like_model(config: GppcConfig) -> GppcForPerturbationPrediction:
    """A model whose linear response is a proper distribution and whose network contributes something."""
    torch.manual_seed(0)
    model = GppcForPerturbationPrediction(config)
    response, factors, genes = model.model.linear_response, config.num_factors, config.vocab_size
    states = response.states
    with torch.no_grad():
        response.gene_mean.copy_(torch.rand(genes).pow(4) * 3)
        strength = torch.linspace(0.5, 0.05, factors)
        response.loadings.copy_(torch.randn(genes, factors) * strength * (0.1 + response.gene_mean[:, None]).sqrt())
        response.noise.copy_(0.05 + 0.5 * torch.rand(genes) * (0.1 + response.gene_mean))
        states.coupling.copy_(torch.diag(torch.linspace(0.95, 0.3, factors)).expand_as(states.coupling))
        states.component_means.normal_(std=0.8)
        states.transition_logits.copy_(3.0 * torch.eye(config.num_components).expand_as(states.transition_logits))
        states.evidence_scale.fill_(0.5)
        for vectors in (model.readout.gene_vectors, model.readout.gene_vectors_logvar):
            vectors.normal_(std=0.02)
    return model


def random_state(genes: int, cells: int) -> dict[str, torch.Tensor]:
    """Cells that express a share of the genes; all measured the same panel."""
    rng = np.random.default_rng(0)
    tokens = max(2, round(EXPRESSED_SHARE * genes))
    ids = np.argsort(rng.random((cells, genes)), axis=1)[:, :tokens]
    return {
        "input_ids": torch.from_numpy(np.sort(ids, axis=1)),
        "expression_values": torch.from_numpy(rng.uniform(0.3, 4.0, ids.shape).astype(np.float32)),
        "attention_mask": torch.ones(ids.shape, dtype=torch.long),
        "measured_mask": torch.ones(1, genes, dtype=torch.bool),
        "panel_index": torch.zeros(cells, dtype=torch.long),
    }


def random_pairs(genes: int, cells: int) -> dict[str, torch.Tensor]:
    """A training batch: states, imposed changes and labels at every gene."""
    batch = random_state(genes, cells)
    generator = torch.Generator().manual_seed(0)
    shape = (cells, N_IMPOSED)
    labels = torch.rand(cells, genes, generator=generator) * 3
    return {
        **batch,
        "perturbation_ids": torch.stack(
            [torch.randperm(genes, generator=generator)[:N_IMPOSED] for _ in range(cells)]
        ),
        "perturbation_values": torch.randn(shape, generator=generator),
        "perturbation_mask": torch.ones(shape, dtype=torch.long),
        "pairing_ids": torch.zeros(cells, dtype=torch.long),
        "labels": torch.where(
            torch.rand(labels.shape, generator=generator) < EXPRESSED_SHARE, labels, torch.zeros(())
        ),
    }


def peak_rss_gb() -> float:
    """Most memory this process ever held, 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def in_child(function: Callable[..., dict], **arguments) -> dict:
    """What a function returns in a process of its own, with `peak_rss_gb`, which is that process's own.

    It is forked from one that has only imported the package: no threads and no figures of this process are in it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modeling_gppc.modeling_gppc", "data_scripts.pairs.census_pairs"])
    with ProcessPoolExecutor(1, context) as pool:
        result = pool.submit(function, **arguments).result()
        return {**result, "peak_rss_gb": pool.submit(peak_rss_gb).result()}


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of log time over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def machine() -> str:
    """What the figures were measured on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"


def smoke_screen(path: Path) -> None:
    """Writes a small screen of counts: three programs, six knock-downs."""
    import anndata
    import pandas as pd

    generator = np.random.default_rng(0)
    loadings = generator.normal(size=(60, 3)) * 0.4
    labels = np.repeat(["control", *(f"G{i}" for i in range(6))], [500, *[120] * 6])
    state = generator.normal(size=(len(labels), 3))
    for gene in range(6):
        state[labels == f"G{gene}"] -= 2 * loadings[gene] / np.linalg.norm(loadings[gene])
    counts = generator.poisson(np.exp(0.5 + state @ loadings.T)).astype(np.float32)
    adata = anndata.AnnData(
        counts, obs=pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    )
    adata.var_names = [f"G{i}" for i in range(60)]
    adata.write_h5ad(path)


def parser_of(doc: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny, seconds: to see that the benchmark runs")
    return parser


def show(value: float) -> str:
    """A figure with three significant digits."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"
