"""The ``shardrec`` command, its worker processes, and its TorchX jobs."""
