"""Training steps of the shipped architecture against the form it grew out of, at equal width and depth.

    python benchmarks/bench_model_training.py --out training.json    # about ten minutes, two threads
    python benchmarks/bench_model_training.py --smoke                # tiny, seconds

Training cells/s at 2,000 genes; memory of a step of 16 pairs at 20,000 genes; how the time a cell grows with genes; what
options of training cost or save. Each measurement runs in a process of its own that may not address more than it is given, so that
nothing takes the machine's memory. A step is forward, backward, clipping and fused AdamW on pairs that lie in memory.
"""

import argparse
import time
from collections.abc import Callable

from model_bench import (
    EXPRESSED_SHARE,
    adamw,
    exponent,
    fitted_like_model,
    in_child,
    machine,
    random_pairs,
    seconds_a_call,
    show,
    training_step,
    write_result,
)

from modeling_gppc import GppcConfig

WIDTH = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "encoder_layers": 1,
    "decoder_layers": 2,
}
# What a process may address where nothing else is said.
MEMORY_GB, ORIGIN_GB = 12.0, 18.0
# Options of training; twice the tokens is what padding to the longest cell costs where it is twice the mean.
OPTIONS = ({"share": 2 * EXPRESSED_SHARE}, {"fused": False}, {"bf16": True}, {"checkpointing": True})
SCALING = (1_000, 2_000, 5_000, 10_000, 20_000)
ORIGIN_SCALING = (250, 500, 1_000, 2_000)


def measure(
    architecture: str,
    genes: int,
    batch: int,
    dropout: float,
    least: float,
    width: dict,
    share: float = EXPRESSED_SHARE,
    fused: bool = True,
    bf16: bool = False,
    checkpointing: bool = False,
) -> dict:
    """Seconds of a training step."""
    config = GppcConfig(vocab_size=genes, architecture=architecture, hidden_dropout_prob=dropout, **width)
    model = fitted_like_model(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = adamw(model, fused)
    pairs = random_pairs(genes, batch, share=share)
    seconds = seconds_a_call(lambda: training_step(model, optimizer, pairs, bf16), least)
    start = time.process_time()
    for _ in range(3):
        training_step(model, optimizer, pairs, bf16)
    return {
        "seconds": seconds,
        "cpu_seconds": (time.process_time() - start) / 3,
        "cells_per_second": batch / seconds,
        "parameters": model.num_parameters(),
    }


def attention_bytes(genes: int, batch: int, width: dict) -> float:
    """Bytes of the attention weights that the origin's form keeps for its backward pass, without fused kernels.

    One map of genes x genes a head for every self-attention of the encoder and for both attentions of each decoder
    layer: after the softmax and after dropout.
    """
    maps = width["encoder_layers"] + 2 * width["decoder_layers"]
    return 2.0 * maps * batch * width["num_attention_heads"] * genes**2 * 4


def slope(found: list[dict]) -> float:
    """Exponent of the time a cell over genes."""
    return exponent([step["genes"] for step in found], [1 / step["cells_per_second"] for step in found])


def comparison(run: Callable[..., dict], arguments: argparse.Namespace, *_) -> tuple[dict, list[dict]]:
    """Cells/s beside the origin's, with as many pairs a step as the origin's form fits into the memory it may have."""
    for batch in (arguments.batch, max(1, arguments.batch // 4)):
        ours = run("latents", arguments.genes, batch)
        origin = run("origin", arguments.genes, batch, limit=ORIGIN_GB)
        if "error" not in origin:
            break
    # Without dropout on attention its fused kernels run: the most that can be said for it.
    fused = run("origin", arguments.genes, batch, dropout=0.0, limit=ORIGIN_GB)
    ratios = [ours["cells_per_second"] / other["cells_per_second"] for other in (origin, fused)]
    print(
        f"{arguments.genes:,} genes: {show(ratios[0])} x the origin's cells/s ({show(ratios[1])} x without its dropout)"
    )
    return {"ratio": ratios[0], "ratio_origin_fused": ratios[1]}, [ours, origin, fused]


def memory(run: Callable[..., dict], arguments: argparse.Namespace, _, __, width: dict) -> tuple[dict, list[dict]]:
    """Memory of a step at many genes, and what the origin's form would take."""
    ours = run("latents", arguments.many_genes, arguments.batch, limit=arguments.limit_gb)
    origin = run("origin", arguments.many_genes, arguments.batch, limit=arguments.limit_gb)
    needed = attention_bytes(arguments.many_genes, arguments.batch, width) / 1e9
    held = ours.get("error") or f"{ours['peak_rss_gb']:.2f} GB"
    print(
        f"{arguments.many_genes:,} genes, {arguments.batch} pairs: {held} under a limit of {arguments.limit_gb:g} GB; the "
        f"origin's attention weights alone would take {show(needed)} GB"
    )
    return {"origin_attention_gb": needed}, [ours, origin]


def growth(
    run: Callable[..., dict], arguments: argparse.Namespace, scaling, origin_scaling, _
) -> tuple[dict, list[dict]]:
    """How the time a cell grows with genes."""
    ours = [run("latents", genes, 4 * arguments.batch) for genes in scaling]
    origin = [run("origin", genes, max(1, arguments.batch // 4)) for genes in origin_scaling]
    print(f"time a cell ~ genes^{slope(ours):.2f}; the origin's ~ genes^{slope(origin):.2f}")
    return {"exponent": slope(ours), "exponent_origin": slope(origin)}, [*ours, *origin]


def options(run: Callable[..., dict], arguments: argparse.Namespace, *_) -> tuple[dict, list[dict]]:
    """What options of training cost or save, each beside a step without it."""
    ratios, runs = {}, []
    for option in OPTIONS:
        without, found = (
            run("latents", arguments.genes, 8 * arguments.batch),
            run("latents", arguments.genes, 8 * arguments.batch, **option),
        )
        name = ", ".join(f"{key} {value}" for key, value in option.items())
        ratios[name] = without["cpu_seconds"] / found["cpu_seconds"]
        print(
            f"{name}: {found['cells_per_second'] / without['cells_per_second']:.2f} x the cells/s without ({ratios[name]:.2f} x by CPU time)"
        )
        runs += [without, found]
    return {"options": ratios}, runs


PARTS = {"comparison": comparison, "memory": memory, "growth": growth, "options": options}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, default=2_000, help="genes of the comparison")
    parser.add_argument("--many-genes", type=int, default=20_000, help="genes of the memory measurement")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit-gb", type=float, default=8.0, help="memory that a step at `--many-genes` may address")
    parser.add_argument("--seconds", type=float, default=4.0, help="least measured time of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="few genes, to see that the benchmark runs")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="what is measured")
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    width, scaling, origin_scaling = WIDTH, SCALING, ORIGIN_SCALING
    if arguments.smoke:
        arguments.genes, arguments.many_genes, arguments.batch, arguments.seconds = 64, 200, 4, 0.1
        arguments.threads = 1
        width = {**WIDTH, "hidden_size": 16, "intermediate_size": 32}
        scaling, origin_scaling = (50, 100), (50, 100)

    def run(
        architecture: str, genes: int, batch: int, dropout: float = 0.1, limit: float = MEMORY_GB, **option
    ) -> dict:
        settings = {"architecture": architecture, "genes": genes, "batch": batch, "dropout": dropout, **option}
        arguments_of = {**settings, "width": width, "least": arguments.seconds}
        found = in_child(measure, arguments_of, limit, arguments.threads)
        speed = found.get("error") or f"{show(found['cells_per_second'])} cells/s, {found['peak_rss_gb']:.2f} GB"
        name = ", ".join(f"{key} {value}" for key, value in {"dropout": dropout, **option}.items())
        print(f"  {architecture:<8} {genes:>6} genes, {batch:>3} pairs a step, {name}: {speed}", flush=True)
        return {**settings, **found}

    print(f"training steps, {EXPRESSED_SHARE:.0%} of the genes expressed, width {width['hidden_size']}")
    result: dict = {"machine": {**machine(), "threads": arguments.threads}, "runs": []}
    for part in arguments.parts:
        figures, runs = PARTS[part](run, arguments, scaling, origin_scaling, width)
        result.update(figures)
        result["runs"] += runs
        # After each part: the next one may take long.
        write_result(result, arguments.out)


if __name__ == "__main__":
    main()
