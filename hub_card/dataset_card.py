"""The data-set repository: Parquet shards, tables, manifest and a card, made from a pairs folder."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template

import pyarrow.parquet as pq
from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

from data_scripts.pairs.pair_folder import MANIFEST, PairFolder, read_table, write_table_atomically
from data_scripts.pairs.schema import CONTEXT_COLUMNS, GENE_SCHEMA, PAIR_SCHEMA, PANEL_SCHEMA, SPLITS, TARGET_COLUMNS
from hub_card.model_card import PLACEHOLDER, TEMPLATES, portable, shown

TABLES = {"genes": GENE_SCHEMA, "panels": PANEL_SCHEMA}
SIZE_CATEGORIES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
)


def portable_json(content):
    """The same content with every absolute path replaced by its last component; see [`portable`]."""
    if isinstance(content, Mapping):
        return {key: portable_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [portable_json(value) for value in content]
    return portable(content) if isinstance(content, str) else content


def stage_dataset(folder: str | Path, staging: str | Path, license: str = "other") -> dict[str, Path | bytes]:
    """Collects the files of a data-set repository.

    Parquet shards are taken from the pairs folder as they are, Arrow shards are written as Parquet to `staging`. What
    the repository then holds is a pairs folder again.

    Args:
        folder (`str` or `Path`): What `gppc build-pairs` wrote.
        staging (`str` or `Path`): Folder for converted shards; must outlive the upload.
        license (`str`, *optional*, defaults to `"other"`): Licence identifier of the Hub.

    Returns:
        `dict` of path in the repository -> file or content, card included.

    Raises:
        ValueError: If it is not a pairs folder, holds no pairs or is damaged.
    """
    pairs, staging = PairFolder(folder), Path(staging)
    if not pairs.splits:
        raise ValueError(f"`folder` {folder} holds no pairs in any split; there is nothing to upload.")
    files: dict[str, Path | bytes] = {f"{name}.parquet": pairs.path / f"{name}.parquet" for name in TABLES}
    splits = {}
    for split, entry in pairs.manifest["splits"].items():
        shards = []
        for shard in entry["shards"]:
            source, name = pairs.path / shard["file"], str(Path(shard["file"]).with_suffix(".parquet").as_posix())
            if source.suffix != ".parquet":
                batches = read_table(source).to_batches(max_chunksize=4096)
                shard = {"file": name, **write_table_atomically(batches, PAIR_SCHEMA, staging / name)}
                source = staging / name
            shards.append(shard)
            if shard["n_rows"]:
                files[name] = source
        splits[split] = {**entry, "shards": [shard for shard in shards if shard["n_rows"]]}
    manifest = portable_json({**pairs.manifest, "splits": splits})
    manifest["digest"] = _digest(manifest, pairs.manifest, files)
    files[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
    files["README.md"] = render_dataset_card(manifest, files, license).encode()
    return files


def _digest(manifest: Mapping, original: Mapping, files: Mapping[str, Path | bytes]) -> str:
    """The folder's digest, unchanged where the shards are; converted shards have one of their own."""
    if manifest["splits"] == original["splits"]:
        return original["digest"]
    digests = [shard["digest"] for name in sorted(manifest["splits"]) for shard in manifest["splits"][name]["shards"]]
    return hashlib.blake2b("|".join([original["digest"], *digests]).encode(), digest_size=16).hexdigest()


def _split_files(manifest: Mapping, files: Mapping[str, Path | bytes]) -> Iterator[tuple[str, list[Path]]]:
    for split in SPLITS:
        shards = [files[shard["file"]] for shard in manifest["splits"].get(split, {}).get("shards", ())]
        if shards:
            yield split, shards


def dataset_infos(manifest: Mapping, files: Mapping[str, Path | bytes]) -> DatasetInfosDict:
    """Features, rows and bytes of every part, counted in the files themselves."""

    def describe(schema, parts: Mapping[str, list[Path]]) -> DatasetInfo:
        splits = SplitDict()
        for split, paths in parts.items():
            n_bytes = sum(pq.read_table(path).nbytes for path in paths)
            rows = sum(pq.read_metadata(path).num_rows for path in paths)
            splits.add(SplitInfo(name=split, num_bytes=n_bytes, num_examples=rows))
        return DatasetInfo(
            features=Features.from_arrow_schema(schema),
            splits=splits,
            download_size=sum(path.stat().st_size for paths in parts.values() for path in paths),
            dataset_size=sum(split.num_bytes for split in splits.values()),
        )

    infos = DatasetInfosDict()
    infos["default"] = describe(PAIR_SCHEMA, dict(_split_files(manifest, files)))
    for name, schema in TABLES.items():
        infos[name] = describe(schema, {"train": [files[f"{name}.parquet"]]})
    return infos


def render_dataset_card(manifest: Mapping, files: Mapping[str, Path | bytes], license: str = "other") -> str:
    """Renders the card of staged files; see [`stage_dataset`].

    Args:
        manifest (`Mapping`): The manifest that is uploaded.
        files (`Mapping[str, Path | bytes]`): The files that are uploaded.
        license (`str`, *optional*, defaults to `"other"`): Licence identifier of the Hub.

    Returns:
        `str`: The Markdown text with its metadata block.
    """
    infos = dataset_infos(manifest, files)
    counts = {split: info.num_examples for split, info in infos["default"].splits.items()}
    total = sum(counts.values())
    data = DatasetCardData(
        license=license,
        pretty_name=f"GPPC cell pairs ({manifest.get('organism', 'homo_sapiens').replace('_', ' ')})",
        size_categories=[next((label for limit, label in SIZE_CATEGORIES if total < limit), "n>1T")],
        tags=["biology", "single-cell", "gene-expression", "gppc"],
    )
    infos.to_dataset_card_data(data)
    configs = MetadataConfigs()
    configs["default"] = {
        "data_files": [{"split": split, "path": f"{split}/*.parquet"} for split in counts],
        "default": True,
    }
    for name in TABLES:
        configs[name] = {"data_files": [{"split": "train", "path": f"{name}.parquet"}]}
    configs.to_dataset_card_data(data)
    normalization = manifest.get("normalization", "none")
    target_sum = f" to a sum of {manifest.get('target_sum', 0):,.0f}" if normalization != "none" else ""
    made = {key: manifest[key] for key in ("source", "options", "report") if manifest.get(key)}
    text = Template((TEMPLATES / "dataset_card.md").read_text()).substitute(
        name=data.pretty_name,
        placeholder=PLACEHOLDER,
        splits=", ".join(counts),
        facts=_facts(manifest, infos),
        split_table="\n".join(
            f"| {split} | {shown(rows)} | {len(manifest['splits'][split]['shards'])} |"
            for split, rows in counts.items()
        ),
        normalization=normalization,
        target_sum=target_sum,
        context=", ".join(f"`{name}`" for name in (*CONTEXT_COLUMNS, *TARGET_COLUMNS)),
        made=f"```json\n{json.dumps(made, indent=2)}\n```" if made else "",
        license_note=f" ({license})" if license != "other" else "",
    )
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _facts(manifest: Mapping, infos: DatasetInfosDict) -> str:
    query = manifest.get("options", {}).get("query", {})
    release = query.get("census_version")
    rows = {
        "cells from": f"CELLxGENE Census {release}" if release else query.get("uri"),
        "filters": f"`{query['obs_filter']}`" if query.get("obs_filter") else None,
        "genes": shown(infos["genes"].splits["train"].num_examples),
        "sets of measured genes": shown(infos["panels"].splits["train"].num_examples),
    }
    for key, value in manifest.items():
        if key in ("normalization", "target_sum") or isinstance(value, Mapping):
            continue
        rows[key.replace("_", " ")] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return "\n".join(
        f"| {label} | {str(value).replace('|', '&#124;')} |"
        for label, value in rows.items()
        if value not in (None, "")
    )
