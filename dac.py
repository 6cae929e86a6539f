"""DAC: Diffusion Actor-Critic (Fang, Liu, Zhang, Wang, Jing; ICLR 2025; arXiv:2405.20555).

KL-constrained policy iteration is solved by pi_beta(a|s) exp(Q(s,a) / eta). Noised, that is a diffusion model whose noise
predictor is the data's minus sqrt(1 - alpha_bar_t) grad_a Q / eta: so the actor is trained by regression on noise plus a
guidance term, and never by back-propagation through the sampling chain.

    python dac.py --env hopper-medium                # the published settings, on CUDA where there is one
    python dac.py --env hopper-medium-replay --quick # small protocol for a laptop: five minutes on two cores
    python dac.py --env hopper-medium --resume       # go on with the newest run of this task and seed, exactly
    python dac.py --eval-only runs/hopper-medium/dac/seed0-20260101-120000/checkpoint.pt --episodes 100

Where paper and authors' code differ, this is the code's way, which made the published numbers:
 1. The optimum of eta |eps_net - eps|^2 + sqrt(1 - alpha_bar_t) <eps_net, grad Q> is at grad Q / (2 eta), where Theorem 2
    has grad Q / eta: eta absorbs the factor 2.
 2. Losses are means over batch and action dimensions, not sums over dimensions; b has its meaning only with that.
 3. Guidance is the gradient of the mean of the target critics, divided by the batch mean of |Q|.
 4. N next actions per transition, reduced per critic (mean; max on AntMaze), where Algorithm 1 draws one.
 5. eta moves by at most eta_lr, within [eta_min, eta_max], by the loss before the actor's step.
 6. Critic targets move before the actor's step, the actor's target each fifth update from number 1005 on.
 7. Reverse steps have variance beta_t and clip the predicted action to [-1, 1].
 8. Evaluation takes the best of 10 samples of the online actor by the mean of the target critics.
 9. Rewards are multiplied by 1000 / (range of trajectory returns), on AntMaze too, without the usual shift by -1.
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
from collections.abc import Callable, Iterator
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

ALGORITHM = "dac"
PER_CALL = ("resume", "eval_only", "episodes", "video", "run_dir")  # arguments that a run does not keep
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
    total_steps: int = 2_000_000  # updates, also the length K of the cosine schedules
    batch_size: int = 256  # transitions per update, B
    eval_every: int = 10_000  # updates between evaluations, beginning before the first update
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
    # data
    reward_transform: Literal["return_range", "minus_one", "none"] = "return_range"  # 1000 r / range of trajectory returns; r - 1
    # optimisation
    discount: float = 0.99  # gamma
    actor_lr: float = 3e-4  # Adam step size of the actor, cosine to 0
    critic_lr: float = 3e-4  # Adam step size of the critics, cosine to 0
    max_grad_norm: float = 1.0  # largest global gradient norm, of the actor and of all critics together
    tau: float = 0.005  # rate of the target networks
    actor_target_every: int = 5  # updates between steps of the actor's target
    actor_target_start: int = 1_000  # the actor's target moves only after this update
    hidden_dim: int = 256  # width of the three hidden layers of all networks
    # algorithm
    diffusion_steps: int = 5  # T
    beta_min: float = 0.1  # b_min of the variance-preserving schedule
    beta_max: float = 10.0  # b_max of the variance-preserving schedule
    num_critics: int = 10  # H
    num_next_actions: int = 10  # next actions per transition in the critic target, N
    next_action_reduce: Literal["mean", "max"] = "mean"  # how a critic's N values become one
    q_target: Literal["lcb", "min"] = "lcb"  # how the H values become one: mean - rho std, or min as in the ablation
    rho: float = 1.0  # width of the lower confidence bound in standard deviations over the critics
    eta: float = 1.0  # initial weight of the behaviour term
    eta_lr: float = 1e-3  # step size of the dual ascent on eta; 0 keeps it fixed
    eta_min: float = 1e-3  # lower bound of eta
    eta_max: float = 100.0  # upper bound of eta
    bc_threshold: float = 1.0  # b, behaviour loss per action dimension that the dual ascent aims at
    num_eval_actions: int = 10  # candidates of which the evaluation policy takes the best


# The authors' last list of commands (runs.sh), AntMaze on -v0 data; its evaluation, 100 episodes for their ten, is ours.
ANTMAZE = {"eta": 0.1, "eta_lr": 0.0, "next_action_reduce": "max", "eval_every": 100_000, "eval_episodes": 100}
RHO = {"halfcheetah": 0.0, "hopper": 1.5, "walker2d": 1.0, "antmaze": 1.0}
OWN = {"halfcheetah-medium-expert": {"bc_threshold": 0.1}, "hopper-medium-expert": {"bc_threshold": 0.05}}
OWN |= {"antmaze-large-play": {"rho": 1.1, "critic_lr": 1e-3}, "antmaze-large-diverse": {"critic_lr": 1e-3}}
PRESETS = {task: {"rho": RHO[task.split("-")[0]]} | (ANTMAZE if "antmaze" in task else {}) | OWN.get(task, {}) for task in TASKS}
# Ours: with the published settings eta falls to its floor within few updates, when the critics do not know much yet.
QUICK = {"total_steps": 10_000, "eval_every": 1_000, "eval_episodes": 10, "log_every": 500, "checkpoint_every": 2_500}
QUICK |= {"num_critics": 2, "num_next_actions": 1, "eta": 0.05, "eta_lr": 0.0, "actor_lr": 1e-3, "critic_lr": 1e-3}

# ----------------------------------------------------------------------------------------------------------- networks
# Shapes: B batch, S observation dim, A action dim, H critics, N sampled actions, T diffusion steps, E environments.


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x)) = x - 2x / ((e^x + 1)^2 + 1): one exponential, a quarter of the time of F.mish on a CPU."""
    return nn.functional.mish(x) if x.is_cuda else torch.addcdiv(x, x, (x.clamp(max=30).exp() + 1).square().add_(1), value=-2)


class NoisePredictor(nn.Module):
    """eps_net: (obs [B, S], noisy action x [B, A], t in 1..T, one for all or [B]) -> predicted noise [B, A]."""

    def __init__(self, obs_dim: int, act_dim: int, diffusion_steps: int, hidden_dim: int):
        super().__init__()
        angle = torch.arange(diffusion_steps + 1)[:, None] * torch.exp(-torch.arange(8) * math.log(10_000) / 7)
        self.register_buffer("time_features", torch.cat([angle.cos(), angle.sin()], 1), persistent=False)  # [T + 1, 16]
        self.time1, self.time2 = nn.Linear(16, 32), nn.Linear(32, 32)
        self.layer1 = nn.Linear(obs_dim + act_dim + 32, hidden_dim)
        self.layer2, self.layer3 = nn.Linear(hidden_dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, act_dim)
        for layer in (self.time1, self.time2, self.layer1, self.layer2, self.layer3, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor, x: Tensor, t: Tensor | int) -> Tensor:
        code = self.time2(mish(self.time1(self.time_features[t]))).expand(len(obs), 32)
        h = mish(self.layer1(torch.cat([obs, x, code], 1)))
        return self.out(mish(self.layer3(mish(self.layer2(h)))))


class Critics(nn.Module):
    """H independent Q-networks, one batched product per layer: (obs [B, S], act [B, A]) -> [H, B]."""

    def __init__(self, obs_dim: int, act_dim: int, num_critics: int, hidden_dim: int):
        super().__init__()
        dims = ((obs_dim + act_dim, hidden_dim), (hidden_dim, hidden_dim), (hidden_dim, hidden_dim), (hidden_dim, 1))
        self.weights = nn.ParameterList(torch.empty(num_critics, *dim) for dim in dims)
        self.biases = nn.ParameterList(torch.zeros(num_critics, 1, dim[1]) for dim in dims)
        for head in (head for weight in self.weights for head in weight):
            nn.init.xavier_uniform_(head)  # one by one: for a stack of matrices the fan-in would be wrong

    def forward(self, obs: Tensor, act: Tensor) -> Tensor:
        h = torch.cat([obs, act], 1).expand(len(self.weights[0]), -1, -1)  # [H, B, S + A]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            h = mish(torch.baddbmm(bias, h, weight))  # [H, B, hidden]
        return torch.baddbmm(self.biases[-1], h, self.weights[-1]).squeeze(2)


# --------------------------------------------------------------------------------------------------- generative model


class Schedule(NamedTuple):  # constants of the diffusion, each [T + 1]: index t = 1..T, and 0 for the clean action
    signal: Tensor  # sqrt(alpha_bar_t)
    noise: Tensor  # sqrt(1 - alpha_bar_t)
    mean_x0: Tensor  # weight of the predicted action in the posterior mean
    mean_xt: Tensor  # weight of x_t in the posterior mean
    std: Tensor  # sqrt(beta_t), noise of a reverse step


def vp_schedule(diffusion_steps: int, beta_min: float, beta_max: float) -> Schedule:
    """Variance-preserving: alpha_bar_t = exp(-beta_min t/T - (beta_max - beta_min) (t/T)^2 / 2)."""
    t = torch.arange(diffusion_steps + 1, dtype=torch.float64) / diffusion_steps
    alpha_bar = torch.exp(-beta_min * t - 0.5 * (beta_max - beta_min) * t**2)
    before = torch.cat([alpha_bar[:1], alpha_bar[:-1]])  # alpha_bar_{t-1}
    alpha = alpha_bar / before
    variance = (1 - alpha_bar).clamp(min=1e-12)  # t = 0 divides by zero and is never used
    mean_x0, mean_xt = before.sqrt() * (1 - alpha) / variance, alpha.sqrt() * (1 - before) / variance
    return Schedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), mean_x0, mean_xt, (1 - alpha).sqrt())


def sample_actions(eps_net: nn.Module, obs: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """Reverse chain, obs [B, S] -> action [B, A] in [-1, 1]; noise [T, B, A] is x_T and one draw per step t = T..2."""
    x = noise[0]
    for t in range(len(noise), 0, -1):
        eps = eps_net(obs, x, t)
        x0 = ((x - schedule.noise[t] * eps) / schedule.signal[t]).clamp(-1, 1)
        if t > 1:
            x = schedule.mean_x0[t] * x0 + schedule.mean_xt[t] * x + schedule.std[t] * noise[len(noise) - t + 1]
    return x0  # at t = 1 the posterior mean is the predicted action itself, and no noise is added


# ------------------------------------------------------------------------------------------------------------- losses


class Batch(NamedTuple):
    obs: Tensor  # [B, S]
    act: Tensor  # [B, A]
    rew: Tensor  # [B], transformed
    next_obs: Tensor  # [B, S]
    not_done: Tensor  # [B], 0 at a terminal, else 1; a timeout is no terminal


class Draws(NamedTuple):  # the random numbers of one update
    next_noise: Tensor  # [T, B N, A], for the next actions
    t: Tensor  # [B], uniform in 1..T
    eps: Tensor  # [B, A], the noise to be predicted


@torch.no_grad()
def td_target(eps_net: nn.Module, critic: nn.Module, batch: Batch, draws: Draws, schedule: Schedule, args: Args) -> Tensor:
    """y = r + discount not_done V(s'), V = mean_h - rho std_h of each critic's mean (or max) over N next actions; [B]."""
    next_obs = batch.next_obs.repeat_interleave(args.num_next_actions, 0)  # [B N, S], row b N + n
    next_act = sample_actions(eps_net, next_obs, draws.next_noise, schedule)
    piece = len(next_obs) if next_obs.is_cuda else 512  # activations that stay in the cache: a quarter less time on a CPU
    q = torch.cat([critic(o, a) for o, a in zip(next_obs.split(piece), next_act.split(piece))], 1)
    q = q.unflatten(1, (-1, args.num_next_actions))  # [H, B, N]
    q = q.mean(2) if args.next_action_reduce == "mean" else q.amax(2)
    v = q.mean(0) - args.rho * q.std(0, unbiased=False) if args.q_target == "lcb" else q.amin(0)
    return batch.rew + args.discount * batch.not_done * v


def critic_loss(critic: nn.Module, batch: Batch, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over critics and batch of (Q_h(s, a) - y)^2."""
    q = critic(batch.obs, batch.act)  # [H, B]
    loss = (q - target).square().mean()
    metrics = {"critic_loss": loss.detach(), "q_mean": q.detach().mean(), "td_target": target.mean()}
    return loss, metrics | {"q_std": q.detach().std(0, unbiased=False).mean()}


def q_gradient(critic: nn.Module, batch: Batch, x: Tensor) -> Tensor:
    """Gradient of the critics' mean at x [B, A], each row its own, divided by the batch mean of |Q(s, a)|; a constant."""
    with torch.no_grad():
        scale = critic(batch.obs, batch.act).abs().mean() + 1e-6
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(batch.obs, x).mean(0).sum(), x)
    return gradient / scale


def actor_loss(eps_net: nn.Module, batch: Batch, x: Tensor, gradient: Tensor, draws: Draws, eta: Tensor, schedule: Schedule):
    """eta |eps_net(x_t, s, t) - eps|^2 + sqrt(1 - alpha_bar_t) <eps_net(x_t, s, t), g>, means over B and A (Theorem 2)."""
    eps = eps_net(batch.obs, x, draws.t)
    bc_loss = (eps - draws.eps).square().mean()
    guidance_loss = (schedule.noise[draws.t][:, None] * gradient * eps).mean()
    loss = eta * bc_loss + guidance_loss
    metrics = {"actor_loss": loss.detach(), "bc_loss": bc_loss.detach(), "guidance_loss": guidance_loss.detach()}
    return loss, metrics | {"q_gradient": gradient.abs().mean()}


# ------------------------------------------------------------------------------------------------------------- update


class DAC:
    """All that is learned: networks, targets, optimisers and eta, and how one batch changes them."""

    metrics = ("critic_loss", "q_mean", "q_std", "td_target", "actor_loss", "bc_loss", "guidance_loss", "q_gradient", "eta")
    parts = ("actor", "actor_target", "critic", "critic_target", "actor_adam", "critic_adam")

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device: torch.device | str = "cpu"):
        self.args, self.device, self.act_dim, self.step = args, torch.device(device), act_dim, 0
        self.actor = NoisePredictor(obs_dim, act_dim, args.diffusion_steps, args.hidden_dim).to(device)
        self.critic = Critics(obs_dim, act_dim, args.num_critics, args.hidden_dim).to(device)
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        on_gpu = self.device.type == "cuda"
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), fused=True, capturable=on_gpu)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), fused=True, capturable=on_gpu)
        self.eta = torch.tensor(args.eta, device=device)
        constants = vp_schedule(args.diffusion_steps, args.beta_min, args.beta_max)
        self.schedule = Schedule(*(c.to(device, torch.get_default_dtype()) for c in constants))
        compiled = (lambda f: torch.compile(f, dynamic=False)) if args.compile else (lambda f: f)
        self.td_target, self.critic_loss = compiled(td_target), compiled(critic_loss)
        self.q_gradient, self.actor_loss = compiled(q_gradient), compiled(actor_loss)
        if args.compile and on_gpu:
            self.one_update = GraphedUpdate(self.one_update)

    def draw(self, batch_size: int) -> Draws:
        args, device = self.args, self.device
        next_noise = torch.randn(args.diffusion_steps, batch_size * args.num_next_actions, self.act_dim, device=device)
        t = torch.randint(1, args.diffusion_steps + 1, (batch_size,), device=device)
        return Draws(next_noise, t, torch.randn(batch_size, self.act_dim, device=device))

    def update(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """One iteration of Algorithm 1; returns `metrics`, 0-d tensors."""
        args = self.args
        for adam, lr in ((self.actor_adam, args.actor_lr), (self.critic_adam, args.critic_lr)):
            cosine_lr(adam, lr, self.step / args.total_steps)
        target_due = self.step % args.actor_target_every == 0 and self.step > args.actor_target_start
        metrics = self.one_update(batch, draws, target_due)
        self.step += 1
        return metrics

    def one_update(self, batch: Batch, draws: Draws, target_due: bool) -> dict[str, Tensor]:
        """Critics, their targets, actor, eta and, where it is due, the actor's target."""
        args = self.args
        target = self.td_target(self.actor_target, self.critic_target, batch, draws, self.schedule, args)
        loss, metrics = self.critic_loss(self.critic, batch, target)
        gradient_step(self.critic_adam, loss, args.max_grad_norm)
        soft_update(self.critic_target, self.critic, args.tau)

        x = self.schedule.signal[draws.t][:, None] * batch.act + self.schedule.noise[draws.t][:, None] * draws.eps  # x_t
        gradient = self.q_gradient(self.critic_target, batch, x)
        loss, actor_metrics = self.actor_loss(self.actor, batch, x, gradient, draws, self.eta, self.schedule)
        gradient_step(self.actor_adam, loss, args.max_grad_norm)

        violation = (actor_metrics["bc_loss"] - args.bc_threshold).clamp(-1, 1)
        if args.eta_lr > 0:
            self.eta.add_(args.eta_lr * violation).clamp_(args.eta_min, args.eta_max)
        if target_due:
            soft_update(self.actor_target, self.actor, args.tau)
        return metrics | actor_metrics | {"eta": self.eta}

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The evaluated policy, [E, S] -> [E, A]: best of num_eval_actions samples by the mean of the target critics."""
        rows = torch.as_tensor(obs, device=self.device).repeat_interleave(self.args.num_eval_actions, 0)
        noise = torch.randn(self.args.diffusion_steps, len(rows), self.act_dim, device=self.device)
        candidates = sample_actions(self.actor, rows, noise, self.schedule)
        q = self.critic_target(rows, candidates).mean(0).view(len(obs), -1)
        return candidates.view(*q.shape, -1)[torch.arange(len(obs), device=self.device), q.argmax(1)].cpu().numpy()

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in self.parts} | {"eta": self.eta, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])
        self.eta, self.step = state["eta"].to(self.device), state["step"]


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


def shuffled_batches(num_rows: int, batch_size: int, seed: int, step: int, device: torch.device) -> Iterator[Tensor]:
    """Row indices of updates step, step + 1, ...: shuffled epochs, the last batch of each as short as it comes.

    A function of (seed, step) alone, so that a resumed run needs no state to see the same batches.
    """
    per_epoch = math.ceil(num_rows / batch_size)
    while True:
        epoch, first = divmod(step, per_epoch)
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)  # torch uses 32 bits of it on a CPU
        yield from torch.randperm(num_rows, generator=generator, device=device).split(batch_size)[first:]
        step += per_epoch - first


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


def transform_rewards(rew: np.ndarray, ends: np.ndarray, kind: str) -> np.ndarray:
    """Rewards [N] as the critics see them; ends [N] marks the last transition of each trajectory."""
    if kind == "return_range":
        returns = np.add.reduceat(rew.astype(np.float64), np.r_[0, np.flatnonzero(ends)[:-1] + 1])
        if returns.max() == returns.min():
            raise UserError("all trajectory returns are equal and have no range: choose another --reward-transform")
        return (1000 * rew / (returns.max() - returns.min())).astype(np.float32)
    return rew - 1 if kind == "minus_one" else rew


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
        agent, info = DAC(state["obs_dim"], state["act_dim"], args, device), state["info"]
        restore(agent, state)
        print(describe(info))
        if args.video:
            print(f"{args.video}: one episode, return {record_video(agent.act, info, args.video, EVAL_SEED):.2f}")
        return show(agent.step, evaluate(agent.act, info, args.episodes or args.eval_episodes, EVAL_SEED + agent.step))

    # data
    arrays, info = load_dataset(args.env, args.data, need_env=args.eval)
    print(describe(info))
    print("arguments   " + " ".join(f"{name}={value}" for name, value in dataclasses.asdict(args).items()))
    print("quick       a small protocol of our own, not comparable with published scores\n" if args.quick else "", end="")
    if state and state["info"]["sha256"] != info["sha256"]:
        raise UserError(f"{state['path']} was trained on {state['info']['id']}, not on {info['file']}", status=2)
    arrays["rew"] = transform_rewards(arrays["rew"], arrays["ends"], args.reward_transform)
    arrays["act"] = arrays["act"].clip(-1 + 1e-5, 1 - 1e-5)
    data = Batch(*(torch.as_tensor(arrays[name], device=device) for name in Batch._fields))

    # agent and run folder
    torch.manual_seed(args.seed)  # initialisation and all noise come from torch, on every device
    dims = {"obs_dim": data.obs.shape[1], "act_dim": data.act.shape[1]}
    agent = DAC(**dims, args=args, device=device)
    if state:
        folder, rows, row, seconds = state["path"].parent, state["rows"], state["row"], state["seconds"]
        restore(agent, state)
    else:
        rows, row, seconds = [], {"step": 0}, 0.0
        folder = args.run_dir / args.env / ALGORITHM / time.strftime(f"seed{args.seed}-%Y%m%d-%H%M%S")
        folder.mkdir(parents=True)
    print(f"run folder  {folder}")
    lock = FileLock(folder / "lock", timeout=0, is_singleton=True)  # held until this process or function ends
    with explained(Timeout, f"{folder} is in use: another process trains this run", 2), suppress(NotImplementedError):
        lock.acquire()  # NotImplementedError: a file system without locks
    stored = {name: value for name, value in dataclasses.asdict(args).items() if name not in PER_CALL}
    (folder / "args.json").write_text(json.dumps({"args": stored, "dataset": info}, indent=1))
    columns = ["step", *(f"train/{name}" for name in DAC.metrics), *EVAL_COLUMNS, "time/updates_per_s"]
    table = csv.DictWriter((folder / "metrics.csv").open("w", buffering=1), columns)
    table.writeheader()
    table.writerows(rows)  # those of a resumed run end at its checkpoint
    board = SummaryWriter(str(folder), purge_step=agent.step)
    stop: list[int] = []  # of signals: the run ends after a whole update; a second signal kills it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))

    # training
    copied = partial(DAC, **dims, args=dataclasses.replace(args, compile=False), device=device)
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

    batches = shuffled_batches(len(data.obs), args.batch_size, args.seed, agent.step, device)
    bar = tqdm(total=args.total_steps, initial=agent.step, unit=" updates", mininterval=0.5)
    started, window = time.perf_counter(), (agent.step, time.perf_counter())
    metrics = None if state else {}  # None: the checkpoint of a resumed run has what came before it at its step
    while True:
        step, last = agent.step, agent.step == args.total_steps or bool(stop)
        if metrics and (step % args.log_every == 0 or step % args.checkpoint_every == 0 or last):
            values = torch.stack([metrics[name] for name in DAC.metrics]).tolist()  # the only wait for the device
            found = {f"train/{name}": value for name, value in zip(DAC.metrics, values)}
            if broken := [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]:
                write_rows(wait=True)
                raise UserError(f"{', '.join(broken)} at update {step}; the last good checkpoint is in {folder}")
            if step % args.log_every == 0:
                row |= found | {"time/updates_per_s": (step - window[0]) / (time.perf_counter() - window[1])}
        if metrics is not None and (step % args.checkpoint_every == 0 or last):
            write_rows(wait=True)
            content = {"algorithm": ALGORITHM, "args": stored, "info": info, "rows": rows, "row": row}
            content |= dims | {"rng": torch.get_rng_state(), "seconds": seconds + time.perf_counter() - started}
            content |= {"cuda_rng": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
            save_checkpoint(folder / "checkpoint.pt", content | {"agent": agent.state_dict()})
        if last and step < args.total_steps:
            break  # an evaluation that is due is left to the run that goes on
        due = args.eval and (step % args.eval_every == 0 or step == args.total_steps)
        if due or len(row) > 1:
            waiting.append((row, evaluator(agent, args.eval_episodes, EVAL_SEED + step) if due else None))
            window = step, time.perf_counter()
        write_rows(wait=last)
        if last:
            break
        index = next(batches)
        metrics, row = agent.update(Batch(*(column[index] for column in data)), agent.draw(len(index))), {"step": step + 1}
        bar.update()
    for part in (evaluator, bar, board):
        part.close()
    if step < args.total_steps:
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
