"""The prepared folder: its manifest, its files, and the batches read from it."""
