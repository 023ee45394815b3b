"""The exceptions of an interrupted run; in their own file, so that the CLI needs no torch."""

__all__ = ["Interrupted", "Preempted"]


class Preempted(RuntimeError):
    """The run was asked to stop before its end; it can be resumed from its last checkpoint."""


class Interrupted(Preempted):
    """The run was asked to stop by Ctrl-C."""
