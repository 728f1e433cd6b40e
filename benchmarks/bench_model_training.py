"""Training steps of the shipped architecture: speed, memory, growth with genes, what options cost.

    python benchmarks/bench_model_training.py --out training.json    # a few minutes, two threads
    python benchmarks/bench_model_training.py --smoke

Cells/s at 2,000 genes; memory of a step of 16 pairs at 20,000 genes; how the time a cell grows with genes; CPU time of a
step with an option of training beside one without. Each measurement has a process of its own. A step is forward,
backward, clipping and fused AdamW on pairs that lie in memory.
"""

import time

import torch
from bench_tools import (
    EXPRESSED_SHARE,
    adamw,
    exponent,
    fitted_like_model,
    in_child,
    machine,
    parser_of,
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
# Options of training; twice the tokens is what padding to the longest cell costs where it is twice the mean.
OPTIONS = ({"share": 2 * EXPRESSED_SHARE}, {"fused": False}, {"bf16": True}, {"checkpointing": True})
SCALING = (1_000, 2_000, 5_000, 10_000, 20_000)


def measure(
    genes: int,
    batch: int,
    least: float,
    threads: int,
    share: float = EXPRESSED_SHARE,
    fused: bool = True,
    bf16: bool = False,
    checkpointing: bool = False,
) -> dict:
    """Wall and CPU seconds of a training step."""
    torch.set_num_threads(threads)
    model = fitted_like_model(GppcConfig(vocab_size=genes, hidden_dropout_prob=0.1, **WIDTH)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer, pairs = adamw(model, fused), random_pairs(genes, batch, share=share)
    seconds = seconds_a_call(lambda: training_step(model, optimizer, pairs, bf16), least)
    start = time.process_time()
    for _ in range(3):
        training_step(model, optimizer, pairs, bf16)
    cpu = (time.process_time() - start) / 3
    return {"seconds": seconds, "cpu_seconds": cpu, "cells_per_second": batch / seconds}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--genes", type=int, default=2_000, help="genes of speed and options")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=4.0, help="least measured time of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    scaling = SCALING
    if arguments.smoke:
        arguments.genes, arguments.batch, arguments.seconds, arguments.threads, scaling = 64, 4, 0.1, 1, (50, 100)
    runs = []

    def run(genes: int, batch: int, **option) -> dict:
        settings = {"genes": genes, "batch": batch, **option}
        found = in_child(measure, least=arguments.seconds, threads=arguments.threads, **settings)
        name = ", ".join(f"{key} {value}" for key, value in settings.items())
        print(f"{name}: {show(found['cells_per_second'])} cells/s, {found['peak_rss_gb']:.2f} GB", flush=True)
        runs.append({**settings, **found})
        return found

    run(arguments.genes, arguments.batch)
    run(scaling[-1], arguments.batch)
    seconds = [1 / run(genes, 4 * arguments.batch)["cells_per_second"] for genes in scaling]
    result = {"machine": machine(), "runs": runs, "exponent": exponent(scaling, seconds), "options": {}}
    print(f"time a cell ~ genes^{result['exponent']:.2f}")
    for option in OPTIONS:
        without, found = (run(arguments.genes, 8 * arguments.batch, **settings) for settings in ({}, option))
        (name,) = option
        result["options"][name] = without["cpu_seconds"] / found["cpu_seconds"]
        print(f"{name}: {result['options'][name]:.2f} x the steps a CPU second without")
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
