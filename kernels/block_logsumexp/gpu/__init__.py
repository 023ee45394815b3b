"""The block log-sum-exp in Triton: importing its files imports triton."""
