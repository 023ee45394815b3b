r"""What attributes of items are worth: for all items, and for items that training has never seen.

``warm`` trains on a log and ranks the catalog for the validation users, with and without
attributes. ``cold`` takes every event of one item in ten out of the training part (they stay as the
last event of a user, which is the test), and asks how often such an item is among the ten best: of
the catalog, and of the items held out. Beside it stand chance and a nearest-neighbour ranking by
attributes alone: the cosine between an item and the mean of the history. Items with equal scores
count with the chance that a random order of them puts the target among the ten.

    python benchmarks/attributes.py beauty.parquet --items beauty_items.parquet --recipe beauty \
        --parts warm cold --modes none add only --seeds 1 --set limits.max_epochs=8
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from record import RESULTS, SHARDREC, Results, run_logged

from shardrec.pipeline.prepared.attribute_rows import PreparedAttributes
from shardrec.pipeline.prepared.folder import Prepared
from shardrec.pipeline.serve import Recommender

K = 10
METRICS = ("NDCG@10", "HitRate@10", "NDCG@10/known", "HitRate@10/known", "HitRate@10/new")


def write_cold_log(log: Path, path: Path, share: float, seed: int) -> None:
    """The log without the events of a random share of the items, unless one is a user's last."""
    table = pq.read_table(log)
    users, items, times = (table[name].to_numpy() for name in ("user_id", "item_id", "timestamp"))
    order = np.lexsort((np.arange(len(users)), times, users))
    is_last = np.append(users[order][1:] != users[order][:-1], True)
    held_out = np.random.default_rng(seed).permutation(np.unique(items))
    held_out = held_out[: int(share * len(held_out))]
    kept = is_last | ~np.isin(items[order], held_out)
    pq.write_table(table.take(pa.array(order[kept])), path)


def prepare(options: argparse.Namespace, part: str) -> Path:
    """The prepared folder of a part."""
    data: Path = options.work / f"prepared-{options.log.stem}-{part}"
    log = options.log
    if part == "cold":
        log = options.work / f"{options.log.stem}-cold.parquet"
        if not log.exists():
            write_cold_log(options.log, log, options.share, seed=1)
    attributes = ["--item-attributes", str(options.items), "--no-admit-items"]
    split = ["--split", "leave_one_out", *([] if part == "warm" else ["--validation", "none"])]
    arguments = ["prepare", "--events", str(log), "--output", str(data), *split, *attributes]
    run_logged([*SHARDREC, *arguments], 1, options.work / "prepare.log")
    return data


def train(
    options: argparse.Namespace, data: Path, key: dict[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Train one run; returns its folder, and time and memory."""
    settings = [f"catalog.attributes={key['mode']}", f"seed={key['seed']}", *key["settings"]]
    if key["id_dropout"]:
        settings.append(f"catalog.id_dropout={key['id_dropout']}")
    run = options.work / "run"
    shutil.rmtree(run, ignore_errors=True)
    off = ["validation.every_epochs=none", "validation.patience=none", "show_progress=false"]
    stage = ["train", "--prepared", str(data), "--run", str(run), "--recipe", key["recipe"]]
    run_logged([*SHARDREC, *stage, *off, *settings], 1, options.work / "train.log")
    end = json.loads((run / "end.json").read_text())
    names = ("step", "epoch", "seconds", "seconds_per_step", "memory_bytes")
    return run, {name: round(end[name], 4) for name in names}


def evaluate(options: argparse.Namespace, data: Path, run: Path, split: str) -> dict[str, Any]:
    """The metrics of a run, with all items as candidates but those of the history."""
    stage = ["evaluate", "--prepared", str(data), "--run", str(run), "--checkpoint", "last"]
    more = ["--split", split, "--filter-seen", "--min-count", "0", "--force"]
    run_logged([*SHARDREC, *stage, *more], 1, options.work / "evaluate.log")
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    found = {name: round(metrics[name], 5) for name in METRICS if metrics.get(name) is not None}
    return found | {name: metrics[name] for name in ("users", "new_target_share")}


def cold_users(data: Path, counts: Tensor) -> tuple[list[Tensor], Tensor]:
    """Histories and targets of the test users whose target never occurs in training."""
    users = pq.read_table(data / "test.parquet")
    targets = torch.tensor([target[0] for target in users["targets"].to_pylist()])
    chosen = (counts[targets] == 0).nonzero()[:, 0]
    histories = users["items"].to_pylist()
    return [torch.tensor(histories[index]) for index in chosen.tolist()], targets[chosen]


def expected_hits(scores: Tensor, target: int, allowed: Tensor) -> float:
    """Chance that the target is among the K best of the allowed items, ties in random order."""
    margin = 1e-6 * max(1.0, abs(float(scores[target])))
    others = allowed.clone()
    others[target] = False
    better = int((scores[others] > scores[target] + margin).sum())
    equal = int(((scores[others] - scores[target]).abs() <= margin).sum())
    return min(1.0, max(0.0, (K - better) / (1 + equal)))


def recalls(states: Tensor, rows: Tensor, users: Any, counts: Tensor) -> dict[str, float]:
    """Recall@10 of states against rows: among all items, and among those held out."""
    is_new, totals = counts == 0, np.zeros(2)
    histories, targets = users
    for state, history, target in zip(states, histories, targets.tolist(), strict=True):
        scores = rows @ state
        unseen = torch.ones(len(rows), dtype=torch.bool)
        unseen[history] = False
        totals += [expected_hits(scores, target, allowed) for allowed in (unseen, unseen & is_new)]
    catalog, held_out = (totals / len(targets)).round(5).tolist()
    return {"catalog": catalog, "held_out": held_out}


def neighbours(data: Path) -> Tensor:
    """(V, values) attributes of each item at unit length, zero where it has none."""
    source = PreparedAttributes.open(Prepared.open(data), None)
    assert source is not None
    num_items = source.prepared.num_items
    found, sizes = source.rows(range(num_items)), source.sizes
    lines = torch.arange(num_items).repeat_interleave(found.offsets.diff())
    values = torch.zeros(num_items, sizes.num_values)
    values[lines, found.codes.long()] = found.shares
    values[:, list(sizes.missing)] = 0
    return F.normalize(torch.cat([values, found.vectors], dim=1))


def measure_neighbours(data: Path, counts: Tensor) -> dict[str, Any]:
    """Recall@10 by attributes alone, for the mean of the history and for its last item."""
    users, rows = cold_users(data, counts), neighbours(data)
    profiles = {
        "mean": torch.stack([F.normalize(rows[items].mean(0), dim=0) for items in users[0]]),
        "last": torch.stack([rows[items[-1]] for items in users[0]]),
    }
    num_new = int((counts == 0).sum())
    chance = {"catalog": round(K / len(counts), 5), "held_out": round(K / num_new, 5)}
    by_profile = {name: recalls(states, rows, users, counts) for name, states in profiles.items()}
    different = len(torch.unique(rows, dim=0))
    return {"users": len(users[1]), "held_out_items": num_new, "different_items": different} | {
        "chance": chance,
        "neighbours": by_profile,
    }


def measure_cold(options: argparse.Namespace, data: Path, run: Path, counts: Tensor) -> Any:
    """Recall@10 of a run on the items held out."""
    folder = options.work / "export"
    stage = ["export", "--run", str(run), "--prepared", str(data), "--output", str(folder)]
    more = ["--checkpoint", "last", "--force"]
    run_logged([*SHARDREC, *stage, *more], 1, options.work / "export.log")
    served, users = Recommender.open(folder, min_count=0), cold_users(data, counts)
    with torch.no_grad():
        parts = [users[0][first : first + 100] for first in range(0, len(users[0]), 100)]
        states = torch.cat([served.states(part) for part in parts])
    return recalls(states, served.scored, users, counts)


def run_part(options: argparse.Namespace, results: Results, part: str) -> None:
    """Append the rows of a part that are missing."""
    data = prepare(options, part)
    counts = Prepared.open(data).item_counts()
    base: dict[str, Any] = {"log": options.log.stem, "part": part}
    if part == "cold" and not results.has(base | {"mode": "neighbours"}):
        results.append(base | {"mode": "neighbours"}, **measure_neighbours(data, counts))
    for seed in options.seeds:
        for mode in options.modes:
            name, _, dropout = mode.partition(":")
            key = base | {"mode": name, "id_dropout": float(dropout or 0), "seed": seed}
            key |= {"recipe": options.recipe, "settings": options.set}
            if results.has(key):
                continue
            run, cost = train(options, data, key)
            measured = evaluate(options, data, run, "validation" if part == "warm" else "test")
            if part == "cold":
                measured["cold"] = measure_cold(options, data, run, counts)
            results.append(key, **measured, **cost)


def main() -> None:
    """Run the missing measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="event Parquet")
    parser.add_argument("--items", type=Path, required=True, help="attributes Parquet")
    parser.add_argument("--recipe", default="beauty")
    parser.add_argument("--parts", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    modes = "none, add, only, or add:SHARE with id_dropout"
    parser.add_argument("--modes", nargs="+", default=["none", "add", "only"], help=modes)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--share", type=float, default=0.1, help="of the items, held out by cold")
    parser.add_argument("--set", nargs="*", default=[], help="options of train: dotted.name=value")
    parser.add_argument("--work", type=Path, default=Path("runs/attributes"))
    parser.add_argument("--output", type=Path, default=RESULTS / "attributes_cpu.jsonl")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.output)
    for part in options.parts:
        run_part(options, results, part)


if __name__ == "__main__":
    main()
