"""What `gppc evaluate` is asked to do, checked before anything is read."""

import dataclasses
from pathlib import Path

from modeling_gppc.evaluation.response_size import ResponseSize

MODES = ("zero-shot", "in-context", "fine-tuned")
BUILT_IN_MODELS = ("covariance", "factor", "gppc")
SPLITS = ("perturbations", "combinations")
GROUPS = ("batch", "cell_line")


@dataclasses.dataclass
class EvaluateOptions:
    """What to run.

    Args:
        mode (`str`, *optional*, defaults to `"in-context"`): `"zero-shot"` (a model folder as it is), `"in-context"`
            (adapted on the screen's controls) or `"fine-tuned"` (and on the training perturbations of each fold).
        model (`str`, *optional*, defaults to `"gppc"`): `"gppc"` (linear response and trained departure), `"factor"`
            (its linear response alone), `"covariance"` (baselines only), or a model folder that `train.py` left.
        more_models (`tuple[str, ...]`, *optional*): Further model folders: in the fine-tuned mode those of the other
            folds, else of the other seeds.
        folds (`int`, *optional*, defaults to 5): Folds over perturbations, fine-tuned mode only.
        split (`str`, *optional*, defaults to `"perturbations"`): Fine-tuned mode: `"perturbations"`, or
            `"combinations"`: doubles, trained on singles.
        seen (`int`, *optional*, defaults to 2): How many members of a double are seen alone.
        hold_out (`str`, *optional*): Fine-tuned mode: `"batch"` or `"cell_line"` (each in turn is predicted from the
            others), or `"batch=NAME"` (that one).
        seeds (`int`, *optional*, defaults to 5): Runs of the model; their mean response is scored, their spread shown.
        steps (`int`, *optional*, defaults to 300): Training steps of the departure on controls.
        seed (`int`, *optional*, defaults to 0): First seed.
        n_shuffles (`int`, *optional*, defaults to 20): Random genes in the target's place, a perturbation.
        hold (`float`, *optional*, defaults to 0.1): How firmly the other targets are held; see [`InContextModel`].
        max_genes (`int`, *optional*, defaults to 2,000): Most variable genes *among controls* that are kept, targets
            always among them.
        gene_features (`str`, *optional*): Table of what is known of genes, e.g. annotation: two columns, gene and
            term, or one row of numbers a gene. Read by the model and by the baselines over perturbation features.
        size ([`ResponseSize`], *optional*): Treatment of size.
    """

    mode: str = "in-context"
    model: str = "gppc"
    more_models: tuple[str, ...] = ()
    folds: int = 5
    split: str = "perturbations"
    seen: int = 2
    hold_out: str | None = None
    seeds: int = 5
    steps: int = 300
    seed: int = 0
    n_shuffles: int = 20
    hold: float = 0.1
    max_genes: int = 2_000
    gene_features: str | None = None
    size: ResponseSize = dataclasses.field(default_factory=ResponseSize)

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"`mode` is {self.mode!r}; wanted one of {', '.join(MODES)}.")
        if self.split not in SPLITS:
            raise ValueError(f"`split` is {self.split!r}; wanted one of {', '.join(SPLITS)}.")
        for name, stated in (("split", self.split != "perturbations"), ("hold_out", self.hold_out is not None)):
            if stated and self.mode != "fine-tuned":
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r} with `mode` {self.mode!r}; only 'fine-tuned' trains on some."
                )
        if self.hold_out is not None and self.hold_out.partition("=")[0] not in GROUPS:
            raise ValueError(
                f"`hold_out` is {self.hold_out!r}; wanted {' or '.join(GROUPS)}, or one of them with =NAME."
            )
        if self.hold_out is not None and (self.split != "perturbations" or self.from_folder):
            raise ValueError("`hold_out` divides cells; give it without `split` and without a model folder.")
        if self.seen not in (0, 1, 2):
            raise ValueError(f"`seen` is {self.seen}; wanted 0, 1 or 2 members of a double.")
        if self.model not in BUILT_IN_MODELS and not Path(self.model).is_dir():
            raise ValueError(
                f"`model` {self.model!r} is neither a model folder nor one of {', '.join(BUILT_IN_MODELS)}."
            )
        if self.mode == "zero-shot" and not self.from_folder and self.model != "covariance":
            raise ValueError(f"`model` is {self.model!r} with `mode` 'zero-shot'; wanted a model folder.")
        for folder in self.more_models:
            if not self.from_folder or not Path(folder).is_dir():
                raise ValueError(f"`model` {folder!r} is no model folder; several models are several folders.")
        if self.gene_features is not None and not Path(self.gene_features).is_file():
            raise ValueError(f"`gene_features` {self.gene_features} is not a file; wanted .parquet, .csv or .tsv.")
        for name, least in (("seeds", 1), ("steps", 0), ("n_shuffles", 0), ("hold", 0), ("max_genes", 10)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; wanted at least {least}.")
        if self.folds < 2:
            raise ValueError(f"`folds` is {self.folds}; wanted at least 2.")

    @property
    def from_folder(self) -> bool:
        """Whether the model is a folder, and not fitted here."""
        return self.model not in BUILT_IN_MODELS

    @property
    def folders(self) -> tuple[str, ...]:
        """Every model folder given."""
        return (self.model, *self.more_models) if self.from_folder else ()
