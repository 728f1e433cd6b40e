"""The data-set repository: Parquet shards, tables, manifest and a card, made from a pairs folder."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template

import pyarrow.parquet as pq
from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData

from data_scripts.pairs.pair_folder import MANIFEST, PairFolder, read_table, write_table_atomically
from data_scripts.pairs.schema import CONTEXT_COLUMNS, GENE_SCHEMA, PAIR_SCHEMA, PANEL_SCHEMA, SPLITS, TARGET_COLUMNS
from hub_card.model_card import PLACEHOLDER, TEMPLATES, fact_rows, portable, shown

# The parts that `load_dataset` reads.
SCHEMAS = {"default": PAIR_SCHEMA, "genes": GENE_SCHEMA, "panels": PANEL_SCHEMA}
LIMITS = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")


def portable_json(content):
    """The same content with every absolute path replaced by its last component; see [`portable`]."""
    if isinstance(content, Mapping):
        return {key: portable_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [portable_json(value) for value in content]
    return portable(content) if isinstance(content, str) else content


def stage_dataset(folder: str | Path, staging: str | Path, license: str = "other") -> dict[str, Path | bytes]:
    """Collects the files of a data-set repository, card included: path in the repository -> file or content.

    Parquet shards are taken from the pairs folder as they are, Arrow shards are written as Parquet to `staging`, which
    must outlive the upload. What the repository then holds is a pairs folder again. `license` is the Hub's identifier.

    Raises:
        ValueError: If it is not a pairs folder, holds no pairs or is damaged.
    """
    pairs, staging = PairFolder(folder), Path(staging)
    if not pairs.splits:
        raise ValueError(f"`folder` {folder} holds no pairs in any split; there is nothing to upload.")
    files: dict[str, Path | bytes] = {
        f"{name}.parquet": pairs.path / f"{name}.parquet" for name in ("genes", "panels")
    }
    splits = {}
    for split, entry in pairs.manifest["splits"].items():
        shards = []
        for shard in entry["shards"]:
            source, name = pairs.path / shard["file"], Path(shard["file"]).with_suffix(".parquet").as_posix()
            if source.suffix != ".parquet":
                batches = read_table(source).to_batches(max_chunksize=4096)
                source = staging / name
                shard = {"file": name, **write_table_atomically(batches, PAIR_SCHEMA, source)}
            if shard["n_rows"]:
                shards.append(shard)
                files[name] = source
        splits[split] = {**entry, "shards": shards}
    manifest = portable_json({**pairs.manifest, "splits": splits})
    if manifest["splits"] != pairs.manifest["splits"]:  # converted shards have a digest of their own
        digests = [shard["digest"] for name in sorted(splits) for shard in splits[name]["shards"]]
        joined = "|".join([manifest["digest"], *digests]).encode()
        manifest["digest"] = hashlib.blake2b(joined, digest_size=16).hexdigest()
    files[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
    files["README.md"] = render_dataset_card(manifest, files, license).encode()
    return files


def describe_part(schema, splits: Mapping[str, list[Path]]) -> DatasetInfo:
    """Features, rows and bytes of one part, counted in the files themselves."""
    counted = SplitDict()
    for split, paths in splits.items():
        n_bytes = sum(pq.read_table(path).nbytes for path in paths)
        rows = sum(pq.read_metadata(path).num_rows for path in paths)
        counted.add(SplitInfo(name=split, num_bytes=n_bytes, num_examples=rows))
    return DatasetInfo(
        features=Features.from_arrow_schema(schema),
        splits=counted,
        download_size=sum(path.stat().st_size for paths in splits.values() for path in paths),
        dataset_size=sum(split.num_bytes for split in counted.values()),
    )


def render_dataset_card(manifest: Mapping, files: Mapping[str, Path | bytes], license: str) -> str:
    """The Markdown text, with its metadata block, of what [`stage_dataset`] uploads: manifest and files."""
    shards = {split: manifest["splits"].get(split, {}).get("shards") for split in SPLITS}
    parts = {name: {"train": [files.get(f"{name}.parquet")]} for name in SCHEMAS}
    parts["default"] = {split: [files[shard["file"]] for shard in found] for split, found in shards.items() if found}
    infos = DatasetInfosDict({name: describe_part(SCHEMAS[name], splits) for name, splits in parts.items()})
    counts = {name: {split: part.num_examples for split, part in info.splits.items()} for name, info in infos.items()}
    order = len(str(sum(counts["default"].values()))) - 3
    paths = {name: {"train": f"{name}.parquet"} for name in SCHEMAS}
    paths["default"] = {split: f"{split}/*.parquet" for split in parts["default"]}
    files_of = {name: [{"split": split, "path": path} for split, path in paths[name].items()] for name in SCHEMAS}
    data = DatasetCardData(
        configs=[{"config_name": name, "data_files": found} for name, found in files_of.items()],
        license=license,
        pretty_name=f"GPPC cell pairs ({manifest.get('organism', 'homo_sapiens').replace('_', ' ')})",
        size_categories=[f"{LIMITS[order - 1]}<n<{LIMITS[order]}" if order > 0 else "n<1K"],
        tags=["biology", "single-cell", "gene-expression", "gppc"],
    )
    infos.to_dataset_card_data(data)
    query = manifest.get("options", {}).get("query", {})
    release = query.get("census_version")
    facts = {
        "cells from": f"CELLxGENE Census {release}" if release else query.get("uri"),
        "filters": f"`{query['obs_filter']}`" if query.get("obs_filter") else None,
        "genes": shown(counts["genes"]["train"]),
        "sets of measured genes": shown(counts["panels"]["train"]),
    }
    for key, value in manifest.items():
        if key not in ("normalization", "target_sum") and not isinstance(value, Mapping):
            facts[key.replace("_", " ")] = ", ".join(map(str, value)) if isinstance(value, list) else value
    normalization = manifest.get("normalization", "none")
    made = {key: manifest[key] for key in ("source", "options", "report") if manifest.get(key)}
    text = Template((TEMPLATES / "dataset_card.md").read_text()).substitute(
        name=data.pretty_name,
        placeholder=PLACEHOLDER,
        splits=", ".join(counts["default"]),
        facts=fact_rows({label: value for label, value in facts.items() if value not in (None, "")}),
        split_table="\n".join(
            f"| {split} | {shown(rows)} | {len(shards[split])} |" for split, rows in counts["default"].items()
        ),
        normalization=normalization,
        target_sum=f" to a sum of {manifest.get('target_sum', 0):,.0f}" if normalization != "none" else "",
        context=", ".join(f"`{name}`" for name in (*CONTEXT_COLUMNS, *TARGET_COLUMNS)),
        made=f"```json\n{json.dumps(made, indent=2)}\n```",
        license_note=f" ({license})" if license != "other" else "",
    )
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))
