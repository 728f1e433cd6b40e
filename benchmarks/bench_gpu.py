"""Training on a GPU: share of its matrix-product rate, cells/s, memory, profile; compiled against eager; scaling.

    python benchmarks/bench_gpu.py --out gpu.json               # base size, bf16, 20,000 genes, about ten minutes
    python benchmarks/bench_gpu.py --profile profile.txt        # and where the time goes
    python benchmarks/bench_gpu.py --smoke                      # tiny, on the CPU, to see that the benchmark runs

The rate of matrix products is measured in the same run (bf16, the largest of several sizes), so the share does not
depend on what is printed on the box. Operations of a step are counted by torch: matrix products, forward and backward.
"""

import argparse
import time
from collections.abc import Callable

import torch
from model_bench import adamw, fitted_like_model, machine, random_pairs, show, training_step, write_result
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from modeling_gppc import GppcConfig

BATCHES = (64, 128, 256, 512, 1024)
GENES = (2_000, 5_000, 10_000, 20_000)


class Machine:
    """The device that is measured; on a CPU nothing has to be waited for."""

    def __init__(self, cpu: bool):
        self.device = torch.device("cpu" if cpu or not torch.cuda.is_available() else "cuda")
        self.is_gpu = self.device.type == "cuda"

    @property
    def name(self) -> str:
        """What the device is called."""
        return torch.cuda.get_device_name() if self.is_gpu else "CPU"

    def wait(self) -> None:
        """Until everything asked for is done."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], times: int, warm: int = 3) -> float:
        """Mean seconds of a call after some that are not counted."""
        for _ in range(warm):
            call()
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        return (time.perf_counter() - start) / times

    def peak_gb(self) -> float:
        """Most memory that tensors held since the last call, 10^9 bytes; 0 on a CPU."""
        if not self.is_gpu:
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak


def matmul_rate(on: Machine, sizes: tuple[int, ...], times: int) -> float:
    """Best bf16 matrix-product rate over some square sizes, operations a second."""
    best = 0.0
    for size in sizes:
        left, right = (torch.randn(size, size, device=on.device, dtype=torch.bfloat16) for _ in range(2))
        best = max(best, 2 * size**3 / on.seconds(lambda left=left, right=right: left @ right, times))
    return best


class Step:
    """A training step in bf16 autocast, as the Trainer does it.

    Args:
        on ([`Machine`]): Where.
        size (`str`): Named size of the model.
        genes, batch (`int`): Genes of the model, pairs of a step.
        compiled (`bool`): Whether the model is compiled.
        checkpointing (`bool`): Whether activations are computed anew in the backward pass.
    """

    def __init__(
        self, on: Machine, size: str, genes: int, batch: int, compiled: bool = False, checkpointing: bool = False
    ):
        self.on, self.batch = on, batch
        self.model = fitted_like_model(GppcConfig.from_size(size, vocab_size=genes)).train().to(on.device)
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.run = torch.compile(self.model) if compiled else self.model
        self.optimizer = adamw(self.model)
        self.pairs = {name: tensor.to(on.device) for name, tensor in random_pairs(genes, batch).items()}

    def __call__(self) -> None:
        training_step(self.run, self.optimizer, self.pairs, bf16=True)

    def flop(self) -> float:
        """Operations of a step, counted where it is not compiled."""
        counter = FlopCounterMode(display=False)
        with counter:
            self()
        return float(counter.get_total_flops())


def measured(on: Machine, rate: float, times: int, **settings) -> dict:
    """Figures of a step; a step that does not fit says so."""
    try:
        step = Step(on, **settings)
        # A compiled step hides its operations: an eager one of the same settings has as many.
        flop = (Step(on, **{**settings, "compiled": False}) if settings.get("compiled") else step).flop()
        on.peak_gb()
        seconds = on.seconds(step, times)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {**settings, "error": "does not fit"}
    return {
        **settings,
        "milliseconds": 1e3 * seconds,
        "cells_per_second": step.batch / seconds,
        "tflop_per_second": flop / seconds / 1e12,
        "share_of_matmul": flop / seconds / rate,
        "peak_gb": on.peak_gb(),
    }


def profiled(on: Machine, times: int, **settings) -> str:
    """Where the time of a step goes, the largest kernels first."""
    step = Step(on, **settings)
    on.seconds(step, 1)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on.is_gpu else [])]
    with profile(activities=kinds) as profiler:
        on.seconds(step, times, warm=0)
    order = "self_cuda_time_total" if on.is_gpu else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", help="named size of the model")
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--times", type=int, default=20, help="steps that are timed")
    parser.add_argument("--profile", help="text file for the profile of a step")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    on = Machine(cpu=arguments.smoke)
    squares, batches, genes = (4096, 8192, 16384), BATCHES, GENES
    if arguments.smoke:
        arguments.size, arguments.genes, arguments.batch, arguments.times = "tiny", 40, 4, 2
        squares, batches, genes = (64,), (4, 8), (20, 40)
    elif not on.is_gpu:
        parser.error("there is no GPU; `--smoke` runs on the CPU")
    rate = matmul_rate(on, squares, arguments.times)
    print(f"{on.name}: {show(rate / 1e12)} TFLOP/s of bf16 matrix products")
    settings = {"size": arguments.size, "genes": arguments.genes, "batch": arguments.batch}
    # The smoke mode needs no compiler.
    forms = [{}, {"checkpointing": True}, *([] if arguments.smoke else [{"compiled": True}])]
    cases = [{**settings, **form} for form in forms]
    cases += [{**settings, "batch": batch} for batch in batches if batch != arguments.batch]
    cases += [{**settings, "genes": number} for number in genes if number != arguments.genes]
    runs = []
    for case in cases:
        found = measured(on, rate, arguments.times, **case)
        runs.append(found)
        name = ", ".join(f"{key} {value}" for key, value in case.items())
        if "error" in found:
            print(f"{name}: {found['error']}", flush=True)
            continue
        print(
            f"{name}: {found['milliseconds']:.1f} ms, {show(found['cells_per_second'])} cells/s, "
            f"{show(found['tflop_per_second'])} TFLOP/s ({found['share_of_matmul']:.1%} of matrix products), "
            f"{found['peak_gb']:.2f} GB",
            flush=True,
        )
    if arguments.profile is not None:
        with open(arguments.profile, "w") as file:
            file.write(profiled(on, arguments.times, **settings))
    write_result({"machine": {**machine(), "device": on.name}, "matmul_per_second": rate, "runs": runs}, arguments.out)


if __name__ == "__main__":
    main()
