"""Parameters, operations and time of the named sizes: the table of docs/model.md.

    python benchmarks/bench_model_sizes.py --measure tiny small --out sizes.json     # a minute or two, two threads
    python benchmarks/bench_model_sizes.py --smoke

Operations are those of matrix products in a training step (forward and backward), counted by torch on tensors without
storage. Times of sizes that are not measured are computed: operations over what a GPU is said to do, times the share of
it that training reaches, both of which are assumptions and printed.
"""

import torch
from bench_tools import (
    adamw,
    fitted_like_model,
    machine,
    parser_of,
    random_pairs,
    seconds_a_call,
    show,
    training_step,
    write_result,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from modeling_gppc import GppcConfig, GppcForPerturbationPrediction
from modeling_gppc.configuration_gppc import SIZES

CELLS = (1_000_000, 10_000_000, 60_000_000)


def count(size: str, genes: int, batch: int) -> dict:
    """Parameters and operations a pair, without doing them."""
    config = GppcConfig.from_size(size, vocab_size=genes)
    counter = FlopCounterMode(display=False)
    # Tensors without storage: `large` is counted on any machine.
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model = GppcForPerturbationPrediction(config).train()
        pairs = {name: fake.from_tensor(tensor) for name, tensor in random_pairs(genes, batch, share=0.0).items()}
        with counter:
            model(**pairs).loss.backward()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_of_genes": sum(p.numel() for p in model.parameters() if genes in p.shape),
        "flop_per_pair": counter.get_total_flops() / batch,
    }


def measure(size: str, genes: int, batch: int, least: float) -> float:
    """Training pairs a second on this machine's CPU."""
    model = fitted_like_model(GppcConfig.from_size(size, vocab_size=genes)).train()
    optimizer, pairs = adamw(model), random_pairs(genes, batch)
    return batch / seconds_a_call(lambda: training_step(model, optimizer, pairs), least)


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{show(seconds / length)} {unit}"
    return f"{show(seconds)} s"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--measure", nargs="*", default=[], help="sizes that are run on this CPU")
    parser.add_argument(
        "--tflops", type=float, default=990.0, help="bf16 matrix products of the GPU, dense, as sold (H100: 990)"
    )
    parser.add_argument("--share", type=float, default=0.25, help="share of it that training is assumed to reach")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of the size `large`")
    parser.add_argument("--seconds", type=float, default=10.0, help="least measured time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.threads = 1
        arguments.sizes, arguments.measure, arguments.genes, arguments.batch = ["tiny", "small"], ["tiny"], 60, 4
        arguments.seconds = 0.1
    torch.set_num_threads(arguments.threads)
    rows = {}
    print("| size | parameters | of them per gene | GFLOP a pair | pairs/s | 1M pairs | 10M | 60M | how |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        row = count(size, arguments.genes, arguments.batch)
        gpus = arguments.gpus if size == "large" else 1
        if size in arguments.measure:
            row["pairs_per_second"] = measure(size, arguments.genes, arguments.batch, arguments.seconds)
            row["how"] = f"measured, {arguments.threads} CPU threads"
        else:
            row["pairs_per_second"] = gpus * arguments.tflops * 1e12 * arguments.share / row["flop_per_pair"]
            row["how"] = f"computed, {gpus} GPU at {arguments.share:.0%} of {arguments.tflops:g} TFLOP/s"
        rows[size] = row
        times = " | ".join(duration(cells / row["pairs_per_second"]) for cells in CELLS)
        print(
            f"| `{size}` | {row['parameters'] / 1e6:,.1f} M | {row['parameters_of_genes'] / arguments.genes:,.0f} | "
            f"{show(row['flop_per_pair'] / 1e9)} | {show(row['pairs_per_second'])} | {times} | {row['how']} |",
            flush=True,
        )
    result = {"machine": machine(), "genes": arguments.genes, "batch": arguments.batch, "sizes": rows}
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
