"""One model a day, in Dagster: prepare → train → evaluate → gate → recommend, export → publish.

    export SHARDREC_ROOT=/data/shop              # the day's log is logs/2026-11-20.parquet below it
    dagster dev -f examples/daily_dagster.py     # choose a day and materialize everything

Every day has a folder of its own below ``days/``. A stage that is complete says so and does
nothing, so a day that failed is started again as a whole. Where the gate refuses a model, nothing
that follows it runs, and what was published stays. By hand, ``shardrec rollback --published
/data/shop/published.json`` goes back to the model before.
"""

from pathlib import Path

import dagster as dg

from shardrec.launch.cli import main

DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-01")
ON_WORKERS = ("train", "evaluate", "recommend", "export")  # the stages that share the catalog
FOR_GOOD = {2: "the input or an option is wrong", 3: "the model must not be published"}


class Shop(dg.ConfigurableResource):
    """Where things are, and how a model is made of a day's log.

    Attributes:
        root: a folder that all workers see.
        model: options of training, as `shardrec train` takes them.
        workers: nodes x workers of the stages that share the catalog; 1x1 needs no launcher.
        scheduler: where the workers run, as `shardrec launch -s` takes it.
        metric: what the gate compares.
        tolerance: share of the published model's value that a new one may lack.
    """

    root: str
    model: list[str] = ["--recipe", "demo"]
    workers: str = "1x1"
    scheduler: str = "local_cwd"
    metric: str = "NDCG@10"
    tolerance: float = 0.02

    def log(self, context: dg.AssetExecutionContext) -> str:
        """The events up to the day."""
        return str(Path(self.root) / "logs" / f"{context.partition_key}.parquet")

    def of_day(self, context: dg.AssetExecutionContext, name: str) -> str:
        """A file or folder of the day."""
        return str(Path(self.root) / "days" / context.partition_key / name)

    def trained(self, context: dg.AssetExecutionContext) -> list[str]:
        """The day's run and the data it belongs to, as options."""
        run, prepared = self.of_day(context, "run"), self.of_day(context, "prepared")
        return ["--run", run, "--prepared", prepared]

    def published(self) -> list[str]:
        """The pointer that the service opens, as an option."""
        return ["--published", str(Path(self.root) / "published.json")]

    def call(self, stage: str, *words: str) -> None:
        """Run a stage to its end: in this process, which Dagster makes for the step, or on workers.

        Raises:
            dagster.Failure: the stage did not succeed; trying again helps where it only failed.
        """
        command = [stage, *words]
        if stage in ON_WORKERS and self.workers != "1x1":
            job = ["launch", "-s", self.scheduler, "--wait", stage, "-j", self.workers]
            command = [*job, "--", *words]
        code = main(command)
        if code:
            said = FOR_GOOD.get(code, "it failed; its output says why")
            raise dg.Failure(
                f"{stage}: exit code {code}, {said}", allow_retries=code not in FOR_GOOD
            )


@dg.asset(partitions_def=DAYS)
def prepared(context: dg.AssetExecutionContext, shop: Shop) -> None:
    """Sequences, splits and catalog of the day's log."""
    shop.call(
        "prepare", "--events", shop.log(context), "--output", shop.of_day(context, "prepared")
    )


@dg.asset(partitions_def=DAYS, deps=[prepared])
def trained(context: dg.AssetExecutionContext, shop: Shop) -> None:
    """A run with its checkpoints; one that was interrupted goes on."""
    shop.call("train", *shop.trained(context), "--resume=auto", *shop.model)


@dg.asset(partitions_def=DAYS, deps=[trained])
def evaluated(context: dg.AssetExecutionContext, shop: Shop) -> None:
    """The metrics over the whole catalog."""
    shop.call("evaluate", *shop.trained(context))


@dg.asset(partitions_def=DAYS, deps=[evaluated])
def gate(context: dg.AssetExecutionContext, shop: Shop) -> None:
    """The comparison with the published model, on the users of the day."""
    rule = ["--metric", shop.metric, "--tolerance", str(shop.tolerance)]
    shop.call("gate", *shop.trained(context), *shop.published(), *rule)


@dg.asset(partitions_def=DAYS, deps=[gate])
def lists(context: dg.AssetExecutionContext, shop: Shop) -> None:
    """The best items of every user."""
    shop.call("recommend", *shop.trained(context), "--output", shop.of_day(context, "lists"))


@dg.asset(partitions_def=DAYS, deps=[gate])
def exported(context: dg.AssetExecutionContext, shop: Shop) -> None:
    """Item vectors and encoder for the service."""
    shop.call("export", *shop.trained(context), "--output", shop.of_day(context, "export"))


@dg.asset(partitions_def=DAYS, deps=[lists, exported])
def published(context: dg.AssetExecutionContext, shop: Shop) -> None:
    """The pointer, when it names this day's model."""
    parts = ["--export", shop.of_day(context, "export"), "--lists", shop.of_day(context, "lists")]
    allowed = ["--gate", shop.of_day(context, "run/gate.json")]
    shop.call("publish", *parts, *allowed, *shop.published())


ASSETS = [prepared, trained, evaluated, gate, lists, exported, published]
DAILY = dg.define_asset_job("daily", selection=ASSETS, partitions_def=DAYS)

defs = dg.Definitions(
    assets=ASSETS,
    resources={"shop": Shop(root=dg.EnvVar("SHARDREC_ROOT"))},
    schedules=[dg.build_schedule_from_partitioned_job(DAILY)],
)
