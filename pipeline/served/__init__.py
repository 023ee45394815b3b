"""Files for serving: the pointer to the published export, and indexes over its items."""
