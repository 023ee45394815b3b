"""Communication between the ranks that hold the shards of a table."""
