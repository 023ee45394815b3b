"""Sequential recommenders over catalogs of millions of items: sharded tables, exact and sampled losses."""

__version__ = "0.1.0"
