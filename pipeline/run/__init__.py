"""A training run: its config, its folder, its loop, and how it is resumed."""
