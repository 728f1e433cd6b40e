"""What `gppc evaluate` is asked to do, checked before anything is read."""

import dataclasses
from pathlib import Path
from typing import Annotated

from data_scripts.options import CountOrZero, Range
from modeling_gppc.fitting.fit_screen_options import ScreenFitOptions

MODES = ("zero-shot", "in-context", "fine-tuned")
# Without a folder: the model that `train.py --config screen` fits, or nothing but baselines.
BUILT_IN_MODELS = ("gppc", "covariance")
SPLITS = ("perturbations", "combinations")
GROUPS = ("batch", "cell_line")
CHANGES = ("measured", "stated")


@dataclasses.dataclass
class EvaluateOptions(ScreenFitOptions):
    """
    What to score, and how a model is fitted where no folder is given.

    Args:
        mode (`str`, *optional*, defaults to `"in-context"`): `"zero-shot"` (a model folder as it is), `"in-context"`
            (fitted on the screen's controls) or `"fine-tuned"` (and on the training perturbations of each fold).
        model (`list[str]`, *optional*, defaults to `["gppc"]`): `gppc`, `covariance` (baselines only), or model folders
            that `train.py` left: one, or in the fine-tuned mode one a fold.
        folds (`int`, *optional*, defaults to 5): Folds over perturbations, fine-tuned mode only.
        split (`str`, *optional*, defaults to `"perturbations"`): Fine-tuned mode: `"perturbations"`, or
            `"combinations"`: doubles, trained on singles.
        seen (`int`, *optional*, defaults to 2): How many members of a double are seen alone.
        hold_out (`str`, *optional*): Fine-tuned mode: `"batch"` or `"cell_line"` (each in turn is predicted from the
            others), or `"batch=NAME"` (that one).
        change (`str`, *optional*, defaults to `"measured"`): What is imposed on a measured target: the change of its
            mean in the perturbed cells (`"measured"`), or what its modality and the stated guide efficiency say
            (`"stated"`), as `gppc predict GENE=ko` does.
        n_shuffles (`int`, *optional*, defaults to 20): Random genes in the target's place, a perturbation.
        shuffle_labels (`bool`, *optional*, defaults to `False`): Permute the labels of the cells within batches and cell
            lines first: what this evaluation gives when there is nothing to predict.
        nothing (`bool`, *optional*, defaults to `True`): Report beside every score what its method scores with shuffled
            labels (one division; not for model folders, which were fitted on the labels as they are).
        write_folds (`str`, *optional*): Fine-tuned mode: JSON file that gets, before anything is fitted, what another
            tool needs to predict the same: folds, divisions of the controls, cells and scored genes.
        predictions (`dict[str, str]`, *optional*): Fine-tuned mode: AnnData files with predictions that other tools made
            for those folds, by the name that tables give each; scored beside the built-in methods.
    """

    mode: str = "in-context"
    model: list[str] = dataclasses.field(default_factory=lambda: ["gppc"])
    folds: Annotated[int, Range(2)] = 5
    split: str = "perturbations"
    seen: Annotated[int, Range(0, 2)] = 2
    hold_out: str | None = None
    change: str = "measured"
    n_shuffles: CountOrZero = 20
    shuffle_labels: bool = False
    nothing: bool = True
    write_folds: str | None = None
    predictions: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        for name, options in (("mode", MODES), ("split", SPLITS), ("change", CHANGES)):
            if getattr(self, name) not in options:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; wanted one of {', '.join(options)}.")
        for name, unstated in (
            ("split", "perturbations"),
            ("hold_out", None),
            ("write_folds", None),
            ("predictions", {}),
        ):
            if getattr(self, name) != unstated and self.mode != "fine-tuned":
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r} with `mode` {self.mode!r}; only 'fine-tuned' trains on some."
                )
        if self.hold_out is not None and self.hold_out.partition("=")[0] not in GROUPS:
            raise ValueError(
                f"`hold_out` is {self.hold_out!r}; wanted {' or '.join(GROUPS)}, or one of them with =NAME."
            )
        if self.hold_out is not None and (self.split != "perturbations" or self.folders):
            raise ValueError("`hold_out` divides cells; give it without `split` and without a model folder.")
        if self.hold_out is not None and (self.write_folds is not None or self.predictions):
            raise ValueError("`hold_out` divides cells; give `write_folds` and `predictions` without it.")
        for name, file in self.predictions.items():
            if not Path(file).is_file():
                raise ValueError(f"`predictions` {name}={file} is not a file; wanted NAME=FILE.h5ad.")
        if not self.model:
            raise ValueError(f"`model` is empty; wanted model folders or one of {', '.join(BUILT_IN_MODELS)}.")
        for name in self.model:
            if (len(self.model) > 1 or name not in BUILT_IN_MODELS) and not Path(name).is_dir():
                raise ValueError(
                    f"`model` {name!r} is neither a model folder nor one of {', '.join(BUILT_IN_MODELS)}; several "
                    "models are several folders."
                )
        if len(self.model) > 1 and self.mode != "fine-tuned":
            raise ValueError(f"`model` holds {len(self.model)} folders; mode {self.mode!r} scores one.")
        if self.mode == "zero-shot" and self.model == ["gppc"]:
            raise ValueError("`model` is 'gppc' with `mode` 'zero-shot'; wanted a model folder.")
        if self.gene_features is not None and not Path(self.gene_features).is_file():
            raise ValueError(f"`gene_features` {self.gene_features} is not a file; wanted .parquet, .csv or .tsv.")

    @property
    def folders(self) -> list[str]:
        """The model folders given; none where the model is fitted here."""
        return [] if self.model[0] in BUILT_IN_MODELS else self.model
