"""The raw event log: how it is read, sorted, split and written as sequences."""
