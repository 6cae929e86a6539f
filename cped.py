"""CPED: Constrained Policy optimization with Explicit behavior Density (Zhang et al.; NeurIPS 2023; arXiv:2301.12130).

A flow-GAN learns the density p(s, a) of the data: a normalising flow, so that log p is exact, trained by likelihood and by a
WGAN-GP critic on its samples. TD3 then maximises Q inside the region -log p(s, pi(s)) < epsilon, by a Lagrange multiplier.

    python cped.py --env hopper-medium                # the released lengths, on CUDA where there is one
    python cped.py --env hopper-medium --quick        # small protocol for a laptop: five minutes on two cores
    python cped.py --env hopper-medium --resume       # go on with the newest run of this task and seed, exactly
    python cped.py --env hopper-medium --seed 1 --flow runs/hopper-medium/cped/seed0-20260101-120000  # with its flow

Where paper and released code differ:
 1. Paper: hinge at epsilon, multiplier by dual ascent (--constraint dual), which could only rise: ours rests where the mean
    violation is that of the data. Code: no hinge, multipliers from a table (schedule), our default, as it scored better.
 2. The table counts from the policy stage and is positive (the code's formula is 0 in one step, and negative if F < 500,000).
 3. Paper: flow trained 20,000 steps, then jointly with the policy (--flow-training joint). Code: 500,000, then frozen.
 4. NICE is inverted with un-scaling first (in the code last, which is no inverse), and re-seeds no generator. No unused passes.
 5. As the code: D outputs of the discriminator, averaged; penalty weight 0.5, N(0, 1) mixing (--penalty-mix); flow Adam with
    betas (0.9, 0.01) and eps 1e-4 in every fifth update; three layers per net (paper: four); WGAN-GP only; raw flow inputs.
 6. As the code: target actions leave the box (--clip-target-action); Q is not normalised, its minimum guides the actor; first
    the actor only clones, and critics start late. Flow and actor move in the last of 5 and 2 updates (there in the first).
 7. A value that is not finite ends the run (there the update is skipped); --seed counts; no transition crosses a timeout.
 8. Ours: RealNVP's start near the identity and bound on l (it overflows); 5 % held out; --flow-lr-end; one evaluated action.
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
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import TASKS, Evaluator, UserError, describe, evaluate, explained, load_dataset, record_video, strip_version

ALGORITHM = "cped"
PER_CALL = ("resume", "eval_only", "episodes", "video", "run_dir", "flow")  # arguments that a run does not keep
MAY_CHANGE = ("data", "device", "compile", "tf32", "eval_workers", "run_dir")  # arguments that may differ when a run is resumed
EVAL_SEED = 1_000_000  # plus the update: all runs are evaluated on the same episodes
EVAL_COLUMNS = ("eval/return", "eval/normalized_score", "eval/episode_length")

# ---------------------------------------------------------------------------------------------------------- arguments


@dataclasses.dataclass
class Args:
    # run
    env: str = "hopper-medium"  # task, Minari id (mujoco/hopper/medium-v0) or, with a file as data, any Gymnasium id
    data: str = "auto"  # auto, d4rl, minari, bundled, or the path of an HDF5 or NPZ file in D4RL's layout
    seed: int = 0  # seed of initialisation, batches and noise; evaluation has seeds of its own
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    total_steps: int = 1_000_000  # updates of the policy stage, after flow_steps updates of the flow stage
    batch_size: int = 256  # transitions per update, B
    eval_every: int = 1_000  # updates between evaluations, beginning before the first update of the policy stage
    eval_episodes: int = 5  # episodes per evaluation
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
    compile: bool = False  # compile the flow's loss with torch.compile; on CUDA each update also becomes one CUDA graph
    tf32: bool = False  # on CUDA, products of TensorFloat-32: faster, with 10 bits of mantissa for 23
    quick: bool = False  # a small protocol, ours and not the paper's, for a machine without a GPU
    flow: Path | None = None  # flow.pt of another run, or that run's folder: skips the flow stage
    # data
    reward_transform: Literal["minus_one", "none"] = "none"  # minus_one: r - 1, as published for AntMaze
    # optimisation
    discount: float = 0.99  # gamma
    actor_lr: float = 1e-4  # Adam step size of the actor
    critic_lr: float = 3e-4  # Adam step size of the critics
    flow_lr: float = 1e-4  # Adam step size of the flow
    flow_lr_end: float | None = None  # its value at the end of the flow stage, by a cosine from flow_lr; ours, for short stages
    disc_lr: float = 1e-4  # Adam step size of the discriminator
    tau: float = 0.005  # rate of the target networks
    policy_every: int = 2  # updates between steps of the actor and of all targets
    hidden_dim: int = 256  # width of the two hidden layers of actor and critics
    # algorithm
    flow_type: Literal["nice", "realnvp"] = "nice"  # additive or affine couplings
    flow_steps: int = 500_000  # F, updates of the flow stage; 20_000 in the paper, with joint training
    flow_training: Literal["frozen", "joint"] = "frozen"  # in the policy stage
    joint_steps: int = 480_000  # updates of the policy stage that train the flow too, with joint training
    num_couplings: int = 4  # coupling layers of the flow
    flow_hidden_dim: int = 750  # width of the two hidden layers of each coupling's network
    disc_updates: int = 5  # steps of the discriminator per step of the flow
    mle_weight: float = 1.0  # lambda, weight of the likelihood: the adversarial term is divided by it
    penalty_weight: float = 0.5  # weight of the gradient penalty
    penalty_mix: Literal["normal", "uniform"] = "normal"  # weights of real against generated rows: N(0, 1) or U(0, 1)
    target_noise: float = 0.2  # standard deviation of the noise on the target's action
    target_noise_clip: float = 0.5  # bound of that noise
    clip_target_action: bool = False  # clip the noisy action to [-1, 1], as TD3 does
    critic_start: int = 30_000  # update of the policy stage from which the critics learn
    actor_q_start: int = 50_000  # update of the policy stage from which the actor sees Q; before, it only clones
    constraint: Literal["dual", "schedule"] = "schedule"  # dual: the paper's; schedule: the released table
    epsilon_quantile: float | None = None  # epsilon is this quantile of the batch's own -log p(s, a) instead of its mean
    tolerance: float = 1.0  # mean violation at which the dual ascent rests, by that of the data's own actions; ours
    lagrange: float = 10.0  # initial multiplier alpha, with dual; ours
    lagrange_lr: float = 0.01  # step size of the dual ascent per nat, of which one counts at most; ours
    lagrange_min: float = 0.1  # lower bound of the multiplier; ours
    lagrange_max: float = 1_000.0  # upper bound of the multiplier; ours
    lagrange_table: tuple[float, ...] = (1_000, 10, 7.5, 5, 2.5, 1.5)  # multipliers, with schedule
    lagrange_from: tuple[int, ...] = (0, 100_001, 200_000, 300_000, 400_000, 500_001)  # first policy update of each


# From README commands: halfcheetah-medium (the defaults above), antmaze-umaze, large mazes; others by extension. Ours: episodes.
ANTMAZE = {"actor_lr": 3e-4, "reward_transform": "minus_one", "lagrange_table": (0.25, 0.1, 0.08), "eval_episodes": 100}
LARGE = ANTMAZE | {"eval_every": 50_000, "flow_steps": 400_000, "total_steps": 600_000, "lagrange_from": (0, 100_001, 400_001)}
ANTMAZE |= {"eval_every": 50_000, "flow_steps": 300_000, "total_steps": 700_000, "lagrange_from": (0, 200_001, 500_001)}
PRESETS = {task: LARGE if "large" in task else ANTMAZE if "antmaze" in task else {} for task in TASKS}
QUICK = {"flow_steps": 6_000, "flow_hidden_dim": 256, "flow_lr": 1e-3, "flow_lr_end": 3e-5, "disc_updates": 1, "log_every": 500}
QUICK |= {"total_steps": 16_000, "critic_start": 2_000, "actor_q_start": 4_000, "eval_every": 2_000, "checkpoint_every": 4_000}
QUICK |= {"eval_episodes": 5, "actor_lr": 1e-3, "critic_lr": 1e-3, "lagrange_table": (10,), "lagrange_from": (0,)}
FLOW_ARGS = ("flow_type", "flow_steps", "num_couplings", "flow_hidden_dim", "flow_lr", "flow_lr_end", "disc_lr", "disc_updates")
FLOW_ARGS += ("mle_weight", "penalty_weight", "penalty_mix", "batch_size", "dataset")  # in which a reused flow must agree

# ----------------------------------------------------------------------------------------------------------- networks
# Shapes: B batch, S observation dim, A action dim, D = S + A, H = 2 critics, N rows of the dataset, E environments.


def mlp(fan_in: int, width: int, fan_out: int, hidden: nn.Module, out: nn.Module) -> nn.Sequential:  # [B, in] -> [B, out]
    return nn.Sequential(nn.Linear(fan_in, width), hidden, nn.Linear(width, width), hidden, nn.Linear(width, fan_out), out)


class Discriminator(nn.Module):
    """Rows [B, D] -> scores [B, D], not one each: the losses average them. Its layer norm has a shift and no gain."""

    def __init__(self, dim: int):
        super().__init__()
        self.layer1, self.layer2, self.out = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.shift1, self.shift2 = nn.Parameter(torch.zeros(2 * dim)), nn.Parameter(torch.zeros(4 * dim))
        for layer, bound in ((self.layer1, (2 * dim) ** -0.5), (self.layer2, (4 * dim) ** -0.5), (self.out, 3e-3)):
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.constant_(layer.bias, 0.1)
        nn.init.uniform_(self.out.bias, -3e-3, 3e-3)

    def forward(self, x: Tensor) -> Tensor:
        for layer, shift in ((self.layer1, self.shift1), (self.layer2, self.shift2)):
            h = layer(x)
            h = h - h.mean(1, keepdim=True)
            std = h.norm(dim=1, keepdim=True) / (len(shift) - 1) ** 0.5
            x = nn.functional.leaky_relu(h / (std + 1e-6) + shift, 0.01)
        return self.out(x)


def q_values(critic: nn.ModuleList, obs: Tensor, act: Tensor) -> Tensor:  # [H, B]
    x = torch.cat([obs, act], 1)
    return torch.cat([net(x) for net in critic], 1).T


# --------------------------------------------------------------------------------------------------- generative model


class Flow(nn.Module):
    """Couplings v <- v exp(l(u)) + t(u) between the halves (u, v) of x [B, D], each half in turn, then z = exp(c) x.
    NICE has l = 0. RealNVP has c = 0 and, as released, nets that see their input twice, with l and t not negative."""

    def __init__(self, dim: int, args: Args):
        super().__init__()
        self.halves, self.affine, width = (dim // 2, dim - dim // 2), args.flow_type == "realnvp", args.flow_hidden_dim
        self.nets, self.log_scale = nn.ModuleList(), (nn.Buffer if self.affine else nn.Parameter)(torch.zeros(dim))  # c
        for i in range(args.num_couplings):
            kept, changed = ((1 + self.affine) * self.halves[j] for j in (i % 2, 1 - i % 2))
            activation = nn.ReLU(True) if self.affine else nn.LeakyReLU(0.01, True)  # in place, behind the output too
            self.nets.append(mlp(kept, width, changed, activation, activation))
            for layer in self.nets[i][::2]:
                nn.init.zeros_(layer.bias)
                nn.init.xavier_uniform_(layer.weight, 0.1) if self.affine else nn.init.uniform_(layer.weight, -0.01, 0.01)
                if self.affine:
                    nn.utils.parametrizations.weight_norm(layer)  # in place, one gain per output

    def coupling(self, i: int, u: Tensor) -> tuple[Tensor, Tensor]:  # l, t
        out = self.nets[i](u.repeat(1, 2) if self.affine else u).chunk(1 + self.affine, 1)
        return out[0].clamp(max=40 / len(self.nets)) if self.affine else u.new_zeros(1, 1), out[-1]

    def forward(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # z and log|det dz/dx| [B], in NICE [1] for all rows
        parts, log_det = [u, v], self.log_scale.sum()
        for i in range(len(self.nets)):
            log_scale, shift = self.coupling(i, parts[i % 2])
            parts[1 - i % 2] = parts[1 - i % 2] * log_scale.exp() + shift
            log_det = log_det + log_scale.sum(1)
        return torch.cat(parts, 1) * self.log_scale.exp(), log_det

    def inverse(self, z: Tensor) -> Tensor:  # x
        parts = list((z * (-self.log_scale).exp()).split(self.halves, 1))
        for i in reversed(range(len(self.nets))):
            log_scale, shift = self.coupling(i, parts[i % 2])
            parts[1 - i % 2] = (parts[1 - i % 2] - shift) * (-log_scale).exp()
        return torch.cat(parts, 1)

    def log_density(self, obs: Tensor, act: Tensor) -> Tensor:
        """log p(s, a) [B] in nats: log|det dz/dx| and the logistic prior, log f(z) = z - 2 softplus(z), the same at -|z|."""
        u, v = torch.cat([obs, act], 1).split(self.halves, 1)
        u = obs[:, : u.shape[1]] if u.shape[1] <= obs.shape[1] else u  # no action in it: spares a gradient of coupling 0
        z, log_det = self(u, v)
        return -(z.abs() + 2 * nn.functional.softplus(-z.abs())).sum(1) + log_det


def shuffled_rows(count: int) -> tuple[np.ndarray, int]:
    """An order of all rows, the same in all runs, and how many of its first ones flows learn from: 5 % are held out."""
    return np.random.default_rng(0).permutation(count), count * 19 // 20


# ------------------------------------------------------------------------------------------------------------- losses


class Batch(NamedTuple):
    obs: Tensor  # [B, S]
    act: Tensor  # [B, A]
    rew: Tensor  # [B], transformed
    next_obs: Tensor  # [B, S]
    not_done: Tensor  # [B], 0 at a terminal, else 1; a timeout is no terminal
    nll: Tensor  # [B], -log p(s, a) by the frozen flow; zeros as long as no loss needs it


class Draws(NamedTuple):
    latent: Tensor  # [B, D], standard logistic, for generated rows
    mix: Tensor  # [B], weight of the real row in the gradient penalty
    next_noise: Tensor  # [B, A], standard normal, for the target's action


def disc_loss(disc: nn.Module, batch: Batch, fake: Tensor, mix: Tensor, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """WGAN-GP: mean D(g) - mean D(x) + weight * mean_b (|grad sum_j D_j|_2 - 1)^2 at mix * x + (1 - mix) * g."""
    real = torch.cat([batch.obs, batch.act], 1)
    mixed = torch.lerp(fake, real, mix[:, None]).requires_grad_()
    (slope,) = torch.autograd.grad(disc(mixed).sum(), mixed, create_graph=True)  # [B, D]
    penalty = (slope.norm(dim=1) - 1).square().mean()
    fake_scores, real_scores = disc(torch.cat([fake, real])).chunk(2)  # one pass for both: [B, D] each
    loss = fake_scores.mean() - real_scores.mean() + args.penalty_weight * penalty
    return loss, {"disc_loss": loss, "penalty": penalty}


def flow_loss(flow: Flow, disc: nn.Module, batch: Batch, fake: Tensor, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow-GAN: - mean D(g) / lambda - mean log p(s, a); fake [B, D] carries its graph."""
    gan_loss, nll = -disc(fake).mean(), -flow.log_density(batch.obs, batch.act).mean()
    return gan_loss / args.mle_weight + nll, {"gan_loss": gan_loss, "flow_nll": nll}


def critic_loss(critic: nn.Module, targets: tuple, batch: Batch, draws: Draws, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over h of mean (Q_h(s, a) - y)^2, y = r + discount not_done min_h Q_h(s', pi(s') + clipped noise) by the targets."""
    actor_target, critic_target = targets
    with torch.no_grad():
        noise = (args.target_noise * draws.next_noise).clamp(-args.target_noise_clip, args.target_noise_clip)
        next_act = actor_target(batch.next_obs) + noise
        next_act = next_act.clamp(-1, 1) if args.clip_target_action else next_act
        y = batch.rew + args.discount * batch.not_done * q_values(critic_target, batch.next_obs, next_act).amin(0)
    q = q_values(critic, batch.obs, batch.act)  # [H, B]
    loss = (q - y).square().mean(1).sum()
    return loss, {"critic_loss": loss, "q_mean": q.mean(), "td_target": y.mean()}


def actor_loss(networks: tuple, batch: Batch, lagrange: Tensor, epsilon: Tensor, use_q: bool, hinge: bool) -> tuple[Tensor, dict]:
    """alpha * violation - mean min_h Q_h(s, pi(s)); violation: the mean of -log p(s, pi(s)) - epsilon, or of its hinge."""
    actor, critic, flow = networks
    act = actor(batch.obs)
    excess = -flow.log_density(batch.obs, act) - epsilon  # [B], nats outside of the region
    violation = excess.relu().mean() if hinge else excess.mean()
    q = q_values(critic, batch.obs, act).amin(0).mean() if use_q else torch.zeros_like(violation)
    loss = lagrange * violation - q
    return loss, {"actor_loss": loss, "violation": violation, "excess": excess.mean(), "actor_q": q, "lagrange": lagrange}


# ------------------------------------------------------------------------------------------------------------- update


class CPED:
    """All that is learned: flow-GAN, policy, targets, optimisers and multiplier, and how one batch changes them."""

    metrics = ("disc_loss", "penalty", "gan_loss", "flow_nll", "critic_loss", "q_mean", "td_target")
    metrics += ("actor_loss", "violation", "excess", "actor_q", "lagrange")
    parts = ("flow", "disc", "flow_adam", "disc_adam")  # in flow.pt
    parts += ("actor", "actor_target", "critic", "critic_target", "actor_adam", "critic_adam")

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device: torch.device | str = "cpu"):
        self.args, self.device, self.act_dim, self.dim, self.step = args, torch.device(device), act_dim, obs_dim + act_dim, 0
        self.flow_until = args.flow_steps + (args.joint_steps if args.flow_training == "joint" else 0)
        self.flow, self.disc = Flow(self.dim, args).to(device).requires_grad_(False), Discriminator(self.dim).to(device)
        self.actor = mlp(obs_dim, args.hidden_dim, act_dim, nn.ReLU(), nn.Tanh()).to(device)
        self.critic = nn.ModuleList(mlp(self.dim, args.hidden_dim, 1, nn.ReLU(), nn.Identity()) for _ in range(2)).to(device)
        self.actor_target, self.critic_target = (deepcopy(net).requires_grad_(False) for net in (self.actor, self.critic))
        adam = partial(torch.optim.Adam, fused=True, capturable=self.device.type == "cuda")
        self.flow_adam = adam(self.flow.parameters(), lr=args.flow_lr, betas=(0.9, 0.01), eps=1e-4)
        self.disc_adam = adam(self.disc.parameters(), lr=args.disc_lr)
        self.actor_adam = adam(self.actor.parameters(), lr=args.actor_lr)
        self.critic_adam = adam(self.critic.parameters(), lr=args.critic_lr)
        self.lagrange = torch.tensor(args.lagrange, device=device)
        # The other losses gain nothing on a CPU: wide ReLU layers are products and little else, and compiled they store masks.
        self.flow_loss = torch.compile(flow_loss, dynamic=False) if args.compile else flow_loss
        if args.compile and self.device.type == "cuda":
            self.one_update = GraphedUpdate(self.one_update)

    def draw(self, batch_size: int) -> Draws:
        latent = torch.rand(batch_size, self.dim, device=self.device).logit(eps=6e-8)  # rand can be 0
        mix = (torch.randn if self.args.penalty_mix == "normal" else torch.rand)(batch_size, device=self.device)
        return Draws(latent, mix, torch.randn(batch_size, self.act_dim, device=self.device))

    def update(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Update n of both stages; returns its share of `metrics`, 0-d tensors."""
        args, step, learn = self.args, self.step - self.args.flow_steps, set()  # step: update of the policy stage
        if self.step < self.flow_until:
            learn |= {"disc", "flow"} if (self.step + 1) % args.disc_updates == 0 else {"disc"}
            if args.flow_lr_end is not None:
                cosine_lr(self.flow_adam, args.flow_lr, min(self.step / args.flow_steps, 1), args.flow_lr_end)
        if step >= args.critic_start:
            learn.add("critic")
        if step >= 0 and (step + 1) % args.policy_every == 0:
            learn |= {"actor", "actor by Q"} if step >= args.actor_q_start else {"actor"}
            if args.constraint == "schedule":
                self.lagrange.fill_(args.lagrange_table[sum(first <= step for first in args.lagrange_from) - 1])
        metrics = self.one_update(batch, draws, frozenset(learn))
        self.step += 1
        return metrics

    def one_update(self, batch: Batch, draws: Draws, learn: frozenset[str]) -> dict[str, Tensor]:
        """Those that learn, in this order: disc, flow, critic, then actor, by Q or first by cloning, multiplier and targets."""
        args, flow, disc, critic, actor = self.args, {}, {}, {}, {}
        if "disc" in learn:
            self.flow.requires_grad_("flow" in learn)
            fake = self.flow.inverse(draws.latent)  # with a graph only where the flow learns from it
            loss, disc = disc_loss(self.disc, batch, fake.detach(), draws.mix, args)  # eager: differentiated twice
            gradient_step(self.disc_adam, loss, math.inf)  # inf: not clipped
        if "flow" in learn:
            loss, flow = self.flow_loss(self.flow, self.disc, batch, fake, args)
            gradient_step(self.flow_adam, loss, math.inf)
            self.flow.requires_grad_(False)
        if "critic" in learn:
            loss, critic = critic_loss(self.critic, (self.actor_target, self.critic_target), batch, draws, args)
            gradient_step(self.critic_adam, loss, math.inf)
        if "actor" in learn:
            use_q, epsilon = "actor by Q" in learn, torch.zeros((), device=self.device)
            hinge = use_q and args.constraint == "dual"  # without it epsilon changes nothing
            if hinge:
                nll = batch.nll if args.flow_training == "frozen" else -self.flow.log_density(batch.obs, batch.act)
                epsilon = nll.mean() if args.epsilon_quantile is None else nll.quantile(args.epsilon_quantile)
            self.critic.requires_grad_(False)
            loss, actor = actor_loss((self.actor, self.critic, self.flow), batch, self.lagrange, epsilon, use_q, hinge)
            gradient_step(self.actor_adam, loss, math.inf)
            self.critic.requires_grad_(True)
            if hinge:  # alpha rises while the policy leaves the region by more than the data do, else it falls
                ascent = actor["violation"].detach() - args.tolerance * (nll - epsilon).relu().mean()
                self.lagrange.add_(args.lagrange_lr * ascent.clamp(-1, 1)).clamp_(args.lagrange_min, args.lagrange_max)
            soft_update(self.actor_target, self.actor, args.tau)
            soft_update(self.critic_target, self.critic, args.tau)
        return disc | flow | critic | actor

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The evaluated policy, [E, S] -> [E, A]."""
        return self.actor(torch.as_tensor(obs, device=self.device)).cpu().numpy()

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in self.parts} | {"lagrange": self.lagrange, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])
        self.lagrange, self.step = state["lagrange"].to(self.device), state["step"]


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
    alphas, since = args.lagrange_table, args.lagrange_from
    if len(alphas) != len(since) or list(since) != sorted({0, *since}) or min(alphas) <= 0 or (args.epsilon_quantile or 0) > 1:
        raise UserError("wanted: a multiplier above 0 for each --lagrange-from, which rise from 0, and a quantile up to 1", 2)
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
        agent, info = CPED(state["obs_dim"], state["act_dim"], args, device), state["info"]
        restore(agent, state)
        print(describe(info))
        if args.video:
            print(f"{args.video}: one episode, return {record_video(agent.act, info, args.video, EVAL_SEED):.2f}")
        return show(agent.step, evaluate(agent.act, info, args.episodes or args.eval_episodes, EVAL_SEED + agent.step))

    # data
    arrays, info = load_dataset(args.env, args.data, need_env=args.eval)
    print(describe(info))
    print("arguments   " + " ".join(f"{name}={value}" for name, value in dataclasses.asdict(args).items()))
    if state and state["info"]["sha256"] != info["sha256"]:
        raise UserError(f"{state['path']} was trained on {state['info']['id']}, not on {info['file']}", status=2)
    print("quick       a small protocol of our own, not comparable with published scores\n" if args.quick else "", end="")
    arrays |= {"rew": arrays["rew"] - (args.reward_transform == "minus_one"), "nll": np.zeros_like(arrays["rew"])}
    order, split = shuffled_rows(len(arrays["rew"]))
    data = Batch(*(torch.as_tensor(arrays[name][order], device=device) for name in Batch._fields))

    # agent and run folder
    torch.manual_seed(args.seed)  # initialisation and all noise come from torch, on every device
    dims = {"obs_dim": data.obs.shape[1], "act_dim": data.act.shape[1]}
    agent = CPED(**dims, args=args, device=device)
    if args.flow:
        old = load_checkpoint(args.flow / "flow.pt" if args.flow.is_dir() else args.flow)
        with explained(Exception, f"{old['path']} holds no flow", status=2):
            was = old["args"] | {"dataset": old["info"]["sha256"], "flow_steps": old["agent"]["step"]}
            now = dataclasses.asdict(args) | {"dataset": info["sha256"]}
            if differ := [f"{name} {was[name]}, not {now[name]}" for name in FLOW_ARGS if was[name] != now[name]]:
                raise UserError(f"--flow: {old['path']} was trained with {', '.join(differ)}", status=2)
            parts = agent.state_dict() | {name: old["agent"][name] for name in (*CPED.parts[:4], "step")}
            restore(agent, {"path": old["path"], "agent": parts, "rng": torch.get_rng_state()})
    if state:
        folder, rows, row, seconds = state["path"].parent, state["rows"], state["row"], state["seconds"]
        restore(agent, state)
    else:
        rows, row, seconds = [], {"step": agent.step}, 0.0
        folder = args.run_dir / args.env / ALGORITHM / time.strftime(f"seed{args.seed}-%Y%m%d-%H%M%S")
        folder.mkdir(parents=True)
    print(f"run folder  {folder}")
    lock = FileLock(folder / "lock", timeout=0, is_singleton=True)  # held until this process or function ends
    with explained(Timeout, f"{folder} is in use: another process trains this run", 2), suppress(NotImplementedError):
        lock.acquire()  # NotImplementedError: a file system without locks
    stored = {name: value for name, value in dataclasses.asdict(args).items() if name not in PER_CALL}
    (folder / "args.json").write_text(json.dumps({"args": stored, "dataset": info}, indent=1))
    columns = [*(f"train/{name}" for name in CPED.metrics), "log_density/train", "log_density/held_out", *EVAL_COLUMNS]
    table = csv.DictWriter((folder / "metrics.csv").open("w", buffering=1), ["step", *columns, "time/updates_per_s"])
    table.writeheader()
    table.writerows(rows)  # those of a resumed run end at its checkpoint
    board = SummaryWriter(str(folder), purge_step=agent.step)
    stop: list[int] = []  # of signals: the run ends after a whole update; a second signal kills it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))

    # training
    copied = partial(CPED, **dims, args=dataclasses.replace(args, compile=False), device=device)
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

    start, end, measured, bar = args.flow_steps, args.flow_steps + args.total_steps, False, None
    started = window = time.perf_counter()
    metrics = None if state else {}  # None: the checkpoint of a resumed run has what came before it at its step
    while True:
        step, last = agent.step, agent.step == end or bool(stop)
        if bar is None or step == start:  # each stage has its own
            bar = bar and bar.close()
            name, length, begun = ("flow", start, step) if step < start else ("policy", args.total_steps, step - start)
            bar = tqdm(desc=name, total=length, initial=begun, unit=" updates", mininterval=0.5)
        if metrics and (step % args.log_every == 0 or step % args.checkpoint_every == 0 or step == start or last):
            values = torch.stack(list(metrics.values())).tolist()  # the only wait for the device
            found, log = {f"train/{name}": value for name, value in zip(metrics, values)}, step % args.log_every == 0
            if log and step <= agent.flow_until:
                for name, i in (("train", slice(min(split, 4096))), ("held_out", slice(split, split + 4096))):
                    found[f"log_density/{name}"] = float(agent.flow.log_density(data.obs[i], data.act[i]).mean())
            if broken := [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]:
                write_rows(wait=True)
                raise UserError(f"{', '.join(broken)} at update {step}; the last good checkpoint is in {folder}")
            if log:
                row |= found | {"time/updates_per_s": args.log_every / (time.perf_counter() - window)}
        if metrics is not None and (step % args.checkpoint_every == 0 or step == start or last):
            write_rows(wait=True)
            content = {"algorithm": ALGORITHM, "args": stored, "info": info, "rows": rows, "row": row}
            content |= dims | {"rng": torch.get_rng_state(), "seconds": seconds + time.perf_counter() - started}
            content |= {"cuda_rng": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
            for name in ("flow.pt", "checkpoint.pt")[step != start :]:
                save_checkpoint(folder / name, content | {"agent": agent.state_dict()})
        if last and step < end:
            break  # an evaluation that is due is left to the run that goes on
        due = args.eval and step >= start and ((step - start) % args.eval_every == 0 or step == end)
        if due or len(row) > 1:
            waiting.append((row, evaluator(agent, args.eval_episodes, EVAL_SEED + step) if due else None))
            window = time.perf_counter()
        write_rows(wait=last)
        if last:
            break
        if step >= start and not measured and args.constraint == "dual" and args.flow_training == "frozen":
            nll = torch.cat([-agent.flow.log_density(*rows) for rows in zip(data.obs.split(512), data.act.split(512))])
            data, measured, window = data._replace(nll=nll), True, time.perf_counter()
        index = torch.randint(split if step < agent.flow_until else len(order), (args.batch_size,), device=device)
        metrics, row = agent.update(Batch(*(column[index] for column in data)), agent.draw(args.batch_size)), {"step": step + 1}
        bar.update()
    for part in (evaluator, bar, board):
        part.close()
    if step < end:
        raise UserError(f"stopped at update {step:,}; go on with: python {ALGORITHM}.py --resume {folder}")

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
