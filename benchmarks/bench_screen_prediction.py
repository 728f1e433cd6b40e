"""A genome-wide screen of one cell: encoded once and decoded in chunks, against encoding it for every perturbation.

    python benchmarks/bench_screen_prediction.py            # 20,000 perturbations x 2,000 genes
    python benchmarks/bench_screen_prediction.py --smoke    # tiny, seconds

Same model, same run, the same asked of both ways. "One by one" encodes and decodes once a perturbation, as a loop over
a pipeline does.
"""

import time

import torch
from bench_tools import fitted_like_model, machine, parser_of, peak_rss_gb, random_state, show

from gppc.run_options import parse_options
from modeling_gppc import GppcConfig

BESIDE = 4  # perturbations of a chunk that are also run one by one


@torch.inference_mode()
def compare(size: str, chunk: int, genes: int = 20_000, perturbations: int = 20_000, queries: int = 2_000) -> None:
    """Runs the whole screen, and after every chunk some of its perturbations one by one, so that both ways meet the
    same machine; prints their figures."""
    if size == "default":
        config = GppcConfig(vocab_size=genes, **parse_options("default", []).model)
    else:
        config = GppcConfig.from_size(size, vocab_size=genes)
    model, state = fitted_like_model(config).eval(), random_state(genes, 1)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(genes, generator=generator)[:perturbations, None]
    changes = torch.randn(ids.shape, generator=generator)
    query_ids = torch.randperm(genes, generator=generator)[:queries]
    seconds = dict.fromkeys(("encoded_once", "one_by_one"), 0.0)
    counts = dict.fromkeys(seconds, 0)

    def timed(way: str, rows: slice, encoded=None):
        start = time.perf_counter()
        encoded = model.encode(**state) if encoded is None else encoded
        output = model.decode(encoded, ids[rows], changes[rows], query_ids=query_ids)
        seconds[way] += time.perf_counter() - start
        counts[way] += len(ids[rows])
        return output

    for warm in (slice(0, 1), slice(0, chunk)):
        timed("encoded_once", warm, model.encode(**state))
    before, largest = peak_rss_gb(), 0.0
    start = time.perf_counter()
    encoded = model.encode(**state)
    seconds["encoded_once"], counts["encoded_once"] = time.perf_counter() - start, 0
    for first in range(0, len(ids), chunk):
        output = timed("encoded_once", slice(first, first + chunk), encoded)
        for row in range(first, min(first + BESIDE, len(ids))):
            one = timed("one_by_one", slice(row, row + 1))
            for name in ("logits", "linear_response", "logvar"):
                largest = max(largest, float((one[name][0] - output[name][row - first]).abs().max()))
    once, each = (counts[way] / seconds[way] for way in seconds)
    print(machine())
    print(f"encoded once, in chunks: {show(once)} perturbations/s")
    print(f"encoded each time, one by one: {show(each)} perturbations/s, encoded once is {show(once / each)} x")
    print(
        f"largest difference from one by one {largest:.1e}; peak memory {peak_rss_gb():.2f} GB ({before:.2f} GB after "
        "one chunk)"
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--size", default="small", help="a named size, or `default`: the embedded default's")
    parser.add_argument("--chunk", type=int, default=1024, help="perturbations decoded at once")
    parser.add_argument("--threads", type=int, default=2, help="1 where other work shares the machine")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.smoke else arguments.threads)
    if arguments.smoke:
        compare("tiny", chunk=64, genes=300, perturbations=300, queries=50)
    else:
        compare(arguments.size, arguments.chunk)


if __name__ == "__main__":
    main()
