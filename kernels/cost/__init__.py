"""What a loss costs a rank: FLOP, bytes and workspace, for planning alone."""
