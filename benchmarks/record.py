"""Keep finished runs: their metrics, one table and one picture, small enough for git.

    pip install -r benchmarks/requirements.txt
    python benchmarks/record.py --out benchmarks/results/dac-100k runs/hopper-medium-replay/dac/seed0-20260101-120000

Writes the metrics.csv of each run as <out>/<task>-<algorithm>-<label>-seed<k>.csv, <out>/results.csv, which report.py reads, and
<out>/curves.svg. The commands that made the runs belong into a README.md beside them.
"""

import csv
import json
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "record"  # the same runs give the same file
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402

# those of a sweep's table; evaluations: pairs [update of all stages, score]
COLUMNS = ("env", "algorithm", "label", "seed", "dataset", "sha256", "behaviour", "updates", "final_score", "last_score")
COLUMNS += ("best_score", "seconds", "evaluations", "arguments", "versions")


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders that hold a result.json
    out: Path = Path("benchmarks/results/new")  # folder to write
    labels: tuple[str, ...] = ()  # one per run, '' for none, where algorithm and seed do not tell them apart
    panels: tuple[str, ...] = ("eval/normalized_score", "train/q_mean", "train/eta", "train/bc_loss")  # what is drawn


def read_run(folder: Path) -> dict:
    """A finished run: its result, arguments, evaluations [(update of all stages, score)], and the mean score of the data."""
    result, facts = (json.loads((folder / name).read_text()) for name in ("result.json", "args.json"))
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("eval/return")]
    evaluations = [(int(row["step"]), float(row.get("eval/normalized_score") or row["eval/return"])) for row in rows]
    return result | {"arguments": facts["args"], "evaluations": evaluations, "behaviour": facts["dataset"]["mean_score"]}


def main(args: Args) -> None:
    if args.labels and len(args.labels) != len(args.runs):
        sys.exit(f"error: {len(args.labels)} labels for {len(args.runs)} runs")
    args.out.mkdir(parents=True, exist_ok=True)
    table, tasks, names = [], defaultdict(list), set()
    for folder, label in zip(args.runs, args.labels or [""] * len(args.runs)):
        if not (folder / "result.json").exists():
            sys.exit(f"error: {folder} holds no result.json: it is no run folder, or its run is not finished")
        run = read_run(folder) | {"label": label}
        paths = [name for name in ("data", "run_dir", "consistency") if run["arguments"].get(name)]
        run["arguments"] |= {name: Path(run["arguments"][name]).name for name in paths}  # without that machine's folders
        texts = {name: json.dumps(run[name]) for name in ("behaviour", "evaluations", "arguments", "versions")}
        table.append({name: run.get(name, "") for name in COLUMNS} | texts)
        label = "-".join(filter(None, (run["algorithm"], label, f"seed{run['seed']}")))
        name = f"{run['env'].replace('/', '-')}-{label}.csv"
        if name in names:
            sys.exit(f"error: {folder} is the second {name}: --labels tells them apart")
        names.add(name)
        shutil.copy(folder / "metrics.csv", args.out / name)
        with (args.out / name).open() as file:
            tasks[run["env"]].append((label, run["behaviour"], list(csv.DictReader(file))))
    with (args.out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(table)

    figure, axes = plt.subplots(len(tasks), len(args.panels), figsize=(4 * len(args.panels), 3 * len(tasks)), squeeze=False)
    for line, (task, curves) in zip(axes, sorted(tasks.items())):
        for axis, panel in zip(line, args.panels):
            for i, (label, behaviour, rows) in enumerate(curves):
                points = [(int(row["step"]), float(row[panel])) for row in rows if row.get(panel)]
                if points:
                    axis.plot(*zip(*points), color=f"C{i}", label=label, linewidth=1)
                if panel == "eval/normalized_score" and behaviour is not None:
                    axis.axhline(behaviour, color="grey", linestyle=":", linewidth=1)
            axis.set(title=panel, xlabel="updates of all stages", ylabel=task if axis is line[0] else None)
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            if panel in ("train/eta", "train/lagrange"):
                axis.set_yscale("log")
        line[-1].legend(*line[0].get_legend_handles_labels(), fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle("dotted: mean score of the data", fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out / "curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
