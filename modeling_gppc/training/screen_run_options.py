"""What of a CRISPR screen a training run is fitted on."""

import dataclasses
from typing import Annotated

from data_scripts.options import Range
from modeling_gppc.fitting.fit_screen_options import ScreenFitOptions

TRAIN_ON = ("perturbations", "controls")
EVERY_FOLD = "all"


@dataclasses.dataclass
class ScreenRunOptions(ScreenFitOptions):
    """
    What of a screen a run is fitted on, besides how.

    Args:
        train_on (`str`, *optional*, defaults to `"perturbations"`): `"perturbations"`: control cells and perturbed
            ones; `"controls"`: no perturbed cell is read.
        folds (`int`, *optional*, defaults to 5): Folds over perturbations.
        fold (`str` or `int`, *optional*): Fold that is left out, counted from 0; `"all"`: one model folder a fold. All
            perturbations are seen when absent.
        half_controls (`bool`, *optional*): Leave half of the control cells out, so that `gppc evaluate` can measure the
            truth from them; by default where a fold is left out and `controls` is `"disjoint"`.
    """

    train_on: str = "perturbations"
    folds: Annotated[int, Range(2)] = 5
    fold: str | int | None = None
    half_controls: bool | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.train_on not in TRAIN_ON:
            raise ValueError(f"`screen.train_on` is {self.train_on!r}; wanted one of {', '.join(TRAIN_ON)}.")
        one = isinstance(self.fold, int) and 0 <= self.fold < self.folds
        if not one and self.fold not in (None, EVERY_FOLD):
            raise ValueError(
                f"`screen.fold` is {self.fold!r}; wanted 0 to {self.folds - 1} or {EVERY_FOLD!r} of {self.folds} "
                "`screen.folds`."
            )
        if self.half_controls is None:
            self.half_controls = self.fold is not None and self.controls == "disjoint"
        if self.fold is not None and self.train_on == "controls":
            raise ValueError("`screen.fold` leaves perturbations out, but `screen.train_on` 'controls' reads none.")
