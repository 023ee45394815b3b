"""What all losses share: inputs, candidates, passes over chunks, and the PyTorch operator."""
