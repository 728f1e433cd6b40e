"""Training steps: speed, memory and growth with genes, or a table of the named sizes.

    python benchmarks/bench_model_training.py            # the CPU, a few minutes, two threads
    python benchmarks/bench_model_training.py --gpu      # size `base` in bf16
    python benchmarks/bench_model_training.py --sizes    # the table of docs/model.md
    python benchmarks/bench_model_training.py --smoke

A step is forward, backward, clipping and AdamW on pairs that lie in memory; each measurement has a process of its own.
Operations are those of matrix products, counted by torch.
"""

import math
import time

import torch
from bench_tools import exponent, fitted_like_model, in_child, machine, parser_of, random_pairs, show
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
MEASURED = ("tiny", "small")  # sizes that two CPU cores train


def measure(genes: int, batch: int, size: str | None, device: str, threads: int, seconds: float) -> dict:
    """Speed and memory of what the Trainer does in a step, over `seconds` seconds; bf16 on a GPU, float32 on a CPU."""
    torch.set_num_threads(threads)
    config = GppcConfig(vocab_size=genes, **WIDTH) if size is None else GppcConfig.from_size(size, vocab_size=genes)
    model = fitted_like_model(config).train().to(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    pairs = {name: tensor.to(device) for name, tensor in random_pairs(genes, batch).items()}

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = model(**pairs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        step()
    times = [step() for _ in range(3)]
    while sum(times) < seconds:
        times.append(step())
    found = {"cells_per_second": batch / sorted(times)[len(times) // 2]}
    return found | ({"peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9} if device == "cuda" else {})


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


def table_of_sizes(sizes: list[str], genes: int, batch: int, **settings) -> None:
    """Prints a row a named size."""
    print("| size | parameters | of them per gene | GFLOP a pair | pairs/s on this CPU |\n|---|---|---|---|---|")
    for size in sizes:
        row = count(size, genes, batch)
        if size in MEASURED:
            row |= in_child(measure, size=size, genes=genes, batch=batch, device="cpu", **settings)
        print(
            f"| `{size}` | {row['parameters'] / 1e6:,.1f} M | {row['parameters_of_genes'] / genes:,.0f} | "
            f"{show(row['flop_per_pair'] / 1e9)} | {show(row.get('cells_per_second', math.nan))} |",
            flush=True,
        )


def growth(genes: list[int], **case) -> None:
    """Prints speed and memory at several numbers of genes, and how time grows with them."""
    times = []
    for number in genes:
        found = in_child(measure, genes=number, **case)
        times.append(1 / found["cells_per_second"])
        memory = found.get("peak_gpu_gb") or found["peak_rss_gb"]
        print(f"{number} genes, {case['batch']} pairs: {show(1 / times[-1])} cells/s, {memory:.2f} GB", flush=True)
    print(f"time a cell ~ genes^{exponent(genes, times):.2f}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--gpu", action="store_true", help="on the GPU: size `base`, bf16, 256 pairs a step")
    parser.add_argument("--sizes", action="store_true", help="parameters, operations and times of the named sizes")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("there is no GPU")
    settings = {"threads": arguments.threads, "seconds": 4.0}
    print(machine())
    if arguments.smoke:
        settings = {"threads": 1, "seconds": 0.05}
        table_of_sizes(["tiny"], genes=60, batch=4, **settings)
        growth([50, 100], batch=4, size=None, device="cpu", **settings)
    elif arguments.sizes:
        table_of_sizes(list(SIZES), genes=20_000, batch=128, **settings)
    elif arguments.gpu:
        growth([2_000, 5_000, 10_000, 20_000], batch=256, size="base", device="cuda", **settings)
    else:
        growth([2_000, 20_000], batch=16, size=None, device="cpu", **settings)
        growth([1_000, 2_000, 5_000, 10_000, 20_000], batch=64, size=None, device="cpu", **settings)


if __name__ == "__main__":
    main()
