"""Pipeline of shardrec."""
