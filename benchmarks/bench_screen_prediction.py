"""A genome-wide screen of one cell: encoded once and decoded in chunks, against encoding it for every perturbation.

    python benchmarks/bench_screen_prediction.py --out screen.json     # 20,000 perturbations x 2,000 genes
    python benchmarks/bench_screen_prediction.py --means               # expected values alone, no variances
    python benchmarks/bench_screen_prediction.py --smoke               # tiny, seconds

Same model, same run, the same asked of all ways. "One by one" encodes and decodes once a perturbation, as a loop over a
pipeline does; "in batches" encodes the cell again in every row of a batch.
"""

import argparse
import time
from functools import partial

import torch
from bench_tools import fitted_like_model, machine, parser_of, peak_rss_gb, random_state, show, write_result
from tqdm.auto import tqdm

from gppc.run_options import parse_options
from modeling_gppc import GppcConfig

OUTPUTS = ("logits", "logvar", "linear_response")


@torch.inference_mode()
def compare(arguments: argparse.Namespace) -> dict:
    """Runs the whole screen, and after every chunk some of its perturbations in the other ways, so that all ways meet
    the same machine; returns their figures."""
    # The embedded default's sizes, or a named one's.
    shipped = parse_options("default", []).model if arguments.size == "default" else {}
    build = GppcConfig if shipped else partial(GppcConfig.from_size, arguments.size)
    model = fitted_like_model(build(vocab_size=arguments.genes, **shipped)).eval()
    state = random_state(arguments.genes, 1)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(arguments.genes, generator=generator)[: arguments.perturbations, None]
    changes = torch.randn(ids.shape, generator=generator)
    queries = torch.randperm(arguments.genes, generator=generator)[: arguments.queries]
    outputs = [name for name in OUTPUTS if name != "logvar" or not arguments.means]
    seconds = dict.fromkeys(("encoded_once", "one_by_one", "in_batches"), 0.0)
    counts = dict.fromkeys(seconds, 0)

    def timed(way: str, call, count: int = 0):
        start = time.perf_counter()
        result = call()
        seconds[way] += time.perf_counter() - start
        counts[way] += count
        return result

    def decode(encoded, rows: slice):
        return model.decode(encoded, ids[rows], changes[rows], query_ids=queries, with_variance=not arguments.means)

    def alone(rows: slice):
        index = [0] * len(ids[rows])
        repeated = {name: tensor if name == "measured_mask" else tensor[index] for name, tensor in state.items()}
        return decode(model.encode(**repeated), rows)

    decode(model.encode(**state), slice(0, arguments.chunk))
    alone(slice(0, 1))
    before, largest = peak_rss_gb(), 0.0
    encoded = timed("encoded_once", lambda: model.encode(**state))
    for first in tqdm(range(0, len(ids), arguments.chunk), desc="screen", leave=False):
        rows = slice(first, min(first + arguments.chunk, len(ids)))
        output = timed("encoded_once", lambda rows=rows: decode(encoded, rows), rows.stop - first)
        for row in range(first, min(first + arguments.beside, rows.stop)):
            one = timed("one_by_one", lambda row=row: alone(slice(row, row + 1)), 1)
            gaps = [(one[name][0] - output[name][row - first]).abs().max() for name in outputs]
            largest = max(largest, float(max(gaps)))
        if first % (8 * arguments.chunk) == 0:
            few = slice(first, min(first + arguments.batch, len(ids)))
            timed("in_batches", lambda few=few: alone(few), few.stop - first)
    rates = {way: counts[way] / seconds[way] for way in seconds}
    asked_for = {name: getattr(arguments, name) for name in ("size", "means", "genes", "queries", "chunk")}
    return {
        "machine": machine(),
        **asked_for,
        "perturbations": len(ids),
        **{f"{way}_per_second": rate for way, rate in rates.items()},
        "ratio_one_by_one": rates["encoded_once"] / rates["one_by_one"],
        "ratio_in_batches": rates["encoded_once"] / rates["in_batches"],
        "largest_difference": largest,
        "peak_rss_gb": peak_rss_gb(),
        "peak_rss_gb_before_screen": before,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--size", default="small", help="named size of the model, or `default`: the embedded default's"
    )
    parser.add_argument("--genes", type=int, default=20_000, help="genes of the model")
    parser.add_argument("--perturbations", type=int, default=20_000, help="single-gene perturbations")
    parser.add_argument("--queries", type=int, default=2_000, help="genes that are predicted")
    parser.add_argument("--chunk", type=int, default=1024, help="perturbations decoded at once")
    parser.add_argument("--beside", type=int, default=4, help="perturbations of a chunk that are also run alone")
    parser.add_argument("--batch", type=int, default=64, help="rows of a batch that encodes every row")
    parser.add_argument("--means", action="store_true", help="expected values alone, in all ways")
    parser.add_argument("--threads", type=int, default=2, help="1 where other work shares the machine")
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.threads, arguments.chunk, arguments.batch = 1, 64, 8
        arguments.size, arguments.genes, arguments.perturbations, arguments.queries = "tiny", 300, 300, 50
    torch.set_num_threads(arguments.threads)
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
