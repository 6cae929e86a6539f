"""cped.py: reference numbers, properties of flow, losses and multiplier, runs, resume, reuse."""

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import cped
from cped import CPED, Args, Batch, Discriminator, Flow

OBS, ACT, DIM, ROWS = 11, 3, 14, 8
Q = math.sqrt(1 + 1e-6)  # the released flow divides by this before each linear layer

# ----------------------------------------------------- injected quantities


@pytest.fixture(autouse=True)
def double():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Draws(NamedTuple):
    """The random numbers of an update."""

    latent: torch.Tensor  # [B, D]
    mix: torch.Tensor  # [B]
    next_noise: torch.Tensor  # [B, A]


@pytest.fixture
def inject(monkeypatch):
    """inject(draws) makes all updates draw these numbers."""

    def replace(draws: Draws) -> None:
        def rand(*shape, device):
            assert shape == draws.latent.shape
            return draws.latent.sigmoid()

        def randn(*shape, device):
            drawn = draws.mix if len(shape) == 1 else draws.next_noise
            assert shape == drawn.shape
            return drawn

        monkeypatch.setattr(torch, "rand", rand)
        monkeypatch.setattr(torch, "randn", randn)

    return replace


def grid(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    b, k = torch.arange(float(rows)), torch.arange(float(columns))
    return b[:, None], k[None]


def kernel(fan_in: int, fan_out: int, layer: int, phase: float) -> torch.Tensor:
    i, j = grid(fan_in, fan_out)
    return (torch.sin(0.37 * (i + 1) * (j + 1) + 0.1 * layer + 0.9 * phase) / math.sqrt(fan_in)).T


def bias(fan_out: int, layer: int, phase: float) -> torch.Tensor:
    return 0.05 * torch.cos(torch.arange(float(fan_out)) + layer + 0.9 * phase)


class Divide(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / Q


@torch.no_grad()
def fill(net: nn.Sequential, phase: float) -> None:
    for layer, linear in enumerate(net[::2]):
        linear.weight.copy_(kernel(linear.in_features, linear.out_features, layer, phase))
        linear.bias.copy_(bias(linear.out_features, layer, phase))


@torch.no_grad()
def fill_flow(flow: Flow, divided: bool) -> None:
    for i, net in enumerate(flow.shifts):
        fill(net, i + 1)
        if divided:
            pairs = [[Divide(), net[k], net[k + 1]] for k in (0, 2, 4)]
            flow.shifts[i] = nn.Sequential(*[part for pair in pairs for part in pair])
    flow.log_scale.copy_(0.4 * torch.sin(1.3 * torch.arange(float(DIM)) + 0.5))


@torch.no_grad()
def fill_disc(disc: Discriminator) -> None:
    for layer, linear in enumerate((disc.layer1, disc.layer2, disc.out)):
        linear.weight.copy_(kernel(linear.in_features, linear.out_features, layer, 5))
        linear.bias.copy_(bias(linear.out_features, layer, 5))
    for layer, shift in enumerate((disc.shift1, disc.shift2)):
        shift.copy_(0.05 * torch.sin(torch.arange(float(len(shift))) + layer))


def reference_agent(divided: bool = True, **changes) -> CPED:
    args = Args(**{"flow_hidden_dim": 32, "disc_updates": 1, **changes})
    agent = CPED(OBS, ACT, args)
    fill_flow(agent.flow, divided)
    fill_disc(agent.disc)
    fill(agent.actor.net, 0)
    fill(agent.actor_target.net, 0.25)
    for critic, phase in ((agent.critic, 0), (agent.critic_target, 0.25)):
        fill(critic.q1, 1 + phase)
        fill(critic.q2, 2 + phase)
    with torch.no_grad():
        for actor in (agent.actor, agent.actor_target):
            actor.net[4].weight *= 3
    adams = {"flow": {"betas": (0.9, 0.01), "eps": 1e-4}, "disc": {}, "actor": {}, "critic": {}}
    for (
        name,
        more,
    ) in adams.items():  # anew: the division has put other modules around the same parameters
        adam = getattr(agent, f"{name}_adam")
        new = torch.optim.Adam(
            getattr(agent, name).parameters(), lr=adam.defaults["lr"], fused=True, **more
        )
        assert (new.defaults["betas"], new.defaults["eps"]) == (
            adam.defaults["betas"],
            adam.defaults["eps"],
        )
        setattr(agent, f"{name}_adam", new)
    return agent


def reference_batch() -> Batch:
    b, k = grid(ROWS, OBS)
    ba, ka = grid(ROWS, ACT)
    not_done = torch.ones(ROWS)
    not_done[7] = 0
    obs, next_obs, act = (
        torch.sin(b + 0.5 * k),
        torch.cos(b + 0.5 * k),
        0.9 * torch.cos(0.3 * ba + ka),
    )
    return Batch(obs, act, 0.1 * torch.arange(float(ROWS)), next_obs, not_done)


def reference_draws(mix: str = "normal") -> Draws:
    b, k = grid(ROWS, DIM)
    ba, ka = grid(ROWS, ACT)
    e = 1.4 * torch.cos(1.9 * b[:, 0] + 0.3) if mix == "normal" else (b[:, 0] + 0.5) / 8
    return Draws(2 * torch.sin(1.7 * b + 0.9 * k), e, 3 * torch.sin(0.9 * ba + 1.7 * ka))


def near(values, expected, rel: float = 1e-6, abs: float = 6e-8) -> None:
    """To 1e-6 and, where the reference prints fewer digits than that, to half of its last digit."""
    values = values.detach().tolist() if isinstance(values, torch.Tensor) else values
    assert values == pytest.approx(expected, rel=rel, abs=abs)


def sums(net: nn.Module) -> list[float]:
    values = torch.cat([p.detach().flatten() for p in net.parameters()])
    return [values.sum().item(), values.square().sum().item()]


# --------------------------------------------------------------- densities

NLL = [
    22.3124893,
    21.9227869,
    21.4425209,
    21.4314218,
    21.6303631,
    21.5144659,
    21.0332262,
    21.8787368,
]
PLAIN = [
    -22.3124916,
    -21.9227880,
    -21.4425214,
    -21.4314232,
    -21.6303644,
    -21.5144676,
    -21.0332268,
    -21.8787385,
]
Z0 = "0.0193873 1.5442876 1.7709950 0.6803918 0.7711777 1.2542269 0.1994711 0.1983237 -0.5091144 -0.6607396 -1.0417281 1.6432272 0.4523066 -0.2535244"  # noqa: E501
Z0_PLAIN = "0.0193867 1.5442886 1.7709961 0.6803918 0.7711777 1.2542276 0.1994711 0.1983246 -0.5091144 -0.6607396 -1.0417277 1.6432283 0.4523067 -0.2535244"  # noqa: E501
G0 = "-1.1188600 0.7768324 1.3596892 0.5948262 -1.2437446 -2.0710796 -1.5140051 -0.5067034 2.0661263 2.0833229 -0.0741667 -0.8871470 -2.5581871 -2.4683963"  # noqa: E501


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def test_nice_density():
    batch, flow = reference_batch(), reference_agent().flow
    x = torch.cat([batch.obs, batch.act], 1)
    near(sums(flow), [-10.421791, 143.570312], abs=6e-7)
    z, log_det = flow(*x.split(flow.halves, 1))
    near(z[0], numbers(Z0))
    near([z.sum().item(), z.square().sum().item()], [22.546198, 79.580764], abs=6e-7)
    near(log_det, 0.0964152110)
    act = batch.act.clone().requires_grad_()
    log_p = flow.log_density(batch.obs, act)
    near(log_p, [-value for value in NLL])
    near(-log_p.mean(), 21.6457513570, rel=1e-10)
    (gradient,) = torch.autograd.grad(-log_p.sum(), act)
    near(gradient[0], [1.4611211, 1.1760949, -0.2512652])
    near(gradient.norm(), 3.0937079)
    assert (flow.inverse(z) - x).abs().max() < 1e-12
    g = flow.inverse(reference_draws().latent)
    near(g[0], numbers(G0))
    near([g.sum().item(), g.square().sum().item()], [-61.758575, 335.847843], abs=6e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_density_without_the_divisor(dtype):
    batch, flow = reference_batch(), reference_agent(divided=False).flow.to(dtype)
    obs, act = batch.obs.to(dtype), batch.act.to(dtype)
    rel, exact = (1e-6, 1e-10) if dtype == torch.float64 else (1e-4, 1e-5)
    near(flow.log_density(obs, act), PLAIN, rel=rel)
    near(-flow.log_density(obs, act).mean(), 21.6457526819, rel=exact)
    z, _ = flow(*torch.cat([obs, act], 1).split(flow.halves, 1))
    near(z[0], numbers(Z0_PLAIN), rel=rel, abs=6e-8 if dtype == torch.float64 else 1e-5)


def test_flow_is_a_density():
    torch.manual_seed(0)
    flow = Flow(4, 4, 16)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(5, 4)
    z, log_det = flow(*x.split(flow.halves, 1))
    assert (flow.inverse(z) - x).abs().max() < 1e-10  # with random, unequal scales and biases

    def forward(row: torch.Tensor) -> torch.Tensor:
        return flow(*row[None].split(flow.halves, 1))[0][0]

    jacobians = [torch.autograd.functional.jacobian(forward, row) for row in x]
    near(log_det.expand(5), torch.linalg.slogdet(torch.stack(jacobians))[1].tolist())
    flow = Flow(2, 4, 16)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        axis = torch.linspace(-40, 40, 401)
        points = torch.meshgrid(axis, axis, indexing="ij")
        density = flow.log_density(*(c.reshape(-1, 1) for c in points)).exp()
    area = (axis[1] - axis[0]).item() ** 2
    assert density.sum().item() * area == pytest.approx(1, abs=2e-3)


def test_density_with_more_actions_than_observations():
    flow = CPED(1, 3, Args(flow_hidden_dim=8)).flow
    x = torch.randn(5, 4)
    z, log_det = flow(*x.split(flow.halves, 1))
    near(
        flow.log_density(x[:, :1], x[:, 1:]),
        (z - 2 * torch.nn.functional.softplus(z)).sum(1) + log_det,
    )


def test_flow_starts_as_the_identity():
    flow = Flow(DIM, 4, 64)
    x = torch.randn(20, DIM)
    assert (flow(*x.split(flow.halves, 1))[0] - x).abs().max() < 0.05
    assert (-flow.log_density(x[:, :OBS], x[:, OBS:])).min() > 2 * math.log(2) * DIM - 0.1


def test_logistic_prior_and_first_coupling():
    flow = Flow(2, 4, 4)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
    z = torch.tensor([[-3.0, 0.5], [40.0, -40.0]])
    near(
        flow.log_density(z[:, :1], z[:, 1:]),
        (-z - 2 * torch.log1p(torch.exp(-z))).sum(1).tolist(),
    )
    flow = Flow(DIM, 4, 4)
    seen = []
    flow.shifts[0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    obs, act = torch.randn(5, OBS), torch.randn(5, ACT)
    flow.log_density(obs, act)
    assert torch.equal(seen[0], obs[:, :7])  # m1 sees observations alone
    assert flow.halves == [7, 7] and Flow(37, 4, 4).halves == [18, 19]


def test_parameter_counts():
    agent = CPED(OBS, ACT, Args())
    counts = [
        sum(p.numel() for p in net.parameters())
        for net in (agent.flow, agent.disc, agent.actor, agent.critic.q1)
    ]
    assert counts == [2_298_042, 2_926, 69_635, 69_889]
    agent = CPED(29, 8, Args())
    counts = [
        sum(p.numel() for p in net.parameters())
        for net in (agent.flow, agent.disc, agent.actor, agent.critic.q1)
    ]
    assert counts == [2_367_111, 19_647, 75_528, 75_777]


def test_log_density_and_its_gradient_are_finite_far_from_the_data():
    torch.set_default_dtype(torch.float32)
    flow = Flow(14, 4, 16)
    with torch.no_grad():
        for net in flow.shifts:
            net[4].bias += 1  # not dead
    for scale in (1, 1e3, 1e6):
        obs, act = scale * torch.randn(64, 11), (2 * torch.rand(64, 3) - 1).requires_grad_()
        for net in flow.shifts:
            torch.nn.init.normal_(net[0].bias, 0, scale)
        log_p = flow.log_density(obs, act)
        (gradient,) = torch.autograd.grad(log_p.sum(), act)
        assert log_p.isfinite().all()
        assert (1e3 * gradient).square().isfinite().all()  # as Adam sees it, with the multiplier


def test_initialisation():
    agent = CPED(OBS, ACT, Args())
    assert all(
        layer.weight.abs().max() <= 0.01 and not layer.bias.any()
        for net in agent.flow.shifts
        for layer in net[::2]
    )
    assert (
        0.98 * 28**-0.5 < agent.disc.layer1.weight.abs().max() <= 28**-0.5
        and (agent.disc.layer1.bias == 0.1).all()
    )
    assert (
        0.98 * 56**-0.5 < agent.disc.layer2.weight.abs().max() <= 56**-0.5
        and (agent.disc.layer2.bias == 0.1).all()
    )
    assert agent.disc.out.weight.abs().max() <= 3e-3 and 0 < agent.disc.out.bias.abs().max() <= 3e-3
    for online, target in ((agent.actor, agent.actor_target), (agent.critic, agent.critic_target)):
        assert all(torch.equal(a, b) for a, b in zip(online.parameters(), target.parameters()))


# -------------------------------------------------------- flow-GAN updates

D0 = "0.1083707 2.5151581 -0.4228869 -1.4439715 0.7565449 0.6697179 -0.5296635 -0.0120381 -0.0792489 -0.6148130 0.6415984 0.7437994 -1.3577973 -0.2886262"  # noqa: E501
DG0 = "0.2089527 -0.5870035 2.2189708 0.4899959 0.5720148 -0.4469888 -0.3467416 -0.3874871 -0.4257285 -0.4346315 -0.4864100 0.6175972 0.5672599 2.2500346"  # noqa: E501
# real, fake, GP, L_D, adversarial, NLL, L_G, flow gradient norm; then sums of flow, c and
# discriminator after the update
UPDATES = {
    "uniform": [
        (
            -0.1290924864,
            0.2066128248,
            0.9547032246,
            0.5548719507,
            -0.2060440745,
            21.6457513570,
            21.4397072826,
            3.4076936,
        ),
        (-10.465384, 143.556439, 0.09781498, -6.026421, 49.713071),
        (
            -0.1292294188,
            0.2061823636,
            0.9001701101,
            0.5270379999,
            -0.2058950929,
            21.6372193904,
            21.4313242975,
            3.4026544,
        ),
        (-10.509590, 143.542451, 0.09921345, -6.061748, 49.718085),
        (
            -0.1294152235,
            0.2060303712,
            0.8483477267,
            0.5007890110,
            -0.2058506002,
            21.6287071327,
            21.4228565325,
            3.3974070,
        ),
        (-10.553784, 143.528507, 0.10061070, -6.094093, 49.723482),
    ],
    "normal": [
        (
            -0.1290924864,
            0.2066128248,
            1.9153805760,
            1.0352106263,
            -0.2072607645,
            21.6457513570,
            21.4384905926,
            3.4077513,
        ),
        (-10.465316, 143.556482, 0.09781498, -5.961619, 49.708770),
        (
            -0.1307183185,
            0.2073992955,
            1.8433371094,
            0.9983495317,
            -0.2080286231,
            21.6372190041,
            21.4291903810,
            3.4027054,
        ),
        (-10.509493, 143.542646, 0.09921342, -5.936728, 49.709366),
        (
            -0.1323302279,
            0.2081646650,
            1.7672107114,
            0.9594397928,
            -0.2087204979,
            21.6287065365,
            21.4199860386,
            3.3973781,
        ),
        (-10.553685, 143.528822, 0.10061063, -5.912658, 49.710119),
    ],
}
UPDATES_PLAIN = {  # L_D and L_G in three updates, sums of flow and discriminator at the end
    "uniform": (
        (0.5548716266, 0.5270376837, 0.5007887553, 21.4397085622, 21.4313255563, 21.4228577726),
        (-10.553784, 143.528507, -6.094093, 49.723482),
    ),
    "normal": (
        (1.0352102408, 0.9983491517, 0.9594394188, 21.4384918722, 21.4291916461, 21.4199872861),
        (-10.553685, 143.528822, -5.912658, 49.710119),
    ),
}


@pytest.fixture
def norms(monkeypatch) -> list[float]:
    """Gradient norms of all optimiser steps, in their order."""
    found, step = [], cped.gradient_step

    def recorded(optimizer, loss):
        step(optimizer, loss)
        gradients = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        found.append(torch.cat([g.flatten() for g in gradients]).norm().item())

    monkeypatch.setattr(cped, "gradient_step", recorded)
    return found


@pytest.mark.parametrize("mix", UPDATES)
def test_flow_gan_updates(mix, norms, inject):
    agent, batch, draws = reference_agent(), reference_batch(), reference_draws(mix)
    inject(draws)
    real = torch.cat([batch.obs, batch.act], 1)
    near(sums(agent.disc), [-5.985621, 49.708530], abs=6e-7)
    near(agent.disc(real)[0], numbers(D0))
    near(agent.disc(agent.flow.inverse(draws.latent))[0], numbers(DG0))
    rows = UPDATES[mix]
    for before, after in zip(rows[::2], rows[1::2]):
        fake = agent.flow.inverse(draws.latent)
        parts = [-agent.disc(real).mean().item(), agent.disc(fake).mean().item()]
        metrics = {name: value.item() for name, value in agent.update(batch).items()}
        names = ("penalty", "disc_loss", "gan_loss", "flow_nll")
        found = [*parts, *(metrics[name] for name in names)]
        near([*found, found[-2] + found[-1], norms[-1]], before, rel=1e-9, abs=6e-8)
        near(sums(agent.flow) + sums(agent.disc), [*after[:2], *after[3:]], rel=0, abs=6e-7)
        near(agent.flow.log_scale.sum(), after[2], abs=6e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("mix", UPDATES_PLAIN)
def test_flow_gan_updates_without_the_divisor(mix, dtype, inject):
    agent = reference_agent(divided=False)
    agent.flow.to(dtype), agent.disc.to(dtype)
    batch = Batch(*(c.to(dtype) for c in reference_batch()))
    inject(Draws(*(c.to(dtype) for c in reference_draws(mix))))
    found = [agent.update(batch) for _ in range(3)]
    losses, last = UPDATES_PLAIN[mix]
    rel, absolute = (1e-9, 6e-7) if dtype == torch.float64 else (1e-4, 2e-3)
    near([m["disc_loss"].item() for m in found], losses[:3], rel=rel)
    near([(m["gan_loss"] + m["flow_nll"]).item() for m in found], losses[3:], rel=rel)
    near(sums(agent.flow) + sums(agent.disc), last, rel=0, abs=absolute)


def test_step_size_of_the_flow_follows_its_cosine():
    batch = reference_batch()
    settings = {"flow_steps": 8, "flow_lr": 1e-2, "disc_updates": 2, "flow_hidden_dim": 4}
    for end, expected in (
        (None, [1e-2] * 4),
        (1e-4, [5e-5 * (101 + 99 * math.cos(math.pi * n / 8)) for n in (1, 3, 5, 7)]),
    ):
        agent, found = CPED(OBS, DIM - OBS, Args(**settings, flow_lr_end=end)), []
        for _ in range(8):
            agent.update(batch)
            found.append(agent.flow_adam.param_groups[0]["lr"])
        assert found[1::2] == pytest.approx(expected)


def test_gradient_penalty_in_closed_form():
    disc, batch, fake = nn.Linear(DIM, DIM), reference_batch(), torch.randn(ROWS, DIM)
    agent = CPED(OBS, ACT, Args(penalty_weight=0.7, flow_hidden_dim=4))
    agent.disc = disc
    loss, metrics = agent.disc_loss(batch, fake, torch.rand(ROWS))
    penalty = (disc.weight.sum(0).norm() - 1) ** 2  # D is linear: its slope is the same everywhere
    near(metrics["penalty"], penalty.item())
    real = torch.cat([batch.obs, batch.act], 1)
    near(loss, (disc(fake).mean() - disc(real).mean() + 0.7 * penalty).item())


def test_likelihood_weight():
    agent, batch = reference_agent(mle_weight=4.0), reference_batch()
    loss, metrics = agent.flow_loss(batch, torch.randn(ROWS, DIM))
    near(loss, (metrics["gan_loss"] / 4 + metrics["flow_nll"]).item())


def test_draws(monkeypatch):
    drawn = {}
    agent = CPED(4, 2, Args(flow_hidden_dim=4, hidden_dim=4, flow_steps=1, critic_start=0))
    inverse, disc_loss, td_target = agent.flow.inverse, agent.disc_loss, agent.td_target

    def record_latent(latent):
        drawn["latent"] = latent
        return inverse(latent)

    def record_mix(batch, fake, mix):
        drawn["mix"] = mix
        return disc_loss(batch, fake, mix)

    def record_noise(batch, noise):
        drawn["noise"] = noise
        return td_target(batch, noise)

    agent.flow.inverse, agent.disc_loss, agent.td_target = record_latent, record_mix, record_noise
    rows = 20_000
    obs, one = torch.zeros(rows, 4), torch.ones(rows)
    torch.manual_seed(0)
    for _ in range(2):
        agent.update(Batch(obs, torch.zeros(rows, 2), one, obs, one))
    assert drawn["latent"].isfinite().all()
    assert drawn["latent"].std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.02)
    assert drawn["mix"].std().item() == pytest.approx(1, rel=0.02)
    assert drawn["noise"].std().item() == pytest.approx(1, rel=0.02)
    assert drawn["noise"].shape == (rows, 2)
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.tensor([[0.0, 1, 0, 1, 0, 1]]))
    agent.step = 0
    agent.update(Batch(obs[:1], torch.zeros(1, 2), one[:1], obs[:1], one[:1]))
    assert drawn["latent"].isfinite().all()  # where a uniform number is 0


# ---------------------------------------------------------- policy updates

NLL_PI = [
    22.3107256,
    22.5784324,
    21.5499446,
    21.4040783,
    21.4756884,
    22.0654955,
    22.1581974,
    22.6952993,
]
NLL_PI_PLAIN = [
    22.3107278,
    22.5784347,
    21.5499448,
    21.4040794,
    21.4756894,
    22.0654981,
    22.1581997,
    22.6953019,
]
Y = [0.3679028, 0.3153302, 0.2466553, 0.2143438, 0.2824349, 0.2167623, 0.8223260, 0.7000000]
Y_CLIPPED = [0.3011581, 0.2885617, 0.2451558, 0.2143438, 0.2824349, 0.2167623, 0.7651127, 0.7000000]
# first update; per update: critic losses, nll(s, pi), Q(s, pi), actor loss, actor gradient norm;
# sums of actor, its target, critics, their targets
POLICY = {
    "alpha 10": (
        600_001,
        10,
        (0.0958626813, 0.2926533303, 22.0297326793, 0.0906979977, 3.7491152251, 41.5386561),
        (34.124085, 270.765584, 32.320315, 270.988526, 1.890718, 513.966120, -9.599712, 513.422485),
        (0.0697271655, 0.2383666280),
        (34.124085, 270.765584, 32.320315, 270.988526, 0.533543, 513.967990, -9.599712, 513.422485),
        (0.0510775817, 0.1953754488, 21.9886573406, 0.1920144210, 3.2370454149, 41.8410128),
        (
            33.998880,
            270.755620,
            32.328708,
            270.920482,
            -0.035460,
            513.983298,
            -9.551891,
            513.297107,
        ),
    ),
    "alpha 1.5": (
        1_000_001,
        1.5,
        (0.0958626813, 0.2926533303, 22.0297326793, 0.0906979977, 0.4852739858, 6.0384039),
        (34.105462, 270.764985, 32.320222, 270.988523, 1.890718, 513.966120, -9.599712, 513.422485),
        (0.0697272569, 0.2383669538),
        (34.105462, 270.764985, 32.320222, 270.988523, 0.533544, 513.967990, -9.599712, 513.422485),
        (0.0510776690, 0.1953757302, 21.9887186267, 0.1920984957, 0.3223524088, 6.0723526),
        (
            33.963205,
            270.755009,
            32.328437,
            270.920476,
            -0.035456,
            513.983298,
            -9.551891,
            513.297107,
        ),
    ),
    "warm-up": (
        500_001,
        1000,
        (0.0958626813, 0.2926533303, 22.0297326793, 0.0335421522, 383.9813222713, 4179.4982297),
        (34.126087, 270.765265, 32.320325, 270.988524, 4.088586, 513.983856, -9.588723, 513.422624),
        (0.0957770519, 0.2926820429),
        (34.126087, 270.765265, 32.320325, 270.988524, 4.088586, 513.983856, -9.588723, 513.422624),
        (0.0957770519, 0.2926820429, 21.9886532727, 0.0304957199, 342.9019156743, 4210.2950376),
        (34.010679, 270.754805, 32.328776, 270.920476, 4.088586, 513.983856, -9.520337, 513.297604),
    ),
}


@pytest.mark.parametrize("case", POLICY)
def test_policy_updates(case, norms, inject):
    first, alpha, *rows = POLICY[case]
    agent, batch, draws = reference_agent(), reference_batch(), reference_draws()
    inject(draws)
    agent.step, flow = first, sums(agent.flow)
    start = [34.284787, 270.778286, 32.311251, 271.057536]
    near([*sums(agent.actor), *sums(agent.actor_target)], start, abs=6e-7)
    start = [4.088586, 513.983856, -9.657453, 513.549566]
    near([*sums(agent.critic), *sums(agent.critic_target)], start, rel=0, abs=6e-7)
    for before, after in zip(rows[::2], rows[1::2]):
        target = agent.td_target(batch, draws.next_noise)
        errors = agent.critic(batch.obs, batch.act) - target
        near(errors.square().mean(1), before[:2], rel=1e-8)
        if len(before) == 2:
            metrics = agent.update(batch)
            assert "actor_loss" not in metrics
            assert ("critic_loss" in metrics) == (case != "warm-up")
        else:
            actor = [p.detach().clone() for p in agent.actor.parameters()]
            metrics = {name: value.item() for name, value in agent.update(batch).items()}
            loss = metrics["actor_loss"] - alpha * 21.6457513570  # the code subtracts a constant
            expected = [before[2], before[4], before[5]]
            near([metrics["actor_nll"], loss, norms[-1]], expected, rel=1e-8, abs=6e-8)
            if case != "warm-up":
                near(metrics["actor_q"], before[3], rel=1e-8)
                near(metrics["critic_loss"], before[0] + before[1], rel=1e-8)
            assert metrics["lagrange"] == alpha
            assert not all(torch.equal(a, b) for a, b in zip(actor, agent.actor.parameters()))
        nets = (agent.actor, agent.actor_target, agent.critic, agent.critic_target)
        near([value for net in nets for value in sums(net)], after, rel=0, abs=6e-7)
    assert sums(agent.flow) == flow and all(p.grad is None for p in agent.flow.parameters())


PLAIN_POLICY = {  # first update, alpha, actor losses and gradient norms, sums of actor and critics
    "alpha 10": (
        600_001,
        10,
        (3.7491197615, 3.2370493896),
        (41.5387201, 41.8410773),
        (33.998880, 270.755620, -0.035460, 513.983298),
    ),
    "alpha 1.5": (
        1_000_001,
        1.5,
        (0.4852746662, 0.3223530046),
        (6.0384138, 6.0723624),
        (33.963205, 270.755009, -0.035456, 513.983298),
    ),
    "warm-up": (
        500_001,
        1000,
        (383.9817759145, 342.9023132174),
        (4179.50460, 4210.30147),
        (34.010679, 270.754805, 4.088586, 513.983856),
    ),
}


@pytest.mark.parametrize("case", PLAIN_POLICY)
def test_policy_without_the_divisor(case, norms, inject):
    first, alpha, losses, slopes, last = PLAIN_POLICY[case]
    agent, batch = reference_agent(divided=False), reference_batch()
    inject(reference_draws())
    near(-agent.flow.log_density(batch.obs, agent.actor(batch.obs)), NLL_PI_PLAIN)
    agent.step = first
    found, slopes_found = [], []
    for _ in range(3):
        metrics = agent.update(batch)
        if "actor_loss" in metrics:
            found.append(metrics["actor_loss"].item())
            slopes_found.append(norms[-1])
    constant = -agent.flow.log_density(batch.obs, batch.act).mean().item()
    near([loss - alpha * constant for loss in found], losses, rel=1e-8)
    near(slopes_found, slopes)
    near(sums(agent.actor) + sums(agent.critic), last, rel=0, abs=6e-7)


def test_policy_before_any_update():
    agent, batch, draws = reference_agent(), reference_batch(), reference_draws()
    noise = (0.2 * draws.next_noise).clamp(-0.5, 0.5)
    assert (noise.abs() == 0.5).sum() == 8
    next_act = agent.actor_target(batch.next_obs) + noise
    near(next_act[0], [0.9171286, 1.4268085, 0.5803373])
    near(next_act.sum(), 17.5274241)
    assert (next_act.abs() > 1).sum() == 6
    q = agent.critic(batch.obs, batch.act)
    near(q[:, 0], [0.5006116, -0.1305346])
    near(q.mean(1), [0.4377579, -0.0159885])
    near(agent.actor(batch.obs)[0], [0.9670027, 0.5572649, 0.2117413])
    near(agent.actor(batch.obs).sum(), 13.4729363)
    near(-agent.flow.log_density(batch.obs, agent.actor(batch.obs)), NLL_PI)
    for clip, expected in ((False, Y), (True, Y_CLIPPED)):
        agent.args.clip_target_action = clip
        near(agent.td_target(batch, draws.next_noise), expected)


def test_policy_in_float32(inject):
    agent = reference_agent(divided=False)
    for name in ("flow", "actor", "critic", "actor_target", "critic_target"):
        getattr(agent, name).float()
    agent.lagrange, agent.step = agent.lagrange.float(), 600_001
    batch = Batch(*(c.float() for c in reference_batch()))
    inject(Draws(*(c.float() for c in reference_draws())))
    found = [agent.update(batch) for _ in range(3)]
    losses = [0.3885160116, 0.3080937935, 0.2464530305]
    near([m["critic_loss"].item() for m in found], losses, rel=1e-4)
    near(found[2]["actor_nll"], 21.9886573406, rel=1e-4)
    near(sums(agent.actor), [33.998880, 270.755620], rel=1e-4)


# ----------------------------------------------- multiplier and constraint


def gradients(agent: CPED, loss: str, alpha: float = 3.0, *more) -> list[torch.Tensor]:
    """Of one of the actor's losses, at the reference batch."""
    agent.lagrange = torch.tensor(alpha)
    value, _ = getattr(agent, loss)(reference_batch(), *more)
    return list(torch.autograd.grad(value, list(agent.actor.parameters())))


def dual_gradients(agent: CPED, epsilon: float) -> list[torch.Tensor]:
    return gradients(agent, "actor_loss_dual", 3.0, torch.tensor(epsilon))


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(first, second))


def test_hinge_and_terms_of_the_actor_loss():
    agent = reference_agent()
    only_q = gradients(agent, "actor_loss_schedule", 0.0)
    total = gradients(agent, "actor_loss_schedule")
    cloning = gradients(agent, "actor_loss_cloning")
    assert same([a + b for a, b in zip(cloning, only_q)], total)
    assert same(dual_gradients(agent, 30.0), only_q)  # all actions inside the region
    assert not same(dual_gradients(agent, 22.0), only_q)  # some outside
    assert not same(dual_gradients(agent, 22.0), total)
    assert same(dual_gradients(agent, 20.0), total)  # all outside


def test_dual_step(inject):
    batch = reference_batch()
    nll, nll_pi = torch.tensor(NLL), torch.tensor(NLL_PI)
    inject(reference_draws())

    def after(data_nll: torch.Tensor, **changes) -> dict[str, torch.Tensor]:
        """The metrics of one update from the multiplier 2, where the data has this -log p."""
        agent = reference_agent(constraint="dual", lagrange_lr=0.1, policy_every=1, **changes)
        agent.lagrange, agent.step = torch.tensor(2.0), 600_000
        log_density = agent.flow.log_density

        def shifted(obs: torch.Tensor, act: torch.Tensor) -> torch.Tensor:
            return -data_nll if act is batch.act else log_density(obs, act)

        agent.flow.log_density = shifted
        metrics = agent.update(batch)
        assert metrics["lagrange"] == agent.lagrange
        return metrics

    def alpha_after(data_nll: torch.Tensor, **changes) -> float:
        return after(data_nll, **changes)["lagrange"].item()

    # epsilon is the mean of the batch's own: the policy is 0.38 nats outside
    metrics = after(nll)
    near(metrics["epsilon"], nll.mean().item())
    near(metrics["actor_nll"], nll_pi.mean().item())
    near(metrics["violation"], (nll_pi - nll.mean()).relu().mean().item())
    own = (nll - nll.mean()).relu().mean().item()
    near(metrics["lagrange"], 2 + 0.1 * (metrics["violation"].item() - own))
    assert metrics["lagrange"] > 2

    metrics = after(nll, epsilon_quantile=0.9)
    near(metrics["epsilon"], nll.quantile(0.9).item())
    own_at_quantile = (nll - nll.quantile(0.9)).relu().mean().item()
    near(metrics["lagrange"], 2 + 0.1 * (metrics["violation"].item() - own_at_quantile))

    # the policy is inside: alpha falls by the violation of the data
    near(alpha_after(nll + 50), 2 - 0.1 * own)
    assert after(nll + 50)["violation"] == 0
    # one nat counts at most
    assert alpha_after(50 * nll) == pytest.approx(1.9)
    assert alpha_after(nll - 50) == pytest.approx(2.1)
    assert alpha_after(nll + 50, lagrange_min=1.99) == 1.99
    assert alpha_after(nll - 50, lagrange_max=2.05) == 2.05


def test_dual_asks_the_flow_for_the_density_of_the_data(inject):
    inject(reference_draws())
    for training in ("frozen", "joint"):
        agent = reference_agent(constraint="dual", policy_every=1, flow_training=training)
        agent.step = 600_000
        metrics = agent.update(reference_batch())
        if training == "frozen":
            near(metrics["epsilon"], 21.6457513570)
        else:  # the flow has learned in this update
            near(metrics["epsilon"], 21.6372190041)
            near(metrics["flow_nll"], 21.6457513570)


def test_the_actor_learns_in_every_policy_every_th_update(inject):
    agent = reference_agent(policy_every=3)
    agent.step = 500_000
    inject(reference_draws())
    learned = ["actor_loss" in agent.update(reference_batch()) for _ in range(6)]
    assert learned == [False, False, True] * 2


def test_dual_waits_for_q(inject):
    agent = reference_agent(constraint="dual", policy_every=1)
    inject(reference_draws())
    agent.step = 500_000 + 49_999
    agent.update(reference_batch())
    assert agent.lagrange == 10
    agent.update(reference_batch())
    assert agent.lagrange > 10  # the policy is farther outside than the data


def multiplier(args: Args, n: int) -> float:
    agent = CPED(2, 1, args)
    agent.step = n
    obs, one = torch.zeros(1, 2), torch.ones(1)
    return agent.update(Batch(obs, torch.zeros(1, 1), one, obs, one))["lagrange"].item()


@pytest.mark.parametrize("task", ["hopper-medium", "antmaze-umaze", "antmaze-large-play"])
def test_schedule_at_its_borders(task):
    tables = {
        "hopper": {
            (500_000, 600_000): 1000,
            (600_001, 699_999): 10,
            (700_000, 799_999): 7.5,
            (800_000, 899_999): 5,
            (900_000, 999_999): 2.5,
            (1_000_000,): 2.5,  # released: 0
            (1_000_001, 1_499_999): 1.5,
        },
        "antmaze": {(400_001, 500_000): 0.25, (500_001, 800_000): 0.1, (800_001, 999_999): 0.08},
    }
    small = {"constraint": "schedule", "policy_every": 1, "hidden_dim": 4, "flow_hidden_dim": 4}
    args = Args(**(cped.PRESETS[task] | small))
    for steps, alpha in tables[task.split("-")[0]].items():
        assert [multiplier(args, n) for n in steps] == [alpha] * len(steps)
    if task == "antmaze-umaze":
        assert multiplier(args, 300_001) == 0.25
    if task != "hopper-medium":
        assert (
            args.flow_steps + args.total_steps == 1_000_000
            and args.reward_transform == "minus_one"
            and args.actor_lr == 3e-4
        )
        assert args.eval_episodes == 100


def test_presets():
    qualities = ("medium", "medium-replay", "medium-expert")
    robots = ("hopper", "walker2d", "halfcheetah")
    mazes = (
        "umaze",
        "umaze-diverse",
        "medium-play",
        "medium-diverse",
        "large-play",
        "large-diverse",
    )
    locomotion = {f"{robot}-{quality}" for robot in robots for quality in qualities}
    assert set(cped.PRESETS) == locomotion | {f"antmaze-{maze}" for maze in mazes}
    assert all(Args(**cped.PRESETS[task]) == Args() for task in locomotion)
    for maze in mazes:
        args = Args(**cped.PRESETS[f"antmaze-{maze}"])
        assert args.flow_steps == (400_000 if "large" in maze else 300_000)
        assert args.lagrange_table == (0.25, 0.1, 0.08)
    for own in (*cped.PRESETS.values(), cped.QUICK):
        args = Args(**own)
        cped.check_args(args)
        cped.check_constraint(args)
        assert args.critic_start < args.actor_q_start < args.total_steps
    args = Args()
    assert (args.flow_steps, args.total_steps, args.constraint) == (500_000, 1_000_000, "schedule")
    assert (args.eval_every, args.eval_episodes, args.final_episodes) == (10_000, 10, 100)


def released_formula(flow_steps: int) -> tuple[list[str], list[str]]:
    """The code's table for another F: 1000, then 10 - 2.5 k, from F + 100,000 + 100,000 k on."""
    since = [0, *range(100_000, 1_000_000 - flow_steps, 100_000)]
    table = [1000, *(10 - 2.5 * k for k in range(len(since) - 1))]
    return [str(x) for x in table], [str(x) for x in since]


@pytest.mark.parametrize("flow_steps", [50_000, 400_000])
def test_a_multiplier_that_is_not_positive_is_refused(flow_steps):
    table, since = released_formula(flow_steps)
    assert min(float(x) for x in table) <= 0
    reason = "--lagrange-table -2.5: must be from 0" if flow_steps == 50_000 else "above 0"
    with pytest.raises(SystemExit, match=reason):
        cped.main(["--lagrange-table", *table, "--lagrange-from", *since])


@pytest.mark.parametrize(
    "words, reason",
    [
        ("--lagrange-table 5 1", "--lagrange-table has 2 values and --lagrange-from 6"),
        ("--lagrange-from 0 2", "--lagrange-table has 6 values and --lagrange-from 2"),
        ("--lagrange-from 1 2 3 4 5 6", "--lagrange-from: must start at 0 and rise"),
        ("--lagrange-from 0 2 1 4 5 6", "--lagrange-from: must start at 0 and rise"),
        ("--lagrange-from 0 2 2 4 5 6", "--lagrange-from: must start at 0 and rise"),
        ("--epsilon-quantile 1.5", "--epsilon-quantile 1.5: must be from 0 to 1"),
        ("--lagrange-min 5 --lagrange-max 2", "--lagrange-min 5.0 is above --lagrange-max 2.0"),
        ("--mle-weight 0", "--mle-weight 0"),
        ("--tau nan", "--tau nan"),
        ("--discount 1.1", "--discount 1.1: must be from 0 to 1"),
        ("--disc-updates 0", "--disc-updates 0: must be from 1"),
    ],
)
def test_refused_settings(words, reason):
    with pytest.raises(SystemExit, match=f"^error: {reason}"):
        cped.main(words.split())


# -------------------------------------------------------------------- runs


def write_data(
    path: Path, rows: int = 400, seed: int = 0, obs_dim: int = 5, act_dim: int = 2
) -> Path:
    rng = np.random.default_rng(seed)
    timeouts, terminals = np.arange(rows) % 50 == 49, np.arange(rows) % 80 == 33
    arrays = {
        "observations": rng.normal(size=(rows, obs_dim)),
        "actions": rng.uniform(-1, 1, (rows, act_dim)),
    }
    np.savez(path, **arrays, rewards=rng.normal(size=rows), terminals=terminals, timeouts=timeouts)
    return path


TINY = "--flow-hidden-dim 8 --hidden-dim 8 --batch-size 16 --flow-steps 12 --total-steps 16 "
TINY += "--critic-start 3 --actor-q-start 7 --joint-steps 9 --log-every 2 --no-eval --env anything"


def run(tmp_path: Path, name: str, *more: str) -> Path:
    torch.set_default_dtype(torch.float32)
    folder, data = tmp_path / name, tmp_path / "data.npz"
    if not data.exists():
        write_data(data)
    cped.main([*TINY.split(), "--data", str(data), "--run-dir", str(folder), *more])
    (checkpoint,) = folder.glob("anything/cped/*/checkpoint.pt")
    return checkpoint.parent


def flat(value) -> list:
    if isinstance(value, dict):
        return [entry for key in sorted(value, key=str) for entry in flat(value[key])]
    return (
        [entry for part in value for entry in flat(part)]
        if isinstance(value, list | tuple)
        else [value]
    )


def assert_same_run(first: Path, second: Path) -> None:
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (first, second)]
    for one, other in zip(flat(states[0]["agent"]), flat(states[1]["agent"]), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert torch.equal(states[0]["rng"], states[1]["rng"])
    tables = [list(csv.DictReader((folder / "metrics.csv").open())) for folder in (first, second)]
    for rows in tables:
        for row in rows:
            del row["time/updates_per_s"]
    assert tables[0] == tables[1]


CASES = {
    "dual": ("--constraint", "dual"),
    "schedule": ("--constraint", "schedule", "--flow-lr-end", "1e-5"),
    "joint": ("--flow-training", "joint", "--constraint", "dual", "--epsilon-quantile", "0.5"),
}


class Killed(BaseException):
    """What no handler of the script sees."""


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact_in_each_stage(case, tmp_path, monkeypatch):
    whole = run(tmp_path, "whole", *CASES[case])
    rows = list(csv.DictReader((whole / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(2, 29, 2))
    update, save = CPED.update, cped.save
    for saved_at in (5, 12, 16, 23):  # the last checkpoint before the run dies, three updates on

        def update_until(agent, batch, saved_at=saved_at):
            if agent.step == saved_at + 3:
                raise Killed
            return update(agent, batch)

        def save_until(content, path, saved_at=saved_at):
            if content["agent"]["step"] <= saved_at:
                save(content, path)

        monkeypatch.setattr(CPED, "update", update_until)
        monkeypatch.setattr(cped, "save", save_until)
        with pytest.raises(Killed):
            run(tmp_path, f"killed{saved_at}", *CASES[case], "--checkpoint-minutes", "0")
        monkeypatch.undo()
        (folder,) = (tmp_path / f"killed{saved_at}").glob("anything/cped/*")
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert checkpoint["agent"]["step"] == saved_at
        assert (folder / "flow.pt").exists() == (saved_at >= 12)
        torch.manual_seed(99)
        cped.main(["--resume", str(folder)])
        assert_same_run(whole, folder)


@pytest.mark.parametrize("training", ["frozen", "joint"])
def test_stages(training, tmp_path, monkeypatch):
    batches, update = {}, CPED.update

    def recorded(agent, batch):
        batches[agent.step] = batch
        return update(agent, batch)

    monkeypatch.setattr(CPED, "update", recorded)
    flags = "--flow-steps 100 --total-steps 60 --log-every 10 --batch-size 64 --constraint dual"
    more = ["--flow-training", training, "--joint-steps", "40"]
    folder = run(tmp_path, "runs", *flags.split(), *more)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    agent = checkpoint["agent"]
    flow = torch.load(folder / "flow.pt", weights_only=True)["agent"]
    names = ("flow", "disc", "critic", "actor")
    steps = {name: int(agent[f"{name}_adam"]["state"][0]["step"]) for name in names}
    flow_updates = 140 if training == "joint" else 100
    assert steps["flow"] == flow_updates // 5 and steps["disc"] == flow_updates
    assert steps["critic"] == 60 - 3 and steps["actor"] == 60 // 2
    unchanged = all(torch.equal(agent["flow"][key], flow["flow"][key]) for key in flow["flow"])
    assert unchanged == (training == "frozen")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(10, 161, 10))
    for row in rows:
        filled = {name for name, value in row.items() if value}
        metrics = {name.split("/")[1] for name in filled if name.startswith("train/")}
        flow_learns = int(row["step"]) <= flow_updates
        policy_learns = int(row["step"]) > 100
        expected = set()
        if flow_learns:
            expected |= set(CPED.METRICS[:4])
        if policy_learns:
            expected |= set(CPED.METRICS[4:])
        assert metrics == expected
        assert ("log_density/held_out" in filled) == ("log_density/train" in filled) == flow_learns
    assert float(rows[9]["log_density/train"]) > float(rows[0]["log_density/train"])
    # 5 % of the rows are held out as long as the flow learns
    seen = []
    for stage in (range(100), range(100, 160)):
        seen.append({tuple(x) for step in stage for x in batches[step].obs.tolist()})
    transitions = checkpoint["info"]["transitions"]
    assert len(seen[0]) == transitions * 19 // 20
    if training == "joint":
        assert seen[1] == seen[0]
    else:
        assert len(seen[1]) == transitions


def test_batches_of_both_stages_are_shuffled_epochs(tmp_path, monkeypatch):
    sizes, update = [], CPED.update

    def recorded(agent, batch):
        sizes.append(len(batch.obs))
        return update(agent, batch)

    monkeypatch.setattr(CPED, "update", recorded)
    folder = run(tmp_path, "runs", "--batch-size", "100")
    total = torch.load(folder / "checkpoint.pt", weights_only=True)["info"]["transitions"]
    train = total * 19 // 20
    for stage, rows in ((sizes[:12], train), (sizes[12:], total)):
        epoch = [100] * (rows // 100) + [rows % 100]
        assert stage == (epoch * 16)[: len(stage)]


def test_evaluations_count_policy_updates(tmp_path, monkeypatch):
    seeds = []

    def fake(act, info, episodes, seed):
        seeds.append((seed, episodes))
        return {"return": np.arange(float(episodes)), "episode_length": np.ones(episodes)}

    def start(name: str, *more: str) -> Path:
        seeds.clear()
        flags = "--eval --env Pendulum-v1 --eval-every 5 --eval-episodes 3 --final-episodes 4"
        path = write_data(tmp_path / "pendulum.npz", obs_dim=3, act_dim=1)
        words = [
            *TINY.split(),
            *flags.split(),
            "--data",
            str(path),
            "--run-dir",
            str(tmp_path / name),
        ]
        torch.set_default_dtype(torch.float32)
        cped.main([*words, *more])
        (folder,) = (tmp_path / name).glob("Pendulum-v1/cped/*")
        return folder

    monkeypatch.setattr(cped, "evaluate", fake)
    for name, flow_steps in (("short", 9), ("long", 12)):
        folder = start(name, "--flow-steps", str(flow_steps))
        regular = [(cped.EVAL_SEED + step, 3) for step in (5, 10, 15, 16)]
        assert seeds == [*regular, (cped.FINAL_SEED, 4)]
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        found = [int(row["step"]) - flow_steps for row in rows if row["eval/return"]]
        assert found == [5, 10, 15, 16]
    folder = start("stopped", "--stop-after", "7")
    assert seeds == [(cped.EVAL_SEED + 5, 3), (cped.FINAL_SEED, 4)]
    result = json.loads((folder / "result.json").read_text())
    assert result["updates"] == 12 + 7
    assert (result["return_last_5"], result["final_return"]) == (1.0, 1.5)


def test_speed_leaves_out_evaluations(tmp_path, monkeypatch):
    """An evaluation between two log rows belongs to neither side of updates per second."""
    clock = [0.0]
    update = CPED.update

    def one_second(agent, batch):
        clock[0] += 1
        return update(agent, batch)

    def slow(act, info, episodes, seed):
        clock[0] += 1000
        return {"return": np.zeros(episodes), "episode_length": np.ones(episodes)}

    monkeypatch.setattr(cped.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(CPED, "update", one_second)
    monkeypatch.setattr(cped, "evaluate", slow)
    path = write_data(tmp_path / "pendulum.npz", obs_dim=3, act_dim=1)
    flags = "--eval --env Pendulum-v1 --eval-every 3 --log-every 4 --checkpoint-minutes 1000"
    torch.set_default_dtype(torch.float32)
    words = [*TINY.split(), *flags.split(), "--data", str(path), "--run-dir", str(tmp_path)]
    cped.main(words)
    (folder,) = tmp_path.glob("Pendulum-v1/cped/*")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    speeds = [float(row["time/updates_per_s"]) for row in rows if row["time/updates_per_s"]]
    assert speeds == [1.0] * 7


def test_learned_density_tells_data_from_noise(tmp_path):
    torch.manual_seed(0)
    agent = CPED(2, 1, Args(flow_hidden_dim=32, disc_updates=1, flow_lr=1e-2))
    for _ in range(200):
        obs = torch.randn(128, 2)
        batch = Batch(obs, (obs[:, :1] + 0.1 * torch.randn(128, 1)).tanh(), None, None, None)
        agent.update(batch)
    data = agent.flow.log_density(batch.obs, batch.act).mean()
    noise = agent.flow.log_density(batch.obs, torch.rand(128, 1) * 2 - 1).mean()
    assert data > -3.8 and data - noise > 1


def test_antmaze_rewards(tmp_path, monkeypatch):
    seen, update = set(), CPED.update

    def recorded(agent, batch):
        seen.update(batch.rew.tolist())
        return update(agent, batch)

    monkeypatch.setattr(CPED, "update", recorded)
    path = write_data(tmp_path / "data.npz")
    arrays = dict(np.load(path))
    np.savez(path, **(arrays | {"rewards": (arrays["rewards"] > 1).astype(float)}))
    run(tmp_path, "runs", "--reward-transform", "minus_one")
    assert seen == {-1.0, 0.0}


def test_flow_is_reused_or_refused(tmp_path, monkeypatch):
    first = run(tmp_path, "first")
    joint = run(tmp_path, "joint", "--flow-training", "joint")
    trained = torch.load(first / "flow.pt", weights_only=True)["agent"]
    joint_trained = torch.load(joint / "flow.pt", weights_only=True)["agent"]
    for key, value in trained["flow"].items():
        assert torch.equal(joint_trained["flow"][key], value)
    steps, update = [], CPED.update

    def recorded(agent, batch):
        steps.append(agent.step)
        if agent.step == 12:
            for name in CPED.FLOW_GAN:
                state = getattr(agent, name).state_dict()
                for one, other in zip(flat(trained[name]), flat(state), strict=True):
                    assert (
                        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
                    )
        return update(agent, batch)

    monkeypatch.setattr(CPED, "update", recorded)
    second = run(tmp_path, "second", "--flow", str(first), "--seed", "1")
    assert steps == list(range(12, 28))
    # a folder, flow.pt, a checkpoint; the folder of a run that took its flow from another
    for number, path in enumerate((first / "flow.pt", first / "checkpoint.pt", joint, second)):
        steps.clear()
        run(tmp_path, f"again{number}", "--flow", str(path), "--flow-training", "joint")
        assert steps == list(range(12, 28))

    (tmp_path / "text.pt").write_text("no flow")
    write_data(tmp_path / "other.npz", seed=1)
    for path, words, reason in (
        (first, "--flow-hidden-dim 9", "flow.pt has --flow-hidden-dim 8, this run 9"),
        (first, "--flow-steps 13", "flow.pt has --flow-steps 12, this run 13"),
        (first, "--flow-lr 0.1", "flow.pt has --flow-lr 0.0001, this run 0.1"),
        (first, f"--data {tmp_path / 'other.npz'}", "flow.pt was trained on other data"),
        (tmp_path / "nothing.pt", "", "does not exist"),
        (tmp_path, "", "does not exist"),
        (tmp_path / "text.pt", "", "is not a checkpoint"),
        (joint / "checkpoint.pt", "", "has a flow that learned with a policy"),
    ):
        with pytest.raises(SystemExit, match=f"^error: --flow: .*{reason}"):
            run(tmp_path, "refused", "--flow", str(path), *words.split())


def test_an_unfinished_flow_is_refused(tmp_path, monkeypatch):
    update = CPED.update

    def stopping(agent, batch):
        if agent.step == 5:
            raise Killed
        return update(agent, batch)

    monkeypatch.setattr(CPED, "update", stopping)
    with pytest.raises(Killed):
        run(tmp_path, "first", "--checkpoint-minutes", "0")
    monkeypatch.undo()
    (folder,) = tmp_path.glob("first/anything/cped/*")
    with pytest.raises(SystemExit, match="has 5 of 12 updates of its flow stage"):
        run(tmp_path, "second", "--flow", str(folder))


def test_broken_numbers_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.full(shape, math.nan))
    reason = r"train/disc_loss is nan at update 2; the last good checkpoint"
    with pytest.raises(SystemExit, match=reason):
        run(tmp_path, "runs")


def test_evaluation_is_the_actor_alone():
    agent = reference_agent()
    obs = reference_batch().obs
    assert np.array_equal(agent.act(obs.numpy()), agent.actor(obs).detach().numpy())


def test_stand_in_data(tmp_path):
    root, name = Path(__file__).resolve(), "hopper_medium-replay-v2.hdf5"
    path = root.parents[1] / "shared" / "data" / name
    if not path.exists():
        path = root.parents[2] / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"needs the stand-in file {name} in ../shared/data")
    torch.set_default_dtype(torch.float32)
    words = "--env hopper-medium-replay --flow-hidden-dim 64 --flow-steps 100 --total-steps 10"
    words += " --critic-start 1 --actor-q-start 2"
    cped.main(
        [
            *words.split(),
            "--data",
            str(path),
            "--run-dir",
            str(tmp_path),
            "--no-eval",
            "--log-every",
            "50",
        ]
    )
    (folder,) = tmp_path.glob("hopper-medium-replay/cped/*")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert float(rows[1]["log_density/held_out"]) > float(rows[0]["log_density/held_out"]) - 0.01


COMMON = """
import numpy as np


def load_dataset(env, data, need_env):
    rng = np.random.default_rng(0)
    arrays = {
        "obs": rng.normal(size=(200, 5)),
        "act": rng.uniform(-1, 1, size=(200, 2)),
        "rew": rng.normal(size=200),
        "next_obs": rng.normal(size=(200, 5)),
        "not_done": np.ones(200),
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    arrays["ends"] = np.arange(200) % 20 == 19
    return arrays, {"id": "made-up", "sha256": "0"}


def evaluate(act, info, episodes, seed):
    actions = act(np.zeros((episodes, 5), np.float32))
    return {"return": actions.sum(axis=1), "episode_length": np.ones(episodes)}
"""


def test_copied_alone_it_trains_saves_resumes_and_acts(tmp_path):
    shutil.copy(cped.__file__, tmp_path / "cped.py")
    (tmp_path / "common.py").write_text(COMMON)
    flags = TINY.replace("--no-eval", "--eval-every 5")

    def start(*words: str) -> dict:
        command = [sys.executable, "cped.py", *words]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        (folder,) = tmp_path.glob("runs/anything/cped/*")
        return json.loads((folder / "result.json").read_text())

    assert start(*flags.split(), "--stop-after", "9")["updates"] == 12 + 9
    (folder,) = tmp_path.glob("runs/anything/cped/*")
    result = start("--resume", str(folder), "--stop-after", "16")
    assert result["updates"] == 12 + 16 and math.isfinite(result["final_return"])
    names = {path.name for path in folder.iterdir()}
    assert names >= {"args.json", "metrics.csv", "checkpoint.pt", "flow.pt", "result.json"}


def test_the_actors_step_leaves_no_gradient_in_the_critics(monkeypatch):
    args = cped.Args(flow_steps=1, critic_start=0, actor_q_start=0, policy_every=1, hidden_dim=8)
    agent = cped.CPED(3, 2, args)
    agent.step = 1
    before = []
    step = agent.actor_adam.step

    def actor_step():
        before.append([p.grad.clone() for p in agent.critic.parameters()])
        step()

    monkeypatch.setattr(agent.actor_adam, "step", actor_step)
    batch = cped.Batch(
        torch.randn(4, 3), torch.rand(4, 2), torch.randn(4), torch.randn(4, 3), torch.ones(4)
    )
    gradients = []
    critic_step = agent.critic_adam.step

    def recorded():
        gradients.append([p.grad.clone() for p in agent.critic.parameters()])
        critic_step()

    monkeypatch.setattr(agent.critic_adam, "step", recorded)
    agent.update(batch)
    for own, after in zip(gradients[0], before[0]):  # those of the critics' own step, still
        assert torch.equal(own, after)
    assert all(p.requires_grad for p in agent.critic.parameters())
