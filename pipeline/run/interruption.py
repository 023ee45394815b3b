"""How a run that is asked to stop ends; apart, because the command line names it without torch."""

__all__ = ["Preempted"]


class Preempted(RuntimeError):
    """The run stopped because it was asked to; resumed, it goes on from its last checkpoint."""
