"""The one contract between data and model: the pair row, the gene table and the measured-gene panels."""

import pyarrow as pa

SCHEMA_VERSION = "1.0.0"
SPLITS = ("train", "validation", "test")

# Columns of obs that travel with a pair; they describe the source cell.
CONTEXT_COLUMNS = ("cell_type_ontology_term_id", "cell_type", "tissue", "assay", "dataset_id", "donor_id")
# Columns of the target cell kept for labelled floors, guards and bootstrap groups. Never a model input.
TARGET_COLUMNS = ("target_cell_type_ontology_term_id", "target_cell_type", "target_donor_id")

PAIR_SCHEMA = pa.schema(
    [
        # Expressed genes only: ids into the gene table (ascending) and their normalised log values.
        pa.field("source_gene_ids", pa.list_(pa.int32())),
        pa.field("source_values", pa.list_(pa.float32())),
        pa.field("target_gene_ids", pa.list_(pa.int32())),
        pa.field("target_values", pa.list_(pa.float32())),
        # Which set of genes was measured: row of the panel table.
        pa.field("source_panel", pa.int32()),
        pa.field("target_panel", pa.int32()),
        # Genes whose change is imposed, with the change of log value from source to target.
        pa.field("perturbation_gene_ids", pa.list_(pa.int32())),
        pa.field("perturbation_values", pa.list_(pa.float32())),
        # Name of the context the two cells share, e.g. `same_type` or `same_dataset`.
        pa.field("pairing", pa.string()),
        *[pa.field(name, pa.string()) for name in CONTEXT_COLUMNS],
        *[pa.field(name, pa.string()) for name in TARGET_COLUMNS],
        # Technical covariates: counts over all genes, number of expressed genes over all genes.
        pa.field("source_library_size", pa.float32()),
        pa.field("target_library_size", pa.float32()),
        pa.field("source_n_expressed", pa.int32()),
        pa.field("target_n_expressed", pa.int32()),
        pa.field("source_soma_joinid", pa.int64()),
        pa.field("target_soma_joinid", pa.int64()),
        pa.field("is_control", pa.bool_()),
    ]
)

# One row a gene of the vocabulary, in id order.
GENE_SCHEMA = pa.schema(
    [
        pa.field("gene_id", pa.string()),  # Ensembl `feature_id` where one is known
        pa.field("gene_symbol", pa.string()),
        pa.field("feature_length", pa.float32()),  # median isoform length in bases; NaN where unknown
        pa.field("n_cells_measured", pa.int64()),
        pa.field("n_cells_expressed", pa.int64()),
        pa.field("n_datasets_measured", pa.int64()),
        pa.field("mean", pa.float32()),  # of normalised values over the cells that measure the gene
        pa.field("variance", pa.float32()),
    ]
)

# One row a distinct set of measured genes, in panel order.
PANEL_SCHEMA = pa.schema([pa.field("gene_ids", pa.list_(pa.int32()))])
