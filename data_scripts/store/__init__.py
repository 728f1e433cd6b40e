"""A local store in the Census layout, queries on it and the stream of its cells."""
