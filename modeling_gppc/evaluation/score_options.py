"""What is scored at the end of a run, checked before anything is trained."""

from dataclasses import dataclass

from data_scripts.options import Count, check_numbers
from modeling_gppc.normalization_gppc import close_matches


@dataclass
class EvaluationOptions:
    """
    How a model is scored on the test pairs of its run; none of it changes the model.

    Args:
        max_pairs (`int`): Test pairs a split, at most.
        max_floor_pairs (`int`): Training pairs that floors are fitted on, at most; they are dense in memory.
        n_resamples (`int`): Bootstrap resamples.
        floors (`list[str]`, *optional*): Names of floors; defaults to all.
        splits (`list[str]`, *optional*): Names of the splits to score, as `results.json` calls them; defaults to all.
        perturbation (`str`, *optional*): The first prediction's perturbation; defaults to a knock-out of a gene that
            is commonly expressed and varies.
    """

    max_pairs: Count = 4_000
    max_floor_pairs: Count = 12_000
    n_resamples: Count = 1_000
    floors: list[str] | None = None
    splits: list[str] | None = None
    perturbation: str | None = None

    def __post_init__(self):
        from modeling_gppc.evaluation.pair_floors import FLOORS  # with the libraries that fit them

        check_numbers(self, "evaluation")
        for name in self.floors or ():
            if name not in FLOORS:
                raise ValueError(f"`evaluation.floors` names {name!r}, which is none{close_matches(name, FLOORS)}")
