"""Puts finished runs on one page: tables beside published scores, intervals, learning curves.

    pip install -r benchmarks/requirements.txt
    python benchmarks/report.py benchmarks/results --out benchmarks/REPORT.md

It takes run folders, tables written by sweep.py or record.py, and folders above them; in these it
reads the run folders or, if there are none, the tables named results.csv. It writes the page and,
in a folder beside it with the page's name, the tables as CSV and the pictures.
D4RL, bundled, own and Minari data never share a table or a picture, and only D4RL's stand beside
published scores. Runs are seeds of one row if they have the same name and record, and differ only
in the seed and the other arguments listed in SAME.
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
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter
from root import ROOT
from rows import read_run, read_table
from scipy.stats import bootstrap, trim_mean

from common import TASKS, strip_version

KINDS = {  # first part of a dataset's id: heading and warning
    "d4rl": (
        "D4RL",
        "D4RL's own files, by checksum; evaluated in Gymnasium, which is close to D4RL's simulator"
        " but not identical.",
    ),
    "bundled": (
        "Bundled samples",
        "Small datasets of this project: **not D4RL data**, not comparable with published scores.",
    ),
    "file": (
        "Other files",
        "Stand-ins and own files, whatever their names: **not D4RL data**, not comparable with its"
        " scores.",
    ),
    "minari": (
        "Minari",
        "Scores by the dataset's own reference returns, or raw returns if it has none: not D4RL"
        " scores.",
    ),
}
INTRODUCTION = """Made by `benchmarks/report.py`. **Mean of last five** is the mean of a run's last
five evaluations, or of all if there are fewer; DAC's paper reports the same. **Last policy** is the
policy at the end of a run, over final episodes of its own (in older runs without them: its last
evaluation). **Best** is the best evaluation, picked with hindsight. A column of episodes
belongs to the column before it and counts all seeds together. ± is the population standard
deviation over seeds, as in the papers; for the last policy of a single seed it is the standard
error over its episodes. Square brackets are 95 % bootstrap intervals over seeds; with fewer than
five seeds they are too narrow. The name in brackets behind an algorithm links to the commands that
made its row."""
PUBLISHED = """What the papers print, on D4RL's own data: **no row above can be compared with
these**. Sources are in `published.csv`. A version in brackets is the row's, where it is not the
column's."""
BESIDE = """Ours in bold, then the papers' own rows; their sources are in `published.csv`.
A version in brackets is the published row's, where it is not the column's."""
TOO_FEW = """Too few runs: aggregates need two algorithms with two seeds each on at least three
common tasks with normalised scores."""
# Arguments in which the runs of one row may differ. The policy's updates are compared instead of
# stop_after.
SAME = {"env", "data", "seed", "device", "compile", "run_dir", "resume", "quick", "log_every"}
SAME |= {"checkpoint_minutes", "checkpoint_every", "stop_after", "flow", "consistency"}


@dataclass
class Args:
    # tables of sweep.py or record.py, run folders, or folders above them
    sources: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: Path = Path("benchmarks/REPORT.md")  # the page to write
    reps: int = 2000  # bootstrap samples per interval


class Place(NamedTuple):
    """Where scores are comparable: one task on one dataset."""

    task: str
    dataset: str
    sha256: str


# -------------------------------------------------------------------- runs


def read(source: Path) -> list[dict]:
    """The runs of a source, as rows.py reads them, with their scores for the page."""
    if not source.exists():
        sys.exit(f"error: {source} does not exist")
    folders = [result.parent for result in sorted(source.rglob("result.json"))]
    if folders:
        runs = [read_run(folder) for folder in folders]
    else:
        runs = []
        for table in sorted(source.rglob("results.csv")) if source.is_dir() else [source]:
            own = read_table(table)
            if table.with_name("README.md").exists():  # a record, which holds the commands
                own = [{**run, "record": table.parent} for run in own]
            runs += own
    if not runs:
        sys.exit(f"error: {source} holds no finished run")
    for run in runs:
        add_scores(run)
    return runs


def add_scores(run: dict) -> None:
    """Last policy, its error and the episodes behind each number."""
    trained = [score for update, score in run["evaluations"] if update > 0]
    per_evaluation = run["args"].get("eval_episodes", 0)
    run["episodes"] = per_evaluation * len(trained[-5:])
    run["last"] = run["final_score"]
    run["last_episodes"] = run["final_episodes"]
    if run["last"] is None and trained:
        run["last"] = trained[-1]
        run["last_episodes"] = per_evaluation


def name_of(run: dict) -> str:
    name = run["label"] or run["algorithm"]
    return f"{name} --quick" if run["args"].get("quick") else name


def arrange(runs: list[dict]) -> tuple[dict[Place, dict[str, list[dict]]], list[str]]:
    """{place: {label: runs by seed}}, and a sentence for each run that is left out.

    A label has the arguments in which rows differ.
    """
    families = defaultdict(list)
    left_out = []
    for run in runs:
        if run["score_last_5"] is None:
            seed = f"seed {run['seed']}"
            left_out.append(f"{name_of(run)} on {run['dataset']}, {seed}: no evaluation on the way")
            continue
        task = strip_version(run["env"])
        if task not in TASKS:
            task = run["env"]
        place = Place(task, run["dataset"], run["sha256"])
        families[place, name_of(run), run.get("record")].append(run)

    places = defaultdict(lambda: defaultdict(dict))
    for (place, name, record), family in families.items():
        differing = differing_arguments(family)
        for run in family:
            values = settings(run)
            label = ", ".join([name, *(f"{key} {values.get(key)}" for key in differing)])
            if record is not None:
                label += f" ({record.name})"
            if run["seed"] in places[place][label]:
                words = f"{label} on {place.dataset}, seed {run['seed']}"
                left_out.append(f"{words}: given twice, the later one counts")
            places[place][label][run["seed"]] = run

    def position(place: Place) -> tuple:
        index = TASKS.index(place.task) if place.task in TASKS else len(TASKS)
        return index, place

    ordered = {}
    for place in sorted(places, key=position):
        ordered[place] = {}
        for label, by_seed in sorted(places[place].items()):
            ordered[place][label] = [by_seed[seed] for seed in sorted(by_seed)]
    return ordered, left_out


def settings(run: dict) -> dict:
    """The arguments that tell rows apart."""
    kept = {key: value for key, value in run["args"].items() if key not in SAME}
    return {**kept, "policy_updates": run["policy_updates"]}


def differing_arguments(family: list[dict]) -> list[str]:
    values = defaultdict(set)
    for run in family:
        for key, value in settings(run).items():
            values[key].add(json.dumps(value))
    return sorted(key for key, texts in values.items() if len(texts) > 1)


# -------------------------------------------------------------- statistics


def mean_of(*samples: np.ndarray, axis: int) -> np.ndarray:
    return np.concatenate(samples, axis=axis).mean(axis=axis)


def interquartile_mean(*samples: np.ndarray, axis: int) -> np.ndarray:
    return trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def optimality_gap(*samples: np.ndarray, axis: int) -> np.ndarray:
    """Mean shortfall from 100."""
    missing = 100 - np.concatenate(samples, axis=axis)
    return missing.clip(min=0).mean(axis=axis)


def improvement(*samples: np.ndarray, axis: int) -> np.ndarray:
    """Probability that a run of the first half of the samples beats one of the second half.

    The samples are the tasks of one algorithm, then those of another; ties count half.
    """
    tasks = len(samples) // 2
    shares = []
    for x, y in zip(samples[:tasks], samples[tasks:]):
        x = np.moveaxis(x, axis, -1)[..., :, None]
        y = np.moveaxis(y, axis, -1)[..., None, :]
        wins = (x > y) + 0.5 * (x == y)
        shares.append(wins.mean(axis=(-2, -1)))
    return np.mean(shares, axis=0)


def interval(samples: list[np.ndarray], statistic: Callable, reps: int) -> tuple:
    """Ends of the 95 % bootstrap interval of a statistic.

    samples: an array [..., seeds] per task. Seeds are drawn anew within each task, so that
    differences between tasks add nothing.
    """
    result = bootstrap(
        samples,
        statistic,
        n_resamples=reps,
        batch=100,
        vectorized=True,
        axis=-1,
        method="percentile",
        rng=0,
    )
    return result.confidence_interval.low, result.confidence_interval.high


def summarise(place: Place, label: str, runs: list[dict], reps: int) -> dict:
    """The row of the page for the seeds of one label."""
    row = {**place._asdict(), "algorithm": label, "policy_updates": runs[0]["policy_updates"]}
    row["seeds"] = len(runs)
    row["behaviour"] = runs[0]["behaviour"]
    row["record"] = runs[0].get("record")
    several = len(runs) > 1
    for name, key in (("mean", "score_last_5"), ("last", "last"), ("best", "score_best")):
        scores = np.array([run[key] for run in runs])
        row[name] = scores.mean()
        row[f"{name}_std"] = scores.std() if several else None
    if not several:
        row["last_std"] = runs[0]["final_error"]
    row["episodes"] = sum(run["episodes"] for run in runs)
    row["last_episodes"] = sum(run["last_episodes"] for run in runs)
    row["low"], row["high"] = None, None
    if several:
        means = np.array([run["score_last_5"] for run in runs])
        row["low"], row["high"] = interval([means], mean_of, reps)
    return row


# ------------------------------------------------------------------ tables


def plus_minus(row: dict, name: str) -> str:
    mean = row[name]
    std = row[f"{name}_std"]
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def bracket(low: float | None, high: float | None, digits: int = 1) -> str:
    return "" if low is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def escape(cell: object) -> str:
    """Text that cannot end a cell of a table, nor begin HTML."""
    text = " ".join(str(cell).split())
    return text.replace("|", "\\|").replace("<", "&lt;")


def markdown(header: list, lines: list[list]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows)


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {}
            for key, value in row.items():
                rounded[key] = round(float(value), 4) if isinstance(value, float) else value
            writer.writerow(rounded)


def results_table(rows: list[dict], page: Path) -> str:
    header = ["task", "data, SHA-256", "data's mean", "algorithm", "policy updates", "seeds"]
    header += ["mean of last five", "episodes", "95 % interval", "last policy", "episodes", "best"]
    lines = []
    above = None
    for row in rows:
        mean = "" if row["behaviour"] is None else f"{row['behaviour']:.1f}"
        place = [row["task"], f"`{row['dataset']}` {row['sha256'][:8]}", mean]
        label = row["algorithm"]
        record = row["record"]
        if record is not None:
            bare = label.removesuffix(f"({record.name})")
            label = f"{bare}[({record.name})]({relpath(record, page.parent)})"
        line = place if place != above else ["", "", ""]
        line = [*line, label, f"{row['policy_updates']:,}", row["seeds"]]
        line += [plus_minus(row, "mean"), row["episodes"], bracket(row["low"], row["high"])]
        line += [plus_minus(row, "last"), row["last_episodes"], plus_minus(row, "best")]
        lines.append(line)
        above = place
    return markdown(header, lines)


def published_tables(rows: list[dict], columns: list[str], path: Path | None = None) -> str:
    """Our rows on D4RL data in bold, and under them what the papers print for the same tasks."""
    cells = defaultdict(dict)  # {(method, printed by): {column: text}}
    for row in rows:
        column = row["dataset"].removeprefix("d4rl/")
        cells[f"**{row['algorithm']}**", "here"][column] = f"**{plus_minus(row, 'mean')}**"
    with (ROOT / "benchmarks" / "published.csv").open() as file:
        published = list(csv.DictReader(file))
    for row in published:
        for column in columns:
            if strip_version(column) != row["task"]:
                continue
            text = f"{row['score']} ± {row['std']}" if row["std"] else row["score"]
            if not column.endswith(f"-{row['version']}"):
                text += f" ({row['version']})"
            cells[row["method"], row["paper"]][column] = text
    if path is not None:
        table = []
        for (method, paper), texts in cells.items():
            row = {"method": method, "printed by": paper}
            table.append({**row, **{column: texts.get(column, "") for column in columns}})
        write_csv(path, table)
    tables = []
    for mazes in (False, True):
        own = [column for column in columns if column.startswith("antmaze") == mazes]
        lines = []
        for key, texts in cells.items():
            if texts.keys() & set(own):
                lines.append([*key, *(texts.get(column, "") for column in own)])
        if own:
            tables.append(markdown(["method", "printed by", *own], lines))
    return "\n\n".join(tables)


def aggregates(places: dict, colours: dict[str, tuple], folder: Path, kind: str, reps: int) -> str:
    """Statistics over the tasks, at least three, on which two algorithms have two seeds.

    They include the algorithms that have two seeds on all of these tasks.
    """
    shared = []
    for place, by_label in places.items():
        with_seeds = [label for label, runs in by_label.items() if len(runs) > 1]
        if place.task in TASKS and len(with_seeds) > 1:
            shared.append(place)
    samples = {}  # {label: [an array [seeds] per task]}
    for label in colours:
        own = [places[place].get(label, []) for place in shared]
        seeds = min((len(runs) for runs in own), default=0)  # the first ones where some have more
        if seeds > 1:
            samples[label] = [
                np.array([run["score_last_5"] for run in runs[:seeds]]) for runs in own
            ]
    if len(shared) < 3 or len(samples) < 2:
        return TOO_FEW

    statistics = {
        "mean": mean_of,
        "interquartile mean": interquartile_mean,
        "optimality gap to 100": optimality_gap,
    }
    table = []
    lines = []
    for label, own in samples.items():
        line = [label, f"{len(own[0])} × {len(shared)}"]
        for metric, statistic in statistics.items():
            value = float(statistic(*own, axis=-1))
            low, high = interval(own, statistic, reps)
            line.append(f"{value:.1f} {bracket(low, high)}")
            row = {"metric": metric, "algorithm": label, "value": value}
            table.append({**row, "low": low, "high": high})
        lines.append(line)
    pairs = []
    for first, second in combinations(samples, 2):
        both = [*samples[first], *samples[second]]
        name = f"{first} better than {second}"
        value = float(improvement(*both, axis=-1))
        low, high = interval(both, improvement, reps)
        pairs.append([name, f"{value:.2f} {bracket(low, high, 2)}"])
        row = {"metric": "probability of improvement", "algorithm": name, "value": value}
        table.append({**row, "low": low, "high": high})
    write_csv(folder / f"aggregates-{kind}.csv", table)
    draw_profiles(samples, colours, folder / f"profiles-{kind}.svg", reps)

    note = f"Over {', '.join(sorted({place.task for place in shared}))}."
    missing = [label for label in colours if label not in samples]
    if missing:
        note += f" Not here, for want of two seeds on each of these: {'; '.join(missing)}."
    parts = [note, markdown(["algorithm", "seeds × tasks", *statistics], lines)]
    parts.append(markdown(["pair", "probability that a run of the first scores higher"], pairs))
    parts.append(f"![performance profiles]({folder.name}/profiles-{kind}.svg)")
    return "\n\n".join(parts)


# ---------------------------------------------------------------- pictures


def names_in_pictures(places: dict) -> dict[str, str]:
    """{label: name}, without the record unless a panel would then have one name twice."""
    names = {}
    for by_label in places.values():
        for label, runs in by_label.items():
            record = runs[0].get("record")
            names[label] = label if record is None else label.removesuffix(f" ({record.name})")
    for by_label in places.values():
        if len({names[label] for label in by_label}) < len(by_label):
            return {label: label for label in names}
    return names


def draw_curves(
    places: dict, names: dict[str, str], colours: dict[str, tuple], path: Path, reps: int
) -> None:
    """A panel per place: means over seeds, their 95 % intervals and, dotted, the data's mean.

    names, colours: of each label; the legend shows the names.
    """
    legend = {names[label]: colour for label, colour in colours.items()}
    width = min(3, len(places))
    height = -(-len(places) // width)
    figure, axes = plt.subplots(height, width, squeeze=False, layout="constrained")
    entry = 0.5 + 0.065 * max(map(len, legend))  # inches of a line and its label
    columns = max(1, int(4 * width / entry))
    legend_lines = -(-len(legend) // columns)
    figure.set_size_inches(4 * width, 2.8 * height + 0.2 * legend_lines)
    for axis in axes.flat[len(places) :]:
        axis.axis("off")
    for axis, (place, by_label) in zip(axes.flat, places.items()):
        for label, runs in by_label.items():
            curves = [dict(run["evaluations"]) for run in runs]
            steps = sorted(set.intersection(*map(set, curves)))
            scores = np.array([[curve[step] for curve in curves] for step in steps])
            axis.plot(steps, scores.mean(axis=1), color=colours[label])
            if len(runs) > 1:
                low, high = interval([scores], mean_of, reps)
                axis.fill_between(steps, low, high, color=colours[label], alpha=0.2, linewidth=0)
        behaviours = {run["behaviour"] for runs in by_label.values() for run in runs}
        for behaviour in behaviours - {None}:
            axis.axhline(behaviour, color="grey", linestyle=":")
        title = f"{place.task}\n{place.dataset} {place.sha256[:8]}"
        axis.set(title=title, xlabel="policy updates", ylabel="score")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    lines = [plt.Line2D([], [], color=colour, label=name) for name, colour in legend.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_profiles(samples: dict, colours: dict[str, tuple], path: Path, reps: int) -> None:
    """Share of the runs above each score, with its 95 % interval."""
    top = max(score.max() for own in samples.values() for score in own)
    levels = np.linspace(0, 1.05 * max(1, top), 101)
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    for label, own in samples.items():
        above = [(scores > levels[:, None]).astype(float) for scores in own]  # [levels, seeds]
        low, high = interval(above, mean_of, reps)
        axis.plot(levels, mean_of(*above, axis=-1), color=colours[label], label=label)
        axis.fill_between(levels, low, high, color=colours[label], alpha=0.2, linewidth=0)
    axis.set(xlabel="score", ylabel="share of runs with a higher score")
    axis.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


# -------------------------------------------------------------------- page


def section(kind: str, places: dict, args: Args, folder: Path) -> list[str]:
    """The part of the page on one kind of data, as paragraphs."""
    names = names_in_pictures(places)
    shown = sorted(set(names.values()))
    pairs = matplotlib.colormaps["tab20"].colors  # ten strong colours, each before its pale one
    palette = pairs[::2] + pairs[1::2]
    colours = {label: palette[shown.index(names[label]) % len(palette)] for label in sorted(names)}
    rows = []
    for place, by_label in places.items():
        for label, runs in by_label.items():
            rows.append(summarise(place, label, runs, args.reps))
    table = [{**row, "record": row["record"] and row["record"].name} for row in rows]
    write_csv(folder / f"results-{kind}.csv", table)
    heading, warning = KINDS.get(kind, (kind, "Not comparable with published scores."))
    parts = [f"## {heading}", warning, results_table(rows, args.out)]
    if kind == "d4rl":
        columns = list(dict.fromkeys(row["dataset"].removeprefix("d4rl/") for row in rows))
        beside = published_tables(rows, columns, folder / "beside-published.csv")
        parts += ["### Beside published scores", BESIDE, beside]
    draw_curves(places, names, colours, folder / f"curves-{kind}.svg", args.reps)
    parts += ["### Learning curves", f"![learning curves]({folder.name}/curves-{kind}.svg)"]
    parts += ["Means over seeds with 95 % intervals; dotted: the mean score of the data."]
    parts += ["### All tasks together", aggregates(places, colours, folder, kind, args.reps)]
    return parts


def main(args: Args) -> None:
    if not args.sources or args.reps < 100 or args.out.suffix != ".md":
        sys.exit(
            "error: needed are tables or run folders, an .md file as --out, and --reps of at"
            " least 100"
        )
    plt.switch_backend("svg")
    matplotlib.rcParams["font.size"] = 8
    matplotlib.rcParams["lines.linewidth"] = 1
    matplotlib.rcParams["axes.spines.top"] = False
    matplotlib.rcParams["axes.spines.right"] = False
    matplotlib.rcParams["svg.hashsalt"] = "report"  # the same runs give the same file
    runs = [run for source in args.sources for run in read(source)]
    places, left_out = arrange(runs)
    folder = args.out.parent / args.out.stem.lower()
    folder.mkdir(parents=True, exist_ok=True)

    by_kind = defaultdict(dict)
    for place, by_label in places.items():
        by_kind[place.dataset.split("/")[0]][place] = by_label
    page = ["# Results", INTRODUCTION]
    if "d4rl" not in by_kind:
        page.append(
            "There is no run on D4RL's own files yet; the papers' scores stand apart, at the end."
        )
    for kind in [*KINDS, *sorted(by_kind.keys() - KINDS.keys())]:
        if kind in by_kind:
            page += section(kind, by_kind[kind], args, folder)
    if "d4rl" not in by_kind:
        tables = published_tables([], [f"{task}-v2" for task in TASKS])
        page += ["## Published scores", PUBLISHED, tables]
    if left_out:
        page += ["## Left out", "\n".join(f"* {escape(line)}" for line in left_out)]
    args.out.write_text("\n\n".join(page) + "\n")
    print(f"{args.out}: {len(runs)} runs on {len(places)} datasets")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
