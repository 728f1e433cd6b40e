"""From a table of counts to a table of predicted changes."""

import csv
from pathlib import Path

from transformers import pipeline

COLUMNS = ["gene", "change", "predicted log value", "standard deviation", "probability of the direction"]


def load_pipeline(model):
    """The pipeline of a model repository or folder."""
    return pipeline("perturbation-prediction", model=model, trust_remote_code=True)


def read_counts(path):
    """Genes and counts of a csv or tsv file with two columns; a heading is skipped.

    Raises:
        ValueError: If there is no such file or a line holds no number.
    """
    if path is None:
        raise ValueError("No file: upload a table with a gene and a count in each line.")
    text = Path(path).read_text(encoding="utf-8-sig")
    rows = [row for row in csv.reader(text.splitlines(), delimiter="\t" if "\t" in text else ",") if row]
    genes, counts = [], []
    for number, row in enumerate(rows, start=1):
        try:
            count = float(row[1])
        except (IndexError, ValueError):
            if number == 1:
                continue
            raise ValueError(f"Line {number} is {','.join(row)!r}; wanted a gene and a count.") from None
        genes.append(row[0].strip())
        counts.append(count)
    if not genes:
        raise ValueError("The file holds no counts; wanted a gene and a count in each line.")
    return genes, counts


def predict_table(predict, path, perturbation, top_k):
    """Rows of [`COLUMNS`] for the genes that change most."""
    genes, counts = read_counts(path)
    records = predict({"counts": counts, "gene_ids": genes, "perturbation": perturbation}, top_k=top_k)
    figures = ("change", "expression", "std", "direction")
    return [
        [record["gene_symbol"], *(None if record[name] is None else round(record[name], 4) for name in figures)]
        for record in records
    ]
