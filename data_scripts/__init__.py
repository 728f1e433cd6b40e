"""Census, AnnData or synthetic cells -> pair rows in Arrow."""
