"""How a stage writes: complete or not at all."""
