"""cped.py: conformance with the reference numbers, properties of flow, losses and multiplier, runs, resume and reuse."""

import csv
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cped
from cped import CPED, Args, Batch, Discriminator, Draws, Flow, UserError, actor_loss, critic_loss, disc_loss, flow_loss, q_values

OBS, ACT, DIM, ROWS = 11, 3, 14, 8
Q = math.sqrt(1 + 1e-6)  # the released flow divides by this before each linear layer

# ------------------------------------------------------------------------------------------------- injected quantities


@pytest.fixture(autouse=True)
def double():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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
    for i, net in enumerate(flow.nets):
        if flow.affine:
            for layer, linear in enumerate(net[::2]):
                norm = linear.parametrizations.weight
                norm.original1.copy_(kernel(linear.in_features, linear.out_features, layer, i + 1))
                norm.original0.copy_(0.4 + bias(linear.out_features, layer, i + 1)[:, None])
                linear.bias.copy_(bias(linear.out_features, layer, i + 1))
        else:
            fill(net, i + 1)
        if divided:
            extra = [Divide()] * flow.affine
            pairs = [[Divide(), net[k], net[k + 1]] for k in (0, 2, 4)]
            flow.nets[i] = nn.Sequential(*extra, *[part for pair in pairs for part in pair], *extra)
    if not flow.affine:
        flow.log_scale.copy_(0.4 * torch.sin(1.3 * torch.arange(float(DIM)) + 0.5))


@torch.no_grad()
def fill_disc(disc: Discriminator) -> None:
    for layer, linear in enumerate((disc.layer1, disc.layer2, disc.out)):
        linear.weight.copy_(kernel(linear.in_features, linear.out_features, layer, 5))
        linear.bias.copy_(bias(linear.out_features, layer, 5))
    for layer, shift in enumerate((disc.shift1, disc.shift2)):
        shift.copy_(0.05 * torch.sin(torch.arange(float(len(shift))) + layer))


def reference_agent(divided: bool = True, **changes) -> CPED:
    args = Args(flow_hidden_dim=32, constraint="schedule", disc_updates=1, **changes)
    agent = CPED(OBS, ACT, args)
    fill_flow(agent.flow, divided)
    fill_disc(agent.disc)
    fill(agent.actor, 0)
    fill(agent.actor_target, 0.25)
    for i in range(2):
        fill(agent.critic[i], i + 1)
        fill(agent.critic_target[i], i + 1.25)
    with torch.no_grad():
        for actor in (agent.actor, agent.actor_target):
            actor[4].weight *= 3
    adams = {"flow": {"betas": (0.9, 0.01), "eps": 1e-4}, "disc": {}, "actor": {}, "critic": {}}
    for name, more in adams.items():  # anew: the division has put other modules around the same parameters
        adam = getattr(agent, f"{name}_adam")
        new = torch.optim.Adam(getattr(agent, name).parameters(), lr=adam.defaults["lr"], fused=True, **more)
        assert (new.defaults["betas"], new.defaults["eps"]) == (adam.defaults["betas"], adam.defaults["eps"])
        setattr(agent, f"{name}_adam", new)
    return agent


def reference_batch() -> Batch:
    b, k = grid(ROWS, OBS)
    ba, ka = grid(ROWS, ACT)
    not_done = torch.ones(ROWS)
    not_done[7] = 0
    obs, next_obs, act = torch.sin(b + 0.5 * k), torch.cos(b + 0.5 * k), 0.9 * torch.cos(0.3 * ba + ka)
    return Batch(obs, act, 0.1 * torch.arange(float(ROWS)), next_obs, not_done, torch.zeros(ROWS))


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


# ---------------------------------------------------------------------------------------------------------- densities

NLL = [22.3124893, 21.9227869, 21.4425209, 21.4314218, 21.6303631, 21.5144659, 21.0332262, 21.8787368]
PLAIN = [-22.3124916, -21.9227880, -21.4425214, -21.4314232, -21.6303644, -21.5144676, -21.0332268, -21.8787385]
Z0 = "0.0193873 1.5442876 1.7709950 0.6803918 0.7711777 1.2542269 0.1994711 0.1983237 -0.5091144 -0.6607396 -1.0417281 1.6432272 0.4523066 -0.2535244"  # noqa: E501
Z0_PLAIN = "0.0193867 1.5442886 1.7709961 0.6803918 0.7711777 1.2542276 0.1994711 0.1983246 -0.5091144 -0.6607396 -1.0417277 1.6432283 0.4523067 -0.2535244"  # noqa: E501
G0 = "-1.1188600 0.7768324 1.3596892 0.5948262 -1.2437446 -2.0710796 -1.5140051 -0.5067034 2.0661263 2.0833229 -0.0741667 -0.8871470 -2.5581871 -2.4683963"  # noqa: E501
NVP_Z0 = "0.0402104 0.5748023 1.1943370 1.2078115 0.9100956 0.6577685 0.2633906 -0.3141353 -0.7015173 -1.1548226 -0.9729157 0.9502393 0.4862904 -0.3589803"  # noqa: E501
NVP_G0 = "-0.0482304 1.3551441 1.3931275 0.7536038 -0.8850409 -1.9550602 -1.5397684 0.0067346 1.2982145 1.5322339 0.6947905 -0.9003606 -1.9618725 -1.5239672"  # noqa: E501
NVP_LOG_DET = [0.8627572, 0.8554358, 0.7110848, 0.7225554, 0.7649835, 0.7602856, 0.7700595, 0.6510211]
NVP_LOG_P = [-20.6305286, -20.6166270, -20.2207008, -20.5601551, -20.6958912, -20.2237798, -20.4325410, -20.8169641]
NVP_PLAIN = [-20.6305280, -20.6166261, -20.2206997, -20.5601544, -20.6958905, -20.2237790, -20.4325403, -20.8169637]


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def test_nice_density():
    batch, flow = reference_batch(), reference_agent().flow
    x = torch.cat([batch.obs, batch.act], 1)
    near(sums(flow), [-10.421791, 143.570312], abs=6e-7)
    z, log_det = flow(*x.split(flow.halves, 1))
    near(z[0], numbers(Z0))
    near([z.sum().item(), z.square().sum().item()], [22.546198, 79.580764], abs=6e-7)
    near(log_det, [0.0964152110])
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


def test_realnvp_density():
    batch, flow = reference_batch(), reference_agent(flow_type="realnvp").flow
    near(sums(flow), [116.818560, 206.672427], abs=6e-7)
    x = torch.cat([batch.obs, batch.act], 1)
    z, log_det = flow(*x.split(flow.halves, 1))
    near(z[0], numbers(NVP_Z0))
    near(log_det, NVP_LOG_DET)
    log_p = flow.log_density(batch.obs, batch.act)
    near(log_p, NVP_LOG_P)
    near(-log_p.mean(), 20.5246484413, rel=1e-10)
    near(flow.inverse(reference_draws().latent)[0], numbers(NVP_G0))
    assert (flow.inverse(z) - x).abs().max() < 1e-12


@pytest.mark.parametrize(
    "flow_type, log_p, nll", [("nice", PLAIN, 21.6457526819), ("realnvp", NVP_PLAIN, 20.5246477071)], ids=["nice", "realnvp"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_density_without_the_divisor(flow_type, log_p, nll, dtype):
    batch, flow = reference_batch(), reference_agent(divided=False, flow_type=flow_type).flow.to(dtype)
    obs, act = batch.obs.to(dtype), batch.act.to(dtype)
    rel, exact = (1e-6, 1e-10) if dtype == torch.float64 else (1e-4, 1e-5)
    near(flow.log_density(obs, act), log_p, rel=rel)
    near(-flow.log_density(obs, act).mean(), nll, rel=exact)
    if flow_type == "nice":
        halves = torch.cat([obs, act], 1).split(flow.halves, 1)
        near(flow(*halves)[0][0], numbers(Z0_PLAIN), rel=rel, abs=6e-8 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("flow_type", ["nice", "realnvp"])
def test_flow_is_a_density(flow_type):
    torch.manual_seed(0)
    args = Args(flow_type=flow_type, flow_hidden_dim=16)
    flow = Flow(4, args)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(5, 4)
    z, log_det = flow(*x.split(flow.halves, 1))
    assert (flow.inverse(z) - x).abs().max() < 1e-10  # with random, unequal scales and biases
    jacobians = [torch.autograd.functional.jacobian(lambda x: flow(*x[None].split(flow.halves, 1))[0][0], row) for row in x]
    near(log_det.expand(5), torch.linalg.slogdet(torch.stack(jacobians))[1].tolist())
    flow = Flow(2, args)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for net in flow.nets if flow.affine else ():  # far away, where the density is nothing, exp(l) would overflow
            net[4].parametrizations.weight.original0 *= 0.05
        axis = torch.linspace(-40, 40, 401)
        density = flow.log_density(*(c.reshape(-1, 1) for c in torch.meshgrid(axis, axis, indexing="ij"))).exp()
    assert density.sum().item() * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1, abs=2e-3)


def test_density_with_more_actions_than_observations():
    flow = CPED(1, 3, Args(flow_hidden_dim=8)).flow
    x = torch.randn(5, 4)
    z, log_det = flow(*x.split(2, 1))
    near(flow.log_density(x[:, :1], x[:, 1:]), (z - 2 * torch.nn.functional.softplus(z)).sum(1) + log_det)


def test_flow_starts_as_the_identity():
    flow = Flow(DIM, Args(flow_hidden_dim=64))
    x = torch.randn(20, DIM)
    assert (flow(*x.split(flow.halves, 1))[0] - x).abs().max() < 0.05
    assert (-flow.log_density(x[:, :OBS], x[:, OBS:])).min() > 2 * math.log(2) * DIM - 0.1


def test_logistic_prior_and_first_coupling():
    flow = Flow(2, Args(flow_hidden_dim=4))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
    z = torch.tensor([[-3.0, 0.5], [40.0, -40.0]])
    near(flow.log_density(z[:, :1], z[:, 1:]), (-z - 2 * torch.log1p(torch.exp(-z))).sum(1).tolist())
    flow = Flow(DIM, Args(flow_hidden_dim=4))
    act = torch.zeros(1, ACT, requires_grad=True)
    halves = torch.cat([torch.ones(1, OBS), act], 1).split(flow.halves, 1)
    assert not flow.requires_grad_(False).coupling(0, halves[0].detach())[1].requires_grad  # m1 sees observations alone
    assert flow.halves == (7, 7) and Flow(37, Args(flow_hidden_dim=4)).halves == (18, 19)


def test_parameter_counts():
    agent = CPED(OBS, ACT, Args())
    counts = [sum(p.numel() for p in net.parameters()) for net in (agent.flow, agent.disc, agent.actor, agent.critic[0])]
    assert counts == [2_298_042, 2_926, 69_635, 69_889]
    agent = CPED(29, 8, Args())
    counts = [sum(p.numel() for p in net.parameters()) for net in (agent.flow, agent.disc, agent.actor, agent.critic[0])]
    assert counts == [2_367_111, 19_647, 75_528, 75_777]


@pytest.mark.parametrize("flow_type", ["nice", "realnvp"])
def test_log_density_and_its_gradient_are_finite_far_from_the_data(flow_type):
    """A trained RealNVP's log-scales grow with the input: in float32, exp(l) of a random action overflowed to NaN."""
    flow = Flow(14, Args(flow_type=flow_type, flow_hidden_dim=16))
    with torch.no_grad():
        for net in flow.nets:
            net[4].bias += 1  # not dead
    for scale in (1, 1e3, 1e6):
        obs, act = scale * torch.randn(64, 11), (2 * torch.rand(64, 3) - 1).requires_grad_()
        for net in flow.nets:
            torch.nn.init.normal_(net[0].bias, 0, scale)
        log_p = flow.log_density(obs, act)
        (gradient,) = torch.autograd.grad(log_p.sum(), act)
        assert log_p.isfinite().all() and (1e3 * gradient).square().isfinite().all()  # as Adam sees it, with the multiplier


def test_realnvp_starts_near_the_identity():
    flow, x = Flow(23, Args(flow_type="realnvp", flow_hidden_dim=64)), 10 * torch.randn(200, 23)
    assert (flow(*x.split(flow.halves, 1))[0] - x).abs().max() < 3 and flow.log_density(x[:, :17], x[:, 17:]).isfinite().all()


def test_initialisation():
    agent = CPED(OBS, ACT, Args())
    assert all(layer.weight.abs().max() <= 0.01 and not layer.bias.any() for net in agent.flow.nets for layer in net[::2])
    assert 0.98 * 28**-0.5 < agent.disc.layer1.weight.abs().max() <= 28**-0.5 and (agent.disc.layer1.bias == 0.1).all()
    assert 0.98 * 56**-0.5 < agent.disc.layer2.weight.abs().max() <= 56**-0.5 and (agent.disc.layer2.bias == 0.1).all()
    assert agent.disc.out.weight.abs().max() <= 3e-3 and 0 < agent.disc.out.bias.abs().max() <= 3e-3
    for online, target in ((agent.actor, agent.actor_target), (agent.critic, agent.critic_target)):
        assert all(torch.equal(a, b) for a, b in zip(online.parameters(), target.parameters()))


# ----------------------------------------------------------------------------------------------------- flow-GAN updates

D0 = "0.1083707 2.5151581 -0.4228869 -1.4439715 0.7565449 0.6697179 -0.5296635 -0.0120381 -0.0792489 -0.6148130 0.6415984 0.7437994 -1.3577973 -0.2886262"  # noqa: E501
DG0 = "0.2089527 -0.5870035 2.2189708 0.4899959 0.5720148 -0.4469888 -0.3467416 -0.3874871 -0.4257285 -0.4346315 -0.4864100 0.6175972 0.5672599 2.2500346"  # noqa: E501
DG0_NVP = "-0.6584394 -0.1856899 2.4921494 1.0039373 0.7976799 -0.9204569 -0.4375260 -0.3964511 -0.4441273 -0.5253782 -0.9631365 0.8439591 1.0892325 2.5160399"  # noqa: E501
UPDATES = {  # real, fake, GP, L_D, adversarial, NLL, L_G, flow gradient norm; sums of flow, c and discriminator after it
    ("nice", "uniform"): [
        (-0.1290924864, 0.2066128248, 0.9547032246, 0.5548719507, -0.2060440745, 21.6457513570, 21.4397072826, 3.4076936),
        (-10.465384, 143.556439, 0.09781498, -6.026421, 49.713071),
        (-0.1292294188, 0.2061823636, 0.9001701101, 0.5270379999, -0.2058950929, 21.6372193904, 21.4313242975, 3.4026544),
        (-10.509590, 143.542451, 0.09921345, -6.061748, 49.718085),
        (-0.1294152235, 0.2060303712, 0.8483477267, 0.5007890110, -0.2058506002, 21.6287071327, 21.4228565325, 3.3974070),
        (-10.553784, 143.528507, 0.10061070, -6.094093, 49.723482),
    ],
    ("nice", "normal"): [
        (-0.1290924864, 0.2066128248, 1.9153805760, 1.0352106263, -0.2072607645, 21.6457513570, 21.4384905926, 3.4077513),
        (-10.465316, 143.556482, 0.09781498, -5.961619, 49.708770),
        (-0.1307183185, 0.2073992955, 1.8433371094, 0.9983495317, -0.2080286231, 21.6372190041, 21.4291903810, 3.4027054),
        (-10.509493, 143.542646, 0.09921342, -5.936728, 49.709366),
        (-0.1323302279, 0.2081646650, 1.7672107114, 0.9594397928, -0.2087204979, 21.6287065365, 21.4199860386, 3.3973781),
        (-10.553685, 143.528822, 0.10061063, -5.912658, 49.710119),
    ],
    ("realnvp", "normal"): [
        (-0.1290924864, 0.1754325367, 0.8558383940, 0.4742592473, -0.1755919429, 20.5246484413, 20.3490564984, 2.6309216),
        (116.913790, 206.673511, None, -5.966021, 49.708463),
        (-0.1303040062, 0.1756253434, 0.8112998600, 0.4509712671, -0.1757819379, 20.5201445498, 20.3443626118, 2.6379668),
        (116.998652, 206.674060, None, -5.947545, 49.708278),
        (-0.1315070471, 0.1758144468, 0.6214857016, 0.3550502505, -0.1760069232, 20.5156277751, 20.3396208519, 2.6377188),
        (117.072906, 206.674545, None, -5.927816, 49.708446),
    ],
}
UPDATES_PLAIN = {  # L_D and L_G in three updates, sums of flow and discriminator at the end
    ("nice", "uniform"): (
        (0.5548716266, 0.5270376837, 0.5007887553, 21.4397085622, 21.4313255563, 21.4228577726),
        (-10.553784, 143.528507, -6.094093, 49.723482),
    ),
    ("nice", "normal"): (
        (1.0352102408, 0.9983491517, 0.9594394188, 21.4384918722, 21.4291916461, 21.4199872861),
        (-10.553685, 143.528822, -5.912658, 49.710119),
    ),
    ("realnvp", "normal"): (
        (0.4742592433, 0.4509712619, 0.3550502386, 20.3490557741, 20.3443618777, 20.3396201086),
        (117.072906, 206.674545, -5.927816, 49.708446),
    ),
}


@pytest.fixture
def norms(monkeypatch) -> list[float]:
    """Gradient norms of all optimiser steps, in their order."""
    found, step = [], cped.gradient_step

    def recorded(optimizer, loss, max_norm):
        step(optimizer, loss, max_norm)
        gradients = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        found.append(torch.cat([g.flatten() for g in gradients]).norm().item())

    monkeypatch.setattr(cped, "gradient_step", recorded)
    return found


@pytest.mark.parametrize("flow_type, mix", UPDATES)
def test_flow_gan_updates(flow_type, mix, norms):
    agent, batch, draws = reference_agent(flow_type=flow_type), reference_batch(), reference_draws(mix)
    real = torch.cat([batch.obs, batch.act], 1)
    near(sums(agent.disc), [-5.985621, 49.708530], abs=6e-7)
    near(agent.disc(real)[0], numbers(D0))
    near(agent.disc(agent.flow.inverse(draws.latent))[0], numbers(DG0 if flow_type == "nice" else DG0_NVP))
    rows = UPDATES[flow_type, mix]
    for before, after in zip(rows[::2], rows[1::2]):
        parts = [-agent.disc(real).mean().item(), agent.disc(agent.flow.inverse(draws.latent)).mean().item()]
        metrics = {name: value.item() for name, value in agent.update(batch, draws).items()}
        found = [*parts, metrics["penalty"], metrics["disc_loss"], metrics["gan_loss"], metrics["flow_nll"]]
        near([*found, metrics["gan_loss"] + metrics["flow_nll"], norms[-1]], before, rel=1e-9, abs=6e-8)
        near(sums(agent.flow) + sums(agent.disc), [*after[:2], *after[3:]], rel=0, abs=6e-7)
        if after[2] is not None:
            near(agent.flow.log_scale.sum(), after[2], abs=6e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("flow_type, mix", UPDATES_PLAIN)
def test_flow_gan_updates_without_the_divisor(flow_type, mix, dtype):
    agent, batch, draws = reference_agent(divided=False, flow_type=flow_type), reference_batch(), reference_draws(mix)
    agent.flow.to(dtype), agent.disc.to(dtype)
    batch, draws = Batch(*(c.to(dtype) for c in batch)), Draws(*(c.to(dtype) for c in draws))
    found = [agent.update(batch, draws) for _ in range(3)]
    losses, last = UPDATES_PLAIN[flow_type, mix]
    rel, absolute = (1e-9, 6e-7) if dtype == torch.float64 else (1e-4, 2e-3)
    near([m["disc_loss"].item() for m in found], losses[:3], rel=rel)
    near([(m["gan_loss"] + m["flow_nll"]).item() for m in found], losses[3:], rel=rel)
    near(sums(agent.flow) + sums(agent.disc), last, rel=0, abs=absolute)


def test_step_size_of_the_flow_follows_its_cosine():
    batch = reference_batch()
    settings = {"flow_steps": 8, "flow_lr": 1e-2, "disc_updates": 2, "flow_hidden_dim": 4}
    for end, expected in ((None, [1e-2] * 4), (1e-4, [5e-5 * (101 + 99 * math.cos(math.pi * n / 8)) for n in (1, 3, 5, 7)])):
        agent, found = CPED(OBS, DIM - OBS, Args(**settings, flow_lr_end=end)), []
        for _ in range(8):
            agent.update(batch, agent.draw(len(batch.obs)))
            found.append(agent.flow_adam.param_groups[0]["lr"])
        assert found[1::2] == pytest.approx(expected)


def test_gradient_penalty_in_closed_form():
    disc, batch, fake = nn.Linear(DIM, DIM), reference_batch(), torch.randn(ROWS, DIM)
    args = Args(penalty_weight=0.7)
    loss, metrics = disc_loss(disc, batch, fake, torch.rand(ROWS), args)
    penalty = (disc.weight.sum(0).norm() - 1) ** 2  # D is linear: its slope is the same everywhere
    near(metrics["penalty"], penalty.item())
    real = torch.cat([batch.obs, batch.act], 1)
    near(loss, (disc(fake).mean() - disc(real).mean() + 0.7 * penalty).item())


def test_likelihood_weight():
    agent, batch = reference_agent(), reference_batch()
    loss, metrics = flow_loss(agent.flow, agent.disc, batch, torch.randn(ROWS, DIM), Args(mle_weight=4.0))
    near(loss, (metrics["gan_loss"] / 4 + metrics["flow_nll"]).item())


def test_draws():
    agent = CPED(4, 2, Args(flow_hidden_dim=4, penalty_mix="uniform"))
    torch.manual_seed(0)
    draws = agent.draw(20_000)
    assert draws.latent.isfinite().all() and draws.latent.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.02)
    assert draws.mix.min() >= 0 and draws.mix.max() <= 1 and draws.next_noise.shape == (20_000, 2)
    agent = CPED(4, 2, Args(flow_hidden_dim=4))
    assert agent.draw(20_000).mix.std().item() == pytest.approx(1, rel=0.02)


# ------------------------------------------------------------------------------------------------------- policy updates

NLL_PI = [22.3107256, 22.5784324, 21.5499446, 21.4040783, 21.4756884, 22.0654955, 22.1581974, 22.6952993]
NLL_PI_PLAIN = [22.3107278, 22.5784347, 21.5499448, 21.4040794, 21.4756894, 22.0654981, 22.1581997, 22.6953019]
Y = [0.3679028, 0.3153302, 0.2466553, 0.2143438, 0.2824349, 0.2167623, 0.8223260, 0.7000000]
Y_CLIPPED = [0.3011581, 0.2885617, 0.2451558, 0.2143438, 0.2824349, 0.2167623, 0.7651127, 0.7000000]
# first update; per update: critic losses, nll(s, pi), Q(s, pi), actor loss, actor gradient norm; sums of actor, its target,
# critics, their targets
POLICY = {
    "alpha 10": (
        600_001,
        10,
        (0.0958626813, 0.2926533303, 22.0297326793, 0.0906979977, 3.7491152251, 41.5386561),
        (34.124085, 270.765584, 32.320315, 270.988526, 1.890718, 513.966120, -9.599712, 513.422485),
        (0.0697271655, 0.2383666280),
        (34.124085, 270.765584, 32.320315, 270.988526, 0.533543, 513.967990, -9.599712, 513.422485),
        (0.0510775817, 0.1953754488, 21.9886573406, 0.1920144210, 3.2370454149, 41.8410128),
        (33.998880, 270.755620, 32.328708, 270.920482, -0.035460, 513.983298, -9.551891, 513.297107),
    ),
    "alpha 1.5": (
        1_000_001,
        1.5,
        (0.0958626813, 0.2926533303, 22.0297326793, 0.0906979977, 0.4852739858, 6.0384039),
        (34.105462, 270.764985, 32.320222, 270.988523, 1.890718, 513.966120, -9.599712, 513.422485),
        (0.0697272569, 0.2383669538),
        (34.105462, 270.764985, 32.320222, 270.988523, 0.533544, 513.967990, -9.599712, 513.422485),
        (0.0510776690, 0.1953757302, 21.9887186267, 0.1920984957, 0.3223524088, 6.0723526),
        (33.963205, 270.755009, 32.328437, 270.920476, -0.035456, 513.983298, -9.551891, 513.297107),
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


def critic_losses(agent: CPED, batch: Batch, draws: Draws) -> list[float]:
    targets = (agent.actor_target, agent.critic_target)
    return [critic_loss(nn.ModuleList([net]), targets, batch, draws, agent.args)[0].item() for net in agent.critic]


@pytest.mark.parametrize("case", POLICY)
def test_policy_updates(case, norms):
    first, alpha, *rows = POLICY[case]
    agent, batch, draws = reference_agent(), reference_batch(), reference_draws()
    agent.step, flow = first, sums(agent.flow)
    near([*sums(agent.actor), *sums(agent.actor_target)], [34.284787, 270.778286, 32.311251, 271.057536], abs=6e-7)
    near([*sums(agent.critic), *sums(agent.critic_target)], [4.088586, 513.983856, -9.657453, 513.549566], rel=0, abs=6e-7)
    for before, after in zip(rows[::2], rows[1::2]):
        near(critic_losses(agent, batch, draws), before[:2], rel=1e-8)
        if len(before) == 2:
            metrics = agent.update(batch, draws)
            assert "actor_loss" not in metrics and ("critic_loss" in metrics) == (case != "warm-up")
        else:
            actor = [p.detach().clone() for p in agent.actor.parameters()]
            metrics = {name: value.item() for name, value in agent.update(batch, draws).items()}
            loss = metrics["actor_loss"] - alpha * 21.6457513570  # the constant that the code subtracts
            near([metrics["excess"], loss, norms[-1]], [before[2], before[4], before[5]], rel=1e-8, abs=6e-8)
            if case != "warm-up":
                near(metrics["actor_q"], before[3], rel=1e-8)
            assert metrics["lagrange"] == alpha and not all(torch.equal(a, b) for a, b in zip(actor, agent.actor.parameters()))
        nets = (agent.actor, agent.actor_target, agent.critic, agent.critic_target)
        near([value for net in nets for value in sums(net)], after, rel=0, abs=6e-7)
    assert sums(agent.flow) == flow and all(p.grad is None for p in agent.flow.parameters())


def test_policy_without_the_divisor():
    batch, draws = reference_batch(), reference_draws()
    near(-reference_agent(divided=False).flow.log_density(batch.obs, reference_agent().actor(batch.obs)), NLL_PI_PLAIN)
    for first, alpha, losses, slopes, last in (
        (600_001, 10, (3.7491197615, 3.2370493896), (41.5387201, 41.8410773), (33.998880, 270.755620, -0.035460, 513.983298)),
        (1_000_001, 1.5, (0.4852746662, 0.3223530046), (6.0384138, 6.0723624), (33.963205, 270.755009, -0.035456, 513.983298)),
        (500_001, 1e3, (383.9817759145, 342.9023132174), (4179.50460, 4210.30147), (34.010679, 270.754805, 4.088586, 513.983856)),
    ):
        agent = reference_agent(divided=False)
        agent.step, found, norms = first, [], []
        for _ in range(3):
            found.append(agent.update(batch, draws).get("actor_loss"))
            norms.append(torch.cat([p.grad.flatten() for p in agent.actor.parameters()]).norm().item())
        constant = -agent.flow.log_density(batch.obs, batch.act).mean().item()
        near([found[i].item() - alpha * constant for i in (0, 2)], losses, rel=1e-8)
        near([norms[0], norms[2]], slopes)
        near(sums(agent.actor) + sums(agent.critic), last, rel=0, abs=6e-7)


def test_policy_before_any_update():
    agent, batch, draws = reference_agent(), reference_batch(), reference_draws()
    noise = (0.2 * draws.next_noise).clamp(-0.5, 0.5)
    assert (noise.abs() == 0.5).sum() == 8
    next_act = agent.actor_target(batch.next_obs) + noise
    near(next_act[0], [0.9171286, 1.4268085, 0.5803373])
    near(next_act.sum(), 17.5274241)
    assert (next_act.abs() > 1).sum() == 6
    q = q_values(agent.critic, batch.obs, batch.act)
    near(q[:, 0], [0.5006116, -0.1305346])
    near(q.mean(1), [0.4377579, -0.0159885])
    near(agent.actor(batch.obs)[0], [0.9670027, 0.5572649, 0.2117413])
    near(agent.actor(batch.obs).sum(), 13.4729363)
    near(-agent.flow.log_density(batch.obs, agent.actor(batch.obs)), NLL_PI)
    for clip, expected in ((False, Y), (True, Y_CLIPPED)):
        targets = []
        for b in range(ROWS):
            one = Batch(*(column[b : b + 1] for column in batch))
            drawn = Draws(*(column[b : b + 1] for column in draws))
            nets = (agent.actor_target, agent.critic_target)
            targets.append(critic_loss(agent.critic, nets, one, drawn, Args(clip_target_action=clip))[1]["td_target"].item())
        near(targets, expected)


def test_policy_in_float32():
    agent, batch, draws = reference_agent(divided=False), reference_batch(), reference_draws()
    for name in ("flow", "actor", "critic", "actor_target", "critic_target"):
        getattr(agent, name).float()
    agent.lagrange, agent.step = agent.lagrange.float(), 600_001
    batch, draws = Batch(*(c.float() for c in batch)), Draws(*(c.float() for c in draws))
    found = [agent.update(batch, draws) for _ in range(3)]
    near([m["critic_loss"].item() for m in found], [0.3885160116, 0.3080937935, 0.2464530305], rel=1e-4)
    near(found[2]["excess"], 21.9886573406, rel=1e-4)
    near(sums(agent.actor), [33.998880, 270.755620], rel=1e-4)


# ------------------------------------------------------------------------------------------- multiplier and constraint


def gradients(agent: CPED, batch: Batch, epsilon: float, use_q: bool, hinge: bool, alpha: float = 3.0) -> list[torch.Tensor]:
    nets = (agent.actor, agent.critic, agent.flow)
    loss, _ = actor_loss(nets, batch, torch.tensor(alpha), torch.tensor(epsilon), use_q, hinge)
    return list(torch.autograd.grad(loss, list(agent.actor.parameters())))


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(first, second))


def test_constant_term_and_hinge():
    agent, batch = reference_agent(), reference_batch()
    assert same(gradients(agent, batch, 0.0, True, False), gradients(agent, batch, 21.6, True, False))
    only_q = gradients(agent, batch, 0.0, True, False, alpha=0.0)
    assert same(gradients(agent, batch, 30.0, True, True), only_q)  # all actions inside the region
    assert not same(gradients(agent, batch, 22.0, True, True), only_q)  # some outside
    assert same(gradients(agent, batch, 20.0, True, True), gradients(agent, batch, 0.0, True, False))  # all outside
    cloning = gradients(agent, batch, 0.0, False, False)
    total = gradients(agent, batch, 0.0, True, False)
    assert same([a + b for a, b in zip(cloning, only_q)], total)


def test_dual_step():
    batch, draws = reference_batch(), reference_draws()
    nll = torch.tensor(NLL)

    def after(nll: torch.Tensor, **changes) -> tuple[float, dict[str, torch.Tensor]]:
        agent = reference_agent()
        agent.args = Args(constraint="dual", lagrange_lr=0.1, policy_every=1, **changes)
        agent.lagrange, agent.step = torch.tensor(2.0), 600_000
        metrics = agent.update(batch._replace(nll=nll), draws)
        return agent.lagrange.item(), metrics

    alpha, metrics = after(nll)  # epsilon is the mean of the batch's own: the policy is 0.38 nats outside
    excess = torch.tensor(NLL_PI).mean() - nll.mean()
    near(metrics["excess"], excess.item())
    near(metrics["violation"], (torch.tensor(NLL_PI) - nll.mean()).relu().mean().item())
    own = (nll - nll.mean()).relu().mean().item()
    near(alpha, 2 + 0.1 * (metrics["violation"].item() - own))
    assert alpha > 2
    alpha, metrics = after(nll, epsilon_quantile=0.9)
    near(metrics["excess"], (torch.tensor(NLL_PI).mean() - nll.quantile(0.9)).item())
    near(alpha, 2 + 0.1 * (metrics["violation"].item() - (nll - nll.quantile(0.9)).relu().mean().item()))
    near(after(nll + 50, tolerance=2)[0], 2 - 0.1 * 2 * own)
    # one nat counts at most
    assert after(nll + 50, tolerance=50)[0] == pytest.approx(1.9) and after(nll - 50)[0] == pytest.approx(2.1)
    assert after(nll + 50, tolerance=0)[0] == 2  # the hinge alone never lowers the multiplier
    assert after(nll + 50)[1]["violation"] == 0
    assert after(nll + 50, lagrange_min=1.99)[0] == 1.99 and after(nll - 50, lagrange_max=2.05)[0] == 2.05
    near(after(nll * math.nan, flow_training="joint")[0], after(nll)[0])  # a flow that still learns is asked anew


def test_the_actor_learns_in_every_policy_every_th_update():
    agent = reference_agent()
    agent.args, agent.step = Args(policy_every=3), 500_000
    learned = ["actor_loss" in agent.update(reference_batch(), reference_draws()) for _ in range(6)]
    assert learned == [False, False, True] * 2


def test_dual_waits_for_q():
    agent = reference_agent()
    agent.args = Args(constraint="dual", policy_every=1)
    agent.step = 500_000 + 49_999
    agent.update(reference_batch(), reference_draws())
    assert agent.lagrange == 10
    agent.update(reference_batch(), reference_draws())
    assert agent.lagrange > 10  # nll is 0 in this batch


def multiplier(args: Args, n: int) -> float:
    agent = CPED(2, 1, args)
    agent.step = n
    rows = Batch(torch.zeros(1, 2), torch.zeros(1, 1), *torch.zeros(1, 1), torch.zeros(1, 2), torch.ones(1), torch.zeros(1))
    return agent.update(rows, Draws(torch.zeros(1, 3), torch.zeros(1), torch.zeros(1, 1)))["lagrange"].item()


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
        assert args.flow_steps + args.total_steps == 1_000_000 and args.reward_transform == "minus_one" and args.actor_lr == 3e-4
        assert args.eval_episodes == 100


def test_presets():
    assert set(cped.PRESETS) == set(cped.TASKS)
    assert {name for name, preset in cped.PRESETS.items() if preset} == {task for task in cped.TASKS if "antmaze" in task}
    for own in (*cped.PRESETS.values(), cped.QUICK):
        args = Args(**own)
        assert len(args.lagrange_table) == len(args.lagrange_from) and min(args.lagrange_table) > 0
        assert args.critic_start < args.actor_q_start < args.total_steps
    assert Args().flow_steps == 500_000 and Args().total_steps == 1_000_000 and Args().constraint == "schedule"


def released_formula(flow_steps: int) -> tuple[list[str], list[str]]:
    """The code's table for another F: 1000, then 10 - 2.5 k from update F + 100,000 + 100,000 k to 1,000,000, then 1.5."""
    since = [0, *range(100_000, 1_000_000 - flow_steps, 100_000)]
    return [str(x) for x in [1000, *(10 - 2.5 * k for k in range(len(since) - 1))]], [str(x) for x in since]


@pytest.mark.parametrize("flow_steps", [50_000, 400_000])
def test_a_multiplier_that_is_not_positive_is_refused(flow_steps):
    table, since = released_formula(flow_steps)
    assert min(float(x) for x in table) <= 0
    with pytest.raises(UserError, match="multiplier above 0"):
        cped.main(["--lagrange-table", *table, "--lagrange-from", *since])


@pytest.mark.parametrize(
    "words",
    ["--lagrange-table 5 1", "--lagrange-from 1 2 3 4 5 6", "--lagrange-from 0 2 1 4 5 6", "--epsilon-quantile 1.5"],
)
def test_refused_settings(words):
    with pytest.raises(UserError, match=r"multiplier above 0 .* quantile up to 1"):
        cped.main(words.split())
    with pytest.raises(UserError, match="--tau nan"):
        cped.main(["--tau", "nan"])


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(autouse=True)
def signals():
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


def write_data(path: Path, rows: int = 400, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    timeouts, terminals = np.arange(rows) % 50 == 49, np.arange(rows) % 80 == 33
    arrays = {"observations": rng.normal(size=(rows, 5)), "actions": rng.uniform(-1, 1, (rows, 2))}
    np.savez(path, **arrays, rewards=rng.normal(size=rows), terminals=terminals, timeouts=timeouts)
    return path


TINY = "--flow-hidden-dim 8 --hidden-dim 8 --batch-size 16 --flow-steps 12 --total-steps 16 --critic-start 3 --actor-q-start 7 "
TINY += "--joint-steps 9 --log-every 2 --checkpoint-every 7 --no-eval --env anything"


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
    return [entry for part in value for entry in flat(part)] if isinstance(value, list | tuple) else [value]


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
    "schedule": ("--constraint", "schedule", "--flow-type", "realnvp"),
    "joint": ("--flow-training", "joint", "--epsilon-quantile", "0.5", "--penalty-mix", "uniform"),
}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact_in_each_stage(case, tmp_path, monkeypatch):
    whole, update = run(tmp_path, "whole", *CASES[case]), CPED.update
    assert [int(row["step"]) for row in csv.DictReader((whole / "metrics.csv").open())] == list(range(2, 29, 2))
    for stop_at in (5, 12, 16, 23):

        def stopping(agent, batch, draws, stop_at=stop_at):
            metrics = update(agent, batch, draws)
            if agent.step == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            return metrics

        monkeypatch.setattr(CPED, "update", stopping)
        with pytest.raises(UserError, match=f"stopped at update {stop_at}; go on with: python cped.py --resume"):
            run(tmp_path, f"stop{stop_at}", *CASES[case])
        monkeypatch.setattr(CPED, "update", update)
        (folder,) = (tmp_path / f"stop{stop_at}").glob("anything/cped/*")
        torch.manual_seed(99)
        data = ["--data", str(tmp_path / "data.npz"), "--run-dir", str(tmp_path / f"stop{stop_at}"), "--env", "anything"]
        cped.main(["--resume", *data] if stop_at == 16 else ["--resume", str(folder), *data])
        assert_same_run(whole, folder)


def test_stages(tmp_path, monkeypatch):
    batches, update = {}, CPED.update

    def recorded(agent, batch, draws):
        batches[agent.step] = batch
        return update(agent, batch, draws)

    monkeypatch.setattr(CPED, "update", recorded)
    flags = ["--flow-steps", "100", "--total-steps", "60", "--log-every", "10", "--batch-size", "64", "--constraint", "dual"]
    folder = run(tmp_path, "runs", *flags)
    agent = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
    flow = torch.load(folder / "flow.pt", weights_only=True)["agent"]
    steps = {name: int(agent[f"{name}_adam"]["state"][0]["step"]) for name in ("flow", "disc", "critic", "actor")}
    assert steps == {"flow": 100 // 5, "disc": 100, "critic": 60 - 3, "actor": 60 // 2}
    assert all(torch.equal(agent["flow"][name], flow["flow"][name]) for name in flow["flow"])  # frozen
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(10, 161, 10))
    for row in rows:
        names = {name.split("/")[1] for name, value in row.items() if value and name.startswith("train/")}
        policy = int(row["step"]) > 100
        assert names == set(CPED.metrics[4:] if policy else CPED.metrics[:4])
        assert bool(row["log_density/held_out"]) == (not policy)
    assert float(rows[9]["log_density/train"]) > float(rows[0]["log_density/train"])
    # the flow sees 95 % of the rows, the policy all of them
    seen = [{tuple(x) for i, b in batches.items() if (i < 100) == stage for x in b.obs.tolist()} for stage in (True, False)]
    info = torch.load(folder / "checkpoint.pt", weights_only=True)["info"]
    assert len(seen[0]) == info["transitions"] * 19 // 20 and len(seen[0] | seen[1]) == info["transitions"]
    assert all((b.nll != 0).all() == (i >= 100) for i, b in batches.items())


def test_learned_density_tells_data_from_noise(tmp_path):
    torch.manual_seed(0)
    agent = CPED(2, 1, Args(flow_hidden_dim=32, disc_updates=1, flow_lr=1e-2))
    for _ in range(200):
        obs = torch.randn(128, 2)
        batch = Batch(obs, (obs[:, :1] + 0.1 * torch.randn(128, 1)).tanh(), None, None, None, None)
        agent.update(batch, agent.draw(128))
    data = agent.flow.log_density(batch.obs, batch.act).mean()
    noise = agent.flow.log_density(batch.obs, torch.rand(128, 1) * 2 - 1).mean()
    assert data > -3.8 and data - noise > 1


def test_antmaze_rewards(tmp_path, monkeypatch):
    seen, update = set(), CPED.update

    def recorded(agent, batch, draws):
        seen.update(batch.rew.tolist())
        return update(agent, batch, draws)

    monkeypatch.setattr(CPED, "update", recorded)
    path = write_data(tmp_path / "data.npz")
    arrays = dict(np.load(path))
    np.savez(path, **(arrays | {"rewards": (arrays["rewards"] > 1).astype(float)}))
    run(tmp_path, "runs", "--reward-transform", "minus_one")
    assert seen == {-1.0, 0.0}


def test_flow_is_reused_or_refused(tmp_path, monkeypatch):
    first = run(tmp_path, "first")
    trained = torch.load(first / "flow.pt", weights_only=True)["agent"]
    steps, update = [], CPED.update

    def recorded(agent, batch, draws):
        steps.append(agent.step)
        if agent.step == 12:
            for name in ("flow", "disc"):
                assert all(torch.equal(trained[name][key], value) for key, value in getattr(agent, name).state_dict().items())
        return update(agent, batch, draws)

    monkeypatch.setattr(CPED, "update", recorded)
    second = run(tmp_path, "second", "--flow", str(first), "--seed", "1")
    assert steps == list(range(12, 28))
    assert (second / "flow.pt").exists()
    run(tmp_path, "joint", "--flow", str(first / "flow.pt"), "--flow-training", "joint", "--constraint", "schedule")
    for words, reason in (
        (("--flow-type", "realnvp"), "flow_type nice, not realnvp"),
        (("--flow-hidden-dim", "9"), "flow_hidden_dim 8, not 9"),
        (("--flow-steps", "13"), "flow_steps 12, not 13"),
        (("--penalty-mix", "uniform", "--flow-lr", "0.1"), "flow_lr 0.0001, not 0.1, penalty_mix normal, not uniform"),
    ):
        with pytest.raises(UserError, match=f"--flow: .*flow.pt was trained with {reason}"):
            run(tmp_path, "refused", "--flow", str(first), *words)
    write_data(tmp_path / "other.npz", seed=1)
    with pytest.raises(UserError, match=r"was trained with dataset [0-9a-f]{64}, not [0-9a-f]{64}"):
        run(tmp_path, "refused", "--flow", str(first), "--data", str(tmp_path / "other.npz"))
    with pytest.raises(UserError, match="does not exist"):
        run(tmp_path, "refused", "--flow", str(tmp_path / "nothing.pt"))
    (tmp_path / "text.pt").write_text("no flow")
    with pytest.raises(UserError, match="is no checkpoint"):
        run(tmp_path, "refused", "--flow", str(tmp_path / "text.pt"))


def test_an_unfinished_flow_is_refused(tmp_path, monkeypatch):
    update = CPED.update

    def stopping(agent, batch, draws):
        if agent.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return update(agent, batch, draws)

    monkeypatch.setattr(CPED, "update", stopping)
    with pytest.raises(UserError, match="stopped"):
        run(tmp_path, "first")
    (checkpoint,) = tmp_path.glob("first/anything/cped/*/checkpoint.pt")
    with pytest.raises(UserError, match="flow_steps 5, not 12"):
        run(tmp_path, "second", "--flow", str(checkpoint))


def test_broken_numbers_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(CPED, "draw", lambda agent, size: Draws(torch.full((size, 7), math.nan), torch.zeros(size), None))
    with pytest.raises(UserError, match=r"train/disc_loss is nan.* at update 2; the last good checkpoint"):
        run(tmp_path, "runs")


def test_evaluation_is_the_actor_alone():
    agent = reference_agent()
    obs = reference_batch().obs
    assert np.array_equal(agent.act(obs.numpy()), agent.actor(obs).detach().numpy())


def test_stand_in_data(tmp_path):
    path = Path(__file__).resolve().parents[1] / "shared" / "data" / "hopper_medium-replay-v2.hdf5"
    path = path if path.exists() else Path(__file__).resolve().parents[2] / "shared" / "data" / path.name
    if not path.exists():
        pytest.skip("needs the stand-in file hopper_medium-replay-v2.hdf5 in ../shared/data")
    torch.set_default_dtype(torch.float32)
    words = "--env hopper-medium-replay --flow-hidden-dim 64 --flow-steps 100 --total-steps 10 --critic-start 1 --actor-q-start 2"
    cped.main([*words.split(), "--data", str(path), "--run-dir", str(tmp_path), "--no-eval", "--log-every", "50"])
    (folder,) = tmp_path.glob("hopper-medium-replay/cped/*")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert float(rows[1]["log_density/held_out"]) > float(rows[0]["log_density/held_out"]) - 0.01
