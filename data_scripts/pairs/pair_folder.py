"""A folder of pair rows on disk: written atomically, opened memory-mapped."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from data_scripts.files import write_json
from data_scripts.pairs.schema import GENE_SCHEMA, PANEL_SCHEMA, SCHEMA_VERSION, SPLITS
from data_scripts.pairs.shard_files import file_digest, read_decoded, read_table, write_table_atomically
from modeling_gppc.normalization_gppc import close_matches

MANIFEST = "manifest.json"
DECODED_IN_MEMORY = 64 * 1024**2  # bytes of parquet in a split up to which it is simply decoded into memory


def finish_pair_folder(path: str | Path, genes: pa.Table, panels: np.ndarray, manifest: Mapping) -> None:
    """Writes the gene and panel tables and, last of all, the manifest that makes the folder a pairs folder. `genes` is
    the vocabulary in id order, `panels` the measured genes, bool `(n_panels, n_genes)`."""
    path = Path(path)
    lists = pa.array([np.flatnonzero(row).astype(np.int32) for row in panels], type=PANEL_SCHEMA[0].type)
    tables = {"genes": genes.cast(GENE_SCHEMA), "panels": pa.table([lists], schema=PANEL_SCHEMA)}
    written = [
        write_table_atomically(t.to_batches(), t.schema, path / f"{name}.parquet") for name, t in tables.items()
    ]
    shards = [shard for name in sorted(manifest["splits"]) for shard in manifest["splits"][name]["shards"]]
    digests = "|".join(file["digest"] for file in shards + written)
    digest = hashlib.blake2b(digests.encode(), digest_size=16).hexdigest()
    write_json({"schema_version": SCHEMA_VERSION, **manifest, "digest": digest}, path / MANIFEST)


class PairFolder:
    """
    Pairs that `gppc build-pairs` wrote, opened without reading them.

    Raises `ValueError` if the folder is not a finished pairs folder, was written with another major version of the
    schema, or lacks a shard.

    Attributes:
        manifest (`dict`): `schema_version`, `organism`, `normalization`, `target_sum`, `pairings`, `splits`, `report`,
            `digest`, ...
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / MANIFEST).is_file():
            unfinished = (self.path / "work" / "plan.json").is_file()
            why = "holds an unfinished build: run the same command again" if unfinished else f"has no {MANIFEST}"
            raise ValueError(f"`{self.path}` is not a pairs folder ({why}); `gppc build-pairs` writes one.")
        try:
            self.manifest = json.loads((self.path / MANIFEST).read_text())
            version = str(self.manifest["schema_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`{self.path / MANIFEST}` is not the manifest of a pairs folder: {error!r}.") from error
        if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            raise ValueError(
                f"`{self.path}` was written with pair schema {version}; this version reads {SCHEMA_VERSION}: "
                "build the pairs again."
            )
        for shard in (shard for entry in self.manifest["splits"].values() for shard in entry["shards"]):
            file = self.path / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["n_bytes"]:
                found = f"{file.stat().st_size} bytes" if file.is_file() else "no file"
                raise ValueError(
                    f"`{file}` is damaged: {found}, wanted {shard['n_bytes']} bytes; run `gppc build-pairs` again."
                )

    @cached_property
    def genes(self) -> pa.Table:
        """The vocabulary in id order."""
        return pq.read_table(self.path / "genes.parquet")

    @property
    def gene_ids(self) -> list[str]:
        """Ensembl ids (symbols where unknown) in id order."""
        return self.genes.column("gene_id").to_pylist()

    @property
    def gene_symbols(self) -> list[str]:
        """Names for people, in id order."""
        return self.genes.column("gene_symbol").to_pylist()

    @cached_property
    def panels(self) -> np.ndarray:
        """Measured genes: bool of shape `(n_panels, n_genes)`."""
        lists = pq.read_table(self.path / "panels.parquet").column("gene_ids").combine_chunks()
        panels = np.zeros((len(lists), self.genes.num_rows), dtype=bool)
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
        panels[np.repeat(np.arange(len(lists)), lengths), lists.flatten().to_numpy()] = True
        return panels

    @property
    def pairings(self) -> list[str]:
        """Names of the contexts that pairs share, in the order of the model's ids."""
        return list(self.manifest["pairings"])

    @property
    def splits(self) -> list[str]:
        """Names of the splits that hold pairs."""
        return [name for name in SPLITS if self.manifest["splits"].get(name, {}).get("n_pairs", 0) > 0]

    def describe_splits(self) -> str:
        """One line: what the splits were made by, and the pairs of each."""
        counts = ", ".join(f"{name} {self.manifest['splits'][name]['n_pairs']:,} pairs" for name in self.splits)
        return f"Splits by {self.manifest.get('split_by', 'whoever wrote the pairs')}: {counts}."

    def split(self, name: str) -> pa.Table:
        """Rows of a split in `PAIR_SCHEMA`: memory-mapped shards, one after the other, nothing copied. Shards in parquet
        are decoded by [`read_decoded`], few of them into memory. `ValueError` if the folder holds no such split."""
        if name not in self.splits:
            raise ValueError(f"`split` {name!r} is not in {self.path}{close_matches(str(name), self.splits)}.")
        shards = self.manifest["splits"][name]["shards"]
        packed = sum(shard["n_bytes"] for shard in shards if shard["file"].endswith(".parquet"))
        if packed <= DECODED_IN_MEMORY:
            return pa.concat_tables([read_table(self.path / shard["file"]) for shard in shards])
        # The bar appears only where decoding takes its time.
        bar = tqdm(shards, desc=f"decoding {name}", unit="shard", delay=2)
        return pa.concat_tables([read_decoded(self.path / shard["file"], shard["digest"]) for shard in bar])

    def verify(self) -> None:
        """Reads every shard; raises `ValueError` if its digest is not that of the manifest."""
        for shard in (shard for entry in self.manifest["splits"].values() for shard in entry["shards"]):
            if file_digest(self.path / shard["file"]) != shard["digest"]:
                raise ValueError(f"`{self.path / shard['file']}` is damaged: another digest; build the pairs again.")
