"""How a run that is asked to stop ends: between two steps, with a checkpoint."""

__all__ = ["Preempted", "never"]


class Preempted(RuntimeError):
    """The run stopped because it was asked to; it goes on from its last checkpoint when resumed."""


def never() -> bool:
    """False: nobody asks the run to stop."""
    return False
