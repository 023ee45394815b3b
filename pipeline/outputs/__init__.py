"""Output folders and files that are complete or absent."""
