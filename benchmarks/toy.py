"""The three algorithms on small bandits: what each learns, and where its policy goes.

    python benchmarks/toy.py                                  # results/toy: toy.png and toy.csv
    python benchmarks/toy.py --scale 0.1 --out try.png        # a first look, also at try.csv
    python benchmarks/toy.py --rows dac --seed 1 --out try.png

A row of panels for each algorithm: data and true reward, its generative model, what it makes of
the learned Q, its policy. Outside of the data the true reward is bad, but the learned Q grows on.
The cross is the largest learned Q of all actions: plain greed. DAC and CPED have one state and
actions in the plane. QDQ is pessimistic about the value of the next action, so that its problem
has two steps: an action leads to a place, and the place gives the return.

The agents are those of the scripts, with small networks and a few thousand updates. Each row has
a process and a thread of its own; about three minutes of processor time together.
"""

import csv
import io
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from matplotlib.colors import PowerNorm
from matplotlib.lines import Line2D
from PIL import Image
from root import ROOT, processes
from torch import Tensor
from tqdm import trange

import cped
import dac
import qdq

ROWS = 10_000  # of a dataset
HELD_OUT = 2_000  # more rows, for the numbers, and as many samples of a model
BATCH = 256  # rows of an update
SHOWN = 700  # points of a panel
GRID = 81  # points along each axis of a map

RING = 0.6  # DAC: radius on which the six modes lie
EDGE = 0.6  # QDQ: no action of the data is larger

BLUE = "#0072B2"  # samples of a model
ORANGE = "#D55E00"  # policies
BLACK = "black"  # plain greed
GREEN = "#009E73"  # true mean
GREY = "#999999"  # where QDQ divides by H
TEXT = 15  # size of the captions


@dataclass
class Args:
    out: Path = ROOT / "benchmarks" / "results" / "toy" / "toy.png"  # picture; beside it a .csv
    rows: tuple[Literal["dac", "qdq", "cped"], ...] = ("dac", "qdq", "cped")  # of panels
    scale: float = 1.0  # factor of all numbers of updates
    seed: int = 0  # seed of data, initialisation and noise


class Row(NamedTuple):
    """What a row of panels shows: arrays by name, and the lines of the table."""

    arrays: dict[str, Tensor | np.ndarray]
    table: list[tuple[str, float, float | None]]  # quantity, value, the same of a Gaussian


# -------------------------------------------------------------------- data


def six_modes(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Actions of DAC's data: six Gaussians on a ring."""
    angle = rng.integers(6, size=rows) * np.pi / 3
    centre = RING * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return centre + 0.05 * rng.normal(size=(rows, 2))


def ring_reward(act: np.ndarray) -> np.ndarray:
    """Best in the left and the right mode, alike; bad away from the ring."""
    x, y = act.T
    radius = np.hypot(x, y) + 1e-6
    away = np.abs(radius - RING)
    return fall_off((x**2 - y**2) / (radius * RING), away)


def on_arch(angle: np.ndarray) -> np.ndarray:
    return np.stack([0.62 * np.sin(angle), 0.85 * np.cos(angle) - 0.4], axis=1)


def arch(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Actions of CPED's data: an arch, with fewer and fewer at its ends."""
    act = on_arch(0.32 * rng.logistic(size=rows)) + 0.04 * rng.normal(size=(rows, 2))
    return act.clip(-1, 1)


def arch_reward(act: np.ndarray) -> np.ndarray:
    """Grows to the upper right; bad away from the arch."""
    x, y = act.T
    line = on_arch(np.linspace(-2.2, 2.2, 200))
    away = np.linalg.norm(act[:, None] - line, axis=2).min(axis=1)
    return fall_off((x + 0.5 * y) / 0.6, away)


def fall_off(reward: np.ndarray, away: np.ndarray) -> np.ndarray:
    """The reward near the data; farther away than 0.15 it falls to -1."""
    return np.maximum(reward - 12 * np.maximum(away - 0.15, 0), -1)


def mean_return(act: np.ndarray) -> np.ndarray:
    """Of QDQ's problem: it grows all over the data, and falls behind their edge."""
    inside = 6 * np.tanh(2.5 * (act + 1)) + 3 * np.maximum(act, 0)
    return inside - 20 * np.maximum(act - EDGE - 0.02, 0)


def draw_return(rng: np.random.Generator, act: np.ndarray) -> np.ndarray:
    """Nearly sure where the action is below 0, the toss of a coin where it is above."""
    stake = 4 * (act / 0.25).clip(0, 1)
    coin = 2 * rng.integers(2, size=len(act)) - 1
    return mean_return(act) + stake * coin + 0.4 * rng.normal(size=len(act))


# ----------------------------------------------------------------- numbers


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Of samples [N, D] and [M, D], without bias: about 0 if their distributions agree."""
    within_x = torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))
    within_y = torch.cdist(y, y).sum() / (len(y) * (len(y) - 1))
    return float(2 * torch.cdist(x, y).mean() - within_x - within_y)


def fitted_gaussian(rows: Tensor) -> torch.distributions.MultivariateNormal:
    return torch.distributions.MultivariateNormal(rows.mean(dim=0), torch.cov(rows.T))


def energy_line(data: Tensor, held_out: Tensor, samples: Tensor) -> tuple[str, float, float]:
    gaussian = fitted_gaussian(data).sample((HELD_OUT,))
    value = energy_distance(held_out, samples)
    return "energy distance", value, energy_distance(held_out, gaussian)


def plane() -> Tensor:
    """All points [GRID * GRID, 2] of a map."""
    axis = torch.linspace(-1, 1, GRID)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2)


def pick(*columns: Tensor) -> list[Tensor]:
    """The rows of a random batch."""
    index = torch.randint(len(columns[0]), (BATCH,))
    return [column[index] for column in columns]


def bandit_batch(kind: type, act: Tensor, rew: Tensor) -> tuple:
    """A Batch of a script: one state without features, and each episode ends after one step."""
    nothing = act[:, :0]
    not_done = torch.zeros_like(rew)
    return kind(obs=nothing, act=act, rew=rew, next_obs=nothing, not_done=not_done)


# --------------------------------------------------------------------- DAC


class BanditDAC(dac.DAC):
    """DAC without the reverse chain for next actions, which a bandit does not have."""

    def td_target(self, batch: dac.Batch, noise: Tensor) -> Tensor:
        return batch.rew


class Behaviour(BanditDAC):
    """The diffusion model of the data alone: there is no guidance by Q."""

    def q_gradient(self, batch: dac.Batch, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@torch.enable_grad()
def train_dac(kind: type, act: Tensor, rew: Tensor, updates: int) -> dac.DAC:
    args = dac.Args(
        total_steps=updates,
        hidden_dim=64,
        diffusion_steps=50,
        beta_min=0.05,
        num_critics=2,
        num_next_actions=1,
        actor_lr=2e-2,
        critic_lr=3e-3,
        eta=1.0,
        eta_lr=0.0,
    )
    agent = kind(0, 2, args)
    for _ in trange(updates, desc=f"DAC {kind.__name__}", leave=False):
        agent.update(bandit_batch(dac.Batch, *pick(act, rew)))
    return agent


def diffused(agent: dac.DAC) -> Tensor:
    noise = torch.randn(agent.args.diffusion_steps, HELD_OUT, 2)
    return dac.sample_actions(agent.actor, torch.zeros(HELD_OUT, 0), noise, agent.schedule)


@torch.no_grad()
def dac_row(rng: np.random.Generator, scale: float) -> Row:
    data = six_modes(rng, ROWS)
    act = torch.tensor(data).float()
    rew = torch.tensor(ring_reward(data)).float()
    held_out = torch.tensor(six_modes(rng, HELD_OUT)).float()
    behaviour = train_dac(Behaviour, act, rew, int(7000 * scale))
    agent = train_dac(BanditDAC, act, rew, int(3000 * scale))
    samples = diffused(behaviour)
    policy = agent.act(np.zeros((HELD_OUT, 0), np.float32))  # the evaluated one, best of ten
    q = agent.critic_target(plane()[:, :0], plane()).mean(dim=0)
    greedy = plane()[q.argmax()].numpy()
    table = [
        energy_line(act, held_out, samples),
        ("true reward: data", float(rew.mean()), None),
        ("true reward: policy", float(ring_reward(policy).mean()), None),
        ("true reward: greedy", float(ring_reward(greedy[None])[0]), None),
        ("learned Q: greedy", float(q.max()), None),
        ("policy: share in the right mode", float((policy[:, 0] > 0).mean()), None),
    ]
    arrays = dict(data=data, samples=samples, policy=policy, q=q, greedy=greedy)
    return Row(arrays, table)


# -------------------------------------------------------------------- CPED


@torch.enable_grad()
def train_cped(act: Tensor, rew: Tensor, scale: float) -> cped.CPED:
    args = cped.Args(
        flow_steps=int(3000 * scale),
        total_steps=int(2000 * scale),
        flow_lr=3e-3,
        flow_lr_end=3e-5,
        disc_lr=1e-3,
        disc_updates=1,
        flow_hidden_dim=64,
        mle_weight=20.0,
        hidden_dim=64,
        actor_lr=1e-3,
        critic_lr=3e-3,
        critic_start=0,
        actor_q_start=int(1000 * scale),
        constraint="dual",
        epsilon_quantile=0.9,
        lagrange=1.0,
    )
    agent = cped.CPED(0, 2, args)
    for _ in trange(args.flow_steps + args.total_steps, desc="CPED", leave=False):
        agent.update(bandit_batch(cped.Batch, *pick(act, rew)))
    return agent


@torch.no_grad()
def cped_row(rng: np.random.Generator, scale: float) -> Row:
    data = arch(rng, ROWS)
    act = torch.tensor(data).float()
    rew = torch.tensor(arch_reward(data)).float()
    held_out = torch.tensor(arch(rng, HELD_OUT)).float()
    agent = train_cped(act, rew, scale)
    log_density = agent.flow.log_density(held_out[:, :0], held_out).mean()
    gaussian = fitted_gaussian(act).log_prob(held_out).mean()
    latent = torch.rand(HELD_OUT, 2).logit(eps=1e-7)
    samples = agent.flow.inverse(latent)
    on_map = agent.flow.log_density(plane()[:, :0], plane())
    epsilon = -agent.flow.log_density(act[:, :0], act).quantile(1 - agent.args.epsilon_quantile)
    q = agent.critic(plane()[:, :0], plane()).amin(dim=0)
    greedy = plane()[q.argmax()].numpy()
    policy = agent.act(np.zeros((1, 0), np.float32))[0]
    table = [
        ("held-out log-density", float(log_density), float(gaussian)),
        energy_line(act, held_out, samples),
        ("true reward: data", float(rew.mean()), None),
        ("true reward: policy", float(arch_reward(policy[None])[0]), None),
        ("true reward: greedy", float(arch_reward(greedy[None])[0]), None),
        ("learned Q: greedy", float(q.max()), None),
        ("multiplier at the end", float(agent.lagrange), None),
    ]
    arrays = dict(
        data=data,
        log_density=on_map,
        epsilon=epsilon,
        policy=policy,
        q=q,
        greedy=greedy,
    )
    return Row(arrays, table)


# --------------------------------------------------------------------- QDQ

# The state is (has it moved?, the place it moved to). The second action does nothing.


def at_start(act: Tensor) -> Tensor:
    return torch.zeros(len(act), 2)


def at_place(place: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(place), place], dim=1)


def two_steps(act: Tensor, idle: Tensor, ret: Tensor) -> qdq.Batch:
    """Half a batch of first steps without reward, half of second ones with the whole return."""
    first, second = act.split(BATCH // 2)
    ret = ret[BATCH // 2 :]
    zero = torch.zeros_like(ret)
    return qdq.Batch(
        obs=torch.cat([at_start(first), at_place(second)]),
        act=torch.cat([first, idle[: BATCH // 2]]),
        rew=torch.cat([zero, ret]),
        next_obs=torch.cat([at_place(first), at_place(second)]),
        not_done=torch.cat([zero + 1, zero]),
    )


@torch.enable_grad()
def train_qdq(act: Tensor, idle: Tensor, ret: Tensor, scale: float, args: qdq.Args) -> qdq.QDQ:
    agent = qdq.QDQ(2, 1, args)
    low = ret.min()
    high = ret.max()
    agent.q_range[0] = low
    agent.q_range[1] = high
    for stage, length in agent.stages:
        for _ in trange(length, desc=f"QDQ {stage}", leave=False):
            rows = pick(act, idle, ret)
            if stage == "policy":
                agent.update(stage, two_steps(*rows))
            else:  # windows that begin at the place
                x = 2 * (rows[2] - low) / (high - low) - 1
                agent.update(stage, qdq.Windows(at_place(rows[0]), rows[1], x[:, None]))
    return agent


@torch.no_grad()
def qdq_row(rng: np.random.Generator, scale: float) -> Row:
    def draw(rows: int) -> Tensor:
        act = rng.uniform(-1, EDGE, size=rows)
        return torch.tensor(np.stack([act, draw_return(rng, act)], axis=1)).float()

    data = draw(ROWS)
    held_out = draw(HELD_OUT)
    act = data[:, :1]
    ret = data[:, 1]
    idle = 2 * torch.rand(ROWS, 1) - 1
    args = qdq.Args(
        teacher_steps=int(1000 * scale),
        student_steps=int(4500 * scale),
        total_steps=int(1000 * scale),
        teacher_lr=5e-3,
        student_lr=5e-3,
        student_tau=1.0,
        t_max=10.0,
        grid_points=80,  # so that the first of them, next to t_max, is close to it
        num_samples=8,
        hidden_dim=128,
        hidden_layers=2,
        actor_lr=3e-3,
        critic_lr=3e-3,
        tau=0.03,
        discount=1.0,
        alpha=0.3,
        beta=0.7,
        gamma_ent=0.1,
    )
    agent = train_qdq(act, idle, ret, scale, args)
    # without pessimism, and without the behaviour term; neither uses the student
    plain_args = replace(args, teacher_steps=0, student_steps=0, alpha=1.0, gamma_ent=0.0)
    plain = train_qdq(act, idle, ret, scale, plain_args)

    def sample(place: Tensor, number: int) -> Tensor:
        noise = torch.randn(len(place), number)
        idle = torch.zeros(len(place), 1)
        obs = at_place(place)
        return qdq.sample_returns(agent.student, obs, idle, noise, agent.q_range, args)

    place = held_out[:, :1]
    samples = torch.cat([place, sample(place, 1)], dim=1)
    line = torch.linspace(-1, 1, GRID)[:, None]
    h = sample(line, 1000).std(dim=1)
    inside = line[:, 0] <= EDGE
    threshold = h[inside].quantile(args.beta)
    q = agent.critic(at_start(line), line).amin(dim=0)
    plain_q = plain.critic(at_start(line), line).amin(dim=0)
    greedy = line[plain_q.argmax()].numpy()
    policy = agent.act(np.zeros((1, 2), np.float32))[0]
    plain_policy = plain.act(np.zeros((1, 2), np.float32))[0]
    scaled = torch.tensor([1.0, 2 / float(ret.max() - ret.min())])  # as the networks see returns
    table = [
        energy_line(data * scaled, held_out * scaled, samples * scaled),
        ("H: where returns are sure (action -0.5)", float(h[20]), None),
        ("H: where they are a gamble (action 0.5)", float(h[60]), None),
        ("H: without data (action 0.9)", float(h[76]), None),
        ("true reward: data", float(ret.mean()), None),
        ("true reward: policy", float(mean_return(policy)[0]), None),
        ("true reward: greedy", float(mean_return(greedy)[0]), None),
        ("true reward: plain policy", float(mean_return(plain_policy)[0]), None),
        ("learned Q: greedy", float(plain_q.max()), None),
    ]
    arrays = dict(
        data=data,
        samples=samples,
        line=line[:, 0],
        h=h,
        threshold=threshold,
        q=q,
        plain_q=plain_q,
        policy=policy,
        greedy=greedy,
    )
    return Row(arrays, table)


# ----------------------------------------------------------------- picture


def caption(panel: plt.Axes, title: str, *lines: str) -> None:
    panel.set_title(title, fontsize=TEXT + 1, fontweight="bold")
    panel.set_xlabel("\n".join(lines), fontsize=TEXT)


def text(value: float, places: int = 2) -> str:
    """With the typographic minus, and 0.00 for -0.00."""
    return f"{round(value, places) + 0.0:.{places}f}".replace("-", "−")


def fit_lines(row: Row, quantity: str, words: str, places: int) -> tuple[str, str]:
    for name, value, gaussian in row.table:
        if name == quantity:
            return f"{words} {text(value, places)}", f"a Gaussian fit: {text(gaussian, places)}"
    raise KeyError(quantity)


def score_lines(row: Row, word: str = "reward") -> tuple[str, str]:
    value = {quantity: value for quantity, value, _ in row.table}
    policy = text(value["true reward: policy"])
    greedy = text(value["true reward: greedy"])
    data = text(value["true reward: data"])
    return f"its true {word}: {policy}", f"greedy: {greedy}, data: {data}"


def dots(panel: plt.Axes, points: np.ndarray, colour: str) -> None:
    panel.scatter(*points[:SHOWN].T, s=5, c=colour, linewidths=0)


def mark(panel: plt.Axes, x: float, y: float, marker: str) -> None:
    size, colour = {"*": (24, ORANGE), "X": (16, BLACK)}[marker]
    style = dict(markersize=size, markeredgecolor="white", markeredgewidth=1.3)
    panel.plot(x, y, marker, color=colour, zorder=5, clip_on=False, **style)


def colours(panel: plt.Axes, values: np.ndarray) -> None:
    """A map of rewards or of Q, pale, so that points can be seen on it."""
    picture = values.reshape(GRID, GRID)
    box = dict(origin="lower", extent=(-1, 1, -1, 1), interpolation="bilinear")
    shades = plt.get_cmap("cividis", 20)
    panel.imshow(picture, cmap=shades, vmin=-1, vmax=1.5, alpha=0.75, **box)


def in_the_plane(panels: list[plt.Axes]) -> None:
    for panel in panels:
        panel.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xticks=[], yticks=[])


def draw_dac(panels: list[plt.Axes], row: Row) -> None:
    data, model, belief, policy = panels
    arrays = row.arrays
    truth = ring_reward(plane().numpy())
    colours(data, truth)
    dots(data, arrays["data"], BLACK)
    caption(data, "data, true reward", "a point is an action,", "bright is good")

    dots(model, arrays["data"], BLACK)
    dots(model, arrays["samples"], BLUE)
    caption(model, "diffusion model", *fit_lines(row, "energy distance", "distance to data", 4))

    colours(belief, arrays["q"])
    some = slice(8, None, 16)
    up, right = (slope[some, some] for slope in np.gradient(arrays["q"].reshape(GRID, GRID)))
    length = np.hypot(up, right) + 1e-3  # all arrows but those of a flat Q become equally long
    axis = np.linspace(-1, 1, GRID)[some]
    arrows = dict(scale=7, width=0.018, color=BLACK, edgecolor="white", linewidth=0.8)
    belief.quiver(axis, axis, right / length, up / length, pivot="middle", **arrows)
    mark(belief, *arrays["greedy"], "X")
    caption(belief, "learned Q", "too bright beyond the data;", "its gradient guides DAC")

    colours(policy, truth)
    dots(policy, arrays["policy"], ORANGE)
    mark(policy, *arrays["greedy"], "X")
    caption(policy, "policy of DAC", *score_lines(row))
    in_the_plane(panels)


def draw_cped(panels: list[plt.Axes], row: Row) -> None:
    data, model, belief, policy = panels
    arrays = row.arrays
    truth = arch_reward(plane().numpy())
    axis = np.linspace(-1, 1, GRID)
    log_density = arrays["log_density"].reshape(GRID, GRID)
    colours(data, truth)
    dots(data, arrays["data"], BLACK)
    caption(data, "data, true reward", "a point is an action,", "bright is good")

    shades = dict(cmap="Blues", norm=PowerNorm(0.4))  # the thin ends of the arch can be seen
    model.contourf(axis, axis, np.exp(log_density), levels=40, **shades)
    dots(model, arrays["data"][:200], BLACK)
    lines = fit_lines(row, "held-out log-density", "log-density of data", 2)
    caption(model, "density of the flow", *lines)

    colours(belief, arrays["q"])
    mark(belief, *arrays["greedy"], "X")
    caption(belief, "learned Q", "too bright beyond the data;", "hatched: dense enough")

    colours(policy, truth)
    mark(policy, *arrays["policy"], "*")
    mark(policy, *arrays["greedy"], "X")
    caption(policy, "policy of CPED", *score_lines(row))
    for panel in (belief, policy):
        levels = [-arrays["epsilon"], np.inf]
        region = panel.contourf(axis, axis, log_density, levels, colors="none", hatches=["////"])
        region.set(edgecolor="white", linewidth=2)
    in_the_plane(panels)


def draw_qdq(panels: list[plt.Axes], row: Row) -> None:
    data, model, spread, policy = panels
    arrays = row.arrays
    line = arrays["line"]
    mean = mean_return(line)
    words = dict(fontsize=TEXT - 1, ha="center")
    dots(data, arrays["data"], BLACK)
    data.plot(line, mean, color=GREEN, linewidth=3)
    data.text(0.8, 8.3, "true\nmean", color=GREEN, **words)
    caption(data, "data, true mean", "return over action;", "no data beyond 0.6")

    dots(model, arrays["data"], BLACK)
    dots(model, arrays["samples"], BLUE)
    lines = fit_lines(row, "energy distance", "distance to data", 4)
    caption(model, "consistency model", *lines)

    spread.plot(line, arrays["h"], color=BLUE, linewidth=3)
    uncertain = arrays["h"] > arrays["threshold"]
    spread.fill_between(line, 0, 8, where=uncertain, color=GREY, alpha=0.3, linewidth=0)
    spread.text(0.55, 0.5, "Q is divided\nby H", **words)
    spread.set_ylim(0, 7)
    caption(spread, "H: std of its samples", "large where returns split,", "and beyond")

    policy.plot(line, mean, color=GREEN, linewidth=3)
    policy.plot(line, arrays["plain_q"], color=BLACK, linestyle="--", linewidth=2.5)
    policy.plot(line, arrays["q"], color=ORANGE, linestyle="-.", linewidth=2.5)
    policy.text(0.1, 9.6, "Q without pessimism", color=BLACK, **words)
    policy.text(0.25, 1.6, "QDQ's Q", color=ORANGE, **words)
    policy.text(-0.55, 7.0, "true mean", color=GREEN, **words)
    for place, marker in ((arrays["greedy"], "X"), (arrays["policy"], "*")):
        mark(policy, place[0], mean_return(place)[0], marker)
    caption(policy, "policy of QDQ", *score_lines(row, "return"))
    for panel in panels:
        panel.set(xlim=(-1, 1), xticks=[-1, 0, 1], box_aspect=1)
        panel.tick_params(labelsize=TEXT - 2)
    for panel in (data, model, policy):
        panel.set(ylim=(-2, 14), yticks=[0, 6, 12])


def legend(figure: plt.Figure) -> None:
    def sign(marker: str, colour: str, size: float, label: str) -> Line2D:
        style = dict(markersize=size, markeredgecolor="white", linestyle="none")
        return Line2D([], [], marker=marker, color=colour, label=label, **style)

    signs = [
        sign("o", BLACK, 9, "data"),
        sign("o", BLUE, 9, "samples of the model"),
        sign("o", ORANGE, 9, "samples of the policy"),
        sign("*", ORANGE, 20, "action of the policy"),
        sign("X", BLACK, 14, "greedy: largest Q"),
    ]
    style = dict(fontsize=TEXT, frameon=False, handletextpad=0.2, columnspacing=1.0)
    figure.legend(handles=signs, loc="outside lower center", ncols=5, **style)


PARTS = {"dac": (dac_row, draw_dac), "qdq": (qdq_row, draw_qdq), "cped": (cped_row, draw_cped)}


def work(name: str, args: Args) -> Row:
    """All but the drawing; in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    started = time.process_time()
    make, _ = PARTS[name]
    arrays, table = make(np.random.default_rng(args.seed), args.scale)
    print(f"{name}: {time.process_time() - started:.0f} seconds of processor time")
    return Row({key: np.asarray(values) for key, values in arrays.items()}, table)


def save_small(figure: plt.Figure, path: Path) -> None:
    """With 200 colours, which makes the file much smaller."""
    whole = io.BytesIO()
    figure.savefig(whole, dpi=95, format="png")
    Image.open(whole).convert("RGB").quantize(200, dither=Image.Dither.NONE).save(path, "PNG")


def write_table(path: Path, rows: dict[str, Row], seed: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["algorithm", "quantity", "value", "gaussian", "seed"])
        for name, row in rows.items():
            for quantity, value, gaussian in row.table:
                other = "" if gaussian is None else f"{gaussian:.4f}"
                writer.writerow([name, quantity, f"{value:.4f}", other, seed])


def main(args: Args) -> None:
    plt.switch_backend("Agg")
    with processes(len(args.rows)) as pool:
        rows = dict(zip(args.rows, pool.map(work, args.rows, [args] * len(args.rows))))
    figure, axes = plt.subplots(len(rows), 4, squeeze=False, layout="constrained")
    figure.set_size_inches(13.6, 4.05 * len(rows) + 0.5)
    for line, (name, row) in zip(axes, rows.items()):
        _, draw = PARTS[name]
        draw(line, row)
        line[0].set_ylabel(name.upper(), fontsize=26, fontweight="bold")
    legend(figure)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_small(figure, args.out)
    write_table(args.out.with_suffix(".csv"), rows, args.seed)
    print(f"picture in {args.out}, numbers in {args.out.with_suffix('.csv')}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
