"""Records finished runs as curves, a table and a picture, small enough for git.

    pip install -r benchmarks/requirements.txt
    python benchmarks/record.py runs/hopper-medium/dac/seed0-* --out benchmarks/results/my-dac

For each run it writes <task>-<name>-seed<k>.csv (its metrics) and .json (its arguments); the name
is the run's label or else its algorithm. For all runs it writes results.csv, which report.py
reads, and curves.svg. report.py links to the folder if there is a README.md in it.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import matplotlib.pyplot as plt
import tyro
from matplotlib.ticker import EngFormatter
from rows import public, read_run, six_digits, write_table

PANELS = ("eval/normalized_score", "train/q_mean", "train/eta", "train/bc_loss")
LOGARITHMIC = ("train/eta", "train/lagrange")


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders that hold a result.json
    out: Path = Path("benchmarks/results/new")  # folder to write
    # names of the runs in reports, one each, such as cloning-dac; '' means the algorithm's name
    labels: tuple[str, ...] = ()
    panels: tuple[str, ...] = PANELS  # columns of metrics.csv that are drawn


def read_metrics(folder: Path) -> list[dict]:
    """Rows of metrics.csv, with six significant digits."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name, text in row.items():
            if text and name != "step":
                row[name] = six_digits(float(text))
    return rows


def keep(folder: Path, label: str, out: Path, taken: set[str]) -> tuple[dict, list[dict]]:
    """Copies a run's metrics and arguments; returns its row and its metrics."""
    run = read_run(folder, label)
    name = (label or run["algorithm"]).replace(" ", "-")
    stem = f"{run['env'].replace('/', '-')}-{name}-seed{run['seed']}"
    if stem in taken:
        sys.exit(f"error: {folder} is the second {stem}: --labels tells them apart")
    taken.add(stem)
    metrics = read_metrics(folder)
    with (out / f"{stem}.csv").open("w", newline="") as file:
        columns = metrics[0] if metrics else ["step"]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(metrics)
    facts = json.loads(run["arguments"].read_text())
    run["arguments"] = out / f"{stem}.json"
    run["arguments"].write_text(json.dumps(public(facts), indent=1) + "\n")
    return run, metrics


def draw(runs: list[dict], curves: list[list[dict]], panels: tuple[str, ...], path: Path) -> None:
    """A line of panels per task, a curve per run; the seeds of one name share a colour."""
    tasks = sorted({run["env"] for run in runs})
    names = list(dict.fromkeys(run["label"] or run["algorithm"] for run in runs))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    figure, axes = plt.subplots(len(tasks), len(panels), squeeze=False)
    figure.set_size_inches(4 * len(panels), 3 * len(tasks))
    for line, task in zip(axes, tasks):
        own = [(run, rows) for run, rows in zip(runs, curves) if run["env"] == task]
        for axis, panel in zip(line, panels):
            drawn = set()
            for run, rows in own:
                name = run["label"] or run["algorithm"]
                label = None if name in drawn else name  # a name stands in the legend once
                drawn.add(name)
                steps = [int(row["step"]) for row in rows if row.get(panel)]
                values = [row[panel] for row in rows if row.get(panel)]
                axis.plot(steps, values, color=colours[name], label=label, linewidth=1)
                if panel == "eval/normalized_score" and run["behaviour"] is not None:
                    axis.axhline(run["behaviour"], color="grey", linestyle=":", linewidth=1)
            axis.set(title=panel, xlabel="updates of all stages")
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            if panel in LOGARITHMIC:
                axis.set_yscale("log")
        line[0].set_ylabel(task)
        line[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle("one line per seed; dotted: mean score of the data", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(args: Args) -> None:
    if not args.runs:
        sys.exit("error: name at least one run folder")
    if args.labels and len(args.labels) != len(args.runs):
        sys.exit(f"error: {len(args.labels)} labels for {len(args.runs)} runs")
    plt.switch_backend("svg")
    matplotlib.rcParams["svg.hashsalt"] = "record"  # the same runs give the same file
    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    curves = []
    taken = set()
    for folder, label in zip(args.runs, args.labels or [""] * len(args.runs)):
        run, metrics = keep(folder, label, args.out, taken)
        runs.append(run)
        curves.append(metrics)
    write_table(args.out / "results.csv", runs)
    draw(runs, curves, args.panels, args.out / "curves.svg")
    print(f"{len(runs)} runs in {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
