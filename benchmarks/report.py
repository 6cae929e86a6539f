"""Finished runs beside the published scores: tables, intervals, learning curves and aggregates on one page.

    pip install -r benchmarks/requirements.txt
    python benchmarks/report.py benchmarks/results --out benchmarks/REPORT.md

Takes run folders, tables written by sweep.py or record.py, and folders that hold some: run folders or, where there are none,
tables named results.csv. Writes the page and, in a folder beside it that is named after it, its tables as CSV and its pictures.
D4RL, bundled, own and Minari data never share a table or a picture, and only D4RL's stand beside published scores. Runs are
seeds of one row if they have one label and record, and their arguments differ in nothing else.

Shapes: S runs (seeds), T tasks. The score of a run is the mean of its last five evaluations, as the papers report it.
"""

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from os.path import relpath
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib
import numpy as np
import tyro
from rliable import library, metrics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from record import read_run

from common import TASKS, strip_version

matplotlib.use("svg")
matplotlib.rcParams |= {"font.size": 8, "lines.linewidth": 1, "axes.spines.top": False, "axes.spines.right": False}
matplotlib.rcParams["svg.hashsalt"] = "report"  # the same runs give the same file
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402

KINDS = {  # first part of a dataset's id: heading, and what a reader must know
    "d4rl": ("D4RL", "D4RL's own files, by checksum; evaluated in Gymnasium, close to D4RL's simulator but not bitwise it."),
    "bundled": ("Bundled samples", "Small datasets of this project: **not D4RL data**, not comparable with published scores."),
    "file": ("Other files", "Stand-ins and own files, whatever their names: **not D4RL data**, not comparable with its scores."),
    "minari": ("Minari", "Scores by a dataset's own reference returns, raw returns where it has none: not D4RL scores."),
}
INTRODUCTION = """Made by `benchmarks/report.py`. **Mean of last five** is the mean of the last five evaluations of a run, of all
where there are fewer, as the papers report it. Last and best are single evaluations; best is picked with hindsight. ± is the
population standard deviation over seeds, as in the papers. Square brackets are 95 % stratified bootstrap intervals over seeds;
with fewer than five seeds they are too narrow. Episodes are those behind the mean of last five, of all seeds together. The name
in brackets behind an algorithm leads to the commands that made its row."""
PUBLISHED = """What the papers print, on D4RL's own data: **no row above can be compared with these**. Sources are in
`published.csv`. A version in brackets is that of the row where it is not the column's."""
BESIDE = """Ours in bold, then the papers' own rows; their sources are in `published.csv`. A version in brackets is that of the
published row where it is not the column's."""
# arguments in which the runs of one row may differ
SAME = {"env", "data", "seed", "device", "compile", "run_dir", "quick", "log_every", "checkpoint_every", "flow", "consistency"}


@dataclass
class Args:
    sources: Annotated[tuple[Path, ...], tyro.conf.Positional]  # tables of sweep.py, run folders, or folders above them
    out: Path = Path("benchmarks/REPORT.md")  # page to write
    reps: int = 2000  # bootstrap samples per interval


class Place(NamedTuple):
    """Where scores are comparable: one task on one dataset."""

    task: str
    dataset: str
    sha256: str


def read_table(path: Path) -> list[dict]:
    with path.open() as file:
        rows = [{"behaviour": "null"} | row for row in csv.DictReader(file)]
    record = {"record": path.parent} if path.with_name("README.md").exists() else {}  # which holds the commands
    json_columns = ("seed", "arguments", "evaluations", "behaviour")
    return [row | record | {name: json.loads(row[name]) for name in json_columns} for row in rows]


def read(source: Path) -> list[dict]:
    """The runs of a source; evaluations are [(policy updates, score)], and `final` is the mean of the last five."""
    runs = []
    folders = [result.parent for result in sorted(source.rglob("result.json"))]
    for path in folders or sorted(source.rglob("results.csv")) or [source]:
        try:
            found = read_table(path) if path.is_file() else [read_run(path)]
            for run in found:
                # Steps count all stages, of which the policy's updates are the last total_steps; their end is evaluated.
                before = run["evaluations"][-1][0] - run["arguments"]["total_steps"] if run["evaluations"] else 0
                run["evaluations"] = [(step - before, score) for step, score in run["evaluations"]]
                if scores := [score for step, score in run["evaluations"] if step > 0]:
                    run |= {"final": float(np.mean(scores[-5:])), "last": scores[-1], "best": max(scores)}
                    run["episodes"] = run["arguments"]["eval_episodes"] * len(scores[-5:])
        except (OSError, KeyError, TypeError, ValueError) as error:
            sys.exit(f"error: {path} is neither a table of sweep.py nor a folder with finished runs ({error!r:.100})")
        runs += found
    return runs or sys.exit(f"error: {source} holds no finished run")


def arrange(runs: list[dict]) -> tuple[dict[Place, dict[str, list[dict]]], list[str]]:
    """{place: {label: runs by seed}}, and in words what was left out. A label names what tells rows apart."""
    families, left_out = defaultdict(list), []
    for run in runs:
        task = strip_version(run["env"]) if strip_version(run["env"]) in TASKS else run["env"]
        name = " ".join(filter(None, (run["algorithm"], run.get("label"), run["arguments"].get("quick") and "--quick")))
        if "final" in run:
            families[Place(task, run["dataset"], run["sha256"]), name, run.get("record")].append(run)
        else:
            left_out.append(f"{name} on {run['dataset']}, seed {run['seed']}: not evaluated")
    places = defaultdict(lambda: defaultdict(dict))
    for (place, name, record), family in families.items():
        names = set().union(*(run["arguments"] for run in family)) - SAME
        values = {key: {json.dumps(run["arguments"][key]) for run in family if key in run["arguments"]} for key in names}
        differing = sorted(key for key in names if len(values[key]) > 1)
        for run in family:
            label = ", ".join([name, *(f"{key} {run['arguments'].get(key)}" for key in differing)])
            label += f" ({record.name})" if record else ""
            if run["seed"] in places[place][label]:
                left_out.append(f"{label} on {place.dataset}, seed {run['seed']}: given twice, the later one counts")
            places[place][label][run["seed"]] = run
    order = sorted(places, key=lambda place: (TASKS.index(place.task) if place.task in TASKS else len(TASKS), place))
    return {p: {label: [runs[s] for s in sorted(runs)] for label, runs in sorted(places[p].items())} for p in order}, left_out


def interval(scores, reps: int, statistic: Callable = lambda scores: scores.mean(0)) -> np.ndarray:
    """[2, ...] ends of the 95 % stratified bootstrap interval of a statistic: seeds are drawn anew within each task.

    scores: [S, T], or a list of such arrays for a statistic of several algorithms.
    """
    np.random.seed(0)  # rliable draws from numpy's global generator
    return library.get_interval_estimates({"": scores}, statistic, reps=reps)[1][""]


def summarise(place: Place, label: str, runs: list[dict], reps: int) -> dict:
    row = place._asdict() | {"algorithm": label, "policy_updates": runs[0]["arguments"]["total_steps"], "seeds": len(runs)}
    row["episodes"] = sum(run["episodes"] for run in runs)
    row |= {name: runs[0].get(name) for name in ("behaviour", "record")}
    for name in ("final", "last", "best"):
        scores = np.array([run[name] for run in runs])
        row |= {f"{name}_mean": scores.mean(), f"{name}_std": scores.std() if len(runs) > 1 else None}
    final = np.array([[run["final"]] for run in runs])
    low, high = interval(final, reps)[:, 0] if len(runs) > 1 else (None, None)
    return row | {"final_low": low, "final_high": high}


def plus_minus(row: dict, name: str) -> str:
    mean, std = row[f"{name}_mean"], row[f"{name}_std"]
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def bracket(low: float | None, high: float | None, digits: int = 1) -> str:
    return "" if low is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def markdown(header: list, lines: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, ["---"] * len(header), *lines])


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows)


def results_table(rows: list[dict], page: Path) -> str:
    lines, above = [], None
    for row in rows:
        mean = "" if row["behaviour"] is None else f"{row['behaviour']:.1f}"
        place = (row["task"], f"`{row['dataset']}` {row['sha256'][:8]}", mean)
        label, record = row["algorithm"], row["record"]
        if record:
            label = f"{label.removesuffix(f'({record.name})')}[({record.name})]({relpath(record, page.parent)})"
        lines.append([*(place if place != above else ("", "", "")), label, f"{row['policy_updates']:,}"])
        lines[-1] += [row["seeds"], row["episodes"], plus_minus(row, "final"), bracket(row["final_low"], row["final_high"])]
        lines[-1] += [plus_minus(row, "last"), plus_minus(row, "best")]
        above = place
    names = ["task", "data, SHA-256", "data's mean", "algorithm", "policy updates", "seeds", "episodes", "mean of last five"]
    return markdown([*names, "95 % interval", "last", "best"], lines)


def published_tables(rows: list[dict], columns: list[str], path: Path | None = None) -> str:
    """Our rows on D4RL data in bold, and under them what the papers print for the same tasks: locomotion, then AntMaze."""
    cells = defaultdict(dict)  # {(method, printed by): {column: text}}
    for row in rows:
        cells[f"**{row['algorithm']}**", "here"][row["dataset"].removeprefix("d4rl/")] = f"**{plus_minus(row, 'final')}**"
    with (Path(__file__).resolve().parent / "published.csv").open() as file:
        for row in csv.DictReader(file):
            for column in columns:
                if strip_version(column) == row["task"]:
                    text = f"{row['score']} ± {row['std']}" if row["std"] else row["score"]
                    version = "" if column.endswith(f"-{row['version']}") else f" ({row['version']})"
                    cells[row["method"], row["paper"]][column] = text + version
    if path:
        head = ({"method": method, "printed by": paper} for method, paper in cells)
        write_csv(path, [names | {c: texts.get(c, "") for c in columns} for names, texts in zip(head, cells.values())])
    tables = []
    for mazes in (False, True):
        own = [column for column in columns if column.startswith("antmaze") == mazes]
        lines = [[*key, *(texts.get(column, "") for column in own)] for key, texts in cells.items() if texts.keys() & set(own)]
        tables += [markdown(["method", "printed by", *own], lines)] if own else []
    return "\n\n".join(tables)


def draw_curves(places: dict, colours: dict[str, tuple], path: Path, reps: int) -> None:
    """A panel per place: means over seeds, their pointwise 95 % intervals and, dotted, the mean score of the data."""
    width = min(3, len(places))
    figure, axes = plt.subplots(-(-len(places) // width), width, squeeze=False, layout="constrained")
    columns = max(1, int(4 * width / (0.5 + 0.065 * max(map(len, colours)))))  # of the legend; in inches a line and its label
    figure.set_size_inches(4 * width, 2.8 * len(axes) + 0.2 * -(-len(colours) // columns))
    for axis in axes.flat[len(places) :]:
        axis.axis("off")
    for axis, (place, own) in zip(axes.flat, places.items()):
        for label, runs in own.items():
            curves = [dict(run["evaluations"]) for run in runs]
            steps = sorted(set.intersection(*map(set, curves)))
            scores = np.array([[curve[step] for step in steps] for curve in curves])
            axis.plot(steps, scores.mean(0), color=colours[label])
            if len(runs) > 1:
                axis.fill_between(steps, *interval(scores, reps), color=colours[label], alpha=0.2, linewidth=0)
        for behaviour in {run["behaviour"] for runs in own.values() for run in runs if run.get("behaviour")}:
            axis.axhline(behaviour, color="grey", linestyle=":")
        axis.set(title=f"{place.task}\n{place.dataset} {place.sha256[:8]}", xlabel="policy updates", ylabel="score")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    lines = [plt.Line2D([], [], color=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_profiles(scores: dict[str, np.ndarray], colours: dict[str, tuple], path: Path, reps: int) -> None:
    levels = np.linspace(0, 1.05 * max(1, *(x.max() for x in scores.values())), 101)
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    profiles, ends = library.create_performance_profile(scores, levels, reps=reps)
    for label in scores:
        axis.plot(levels, profiles[label], color=colours[label], label=label)
        axis.fill_between(levels, *ends[label], color=colours[label], alpha=0.2, linewidth=0)
    axis.set(xlabel="score", ylabel="share of runs with a higher score")
    axis.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def aggregates(places: dict, colours: dict[str, tuple], folder: Path, kind: str, reps: int) -> str:
    """rliable's metrics over the tasks on which at least two algorithms have two seeds, for those that have them on all."""
    enough = {place: sum(len(runs) > 1 for runs in own.values()) > 1 for place, own in places.items()}
    shared = {place: own for place, own in places.items() if enough[place] and place.task in TASKS}
    seeds = {label: min((len(own.get(label, ())) for own in shared.values()), default=0) for label in colours}
    scores = {}  # [S, T]; the first seeds where some tasks have more
    for label in (label for label in colours if seeds[label] > 1):
        scores[label] = np.array([[run["final"] for run in own[label][: seeds[label]]] for own in shared.values()]).T
    if len(scores) < 2:
        return "Too few runs: aggregate metrics need two algorithms with two seeds each on the same tasks with normalised scores."

    def statistic(x: np.ndarray) -> np.ndarray:
        return np.array([x.mean(), metrics.aggregate_iqm(x), metrics.aggregate_optimality_gap(x, gamma=100)])

    def better(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.array([metrics.probability_of_improvement(x, y)])

    names, rows, lines, pairs = ("mean", "interquartile mean", "optimality gap to 100"), [], [], []
    for label, x in scores.items():
        values = list(zip(names, statistic(x), *interval(x, reps, statistic)))
        lines.append([label, f"{len(x)} × {len(shared)}", *(f"{value:.1f} {bracket(*ends)}" for _, value, *ends in values)])
        rows += [{"metric": name, "algorithm": label, "value": v, "low": low, "high": high} for name, v, low, high in values]
    for x, y in combinations(scores, 2):
        pair, name = [scores[x], scores[y]], f"{x} better than {y}"
        (value,), ((low,), (high,)) = better(*pair), interval(pair, reps // 10, better)  # a tenth: each takes a millisecond
        pairs.append([name, f"{value:.2f} {bracket(low, high, 2)}"])
        rows.append({"metric": "probability of improvement", "algorithm": name, "value": value, "low": low, "high": high})
    write_csv(folder / f"aggregates-{kind}.csv", rows)
    draw_profiles(scores, colours, folder / f"profiles-{kind}.svg", reps)
    note = f"Over {', '.join(sorted({place.task for place in shared}))}."
    if left := [label for label in colours if label not in scores]:
        note += f" Not here, for want of two seeds on each of these: {'; '.join(left)}."
    parts = [note, markdown(["algorithm", "seeds × tasks", *names], lines)]
    parts += [markdown(["pair", "probability that a run of the first scores higher"], pairs)]
    return "\n\n".join([*parts, f"![performance profiles]({folder.name}/profiles-{kind}.svg)"])


def main(args: Args) -> None:
    if not args.sources or args.reps < 100 or args.out.suffix != ".md":
        sys.exit("error: needed are tables or run folders, an .md file for --out, and --reps of 100 or more")
    runs = [run for source in args.sources for run in read(source)]
    places, left_out = arrange(runs)
    folder = args.out.parent / args.out.stem.lower()
    folder.mkdir(parents=True, exist_ok=True)
    page = ["# Results", INTRODUCTION]
    if not (on_d4rl := any(place.dataset.startswith("d4rl/") for place in places)):
        page.append("No run on D4RL's own files so far: the papers' scores stand apart, at the end.")
    for kind in [*KINDS, *sorted({place.dataset.split("/")[0] for place in places} - KINDS.keys())]:
        own = {place: by_label for place, by_label in places.items() if place.dataset.split("/")[0] == kind}
        if not own:
            continue
        labels = sorted({label for by_label in own.values() for label in by_label})
        palette = matplotlib.colormaps["tab10" if len(labels) <= 10 else "tab20"].colors
        colours = {label: palette[i % len(palette)] for i, label in enumerate(labels)}
        rows = [summarise(place, label, seeds, args.reps) for place, by_label in own.items() for label, seeds in by_label.items()]
        write_csv(folder / f"results-{kind}.csv", rows)
        page += ["## {}\n\n{}".format(*KINDS.get(kind, (kind, "Not comparable with published scores.")))]
        page += [results_table(rows, args.out)]
        if kind == "d4rl":
            columns = list(dict.fromkeys(row["dataset"].removeprefix("d4rl/") for row in rows))
            page += ["### Beside published scores", BESIDE, published_tables(rows, columns, folder / "beside-published.csv")]
        draw_curves(own, colours, folder / f"curves-{kind}.svg", args.reps)
        page += [f"### Learning curves\n\n![learning curves]({folder.name}/curves-{kind}.svg)"]
        page += ["Means over seeds with 95 % intervals; dotted: the mean score of the data."]
        page += ["### All tasks together", aggregates(own, colours, folder, kind, args.reps)]
    if not on_d4rl:
        page += ["## Published scores", PUBLISHED, published_tables([], [f"{task}-v2" for task in TASKS])]
    page += ["## Left out\n\n" + "\n".join(f"* {line}" for line in left_out)] if left_out else []
    args.out.write_text("\n\n".join(page) + "\n")
    print(f"{args.out}: {len(runs)} runs on {len(places)} datasets")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
