"""Cost model of the losses on one rank, for planning only: FLOP, bytes and workspace."""
