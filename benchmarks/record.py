"""Keep finished runs: their metrics, one table and one picture, small enough for git.

    pip install -r benchmarks/requirements.txt
    python benchmarks/record.py --out benchmarks/results/dac-100k runs/hopper-medium-replay/dac/seed0-20260101-120000

Writes <out>/<task>-<label>.csv (the run's metrics.csv), <out>/results.csv and <out>/curves.svg.
"""

import csv
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "record"  # the same runs give the same file
import matplotlib.pyplot as plt  # noqa: E402


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders that hold a result.json
    out: Path = Path("benchmarks/results/new")  # folder to write
    labels: tuple[str, ...] = ()  # one per run, where algorithm and seed do not tell them apart: dac-seed0 without
    panels: tuple[str, ...] = ("eval/normalized_score", "train/q_mean", "train/eta", "train/bc_loss")  # what is drawn


def main(args: Args) -> None:
    if args.labels and len(args.labels) != len(args.runs):
        sys.exit(f"error: {len(args.labels)} labels for {len(args.runs)} runs")
    args.out.mkdir(parents=True, exist_ok=True)
    table, curves = [], []
    for i, run in enumerate(args.runs):
        if not (run / "result.json").exists():
            sys.exit(f"error: {run} holds no result.json: it is no run folder, or its run is not finished")
        result, facts = (json.loads((run / name).read_text()) for name in ("result.json", "args.json"))
        label = args.labels[i] if args.labels else f"{result['algorithm']}-seed{result['seed']}"
        name = f"{result['env'].replace('/', '-')}-{label}"
        shutil.copy(run / "metrics.csv", args.out / f"{name}.csv")
        kept = ("env", "algorithm", "seed", "dataset", "sha256", "updates", "final_score", "last_score", "best_score")
        behaviour, hours = facts["dataset"]["mean_score"], result["seconds"] / 3600
        row = {k: result[k] for k in kept} | {"behaviour_score": behaviour, "wall_hours": round(hours, 2)}
        table.append(row | ({"label": label} if args.labels else {}))
        with (run / "metrics.csv").open() as file:
            curves.append((result["env"], label, behaviour, list(csv.DictReader(file))))
    with (args.out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)

    tasks = sorted({task for task, *_ in curves})
    figure, axes = plt.subplots(len(tasks), len(args.panels), figsize=(4 * len(args.panels), 3 * len(tasks)), squeeze=False)
    for line, task in zip(axes, tasks):
        for axis, panel in zip(line, args.panels):
            for own_task, label, behaviour, rows in curves:
                if own_task != task:
                    continue
                points = [(int(row["step"]), float(row[panel])) for row in rows if row.get(panel)]
                if points:
                    axis.plot(*zip(*points), label=label, linewidth=1)
                if panel == "eval/normalized_score":
                    axis.axhline(behaviour, color="grey", linestyle=":", linewidth=1)
            axis.set(title=panel, xlabel="updates", ylabel=task if axis is line[0] else None)
            if panel in ("train/eta", "train/lagrange"):
                axis.set_yscale("log")
        line[0].legend(fontsize=7)
    figure.suptitle("grey: mean score of the data", fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out / "curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
