"""From a stream of cells to pair rows: matching, sampling, splits, folders."""
