"""The block log-sum-exp in Triton; importing a module of this package imports triton."""
