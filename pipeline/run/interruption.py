"""The exception of an interrupted run; in its own file, so that the CLI needs no torch."""

__all__ = ["Preempted"]


class Preempted(RuntimeError):
    """The run was asked to stop before its end; it can be resumed from its last checkpoint."""
