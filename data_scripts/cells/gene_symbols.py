"""Symbols that were renamed, most of them because spreadsheets took them for dates."""

import re

_RENAMED = ((r"MARC[H]?(\d{1,2})", r"MARCHF\1"), (r"SEPT(\d{1,2})", r"SEPTIN\1"), (r"DEC1", "DELEC1"))
_DATES = {"mar": "MARCHF", "sep": "SEPTIN"}


def current_symbol(symbol: str) -> str:
    """The present HGNC symbol of a gene of the MARCH, SEPT and DEC families, also of one that a spreadsheet turned into a
    date; every other symbol as it is.

    Example:

    ```python
    current_symbol("MARCH8"), current_symbol("8-Mar"), current_symbol("STAT1")  # ("MARCHF8", "MARCHF8", "STAT1")
    ```
    """
    date = re.fullmatch(r"(\d{1,2})-(mar|sep)", symbol, flags=re.IGNORECASE)
    if date:
        return f"{_DATES[date[2].casefold()]}{int(date[1])}"
    for old, new in _RENAMED:
        if re.fullmatch(old, symbol, flags=re.IGNORECASE):
            return re.sub(old, new, symbol, flags=re.IGNORECASE)
    return symbol
