"""Checkpoints of a sharded table and its encoder: written while training goes on."""
