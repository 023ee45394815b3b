"""What serving reads: the pointer to the published export, and indexes over its items."""
