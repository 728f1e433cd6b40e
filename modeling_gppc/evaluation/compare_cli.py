"""`gppc compare`: one statement over the evaluations of several screens."""

import dataclasses
from pathlib import Path

from data_scripts.command_line import POSITIONAL
from data_scripts.options import Seed, check_numbers


@dataclasses.dataclass
class CompareOptions:
    """
    Which evaluations are pooled.

    Args:
        evaluations (`list[str]`): Folders that `gppc evaluate` wrote, one a screen.
        out (`str`, *optional*): JSON file for the result.
        metric (`str`, *optional*, defaults to `"pearson_delta"`): Column of `per_perturbation.csv` that is compared.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
    """

    evaluations: list[str] = dataclasses.field(metadata=POSITIONAL)
    out: str | None = None
    metric: str = "pearson_delta"
    seed: Seed = 0

    def __post_init__(self):
        check_numbers(self)
        if self.out is not None and not Path(self.out).resolve().parent.is_dir():
            raise ValueError(f"`out` {self.out} lies in a folder that does not exist; make it, or choose another.")


OPTIONS = (CompareOptions,)


def run(options: CompareOptions) -> None:
    """Pools and prints."""
    # Imported late: a mistyped option should answer at once.
    from data_scripts.files import write_json
    from modeling_gppc.evaluation.compare_screens import compare_screens, comparison_rows
    from modeling_gppc.evaluation.report import text_table

    result = compare_screens(options.evaluations, options.metric, options.seed)
    print(text_table(*comparison_rows(result)))
    print(f"\n{options.metric}; intervals: screens, and perturbations within them, drawn with replacement.")
    if options.out is not None:
        write_json(result, options.out)
