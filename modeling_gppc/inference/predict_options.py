"""Options of `gppc predict`."""

from dataclasses import dataclass, field

from data_scripts.command_line import POSITIONAL
from data_scripts.options import Count, check_numbers


@dataclass
class PredictOptions:
    """
    What is predicted of which cells, and where it goes.

    Args:
        model (`str`): Model folder, or the id of a model on the Hub.
        cells (`str`): Cells with raw counts: .h5ad, .zarr, or .h5 of 10x Genomics.
        perturb (`list[str]`): Perturbations, each GENE=ACTION. Actions are ko, kd:SHARE (share removed), xFACTOR,
            level:VALUE (log value) and delta:CHANGE (of the log value); + joins genes, as in STAT1=ko+IRF1=x3; `control`
            changes nothing.
        out (`str`): File to write (.h5ad).
        overwrite (`bool`, *optional*, defaults to `False`): Replace a file of that name.
        genes (`list[str]`, *optional*): Predict these genes only; else all of the model.
        batch_size (`int`, *optional*, defaults to 256): Rows that the model sees at once.
        device (`str`, *optional*): cpu, cuda, ...; else the first accelerator, or the CPU.
        quiet (`bool`, *optional*, defaults to `False`): No progress bar, no summary.
    """

    model: str = field(metadata=POSITIONAL)
    cells: str = field(metadata=POSITIONAL)
    perturb: list[str]
    out: str
    overwrite: bool = False
    genes: list[str] | None = None
    batch_size: Count = 256
    device: str | None = None
    quiet: bool = False

    def __post_init__(self):
        check_numbers(self)
