"""Sequential recommenders over huge catalogs: sharded tables, exact and sampled losses."""

__version__ = "0.2.0"
