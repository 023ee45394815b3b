r"""Compare the losses at equal training time on three catalogs, as a table and a plot.

Every loss trains for the same number of minutes, with the same encoder, batch and optimizer, in
workers of one thread; then the whole catalog is ranked for the test users. No loss stores logits,
so that memory is about equal: its peak stands in the table. Sharing negatives between positions is
a loss of its own here: ``cce_minus`` with ``share`` 1, 128 and the whole batch (0).
With ``--steps`` these three take the same number of steps instead: then what differs between them
is the sharing alone. Both kinds of rows stand in one file and on one page.

    python benchmarks/which_loss.py --beauty beauty.parquet --epinions epinions.parquet \
        --generated 1000000 --minutes 2 --seeds 1 2 3
    python benchmarks/which_loss.py --beauty beauty.parquet --steps 1750 --seeds 1 2 3
    python benchmarks/which_loss.py --page-only   # page and plot from the rows there are
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

sys.path.insert(0, str(Path(__file__).parent))
from quality import run_once
from record import RESULTS, SHARDREC, Results, run_logged

from shardrec.pipeline.prepared.loader import Prepared

VARIANTS = (
    "cce",
    "cce_minus:num_negatives=1024,share=1",
    "cce_minus:num_negatives=1024,share=128",
    "cce_minus:num_negatives=1024,share=0",
    "sce",
    "rece",
)
SHARES = tuple(loss for loss in VARIANTS if "share=" in loss)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A log and how it is prepared and trained.

    Attributes:
        name: in the rows.
        log: event Parquet.
        prepare: options of prepare.
        recipe: of train.
        settings: dotted options that differ from the recipe.
        judge: the protocol that scores follow, as in quality.py.
    """

    name: str
    log: Path
    prepare: tuple[str, ...]
    recipe: str
    settings: tuple[str, ...]
    judge: str


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The catalogs asked for; a generated log is made when it is not there."""
    if options.beauty:
        yield Case(
            name="Amazon Beauty",
            log=options.beauty,
            prepare=("split=leave_one_out", "validation=none"),
            recipe="beauty",
            settings=("optimizer.decay=constant",),
            judge="test_unseen",
        )
    if options.epinions:
        yield Case(
            name="Epinions",
            log=options.epinions,
            prepare=("test_time=10000000", "validation=none"),
            recipe="epinions",
            settings=("batches.batch_size=64",),
            judge="test",
        )
    if options.generated:
        log = options.work / f"generated-{options.generated}.parquet"
        sizes = ["--users", str(options.generated // 20), "--items", str(options.generated)]
        # So many events, so evenly spread, that nearly every item has some.
        sizes += ["--events", str(options.generated * 10), "--item-exponent", "0.8"]
        sizes += ["--markov-events", "0"]
        generate = ["synth", "--output", str(log), *sizes]
        if not log.exists():
            run_logged([*SHARDREC, *generate], options.threads, options.work / "synth.log")
        yield Case(
            name="generated",
            log=log,
            prepare=("split=leave_one_out", "validation=none"),
            recipe="demo",
            settings=(
                "batches.batch_size=64",
                "batches.windows=all",
                "catalog.optimizer=rowwise_adagrad",
            ),
            judge="test",
        )


def prepared(case: Case, options: argparse.Namespace) -> Path:
    """The prepared folder of a case."""
    folder: Path = options.work / f"prepared-{case.log.stem}"
    pairs = [pair.split("=", 1) for pair in case.prepare]
    flags = [word for name, value in pairs for word in (f"--{name.replace('_', '-')}", value)]
    stage = ["prepare", "--events", str(case.log), "--output", str(folder), *flags]
    run_logged([*SHARDREC, *stage], options.threads, options.work / "prepare.log")
    return folder


def measure(case: Case, options: argparse.Namespace, results: Results) -> None:
    """Appends the rows of a case that are missing."""
    data = prepared(case, options)
    limit = f"max_steps={options.steps}" if options.steps else f"max_minutes={options.minutes:g}"
    limits = [f"limits.{limit}", "limits.max_epochs=none", "validation.every_epochs=none"]
    for seed in options.seeds:
        for loss in options.losses or (SHARES if options.steps else VARIANTS):
            key = {
                "case": case.name,
                "recipe": case.recipe,
                "loss": loss,
                "seed": seed,
                "settings": [*case.settings, *limits, "validation.patience=none"],
                "workers": options.workers,
                "threads": options.threads,
            }
            if not results.has(key):
                how = argparse.Namespace(
                    **vars(options), recipe=case.recipe, cut_table_gradient=False, keep_runs=False
                )
                facts = {"num_items": Prepared.open(data).num_items, "judge": case.judge}
                results.append(key, **facts, **run_once(key, how, data))


def groups(results: Results) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The rows of each case and limit, by loss, seeds together."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in results.rows:
        title = f"{row['key']['case']}, {row['num_items']:,} items, {limit_of(row)}"
        found.setdefault(title, {}).setdefault(label(row["key"]["loss"]), []).append(row)
    return found


def limit_of(row: dict[str, Any]) -> str:
    """The limit that was equal for all, such as ``2 minutes each``."""
    settings = dict(setting.split("=", 1) for setting in row["key"]["settings"])
    if "limits.max_steps" in settings:
        return f"{int(settings['limits.max_steps']):,} steps each"
    return f"{settings['limits.max_minutes']} minutes each"


def label(loss: str) -> str:
    """Name of a loss in the table, such as ``cce_minus, share 1``."""
    name, _, own = loss.partition(":")
    options = dict(option.split("=") for option in own.split(",") if option)
    share = {"0": "of the batch"}.get(options.get("share", ""), options.get("share"))
    return f"{name}, share {share}" if share else name


def score(row: dict[str, Any]) -> float:
    """NDCG@10 of a row under the protocol of its case."""
    return float(row[row["judge"]]["NDCG@10"])


def page(results: Results) -> str:
    """The table of every case, in Markdown."""
    lines = ["# Which loss for my catalog?", "", "`which_loss.py` says how this was measured."]
    for case, losses in groups(results).items():
        settings = next(iter(losses.values()))[0]["key"]["settings"]
        peaks = [row["peak_gib"] for rows in losses.values() for row in rows]
        lines += ["", f"## {case}", "", f"`{' '.join(settings)}`", ""]
        lines += [f"Peak memory of a worker: {min(peaks):.2f} to {max(peaks):.2f} GiB.", ""]
        lines += ["| loss | NDCG@10 | of seeds | Coverage@10 | steps | s/step | GiB a worker |"]
        lines += ["|---|--:|---|--:|--:|--:|--:|"]
        for loss, rows in losses.items():
            scores = [score(row) for row in rows]
            coverage = statistics.mean(row[row["judge"]]["Coverage@10"] for row in rows)
            cells = [f"{statistics.mean(scores):.4f}", " ".join(f"{s:.4f}" for s in scores)]
            cells += [f"{coverage:.3f}", f"{statistics.mean(row['step'] for row in rows):,.0f}"]
            cells += [f"{statistics.mean(row['seconds_per_step'] for row in rows):.3f}"]
            cells += [f"{max(row['peak_gib'] for row in rows):.2f}"]
            lines.append(f"| {loss} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: Results, path: Path) -> None:
    """A panel for each case and limit: NDCG@10 against seconds per step."""
    found = groups(results)
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(4.4 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    for panel in grid.flat[len(found) :]:
        panel.remove()
    names = list(dict.fromkeys(loss for losses in found.values() for loss in losses))
    colors = {loss: f"C{number}" for number, loss in enumerate(names)}
    for panel, (case, losses) in zip(grid.flat, found.items(), strict=False):
        panel.set_title(case, fontsize=9)
        _draw_panel(panel, losses, colors)
    dots = [Line2D([], [], color=of, marker="o", linestyle="") for of in colors.values()]
    figure.legend(dots, colors, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)


def _draw_panel(
    panel: Axes, losses: dict[str, list[dict[str, Any]]], colors: dict[str, str]
) -> None:
    for loss, rows in losses.items():
        seconds = statistics.mean(row["seconds_per_step"] for row in rows)
        scores = [score(row) for row in rows]
        panel.plot([seconds] * len(scores), scores, "o", markersize=6, color=colors[loss])
    panel.set(xscale="log", xlabel="seconds a step", ylabel="NDCG@10")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.2, y=0.1)
    panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Run the missing measurements, then write the page and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beauty", type=Path, help="event Parquet of Amazon Beauty, 5-core")
    parser.add_argument("--epinions", type=Path, help="event Parquet of Epinions")
    parser.add_argument("--generated", type=int, default=0, metavar="ITEMS")
    parser.add_argument("--minutes", type=float, default=2, help="of training, for every loss")
    parser.add_argument("--steps", type=int, default=0, help="of training, in place of minutes")
    parser.add_argument(
        "--losses", nargs="+", help="default: all; with --steps those that differ in share alone"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--work", type=Path, default=Path("runs/which_loss"))
    parser.add_argument("--output", type=Path, default=RESULTS / "which_loss.jsonl")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.output)
    for case in () if options.page_only else cases(options):
        measure(case, options, results)
    if not results.rows:
        parser.error(
            "there are no rows yet; give at least one of --beauty, --epinions, --generated"
        )
    options.output.with_suffix(".md").write_text(page(results))
    draw(results, options.output.with_suffix(".svg"))
    print(page(results))


if __name__ == "__main__":
    main()
