r"""CPED: Constrained Policy optimization with Explicit behavior Density (NeurIPS 2023).

Zhang, Zhang, Wang, Jing, arXiv:2301.12130. A flow-GAN learns the density L(s, a) of the data.
It is a normalising flow, so log L is exact, and it is trained by likelihood and against a
discriminator (Eq. 4). TD3 then maximises Q inside the region {(s, a): -log L(s, a) < epsilon}
(Eq. 6 and 7). The multiplier alpha, here `lagrange`, weighs this constraint.

    python cped.py --env hopper-medium                   # published settings
    python cped.py --env hopper-medium-replay --quick    # seven minutes on a laptop
    python cped.py --env hopper-medium --seed 1 --flow runs/hopper-medium/cped/seed0-20260101-120000
    python cped.py --resume runs/hopper-medium/cped/seed0-20260101-120000

The options are in four groups: run (--env to --flow), data (--reward-transform and --batch-size),
optimisation (--discount to --hidden-dim) and algorithm (from --flow-steps on).

This command is closest to the paper, with 20,000 flow updates, joint training and dual descent.
Critics and Q start as in the authors' earlier code, the rest is the released code's:

    python cped.py --env hopper-medium --constraint dual --flow-training joint \
        --flow-steps 20000 --critic-start 10000 --actor-q-start 30000

Where paper and released code differ, the defaults follow the code:

 1. The paper finds alpha by dual gradient descent (--constraint dual). The code takes alpha from
    a table and has no region: -log L(s, pi(s)) counts everywhere (--constraint schedule). The
    paper, too, reports an alpha that is large early and smaller after 200,000 to 300,000 updates.
 2. The paper trains the flow for 20,000 updates, then jointly with the policy. The code trains
    it for 500,000 updates, then freezes it. --flow-training joint alone keeps the code's
    numbers of updates and so matches neither; use the command above.
 3. The discriminator has D outputs, as many as its inputs, and the losses average them. The
    gradient penalty has weight 0.5. It mixes data and samples with weights from N(0, 1), not
    from U(0, 1).
 4. The flow moves only in every fifth update, by Adam with betas (0.9, 0.01) and eps 1e-4. Its
    networks have three layers (paper: four), with an activation after the last one, too.
 5. The target's noisy action may leave [-1, 1]. --clip-target-action clips it, as TD3 does.
 6. The actor maximises the minimum of both critics, not divided by its mean size. At first it
    only maximises the likelihood, and the critics start late.

In these points this file differs from the code, too:

 7. With --constraint dual, the hinge max(0, -log L(s, pi(s)) - epsilon) is ours. The paper's
    alpha can only grow; ours stops where the policy violates the constraint as much as the data
    do, moves by at most lagrange_lr per step and stays in [lagrange_min, lagrange_max].
 8. The table counts from the first update of the policy stage, and all its multipliers are
    positive. The code's formula gives 0 in one update, and negative ones if the flow stage is
    shorter than 500,000 updates.
 9. The inverse of the flow undoes the scaling first. The code undoes it last, which does not
    invert the flow.
10. The code divides the inputs of all linear layers of the flow by the constant sqrt(1 + 1e-6),
    which changes log L in the seventh digit. We do not.
11. The flow moves in the last of every five updates, actor and targets in the last of every two,
    so that log rows at round numbers show them. In the code they move in the first.

Ours, too: the targets start as copies, batches come from shuffled epochs (the code draws them
with replacement), no transition crosses a timeout, the flow's first weights depend on the seed,
and a value that is not finite ends the run (the code skips the update). 5 % of the transitions
are held out from the flow, and with joint training from the policy, too. We evaluate 10 episodes
every 10,000 updates (the code: 5,000 environment steps every 1,000 updates), with one action per
step (the code takes the best of 100 equal ones). --flow-lr-end is for short flow stages.
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

ALGORITHM = "cped"
EVAL_SEED = 1_000_000  # plus the policy update: all runs get the same episodes
FINAL_SEED = 1_000_000_000  # its episodes appear in no earlier evaluation
MAY_BE_ZERO = (  # all other counts are at least 1
    "seed",
    "joint_steps",
    "critic_start",
    "actor_q_start",
    "lagrange_from",
)
AT_MOST_ONE = ("discount", "tau", "epsilon_quantile")
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
FLOW_ARGS = (  # must be equal in this run and in the run of --flow
    "flow_steps",
    "num_couplings",
    "flow_hidden_dim",
    "flow_lr",
    "flow_lr_end",
    "disc_lr",
    "disc_updates",
    "mle_weight",
    "penalty_weight",
    "batch_size",
)
DENSITY_METRICS = (  # mean of log L(s, a) in nats, while the flow learns
    "log_density/train",  # of 4,096 transitions that the flow learns from
    "log_density/held_out",  # of 4,096 that it never sees
)
EVAL_METRICS = ("eval/return", "eval/normalized_score", "eval/episode_length")

# Shapes: B batch, S observation dim, A action dim, D = S + A, E environments.


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
    total_steps: int = 1_000_000  # updates of the policy stage, after those of the flow stage
    # end early after this policy update, with a result; on --resume, None goes on to total_steps
    stop_after: int | None = None
    log_every: int = 1_000  # updates between log rows; each shows the newest minibatch
    checkpoint_minutes: float = 5.0  # minutes between checkpoints
    eval: bool = True  # --no-eval trains without an environment
    eval_every: int = 10_000  # policy updates between evaluations
    eval_episodes: int = 10  # episodes per evaluation
    final_episodes: int = 100  # episodes that the last policy is scored on
    flow: str | None = None  # run folder, flow.pt or checkpoint whose finished flow is reused

    # data

    # reward for the critics; minus_one: r - 1, as published for AntMaze; none: r
    reward_transform: Literal["minus_one", "none"] = "none"
    batch_size: int = 256  # transitions per update, B

    # optimisation
    discount: float = 0.99  # discount factor gamma
    actor_lr: float = 1e-4  # Adam step size of the actor
    critic_lr: float = 3e-4  # Adam step size of the critics
    flow_lr: float = 1e-4  # Adam step size of the flow
    # ours: falls by a cosine from flow_lr to this value over the flow stage; None keeps flow_lr
    flow_lr_end: float | None = None
    disc_lr: float = 1e-4  # Adam step size of the discriminator
    tau: float = 0.005  # rate of the target networks: target <- (1 - tau) target + tau online
    policy_every: int = 2  # updates between steps of the actor and of all targets
    hidden_dim: int = 256  # width of the two hidden layers of actor and critics

    # algorithm
    # values of the released code, unless marked as ours
    flow_steps: int = 500_000  # updates of the flow stage; every disc_updates-th moves the flow
    # frozen: the flow is fixed in the policy stage; joint: it goes on learning there
    flow_training: Literal["frozen", "joint"] = "frozen"
    joint_steps: int = 480_000  # joint: number of policy updates in which the flow goes on learning
    num_couplings: int = 4  # coupling layers of the flow
    flow_hidden_dim: int = 750  # width of the two hidden layers of each coupling's network
    disc_updates: int = 5  # steps of the discriminator per step of the flow
    mle_weight: float = 1.0  # lambda of Eq. 4: the flow's adversarial loss is divided by it
    penalty_weight: float = 0.5  # weight of the gradient penalty
    target_noise: float = 0.2  # standard deviation of the noise on the target's action
    target_noise_clip: float = 0.5  # bound of the noise on the target's action
    clip_target_action: bool = False  # clip the target's noisy action to [-1, 1], as TD3 does
    critic_start: int = 30_000  # the critics learn from this policy update on, counted from 0
    actor_q_start: int = 50_000  # the actor's loss has Q from this policy update on, counted from 0
    # schedule: alpha from --lagrange-table; dual: alpha by dual descent
    constraint: Literal["schedule", "dual"] = "schedule"
    # schedule: values of the multiplier alpha, used one after the other
    lagrange_table: tuple[float, ...] = (1000.0, 10.0, 7.5, 5.0, 2.5, 1.5)
    # schedule: each alpha holds from this policy update on, counted from 0
    lagrange_from: tuple[int, ...] = (0, 100_001, 200_000, 300_000, 400_000, 500_001)
    # dual: epsilon is this quantile of -log L of the data in a batch; None takes the mean
    epsilon_quantile: float | None = None
    lagrange: float = 10.0  # dual: initial alpha; ours
    lagrange_lr: float = 0.01  # dual: step of alpha per nat of violation; ours
    lagrange_min: float = 0.1  # dual: lower bound of alpha; ours
    lagrange_max: float = 1000.0  # dual: upper bound of alpha; ours


# AntMaze. The alphas and the other settings are the released code's, the evaluation is ours.
ANTMAZE = dict(
    actor_lr=3e-4,
    reward_transform="minus_one",
    lagrange_table=(0.25, 0.1, 0.08),
    eval_every=50_000,
    eval_episodes=100,
)
# The code's AntMaze runs have 1,000,000 updates in both stages together, and its table counts
# them all. Here it counts those of the policy stage.
MAZE = dict(flow_steps=300_000, total_steps=700_000, lagrange_from=(0, 200_001, 500_001))
LARGE_MAZE = dict(flow_steps=400_000, total_steps=600_000, lagrange_from=(0, 100_001, 400_001))

# The authors' README gives halfcheetah-medium, antmaze-umaze and the flow stage of large mazes;
# we extend these to the other tasks. The rows of the robots are the defaults, written out.
PRESETS = {
    "hopper-medium": dict(flow_steps=500_000, actor_lr=1e-4),
    "hopper-medium-replay": dict(flow_steps=500_000, actor_lr=1e-4),
    "hopper-medium-expert": dict(flow_steps=500_000, actor_lr=1e-4),
    "walker2d-medium": dict(flow_steps=500_000, actor_lr=1e-4),
    "walker2d-medium-replay": dict(flow_steps=500_000, actor_lr=1e-4),
    "walker2d-medium-expert": dict(flow_steps=500_000, actor_lr=1e-4),
    "halfcheetah-medium": dict(flow_steps=500_000, actor_lr=1e-4),
    "halfcheetah-medium-replay": dict(flow_steps=500_000, actor_lr=1e-4),
    "halfcheetah-medium-expert": dict(flow_steps=500_000, actor_lr=1e-4),
    "antmaze-umaze": dict(**MAZE, **ANTMAZE),
    "antmaze-umaze-diverse": dict(**MAZE, **ANTMAZE),
    "antmaze-medium-play": dict(**MAZE, **ANTMAZE),
    "antmaze-medium-diverse": dict(**MAZE, **ANTMAZE),
    "antmaze-large-play": dict(**LARGE_MAZE, **ANTMAZE),
    "antmaze-large-diverse": dict(**LARGE_MAZE, **ANTMAZE),
}

# Ours, for a machine without a GPU. Narrow networks, larger steps and faster targets fit the
# course of a long run into a few minutes: cloning first, then Q under ever smaller multipliers.
QUICK = dict(
    flow_steps=24_000,
    flow_hidden_dim=128,
    flow_lr=1e-3,
    flow_lr_end=1e-5,
    disc_updates=1,
    total_steps=30_000,
    hidden_dim=128,
    actor_lr=3e-4,
    critic_lr=1e-3,
    tau=0.02,
    critic_start=0,
    actor_q_start=5_000,
    lagrange_table=(10.0, 5.0, 2.5),
    lagrange_from=(0, 10_000, 20_000),
    eval_every=5_000,
    eval_episodes=10,
    final_episodes=20,
    log_every=500,
)


# ----------------------------------------------------------------- networks


def mlp(fan_in: int, hidden_dim: int, fan_out: int) -> nn.Sequential:
    """Two hidden layers with ReLU: [B, fan_in] -> [B, fan_out]."""
    return nn.Sequential(
        nn.Linear(fan_in, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, fan_out),
    )


class Actor(nn.Module):
    """pi: obs [B, S] -> actions [B, A] in [-1, 1]."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, hidden_dim, act_dim)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).tanh()


class Critics(nn.Module):
    """Two independent Q-networks: (obs [B, S], act [B, A]) -> [2, B]."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int):
        super().__init__()
        self.q1 = mlp(obs_dim + act_dim, hidden_dim, 1)
        self.q2 = mlp(obs_dim + act_dim, hidden_dim, 1)

    def forward(self, obs: Tensor, act: Tensor) -> Tensor:
        x = torch.cat([obs, act], dim=1)
        return torch.cat([self.q1(x), self.q2(x)], dim=1).T


class Discriminator(nn.Module):
    """D: rows x = (s, a) [B, D] -> scores [B, D]; the losses average them (deviation 3)."""

    def __init__(self, dim: int):
        super().__init__()
        self.layer1 = nn.Linear(dim, 2 * dim)
        self.layer2 = nn.Linear(2 * dim, 4 * dim)
        self.out = nn.Linear(4 * dim, dim)
        self.shift1 = nn.Parameter(torch.zeros(2 * dim))
        self.shift2 = nn.Parameter(torch.zeros(4 * dim))
        for layer in (self.layer1, self.layer2):  # bounds and 0.1 as in the released code
            bound = layer.out_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.constant_(layer.bias, 0.1)
        nn.init.uniform_(self.out.weight, -3e-3, 3e-3)
        nn.init.uniform_(self.out.bias, -3e-3, 3e-3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(normalize(self.layer1(x)) + self.shift1, 0.01)
        h = F.leaky_relu(normalize(self.layer2(h)) + self.shift2, 0.01)
        return self.out(h)


def normalize(h: Tensor) -> Tensor:
    """Each row of h minus its mean, over its standard deviation."""
    std, mean = torch.std_mean(h, dim=1, keepdim=True)
    return (h - mean) / (std + 1e-6)


# ----------------------------------------------------------------- flow-GAN


class Flow(nn.Module):
    """NICE: rows x = (s, a) [B, D] -> z [B, D] with a logistic prior, and back.

    x is cut into halves u and v. In turn, each is shifted by a function of the other; then
    all D values are scaled by exp(c).
    """

    def __init__(self, dim: int, num_couplings: int, hidden_dim: int):
        super().__init__()
        self.halves = [dim // 2, dim - dim // 2]
        self.log_scale = nn.Parameter(torch.zeros(dim))  # c
        self.shifts = nn.ModuleList()  # m_1, m_2, ...
        for i in range(num_couplings):
            kept = self.halves[i % 2]
            self.shifts.append(coupling_net(kept, hidden_dim, dim - kept))

    def forward(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The halves of x -> z [B, D], and log|det dz/dx|, one number for all rows."""
        for i, shift in enumerate(self.shifts):
            if i % 2 == 0:
                v = v + shift(u)
            else:
                u = u + shift(v)
        z = torch.cat([u, v], dim=1) * self.log_scale.exp()
        log_det = self.log_scale.sum()
        return z, log_det

    def inverse(self, z: Tensor) -> Tensor:
        """z [B, D] -> x [B, D]."""
        x = z * (-self.log_scale).exp()  # deviation 9
        u, v = x.split(self.halves, dim=1)
        for i in reversed(range(len(self.shifts))):
            if i % 2 == 0:
                v = v - self.shifts[i](u)
            else:
                u = u - self.shifts[i](v)
        return torch.cat([u, v], dim=1)

    def log_density(self, obs: Tensor, act: Tensor) -> Tensor:
        """log L(s, a) [B] in nats, the joint density; its gradient in a is also log L(a|s)'s."""
        u, v = torch.cat([obs, act], dim=1).split(self.halves, dim=1)
        if self.halves[0] <= obs.shape[1]:
            u = obs[:, : self.halves[0]]  # no action in it: spares the first net's gradient
        z, log_det = self(u, v)
        log_prior = z - 2 * F.softplus(z)  # of the logistic distribution, [B, D]
        return log_prior.sum(dim=1) + log_det


def coupling_net(fan_in: int, hidden_dim: int, fan_out: int) -> nn.Sequential:
    """[B, fan_in] -> shift [B, fan_out]. It starts near 0, so that the flow starts near z = x."""
    net = nn.Sequential(  # the activations work in place, which is faster
        nn.Linear(fan_in, hidden_dim),  # deviation 10
        nn.LeakyReLU(0.01, inplace=True),
        nn.Linear(hidden_dim, hidden_dim),
        nn.LeakyReLU(0.01, inplace=True),
        nn.Linear(hidden_dim, fan_out),
        nn.LeakyReLU(0.01, inplace=True),  # deviation 4
    )
    for layer in net[::2]:
        nn.init.uniform_(layer.weight, -0.01, 0.01)
        nn.init.zeros_(layer.bias)
    return net


# -------------------------------------------------------------------- agent


class Batch(NamedTuple):
    obs: Tensor  # [B, S]
    act: Tensor  # [B, A] in [-1, 1]
    rew: Tensor  # [B], transformed
    next_obs: Tensor  # [B, S]
    not_done: Tensor  # [B], 0 after a terminal, else 1; a timeout is not a terminal


class CPED:
    """Flow-GAN, policy, targets, optimisers and alpha; `update` is one training step."""

    FLOW_GAN = ("flow", "disc", "flow_adam", "disc_adam")  # what --flow takes from a run
    NETWORKS = ("flow", "disc", "actor", "actor_target", "critic", "critic_target")
    OPTIMIZERS = ("flow_adam", "disc_adam", "actor_adam", "critic_adam")
    POLICY = ("actor",)  # the networks that act
    # logged as train/<name>; of one minibatch; Q in units of the reward, -log L and epsilon in nats
    METRICS = (
        "disc_loss",  # mean D(g) - mean D(x) + penalty_weight penalty
        "penalty",  # mean of (|grad D| - 1)^2
        "gan_loss",  # - mean D(g), after the discriminator's step
        "flow_nll",  # mean of -log L(s, a) of the data
        "critic_loss",  # sum over both critics of the mean of (Q_h - y)^2
        "q_mean",  # mean of Q_h over critics and batch
        "td_target",  # mean of y
        "actor_loss",  # alpha (actor_nll or violation) - actor_q
        "actor_nll",  # mean of -log L(s, pi(s))
        "actor_q",  # mean of min_h Q_h(s, pi(s))
        "epsilon",  # dual: bound of the region, mean or quantile of -log L(s, a) of the data
        "violation",  # dual: mean of max(0, -log L(s, pi(s)) - epsilon)
        "lagrange",  # alpha after this update
    )

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device: str = "cpu"):
        self.args = args
        self.device = device
        self.act_dim = act_dim
        self.dim = obs_dim + act_dim
        self.step = 0  # updates so far, of both stages
        self.stages = [("flow", args.flow_steps), ("policy", args.total_steps)]
        self.flow_until = args.flow_steps  # update until which the flow learns
        if args.flow_training == "joint":
            self.flow_until += args.joint_steps  # deviation 2

        self.flow = Flow(self.dim, args.num_couplings, args.flow_hidden_dim)
        self.flow.to(device).requires_grad_(False)  # it needs a gradient in its own steps only
        self.flow_adam = torch.optim.Adam(  # deviation 4
            self.flow.parameters(), lr=args.flow_lr, betas=(0.9, 0.01), eps=1e-4, fused=True
        )
        self.disc = Discriminator(self.dim).to(device)
        self.disc_adam = torch.optim.Adam(self.disc.parameters(), lr=args.disc_lr, fused=True)

        self.actor = Actor(obs_dim, act_dim, args.hidden_dim).to(device)
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), lr=args.actor_lr, fused=True)

        self.critic = Critics(obs_dim, act_dim, args.hidden_dim).to(device)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), lr=args.critic_lr, fused=True)

        self.lagrange = torch.tensor(float(args.lagrange), device=device)  # alpha

        if args.compile:  # not disc_loss, which is differentiated twice
            self.flow_loss = torch.compile(self.flow_loss, dynamic=False)
        if args.compile and device != "cpu":  # on a CPU they become slower
            self.td_target = torch.compile(self.td_target, dynamic=False)
            self.critic_loss = torch.compile(self.critic_loss, dynamic=False)
            self.actor_loss_cloning = torch.compile(self.actor_loss_cloning, dynamic=False)
            self.actor_loss_schedule = torch.compile(self.actor_loss_schedule, dynamic=False)
            self.actor_loss_dual = torch.compile(self.actor_loss_dual, dynamic=False)

    def disc_loss(
        self, batch: Batch, fake: Tensor, mix: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 4 for the discriminator, as a WGAN with gradient penalty. Returns (loss, metrics).

        fake [B, D] are samples g of the flow. The penalty is taken between data and samples, where
        mix [B] is the weight of the data.
        """
        real = torch.cat([batch.obs, batch.act], dim=1)  # x
        mixed = torch.lerp(fake, real, mix[:, None]).requires_grad_()
        (gradient,) = torch.autograd.grad(
            self.disc(mixed).sum(), mixed, create_graph=True
        )  # [B, D]
        penalty = (gradient.norm(dim=1) - 1).square().mean()
        fake_score, real_score = self.disc(torch.cat([fake, real])).view(2, -1).mean(dim=1)
        loss = fake_score - real_score + self.args.penalty_weight * penalty  # Eq. 4, deviation 3
        return loss, {"disc_loss": loss.detach(), "penalty": penalty.detach()}

    def flow_loss(self, batch: Batch, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 4 for the flow: adversarial loss and likelihood. Returns (loss, metrics).

        fake [B, D] are samples g of the flow, with their gradient.
        """
        gan_loss = -self.disc(fake).mean()
        nll = -self.flow.log_density(batch.obs, batch.act).mean()
        loss = gan_loss / self.args.mle_weight + nll  # Eq. 4, divided by lambda
        return loss, {"gan_loss": gan_loss.detach(), "flow_nll": nll.detach()}

    @torch.no_grad()
    def td_target(self, batch: Batch, noise: Tensor) -> Tensor:
        """Target y [B] of Eq. 6; noise [B, A] from N(0, 1)."""
        args = self.args
        noise = args.target_noise * noise
        noise = noise.clamp(-args.target_noise_clip, args.target_noise_clip)
        next_act = self.actor_target(batch.next_obs) + noise  # deviation 5
        if args.clip_target_action:
            next_act = next_act.clamp(-1, 1)
        next_q = self.critic_target(batch.next_obs, next_act).amin(dim=0)  # [B]
        return batch.rew + args.discount * batch.not_done * next_q  # y of Eq. 6

    def critic_loss(self, batch: Batch, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 6: sum over both critics of the mean (Q_h(s, a) - y)^2. Returns (loss, metrics)."""
        q = self.critic(batch.obs, batch.act)  # [2, B]
        loss = (q - target).square().mean(dim=1).sum()  # Eq. 6
        metrics = {
            "critic_loss": loss.detach(),
            "q_mean": q.detach().mean(),
            "td_target": target.mean(),
        }
        return loss, metrics

    def actor_loss_cloning(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss before actor_q_start: the likelihood alone. Returns (loss, metrics)."""
        act = self.actor(batch.obs)
        nll = -self.flow.log_density(batch.obs, act).mean()
        loss = self.lagrange * nll  # deviation 6; alpha hardly matters to Adam here
        return loss, {"actor_loss": loss.detach(), "actor_nll": nll.detach()}

    def actor_loss_schedule(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The released code's loss: Q, and alpha times -log L without a region.

        Returns (loss, metrics).
        """
        act = self.actor(batch.obs)
        q = self.critic(batch.obs, act).amin(dim=0).mean()  # deviation 6
        nll = -self.flow.log_density(batch.obs, act).mean()
        loss = -q + self.lagrange * nll  # deviation 1
        metrics = {
            "actor_loss": loss.detach(),
            "actor_nll": nll.detach(),
            "actor_q": q.detach(),
        }
        return loss, metrics

    def actor_loss_dual(self, batch: Batch, epsilon: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 7: Q inside the region -log L(s, a) < epsilon, as a Lagrangian.

        Returns (loss, metrics).
        """
        act = self.actor(batch.obs)
        q = self.critic(batch.obs, act).amin(dim=0).mean()  # deviation 6
        nll = -self.flow.log_density(batch.obs, act)  # [B]
        violation = (nll - epsilon).relu().mean()  # deviation 7
        loss = -q + self.lagrange * violation  # Eq. 7
        metrics = {
            "actor_loss": loss.detach(),
            "actor_nll": nll.detach().mean(),
            "actor_q": q.detach(),
            "epsilon": epsilon,
            "violation": violation.detach(),
        }
        return loss, metrics

    @torch.no_grad()
    def region(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """epsilon of Eq. 7, from the densities of the batch, and the data's own mean violation."""
        args = self.args
        nll = -self.flow.log_density(batch.obs, batch.act)  # [B]
        if args.epsilon_quantile is None:
            epsilon = nll.mean()
        else:
            epsilon = nll.quantile(args.epsilon_quantile)
        return epsilon, (nll - epsilon).relu().mean()

    def scheduled_lagrange(self, policy_step: int) -> float:
        """The table's alpha in this update of the policy stage."""
        args = self.args
        for value, first in zip(args.lagrange_table, args.lagrange_from):
            if policy_step >= first:
                lagrange = value
        return lagrange

    def update_lagrange(self, violation: Tensor, data_violation: Tensor) -> None:
        """Dual step: alpha rises while the policy violates the constraint more than the data do."""
        args = self.args
        excess = violation - data_violation  # in nats; deviation 7
        self.lagrange += args.lagrange_lr * excess.clamp(-1, 1)
        self.lagrange.clamp_(args.lagrange_min, args.lagrange_max)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One update of the stage that is due; returns metrics, 0-d tensors on the device."""
        metrics = {}
        if self.step < self.flow_until:  # with joint training, in the policy stage, too
            metrics.update(self.update_flow(batch))
        if self.step >= self.args.flow_steps:
            metrics.update(self.update_policy(batch))
        self.step += 1
        return metrics

    def update_flow(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the discriminator and, in every disc_updates-th update, of the flow."""
        args = self.args
        flow_learns = (self.step + 1) % args.disc_updates == 0  # deviation 11
        if args.flow_lr_end is not None:
            progress = min(self.step / args.flow_steps, 1)
            decay = cosine(args.flow_lr - args.flow_lr_end, progress)
            set_lr(self.flow_adam, args.flow_lr_end + decay)

        # random numbers
        batch_size = len(batch.obs)
        uniform = torch.rand(batch_size, self.dim, device=self.device)
        latent = uniform.logit(eps=6e-8)  # z of the logistic prior; 2^-24 keeps it finite
        mix = torch.randn(batch_size, device=self.device)  # deviation 3

        # discriminator
        self.flow.requires_grad_(flow_learns)
        fake = self.flow.inverse(latent)
        loss, metrics = self.disc_loss(batch, fake.detach(), mix)
        gradient_step(self.disc_adam, loss)

        # flow
        if flow_learns:
            loss, flow_metrics = self.flow_loss(batch, fake)
            gradient_step(self.flow_adam, loss)
            metrics.update(flow_metrics)
            self.flow.requires_grad_(False)
        return metrics

    def update_policy(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the critics and, in every policy_every-th update, of actor and targets."""
        args = self.args
        policy_step = self.step - args.flow_steps  # updates of this stage so far
        metrics = {}

        # critics
        if policy_step >= args.critic_start:  # deviation 6
            noise = torch.randn(len(batch.obs), self.act_dim, device=self.device)
            target = self.td_target(batch, noise)
            loss, critic_metrics = self.critic_loss(batch, target)
            gradient_step(self.critic_adam, loss)
            metrics.update(critic_metrics)

        if (policy_step + 1) % args.policy_every != 0:  # deviation 11
            return metrics

        # actor
        self.critic.requires_grad_(False)  # only the actor's gradient is needed
        if args.constraint == "schedule":
            self.lagrange.fill_(self.scheduled_lagrange(policy_step))  # deviation 8
        if policy_step < args.actor_q_start:  # deviation 6
            loss, actor_metrics = self.actor_loss_cloning(batch)
        elif args.constraint == "schedule":
            loss, actor_metrics = self.actor_loss_schedule(batch)
        else:
            epsilon, data_violation = self.region(batch)
            loss, actor_metrics = self.actor_loss_dual(batch, epsilon)
        gradient_step(self.actor_adam, loss)
        self.critic.requires_grad_(True)
        if args.constraint == "dual" and policy_step >= args.actor_q_start:
            self.update_lagrange(actor_metrics["violation"], data_violation)

        # targets
        soft_update(self.actor_target, self.actor, args.tau)
        soft_update(self.critic_target, self.critic, args.tau)
        return {**metrics, **actor_metrics, "lagrange": self.lagrange.clone()}

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The evaluated policy: obs [E, S] -> actions [E, A]."""
        rows = torch.as_tensor(obs, dtype=torch.get_default_dtype(), device=self.device)
        return self.actor(rows).cpu().numpy()

    def state_dict(self) -> dict:
        parts = (*self.NETWORKS, *self.OPTIMIZERS)
        state = {name: getattr(self, name).state_dict() for name in parts}
        return {**state, "lagrange": self.lagrange, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        for name in (*self.NETWORKS, *self.OPTIMIZERS):
            getattr(self, name).load_state_dict(state[name])
        self.lagrange = state["lagrange"].to(self.device)
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


def check_constraint(args: Args) -> None:
    """Ends the program if the arguments about the constraint do not fit together."""
    table = args.lagrange_table
    since = args.lagrange_from
    if len(table) != len(since):
        sys.exit(
            f"error: --lagrange-table has {len(table)} values and --lagrange-from {len(since)}:"
            " give one start for each alpha"
        )
    if len(table) == 0 or min(table) == 0:
        sys.exit("error: --lagrange-table: must have at least one value, all above 0")
    if since[0] != 0 or list(since) != sorted(set(since)):
        sys.exit("error: --lagrange-from: must start at 0 and rise")
    if args.lagrange_min > args.lagrange_max:
        sys.exit(
            f"error: --lagrange-min {args.lagrange_min} is above --lagrange-max {args.lagrange_max}"
        )
    if args.mle_weight == 0:
        sys.exit("error: --mle-weight 0: must be above 0, the adversarial loss is divided by it")


def split_rows(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rows that flows learn from and of the 5 % held out, the same in all runs."""
    order = np.random.default_rng(0).permutation(num_rows)
    num_train = num_rows * 19 // 20
    return order[:num_train], order[num_train:]


def read_flow(args: Args, sha256: str) -> dict:
    """The state of the finished flow stage that --flow names."""
    path = Path(args.flow)
    if path.is_dir():
        flow_path = path / "flow.pt"  # not in a run that took its flow from another
        path = flow_path if flow_path.exists() else path / "checkpoint.pt"
    if not path.exists():
        sys.exit(f"error: --flow: {path} does not exist")
    if not zipfile.is_zipfile(path):
        sys.exit(f"error: --flow: {path} is not a checkpoint, or is damaged")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint.get("algorithm") != ALGORITHM:
        sys.exit(f"error: --flow: {path} is not a checkpoint of {ALGORITHM}.py")
    stored = {**asdict(Args()), **checkpoint["args"]}
    if stored.keys() != asdict(args).keys():
        sys.exit(f"error: --flow: {path} is from another version of {ALGORITHM}.py")
    step = checkpoint["agent"]["step"]
    for name in FLOW_ARGS:
        if stored[name] != getattr(args, name):
            flag = name.replace("_", "-")
            value = getattr(args, name)
            sys.exit(f"error: --flow: {path} has --{flag} {stored[name]}, this run {value}")
    if checkpoint["info"]["sha256"] != sha256:
        sys.exit(f"error: --flow: {path} was trained on other data: {checkpoint['info']['id']}")
    if step < args.flow_steps:
        sys.exit(f"error: --flow: {path} has {step} of {args.flow_steps} updates of its flow stage")
    if step > args.flow_steps and stored["flow_training"] == "joint":
        sys.exit(f"error: --flow: {path} has a flow that learned with a policy: use its flow.pt")
    return checkpoint["agent"]


def main(argv: list[str] | None = None) -> dict:
    args, checkpoint = parse_args(argv)
    check_constraint(args)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: PyTorch finds no CUDA device here")
    device_name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    stop = args.flow_steps + min(args.stop_after or args.total_steps, args.total_steps)

    # data
    arrays, info = load_dataset(args.env, args.data, need_env=args.eval)
    if checkpoint is not None and checkpoint["info"]["sha256"] != info["sha256"]:
        trained = checkpoint["info"]["id"]
        sys.exit(f"error: {args.resume} was trained on {trained}, not on this data: see --data")
    if args.reward_transform == "minus_one":
        arrays["rew"] = arrays["rew"] - 1
    all_data = Batch(*(torch.as_tensor(arrays[name], device=device) for name in Batch._fields))
    train_rows, held_out_rows = split_rows(len(all_data.obs))
    train_data = Batch(*(column[train_rows] for column in all_data))
    datasets = {"flow": train_data, "policy": all_data}
    if args.flow_training == "joint":
        datasets["policy"] = train_data  # the flow learns in this stage, too
    density_rows = (train_rows[:4096], held_out_rows[:4096])  # of DENSITY_METRICS
    obs_dim = all_data.obs.shape[1]
    act_dim = all_data.act.shape[1]

    # agent
    torch.manual_seed(args.seed)
    agent = CPED(obs_dim, act_dim, args, device)
    if checkpoint is not None:
        agent.load_state_dict(checkpoint["agent"])
        torch.set_rng_state(checkpoint["rng"])
        if device == "cuda" and "cuda_rng" in checkpoint:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"])
        if agent.step > stop:
            sys.exit(f"error: {args.resume} is at update {agent.step}, beyond its end at {stop}")
    elif args.flow is not None:
        flow_state = read_flow(args, info["sha256"])
        for name in agent.FLOW_GAN:
            getattr(agent, name).load_state_dict(flow_state[name])
        agent.step = args.flow_steps

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
    columns = ["step", *train_metrics, *DENSITY_METRICS, *EVAL_METRICS, "time/updates_per_s"]
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
            metrics = agent.update(Batch(*(column.index_select(0, indices) for column in dataset)))
            step = agent.step
            bar.update()

            row = {"step": step}
            if step % args.log_every == 0:
                for name, value in metrics.items():
                    row[f"train/{name}"] = value.item()
                row["time/updates_per_s"] = (step - logged_step) / (time.perf_counter() - logged)
                if step <= agent.flow_until:
                    for name, rows in zip(DENSITY_METRICS, density_rows):
                        log_density = agent.flow.log_density(all_data.obs[rows], all_data.act[rows])
                        row[name] = log_density.mean().item()
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
                if stage == "flow" and step == end:
                    save(content, folder / "flow.pt")  # for --flow
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
