"""A genome-wide screen of one cell: encoded once and decoded in chunks, against encoding it for every perturbation.

    python benchmarks/bench_screen_prediction.py --out screen.json     # 20,000 perturbations x 2,000 genes
    python benchmarks/bench_screen_prediction.py --means               # expected values alone, no variances
    python benchmarks/bench_screen_prediction.py --smoke               # tiny, seconds

Same model, same run, the same asked of all ways. "One by one" encodes and decodes once a perturbation, as a loop over a
pipeline does; "in batches" encodes the cell again in every row of a batch.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from model_bench import fitted_like_model, machine, peak_rss_gb, random_state, show, write_result
from tqdm.auto import tqdm

from gppc.run_options import parse_options
from modeling_gppc import GppcConfig
from modeling_gppc.modeling_gppc import GppcOutput

# The embedded default's sizes.
SHIPPED = parse_options("default", []).model
OUTPUTS = ("logits", "logvar", "linear_response")


class Screen:
    """One cell and its perturbations, predicted in three ways.

    Args:
        arguments (`argparse.Namespace`): Sizes.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.chunk, self.batch = arguments.chunk, arguments.batch
        self.options = {"with_variance": not arguments.means}
        options = SHIPPED if arguments.size == "default" else {}
        build = GppcConfig if options else partial(GppcConfig.from_size, arguments.size)
        self.model = fitted_like_model(build(vocab_size=arguments.genes, **options)).eval()
        self.state = random_state(arguments.genes, 1)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randperm(arguments.genes, generator=generator)[: arguments.perturbations, None]
        self.changes = torch.randn(self.ids.shape, generator=generator)
        self.queries = torch.randperm(arguments.genes, generator=generator)[: arguments.queries]
        self.seconds = dict.fromkeys(("encoded_once", "one_by_one", "in_batches"), 0.0)
        self.counts = dict.fromkeys(self.seconds, 0)

    def timed(self, way: str, count: int, call: Callable[[], object]):
        """Runs a call and adds its time to that of its way."""
        start = time.perf_counter()
        result = call()
        self.seconds[way] += time.perf_counter() - start
        self.counts[way] += count
        return result

    def alone(self, rows: slice, index: list[int]) -> GppcOutput:
        """Perturbations with an encoding for each of them."""
        state = {name: tensor if name == "measured_mask" else tensor[index] for name, tensor in self.state.items()}
        perturbed = {"perturbation_ids": self.ids[rows], "perturbation_values": self.changes[rows]}
        return self.model.decode(self.model.encode(**state), **perturbed, query_ids=self.queries, **self.options)

    def run(self, beside: int) -> float:
        """The whole screen, encoding included; after every chunk some of its perturbations are predicted in the other
        ways, so that all ways meet the same machine. Every chunk is looked at and forgotten.

        Returns:
            Largest difference from the perturbations that were predicted one by one.
        """
        once = self.timed("encoded_once", 0, lambda: self.model.encode(**self.state))
        asked = self.timed("encoded_once", 0, lambda: self.model.query(self.queries))
        largest = 0.0
        for first in tqdm(range(0, len(self.ids), self.chunk), desc="screen", leave=False):
            rows = slice(first, min(first + self.chunk, len(self.ids)))
            output = self.timed(
                "encoded_once",
                rows.stop - rows.start,
                lambda rows=rows: self.model.decode(
                    once, self.ids[rows], self.changes[rows], query_ids=asked, **self.options
                ),
            )
            for row in range(rows.start, min(rows.start + beside, rows.stop)):
                one = slice(row, row + 1)
                alone = self.timed("one_by_one", 1, lambda one=one: self.alone(one, [0]))
                for name in OUTPUTS if self.options["with_variance"] else ("logits", "linear_response"):
                    largest = max(largest, float((alone[name][0] - output[name][row - rows.start]).abs().max()))
            if first % (8 * self.chunk) == 0:
                few = slice(first, min(first + self.batch, len(self.ids)))
                count = few.stop - few.start
                self.timed("in_batches", count, lambda few=few, count=count: self.alone(few, [0] * count))
        return largest


def compare(arguments: argparse.Namespace) -> dict:
    """Runs all ways and returns their figures."""
    screen = Screen(arguments)
    with torch.inference_mode():
        rows = slice(0, min(screen.chunk, len(screen.ids)))
        warm = screen.model.encode(**screen.state)
        asked = screen.model.query(screen.queries)
        screen.model.decode(warm, screen.ids[rows], screen.changes[rows], query_ids=asked, **screen.options)
        screen.alone(slice(0, 1), [0])
        before = peak_rss_gb()
        largest = screen.run(arguments.beside)
    rates = {way: screen.counts[way] / screen.seconds[way] for way in screen.seconds}
    return {
        "machine": machine(),
        "size": arguments.size,
        "variances": not arguments.means,
        "parameters": screen.model.num_parameters(),
        "genes": arguments.genes,
        "perturbations": len(screen.ids),
        "queries": arguments.queries,
        "chunk": arguments.chunk,
        "seconds": screen.seconds["encoded_once"],
        **{f"{way}_per_second": rate for way, rate in rates.items()},
        "ratio_one_by_one": rates["encoded_once"] / rates["one_by_one"],
        "ratio_in_batches": rates["encoded_once"] / rates["in_batches"],
        "largest_difference": largest,
        "peak_rss_gb": peak_rss_gb(),
        "peak_rss_gb_before_screen": before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--smoke", action="store_true", help="a tiny screen, to see that the benchmark runs")
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.threads = 1
        arguments.size, arguments.genes, arguments.perturbations, arguments.queries = "tiny", 300, 300, 50
        arguments.chunk, arguments.batch = 64, 8
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
