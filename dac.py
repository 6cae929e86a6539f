"""DAC: Diffusion Actor-Critic (Fang et al., ICLR 2025, arXiv:2405.20555).

The policy is a diffusion model. KL-constrained policy iteration has the optimal policy
pi_beta(a|s) exp(Q(s, a) / eta), up to a constant (Theorem 1). Its noise predictor at a noised
action x_t is the data's noise predictor minus sqrt(1 - alpha_bar_t) grad Q(s, x_t) / eta
(Theorem 2). So the actor is trained by noise regression, and no gradient flows through the
sampling chain.

    python dac.py --env hopper-medium                   # published settings
    python dac.py --env hopper-medium-replay --quick    # five minutes on a laptop
    python dac.py --resume runs/hopper-medium/dac/seed0-20260101-120000

The options are in four groups: run (--env to --final-episodes), data (--reward-transform and
--batch-size), optimisation (--discount to --hidden-dim) and algorithm (from --diffusion-steps on).

Where paper and released code differ, or where the paper leaves a choice, this file follows
the code, which produced the published numbers:

 1. Losses are means over the batch and the action dimensions. The threshold b refers to
    such means.
 2. The square in Eq. 15 is expanded. Its term with the square of grad Q is dropped, and the
    cross term has no factor 2, so the optimum is eps - sqrt(1 - alpha_bar_t) grad Q / (2 eta).
 3. Q in the guidance is the mean of the target critics, divided by the batch mean of |Q|.
 4. Each target critic averages its values of N next actions per transition (AntMaze: takes
    their maximum). Algorithm 1 draws one next action.
 5. The dual step on eta uses the behaviour loss from before the actor's step. It changes eta
    by at most eta_lr and keeps it in [eta_min, eta_max].
 6. The critics' target moves before the actor's step. The actor's target moves in every
    fifth update, first in the 1006th.
 7. A reverse step has variance beta_t and clips the predicted action to [-1, 1].
 8. The evaluated policy draws 10 actions and takes the one that the target critics rate best.
 9. Rewards are multiplied by 1000 / (range of trajectory returns), on AntMaze, too.

The evaluation is ours: none before the first update, the same episodes for all seeds, 100
episodes at the end, and on AntMaze 100 episodes every 100,000 updates.
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import evaluate, load_dataset

ALGORITHM = "dac"
EVAL_SEED = 1_000_000  # plus the update, so that all runs are evaluated on the same episodes
FINAL_SEED = 1_000_000_000  # its episodes appear in no earlier evaluation
MAY_BE_ZERO = ("seed", "actor_target_start")  # all other counts are at least 1
AT_MOST_ONE = ("discount", "tau")
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
EVAL_METRICS = ("eval/return", "eval/normalized_score", "eval/episode_length")

# Shapes: B batch, S observation dim, A action dim, H critics, N next actions,
# T diffusion steps, K candidate actions, E environments.


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
    run_dir: str = "runs"  # root folder of all runs
    # updates, and length of the cosine schedules; a new value on --resume changes these at once
    total_steps: int = 2_000_000
    # end early after this update, with a result; on --resume, None goes on to total_steps
    stop_after: int | None = None
    log_every: int = 1_000  # updates between log rows; each shows the newest minibatch
    checkpoint_minutes: float = 5.0  # minutes between checkpoints
    eval: bool = True  # --no-eval trains without an environment
    eval_every: int = 10_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per evaluation
    final_episodes: int = 100  # episodes that the last policy is scored on

    # data

    # return_range: 1000 r / (range of trajectory returns); minus_one: r - 1; none: r
    reward_transform: Literal["return_range", "minus_one", "none"] = "return_range"
    batch_size: int = 256  # transitions per update, B

    # optimisation
    discount: float = 0.99  # discount factor gamma
    actor_lr: float = 3e-4  # Adam step size of the actor, falling to 0 by a cosine
    critic_lr: float = 3e-4  # Adam step size of the critics, falling to 0 by a cosine
    # gradients are clipped to this norm: the actor's, and that of all critics together
    max_grad_norm: float = 1.0
    tau: float = 0.005  # rate of the target networks: target <- (1 - tau) target + tau online
    actor_target_every: int = 5  # updates between steps of the actor's target
    actor_target_start: int = 1_000  # the actor's target moves only after this update
    hidden_dim: int = 256  # width of the three hidden layers of all networks

    # algorithm
    diffusion_steps: int = 5  # steps of the diffusion, T
    beta_min: float = 0.1  # noise rate of the variance-preserving schedule at t / T = 0
    beta_max: float = 10.0  # noise rate of the variance-preserving schedule at t / T = 1
    num_critics: int = 10  # critics in the ensemble, H
    num_next_actions: int = 10  # next actions per transition in the critic target, N
    next_action_reduce: Literal["mean", "max"] = "mean"  # reduces each critic's N values to one
    # reduces the values of the H critics to one: lcb is the lower bound Q_LCB, min the minimum
    q_target: Literal["lcb", "min"] = "lcb"
    rho: float = 1.0  # Q_LCB is the mean minus rho standard deviations of the H critics
    eta: float = 1.0  # initial weight of the behaviour term, eta
    eta_lr: float = 1e-3  # step size of the dual ascent on eta; 0 keeps eta fixed
    eta_min: float = 1e-3  # lower bound of eta
    eta_max: float = 100.0  # upper bound of eta
    # b, the behaviour loss per action dimension that the dual ascent aims at; an actor that
    # always predicts 0 has a loss of about 1
    bc_threshold: float = 1.0
    num_eval_actions: int = 10  # candidate actions, of which the evaluated policy takes the best, K


# The evaluation is ours, 100 episodes every 100,000 updates; the authors play 10 every 10,000.
# Our mean of the last five evaluations thus covers the updates from 1,600,000 to 2,000,000.
ANTMAZE = dict(eta=0.1, eta_lr=0.0, next_action_reduce="max", eval_every=100_000, eval_episodes=100)

# From the authors' runs.sh (commit e254357); the defaults above are those of their main.py.
PRESETS = {
    "hopper-medium": dict(rho=1.5),
    "hopper-medium-replay": dict(rho=1.5),
    "hopper-medium-expert": dict(rho=1.5, bc_threshold=0.05),
    "walker2d-medium": dict(rho=1.0),
    "walker2d-medium-replay": dict(rho=1.0),
    "walker2d-medium-expert": dict(rho=1.0),
    "halfcheetah-medium": dict(rho=0.0),
    "halfcheetah-medium-replay": dict(rho=0.0),
    "halfcheetah-medium-expert": dict(rho=0.0, bc_threshold=0.1),
    "antmaze-umaze": dict(rho=1.0, **ANTMAZE),
    "antmaze-umaze-diverse": dict(rho=1.0, **ANTMAZE),
    "antmaze-medium-play": dict(rho=1.0, **ANTMAZE),
    "antmaze-medium-diverse": dict(rho=1.0, **ANTMAZE),
    "antmaze-large-play": dict(rho=1.1, critic_lr=1e-3, **ANTMAZE),
    "antmaze-large-diverse": dict(rho=1.0, critic_lr=1e-3, **ANTMAZE),
}

# Ours. A large fixed eta keeps the policy near the data, where the critics can be trusted after so
# few updates. Fast targets let the critics settle, and choosing among three candidates helps.
QUICK = dict(
    total_steps=12_000,
    eval_every=3_000,
    eval_episodes=10,
    final_episodes=20,
    log_every=500,
    hidden_dim=128,
    num_critics=2,
    num_next_actions=1,
    num_eval_actions=3,
    eta=5.0,
    eta_lr=0.0,
    actor_lr=1e-3,
    critic_lr=1e-3,
    tau=0.03,
    actor_target_every=1,
    actor_target_start=0,
)


# ----------------------------------------------------------------- networks


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x)) with one exponential, which on a CPU is faster than F.mish."""
    if x.is_cuda:
        return F.mish(x)
    exp = x.clamp(max=30).exp()  # beyond 30, mish(x) is x
    w = exp * (exp + 2)
    return x * w / (w + 2)


class NoisePredictor(nn.Module):
    """eps_net: (obs [B, S], noisy action [B, A], t in 1..T) -> predicted noise [B, A]."""

    def __init__(self, obs_dim: int, act_dim: int, diffusion_steps: int, hidden_dim: int):
        super().__init__()
        frequency = torch.exp(-torch.arange(8) * math.log(10_000) / 7)  # as in the released code
        angle = torch.arange(diffusion_steps + 1)[:, None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=1)  # [T + 1, 16]
        self.register_buffer("time_features", features, persistent=False)
        self.time1 = nn.Linear(16, 32)
        self.time2 = nn.Linear(32, 32)
        self.layer1 = nn.Linear(obs_dim + act_dim + 32, hidden_dim)
        self.layer2 = nn.Linear(hidden_dim, hidden_dim)
        self.layer3 = nn.Linear(hidden_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, act_dim)
        for layer in self.children():
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor, x: Tensor, t: Tensor | int) -> Tensor:
        time_embedding = self.time2(mish(self.time1(self.time_features[t])))
        time_embedding = time_embedding.expand(obs.shape[0], -1)  # [B, 32], also for a single t
        h = mish(self.layer1(torch.cat([obs, x, time_embedding], dim=1)))
        h = mish(self.layer2(h))
        h = mish(self.layer3(h))
        return self.out(h)


class Critics(nn.Module):
    """H independent Q-networks: (obs [B, S], act [B, A]) -> [H, B]."""

    def __init__(self, obs_dim: int, act_dim: int, num_critics: int, hidden_dim: int):
        super().__init__()
        self.num_critics = num_critics
        self.weights = nn.ParameterList()  # [H, fan in, fan out]
        self.biases = nn.ParameterList()  # [H, 1, fan out]
        sizes = [obs_dim + act_dim, hidden_dim, hidden_dim, hidden_dim, 1]
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
            weight = torch.empty(num_critics, fan_in, fan_out)
            for head in weight:  # one by one: xavier_uniform_ misreads the fans of a 3-d tensor
                nn.init.xavier_uniform_(head)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(num_critics, 1, fan_out)))

    def forward(self, obs: Tensor, act: Tensor) -> Tensor:
        h = torch.cat([obs, act], dim=1)
        h = h.expand(self.num_critics, -1, -1)  # [H, B, S + A]
        for layer in range(3):
            h = mish(torch.baddbmm(self.biases[layer], h, self.weights[layer]))  # [H, B, hidden]
        return torch.baddbmm(self.biases[3], h, self.weights[3]).squeeze(2)


def in_pieces(critic: nn.Module, obs: Tensor, act: Tensor) -> Tensor:
    """critic(obs, act); on a CPU 512 rows at a time, so that the activations fit into the cache.

    On two CPU cores this makes an update 40 % faster, a compiled one 20 %.
    """
    if obs.is_cuda:
        return critic(obs, act)
    pieces = zip(obs.split(512), act.split(512))
    return torch.cat([critic(*rows) for rows in pieces], dim=1)


# --------------------------------------------------------- diffusion policy


class Schedule(NamedTuple):
    """Constants of the diffusion, [T + 1] each, indexed by t = 1..T."""

    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    weight_x0: Tensor  # weight of the predicted action in the posterior mean
    weight_xt: Tensor  # weight of x_t in the posterior mean
    sqrt_beta: Tensor  # standard deviation of a reverse step


def vp_schedule(diffusion_steps: int, beta_min: float, beta_max: float, device: str) -> Schedule:
    """Variance-preserving: alpha_bar_t = exp(-beta_min t/T - (beta_max - beta_min) (t/T)^2 / 2)."""
    fraction = torch.arange(diffusion_steps + 1, dtype=torch.float64) / diffusion_steps  # t / T
    alpha_bar = torch.exp(-beta_min * fraction - 0.5 * (beta_max - beta_min) * fraction**2)
    previous = torch.cat([alpha_bar[:1], alpha_bar[:-1]])  # alpha_bar_{t-1}
    alpha = alpha_bar / previous
    beta = 1 - alpha
    one_minus_alpha_bar = (1 - alpha_bar).clamp(min=1e-12)  # avoids 0 / 0 in the unused entry t = 0
    schedule = Schedule(
        sqrt_alpha_bar=alpha_bar.sqrt(),
        sqrt_one_minus_alpha_bar=(1 - alpha_bar).sqrt(),
        weight_x0=previous.sqrt() * beta / one_minus_alpha_bar,
        weight_xt=alpha.sqrt() * (1 - previous) / one_minus_alpha_bar,
        sqrt_beta=beta.sqrt(),
    )
    return Schedule(*(constant.to(device, torch.get_default_dtype()) for constant in schedule))


def add_noise(act: Tensor, t: Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """x_t = sqrt(alpha_bar_t) a + sqrt(1 - alpha_bar_t) eps; [B, A]."""
    signal = schedule.sqrt_alpha_bar[t][:, None]
    noise = schedule.sqrt_one_minus_alpha_bar[t][:, None]
    return signal * act + noise * eps


def sample_actions(eps_net: nn.Module, obs: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """Reverse chain: obs [rows, S] -> actions [rows, A] in [-1, 1]. Call it without gradients.

    noise [T, rows, A] holds x_T and one draw for each step t = T, ..., 2.
    """
    steps = len(noise)
    x = noise[0]
    for t in range(steps, 0, -1):
        eps = eps_net(obs, x, t)
        x0 = (x - schedule.sqrt_one_minus_alpha_bar[t] * eps) / schedule.sqrt_alpha_bar[t]
        x0 = x0.clamp(-1, 1)  # deviation 7
        if t > 1:
            x_mean = schedule.weight_x0[t] * x0 + schedule.weight_xt[t] * x
            z = noise[steps - t + 1]  # noise[1] at t = T, noise[T - 1] at t = 2
            x = x_mean + schedule.sqrt_beta[t] * z  # deviation 7
    return x0  # at t = 1 the posterior mean is the predicted action


# -------------------------------------------------------------------- agent


class Batch(NamedTuple):
    obs: Tensor  # [B, S]
    act: Tensor  # [B, A] in [-1, 1]
    rew: Tensor  # [B], transformed
    next_obs: Tensor  # [B, S]
    not_done: Tensor  # [B], 0 after a terminal, else 1; a timeout is not a terminal


class DAC:
    """The networks, their targets, the optimisers and eta; `update` is one training step."""

    NETWORKS = ("actor", "actor_target", "critic", "critic_target")
    OPTIMIZERS = ("actor_adam", "critic_adam")
    POLICY = ("actor", "critic_target")  # the networks that act
    # logged as train/<name>; of one minibatch; Q-values are in units of the transformed reward
    METRICS = (
        "critic_loss",  # mean of (Q_h - y)^2
        "q_mean",  # mean of Q_h over critics and batch
        "q_std",  # standard deviation over the critics, mean over the batch
        "td_target",  # mean of y
        "actor_loss",  # eta bc_loss + guidance_loss
        "bc_loss",  # mean of |eps_hat - eps|^2 per action dimension; b is its threshold
        "guidance_loss",  # mean of sqrt(1 - alpha_bar_t) g eps_hat, per action dimension
        "guidance_abs",  # mean of |g|, where g is grad Q divided by the mean of |Q|
        "eta",  # weight of the behaviour term after this update
    )

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device: str = "cpu"):
        self.args = args
        self.device = device
        self.act_dim = act_dim
        self.step = 0  # updates so far

        self.actor = NoisePredictor(obs_dim, act_dim, args.diffusion_steps, args.hidden_dim)
        self.actor.to(device)
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), fused=True)

        self.critic = Critics(obs_dim, act_dim, args.num_critics, args.hidden_dim)
        self.critic.to(device)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), fused=True)

        self.eta = torch.tensor(float(args.eta), device=device)
        self.schedule = vp_schedule(args.diffusion_steps, args.beta_min, args.beta_max, device)

        if args.compile:
            self.td_target = torch.compile(self.td_target, dynamic=False)
            self.critic_loss = torch.compile(self.critic_loss, dynamic=False)
            self.q_gradient = torch.compile(self.q_gradient, dynamic=False)
            self.actor_loss = torch.compile(self.actor_loss, dynamic=False)

    @torch.no_grad()
    def td_target(self, batch: Batch, noise: Tensor) -> Tensor:
        """Target y [B] of Eq. 18: r + gamma not_done Q_LCB(s', a').

        The next actions a' are sampled from noise [T, B N, A].
        """
        args = self.args
        next_obs = batch.next_obs.repeat_interleave(args.num_next_actions, dim=0)  # [B N, S]
        next_act = sample_actions(self.actor_target, next_obs, noise, self.schedule)
        q = in_pieces(self.critic_target, next_obs, next_act)  # [H, B N]
        q = q.unflatten(1, (-1, args.num_next_actions))  # [H, B, N]
        if args.next_action_reduce == "mean":
            q = q.mean(dim=2)  # deviation 4
        else:
            q = q.amax(dim=2)  # deviation 4
        if args.q_target == "lcb":
            value = q.mean(dim=0) - args.rho * q.std(dim=0, unbiased=False)  # Q_LCB
        else:
            value = q.amin(dim=0)
        return batch.rew + args.discount * batch.not_done * value  # y of Eq. 18

    def critic_loss(self, batch: Batch, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 18: mean over critics and batch of (Q_h(s, a) - y)^2. Returns (loss, metrics)."""
        q = self.critic(batch.obs, batch.act)  # [H, B]
        loss = (q - target).square().mean()  # Eq. 18
        metrics = {
            "critic_loss": loss.detach(),
            "q_mean": q.detach().mean(),
            "q_std": q.detach().std(dim=0, unbiased=False).mean(),
            "td_target": target.mean(),
        }
        return loss, metrics

    def q_gradient(self, batch: Batch, x: Tensor) -> Tensor:
        """Eq. 19: gradient of the mean target critic with respect to x_t, [B, A].

        It is divided by the batch mean of |Q(s, a)|.
        """
        x = x.detach().requires_grad_()
        q = self.critic_target(batch.obs, x).mean(dim=0)  # [B]
        (gradient,) = torch.autograd.grad(q.sum(), x)  # Eq. 19, row by row
        with torch.no_grad():
            q_scale = self.critic_target(batch.obs, batch.act).abs().mean()
        return gradient / (q_scale + 1e-6)  # deviation 3

    def actor_loss(
        self, batch: Batch, x: Tensor, t: Tensor, eps: Tensor, q_gradient: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 16: eta times noise regression plus soft Q-guidance. Returns (loss, metrics)."""
        eps_hat = self.actor(batch.obs, x, t)
        sqrt_one_minus_alpha_bar = self.schedule.sqrt_one_minus_alpha_bar[t][:, None]
        bc_loss = (eps_hat - eps).square().mean()  # Eq. 14, the behaviour loss; deviation 1
        guidance = sqrt_one_minus_alpha_bar * q_gradient * eps_hat
        guidance_loss = guidance.mean()  # Eq. 15, its cross term; deviations 1 and 2
        loss = self.eta * bc_loss + guidance_loss  # Eq. 16
        metrics = {
            "actor_loss": loss.detach(),
            "bc_loss": bc_loss.detach(),
            "guidance_loss": guidance_loss.detach(),
            "guidance_abs": q_gradient.abs().mean(),
        }
        return loss, metrics

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One iteration of Algorithm 1, lines 3-13; returns metrics, 0-d tensors on the device."""
        args = self.args
        progress = self.step / args.total_steps
        set_lr(self.critic_adam, cosine(args.critic_lr, progress))
        set_lr(self.actor_adam, cosine(args.actor_lr, progress))

        # random numbers
        batch_size = len(batch.obs)  # the last batch of an epoch is smaller
        next_shape = (args.diffusion_steps, batch_size * args.num_next_actions, self.act_dim)
        next_noise = torch.randn(next_shape, device=self.device)
        t = torch.randint(1, args.diffusion_steps + 1, (batch_size,), device=self.device)
        eps = torch.randn(batch_size, self.act_dim, device=self.device)

        # critics
        target = self.td_target(batch, next_noise)
        loss, critic_metrics = self.critic_loss(batch, target)
        gradient_step(self.critic_adam, loss, args.max_grad_norm)
        soft_update(self.critic_target, self.critic, args.tau)  # deviation 6

        # actor
        x = add_noise(batch.act, t, eps, self.schedule)
        q_gradient = self.q_gradient(batch, x)
        loss, actor_metrics = self.actor_loss(batch, x, t, eps, q_gradient)
        gradient_step(self.actor_adam, loss, args.max_grad_norm)

        # dual ascent on eta
        if args.eta_lr > 0:
            violation = actor_metrics["bc_loss"] - args.bc_threshold
            self.eta += args.eta_lr * violation.clamp(-1, 1)  # deviation 5
            self.eta.clamp_(args.eta_min, args.eta_max)  # deviation 5

        # the actor's target
        if self.step > args.actor_target_start and self.step % args.actor_target_every == 0:
            soft_update(self.actor_target, self.actor, args.tau)  # deviation 6

        self.step += 1
        return {**critic_metrics, **actor_metrics, "eta": self.eta.clone()}

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The evaluated policy: obs [E, S] -> actions [E, A], the best of K candidates."""
        args = self.args
        rows = torch.as_tensor(obs, dtype=torch.get_default_dtype(), device=self.device)
        rows = rows.repeat_interleave(args.num_eval_actions, dim=0)  # [E K, S]
        noise = torch.randn(args.diffusion_steps, len(rows), self.act_dim, device=self.device)
        candidates = sample_actions(self.actor, rows, noise, self.schedule)  # [E K, A]
        q = self.critic_target(rows, candidates).mean(dim=0)  # [E K]
        best = q.view(len(obs), -1).argmax(dim=1)  # deviation 8
        candidates = candidates.view(len(obs), -1, self.act_dim)
        return candidates[torch.arange(len(obs)), best].cpu().numpy()

    def state_dict(self) -> dict:
        parts = (*self.NETWORKS, *self.OPTIMIZERS)
        state = {name: getattr(self, name).state_dict() for name in parts}
        return {**state, "eta": self.eta, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        for name in (*self.NETWORKS, *self.OPTIMIZERS):
            getattr(self, name).load_state_dict(state[name])
        self.eta = state["eta"].to(self.device)
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


def transform_rewards(rew: np.ndarray, ends: np.ndarray, kind: str) -> np.ndarray:
    """Rewards [rows] as the critics see them; ends marks the last row of each trajectory."""
    if kind == "minus_one":
        return rew - 1
    if kind == "none":
        return rew
    starts = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])
    returns = np.add.reduceat(rew.astype(np.float64), starts)
    span = returns.max() - returns.min()
    if span == 0:
        sys.exit("error: all trajectories have the same return: choose another --reward-transform")
    return (1000 * rew / span).astype(np.float32)  # deviation 9


def main(argv: list[str] | None = None) -> dict:
    args, checkpoint = parse_args(argv)
    if args.eta_min > args.eta_max:
        sys.exit(f"error: --eta-min {args.eta_min} is above --eta-max {args.eta_max}")
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: PyTorch finds no CUDA device here")
    device_name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    stop = min(args.stop_after or args.total_steps, args.total_steps)

    # data
    arrays, info = load_dataset(args.env, args.data, need_env=args.eval)
    if checkpoint is not None and checkpoint["info"]["sha256"] != info["sha256"]:
        trained = checkpoint["info"]["id"]
        sys.exit(f"error: {args.resume} was trained on {trained}, not on this data: see --data")
    arrays["rew"] = transform_rewards(arrays["rew"], arrays["ends"], args.reward_transform)
    arrays["act"] = arrays["act"].clip(-1 + 1e-5, 1 - 1e-5)
    data = Batch(*(torch.as_tensor(arrays[name], device=device) for name in Batch._fields))
    obs_dim = data.obs.shape[1]
    act_dim = data.act.shape[1]

    # agent
    torch.manual_seed(args.seed)
    agent = DAC(obs_dim, act_dim, args, device)
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
    batches = shuffled_batches(len(data.obs), args.batch_size, args.seed, agent.step, device)
    bar = tqdm(initial=agent.step, total=stop, unit=" updates", mininterval=0.5)
    while agent.step < stop:
        indices = next(batches)
        metrics = agent.update(Batch(*(column.index_select(0, indices) for column in data)))
        step = agent.step
        bar.update()

        row = {"step": step}
        if step % args.log_every == 0:
            for name, value in metrics.items():
                row[f"train/{name}"] = value.item()
            row["time/updates_per_s"] = (step - logged_step) / (time.perf_counter() - logged)
        if args.eval and (step % args.eval_every == 0 or step == args.total_steps):
            evaluation = evaluate(agent.act, info, args.eval_episodes, EVAL_SEED + step)
            for name, values in evaluation.items():
                row[f"eval/{name}"] = float(values.mean())
            means = [f"{name} {values.mean():.1f}" for name, values in evaluation.items()]
            bar.write(f"update {step:,}: {', '.join(means)}")
        if len(row) > 1:
            stop_if_not_finite(row, step, folder)
            log.write(row)
            logged = time.perf_counter()
            logged_step = step

        if time.perf_counter() - saved > 60 * args.checkpoint_minutes or step == stop:
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
                result[f"{name}_last_5"] = mean(values[-5:])
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
