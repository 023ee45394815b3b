"""The text that a run prints at its start and at its end."""

from collections.abc import Iterator

from shardrec.pipeline.config import describe_changes
from shardrec.pipeline.run.callbacks import EndReport, wrapped
from shardrec.pipeline.run.config import TrainConfig

__all__ = ["ending", "opening"]


def opening(config: TrainConfig, plan: str, target_share: float) -> str:
    """Text for the start: options that are not defaults, sharding plan, targets left out.

    Args:
        config: the config of the run.
        plan: description of the sharded table, from ``Catalog.describe``.
        target_share: share of the training targets that an epoch trains on, in [0, 1].
    """
    heading = f"options other than the defaults (all of them: {config.output}/config.json):"
    changes = [f"  {line}" for line in describe_changes(config).splitlines()]
    lines = [heading, *changes, plan]
    if target_share < 1:
        left_out = (
            f"an epoch has {target_share:.1%} of the training targets: the last "
            f"{config.encoder.max_length} of each sequence; batches.windows=all takes them all"
        )
        lines.append(wrapped(left_out))
    return "\n".join(lines)


def ending(report: EndReport, config: TrainConfig) -> str:
    """Text for the end: best validation, whether longer training may help, and the next command."""
    return "\n".join(_ending(report, config))


def _ending(report: EndReport, config: TrainConfig) -> Iterator[str]:
    if report.best_step is not None:
        metric = config.validation.metric
        best = f"best {metric} {report.best_metrics[metric]:.4f} at step {report.best_step:,}"
        yield f"{best} of {report.step:,}, {report.seconds:,.0f} s in all"
    limit = report.reason.partition(" ")[0]
    if report.best_step == report.step and hasattr(config.limits, limit):
        yield (
            "the last validation is the best: the metric was still rising; raise "
            f"limits.{limit} (now {getattr(config.limits, limit):g}) to train longer"
        )
    data, run = config.data, config.output
    yield f"run folder {run}; next: shardrec evaluate --prepared {data} --run {run}"
