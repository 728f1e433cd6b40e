"""What the model benchmarks share: models with a linear response as if fitted, random cells, a training step, children."""

import json
import math
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data_scripts.files import write_text
from modeling_gppc import GppcConfig, GppcForPerturbationPrediction

EXPRESSED_SHARE = 0.08
N_REVEALED = 5


def fitted_like_model(config: GppcConfig, seed: int = 0) -> GppcForPerturbationPrediction:
    """A model whose linear response is a proper distribution and whose departure is not zero."""
    torch.manual_seed(seed)
    model = GppcForPerturbationPrediction(config)
    if model.model is None:
        return model
    response, factors = model.model.linear_response, config.num_factors
    genes = config.vocab_size
    with torch.no_grad():
        response.gene_mean.copy_(torch.rand(genes).pow(4) * 3)
        strength = torch.linspace(0.5, 0.05, factors)
        response.loadings.copy_(torch.randn(genes, factors) * strength * (0.1 + response.gene_mean[:, None]).sqrt())
        response.noise.copy_(0.05 + 0.5 * torch.rand(genes) * (0.1 + response.gene_mean))
        response.coupling.copy_(torch.diag(torch.linspace(0.95, 0.3, factors)).expand_as(response.coupling))
        response.component_means.normal_(std=0.8)
        response.transition_logits.copy_(3.0 * torch.eye(config.num_components).expand_as(response.transition_logits))
        response.evidence_scale.fill_(0.5)
        for vectors in (model.readout.gene_vectors, model.readout.gene_vectors_logvar):
            vectors.normal_(std=0.02)
    return model


def random_state(genes: int, cells: int, seed: int = 0, share: float = EXPRESSED_SHARE) -> dict[str, torch.Tensor]:
    """Cells that express a share of the genes; all measured the same panel."""
    rng = np.random.default_rng(seed)
    tokens = max(2, round(share * genes))
    ids = np.argsort(rng.random((cells, genes)), axis=1)[:, :tokens]
    return {
        "input_ids": torch.from_numpy(np.sort(ids, axis=1)),
        "expression_values": torch.from_numpy(rng.uniform(0.3, 4.0, ids.shape).astype(np.float32)),
        "attention_mask": torch.ones(ids.shape, dtype=torch.long),
        "measured_mask": torch.ones(1, genes, dtype=torch.bool),
        "panel_index": torch.zeros(cells, dtype=torch.long),
    }


def random_pairs(genes: int, cells: int, seed: int = 0, share: float = EXPRESSED_SHARE) -> dict[str, torch.Tensor]:
    """A training batch: states, revealed changes and labels at every gene."""
    batch = random_state(genes, cells, seed, share)
    generator = torch.Generator().manual_seed(seed)
    shape = (cells, N_REVEALED)
    labels = torch.rand(cells, genes, generator=generator) * 3
    return {
        **batch,
        "perturbation_ids": torch.stack(
            [torch.randperm(genes, generator=generator)[:N_REVEALED] for _ in range(cells)]
        ),
        "perturbation_values": torch.randn(shape, generator=generator),
        "perturbation_mask": torch.ones(shape, dtype=torch.long),
        "pairing_ids": torch.zeros(cells, dtype=torch.long),
        "labels": torch.where(torch.rand(labels.shape, generator=generator) < share, labels, torch.zeros(())),
    }


def training_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor], bf16: bool = False
) -> None:
    """What the Trainer does in a step: forward, backward, clipping, update."""
    with torch.autocast(batch["labels"].device.type, dtype=torch.bfloat16, enabled=bf16):
        loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def adamw(model: torch.nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    """The Trainer's default optimiser, fused."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, betas=(0.9, 0.98), fused=fused)


def seconds_a_call(call: Callable[[], object], least: float = 2.0, most_calls: int = 200) -> float:
    """Median wall time of a call, after one that is not counted, over at least `least` seconds or `most_calls`."""
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < least and len(times) < most_calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if time.perf_counter() - began > 20 * least and times:
            break
    return float(np.median(times))


def peak_rss_gb() -> float:
    """Most memory this process ever held, 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _child(function, arguments: dict, limit_gb: float | None, threads: int, pipe) -> None:
    if limit_gb is not None:
        resource.setrlimit(resource.RLIMIT_AS, (int(limit_gb * 1e9),) * 2)
    torch.set_num_threads(threads)
    try:
        result = {**function(**arguments), "peak_rss_gb": peak_rss_gb()}
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError where an allocation fails
        result = {"error": " ".join(str(error).split())[:200] or type(error).__name__}
    pipe.send(result)


def in_child(
    function: Callable[..., dict],
    arguments: dict,
    limit_gb: float | None = None,
    threads: int = 2,
    timeout: float = 600.0,
) -> dict:
    """Runs a function in a process of its own that may address at most `limit_gb`; its peak memory is its own.

    Returns:
        What the function returned with `peak_rss_gb`, or `{"error": why}`.
    """
    # Forked children need not import anything again; the parent has computed nothing.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, arguments, limit_gb, threads, sender))
    process.start()
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(timeout) else {"error": f"took more than {timeout:.0f} s"}
    except EOFError:
        result = {"error": "the process ended without an answer"}
    if process.is_alive() and "error" in result:
        process.terminate()
    process.join()
    return result


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of log time over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def machine() -> dict:
    """What the figures were measured on."""
    model = "unknown"
    if Path("/proc/cpuinfo").is_file():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def write_result(result: dict, out: str | None) -> None:
    """Writes a benchmark's figures as JSON, complete or not at all."""
    if out is None:
        return
    write_text(json.dumps(result, indent=1, default=str) + "\n", out)


def show(value: float) -> str:
    """A figure with three significant digits."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"
