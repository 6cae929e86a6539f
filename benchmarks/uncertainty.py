"""Tests QDQ's uncertainty: a figure and a table of a run whose student is finished.

    python benchmarks/uncertainty.py runs/hopper-medium/qdq/seed0-20260101-120000

1. H at the data's actions, at these plus noise of growing size, and at uniform random actions.
2. Rank correlation of H between two independent draws of its 50 samples, within each group.
3. Spread of the teacher's samples (EDM's Heun sampler, 18 noise levels) against the student's, at
   the same pairs of state and action.
4. Mean of the student's samples against the truncated return of windows that begin halfway between
   two training windows. No network has seen these pairs, but they are from the same trajectories.

Writes uncertainty-DATASET.png, .md and .json into --out.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from root import ROOT
from rows import public
from scipy.stats import spearmanr
from torch import Tensor

import qdq
from common import load_dataset

# standard deviations of the noise on the data's actions, which are clipped to [-1, 1] afterwards
NOISES = (0.1, 0.3, 1.0)
CALIBRATION_LABELS = {
    "windows": "windows",
    "correlation": "correlation of mean sample and return",
    "bias": "mean sample minus return, mean",
    "rms_error": "mean sample minus return, root mean square",
    "mean_H": "H, mean",
    "rank_correlation_of_H_and_error": "rank correlation of H and the absolute error",
    "inside_90_percent_interval": "share of returns inside the samples' 90 % interval",
}


@dataclass
class Args:
    run: Annotated[Path, tyro.conf.Positional]  # run folder of qdq.py
    data: str | None = None  # dataset, by default that of the run
    out: Path = ROOT / "benchmarks" / "results"  # folder of the figure and the table
    rows: int = 2_000  # pairs of state and action per group
    samples: int = 50  # sampled returns per pair
    teacher_levels: int = 18  # noise levels of the teacher's sampler
    seed: int = 0  # seed of pairs and noise


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a, b).statistic)


@torch.no_grad()
def student_samples(agent: qdq.QDQ, obs: Tensor, act: Tensor, samples: int) -> np.ndarray:
    """[B, K], in units of the return."""
    noise = torch.randn(len(obs), samples)
    args = agent.args
    return qdq.sample_returns(agent.student, obs, act, noise, agent.q_range, args).numpy()


@torch.no_grad()
def teacher_samples(
    agent: qdq.QDQ, obs: Tensor, act: Tensor, samples: int, levels: int
) -> np.ndarray:
    """[B, K], in units of the return: Heun steps down the noise levels, and D at the last one."""
    args = agent.args
    grid = qdq.karras_grid(levels, args.t_min, args.t_max, args.karras_rho).float()  # [N, 1]
    obs = obs.repeat_interleave(samples, dim=0)
    act = act.repeat_interleave(samples, dim=0)
    x = args.t_max * torch.randn(len(obs), 1)
    for t, t_next in zip(grid[:-1], grid[1:]):
        x = qdq.heun_step(agent.teacher, obs, act, x, t[None], t_next[None], args)
    x = qdq.denoise(agent.teacher, obs, act, x, grid[-1:], args)
    low, high = agent.q_range
    returns = low + (x + 1) / 2 * (high - low)
    return returns.view(-1, samples).numpy()


def between_windows(arrays: dict, discount: float) -> tuple[np.ndarray, np.ndarray]:
    """First rows and truncated returns of windows half a stride after a training window.

    Windows that the end of the trajectory would shorten are left out.
    """
    begins, _ = qdq.truncated_returns(
        arrays["rew"], arrays["ends"], qdq.WINDOW, qdq.STRIDE, discount
    )
    last_rows = np.flatnonzero(arrays["ends"])
    powers = discount ** np.arange(qdq.WINDOW)
    rows = []
    returns = []
    for row in begins + qdq.STRIDE // 2:
        end = last_rows[np.searchsorted(last_rows, row)] if row <= last_rows[-1] else row
        if end - row >= qdq.WINDOW:
            rewards = arrays["rew"][row : row + qdq.WINDOW].astype(np.float64)
            rows.append(row)
            returns.append(rewards @ powers)
    return np.array(rows, int), np.array(returns)


def groups_of(act: Tensor) -> dict[str, Tensor]:
    """The actions at which H is measured."""
    groups = {"data": act}
    for noise in NOISES:
        groups[f"data + {noise}"] = (act + noise * torch.randn_like(act)).clamp(-1, 1)
    groups["uniform"] = torch.rand_like(act) * 2 - 1
    return groups


def measure(agent: qdq.QDQ, arrays: dict, args: Args) -> tuple[dict, dict]:
    """All numbers of the table, and the arrays of the figure."""
    rng = np.random.default_rng(args.seed)
    all_obs = torch.as_tensor(arrays["obs"])
    all_act = torch.as_tensor(arrays["act"])
    rows = rng.choice(len(all_obs), min(args.rows, len(all_obs)), replace=False)
    obs = all_obs[rows]
    act = all_act[rows]

    # 1 and 2
    table = {}
    figure = {"h": {}}
    for name, actions in groups_of(act).items():
        first = student_samples(agent, obs, actions, args.samples)
        second = student_samples(agent, obs, actions, args.samples)
        h = first.std(axis=1)
        other = second.std(axis=1)
        figure["h"][name] = h
        row = {"mean": float(h.mean())}
        for share in (10, 50, 80, 90):
            row[str(share)] = float(np.percentile(h, share))
        row["rank_correlation"] = rank_correlation(h, other)
        row["sampled_return"] = float(first.mean())
        if name == "data":
            figure["draws"] = (h, other)
        else:  # share of states where H exceeds that of the data's action: 0.5 says nothing
            row["above_data"] = float((h > figure["h"]["data"]).mean())
        table[name] = row

    # 3
    student = figure["h"]["data"]
    teacher = teacher_samples(agent, obs, act, args.samples, args.teacher_levels).std(axis=1)
    figure["spread"] = (teacher, student)
    spread = {
        "teacher_median": float(np.median(teacher)),
        "student_median": float(np.median(student)),
        "rank_correlation": rank_correlation(teacher, student),
    }

    # 4
    begins, returns = between_windows(arrays, agent.args.discount)
    if len(begins) == 0:
        sys.exit("error: no trajectory is long enough for a window between two training windows")
    chosen = rng.choice(len(begins), min(args.rows, len(begins)), replace=False)
    truth = returns[chosen]
    places = begins[chosen]
    samples = student_samples(agent, all_obs[places], all_act[places], args.samples)
    mean = samples.mean(axis=1)
    error = mean - truth
    low, high = np.quantile(samples, (0.05, 0.95), axis=1)
    figure["calibration"] = (mean, truth)
    calibration = {
        "windows": len(chosen),
        "correlation": float(np.corrcoef(mean, truth)[0, 1]),
        "bias": float(error.mean()),
        "rms_error": float(np.sqrt((error**2).mean())),
        "mean_H": float(samples.std(axis=1).mean()),
        "rank_correlation_of_H_and_error": rank_correlation(samples.std(axis=1), np.abs(error)),
        "inside_90_percent_interval": float(((truth > low) & (truth < high)).mean()),
    }
    bottom, top = agent.q_range.tolist()
    result = {
        "pairs": len(obs),
        "H": table,
        "q_range": [bottom, top],
        "samples_inside_range": float(((samples >= bottom) & (samples <= top)).mean()),
        "spread": spread,
        "calibration": calibration,
    }
    return result, figure


def markdown(name: str, result: dict) -> str:
    header = ["action", "mean", "10 %", "50 %", "80 %", "90 %", "rank correlation of two draws"]
    header += ["above the data's", "mean sample"]
    lines = [f"## H on {name}", ""]
    lines += ["H in return units at one action per state; quantiles over states.", ""]
    lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for group, row in result["H"].items():
        cells = [group]
        for key in ("mean", "10", "50", "80", "90", "rank_correlation"):
            cells.append(f"{row[key]:.2f}")
        cells.append(f"{row['above_data']:.2f}" if "above_data" in row else "–")
        cells.append(f"{row['sampled_return']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    spread = result["spread"]
    low, high = result["q_range"]
    lines += [
        "",
        f"The median spread at the data's actions is {spread['teacher_median']:.2f} for the teacher"
        f" and {spread['student_median']:.2f} for the student; their rank correlation over states"
        f" is {spread['rank_correlation']:.2f}.",
        f"Of all samples {result['samples_inside_range']:.1%} are inside the data's range"
        f" {low:.1f} to {high:.1f}.",
        "",
        "| mean sample against the true return of windows not trained on | |",
        "|---|---|",
    ]
    for key, value in result["calibration"].items():
        text = f"{value:,}" if key == "windows" else f"{value:.3g}"
        lines.append(f"| {CALIBRATION_LABELS[key]} | {text} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, name: str, figure: dict) -> None:
    plt.switch_backend("Agg")
    canvas, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    canvas.suptitle(f"QDQ's uncertainty H on {name} (return units)")
    a.boxplot(list(figure["h"].values()), showfliers=False)
    a.set_xticks(range(1, len(figure["h"]) + 1), list(figure["h"]))
    a.set(xlabel="action", ylabel="H")
    scatter(b, figure["draws"], "H, first draw", "H, second draw")
    scatter(c, figure["spread"], "spread of the teacher", "spread of the student, H")
    scatter(d, figure["calibration"], "mean of the student's samples", "truncated return")
    canvas.savefig(path, dpi=80, pil_kwargs={"optimize": True})
    plt.close(canvas)


def scatter(axis: plt.Axes, pair: tuple, xlabel: str, ylabel: str) -> None:
    x, y = pair
    low = min(x.min(), y.min())
    high = max(np.quantile(x, 0.995), np.quantile(y, 0.995))
    axis.scatter(x, y, s=4, alpha=0.4)
    axis.plot([low, high], [low, high], color="black", linewidth=1)
    axis.set(xlabel=xlabel, ylabel=ylabel, xlim=(low, high), ylim=(low, high))


def load_agent(folder: Path) -> tuple[qdq.QDQ, dict]:
    """The agent of a run and its checkpoint."""
    path = folder / "checkpoint.pt" if folder.is_dir() else folder
    if not path.exists():
        sys.exit(f"error: {path} does not exist")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint.get("algorithm") != "qdq":
        sys.exit(f"error: {path} was not written by qdq.py")
    args = qdq.Args(**{**checkpoint["args"], "compile": False})
    agent = qdq.QDQ(checkpoint["obs_dim"], checkpoint["act_dim"], args)
    agent.load_state_dict(checkpoint["agent"])
    if agent.step < args.teacher_steps + args.student_steps:
        sys.exit(f"error: {path}: its student is not finished")
    return agent, checkpoint


def main(argv: list[str] | None = None) -> dict:
    args = tyro.cli(Args, args=argv, description=__doc__)
    torch.manual_seed(args.seed)
    agent, checkpoint = load_agent(args.run)
    run = agent.args
    arrays, info = load_dataset(run.env, args.data or run.data, need_env=False)
    if info["sha256"] != checkpoint["info"]["sha256"]:
        sys.exit(f"error: {args.run} was trained on {checkpoint['info']['id']}: see --data")
    if run.reward_transform == "minus_one":
        arrays["rew"] = arrays["rew"] - 1
    arrays["act"] = arrays["act"].clip(-1 + 1e-5, 1 - 1e-5)
    result, figure = measure(agent, arrays, args)

    name = info["id"]
    stem = f"uncertainty-{name.split('/')[-1].removesuffix('.hdf5').removesuffix('.npz')}"
    facts = {
        "dataset": name,
        "sha256": info["sha256"],
        "args": public(checkpoint)["args"],
        "versions": checkpoint["info"]["versions"],
    }
    text = markdown(name, result)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{stem}.json").write_text(json.dumps({**result, **facts}, indent=1) + "\n")
    (args.out / f"{stem}.md").write_text(text)
    draw(args.out / f"{stem}.png", name, figure)
    print(text)
    return result


if __name__ == "__main__":
    main()
