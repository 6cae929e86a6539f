"""Does QDQ's uncertainty mean anything? A figure and a table from a run of qdq.py whose student is finished.

    python benchmarks/uncertainty.py runs/hopper-medium/qdq/seed0-20260101-120000 --data hopper_medium-v2.hdf5

1. H at the data's actions, at these plus noise of growing size, and at uniform random actions.
2. Rank correlation of H between two independent draws of its 50 samples, within each of these groups.
3. Spread of the teacher's samples (EDM's Heun sampler, 18 noise levels) against the student's, at the same pairs.
4. Mean of the student's samples against the truncated return of windows that begin halfway between two training windows:
   pairs that no network has seen, but from the same trajectories.

Writes uncertainty-DATASET.png, .md and .json into --out. Needs matplotlib.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import qdq
from common import UserError, load_dataset

NOISES = (0.1, 0.3, 1.0)  # standard deviations of the noise on the data's actions, which are clipped to [-1, 1] afterwards


@dataclass
class Args:
    checkpoint: Annotated[Path, tyro.conf.Positional]  # of qdq.py, or its run folder
    data: str | None = None  # dataset, by default as in the run
    out: Path = Path(__file__).resolve().parent / "results"  # folder of the figure and the table
    rows: int = 2_000  # pairs per group
    samples: int = 50  # returns per pair
    teacher_levels: int = 18  # noise levels of the teacher's sampler
    seed: int = 0  # of pairs and noise


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, of values without ties."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


@torch.no_grad()
def student_samples(agent: qdq.QDQ, cond: Tensor, samples: int) -> Tensor:
    """[B, K], in return units."""
    return qdq.sample_returns(agent.student, cond, torch.randn(len(cond), samples), agent.args)


@torch.no_grad()
def teacher_samples(agent: qdq.QDQ, cond: Tensor, samples: int, levels: int) -> Tensor:
    """[B, K], in return units: Heun steps down the grid of noise levels, and one of Euler to 0, which gives D itself."""
    args = agent.args
    grid = qdq.karras_grid(levels, args.t_min, args.t_max, args.karras_rho).float()

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return qdq.consistency(agent.teacher, cond, x, t.view(1, 1), 0, args.sigma_data)

    x = args.t_max * torch.randn(len(cond), samples)
    for t, t_next in zip(grid, grid[1:]):
        x = qdq.heun_step(denoiser, x, t, t_next)
    low, high = agent.student.q_range
    return low + (denoiser(x, grid[-1]) + 1) / 2 * (high - low)


def between_windows(arrays: dict[str, np.ndarray], args: qdq.Args) -> tuple[np.ndarray, np.ndarray]:
    """First rows and truncated returns of the full windows that begin half a stride after a training window."""
    rows, _ = qdq.truncated_returns(arrays["rew"], arrays["ends"], qdq.WINDOW, qdq.STRIDE, args.discount)
    ends = np.flatnonzero(arrays["ends"])
    rows = rows + qdq.STRIDE // 2
    rows = rows[rows < len(arrays["rew"])]
    rows = rows[ends[np.searchsorted(ends, rows)] - rows >= qdq.WINDOW]  # not shortened by the trajectory's end
    powers = args.discount ** np.arange(qdq.WINDOW)
    return rows, np.array([arrays["rew"][row : row + qdq.WINDOW].astype(np.float64) @ powers for row in rows])


def measure(agent: qdq.QDQ, arrays: dict[str, np.ndarray], args: Args) -> dict:
    """All numbers of the table, and the arrays of the figure under "figure"."""
    rng = np.random.default_rng(args.seed)
    obs, act = torch.as_tensor(arrays["obs"]), torch.as_tensor(arrays["act"])
    index = torch.as_tensor(rng.choice(len(obs), min(args.rows, len(obs)), replace=False))
    groups = {"data": act[index]}
    groups |= {f"data + {noise}": (act[index] + noise * torch.randn_like(act[index])).clamp(-1, 1) for noise in NOISES}
    groups["uniform"] = torch.rand_like(act[index]) * 2 - 1
    table, figure = {}, {"h": {}}
    for name, actions in groups.items():
        cond = torch.cat([obs[index], actions], 1)
        first, second = (student_samples(agent, cond, args.samples) for _ in range(2))
        h, other = (x.std(1, unbiased=False).numpy() for x in (first, second))
        figure["h"][name] = h
        quantiles = dict(zip(("10", "50", "80", "90"), np.quantile(h, (0.1, 0.5, 0.8, 0.9)).tolist()))
        table[name] = {"mean": float(h.mean())} | quantiles
        table[name] |= {"rank_correlation": rank_correlation(h, other), "sampled_return": first.mean().item()}
        if name == "data":
            figure["draws"] = (h, other)
            figure["spread"] = (teacher_samples(agent, cond, args.samples, args.teacher_levels).std(1).numpy(), h)
        else:  # the share of states where H is larger than at the data's action: 0.5 if it means nothing
            table[name]["above_data"] = float((h > figure["h"]["data"]).mean())
    rows, returns = between_windows(arrays, agent.args)
    if not len(rows):
        raise UserError("no trajectory is long enough for a window between two training windows")
    chosen = rng.choice(len(rows), min(args.rows, len(rows)), replace=False)
    cond = torch.cat([obs[rows[chosen]], act[rows[chosen]]], 1)
    samples = student_samples(agent, cond, args.samples).numpy()
    mean, truth = samples.mean(1), returns[chosen]
    figure["calibration"] = (mean, truth)
    teacher, student = figure["spread"]
    inside = (samples >= agent.student.q_range[0].item()) & (samples <= agent.student.q_range[1].item())
    result = {
        "pairs": len(index),
        "H": table,
        "q_range": agent.student.q_range.tolist(),
        "samples_inside_range": float(inside.mean()),
    }
    result["spread"] = {"teacher_median": float(np.median(teacher)), "student_median": float(np.median(student))}
    result["spread"]["rank_correlation"] = rank_correlation(teacher, student)
    result["calibration"] = {
        "windows": len(chosen),
        "correlation": float(np.corrcoef(mean, truth)[0, 1]),
        "bias": float((mean - truth).mean()),
        "rms_error": float(np.sqrt(((mean - truth) ** 2).mean())),
        "mean_H": float(samples.std(1).mean()),
        "rank_correlation_of_H_and_error": rank_correlation(samples.std(1), np.abs(mean - truth)),
        "inside_90_percent_interval": float(
            ((truth > np.quantile(samples, 0.05, 1)) & (truth < np.quantile(samples, 0.95, 1))).mean()
        ),
    }
    return result | {"figure": figure}


def markdown(name: str, result: dict) -> str:
    lines = [f"## H on {name}", "", "H in return units at one action per state; quantiles over states.", ""]
    lines += ["| action | mean | 10 % | 50 % | 80 % | 90 % | rank correlation of two draws | above the data's | mean sample |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for group, row in result["H"].items():
        numbers = " | ".join(f"{row[key]:.2f}" for key in ("mean", "10", "50", "80", "90", "rank_correlation"))
        above = f"{row['above_data']:.2f}" if "above_data" in row else "–"
        lines.append(f"| {group} | {numbers} | {above} | {row['sampled_return']:.1f} |")
    spread, low_high = result["spread"], result["q_range"]
    lines += ["", f"Spread at the data's actions, median: teacher {spread['teacher_median']:.2f},"]
    lines += [f"student {spread['student_median']:.2f}; rank correlation {spread['rank_correlation']:.2f}. Of all samples"]
    lines += [f"{result['samples_inside_range']:.1%} are inside the data's range {low_high[0]:.1f} to {low_high[1]:.1f}.", ""]
    lines += ["| windows between two training windows | value |", "|---|---|"]
    lines += [f"| {key.replace('_', ' ')} | {value:.3g} |" for key, value in result["calibration"].items()]
    return "\n".join(lines) + "\n"


def draw(path: Path, name: str, figure: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(10, 8), constrained_layout=True)
    canvas.suptitle(f"QDQ's uncertainty H on {name} (return units)")
    a.boxplot(list(figure["h"].values()), showfliers=False)
    a.set_xticks(range(1, len(figure["h"]) + 1), list(figure["h"]))
    a.set(xlabel="action", ylabel="H")
    for axis, (x, y), labels in (
        (b, figure["draws"], ("H, first draw", "H, second draw")),
        (c, figure["spread"], ("spread of the teacher", "spread of the student, H")),
        (d, figure["calibration"], ("mean of the student's samples", "truncated return")),
    ):
        limits = (min(x.min(), y.min()), max(np.quantile(x, 0.995), np.quantile(y, 0.995)))
        axis.scatter(x, y, s=4, alpha=0.4)
        axis.plot(limits, limits, color="black", linewidth=1)
        axis.set(xlabel=labels[0], ylabel=labels[1], xlim=limits, ylim=limits)
    canvas.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict:
    args = tyro.cli(Args, args=argv, description=__doc__)
    state = qdq.load_checkpoint(args.checkpoint)
    run = qdq.Args(**state["args"])
    if state["agent"]["steps"]["student"] < run.student_steps:
        raise UserError(f"{state['path']}: its student is not finished", status=2)
    arrays, info = load_dataset(run.env, args.data or run.data, need_env=False)
    if info["sha256"] != state["info"]["sha256"]:
        raise UserError(f"{state['path']} was trained on {state['info']['id']}, not on {info['file']}", status=2)
    arrays["rew"] = arrays["rew"] - (run.reward_transform == "minus_one")
    arrays["act"] = arrays["act"].clip(-1 + 1e-5, 1 - 1e-5)
    torch.manual_seed(args.seed)
    agent = qdq.QDQ(state["obs_dim"], state["act_dim"], run)
    agent.load_state_dict(state["agent"])
    result = measure(agent, arrays, args)
    figure, name = result.pop("figure"), info["id"]
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"uncertainty-{name.split('/')[-1].removesuffix('.hdf5').removesuffix('.npz')}"
    text = markdown(name, result)
    paths = [key for key in ("data", "consistency") if state["args"][key]]
    arguments = state["args"] | {key: Path(state["args"][key]).name for key in paths}  # without that machine's folders
    facts = {"dataset": name, "sha256": info["sha256"], "args": arguments, "versions": state["info"]["versions"]}
    stem.with_name(stem.name + ".json").write_text(json.dumps(result | facts, indent=1))
    stem.with_name(stem.name + ".md").write_text(text)
    draw(stem.with_name(stem.name + ".png"), name, figure)
    print(text)
    return result


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
