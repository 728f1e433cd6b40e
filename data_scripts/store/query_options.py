"""Which cells of a store are read, and how their values are normalised."""

from dataclasses import dataclass
from typing import Literal

from data_scripts.options import Positive, check_numbers


@dataclass(frozen=True)
class QueryOptions:
    """
    Which cells to read and how to normalise them.

    Args:
        uri (`str`, *optional*): A store in Census layout: a folder or an S3 address.
        census_version (`str`, *optional*): Release of the public Census (`stable`, `latest` or a date); without `uri`.
        organism (`str`, *optional*, defaults to `"homo_sapiens"`): Census name of the species.
        obs_filter (`str`, *optional*, defaults to `"is_primary_data == True"`): Cells; SOMA value filter.
        var_filter (`str`, *optional*): Genes that may enter the panel; SOMA value filter.
        layer (`str`, *optional*, defaults to `"raw"`): `raw` (counts), `normalized` (fractions that sum to 1) or
            `log_values` (values used as they are; `normalization` is then `none`).
        normalization (`str`, *optional*, defaults to `"log1p"`): See `normalize_counts`.
        target_sum (`float`, *optional*, defaults to 10,000): What a cell's values sum to before the logarithm.
    """

    uri: str | None = None
    census_version: str | None = None
    organism: str = "homo_sapiens"
    obs_filter: str | None = "is_primary_data == True"
    var_filter: str | None = None
    layer: Literal["raw", "normalized", "log_values"] = "raw"
    normalization: Literal["log1p", "log_tpm", "none"] = "log1p"
    target_sum: Positive = 10_000.0

    def __post_init__(self):
        if self.uri is not None and self.census_version is not None:
            raise ValueError(
                f"`uri` is {self.uri!r} and `census_version` is {self.census_version!r}; give one of them: a store of "
                "your own or a release of the public Census."
            )
        check_numbers(self)
        if (self.layer == "log_values") != (self.normalization == "none"):
            raise ValueError(
                f"`normalization` is {self.normalization!r} with `layer` {self.layer!r}; log values are used as they "
                "are: set both `layer: log_values` and `normalization: none`, or neither."
            )
        if self.layer == "normalized" and self.normalization == "log_tpm":
            raise ValueError(
                "`normalization` is 'log_tpm' with `layer` 'normalized'; that layer is divided by gene length where "
                "it applies: use `layer: raw`, or `normalization: log1p`."
            )
