"""The three algorithms on bandits in the plane: what they learn, and where their policies go.

    python benchmarks/toy.py                          # into benchmarks/results/toy/toy.png
    python benchmarks/toy.py --scale 0.1 --out try.png

One state without features, actions in [-1, 1]^2, one step per episode. A row of panels per density
of the data's actions, each with a reward that tests the policy: two modes equally good; better and
better beyond the edge of the data; best where data are few. The noise of the rewards grows from
left to right. Points are coloured by their action's mean reward; grey is the data.
Each row has a process and a thread of its own; four minutes of processor time together.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from root import ROOT
from torch import Tensor
from tqdm import tqdm

import cped
import dac
import qdq

ROWS = 10_000  # of a dataset
BATCH = 256  # rows of an update
SHOWN = 800  # points of a panel
GRID = 61  # points along each axis of a map
TITLES = (
    "data",
    "DAC\nbehaviour model",
    "DAC\npolicy",
    "CPED\nflow",
    "CPED\npolicy",
    "QDQ\nmean of sampled returns",
    "QDQ\ntheir spread, H",
    "QDQ\npolicy",
)


@dataclass
class Args:
    out: Path = ROOT / "benchmarks" / "results" / "toy" / "toy.png"  # the picture
    # rows of panels
    toys: tuple[Literal["gaussians", "moons", "pinwheel"], ...] = ("gaussians", "moons", "pinwheel")
    scale: float = 1.0  # factor of all numbers of updates
    seed: int = 0  # seed of data, initialisation and noise


class Bandit(NamedTuple):
    obs: Tensor  # [N, 0]
    act: Tensor  # [N, 2]
    rew: Tensor  # [N]


class Trained(NamedTuple):
    """The agents of a row; paths are the actions of a policy during its training."""

    behaviour: dac.DAC
    dac: dac.DAC
    cped: cped.CPED
    cped_path: np.ndarray
    qdq: qdq.QDQ
    qdq_path: np.ndarray


# -------------------------------------------------------------------- data


def gaussians(rng: np.random.Generator) -> np.ndarray:
    """Eight on a circle."""
    angle = rng.integers(8, size=ROWS) * np.pi / 4
    centre = 3 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return centre + 0.3 * rng.normal(size=(ROWS, 2))


def moons(rng: np.random.Generator) -> np.ndarray:
    """Two half circles, each around one end of the other."""
    angle = np.pi * rng.uniform(size=ROWS)
    lower = rng.integers(2, size=ROWS)
    x = np.where(lower, 1 - np.cos(angle), np.cos(angle))
    y = np.where(lower, 0.5 - np.sin(angle), np.sin(angle))
    return 2.4 * np.stack([x - 0.5, y - 0.25], axis=1) + 0.15 * rng.normal(size=(ROWS, 2))


def pinwheel(rng: np.random.Generator) -> np.ndarray:
    """Three stretched Gaussians, turned the more, the farther out."""
    blade = rng.integers(3, size=ROWS) * 2 * np.pi / 3
    along = 1.8 + 0.7 * rng.normal(size=ROWS)
    across = 0.15 * rng.normal(size=ROWS)
    angle = blade + 0.35 * along
    x = along * np.cos(angle) - across * np.sin(angle)
    y = along * np.sin(angle) + across * np.cos(angle)
    return np.stack([x, y], axis=1)


def reward(name: str, act: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """Mean reward [N] of actions [N, 2]."""
    x, y = act.T
    square = x**2 + y**2
    if name == "gaussians":  # left and right are equally good
        return (x**2 - y**2) / (square + 0.01)
    if name == "moons":  # best beyond the edge of the data
        return x + y
    return 1 - 2 * square**0.5  # best in the middle, where data are few


def make_data(name: str, rng: np.random.Generator) -> Bandit:
    draw = {"gaussians": gaussians, "moons": moons, "pinwheel": pinwheel}[name]
    act = (draw(rng) / 4.2).clip(-1, 1)
    rew = reward(name, act) + 0.2 * (1 + act[:, 0]) * rng.normal(size=ROWS)
    obs = torch.zeros(ROWS, 0)
    return Bandit(obs, torch.tensor(act).float(), torch.tensor(rew).float())


# ---------------------------------------------------------------- training


def minibatch(data: Bandit) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.randint(ROWS, (BATCH,))
    return data.obs[index], data.act[index], data.rew[index]


def transitions(data: Bandit, kind: type) -> tuple:
    """A batch of a script, kind is its Batch; every episode ends after one step."""
    obs, act, rew = minibatch(data)
    return kind(obs=obs, act=act, rew=rew, next_obs=obs, not_done=torch.zeros_like(rew))


def only_action(agent) -> np.ndarray:
    """What the policy does in the only state."""
    return agent.act(np.zeros((1, 0), np.float32))[0]


class BanditDAC(dac.DAC):
    """DAC without the reverse chain for next actions, which a bandit does not have."""

    def td_target(self, batch: dac.Batch, noise: Tensor) -> Tensor:
        return batch.rew


def train_dac(data: Bandit, updates: int, eta: float) -> dac.DAC:
    args = dac.Args(
        total_steps=updates,
        hidden_dim=96,
        diffusion_steps=50,
        num_critics=2,
        num_next_actions=1,
        actor_lr=5e-3,
        critic_lr=4e-3,
        eta=eta,
        eta_lr=0.0,
    )
    agent = BanditDAC(0, 2, args)
    for _ in tqdm(range(updates), desc="DAC", leave=False):
        agent.update(transitions(data, dac.Batch))
    return agent


def train_cped(data: Bandit, scale: float) -> tuple[cped.CPED, np.ndarray]:
    args = cped.Args(
        flow_steps=int(2000 * scale),
        total_steps=int(400 * scale),
        flow_lr=2e-3,
        flow_lr_end=3e-5,
        disc_lr=1e-3,
        disc_updates=1,
        num_couplings=12,
        flow_hidden_dim=64,
        hidden_dim=64,
        actor_lr=2e-3,
        critic_lr=5e-3,
        critic_start=0,
        actor_q_start=0,
        lagrange_table=(0.1,),
        lagrange_from=(0,),
    )
    agent = cped.CPED(0, 2, args)
    # The couplings start at torch's own weights, uniform within fan_in^-0.5, where cped.py has
    # 0.01. From so small weights a density that is symmetric about the origin gives the shifts no
    # gradient to first order, and the flow stays a rescaled logistic for long.
    for layer in agent.flow.shifts.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()
    path = []
    for _ in tqdm(range(args.flow_steps + args.total_steps), desc="CPED", leave=False):
        agent.update(transitions(data, cped.Batch))
        if agent.step >= args.flow_steps:
            path.append(only_action(agent))
    return agent, np.array(path)


def train_qdq(data: Bandit, scale: float) -> tuple[qdq.QDQ, np.ndarray]:
    """The returns, whose distribution is learned, are the rewards."""
    args = qdq.Args(
        teacher_steps=int(800 * scale),
        student_steps=int(2400 * scale),
        total_steps=int(400 * scale),
        teacher_lr=5e-3,
        student_lr=5e-3,
        student_tau=1.0,
        grid_points=80,  # so that the first of them, next to t_max, is close to it
        num_samples=2,
        hidden_dim=128,
        hidden_layers=2,
        actor_lr=5e-3,
        critic_lr=5e-3,
        gamma_ent=0.05,
    )
    agent = qdq.QDQ(0, 2, args)
    low = data.rew.min()
    high = data.rew.max()
    agent.q_range[0] = low
    agent.q_range[1] = high
    path = []
    for stage, length in agent.stages:
        for _ in tqdm(range(length), desc=f"QDQ {stage}", leave=False):
            if stage == "policy":
                agent.update(stage, transitions(data, qdq.Batch))
                path.append(only_action(agent))
            else:
                obs, act, rew = minibatch(data)
                x = 2 * (rew - low) / (high - low) - 1
                agent.update(stage, qdq.Windows(obs, act, x[:, None]))
    return agent, np.array(path)


def seeded(seed: int, train: Callable, *args):
    torch.manual_seed(seed)
    return train(*args)


def train_row(name: str, args: Args) -> tuple[Bandit, Trained]:
    torch.set_num_threads(1)
    data = make_data(name, np.random.default_rng(args.seed))
    behaviour = seeded(args.seed, train_dac, data, int(4000 * args.scale), 1000.0)  # no guidance
    guided = seeded(args.seed, train_dac, data, int(1200 * args.scale), 0.1)
    constrained = seeded(args.seed, train_cped, data, args.scale)
    pessimist = seeded(args.seed, train_qdq, data, args.scale)
    return data, Trained(behaviour, guided, *constrained, *pessimist)


# ----------------------------------------------------------------- picture


def points(panel: plt.Axes, name: str, act: Tensor) -> float:
    """Draws actions and returns their mean reward."""
    colours = reward(name, act)
    panel.scatter(*act.T, s=3, c=colours, cmap="viridis", vmin=-1, vmax=1, linewidths=0)
    return float(colours.mean())


def steps(panel: plt.Axes, name: str, path: np.ndarray) -> float:
    """Draws a policy's way and returns the mean reward of its end."""
    panel.plot(*path.T, color="tab:red", linewidth=1.2)
    panel.plot(*path[-1], "*", color="tab:red", markersize=11, markeredgecolor="white")
    return float(reward(name, path[-1]))


def image(panel: plt.Axes, values: Tensor, low: float, high: float | None) -> None:
    picture = values.view(GRID, GRID)
    extent = (-1, 1, -1, 1)
    panel.imshow(picture, origin="lower", extent=extent, cmap="viridis", vmin=low, vmax=high)


def samples_of(agent: dac.DAC) -> Tensor:
    noise = torch.randn(agent.args.diffusion_steps, SHOWN, 2)
    return dac.sample_actions(agent.actor, torch.zeros(SHOWN, 0), noise, agent.schedule)


@torch.no_grad()
def draw_row(line: list[plt.Axes], name: str, data: Bandit, agents: Trained) -> None:
    """One row of panels; prints the mean rewards of data and policies."""
    axis = torch.linspace(-1, 1, GRID)
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    nothing = plane[:, :0]  # observations
    scores = {}

    line[0].set_ylabel(name)
    for panel in (line[1], line[2], line[7]):
        panel.scatter(*data.act[:SHOWN].T, s=3, c="lightgrey", linewidths=0)
    scores["data"] = points(line[0], name, data.act[:SHOWN])

    points(line[1], name, samples_of(agents.behaviour))
    scores["DAC"] = points(line[2], name, samples_of(agents.dac))

    density = agents.cped.flow.log_density(nothing, plane).exp().view(GRID, GRID)
    for panel in (line[3], line[4]):
        panel.contourf(axis, axis, density, levels=15, cmap="Greys")
    latent = torch.rand(SHOWN, 2).logit(eps=1e-7)
    points(line[3], name, agents.cped.flow.inverse(latent))
    scores["CPED"] = steps(line[4], name, agents.cped_path)

    student = agents.qdq
    noise = torch.randn(len(plane), 50)
    samples = qdq.sample_returns(
        student.student, nothing, plane, noise, student.q_range, student.args
    )
    image(line[5], samples.mean(dim=1), -1, 1)
    image(line[6], samples.std(dim=1), 0, None)
    for panel in (line[5], line[6]):
        panel.scatter(*data.act[:200].T, s=1, c="white", linewidths=0)
    mu, std = student.actor(torch.zeros(SHOWN, 0))
    points(line[7], name, torch.normal(mu, std.expand_as(mu)))
    scores["QDQ"] = steps(line[7], name, agents.qdq_path)

    words = [f"{label} {score:.2f}" for label, score in scores.items()]
    print(f"{name}, mean reward: {', '.join(words)}")


def main(args: Args) -> None:
    plt.switch_backend("Agg")
    size = len(args.toys), len(TITLES)
    figure, axes = plt.subplots(
        *size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    figure.set_size_inches(13.6, 0.4 + 1.8 * len(args.toys))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(train_row, args.toys, [args] * len(args.toys)))
    for name, line, (data, agents) in zip(args.toys, axes, rows):
        torch.manual_seed(args.seed)
        draw_row(line, name, data, agents)
    for panel, title in zip(axes[0], TITLES):
        panel.set_title(title, fontsize=10)
    for panel in axes.flat:
        panel.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xticks=[], yticks=[])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=90)
    print(f"picture in {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
