"""What depends on the device: the backend, the tile shapes and the matrix product on a CPU."""
