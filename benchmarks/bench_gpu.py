"""Training on a GPU: share of its matrix-product rate, cells/s, memory, profile; compiled against eager; scaling.

    python benchmarks/bench_gpu.py --out gpu.json               # base size, bf16, 20,000 genes, about ten minutes
    python benchmarks/bench_gpu.py --profile profile.txt        # and where the time goes
    python benchmarks/bench_gpu.py --smoke                      # tiny, on the CPU

The rate of matrix products is measured in the same run (bf16, the largest of several sizes), so the share does not
depend on what is printed on the box. Operations of a step are counted by torch: matrix products, forward and backward.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_tools import adamw, fitted_like_model, machine, parser_of, random_pairs, show, training_step, write_result
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from modeling_gppc import GppcConfig

BATCHES = (64, 128, 256, 512, 1024)
GENES = (2_000, 5_000, 10_000, 20_000)


def seconds_of(call: Callable[[], object], times: int, warm: int = 3) -> float:
    """Mean seconds of a call after some that are not counted."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(warm):
        call()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return (time.perf_counter() - start) / times


def matmul_rate(device: str, sizes: tuple[int, ...], times: int) -> float:
    """Best bf16 matrix-product rate over some square sizes, operations a second."""
    best = 0.0
    for size in sizes:
        left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        best = max(best, 2 * size**3 / seconds_of(lambda left=left, right=right: left @ right, times))
    return best


def make_step(
    device: str, size: str, genes: int, batch: int, compiled: bool = False, checkpointing: bool = False
) -> Callable[[], None]:
    """A training step in bf16 autocast, as the Trainer does it."""
    model = fitted_like_model(GppcConfig.from_size(size, vocab_size=genes)).train().to(device)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = adamw(model)
    pairs = {name: tensor.to(device) for name, tensor in random_pairs(genes, batch).items()}
    run = torch.compile(model) if compiled else model
    return lambda: training_step(run, optimizer, pairs, bf16=True)


def measured(device: str, rate: float, times: int, **settings) -> dict:
    """Figures of a step; a step that does not fit says so."""
    try:
        # A compiled step hides its operations: an eager one of the same settings has as many.
        with FlopCounterMode(display=False) as counter:
            make_step(device, **{**settings, "compiled": False})()
        flop = counter.get_total_flops()
        step = make_step(device, **settings)
        seconds_of(step, 1)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(step, times)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {**settings, "error": "does not fit"}
    return {
        **settings,
        "milliseconds": 1e3 * seconds,
        "cells_per_second": settings["batch"] / seconds,
        "tflop_per_second": flop / seconds / 1e12,
        "share_of_matmul": flop / seconds / rate,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0,
    }


def profiled(device: str, times: int, **settings) -> str:
    """Where the time of a step goes, the largest kernels first."""
    step = make_step(device, **settings)
    seconds_of(step, 1)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        seconds_of(step, times, warm=0)
    order = f"self_{device}_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--size", default="base", help="named size of the model")
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--times", type=int, default=20, help="steps that are timed")
    parser.add_argument("--profile", help="text file for the profile of a step")
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    device, squares, batches, genes = "cuda", (4096, 8192, 16384), BATCHES, GENES
    if arguments.smoke:
        arguments.size, arguments.genes, arguments.batch, arguments.times = "tiny", 40, 4, 2
        device, squares, batches, genes = "cpu", (64,), (4, 8), (20, 40)
    elif not torch.cuda.is_available():
        parser.error("there is no GPU; `--smoke` runs on the CPU")
    rate = matmul_rate(device, squares, arguments.times)
    name = "CPU" if arguments.smoke else torch.cuda.get_device_name()
    print(f"{name}: {show(rate / 1e12)} TFLOP/s of bf16 matrix products")
    settings = {"size": arguments.size, "genes": arguments.genes, "batch": arguments.batch}
    # The smoke mode needs no compiler.
    forms = [{}, {"checkpointing": True}, *([] if arguments.smoke else [{"compiled": True}])]
    forms += [{"batch": batch} for batch in batches if batch != arguments.batch]
    forms += [{"genes": number} for number in genes if number != arguments.genes]
    runs = []
    for form in forms:
        case = {**settings, **form}
        found = measured(device, rate, arguments.times, **case)
        runs.append(found)
        text = found.get("error") or (
            f"{found['milliseconds']:.1f} ms, {show(found['cells_per_second'])} cells/s, "
            f"{show(found['tflop_per_second'])} TFLOP/s ({found['share_of_matmul']:.1%} of matrix products), "
            f"{found['peak_gb']:.2f} GB"
        )
        print(f"{', '.join(f'{key} {value}' for key, value in case.items())}: {text}", flush=True)
    if arguments.profile is not None:
        Path(arguments.profile).write_text(profiled(device, arguments.times, **settings))
    write_result({"machine": {**machine(), "device": name}, "matmul_per_second": rate, "runs": runs}, arguments.out)


if __name__ == "__main__":
    main()
