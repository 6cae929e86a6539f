"""QDQ: Q-Distribution guided Q-learning (Zhang et al., NeurIPS 2024, arXiv:2410.20312).

A consistency model learns the distribution of truncated returns in the data. The spread H of
its samples tells how uncertain the value of an action is. A pessimistic critic target multiplies
the bootstrapped value by m (Eq. 8): 1/H for the actions whose H is among the largest of the
batch, which form the set U, and beta for the others. There are three stages: the teacher (a
diffusion model), the student (the consistency model, distilled from the teacher) and the policy
(TD3 with this target and a behaviour term).

    python qdq.py --env hopper-medium                   # published settings
    python qdq.py --env hopper-medium-replay --quick    # seven minutes on a laptop
    python qdq.py --resume runs/hopper-medium/qdq/seed0-20260101-120000
    python qdq.py --seed 1 --consistency runs/hopper-medium/qdq/seed0-20260101-120000

The last line reuses the finished student of another run, as the authors do for their five
seeds. The options are in four groups: run (--env to --final-episodes), data (--reward-transform
and --batch-size), optimisation (--teacher-steps to --critic-layer-norm) and algorithm (from
--sigma-data on).

Formulas without an equation number are those of EDM (teacher) and of consistency models
(student).

It is not known which settings gave the published tables. Where paper and released code differ,
this file follows the code, which agrees with the released weights:

 1. The discount of a truncated return begins at 1 in every window. In Eq. 5 it counts from the
    beginning of the trajectory. The reward of a terminal transition is included.
 2. H is the standard deviation of the K samples, in units of the return. Eq. 6 is a variance
    and divides by K - 1.
 3. On AntMaze values are negative, so a factor below 1 would raise them. There m is 1 outside
    of U (Eq. 8: beta) and, on five tasks, 1 + (1 - 1/H) / 10 inside (Eq. 8: 1/H). The sixth,
    umaze-diverse, keeps 1/H, which does raise values.
 4. Five AntMaze tasks train the actor by advantage-weighted regression, which the paper
    mentions as an option.
 5. The actor's loss takes Q at the mean action. Its "entropy" term is the log-likelihood of
    the data's actions.
 6. Next actions are sampled from the target policy if gamma > 0, else they are its mean. They
    get TD3's smoothing noise.
 7. The targets of actor and critics move every second update (Algorithm 1: every update).
 8. Teacher and student have 800,000 and 1,600,000 updates (two tasks differ, see PRESETS);
    Table G.1 prints 80,000 and 160,000. Alpha, beta and gamma are those of the authors'
    configuration files, not of Table G.2.
 9. The paper does not mention the cosine decays of the step sizes, the clipping of the critics'
    gradient, LayerNorm in the critics of the two large mazes, or the log-std within [-5, 2].
10. A run is scored by the mean of its last five evaluations (return_last_5, or
    normalized_score_last_5). The paper does not say which evaluations its tables show.

This file differs from the code, too: batches come from shuffled epochs (the code draws each
from all rows), next actions and smoothing noise are independent (the code draws both with one
random key), PyTorch's RAdam adds eps in another place, H is at least 1e-6, and a trajectory can
have more than 100 windows (the code's limit, which D4RL's never reach).
"""

import csv
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import time
import zipfile
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import evaluate, load_dataset

ALGORITHM = "qdq"
EVAL_SEED = 1_000_000  # plus the policy update: all runs get the same episodes
FINAL_SEED = 1_000_000_000  # its episodes appear in no earlier evaluation
MAY_BE_ZERO = ("seed",)  # all other counts are at least 1
AT_MOST_ONE = ("discount", "tau", "student_tau", "alpha", "beta")
RESUME_MAY_CHANGE = (
    "resume",
    "run_dir",
    "data",
    "device",
    "compile",
    "total_steps",
    "stop_after",
    "log_every",
    "checkpoint_minutes",
    "eval",
    "eval_every",
    "eval_episodes",
    "final_episodes",
)
STUDENT_DEPENDS_ON = (  # must be equal in both runs for --consistency
    "reward_transform",
    "batch_size",
    "teacher_steps",
    "student_steps",
    "teacher_lr",
    "student_lr",
    "discount",
    "student_tau",
    "hidden_dim",
    "sigma_data",
    "t_min",
    "t_max",
    "karras_rho",
    "grid_points",
)
EVAL_METRICS = ("eval/return", "eval/normalized_score", "eval/episode_length")

# From the authors' code (commit 5bc694f). The paper, too, gives the scale of the frequencies, W, k,
# the smoothing noise and the period of 2.
WINDOW = 200  # rewards in a truncated return, W
STRIDE = 10  # transitions between the starts of two windows, k
FREQUENCY_STD = 16.0  # standard deviation of the random frequencies of the time features
LOG_T_MEAN = -1.2  # the teacher is trained at normally distributed ln t (EDM)
LOG_T_STD = 1.2
STUDENT_TARGET_EVERY = 5  # updates between steps of the student's target
POLICY_EVERY = 2  # updates between steps of the actor, of its target and of the critics' target
TARGET_NOISE = 0.2  # standard deviation of the smoothing noise on next actions
NOISE_CLIP = 0.5  # bound of the smoothing noise
AWR_TEMPERATURE = 6.0  # factor of the advantage in the exponent
AWR_MAX_WEIGHT = 100.0
AWR_ACTIONS = 30  # sampled actions of which v(s) is the mean, M

# Shapes: B batch, S observation dim, A action dim, K sampled returns, M sampled actions,
# E environments.


# ---------------------------------------------------------------- arguments


@dataclass
class Args:
    # run
    env: str = "hopper-medium"  # D4RL task, Minari id or, with a file as --data, Gymnasium id
    data: str = "auto"  # auto, d4rl, minari, bundled, or the path of a file in D4RL's layout
    seed: int = 0  # seed of initialisation, batches and noise; evaluation has its own
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA if there is a GPU
    compile: bool = False  # compile the losses with torch.compile
    quick: bool = False  # our own short protocol, for a machine without a GPU
    resume: str | None = None  # folder of the run to continue
    consistency: str | None = None  # run folder or checkpoint whose finished student is reused
    run_dir: str = "runs"  # root folder of all runs
    total_steps: int = 1_000_000  # updates of the policy stage, after those of teacher and student
    # end early after this policy update, with a result; on --resume, None goes on to total_steps
    stop_after: int | None = None
    log_every: int = 1_000  # updates between log rows, in each stage; each shows one minibatch
    checkpoint_minutes: float = 5.0  # minutes between checkpoints
    eval: bool = True  # --no-eval trains without an environment
    eval_every: int = 5_000  # policy updates between evaluations
    eval_episodes: int = 10  # episodes per evaluation
    final_episodes: int = 100  # episodes that the last policy is scored on

    # data

    reward_transform: Literal["minus_one", "none"] = "none"  # minus_one: r - 1; none: r
    batch_size: int = 256  # transitions or windows per update, B

    # optimisation
    teacher_steps: int = 800_000  # updates of the teacher; deviation 8
    student_steps: int = 1_600_000  # updates of the student; deviation 8
    teacher_lr: float = 5e-4  # Adam step size of the teacher, falling to 0 by a cosine
    student_lr: float = 4e-4  # RAdam step size of the student, falling to 0 by a cosine
    # Adam step size of the actor; its cosine would reach 0 after total_steps updates of the actor,
    # which has half as many, so the step size ends at half
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4  # Adam step size of the critics, constant
    max_grad_norm: float = 10.0  # the gradient of both critics together is clipped to this norm
    discount: float = 0.99  # discount factor gamma, in windows and critics
    student_tau: float = 0.005  # rate of the student's target, moved in every fifth update
    tau: float = 0.005  # rate of the targets of actor and critics, moved in every second update
    hidden_dim: int = 256  # width of the hidden layers: 64, 96, 128, ...
    hidden_layers: int = 3  # hidden layers of actor and critics
    critic_layer_norm: bool = False  # LayerNorm before each activation of the critics

    # algorithm
    sigma_data: float = 0.5  # EDM's sigma_data: assumed standard deviation of normalised returns
    t_min: float = 0.002  # smallest noise level, in units of normalised returns
    t_max: float = 80.0  # largest noise level, T, at which the student is sampled
    karras_rho: float = 7.0  # rho; larger values put more noise levels near t_min
    grid_points: int = 1_000  # noise levels of the distillation, N
    num_samples: int = 50  # sampled returns per next state and action, K
    alpha: float = 0.992  # weight of the ordinary critic target; the pessimistic one has 1 - alpha
    # beta of Eq. 8, in two roles: actions with H above this quantile form the uncertain set U, and
    # outside of U the pessimistic target multiplies Q by m = beta
    beta: float = 0.8
    outside_multiplier: float | None = None  # m outside of U; None means beta, as in Eq. 8
    # m in U: inverse is 1 / H, as in Eq. 8; expand is 1 + (1 - 1 / H) / 10, for negative values
    inside_multiplier: Literal["inverse", "expand"] = "inverse"
    # gamma of Eq. 9, weight of the log-likelihood of the data's actions (not used by awr); above 0,
    # next actions are sampled from the target policy, at 0 they are its mean
    gamma_ent: float = 0.8
    actor_objective: Literal["q", "awr"] = "q"  # q: Eq. 9; awr: advantage-weighted regression


# What all AntMaze tasks share, and what five of them have in addition.
ANTMAZE = dict(
    beta=0.9,
    outside_multiplier=1.0,
    hidden_layers=2,
    reward_transform="minus_one",
    eval_every=100_000,
    eval_episodes=100,
)
AWR = dict(alpha=0.99, inside_multiplier="expand", actor_objective="awr", **ANTMAZE)

# The authors' configuration files and run_consistency.sh (commit 5bc694f). Table G.2 differs:
# beta is 0.8 on hopper and else 0.9; alpha is 0.99 on halfcheetah, hopper-medium(-replay) and
# AntMaze, else 0.95; gamma is 0 on halfcheetah-medium(-replay), else 1; all have 3 layers.
# See deviation 8.
PRESETS = {
    "hopper-medium": dict(alpha=0.992, beta=0.8, gamma_ent=0.8),
    "hopper-medium-replay": dict(alpha=0.992, beta=0.8, gamma_ent=0.8),
    "hopper-medium-expert": dict(alpha=0.992, beta=0.8, gamma_ent=2.0),
    "walker2d-medium": dict(alpha=0.992, beta=0.8, gamma_ent=0.8),
    "walker2d-medium-replay": dict(alpha=0.992, beta=0.8, gamma_ent=0.8),
    "walker2d-medium-expert": dict(alpha=0.992, beta=0.8, gamma_ent=2.0, student_steps=2_000_000),
    "halfcheetah-medium": dict(alpha=0.992, beta=0.9, gamma_ent=0.0),
    "halfcheetah-medium-replay": dict(
        alpha=0.992, beta=0.9, gamma_ent=0.1, student_steps=1_000_000
    ),
    "halfcheetah-medium-expert": dict(alpha=0.992, beta=0.9, gamma_ent=2.0),
    "antmaze-umaze": dict(gamma_ent=0.0, max_grad_norm=7.0, **AWR),
    # alpha is 0.01 in the authors' file, too
    "antmaze-umaze-diverse": dict(alpha=0.01, gamma_ent=1.5, max_grad_norm=7.0, **ANTMAZE),
    "antmaze-medium-play": dict(gamma_ent=0.0, max_grad_norm=7.0, **AWR),
    "antmaze-medium-diverse": dict(gamma_ent=1.0, max_grad_norm=7.0, **AWR),
    "antmaze-large-play": dict(gamma_ent=0.0, max_grad_norm=7.0, critic_layer_norm=True, **AWR),
    "antmaze-large-diverse": dict(gamma_ent=0.0, max_grad_norm=3.0, critic_layer_norm=True, **AWR),
}

# Ours: narrow networks, few samples, fast targets. The behaviour term has a large weight, because
# Q is unreliable after so few updates.
QUICK = dict(
    teacher_steps=3_000,
    student_steps=4_000,
    student_tau=0.1,
    total_steps=18_000,
    hidden_dim=128,
    num_samples=5,
    actor_lr=1e-3,
    critic_lr=1e-3,
    tau=0.03,
    gamma_ent=16.0,
    eval_every=6_000,
    eval_episodes=10,
    final_episodes=20,
    log_every=500,
)


# ----------------------------------------------------------------- networks


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x)) with one exponential, which on a CPU is faster than F.mish."""
    if x.is_cuda:
        return F.mish(x)
    exp = x.clamp(max=30).exp()  # beyond 30, mish(x) is x
    w = exp * (exp + 2)
    return x * w / (w + 2)


class ReturnNetwork(nn.Module):
    """NN of teacher and student: (obs [B, S], act [B, A], scaled return x [B, 1], t) -> [B, 1].

    The noise level t is [B, 1], or [1, 1] if all rows share it.
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int):
        super().__init__()
        # The frequencies are not trained, but a target network averages them like weights.
        frequencies = FREQUENCY_STD * torch.randn(8)
        self.frequencies = nn.Parameter(frequencies, requires_grad=False)
        self.time1 = nn.Linear(16, 32)
        self.time2 = nn.Linear(32, 32)
        self.layer1 = nn.Linear(obs_dim + act_dim + 1 + 32, hidden_dim)
        self.layer2 = nn.Linear(hidden_dim, hidden_dim)
        self.layer3 = nn.Linear(hidden_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, 1)
        for layer in self.children():
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.norm1 = nn.GroupNorm(32, hidden_dim, eps=1e-6)
        self.norm2 = nn.GroupNorm(32, hidden_dim, eps=1e-6)
        self.norm3 = nn.GroupNorm(32, hidden_dim, eps=1e-6)

    def forward(self, obs: Tensor, act: Tensor, x: Tensor, t: Tensor) -> Tensor:
        angle = 2 * math.pi * self.frequencies * t.log() / 4  # EDM's c_noise is ln(t) / 4
        code = torch.cat([angle.sin(), angle.cos()], dim=1)
        code = F.silu(self.time1(code))
        code = F.silu(self.time2(code))
        code = code.expand(len(x), -1)  # [B, 32], also if all rows share t
        h = torch.cat([obs, act, x, code], dim=1)
        h = F.silu(self.norm1(self.layer1(h)))
        h = F.silu(self.norm2(self.layer2(h)))
        h = F.silu(self.norm3(self.layer3(h)))
        return self.out(h)


class Actor(nn.Module):
    """pi(a|s), a Gaussian: obs [B, S] -> mean [B, A] in [-1, 1], standard deviation [A]."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int, hidden_layers: int):
        super().__init__()
        self.layers = nn.ModuleList()
        fan_in = obs_dim
        for _ in range(hidden_layers):
            layer = nn.Linear(fan_in, hidden_dim)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
            self.layers.append(layer)
            fan_in = hidden_dim
        self.out = nn.Linear(hidden_dim, act_dim)
        nn.init.orthogonal_(self.out.weight, math.sqrt(2))
        nn.init.zeros_(self.out.bias)
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        h = obs
        for layer in self.layers:
            h = F.relu(layer(h))
        mu = self.out(h).tanh()
        std = self.log_std.clamp(-5, 2).exp()  # deviation 9
        return mu, std


class Critics(nn.Module):
    """Two independent Q-networks: (obs [B, S], act [B, A]) -> [2, B]."""

    def __init__(
        self, obs_dim: int, act_dim: int, hidden_dim: int, hidden_layers: int, layer_norm: bool
    ):
        super().__init__()
        self.layer_norm = layer_norm
        self.weights = nn.ParameterList()  # [2, fan in, fan out]
        self.biases = nn.ParameterList()  # [2, 1, fan out]
        sizes = [obs_dim + act_dim] + [hidden_dim] * hidden_layers + [1]
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
            weight = torch.empty(2, fan_in, fan_out)
            for head in weight:  # one by one: xavier_uniform_ misreads the fans of a 3-d tensor
                nn.init.xavier_uniform_(head)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(2, 1, fan_out)))
        self.scales = nn.ParameterList()  # of LayerNorm, [2, 1, hidden]
        self.offsets = nn.ParameterList()
        if layer_norm:
            for _ in range(hidden_layers):
                self.scales.append(nn.Parameter(torch.ones(2, 1, hidden_dim)))
                self.offsets.append(nn.Parameter(torch.zeros(2, 1, hidden_dim)))

    def forward(self, obs: Tensor, act: Tensor) -> Tensor:
        h = torch.cat([obs, act], dim=1)
        h = h.expand(2, -1, -1)  # [2, B, S + A]
        last = len(self.weights) - 1
        for layer in range(last):
            h = torch.baddbmm(self.biases[layer], h, self.weights[layer])  # [2, B, hidden]
            if self.layer_norm:  # deviation 9
                h = F.layer_norm(h, h.shape[-1:], eps=1e-6)
                h = self.scales[layer] * h + self.offsets[layer]
            h = mish(h)
        return torch.baddbmm(self.biases[last], h, self.weights[last]).squeeze(2)


# ------------------------------------- consistency model of the Q-distribution


def truncated_returns(
    rew: np.ndarray, ends: np.ndarray, window: int, stride: int, discount: float
) -> tuple[np.ndarray, np.ndarray]:
    """The Q dataset of Eq. 5: the rows where windows begin, and their discounted returns.

    Windows begin every stride rows of a trajectory, up to the first that reaches its end, which
    may be shorter. ends marks the last row of each trajectory.
    """
    powers = discount ** np.arange(window)  # deviation 1
    rew = rew.astype(np.float64)
    rows = []
    returns = []
    first = 0
    for stop in np.flatnonzero(ends) + 1:
        for row in range(first, stop, stride):
            rewards = rew[row : min(row + window, stop)]
            rows.append(row)
            returns.append(powers[: len(rewards)] @ rewards)  # Eq. 5
            if row + window >= stop:
                break
        first = stop
    return np.array(rows), np.array(returns)


def karras_grid(points: int, t_min: float, t_max: float, rho: float) -> Tensor:
    """Noise levels t_0 = t_max > ... > t_{N-1} = t_min, evenly spaced in t^(1/rho); [N, 1]."""
    roots = torch.linspace(t_max ** (1 / rho), t_min ** (1 / rho), points, dtype=torch.float64)
    return roots[:, None] ** rho


def denoise(
    teacher: nn.Module, obs: Tensor, act: Tensor, x: Tensor, t: Tensor, args: Args
) -> Tensor:
    """Teacher D(x, t | s, a) [B, 1]: EDM's estimate of the return without the noise t of x."""
    total = t**2 + args.sigma_data**2
    c_in = 1 / total.sqrt()
    c_skip = args.sigma_data**2 / total
    c_out = t * args.sigma_data / total.sqrt()
    return c_skip * x + c_out * teacher(obs, act, c_in * x, t)


def consistency_fn(
    student: nn.Module, obs: Tensor, act: Tensor, x: Tensor, t: Tensor, args: Args
) -> Tensor:
    """Student f(x, t | s, a) [B, 1], with the boundary condition f(x, t_min) = x."""
    total = t**2 + args.sigma_data**2
    above = t - args.t_min
    c_in = 1 / total.sqrt()
    c_skip = args.sigma_data**2 / (above**2 + args.sigma_data**2)
    c_out = above * args.sigma_data / total.sqrt()
    return c_skip * x + c_out * student(obs, act, c_in * x, t)


def heun_step(
    teacher: nn.Module,
    obs: Tensor,
    act: Tensor,
    x: Tensor,
    t: Tensor,
    t_next: Tensor,
    args: Args,
) -> Tensor:
    """From t to t_next along the teacher's probability-flow ODE dx/dt = (x - D(x, t)) / t."""
    slope = (x - denoise(teacher, obs, act, x, t, args)) / t
    x_euler = x + (t_next - t) * slope
    slope_next = (x_euler - denoise(teacher, obs, act, x_euler, t_next, args)) / t_next
    return x + (t_next - t) * (slope + slope_next) / 2


def one_step_samples(
    student: nn.Module, obs: Tensor, act: Tensor, noise: Tensor, args: Args
) -> Tensor:
    """f(T z, T | s, a) for K normals z in each row: noise [B, K] -> normalised returns [B, K]."""
    num_samples = noise.shape[1]
    obs = obs.repeat_interleave(num_samples, dim=0)  # [B K, S]
    act = act.repeat_interleave(num_samples, dim=0)  # [B K, A]
    x = args.t_max * noise.reshape(-1, 1)  # [B K, 1]
    t = torch.full_like(x[:1], args.t_max)  # [1, 1]
    return consistency_fn(student, obs, act, x, t, args).view_as(noise)


def sample_returns(
    student: nn.Module, obs: Tensor, act: Tensor, noise: Tensor, q_range: Tensor, args: Args
) -> Tensor:
    """One-step samples in units of the return, not clipped; noise [B, K] -> [B, K].

    A CPU takes 64 rows at a time, which fit into its cache. Compiled, this is a third faster.
    """
    piece = len(obs) if obs.is_cuda else 64
    samples = []
    for rows in zip(obs.split(piece), act.split(piece), noise.split(piece)):
        samples.append(one_step_samples(student, *rows, args))
    x = torch.cat(samples)
    low, high = q_range
    return low + (x + 1) / 2 * (high - low)


def multiplier(h: Tensor, args: Args) -> Tensor:
    """The factor m [B] of Q_L = m Q in Eq. 8, from the uncertainties H [B] of the batch."""
    threshold = torch.quantile(h, args.beta)  # h_beta
    inverse = 1 / h.clamp(min=1e-6)  # a collapsed student has H = 0
    if args.inside_multiplier == "inverse":
        inside = inverse
    else:
        inside = 1 + (1 - inverse) / 10  # deviation 3
    outside = args.beta
    if args.outside_multiplier is not None:
        outside = args.outside_multiplier  # deviation 3
    return torch.where(h > threshold, inside, outside)  # Eq. 8, where U is H > h_beta


# -------------------------------------------------------------------- agent


class Windows(NamedTuple):
    obs: Tensor  # [B, S], at the beginning of the window
    act: Tensor  # [B, A]
    x: Tensor  # [B, 1], truncated return; those of the data are scaled to [-1, 1]


class Batch(NamedTuple):
    obs: Tensor  # [B, S]
    act: Tensor  # [B, A] in [-1, 1]
    rew: Tensor  # [B], transformed
    next_obs: Tensor  # [B, S]
    not_done: Tensor  # [B], 0 after a terminal, else 1; a timeout is not a terminal


class QDQ:
    """Networks, targets and optimisers of all stages; `update` is one training step."""

    NETWORKS = (
        "teacher",
        "student",
        "student_target",
        "actor",
        "actor_target",
        "critic",
        "critic_target",
    )
    OPTIMIZERS = ("teacher_adam", "student_radam", "actor_adam", "critic_adam")
    POLICY = ("actor",)  # the networks that act
    # logged as train/<name>; of one minibatch; Q-values are in units of the transformed reward
    METRICS = (
        "teacher_loss",  # weighted mean of (D(x + t z, t) - x)^2, normalised returns
        "student_loss",  # mean of (f(x_t, t_i) - f_target(x_h, t_{i+1}))^2, normalised returns
        "critic_loss",  # Eq. 7: alpha loss_high + (1 - alpha) loss_low
        "loss_high",  # mean of (Q_i - y_H)^2, summed over both critics, with the ordinary target
        "loss_low",  # mean of (Q_i - y_L)^2, summed over both critics, with the pessimistic target
        "q_mean",  # mean of Q_i over critics and batch
        "td_target",  # mean of alpha y_H + (1 - alpha) y_L
        "uncertainty",  # mean of H
        "multiplier",  # mean of m
        "sampled_return",  # mean of the student's samples, in units of the return
        "actor_loss",  # of the newest actor update, as are the two below
        "policy_value",  # mean of min Q(s, mu(s)), or of v(s) in advantage-weighted regression
        "log_prob",  # mean of log pi(a|s) of the data's actions
    )

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device: str = "cpu"):
        self.args = args
        self.device = device
        self.act_dim = act_dim
        self.step = 0  # updates so far, in all stages
        self.stages = (  # and their updates
            ("teacher", args.teacher_steps),
            ("student", args.student_steps),
            ("policy", args.total_steps),
        )

        self.teacher = ReturnNetwork(obs_dim, act_dim, args.hidden_dim).to(device)
        self.teacher_adam = torch.optim.Adam(self.teacher.parameters(), fused=True)

        # As in the authors' code, the student's target starts from its own weights, not as a copy.
        self.student = ReturnNetwork(obs_dim, act_dim, args.hidden_dim).to(device)
        self.student_target = ReturnNetwork(obs_dim, act_dim, args.hidden_dim).to(device)
        self.student_target.requires_grad_(False)
        self.student_radam = torch.optim.RAdam(self.student.parameters(), foreach=True)

        self.actor = Actor(obs_dim, act_dim, args.hidden_dim, args.hidden_layers).to(device)
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), fused=True)
        self.actor_metrics = {}  # of the actor's newest update

        self.critic = Critics(
            obs_dim, act_dim, args.hidden_dim, args.hidden_layers, args.critic_layer_norm
        )
        self.critic.to(device)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        critic_parameters = self.critic.parameters()
        self.critic_adam = torch.optim.Adam(critic_parameters, lr=args.critic_lr, fused=True)

        self.q_range = torch.tensor([-1.0, 1.0], device=device)  # of the data's truncated returns
        grid = karras_grid(args.grid_points, args.t_min, args.t_max, args.karras_rho)
        self.grid = grid.to(device, torch.get_default_dtype())  # [N, 1]

        if args.compile:
            self.teacher_loss = torch.compile(self.teacher_loss, dynamic=False)
            self.student_loss = torch.compile(self.student_loss, dynamic=False)
            self.td_targets = torch.compile(self.td_targets, dynamic=False)
            self.critic_loss = torch.compile(self.critic_loss, dynamic=False)
            self.actor_loss = torch.compile(self.actor_loss, dynamic=False)
            self.awr_loss = torch.compile(self.awr_loss, dynamic=False)

    def teacher_loss(self, batch: Windows, t: Tensor, z: Tensor) -> Tensor:
        """EDM's denoising loss, at noise levels t and with standard normals z, both [B, 1]."""
        args = self.args
        x_t = batch.x + t * z
        error = denoise(self.teacher, batch.obs, batch.act, x_t, t, args) - batch.x
        weight = (t**2 + args.sigma_data**2) / (t * args.sigma_data) ** 2
        return (weight * error.square()).mean()

    def student_loss(self, batch: Windows, i: Tensor, z: Tensor) -> Tensor:
        """Consistency distillation, for points i [B] of the grid and standard normals z [B, 1].

        f at t_i is regressed on the target network's f at t_{i+1}, one Heun step along the
        teacher's ODE.
        """
        args = self.args
        obs, act, x = batch
        t = self.grid[i]  # [B, 1]
        t_next = self.grid[i + 1]
        x_t = x + t * z
        with torch.no_grad():
            x_h = heun_step(self.teacher, obs, act, x_t, t, t_next, args)
            goal = consistency_fn(self.student_target, obs, act, x_h, t_next, args)
        f = consistency_fn(self.student, obs, act, x_t, t, args)
        return (f - goal).square().mean()

    @torch.no_grad()
    def td_targets(
        self, batch: Batch, next_noise: Tensor, smoothing: Tensor, return_noise: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Targets y_H (ordinary) and y_L (pessimistic) of the two losses of Eq. 7, [B] each.

        H in y_H stands for "high", not for the uncertainty. The noises are standard normal:
        [B, A], [B, A] and [B, K]. Returns (y_H, y_L, metrics).
        """
        args = self.args
        mu, std = self.actor_target(batch.next_obs)
        next_act = mu
        if args.gamma_ent > 0:
            next_act = mu + std * next_noise  # deviation 6
        smoothing = (TARGET_NOISE * smoothing).clamp(-NOISE_CLIP, NOISE_CLIP)
        next_act = (next_act + smoothing).clamp(-1, 1)  # [B, A], deviation 6

        samples = sample_returns(
            self.student, batch.next_obs, next_act, return_noise, self.q_range, args
        )  # [B, K]
        h = samples.std(dim=1, unbiased=False)  # Eq. 6, deviation 2
        m = multiplier(h, args)

        q = self.critic_target(batch.next_obs, next_act).amin(dim=0)  # [B]
        future = args.discount * batch.not_done * q
        target_high = batch.rew + future
        target_low = batch.rew + m * future  # Eq. 8: Q_L = m Q
        metrics = {
            "uncertainty": h.mean(),
            "multiplier": m.mean(),
            "sampled_return": samples.mean(),
        }
        return target_high, target_low, metrics

    def critic_loss(
        self, batch: Batch, target_high: Tensor, target_low: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 7: alpha L_H + (1 - alpha) L_L. Returns (loss, metrics).

        It has the gradient of a single loss with the target alpha y_H + (1 - alpha) y_L.
        """
        args = self.args
        q = self.critic(batch.obs, batch.act)  # [2, B]
        loss_high = (q - target_high).square().sum(dim=0).mean()  # Eq. 2
        loss_low = (q - target_low).square().sum(dim=0).mean()  # Eq. 2 with y_L
        loss = args.alpha * loss_high + (1 - args.alpha) * loss_low  # Eq. 7
        target = args.alpha * target_high + (1 - args.alpha) * target_low
        metrics = {
            "critic_loss": loss.detach(),
            "loss_high": loss_high.detach(),
            "loss_low": loss_low.detach(),
            "q_mean": q.detach().mean(),
            "td_target": target.mean(),
        }
        return loss, metrics

    def actor_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 9: -min Q(s, mu(s)) - gamma log pi(a|s) of the data. Returns (loss, metrics)."""
        mu, std = self.actor(batch.obs)
        log_prob = Normal(mu, std, validate_args=False).log_prob(batch.act).sum(dim=1)  # [B]
        q = self.critic(batch.obs, mu).amin(dim=0)  # [B], deviation 5
        loss = -q.mean() - self.args.gamma_ent * log_prob.mean()  # Eq. 9, deviation 5
        metrics = {
            "actor_loss": loss.detach(),
            "policy_value": q.detach().mean(),
            "log_prob": log_prob.detach().mean(),
        }
        return loss, metrics

    def awr_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Advantage-weighted regression (deviation 4). Returns (loss, metrics).

        The value v(s) is the mean over M actions of the target policy, made from noise [M, B, A].
        """
        mu, std = self.actor(batch.obs)
        log_prob = Normal(mu, std, validate_args=False).log_prob(batch.act).sum(dim=1)  # [B]
        with torch.no_grad():
            target_mu, target_std = self.actor_target(batch.obs)
            act = (target_mu + target_std * noise).flatten(0, 1)  # [M B, A]
            obs = batch.obs.repeat(len(noise), 1)  # [M B, S]
            q = self.critic(obs, act).amin(dim=0)  # [M B]
            value = q.view(len(noise), -1).mean(dim=0)  # v(s), [B]
            advantage = self.critic(batch.obs, batch.act).amin(dim=0) - value
            weight = (AWR_TEMPERATURE * advantage).exp().clamp(max=AWR_MAX_WEIGHT)
        loss = -(weight * log_prob).mean()
        metrics = {
            "actor_loss": loss.detach(),
            "policy_value": value.mean(),
            "log_prob": log_prob.detach().mean(),
        }
        return loss, metrics

    def update(self, stage: str, batch: Windows | Batch) -> dict[str, Tensor]:
        """One update of a stage; returns its metrics, 0-d tensors on the device."""
        args = self.args
        if stage == "teacher":
            metrics = self.update_teacher(batch, self.step)
        elif stage == "student":
            metrics = self.update_student(batch, self.step - args.teacher_steps)
        else:
            before = args.teacher_steps + args.student_steps
            metrics = self.update_policy(batch, self.step - before)
        self.step += 1
        return metrics

    def update_teacher(self, batch: Windows, n: int) -> dict[str, Tensor]:
        """Update n = 0, 1, ... of the teacher."""
        args = self.args
        set_lr(self.teacher_adam, cosine(args.teacher_lr, n / args.teacher_steps))  # deviation 9
        log_t = LOG_T_MEAN + LOG_T_STD * torch.randn(len(batch.x), 1, device=self.device)
        z = torch.randn(len(batch.x), 1, device=self.device)
        loss = self.teacher_loss(batch, log_t.exp(), z)
        gradient_step(self.teacher_adam, loss)
        return {"teacher_loss": loss.detach()}

    def update_student(self, batch: Windows, n: int) -> dict[str, Tensor]:
        """Update n = 0, 1, ... of the student, with the finished teacher."""
        args = self.args
        set_lr(self.student_radam, cosine(args.student_lr, n / args.student_steps))  # deviation 9
        # As in the authors' code, t_0 = t_max, at which the student is sampled, is never drawn.
        i = torch.randint(1, args.grid_points - 1, (len(batch.x),), device=self.device)
        z = torch.randn(len(batch.x), 1, device=self.device)
        loss = self.student_loss(batch, i, z)
        gradient_step(self.student_radam, loss)
        if n % STUDENT_TARGET_EVERY == 0:
            soft_update(self.student_target, self.student, args.student_tau)
        return {"student_loss": loss.detach()}

    def update_policy(self, batch: Batch, n: int) -> dict[str, Tensor]:
        """Update n = 0, 1, ... of critics and actor, with the finished student; Algorithm 1."""
        args = self.args
        batch_size = len(batch.obs)
        next_noise = torch.randn(batch_size, self.act_dim, device=self.device)
        smoothing = torch.randn(batch_size, self.act_dim, device=self.device)
        return_noise = torch.randn(batch_size, args.num_samples, device=self.device)

        # critics
        target_high, target_low, metrics = self.td_targets(
            batch, next_noise, smoothing, return_noise
        )
        loss, critic_metrics = self.critic_loss(batch, target_high, target_low)
        gradient_step(self.critic_adam, loss, args.max_grad_norm)  # deviation 9

        # actor and targets
        if n % POLICY_EVERY == 0:  # deviation 7
            soft_update(self.critic_target, self.critic, args.tau)
            progress = n // POLICY_EVERY / args.total_steps  # in the actor's own updates
            set_lr(self.actor_adam, cosine(args.actor_lr, progress))  # deviation 9
            if args.actor_objective == "q":
                loss, self.actor_metrics = self.actor_loss(batch)
            else:
                act_noise = torch.randn(AWR_ACTIONS, batch_size, self.act_dim, device=self.device)
                loss, self.actor_metrics = self.awr_loss(batch, act_noise)  # deviation 4
            gradient_step(self.actor_adam, loss)
            soft_update(self.actor_target, self.actor, args.tau)

        return {**metrics, **critic_metrics, **self.actor_metrics}

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The evaluated policy: obs [E, S] -> actions [E, A], the mean of the actor."""
        rows = torch.as_tensor(obs, dtype=torch.get_default_dtype(), device=self.device)
        mu, _ = self.actor(rows)
        return mu.cpu().numpy()

    def state_dict(self) -> dict:
        parts = (*self.NETWORKS, *self.OPTIMIZERS)
        state = {name: getattr(self, name).state_dict() for name in parts}
        others = {"q_range": self.q_range, "actor_metrics": self.actor_metrics, "step": self.step}
        return {**state, **others}

    def load_state_dict(self, state: dict) -> None:
        for name in (*self.NETWORKS, *self.OPTIMIZERS):
            getattr(self, name).load_state_dict(state[name])
        self.q_range = state["q_range"].to(self.device)
        for name, value in state["actor_metrics"].items():
            self.actor_metrics[name] = value.to(self.device)
        self.step = state["step"]


# -------------------------- helpers, word for word in dac.py, qdq.py, cped.py


@torch.no_grad()
def soft_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online."""
    for old, new in zip(target.parameters(), online.parameters()):
        old.lerp_(new, tau)


def gradient_step(
    optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float = math.inf
) -> None:
    """One optimiser step, with the gradient clipped to max_norm over all parameters together."""
    optimizer.zero_grad()
    loss.backward()
    if max_norm < math.inf:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
    optimizer.step()


def cosine(start: float, progress: float) -> float:
    """Falls from start at progress 0 to 0 at progress 1."""
    return start * (1 + math.cos(math.pi * progress)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    optimizer.param_groups[0]["lr"] = lr


def shuffled_batches(num_rows: int, batch_size: int, seed: int, step: int, device: str):
    """Yields the row indices of updates step, step + 1, ... from shuffled epochs.

    The last batch of an epoch can be short. On the same device a resumed run draws the batches
    that it would have drawn without the break.
    """
    per_epoch = math.ceil(num_rows / batch_size)
    epoch, skip = divmod(step, per_epoch)
    while True:
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(num_rows, generator=generator, device=device)
        yield from order.split(batch_size)[skip:]
        epoch += 1
        skip = 0


def parse_args(argv: list[str] | None) -> tuple[Args, dict | None]:
    """Defaults, the task's preset, --quick, the command line: each overrides the one before.

    With --resume, returns the arguments of that run and its checkpoint.
    """
    typed, _ = tyro.cli(Args, args=argv, return_unknown_args=True, add_help=False)
    if typed.resume is None:
        task = re.sub(r"-v\d+$", "", typed.env)
        start = replace(Args(), **PRESETS.get(task, {}))
        if typed.quick:
            start = replace(start, **QUICK)
        args = tyro.cli(Args, args=argv, default=start, description=__doc__)
        check_args(args)
        return args, None

    folder = Path(typed.resume)
    path = folder / "checkpoint.pt"
    if not (folder / "args.json").exists():
        sys.exit(f"error: --resume {folder}: this is not the folder of a run: it has no args.json")
    if not path.exists():
        sys.exit(f"error: {path} does not exist: the run wrote none yet; start it again")
    if not zipfile.is_zipfile(path):
        sys.exit(f"error: {path} is not a checkpoint, or is damaged")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint.get("algorithm") != ALGORITHM:
        sys.exit(f"error: {path} was written by {checkpoint.get('algorithm')}.py")
    stored = checkpoint["args"]
    unknown = stored.keys() - {field.name for field in fields(Args)}
    if unknown:
        names = ", ".join(sorted(unknown))
        sys.exit(f"error: {path} is from another version of {ALGORITHM}.py, with {names}")
    args = tyro.cli(Args, args=argv, default=replace(Args(), **stored), description=__doc__)
    check_args(args)
    for name, value in stored.items():
        if name not in RESUME_MAY_CHANGE and getattr(args, name) != value:
            flag = name.replace("_", "-")
            sys.exit(f"error: --{flag} cannot change on --resume: the run was started with {value}")
    return args, checkpoint


def check_args(args: Args) -> None:
    """Ends the program if a number is out of range or --env cannot name a folder."""
    for name, value in asdict(args).items():
        high = 1 if name in AT_MOST_ONE else 2**31 - 1
        for number in value if isinstance(value, tuple) else (value,):  # cped.py has tables
            low = 0 if isinstance(number, float) or name in MAY_BE_ZERO else 1
            if type(number) in (int, float) and not low <= number <= high:  # NaN is in no range
                flag = name.replace("_", "-")
                sys.exit(f"error: --{flag} {number}: must be from {low} to {high}")
    if not re.fullmatch(r"\w[\w.:+-]*(/\w[\w.:+-]*)*", args.env):
        sys.exit(f"error: --env {args.env!r}: use letters, digits, _ . : + -, and / between parts")


def new_folder(args: Args) -> Path:
    """Makes <run_dir>/<task>/<algorithm>/seed<k>-<time>, adding -2, -3, ... if it exists."""
    parent = Path(args.run_dir) / args.env / ALGORITHM
    parent.mkdir(parents=True, exist_ok=True)
    name = time.strftime(f"seed{args.seed}-%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):  # of another run, started in the same second
            folder.mkdir()
            return folder


def stop_if_not_finite(values: dict[str, float], step: int, folder: Path) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            print(file=sys.stderr)  # ends the line of the progress bar
            sys.exit(
                f"error: {name} is {value} at update {step};"
                f" the last good checkpoint, if there is one, is in {folder}"
            )


def save(content: dict, path: Path) -> None:
    """Replaces the file in one step: a crash leaves the old file or the new one, complete."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # half a file, if the disk is full


class Log:
    """Logs to metrics.csv and TensorBoard; rows: what a resumed run has logged so far."""

    def __init__(self, folder: Path, columns: list[str], rows: list[dict]):
        self.rows = rows
        self.file = (folder / "metrics.csv").open("w", newline="", buffering=1)
        self.table = csv.DictWriter(self.file, columns)
        self.table.writeheader()
        self.table.writerows(rows)
        last = rows[-1]["step"] if rows else 0
        self.board = SummaryWriter(str(folder), purge_step=last + 1)

    def write(self, row: dict) -> None:
        self.rows.append(row)
        self.table.writerow(row)
        for name, value in row.items():
            if name != "step":
                self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.file.close()
        self.board.close()


# --------------------------------------------------------------------- main


def reuse_student(agent: QDQ, args: Args, info: dict) -> None:
    """Copies teacher and student of the run --consistency, if it trained them as this run would."""
    path = Path(args.consistency)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.exists():
        sys.exit(f"error: --consistency {args.consistency}: {path} does not exist")
    if not zipfile.is_zipfile(path):
        sys.exit(f"error: --consistency: {path} is not a checkpoint, or is damaged")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint.get("algorithm") != ALGORITHM:
        sys.exit(f"error: --consistency: {path} is not a checkpoint of {ALGORITHM}.py")
    stored = {**asdict(Args()), **checkpoint["args"]}
    if stored.keys() != asdict(args).keys():
        sys.exit(f"error: --consistency: {path} is from another version of {ALGORITHM}.py")
    if checkpoint["info"]["sha256"] != info["sha256"]:
        trained = checkpoint["info"]["id"]
        sys.exit(f"error: --consistency: {path} was trained on other data, {trained}")
    for name in STUDENT_DEPENDS_ON:
        value = getattr(args, name)
        if stored[name] != value:
            flag = name.replace("_", "-")
            sys.exit(f"error: --consistency: {path} has --{flag} {stored[name]}, this run {value}")
    done = args.teacher_steps + args.student_steps
    state = checkpoint["agent"]
    if state["step"] < done:
        sys.exit(f"error: --consistency: the student of {path} is not finished")
    agent.teacher.load_state_dict(state["teacher"])
    agent.student.load_state_dict(state["student"])
    agent.step = done


def main(argv: list[str] | None = None) -> dict:
    args, checkpoint = parse_args(argv)
    if args.hidden_dim < 64 or args.hidden_dim % 32 > 0:
        sys.exit(f"error: --hidden-dim {args.hidden_dim}: must be a multiple of 32 and at least 64")
    if args.grid_points < 3:
        sys.exit(f"error: --grid-points {args.grid_points}: must be 3 or more")
    if not 0 < args.t_min < args.t_max:
        sys.exit(f"error: --t-min {args.t_min}: must be above 0 and below --t-max {args.t_max}")
    for name in ("sigma_data", "karras_rho"):
        if getattr(args, name) == 0:
            sys.exit(f"error: --{name.replace('_', '-')} 0: must be above 0")
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: PyTorch finds no CUDA device here")
    device_name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    stop = args.teacher_steps + args.student_steps
    stop += min(args.stop_after or args.total_steps, args.total_steps)

    # data
    arrays, info = load_dataset(args.env, args.data, need_env=args.eval)
    if checkpoint is not None and checkpoint["info"]["sha256"] != info["sha256"]:
        trained = checkpoint["info"]["id"]
        sys.exit(f"error: {args.resume} was trained on {trained}, not on this data: see --data")
    if args.reward_transform == "minus_one":
        arrays["rew"] = arrays["rew"] - 1
    arrays["act"] = arrays["act"].clip(-1 + 1e-5, 1 - 1e-5)
    data = Batch(*(torch.as_tensor(arrays[name], device=device) for name in Batch._fields))
    obs_dim = data.obs.shape[1]
    act_dim = data.act.shape[1]

    # Q dataset
    begins, returns = truncated_returns(
        arrays["rew"], arrays["ends"], WINDOW, STRIDE, args.discount
    )
    low = returns.min()
    high = returns.max()
    print(f"windows     {len(begins):,}, with truncated returns from {low:.7g} to {high:.7g}")
    if low == high:
        sys.exit("error: all truncated returns are equal: there is no distribution to learn")
    x = 2 * (returns - low) / (high - low) - 1
    x = torch.as_tensor(x, dtype=torch.float32, device=device)
    begins = torch.as_tensor(begins, device=device)
    windows = Windows(data.obs[begins], data.act[begins], x[:, None])
    datasets = {"teacher": windows, "student": windows, "policy": data}

    # agent
    torch.manual_seed(args.seed)
    agent = QDQ(obs_dim, act_dim, args, device)
    agent.q_range[0] = low
    agent.q_range[1] = high
    if checkpoint is None and args.consistency is not None:
        reuse_student(agent, args, info)
    if checkpoint is not None:
        agent.load_state_dict(checkpoint["agent"])
        torch.set_rng_state(checkpoint["rng"])
        if device == "cuda" and "cuda_rng" in checkpoint:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        if agent.step > stop:
            sys.exit(f"error: {args.resume} is at update {agent.step}, beyond its end at {stop}")

    # run folder
    if checkpoint is None:
        folder = new_folder(args)
    else:
        folder = Path(args.resume)
        (folder / "result.json").unlink(missing_ok=True)  # it tells of an earlier end
    settings = asdict(replace(args, resume=None))
    record = {"args": settings, "dataset": info, "device": device_name, "sha256": {}}
    for source in (__file__, inspect.getsourcefile(load_dataset)):
        record["sha256"][Path(source).name] = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    (folder / "args.json").write_text(json.dumps(record, indent=1))
    train_metrics = [f"train/{name}" for name in agent.METRICS]
    columns = ["step", *train_metrics, *EVAL_METRICS, "time/updates_per_s"]
    log = Log(folder, columns, checkpoint["rows"] if checkpoint else [])
    log.board.add_text("args", json.dumps(settings, indent=1))
    print(f"run folder  {folder}")
    print(f"device      {device_name}")
    if agent.step == stop:
        print("stop        it has ended; a larger --stop-after or --total-steps continues it")
    if args.quick:
        print("protocol    --quick is ours: its scores cannot be compared with published ones")
    if args.compile:
        print("compile     the first update takes about a minute")

    # training
    seconds = checkpoint["seconds"] if checkpoint else 0.0
    started = saved = logged = time.perf_counter()
    logged_step = agent.step
    bar = tqdm(initial=agent.step, total=stop, unit=" updates", mininterval=0.5)
    end = 0  # updates until the end of a stage
    for stage, length in agent.stages:
        begin = end
        end = min(begin + length, stop)
        dataset = datasets[stage]
        skip = agent.step - begin
        batches = shuffled_batches(len(dataset.obs), args.batch_size, args.seed, skip, device)
        bar.set_description(stage, refresh=False)
        while agent.step < end:
            indices = next(batches)
            batch = type(dataset)(*(column.index_select(0, indices) for column in dataset))
            metrics = agent.update(stage, batch)
            step = agent.step
            bar.update()

            row = {"step": step}
            if step % args.log_every == 0:
                for name, value in metrics.items():
                    row[f"train/{name}"] = value.item()
                row["time/updates_per_s"] = (step - logged_step) / (time.perf_counter() - logged)
            updates = step - begin  # of this stage
            due = updates % args.eval_every == 0 or updates == length
            if args.eval and stage == "policy" and due:
                evaluation = evaluate(agent.act, info, args.eval_episodes, EVAL_SEED + updates)
                for name, values in evaluation.items():
                    row[f"eval/{name}"] = float(values.mean())
                means = [f"{name} {values.mean():.1f}" for name, values in evaluation.items()]
                bar.write(f"policy update {updates:,}: {', '.join(means)}")
            if len(row) > 1:
                stop_if_not_finite(row, step, folder)
                log.write(row)
                logged = time.perf_counter()
                logged_step = step

            if time.perf_counter() - saved > 60 * args.checkpoint_minutes or step == end:
                content = {
                    "algorithm": ALGORITHM,
                    "args": settings,
                    "info": info,
                    "obs_dim": obs_dim,
                    "act_dim": act_dim,
                    "agent": agent.state_dict(),
                    "rows": log.rows,
                    "seconds": seconds + time.perf_counter() - started,
                    "rng": torch.get_rng_state(),
                }
                if device == "cuda":
                    content["cuda_rng"] = torch.cuda.get_rng_state()
                for name in agent.NETWORKS:
                    weights = content["agent"][name].items()
                    # a NaN or infinite weight shows in the sum
                    sums = {f"{name}.{key}": tensor.sum().item() for key, tensor in weights}
                    stop_if_not_finite(sums, step, folder)
                save(content, folder / "checkpoint.pt")
                saved = time.perf_counter()
    bar.close()

    # result
    result = {
        "algorithm": ALGORITHM,
        "env": args.env,
        "seed": args.seed,
        "dataset": info["id"],
        "sha256": info["sha256"],
        "updates": agent.step,
        "seconds": seconds + time.perf_counter() - started,
        "versions": info.get("versions"),
        "device": device_name,
    }
    if args.eval:
        for name in ("return", "normalized_score"):
            values = [row[f"eval/{name}"] for row in log.rows if f"eval/{name}" in row]
            if values:  # a task without reference returns has no normalized score
                result[f"{name}_last_5"] = mean(values[-5:])  # deviation 10
                result[f"{name}_best"] = max(values)
        final = evaluate(agent.act, info, args.final_episodes, FINAL_SEED)
        for name, values in final.items():
            result[f"final_{name}"] = float(values.mean())
            result[f"final_{name}_error"] = float(values.std() / len(values) ** 0.5)
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    log.close()
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped: --resume continues from the last checkpoint; without one, start again")
    except OSError as error:  # a full disk, a folder that cannot be written
        sys.exit(f"error: {error} (the last checkpoint, if there is one, is intact: see --resume)")
