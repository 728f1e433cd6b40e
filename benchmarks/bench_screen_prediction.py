"""A genome-wide screen of one cell: encoded once and decoded in chunks, against encoding it for every perturbation.

    python benchmarks/bench_screen_prediction.py --out screen.json     # 20,000 perturbations x 2,000 genes, two threads
    python benchmarks/bench_screen_prediction.py --smoke               # tiny, seconds

Same model, same run. "One by one" calls the model once a perturbation, as a loop over a pipeline does; "in batches"
encodes the cell again in every row of a batch.
"""

import argparse
import time

import torch
from model_bench import fitted_like_model, machine, peak_rss_gb, random_state, show, write_result
from tqdm.auto import tqdm

from modeling_gppc import GppcConfig, GppcForPerturbationPrediction

OUTPUTS = ("logits", "logvar", "linear_response")


def screen(
    model: GppcForPerturbationPrediction,
    state: dict[str, torch.Tensor],
    ids: torch.Tensor,
    changes: torch.Tensor,
    queries: torch.Tensor,
    chunk: int,
    kept: torch.Tensor,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Seconds of a whole screen, encoding included, and the outputs of the perturbations `kept`.

    Every chunk is looked at (a screen would be written to a file) and forgotten.
    """
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in OUTPUTS}
    start = time.perf_counter()
    encoded = model.encode(**state)
    departures = torch.zeros(len(ids))
    for first in tqdm(range(0, len(ids), chunk), desc="screen", leave=False):
        rows = slice(first, first + chunk)
        output = model.decode(encoded, ids[rows], changes[rows], query_ids=queries)
        departures[rows] = output.departure
        wanted = kept[(kept >= first) & (kept < first + chunk)] - first
        for name in OUTPUTS:
            outputs[name].append(output[name][wanted].clone())
    return time.perf_counter() - start, {name: torch.cat(parts) for name, parts in outputs.items()}


def compare(arguments: argparse.Namespace) -> dict:
    """Runs all ways and returns their figures."""
    config = GppcConfig.from_size(arguments.size, vocab_size=arguments.genes)
    model = fitted_like_model(config).eval()
    state = random_state(arguments.genes, 1)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(arguments.genes, generator=generator)[: arguments.perturbations, None]
    changes = torch.randn(ids.shape, generator=generator)
    queries = torch.randperm(arguments.genes, generator=generator)[: arguments.queries]
    kept = torch.randperm(len(ids), generator=generator)[: arguments.one_by_one].sort().values
    with torch.inference_mode():
        screen(model, state, ids[: arguments.chunk], changes[: arguments.chunk], queries, arguments.chunk, kept[:0])
        before = peak_rss_gb()
        runs = [screen(model, state, ids, changes, queries, arguments.chunk, kept) for _ in range(arguments.repeats)]
        seconds, once = min(run[0] for run in runs), runs[0][1]
        after = peak_rss_gb()

        start = time.perf_counter()
        alone = [
            model(**state, perturbation_ids=ids[i : i + 1], perturbation_values=changes[i : i + 1], query_ids=queries)
            for i in kept.tolist()
        ]
        one_by_one = (time.perf_counter() - start) / len(kept)
        rows = kept[: arguments.batch]
        repeated = {name: t if name == "measured_mask" else t[[0] * len(rows)] for name, t in state.items()}
        batch = {"perturbation_ids": ids[rows], "perturbation_values": changes[rows], "query_ids": queries}
        model(**repeated, **batch)
        start = time.perf_counter()
        model(**repeated, **batch)
        batched = (time.perf_counter() - start) / len(rows)
    difference = max(
        float((torch.cat([output[name] for output in alone]) - once[name]).abs().max()) for name in OUTPUTS
    )
    n = len(ids)
    return {
        "machine": machine(),
        "size": arguments.size,
        "parameters": model.num_parameters(),
        "genes": arguments.genes,
        "perturbations": n,
        "queries": arguments.queries,
        "chunk": arguments.chunk,
        "seconds": seconds,
        "encoded_once_per_second": n / seconds,
        "one_by_one_per_second": 1 / one_by_one,
        "in_batches_per_second": 1 / batched,
        "ratio_one_by_one": one_by_one * n / seconds,
        "ratio_in_batches": batched * n / seconds,
        "largest_difference": difference,
        "peak_rss_gb": after,
        "peak_rss_gb_before_screen": before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", help="named size of the model")
    parser.add_argument("--genes", type=int, default=20_000, help="genes of the model")
    parser.add_argument("--perturbations", type=int, default=20_000, help="single-gene perturbations")
    parser.add_argument("--queries", type=int, default=2_000, help="genes that are predicted")
    parser.add_argument("--chunk", type=int, default=512, help="perturbations decoded at once")
    parser.add_argument("--one-by-one", type=int, default=200, help="perturbations that are also run alone")
    parser.add_argument("--batch", type=int, default=64, help="rows of a batch that encodes every row")
    parser.add_argument("--repeats", type=int, default=2, help="screens, the fastest counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a tiny screen, to see that the benchmark runs")
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke:
        arguments.size, arguments.genes, arguments.perturbations, arguments.queries = "tiny", 300, 300, 50
        arguments.chunk, arguments.one_by_one, arguments.batch, arguments.repeats = 64, 20, 8, 1
    result = compare(arguments)
    print(f"{'way':<32} {'perturbations/s':>16} {'encoded once is':>16}")
    print(f"{'encoded once, chunks':<32} {show(result['encoded_once_per_second']):>16}")
    for name in ("one_by_one", "in_batches"):
        label = f"encoded each time, {name.replace('_', ' ')}"
        print(f"{label:<32} {show(result[f'{name}_per_second']):>16} {show(result[f'ratio_{name}']) + ' x':>16}")
    print(
        f"largest difference from one by one {result['largest_difference']:.1e}; peak memory "
        f"{result['peak_rss_gb']:.2f} GB ({result['peak_rss_gb_before_screen']:.2f} GB after one chunk)"
    )
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
