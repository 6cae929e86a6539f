"""The three algorithms on bandits in the plane: what their generative models learn, and where their policies go.

    python benchmarks/toy.py                          # into benchmarks/results/toy/toy.png
    python benchmarks/toy.py --scale 0.1 --out try.png

One state without features, actions in [-1, 1]^2, one step per episode. A row per density of the data's actions, each with a
reward that tests the policy: two modes equally good; better and better beyond the edge of the data; best where data are few.
The noise of the rewards grows from left to right. Points are coloured by their action's mean reward; grey is the data.
Each row has a process and a thread of its own; four minutes of processor time together.
"""

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cped
import dac
import qdq
from benchmarks.cloning import DiffusionCloning
from benchmarks.density import spread_weights, toy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROWS, BATCH, SHOWN = 10_000, 256, 800  # of a dataset, of an update, of a panel
REWARDS = {  # of the action, by the density of the data
    "gaussians": lambda x, y: (x**2 - y**2) / (x**2 + y**2 + 0.01),  # left and right are equally good
    "moons": lambda x, y: x + y,  # best beyond the edge of the data
    "pinwheel": lambda x, y: 1 - 2 * (x**2 + y**2) ** 0.5,  # best in the middle, where data are few
}


@dataclass
class Args:
    out: Path = Path(__file__).resolve().parent / "results" / "toy" / "toy.png"  # the picture
    toys: tuple[Literal["gaussians", "moons", "pinwheel"], ...] = ("gaussians", "moons", "pinwheel")  # its rows
    scale: float = 1.0  # factor of all numbers of updates
    seed: int = 0  # seed of data, initialisation and noise


class Bandit(NamedTuple):
    obs: Tensor  # [N, 0]
    act: Tensor  # [N, 2]
    rew: Tensor  # [N]


def make_data(name: str, rng: np.random.Generator) -> Bandit:
    act = (toy(name, ROWS, rng, blades=3) / 4.2).clip(-1, 1)
    rew = REWARDS[name](*act.T) + 0.2 * (1 + act[:, 0]) * rng.normal(size=ROWS)
    return Bandit(torch.zeros(ROWS, 0), *(torch.as_tensor(column, dtype=torch.float32) for column in (act, rew)))


def learn(update: Callable, data: Bandit, updates: int, label: str) -> None:
    for _ in tqdm(range(updates), desc=label, leave=False):
        index = torch.randint(ROWS, (BATCH,))
        update(*(column[index] for column in data))


def train_dac(data: Bandit, scale: float) -> tuple[dac.DAC, dac.DAC]:
    """The behaviour part alone, and with guidance at a fixed eta."""
    settings = {"hidden_dim": 96, "diffusion_steps": 50, "num_critics": 2, "num_next_actions": 1, "rho": 0.0}
    settings |= {"actor_lr": 5e-3, "critic_lr": 4e-3, "eta": 0.1, "eta_lr": 0.0}
    behaviour = DiffusionCloning(0, 2, dac.Args(total_steps=int(4000 * scale), **settings))
    agents = behaviour, dac.DAC(0, 2, dac.Args(total_steps=int(1200 * scale), **settings))
    for agent in agents:

        def update(obs: Tensor, act: Tensor, rew: Tensor, agent: dac.DAC = agent) -> None:
            draws = agent.draw(len(rew))
            draws = draws._replace(next_noise=torch.zeros(1, len(rew), 2))  # one reverse step: no next action counts here
            agent.update(dac.Batch(obs, act, rew, obs, torch.zeros_like(rew)), draws)

        learn(update, data, agent.args.total_steps, "DAC")
    return agents


def train_cped(data: Bandit, scale: float) -> tuple[cped.CPED, np.ndarray]:
    """Flow and policy; the policy's actions on the way."""
    settings = {"flow_steps": int(2000 * scale), "flow_lr": 2e-3, "flow_lr_end": 3e-5, "disc_lr": 1e-3, "disc_updates": 1}
    settings |= {"num_couplings": 12, "flow_hidden_dim": 64, "hidden_dim": 64, "actor_lr": 2e-3, "critic_lr": 5e-3}
    settings |= {"critic_start": 0, "actor_q_start": 0, "lagrange_table": (0.1,), "lagrange_from": (0,)}
    agent, path = cped.CPED(0, 2, cped.Args(**settings)), []
    spread_weights(agent.flow)

    def update(obs: Tensor, act: Tensor, rew: Tensor) -> None:
        agent.update(cped.Batch(obs, act, rew, obs, torch.zeros_like(rew), rew), agent.draw(len(rew)))
        if agent.step >= agent.args.flow_steps:
            path.append(agent.act(np.zeros((1, 0), np.float32))[0])

    learn(update, data, int(2400 * scale), "CPED")
    return agent, np.array(path)


def train_qdq(data: Bandit, scale: float) -> tuple[qdq.QDQ, np.ndarray]:
    """Distribution of returns, which here are the rewards, and policy; the policy's mean actions on the way."""
    settings = {"teacher_steps": int(800 * scale), "student_steps": int(2400 * scale), "total_steps": int(400 * scale)}
    settings |= {"teacher_lr": 5e-3, "student_lr": 5e-3, "student_tau": 1.0, "grid_points": 10, "num_samples": 2}
    settings |= {"hidden_dim": 128, "hidden_layers": 2, "actor_lr": 5e-3, "critic_lr": 5e-3, "gamma_ent": 0.05}
    agent, path = qdq.QDQ(0, 2, qdq.Args(**settings)), []
    low, high = data.rew.min(), data.rew.max()
    agent.student.q_range.copy_(torch.stack([low, high]))

    def update(obs: Tensor, act: Tensor, rew: Tensor) -> None:
        stage = next(stage for stage, done in agent.steps.items() if done < totals[stage])
        batch = qdq.Batch(obs, act, rew, obs, torch.zeros_like(rew))
        if stage != "policy":
            batch = torch.cat([obs, act], 1), (2 * (rew - low) / (high - low) - 1)[:, None]
        agent.update(stage, batch, agent.draw(stage, len(rew)))
        if stage == "policy":
            path.append(agent.act(np.zeros((1, 0), np.float32))[0])

    totals = {"teacher": agent.args.teacher_steps, "student": agent.args.student_steps, "policy": agent.args.total_steps}
    learn(update, data, sum(totals.values()), "QDQ")
    return agent, np.array(path)


TRAINERS = (train_dac, train_cped, train_qdq)
TITLES = ("data", "DAC\nbehaviour model", "DAC\npolicy", "CPED\nflow", "CPED\npolicy")
TITLES += ("QDQ\nmean of sampled returns", "QDQ\ntheir spread, H", "QDQ\npolicy")


@torch.no_grad()
def draw(line: list[plt.Axes], name: str, data: Bandit, agents: list[tuple]) -> None:
    """One row of panels; prints the mean rewards of data and policies."""
    (behaviour, guided), (constrained, path), (pessimist, mean_path) = agents
    axis = torch.linspace(-1, 1, 61)
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    none, noise, scores = torch.zeros(SHOWN, 0), torch.randn(guided.args.diffusion_steps, SHOWN, 2), {}

    def points(panel: plt.Axes, act: Tensor) -> Tensor:
        colours = REWARDS[name](*act.T)
        panel.scatter(*act.T, s=3, c=colours, cmap="viridis", vmin=-1, vmax=1, linewidths=0)
        return colours

    def steps(panel: plt.Axes, path: np.ndarray) -> Tensor:
        panel.plot(*path.T, color="tab:red", linewidth=1.2)
        panel.plot(*path[-1], "*", color="tab:red", markersize=11, markeredgecolor="white")
        return torch.tensor(REWARDS[name](*path[-1]))

    for panel in (*line[1:3], line[7]):
        panel.scatter(*data.act[:SHOWN].T, s=3, c="lightgrey", linewidths=0)
    line[0].set_ylabel(name)
    scores["data"] = points(line[0], data.act[:SHOWN])
    points(line[1], dac.sample_actions(behaviour.actor, none, noise, behaviour.schedule))
    scores["DAC"] = points(line[2], dac.sample_actions(guided.actor, none, noise, guided.schedule))
    density = constrained.flow.log_density(plane[:, :0], plane).exp().view(61, 61)
    for panel in line[3:5]:
        panel.contourf(axis, axis, density, levels=15, cmap="Greys")
    points(line[3], constrained.flow.inverse(constrained.draw(SHOWN).latent))
    scores["CPED"] = steps(line[4], path)
    samples = qdq.sample_returns(pessimist.student, plane, torch.randn(len(plane), 50), pessimist.args)
    for panel, values, top in ((line[5], samples.mean(1), 1), (line[6], samples.std(1), None)):
        image = {"origin": "lower", "extent": (-1, 1, -1, 1), "cmap": "viridis", "vmin": -top if top else 0, "vmax": top}
        panel.imshow(values.view(61, 61), **image)
        panel.scatter(*data.act[:200].T, s=1, c="white", linewidths=0)
    mean, std = pessimist.actor(none)
    points(line[7], torch.normal(mean, std.expand_as(mean)))
    scores["QDQ"] = steps(line[7], mean_path)
    print(f"{name}, mean reward: " + ", ".join(f"{label} {float(rewards.mean()):.2f}" for label, rewards in scores.items()))


def train_row(name: str, args: Args) -> tuple[Bandit, list[tuple]]:
    torch.set_num_threads(1)
    data, agents = make_data(name, np.random.default_rng(args.seed)), []
    for train in TRAINERS:
        torch.manual_seed(args.seed)
        agents.append(train(data, args.scale))
    return data, agents


def main(args: Args) -> None:
    figure, axes = plt.subplots(len(args.toys), len(TITLES), squeeze=False, sharex=True, sharey=True, layout="constrained")
    figure.set_size_inches(13.6, 0.4 + 1.8 * len(args.toys))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(train_row, args.toys, [args] * len(args.toys)))
    for name, line, row in zip(args.toys, axes, rows):
        torch.manual_seed(args.seed)
        draw(line, name, *row)
    for panel, title in zip(axes[0], TITLES):
        panel.set_title(title, fontsize=10)
    for panel in axes.flat:
        panel.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xticks=[], yticks=[])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=90)
    print(f"picture in {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
