"""QDQ: Q-Distribution guided Q-learning (Zhang, Fang, Shi, Wang, Jing; NeurIPS 2024; arXiv:2410.20312).

A consistency model of the truncated returns in the data tells how uncertain a pair (s, a) is: H, the spread of its samples.
Where H is among the largest of a batch, the bootstrapped value is shrunk in a share 1 - alpha of the critic's target.
Three stages: teacher (EDM denoiser), student (consistency distillation), policy (TD3 with that target).

    python qdq.py --env hopper-medium                # the published settings, on CUDA where there is one
    python qdq.py --env hopper-medium --quick        # small protocol for a laptop
    python qdq.py --env hopper-medium --resume       # go on with the newest run of this task and seed, exactly
    python qdq.py --env hopper-medium --seed 1 --consistency runs/hopper-medium/qdq/seed0-20260101-120000

Where the paper and the authors' code differ we follow the code, which made the published numbers:
 1. The discount restarts in every window (Eq. 5 counts from the trajectory's start); a terminal's reward is included.
 2. H is the standard deviation over K samples in return units; Eq. 6 has a variance over K - 1.
 3. AntMaze has its own m, for values are negative: 1 outside U and, on five tasks, 1 + (1 - 1/H) / 10 inside, where Eq. 8 has
    beta and 1/H. On umaze-diverse 1/H stays and pushes values up.
 4. Five AntMaze tasks train the actor by advantage-weighted regression, in the paper an option.
 5. The actor's value term has the mean action; its "entropy" term is the log-likelihood of the data's actions.
 6. Next actions are samples, if gamma > 0, plus smoothing noise. The code draws both with one key, we independently.
 7. Targets of actor and critics move every second update (Algorithm 1: every update).
 8. Ten times the 80,000 teacher and 160,000 student updates of Table G.1; alpha, beta and gamma as in PRESETS.
 9. Not in the paper: cosine decays, clipping of the critics' gradient, LayerNorm on large mazes, log-std in [-5, 2].
Ours: one blended target for the two losses, whose gradient is the same; rows of a batch drawn with replacement; no cap of 100
windows per trajectory, which never binds; PyTorch's RAdam, whose eps is placed a little elsewhere.
"""

import csv
import dataclasses
import json
import math
import os
import signal
import sys
import time
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from copy import deepcopy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import TASKS, Evaluator, UserError, describe, evaluate, explained, load_dataset, record_video, strip_version

ALGORITHM = "qdq"
PER_CALL = ("resume", "eval_only", "episodes", "video", "run_dir")  # arguments that a run does not keep
MAY_CHANGE = ("data", "device", "compile", "tf32", "eval_workers", "run_dir")  # arguments that may differ when a run is resumed
TEACHER_ARGS = ("sha256", "obs_dim", "act_dim", "batch_size", "reward_transform", "discount", "hidden_dim", "sigma_data")
TEACHER_ARGS += ("teacher_steps", "teacher_lr")  # in which a reused teacher must agree; a student also in these
STUDENT_ARGS = ("student_steps", "student_lr", "student_tau", "t_min", "t_max", "karras_rho", "grid_points")
EVAL_SEED = 1_000_000  # plus the update: all runs are evaluated on the same episodes
EVAL_COLUMNS = ("eval/return", "eval/normalized_score", "eval/episode_length")
FREQUENCY_STD, LOG_T_MEAN, LOG_T_STD = 16, -1.2, 1.2  # of the time feature; of ln t in the teacher's training
WINDOW, STRIDE = 200, 10  # rewards in a truncated return, W, and transitions between two of a trajectory, k
TARGET_NOISE, NOISE_CLIP = 0.2, 0.5  # smoothing of next actions
STUDENT_TARGET_EVERY, POLICY_EVERY = 5, 2  # updates between steps of the student's target; of actor, its and critics' targets
AWR_TEMPERATURE, AWR_MAX_WEIGHT, AWR_SAMPLES = 6, 100, 30  # advantage-weighted regression, M = 30 actions behind v(s)

# ---------------------------------------------------------------------------------------------------------- arguments


@dataclasses.dataclass
class Args:
    # run
    env: str = "hopper-medium"  # task, Minari id (mujoco/hopper/medium-v0) or, with a file as data, any Gymnasium id
    data: str = "auto"  # auto, d4rl, minari, bundled, or the path of an HDF5 or NPZ file in D4RL's layout
    seed: int = 0  # seed of initialisation, batches and noise; evaluation has seeds of its own
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    total_steps: int = 1_000_000  # updates of the policy stage, also the length of the actor's cosine
    batch_size: int = 256  # transitions or windows per update, B
    eval_every: int = 5_000  # policy updates between evaluations, beginning before the first update
    eval_episodes: int = 10  # episodes per evaluation
    log_every: int = 1_000  # updates between log rows, which show the newest minibatch
    checkpoint_every: int = 10_000  # updates between checkpoints
    run_dir: Path = Path("runs")  # root folder of all runs
    # go on with this run, or without PATH with the newest of this task and seed
    resume: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[PATH]")] = None
    eval_only: Path | None = None  # checkpoint to evaluate without any training
    episodes: int | None = None  # episodes of --eval-only, by default as many as an evaluation of the run had
    video: Path | None = None  # file for a video of one episode, with --eval-only
    eval: bool = True  # --no-eval trains without an environment
    eval_workers: int = 0  # processes that evaluate while training goes on, with the same result; 0: it waits
    compile: bool = False  # compile the losses with torch.compile; on CUDA each update also becomes one CUDA graph
    tf32: bool = False  # on CUDA, products of TensorFloat-32: faster, with 10 bits of mantissa for 23
    quick: bool = False  # a small protocol, ours and not the paper's, for a machine without a GPU
    stage: Literal["teacher", "student", "policy", "all"] = "all"  # one stage alone; student and policy need --consistency
    consistency: str | None = None  # checkpoint or run folder whose student (for --stage student: teacher) is reused
    # data
    reward_transform: Literal["minus_one", "none"] = "none"  # minus_one: r - 1, in every stage
    # optimisation
    teacher_steps: int = 800_000  # updates of the teacher, also the length of its cosine
    student_steps: int = 1_600_000  # updates of the student, also the length of its cosine
    teacher_lr: float = 5e-4  # Adam step size of the teacher, cosine to 0
    student_lr: float = 4e-4  # RAdam step size of the student, cosine to 0
    actor_lr: float = 3e-4  # Adam step size of the actor; its cosine counts its own updates, so it ends at half
    critic_lr: float = 3e-4  # Adam step size of the critics
    max_grad_norm: float = 10.0  # largest global gradient norm of both critics together; nothing else is clipped
    discount: float = 0.99  # in windows and critics
    student_tau: float = 0.005  # rate of the student's target; fewer updates than published want more
    tau: float = 0.005  # rate of the targets of actor and critics
    hidden_dim: int = 256  # width of all hidden layers, a multiple of the 32 groups
    hidden_layers: int = 3  # hidden layers of actor and critics
    critic_layer_norm: bool = False  # LayerNorm before each activation of the critics
    # algorithm
    sigma_data: float = 0.5  # scale of the normalised return in the preconditioning
    t_min: float = 0.002  # smallest noise level
    t_max: float = 80.0  # largest noise level, T, at which the student is sampled
    karras_rho: float = 7.0  # rho, bends the grid of noise levels
    grid_points: int = 1_000  # noise levels of the distillation, N
    num_samples: int = 50  # sampled returns per next pair, K
    alpha: float = 0.992  # share of the ordinary target; the shrunk one has 1 - alpha
    beta: float = 0.8  # quantile of H in the batch above which a row is in the uncertain set U
    outside_multiplier: float | None = None  # m outside U, by default beta: the paper has one letter for both
    inside_multiplier: Literal["inverse", "expand"] = "inverse"  # m in U: 1/H, or 1 + (1 - 1/H) / 10 for negative values
    gamma_ent: float = 0.8  # gamma, weight of log pi(a|s) of the data's actions; above 0 next actions are sampled
    actor_objective: Literal["q", "awr"] = "q"  # Q + gamma log pi, or advantage-weighted regression


# The authors' per-task configuration files. Table G.2 of the paper differs: beta 0.9 on walker2d; alpha 0.99 on halfcheetah,
# hopper-medium(-replay) and AntMaze, else 0.95; gamma 0 on halfcheetah, but 1 on expert data and elsewhere; always 3 layers.
MAZE = {"alpha": 0.99, "beta": 0.9, "outside_multiplier": 1.0, "inside_multiplier": "expand", "gamma_ent": 0.0}
MAZE |= {"actor_objective": "awr", "max_grad_norm": 7.0, "hidden_layers": 2, "reward_transform": "minus_one"}
MAZE |= {"eval_every": 100_000, "eval_episodes": 100}
OWN = {
    "halfcheetah-medium": {"beta": 0.9, "gamma_ent": 0.0},
    "halfcheetah-medium-replay": {"beta": 0.9, "gamma_ent": 0.1, "student_steps": 1_000_000},
    "halfcheetah-medium-expert": {"beta": 0.9, "gamma_ent": 2.0},
    "hopper-medium-expert": {"gamma_ent": 2.0},
    "walker2d-medium-expert": {"gamma_ent": 2.0, "student_steps": 2_000_000},
    "antmaze-umaze-diverse": {"alpha": 0.01, "inside_multiplier": "inverse", "actor_objective": "q", "gamma_ent": 1.5},
    "antmaze-medium-diverse": {"gamma_ent": 1.0},
    "antmaze-large-play": {"critic_layer_norm": True},
    "antmaze-large-diverse": {"critic_layer_norm": True, "max_grad_norm": 3.0},
}  # the other four tasks of hopper and walker2d have the defaults above, the other two mazes those of MAZE
PRESETS = {task: (MAZE if task.startswith("antmaze") else {}) | OWN.get(task, {}) for task in TASKS}
# Ours: a fifth of the sampled returns, faster targets and more of the behaviour term, for a Q of so few updates leads astray.
QUICK = {"teacher_steps": 3_000, "student_steps": 4_000, "student_tau": 0.1, "total_steps": 5_000, "num_samples": 10, "tau": 0.02}
QUICK |= {"gamma_ent": 16.0, "eval_every": 1_000, "eval_episodes": 10, "log_every": 500, "checkpoint_every": 2_000}

# ----------------------------------------------------------------------------------------------------------- networks
# Shapes: B batch, S observation dim, A action dim, D = S + A, K sampled returns, M sampled actions, E environments.


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class ReturnNetwork(nn.Module):
    """NN of teacher and student: (cond = [obs, act] [B, D], scaled returns x [B, K], t [B, 1] or [1, 1]) -> [B, K]."""

    def __init__(self, cond_dim: int, hidden_dim: int):
        super().__init__()
        self.q_range = nn.Buffer(torch.tensor([-1.0, 1.0]))  # smallest and largest truncated return of the data
        self.frequencies = nn.Parameter(FREQUENCY_STD * torch.randn(8), requires_grad=False)  # averaged in a target
        self.time = nn.Sequential(Linear(16, 32), nn.SiLU(), Linear(32, 32), nn.SiLU())
        self.layers = nn.ModuleList(Linear(size, hidden_dim) for size in (cond_dim + 1 + 32, hidden_dim, hidden_dim))
        self.norms, self.out = nn.ModuleList(nn.GroupNorm(32, hidden_dim) for _ in range(3)), Linear(hidden_dim, 1)

    def forward(self, cond: Tensor, x: Tensor, t: Tensor) -> Tensor:
        angle = 2 * math.pi * self.frequencies * t.log() / 4
        code = self.time(torch.cat([angle.sin(), angle.cos()], 1))  # [B, 32], or [1, 32] at a common t
        # GroupNorm takes the mean out of every group of channels; taken out of weights and biases beforehand it costs nothing.
        groups = [p.unflatten(0, (32, -1)) for p in self.layers.parameters()]
        w1, b1, w2, b2, w3, b3 = ((group - group.mean(1, keepdim=True)).flatten(0, 1) for group in groups)
        w_cond, w_x, w_code = w1.split([cond.shape[1], 1, 32], 1)
        row = F.linear(cond, w_cond) + F.linear(code, w_code, b1)  # [B, hidden], once for the K samples of a row
        h = torch.addcmul(row[:, None], x[..., None], w_x[:, 0])  # [B, K, hidden]
        for norm, weight, bias in zip(self.norms, (w2, w3, self.out.weight), (b2, b3, self.out.bias)):
            h = F.rms_norm(h.unflatten(-1, (32, -1)), (h.shape[-1] // 32,), eps=1e-6).flatten(-2)
            h = F.linear(F.silu(torch.addcmul(norm.bias, h, norm.weight)), weight, bias)
        return h.squeeze(2)


class Actor(nn.Sequential):
    """Gaussian, not squashed: obs [B, S] -> mean [B, A] in [-1, 1] and standard deviation [A]."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int, hidden_layers: int):
        sizes = [obs_dim] + [hidden_dim] * hidden_layers
        hidden = [module for pair in pairwise(sizes) for module in (Linear(*pair), nn.ReLU())]
        super().__init__(*hidden, Linear(hidden_dim, act_dim), nn.Tanh())
        nn.init.orthogonal_(self[-2].weight, math.sqrt(2))
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(obs), self.log_std.clamp(-5, 2).exp()


class Critics(nn.Module):
    """Two independent Q-networks, one batched product per layer: (obs [B, S], act [B, A]) -> [2, B]."""

    def __init__(self, cond_dim: int, hidden_dim: int, hidden_layers: int, layer_norm: bool):
        super().__init__()
        sizes = [cond_dim] + [hidden_dim] * hidden_layers + [1]
        self.weights = nn.ParameterList(torch.empty(2, *pair) for pair in pairwise(sizes))
        self.biases = nn.ParameterList(torch.zeros(2, 1, size) for size in sizes[1:])
        self.scales = nn.ParameterList(torch.ones(2, 1, size) for size in sizes[1:-1] if layer_norm)
        self.offsets = nn.ParameterList(torch.zeros_like(scale) for scale in self.scales)
        for head in (head for weight in self.weights for head in weight):
            nn.init.xavier_uniform_(head)  # one by one: for a stack of matrices the fan-in would be wrong

    def forward(self, obs: Tensor, act: Tensor) -> Tensor:
        h = torch.cat([obs, act], 1).expand(2, -1, -1)  # [2, B, D]
        for i in range(len(self.weights) - 1):
            h = torch.baddbmm(self.biases[i], h, self.weights[i])  # [2, B, hidden]
            if len(self.scales):
                h = torch.addcmul(self.offsets[i], F.layer_norm(h, h.shape[-1:], eps=1e-6), self.scales[i])
            h = torch.addcdiv(h, h, (h.clamp(max=30).exp() + 1).square().add_(1), value=-2)  # Mish with one exponential
        return torch.baddbmm(self.biases[-1], h, self.weights[-1]).squeeze(2)


# --------------------------------------------------------------------------------------------------- generative model


def truncated_returns(rew: np.ndarray, ends: np.ndarray, window: int, stride: int, discount: float) -> tuple:
    """The Q dataset (Eq. 5): first rows of the windows, every stride until one reaches its trajectory's end; their returns."""
    stop = np.flatnonzero(ends) + 1
    start = np.r_[0, stop[:-1]]
    count = 1 - np.minimum(window - (stop - start), 0) // stride  # 1 + ceil((L - window) / stride) of a longer one
    rows = np.repeat(start - stride * (np.cumsum(count) - count), count) + stride * np.arange(count.sum())
    left = np.repeat(stop, count) - rows
    rew, returns = np.r_[rew.astype(np.float64), np.zeros(window)], np.zeros(len(rows))
    for t in range(window):
        returns += discount**t * np.where(t < left, rew[rows + t], 0)
    return rows, returns


def consistency(net: nn.Module, cond: Tensor, x: Tensor, t: Tensor, t_min: float, sigma_data: float) -> Tensor:
    """Student f(x, t | s, a), x [B, K], with f(x, t_min) = x; t_min = 0 makes it EDM's denoiser D(x, t | s, a), the teacher."""
    c_skip = sigma_data**2 / ((t - t_min) ** 2 + sigma_data**2)
    c_in = (t**2 + sigma_data**2).rsqrt()
    return c_skip * x + (t - t_min) * sigma_data * c_in * net(cond, c_in * x, t)


def karras_grid(points: int, t_min: float, t_max: float, rho: float) -> Tensor:
    """Noise levels from t_max down to t_min, even in t^(1/rho); [points, 1]."""
    return torch.linspace(t_max ** (1 / rho), t_min ** (1 / rho), points, dtype=torch.float64)[:, None] ** rho


def heun_step(denoiser: Callable, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Along dx/dt = (x - D(x, t)) / t from t to t_next, with the mean of the slopes at both ends."""
    slope = (x - denoiser(x, t)) / t
    euler = x + (t_next - t) * slope
    return x + (t_next - t) * (slope + (euler - denoiser(euler, t_next)) / t_next) / 2


def sample_returns(student: nn.Module, cond: Tensor, noise: Tensor, args: Args) -> Tensor:
    """One-step samples of the return from standard normals, both [B, K]; in return units, not clipped."""
    size, t = len(cond) if cond.is_cuda else 64, torch.full_like(noise[:1, :1], args.t_max)  # 64 rows fit into a CPU's cache
    pieces = zip(cond.split(size), (args.t_max * noise).split(size))
    x = torch.cat([consistency(student, c, x, t, args.t_min, args.sigma_data) for c, x in pieces])
    low, high = student.q_range
    return low + (x + 1) / 2 * (high - low)


# ------------------------------------------------------------------------------------------------------------- losses


class Batch(NamedTuple):
    obs: Tensor  # [B, S]
    act: Tensor  # [B, A]
    rew: Tensor  # [B], transformed
    next_obs: Tensor  # [B, S]
    not_done: Tensor  # [B], 0 at a terminal, else 1; a timeout is no terminal


class Draws(NamedTuple):  # of one update of the policy stage, all standard normal
    next_act: Tensor  # [B, A], the sample of the next action
    smoothing: Tensor  # [B, A], its smoothing noise
    returns: Tensor  # [B, K], of the sampled returns
    actions: Tensor  # [M, B, A], behind v(s)


def teacher_loss(teacher: nn.Module, cond: Tensor, x: Tensor, t: Tensor, z: Tensor, sigma_data: float) -> Tensor:
    """Mean of (t^2 + sd^2) / (t sd)^2 (D(x + t z, t) - x)^2; normalised returns x, noise levels t, normals z, all [B, 1]."""
    error = consistency(teacher, cond, x + t * z, t, 0, sigma_data) - x
    return ((t**2 + sigma_data**2) / (t * sigma_data) ** 2 * error**2).mean()


def student_loss(networks: tuple, cond: Tensor, x: Tensor, i: Tensor, z: Tensor, grid: Tensor, args: Args) -> Tensor:
    """Mean of (f(x_t, t_i) - f_target(x_h, t_{i+1}))^2, x_h one Heun step of the teacher's path from x_t = x + t_i z."""
    student, student_target, teacher = networks
    t, t_next = grid[i], grid[i + 1]
    x_t = x + t * z
    with torch.no_grad():
        x_h = heun_step(lambda x, t: consistency(teacher, cond, x, t, 0, args.sigma_data), x_t, t, t_next)
        goal = consistency(student_target, cond, x_h, t_next, args.t_min, args.sigma_data)
    return (consistency(student, cond, x_t, t, args.t_min, args.sigma_data) - goal).square().mean()


def multiplier(h: Tensor, args: Args) -> Tensor:
    """m [B] of Eq. 8 for uncertainties h [B]: one value in U, where h is above its beta-quantile, and another outside."""
    inverse = 1 / h.clamp(min=1e-6)  # no H of a whole student comes near, but one that collapsed may be 0
    inside = inverse if args.inside_multiplier == "inverse" else 1 + (1 - inverse) / 10
    outside = args.beta if args.outside_multiplier is None else args.outside_multiplier
    return torch.where(h > torch.quantile(h, args.beta), inside, outside)


@torch.no_grad()
def td_target(networks: tuple, batch: Batch, draws: Draws, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """y = r + discount not_done (alpha + (1 - alpha) m) min Q(s', a') [B]: Eq. 7's gradient; its value adds mixture_gap."""
    actor, critic, student = networks
    mean, std = actor(batch.next_obs)
    act = mean + std * draws.next_act if args.gamma_ent > 0 else mean
    act = (act + (TARGET_NOISE * draws.smoothing).clamp(-NOISE_CLIP, NOISE_CLIP)).clamp(-1, 1)
    samples = sample_returns(student, torch.cat([batch.next_obs, act], 1), draws.returns, args)
    h = samples.std(1, unbiased=False)  # H of Eq. 6
    m = multiplier(h, args)
    value = args.discount * batch.not_done * critic(batch.next_obs, act).amin(0)
    gap = 2 * args.alpha * (1 - args.alpha) * ((1 - m) * value).square().mean()
    metrics = {"mixture_gap": gap, "uncertainty": h.mean(), "multiplier": m.mean(), "sampled_return": samples.mean()}
    return batch.rew + (args.alpha + (1 - args.alpha) * m) * value, metrics


def critic_loss(critic: nn.Module, batch: Batch, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over the critics, mean over the batch of (Q_h(s, a) - y)^2."""
    q = critic(batch.obs, batch.act)  # [2, B]
    loss = (q - target).square().sum(0).mean()
    return loss, {"critic_loss": loss, "q_mean": q.mean(), "td_target": target.mean()}


def actor_loss(networks: tuple, batch: Batch, draws: Draws, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """-min_h Q_h(s, mu(s)) - gamma log pi(a|s) (Eq. 9), or -w log pi(a|s), w = exp(temperature (Q(s, a) - v(s)))."""
    actor, actor_target, critic = networks
    mean, std = actor(batch.obs)
    log_prob = torch.distributions.Normal(mean, std, validate_args=False).log_prob(batch.act).sum(1)  # [B]
    if args.actor_objective == "q":
        value = critic(batch.obs, mean).amin(0)
        loss = -value.mean() - args.gamma_ent * log_prob.mean()
    else:
        with torch.no_grad():
            mean, std = actor_target(batch.obs)
            acts = (mean + std * draws.actions).flatten(0, 1)  # [M B, A]
            value = critic(batch.obs.repeat(len(draws.actions), 1), acts).amin(0).view(-1, len(mean)).mean(0)  # [B]
            advantage = critic(batch.obs, batch.act).amin(0) - value
            weight = (AWR_TEMPERATURE * advantage).exp().clamp(max=AWR_MAX_WEIGHT)
        loss = -(weight * log_prob).mean()
    return loss, {"actor_loss": loss, "policy_value": value.mean(), "log_prob": log_prob.mean()}


# ------------------------------------------------------------------------------------------------------------- update


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """A step without clipping; no other network's parameters get a gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=[p for p in optimizer.param_groups[0]["params"] if p.requires_grad])
    optimizer.step()


class QDQ:
    """All that is learned in the three stages: networks, targets, optimisers, and how one batch changes them."""

    metrics = ("teacher_loss", "student_loss", "critic_loss", "mixture_gap", "q_mean", "td_target", "uncertainty")
    metrics += ("multiplier", "sampled_return", "actor_loss", "policy_value", "log_prob")
    parts = ("teacher", "student", "student_target", "actor", "actor_target", "critic", "critic_target")
    parts += ("teacher_adam", "student_radam", "actor_adam", "critic_adam")

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device: torch.device | str = "cpu"):
        self.args, self.device, self.act_dim, dim = args, torch.device(device), act_dim, obs_dim + act_dim
        self.steps = {"teacher": 0, "student": 0, "policy": 0}  # updates of each stage
        self.actor_metrics = {}  # of the actor's newest step, for the updates between two
        self.teacher, self.student, self.student_target = (ReturnNetwork(dim, args.hidden_dim).to(device) for _ in range(3))
        self.actor = Actor(obs_dim, act_dim, args.hidden_dim, args.hidden_layers).to(device)
        self.critic = Critics(dim, args.hidden_dim, args.hidden_layers, args.critic_layer_norm).to(device)
        self.actor_target, self.critic_target = deepcopy(self.actor), deepcopy(self.critic)
        on_gpu = self.device.type == "cuda"
        adam = partial(torch.optim.Adam, fused=True, capturable=on_gpu)
        self.teacher_adam, self.actor_adam = adam(self.teacher.parameters()), adam(self.actor.parameters())
        self.student_radam = torch.optim.RAdam(self.student.parameters(), capturable=on_gpu)
        self.critic_adam = adam(self.critic.parameters(), lr=args.critic_lr)
        grid = karras_grid(args.grid_points, args.t_min, args.t_max, args.karras_rho)
        self.grid = grid.to(device, torch.get_default_dtype())
        compiled = (lambda f: torch.compile(f, dynamic=False)) if args.compile else (lambda f: f)
        self.teacher_loss, self.student_loss, self.td_target = compiled(teacher_loss), compiled(student_loss), compiled(td_target)
        self.critic_loss, self.actor_loss = compiled(critic_loss), compiled(actor_loss)
        if args.compile and on_gpu:
            self.one_update = GraphedUpdate(self.one_update)

    def draw(self, stage: str, batch_size: int) -> tuple[Tensor, ...]:
        """The random numbers of one update: (t, z), (i, z) or `Draws`."""
        args, device = self.args, self.device
        z = torch.randn(batch_size, 1, device=device)
        if stage == "teacher":
            return (LOG_T_MEAN + LOG_T_STD * torch.randn_like(z)).exp(), z
        if stage == "student":  # never i = 0, t_max, where it will be sampled
            return torch.randint(1, args.grid_points - 1, (batch_size,), device=device), z
        next_act, smoothing = torch.randn(2, batch_size, self.act_dim, device=device)
        returns = torch.randn(batch_size, args.num_samples, device=device)
        actions = torch.randn(AWR_SAMPLES * (args.actor_objective == "awr"), batch_size, self.act_dim, device=device)
        return Draws(next_act, smoothing, returns, actions)

    def update(self, stage: str, batch: Sequence[Tensor], draws: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """One update of a stage from a batch of (cond, x) or of `Batch`; returns its share of `metrics`, 0-d tensors."""
        args, n = self.args, self.steps[stage]
        optimizer, lr, progress, every = {
            "teacher": (self.teacher_adam, args.teacher_lr, n / args.teacher_steps, 1),
            "student": (self.student_radam, args.student_lr, n / args.student_steps, STUDENT_TARGET_EVERY),
            "policy": (self.actor_adam, args.actor_lr, n // POLICY_EVERY / args.total_steps, POLICY_EVERY),  # ends at half
        }[stage]
        cosine_lr(optimizer, lr, progress)
        metrics = self.one_update(batch, draws, stage, n % every == 0)
        if "actor_loss" in metrics:
            self.actor_metrics = {name: metrics[name].detach() for name in ("actor_loss", "policy_value", "log_prob")}
        self.steps[stage] += 1
        return metrics | (self.actor_metrics if stage == "policy" else {})

    def one_update(self, batch: Sequence[Tensor], draws: tuple[Tensor, ...], stage: str, due: bool) -> dict[str, Tensor]:
        """The stage's losses and steps; due: also the student's target, or the actor and the targets of the policy stage."""
        args = self.args
        if stage == "teacher":
            loss = self.teacher_loss(self.teacher, *batch, *draws, args.sigma_data)
            descend(self.teacher_adam, loss)
            return {"teacher_loss": loss}
        if stage == "student":
            loss = self.student_loss((self.student, self.student_target, self.teacher), *batch, *draws, self.grid, args)
            descend(self.student_radam, loss)
            if due:
                soft_update(self.student_target, self.student, args.student_tau)
            return {"student_loss": loss}
        batch, actor_metrics = Batch(*batch), {}
        target, metrics = self.td_target((self.actor_target, self.critic_target, self.student), batch, draws, args)
        loss, critic_metrics = self.critic_loss(self.critic, batch, target)
        gradient_step(self.critic_adam, loss, args.max_grad_norm)
        if due:
            soft_update(self.critic_target, self.critic, args.tau)
            loss, actor_metrics = self.actor_loss((self.actor, self.actor_target, self.critic), batch, draws, args)
            descend(self.actor_adam, loss)
            soft_update(self.actor_target, self.actor, args.tau)
        return metrics | critic_metrics | actor_metrics

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The evaluated policy, [E, S] -> [E, A]: the mean of the online actor."""
        return self.actor(torch.as_tensor(obs, device=self.device))[0].cpu().numpy()

    def state_dict(self) -> dict:
        others = {"steps": self.steps, "actor_metrics": self.actor_metrics}
        return {name: getattr(self, name).state_dict() for name in self.parts} | others

    def load_state_dict(self, state: dict) -> None:
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])
        self.steps = state["steps"]
        self.actor_metrics = {name: value.to(self.device) for name, value in state["actor_metrics"].items()}


# ----------------------------------------------------------- helpers, textually the same in dac.py, qdq.py and cped.py


@torch.no_grad()
def soft_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online."""
    for t, o in zip(target.parameters(), online.parameters()):
        t.lerp_(o, tau)


def gradient_step(optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float) -> None:
    """One optimiser step, the gradient clipped to max_norm over all parameters together."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
    optimizer.step()


def cosine_lr(optimizer: torch.optim.Optimizer, start: float, progress: float, end: float = 0.0) -> None:
    """Step size on a cosine from start at progress 0 to end at 1; on CUDA one tensor, which each replay of a graph reads anew."""
    lr = end + (1 + math.cos(math.pi * progress)) / 2 * (start - end)
    group, device = optimizer.param_groups[0], optimizer.param_groups[0]["params"][0].device
    group["lr"] = lr if device.type == "cpu" else torch.as_tensor(group["lr"], dtype=torch.float32, device=device).fill_(lr)


class GraphedUpdate:
    """update(batch, draws, *flags) as CUDA graphs, one for each set of flags and batch size: it runs three times, is recorded,
    and from then on replayed on the contents of new batches and draws. It may depend on nothing else that is not a tensor, and
    never wait for the device. The metrics that it returns are overwritten by the next replay."""

    def __init__(self, update: Callable):
        self.update, self.stream, self.calls, self.graphs = update, torch.cuda.Stream(), Counter(), {}

    def __call__(self, batch: tuple, draws: tuple, *flags) -> dict[str, Tensor]:
        key, here = (*flags, *(x.shape for x in (*batch, *draws))), torch.cuda.current_stream()
        self.calls[key] += 1
        if self.calls[key] <= 3:  # compiles, and makes the moments of the optimisers
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                metrics = self.update(batch, draws, *flags)
            here.wait_stream(self.stream)
            return metrics
        if key not in self.graphs:
            inputs, graph = deepcopy((batch, draws)), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                metrics = self.update(*inputs, *flags)
            self.graphs[key] = graph, (*inputs[0], *inputs[1]), metrics
        graph, inputs, metrics = self.graphs[key]
        for recorded, new in zip(inputs, (*batch, *draws)):
            recorded.copy_(new)
        graph.replay()
        return metrics


def save_checkpoint(path: Path, state: dict) -> None:
    """Written under another name, then renamed: the checkpoint is the whole new one or still the previous one."""
    part, kinds = path.with_suffix(".part"), (OSError, RuntimeError)  # torch reports a full disk as RuntimeError
    try:
        with explained(kinds, f"cannot write {path}; the previous checkpoint is as it was"):
            torch.save(state, part)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict:
    """State of a run, from its checkpoint or its folder."""
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} does not exist", status=2)
    with explained(Exception, f"{path} is no checkpoint, or a damaged one", status=2):
        archive = zipfile.ZipFile(path)
        if any(entry.compress_type for entry in archive.infolist()) or archive.testzip():  # torch looks at neither
            raise ValueError("compressed, or a checksum does not fit")
        state = torch.load(path, map_location="cpu", weights_only=True)
    names = {field.name for field in dataclasses.fields(Args)} - set(PER_CALL)
    if not isinstance(state, dict) or state.get("algorithm") != ALGORITHM or state.get("args", {}).keys() != names:
        raise UserError(f"{path} was not written by this version of {ALGORITHM}.py", status=2)
    return state | {"path": path}


def restore(agent: object, state: dict) -> None:
    """Agent and random numbers go on as they were; a state of other shapes is refused: a fused Adam writes past its end."""
    with explained(Exception, f"{state['path']} does not hold what its arguments describe", status=2):
        for part in (part for part in state["agent"].values() if isinstance(part, dict) and "param_groups" in part):
            part["param_groups"][0]["capturable"] = agent.device.type == "cuda"  # wherever it was saved
        agent.load_state_dict(state["agent"])
        for adam in (part for part in vars(agent).values() if isinstance(part, torch.optim.Optimizer)):
            if any(m.ndim and m.shape != p.shape for p, moments in adam.state.items() for m in moments.values()):
                raise ValueError("moments of another shape")
        torch.set_rng_state(state["rng"])
        if agent.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], agent.device)


def parse_args(argv: list[str] | None = None) -> tuple[Args, dict | None]:
    """Defaults < preset of the task < --quick < what was typed; and, with --resume or --eval-only, the state of that run."""
    typed, _ = tyro.cli(Args, args=argv, return_unknown_args=True, add_help=False)
    if typed.resume is None and typed.eval_only is None:
        state, own = None, PRESETS.get(strip_version(typed.env), {}) | (QUICK if typed.quick else {})
    else:
        runs = sorted(typed.run_dir.glob(f"{typed.env}/{ALGORITHM}/seed{typed.seed}-*/checkpoint.pt"))
        if typed.eval_only is None and not typed.resume and not runs:
            raise UserError(f"--resume: {typed.run_dir} has no {ALGORITHM} run of {typed.env}, seed {typed.seed}", status=2)
        state = load_checkpoint(typed.eval_only or Path(typed.resume[0] if typed.resume else runs[-1]))
        own = state["args"] | {"run_dir": typed.run_dir}
    args = tyro.cli(Args, args=argv, default=dataclasses.replace(Args(), **own), description=__doc__)
    if (args.episodes or args.video) and not args.eval_only:
        raise UserError("--episodes and --video go with --eval-only", status=2)
    for name, value in dataclasses.asdict(args).items():
        least = 1 if isinstance(value, int) and name not in ("seed", "eval_workers", "actor_target_start") else 0
        if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value < 2**31:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {least} or more, and less than 2^31", status=2)
        if state and name in own and name not in MAY_CHANGE and value != own[name]:
            raise UserError(f"--{name.replace('_', '-')} {value}: {state['path']} was made with {own[name]}", status=2)
    return args, state


# ---------------------------------------------------------------------------------------------------------------- run


def main(argv: list[str] | None = None) -> dict:
    args, state = parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here, or torch was installed without CUDA", status=2)
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    if args.compile and not args.eval_only:
        with explained(Exception, "--compile: torch.compile fails here; it needs a C++ compiler, on CUDA Triton", status=2):
            torch.compile(torch.sin)(torch.zeros(2, device=device))
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")

    def show(step: int, result: dict[str, np.ndarray]) -> dict[str, float]:
        means = {f"eval/{name}": float(values.mean()) for name, values in result.items()}
        tqdm.write(f"update {step:,}: " + ", ".join(f"{name} {value:.2f}" for name, value in means.items()))
        return means

    if args.eval_only:
        agent, info = QDQ(state["obs_dim"], state["act_dim"], args, device), state["info"]
        restore(agent, state)
        print(describe(info))
        if args.video:
            print(f"{args.video}: one episode, return {record_video(agent.act, info, args.video, EVAL_SEED):.2f}")
        result = evaluate(agent.act, info, args.episodes or args.eval_episodes, EVAL_SEED + agent.steps["policy"])
        return show(sum(agent.steps.values()), result)
    if args.beta > 1 or args.hidden_dim % 32 or args.grid_points < 3 or not 0 < args.t_min < args.t_max:
        raise UserError("needed: beta <= 1, hidden_dim a multiple of 32, grid_points >= 3 and 0 < t_min < t_max", status=2)
    if args.stage in ("student", "policy") and not args.consistency:
        raise UserError(f"--stage {args.stage} needs --consistency PATH, with the stages before it", status=2)

    # data
    arrays, info = load_dataset(args.env, args.data, need_env=args.eval)
    print(describe(info))
    print("arguments   " + " ".join(f"{name}={value}" for name, value in dataclasses.asdict(args).items()))
    if state and state["info"]["sha256"] != info["sha256"]:
        raise UserError(f"{state['path']} was trained on {state['info']['id']}, not on {info['file']}", status=2)
    print("quick       a small protocol of our own, not comparable with published scores\n" if args.quick else "", end="")
    arrays["rew"] = arrays["rew"] - (args.reward_transform == "minus_one")
    arrays["act"] = arrays["act"].clip(-1 + 1e-5, 1 - 1e-5)
    data = Batch(*(torch.as_tensor(arrays[name], device=device) for name in Batch._fields))
    first, q = truncated_returns(arrays["rew"], arrays["ends"], WINDOW, STRIDE, args.discount)
    low, high = q.min(), q.max()
    print(f"windows     {len(q):,}, with truncated returns from {low:.7g} to {high:.7g}")
    if low == high:
        raise UserError("all truncated returns are equal: they have no distribution to learn")
    x = torch.as_tensor(2 * (q - low) / (high - low) - 1, dtype=torch.float32, device=device)[:, None]
    windows = (torch.cat([data.obs, data.act], 1)[torch.as_tensor(first, device=device)], x)

    # agent and run folder
    torch.manual_seed(args.seed)  # initialisation and all noise come from torch, on every device
    dims = {"obs_dim": data.obs.shape[1], "act_dim": data.act.shape[1]}
    agent = QDQ(**dims, args=args, device=device)
    agent.student.q_range.copy_(torch.tensor([low, high]))
    if state:
        folder, rows, row, seconds = state["path"].parent, state["rows"], state["row"], state["seconds"]
        restore(agent, state)
    else:
        if args.consistency:
            old = load_checkpoint(Path(args.consistency))
            with explained(Exception, f"{old['path']} holds no such stage", status=2):
                was, now = old["args"] | old["info"] | old, dataclasses.asdict(args) | info | dims
                stages, names = ("teacher", "student"), TEACHER_ARGS + STUDENT_ARGS
                if args.stage == "student":
                    stages, names = ("teacher",), TEACHER_ARGS
                if differ := [f"{name} {was[name]}, not {now[name]}" for name in names if was[name] != now[name]]:
                    raise UserError(f"--consistency {args.consistency}: it was made with {', '.join(differ)}", status=2)
                for stage in stages:
                    agent.steps[stage] = old["agent"]["steps"][stage]
                    getattr(agent, stage).load_state_dict(old["agent"][stage])
                    if agent.steps[stage] < was[f"{stage}_steps"]:
                        raise UserError(f"--consistency {args.consistency}: its {stage} is not finished", status=2)
        rows, row, seconds = [], {"step": sum(agent.steps.values())}, 0.0
        folder = args.run_dir / args.env / ALGORITHM / time.strftime(f"seed{args.seed}-%Y%m%d-%H%M%S")
        folder.mkdir(parents=True)
    print(f"run folder  {folder}")
    lock = FileLock(folder / "lock", timeout=0, is_singleton=True)  # held until this process or function ends
    with explained(Timeout, f"{folder} is in use: another process trains this run", 2), suppress(NotImplementedError):
        lock.acquire()  # NotImplementedError: a file system without locks
    stored = {name: value for name, value in dataclasses.asdict(args).items() if name not in PER_CALL}
    (folder / "args.json").write_text(json.dumps({"args": stored, "dataset": info}, indent=1))
    columns = ["step", *(f"train/{name}" for name in QDQ.metrics), *EVAL_COLUMNS, "time/updates_per_s"]
    table = csv.DictWriter((folder / "metrics.csv").open("w", buffering=1), columns)
    table.writeheader()
    table.writerows(rows)  # those of a resumed run end at its checkpoint
    board = SummaryWriter(str(folder), purge_step=row["step"] + any(past["step"] == row["step"] for past in rows[-1:]))
    stop: list[int] = []  # of signals: the run ends after a whole update; a second signal kills it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))

    # training
    copied = partial(QDQ, **dims, args=dataclasses.replace(args, compile=False), device=device)
    evaluator, waiting = Evaluator(copied, info, args.eval_workers), deque()  # rows, with their evaluation or None

    def write_rows(wait: bool) -> None:
        """In their order, as far as the evaluations are done, or after waiting for them."""
        while waiting and (wait or waiting[0][1] is None or waiting[0][1].done()):
            row, evaluation = waiting.popleft()
            if evaluation:
                with explained(BrokenExecutor, f"a process that evaluates has died; go on with --resume {folder}"):
                    row |= show(row["step"], evaluation.result())
                score = row.get("eval/normalized_score", math.nan)
                bar.set_postfix_str(f"return {row['eval/return']:.1f}, score {score:.1f}")
            rows.append(row)
            with explained(OSError, f"cannot write to {folder}; its checkpoint is as it was"):
                table.writerow(row)
                for name, value in list(row.items())[1:]:
                    board.add_scalar(name, value, row["step"])

    totals = {"teacher": args.teacher_steps, "student": args.student_steps, "policy": args.total_steps}
    stages = [stage for stage in totals if args.stage in (stage, "all")]
    stages = stages[max([i for i, stage in enumerate(stages) if state and agent.steps[stage]], default=0) :]  # from its stage on
    started = window = time.perf_counter()
    metrics = None if state else {}  # None: the checkpoint of a resumed run has what came before it at its step
    for stage in stages:
        source, total = data if stage == "policy" else windows, totals[stage]
        bar = tqdm(total=total, initial=agent.steps[stage], desc=stage, unit=" updates", mininterval=0.5)
        while True:
            done, step = agent.steps[stage], sum(agent.steps.values())  # step counts all stages, reused ones too
            last = done == total or bool(stop)
            if metrics and (done % args.log_every == 0 or done % args.checkpoint_every == 0 or last):
                values = torch.stack(list(metrics.values())).tolist()  # the only wait for the device
                found = {f"train/{name}": value for name, value in zip(metrics, values)}
                if broken := [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]:
                    write_rows(wait=True)
                    raise UserError(f"{', '.join(broken)} at update {step}; the last good checkpoint is in {folder}")
                if done % args.log_every == 0:
                    row |= found | {"time/updates_per_s": args.log_every / (time.perf_counter() - window)}
            if metrics is not None and (done % args.checkpoint_every == 0 or last):
                write_rows(wait=True)
                content = {"algorithm": ALGORITHM, "args": stored, "info": info, "rows": rows, "row": row}
                content |= dims | {"rng": torch.get_rng_state(), "seconds": seconds + time.perf_counter() - started}
                content |= {"cuda_rng": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
                save_checkpoint(folder / "checkpoint.pt", content | {"agent": agent.state_dict()})
            if last and done < total:
                break  # an evaluation that is due is left to the run that goes on
            due = stage == "policy" and args.eval and (done % args.eval_every == 0 or done == total)
            if due or len(row) > 1:
                waiting.append((row, evaluator(agent, args.eval_episodes, EVAL_SEED + done) if due else None))
                window = time.perf_counter()
            write_rows(wait=last)
            if last:
                break
            index = torch.randint(len(source[0]), (args.batch_size,), device=device)
            metrics = agent.update(stage, [column[index] for column in source], agent.draw(stage, args.batch_size))
            row = {"step": step + 1}
            bar.update()
        bar.close()
        if done < total or stage == stages[-1]:
            evaluator.close()
            board.close()
        if done < total:
            raise UserError(f"stopped at update {step:,}; go on with: python {ALGORITHM}.py --resume {folder}")
        metrics, row = {}, {"step": step}

    # result
    scores = [row.get("eval/normalized_score", row["eval/return"]) for row in rows if "eval/return" in row][1:]  # trained
    result = {"algorithm": ALGORITHM, "env": args.env, "seed": args.seed, "dataset": info["id"], "sha256": info["sha256"]}
    result |= {"updates": step, "seconds": seconds + time.perf_counter() - started, "versions": info["versions"]}
    if scores:
        result |= {"final_score": float(np.mean(scores[-5:])), "last_score": scores[-1], "best_score": max(scores)}
        print(f"final score {result['final_score']:.1f} on {info['id']} (mean of the last {len(scores[-5:])} evaluations)")
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError, KeyboardInterrupt) as error:  # OSError: a full disk, a folder that cannot be written
        print(f"error: {str(error) or 'interrupted before the training began'}", file=sys.stderr)
        sys.exit(getattr(error, "status", 1))
