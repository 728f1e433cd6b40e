"""`gppc make-synthetic`: cells from a known gene network, written into a local store."""

from dataclasses import dataclass, field

from data_scripts.command_line import POSITIONAL
from data_scripts.synthetic.network_config import SyntheticConfig


@dataclass
class StoreOptions:
    """
    Where the cells go.

    Args:
        store (`str`): Folder to write. The network is saved as STORE.network.safetensors.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a store of that name.
    """

    store: str = field(metadata=POSITIONAL)
    overwrite: bool = False


OPTIONS = (StoreOptions, SyntheticConfig)


def run(options: StoreOptions, config: SyntheticConfig) -> None:
    """Writes the store and says what is in it."""
    # Imported late: SOMA takes seconds to load, a mistyped option should answer at once.
    from data_scripts.synthetic.network_store import network_path, write_synthetic

    report, _ = write_synthetic(options.store, config, overwrite=options.overwrite, progress=True)
    print(report.summary())
    print(f"network -> {network_path(options.store)}")
