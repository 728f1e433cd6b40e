"""Training steps: speed, memory and growth with genes; on a GPU also what options cost; the named sizes.

    python benchmarks/bench_model_training.py                                # the CPU, a few minutes, two threads
    python benchmarks/bench_model_training.py --gpu                          # size `base` in bf16, about ten minutes
    python benchmarks/bench_model_training.py --sizes --measure tiny small   # the table of docs/model.md
    python benchmarks/bench_model_training.py --smoke

A step is forward, backward, clipping and AdamW on pairs that lie in memory; each measurement has a process of its own.
Operations are those of matrix products, counted by torch, and compared with the rate of one large matrix product on the
same device.
"""

import math
import time
from collections.abc import Callable

import torch
from bench_tools import (
    exponent,
    fitted_like_model,
    in_child,
    machine,
    parser_of,
    random_pairs,
    show,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from modeling_gppc import GppcConfig, GppcForPerturbationPrediction
from modeling_gppc.configuration_gppc import SIZES

# The shipped architecture, where no named size is asked for.
WIDTH = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "hidden_dropout_prob": 0.1,
}
OPTIONS = ("checkpointing", "compiled")


def timed(call: Callable[[], object], least: float) -> float:
    """Median seconds of a call, after three that are not counted, over at least `least` seconds."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    for _ in range(3):
        call()
    wait()
    times = []
    while len(times) < 3 or sum(times) < least:
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def make_step(
    genes: int,
    batch: int,
    size: str | None = None,
    device: str = "cpu",
    bf16: bool = False,
    checkpointing: bool = False,
    compiled: bool = False,
) -> Callable[[], None]:
    """What the Trainer does in a step, on one batch."""
    config = GppcConfig(vocab_size=genes, **WIDTH) if size is None else GppcConfig.from_size(size, vocab_size=genes)
    model = fitted_like_model(config).train().to(device)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    pairs = {name: tensor.to(device) for name, tensor in random_pairs(genes, batch).items()}
    run = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss = run(**pairs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(threads: int, least: float, **case) -> dict:
    """Speed and memory of a step; one that does not fit on the GPU says so."""
    torch.set_num_threads(threads)
    try:
        # A compiled step hides its operations: an eager one of the same settings has as many.
        with FlopCounterMode(display=False) as counter:
            make_step(**case | {"compiled": False})()
        seconds = timed(make_step(**case), least)
    except torch.OutOfMemoryError:
        return {"error": "does not fit"}
    return {
        "seconds": seconds,
        "cells_per_second": case["batch"] / seconds,
        "flop_per_second": counter.get_total_flops() / seconds,
        "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_initialized() else 0.0,
    }


def matmul_rate(threads: int, least: float, device: str, length: int) -> dict:
    """Operations a second of a product of two square matrices: bf16 on a GPU, float32 on a CPU."""
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(length, length, device=device, dtype=dtype) for _ in range(2))
    return {"rate": 2 * length**3 / timed(lambda: left @ right, least)}


def count(size: str, genes: int, batch: int) -> dict:
    """Parameters and operations a pair, without doing them."""
    # Tensors without storage: `large` is counted on any machine.
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, FlopCounterMode(display=False) as counter:
        model = GppcForPerturbationPrediction(GppcConfig.from_size(size, vocab_size=genes)).train()
        pairs = {name: fake.from_tensor(tensor) for name, tensor in random_pairs(genes, batch).items()}
        model(**pairs).loss.backward()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_of_genes": sum(p.numel() for p in model.parameters() if genes in p.shape),
        "flop_per_pair": counter.get_total_flops() / batch,
    }


def table_of_sizes(sizes: list[str], measured: list[str], genes: int, batch: int, **settings) -> None:
    """Prints a row a named size."""
    print("| size | parameters | of them per gene | GFLOP a pair | pairs/s on this CPU |\n|---|---|---|---|---|")
    for size in sizes:
        row = count(size, genes, batch)
        if size in measured:
            row |= in_child(measure, size=size, genes=genes, batch=batch, **settings)
        print(
            f"| `{size}` | {row['parameters'] / 1e6:,.1f} M | {row['parameters_of_genes'] / genes:,.0f} | "
            f"{show(row['flop_per_pair'] / 1e9)} | {show(row.get('cells_per_second', math.nan))} |",
            flush=True,
        )


def steps(gpu: bool, smoke: bool, **settings) -> None:
    """Prints speed and memory, growth with genes and, on a GPU, what options cost."""
    base = {"device": "cpu", "genes": 2_000, "batch": 16}
    many, genes, options, length = [{"genes": 20_000}], (1_000, 2_000, 5_000, 10_000, 20_000), (), 2_048
    if gpu:
        base = {"device": "cuda", "genes": 20_000, "batch": 256, "size": "base", "bf16": True}
        many, genes = [{"batch": batch} for batch in (64, 128, 512, 1_024)], (2_000, 5_000, 10_000, 20_000)
        options, length = OPTIONS, 16_384
    if smoke:
        base |= {"genes": 64, "batch": 4}
        many, genes, options, length = [], (50, 100), OPTIONS[:1], 64
    rate = in_child(matmul_rate, device=base["device"], length=length, **settings)["rate"]
    print(f"{show(rate / 1e12)} TFLOP/s of matrix products")

    def run(**changes) -> dict:
        case = base | changes
        found = in_child(measure, **case, **settings)
        memory = found.get("peak_gpu_gb") or found["peak_rss_gb"]
        text = found.get("error") or (
            f"{show(found['cells_per_second'])} cells/s, {show(found['flop_per_second'] / 1e12)} TFLOP/s "
            f"({found['flop_per_second'] / rate:.1%} of matrix products), {memory:.2f} GB"
        )
        print(f"{', '.join(f'{key} {value}' for key, value in case.items())}: {text}", flush=True)
        return found

    without = run()["seconds"]
    for changes in many:
        run(**changes)
    growth = [run(genes=number, batch=base["batch"] if gpu else 4 * base["batch"]) for number in genes]
    print(f"time a cell ~ genes^{exponent(genes, [1 / found['cells_per_second'] for found in growth]):.2f}")
    for name in options:
        print(f"{name}: {without / run(**{name: True})['seconds']:.2f} x the steps a second without")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--gpu", action="store_true", help="on the GPU: size `base`, 20,000 genes, bf16")
    parser.add_argument("--sizes", action="store_true", help="parameters, operations and times of the named sizes")
    parser.add_argument("--measure", nargs="*", default=[], choices=list(SIZES), help="sizes that are run on this CPU")
    parser.add_argument("--seconds", type=float, default=4.0, help="least measured time of each")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("there is no GPU")
    settings = {"threads": arguments.threads, "least": arguments.seconds}
    if arguments.smoke:
        settings = {"threads": 1, "least": 0.05}
    print(machine())
    if arguments.sizes or arguments.smoke:
        names, measured, size = list(SIZES), arguments.measure, {"genes": 20_000, "batch": 128}
        if arguments.smoke:
            names, measured, size = ["tiny", "small"], ["tiny"], {"genes": 60, "batch": 4}
        table_of_sizes(names, measured, **size, **settings)
    if not arguments.sizes:
        steps(arguments.gpu, arguments.smoke, **settings)


if __name__ == "__main__":
    main()
