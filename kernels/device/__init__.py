"""Choices that depend on the device: backend, tile shapes, and the matrix product on a CPU."""
