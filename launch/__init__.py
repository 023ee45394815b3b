"""Launch of shardrec."""
