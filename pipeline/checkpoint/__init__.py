"""Checkpoints of a sharded table and its encoder, written in the background."""
