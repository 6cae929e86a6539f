"""Draws the authors' DAC beside ours, and ours with ten critics, as published.

python benchmarks/fidelity.py    # two-critics.svg and ten-critics.svg in results/fidelity
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "fidelity"  # the same tables give the same file
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402

FOLDER = Path(__file__).resolve().parent / "results" / "fidelity"
DATA_MEAN = 17.7  # normalised score of the data's episodes
DATA_BEST = 97.1  # of its best episode
# the Okabe-Ito colours, which the colour-blind can tell apart
OURS = "#D55E00"
AUTHORS = "#0072B2"


def read(name: str) -> list[dict]:
    with (FOLDER / name).open(newline="") as file:
        return list(csv.DictReader(file))


def plot(axis: plt.Axes, rows: list[dict], column: str, **style) -> None:
    rows = [row for row in rows if row[column]]
    steps = [int(row["step"]) for row in rows]
    values = [float(row[column]) for row in rows]
    axis.plot(steps, values, **style)


def finish(axis: plt.Axes, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("updates")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.3)


def two_critics() -> None:
    rows = read("two-critics.csv")
    authors = [row for row in rows if row["code"] == "authors"]
    ours = [row for row in rows if row["code"] == "dac.py"]
    titles = {
        "q_mean": "mean Q of a minibatch",
        "eta": "weight of the behaviour term, η",
        "bc_loss": "behaviour loss",
        "score": "normalised score, ten episodes",
    }
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), layout="constrained")
    for axis, (column, title) in zip(axes, titles.items()):
        plot(axis, authors, column, color=AUTHORS, linestyle="--", label="authors' code")
        plot(axis, ours, column, color=OURS, label="dac.py")
        finish(axis, title)
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False)
    figure.savefig(FOLDER / "two-critics.svg", metadata={"Date": None})


def ten_critics() -> None:
    rows = read("ten-critics.csv")
    titles = {
        "eval/normalized_score": "normalised score, ten episodes",
        "train/q_mean": "mean Q of a minibatch",
        "train/eta": "weight of the behaviour term, η",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for axis, (column, title) in zip(axes, titles.items()):
        plot(axis, rows, column, color=OURS, label="dac.py")
        finish(axis, title)
    axes[0].axhline(DATA_MEAN, color="black", linestyle=":", label="mean of the data")
    axes[0].axhline(DATA_BEST, color="black", linestyle="--", label="best episode of the data")
    axes[0].legend(frameon=False, loc="center left")
    axes[2].set_yscale("log")
    figure.savefig(FOLDER / "ten-critics.svg", metadata={"Date": None})


if __name__ == "__main__":
    two_critics()
    ten_critics()
    print(f"figures in {FOLDER}")
