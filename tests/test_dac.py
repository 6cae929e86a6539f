"""The mathematics of dac.py: check numbers, closed forms, hand derivations, counters.

The check numbers were computed in float64 by the authors' implementation with the weights and the
noise that are written out below.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dac

B, S, A, H, N, T = 8, 11, 3, 3, 4, 5


class Draws(NamedTuple):
    """The random numbers of one update."""

    next_noise: torch.Tensor  # [T, B N, A]
    t: torch.Tensor  # [B]
    eps: torch.Tensor  # [B, A]


def kernel(fan_in: int, fan_out: int, layer: int, phase: float) -> torch.Tensor:
    i, j = (
        torch.arange(fan_in, dtype=torch.float64)[:, None] + 1,
        torch.arange(fan_out, dtype=torch.float64) + 1,
    )
    return torch.sin(0.37 * i * j + 0.1 * layer + 0.9 * phase) / math.sqrt(fan_in)


def bias(fan_out: int, layer: int, phase: float) -> torch.Tensor:
    return 0.05 * torch.cos(torch.arange(fan_out, dtype=torch.float64) + layer + 0.9 * phase)


@torch.no_grad()
def set_weights(agent: dac.DAC) -> None:
    for net, phase in ((agent.actor, 0), (agent.actor_target, 0.25)):
        for number, layer in enumerate(
            (net.time1, net.time2, net.layer1, net.layer2, net.layer3, net.out)
        ):
            layer.weight.copy_(kernel(layer.in_features, layer.out_features, number, phase).T)
            layer.bias.copy_(bias(layer.out_features, number, phase))
    for net, phase in ((agent.critic, 0), (agent.critic_target, 0.25)):
        for number, (weight, offset) in enumerate(zip(net.weights, net.biases)):
            for head in range(H):
                weight[head].copy_(kernel(weight.shape[1], weight.shape[2], number, head + phase))
                offset[head, 0].copy_(bias(weight.shape[2], number, head + phase))


def reference_agent(**changes) -> tuple[dac.DAC, dac.Batch, Draws]:
    fields = {"num_critics": H, "num_next_actions": N, "rho": 1.5, "bc_threshold": 0.5}
    fields |= {"total_steps": 4, "batch_size": B}
    agent = dac.DAC(S, A, dac.Args(**fields | changes))
    set_weights(agent)
    # as after 1004 updates, the second moves the actor's target; the cosine of 4 steps begins anew
    agent.step = 1024
    b, k, a = torch.arange(B)[:, None].double(), torch.arange(S).double(), torch.arange(A).double()
    i = torch.arange(B * N)[:, None].double()
    batch = dac.Batch(
        obs=torch.sin(b + 0.5 * k),
        act=0.9 * torch.cos(0.3 * b + a),
        rew=0.1 * b[:, 0],
        next_obs=torch.cos(b + 0.5 * k),
        not_done=(torch.arange(B) < 7).double(),
    )
    z = 1.2 * torch.sin(0.37 * i + 2.1 * a)
    draws = Draws(
        next_noise=torch.stack([1.5 * torch.cos(0.53 * i + 0.9 * a), z, z, z, z]),
        t=1 + torch.arange(B) % 5,
        eps=1.1 * torch.cos(1.1 * b + 0.7 * a),
    )
    dtype = torch.get_default_dtype()
    batch = dac.Batch(*(column.to(dtype) for column in batch))
    return agent, batch, Draws(draws.next_noise.to(dtype), draws.t, draws.eps.to(dtype))


def update(agent: dac.DAC, batch: dac.Batch, draws: Draws) -> dict[str, torch.Tensor]:
    """agent.update(batch), which draws the given numbers; each must have the expected shape."""
    normal = [draws.next_noise, draws.eps]

    def randn(*shape, device):
        numbers = normal.pop(0)
        assert numbers.shape == torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        return numbers

    def randint(low, high, shape, device):
        assert (low, high, shape) == (1, T + 1, (len(batch.rew),))
        return draws.t

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", randn)
        patch.setattr(torch, "randint", randint)
        metrics = agent.update(batch)
    assert not normal
    return metrics


def close(value, expected, relative=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(value, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=relative,
        atol=relative / 10,
    )


def sums(net: torch.nn.Module) -> tuple[float, float]:
    flat = torch.cat([p.detach().double().flatten() for p in net.parameters()])
    return flat.sum().item(), flat.square().sum().item()


# ------------------------------------------------------------------------------------ check numbers


def test_values_before_any_update(float64):
    agent, batch, draws = reference_agent()
    x = 1.3 * torch.sin(torch.arange(B)[:, None] + torch.arange(A).double())
    eps = agent.actor(batch.obs, x, draws.t)
    close(eps[0], [0.6348925, 0.7460009, 0.8166921])
    close(eps.sum(), 8.3919476)
    q = agent.critic(batch.obs, batch.act)
    close(q[:, 0], [0.1724855, 0.5678794, 0.3335709])
    close(q[:, 0].std(unbiased=False), 0.1623389)
    close(q.mean(), 0.4392568)
    _, metrics = agent.critic_loss(batch, batch.rew)
    close(metrics["q_std"], q.detach().numpy().std(0).mean())  # numpy's is that of the population
    for net, expected in (
        (agent.actor, 111.080880),
        (agent.actor_target, 102.894208),
        (agent.critic, 68.969623),
        (agent.critic_target, 37.451800),
    ):
        close(sums(net)[0], expected)


def test_sampled_next_actions(float64):
    agent, batch, draws = reference_agent()
    next_obs = batch.next_obs.repeat_interleave(N, 0)
    act = dac.sample_actions(agent.actor_target, next_obs, draws.next_noise, agent.schedule)
    close(act[:2], [[-1, 1, -1], [0.9312417, 1, -1]])
    close(act.sum(), -11.7861400)
    assert (act.abs() == 1).sum() == 84


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        (
            "mean",
            [0.6011389, 0.5564844, 0.0937404, 0.0452446, 0.2324548, 0.9260280, 1.0906949, 0.7],
        ),
        (
            "max",
            [0.7124754, 0.7027421, 0.1130590, 0.1405147, 0.2567668, 0.9260280, 1.1323847, 0.7],
        ),
    ],
)
def test_td_target(float64, reduce, expected):
    agent, batch, draws = reference_agent(next_action_reduce=reduce)
    close(agent.td_target(batch, draws.next_noise), expected)


UPDATES = {  # three updates on the same batch and noise
    "critic_loss": (0.4609851851, 0.4095175898, 0.3691903703),
    "critic_norm": (1.30989970, 1.15243581, 1.03265007),
    "scale": (0.5451623594, 0.5446428655, 0.5440983294),
    "guidance_abs": (0.1183049172, 0.1183190971, 0.1183323010),
    "bc_loss": (0.8219352065, 0.7632854135, 0.7176113952),
    "guidance_loss": (-0.0184807073, -0.0165680521, -0.0150612338),
    "actor_loss": (0.8034544991, 0.7469630899, 0.7029701224),
    "actor_norm": (2.00862608, 1.78304187, 1.61471871),
    "eta": (1.000321935, 1.000585221, 1.000802832),
    "actor": ((111.069379, 420.912220), (111.085589, 420.921936), (111.100292, 420.942861)),
    "actor_target": (
        (102.894208, 421.517291),
        (102.935165, 421.409867),
        (102.935165, 421.409867),
    ),
    "critic": ((63.769702, 1156.634169), (61.034968, 1156.550333), (59.872690, 1156.526967)),
    "critic_target": (
        (37.583390, 1156.180918),
        (37.700648, 1155.895128),
        (37.811508, 1155.613217),
    ),
}


def check_three_updates(monkeypatch, agent, batch, draws, relative):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def recorded(*args):
        norms.append(clip(*args).item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded)
    for number in range(3):
        metrics = update(agent, batch, draws)
        scale = agent.critic_target(batch.obs, batch.act).abs().mean()
        values = {name: metrics[name].item() for name in metrics} | {"scale": scale.item()}
        values |= {"critic_norm": norms[2 * number], "actor_norm": norms[2 * number + 1]}
        values |= {name: sums(getattr(agent, name)) for name in agent.NETWORKS}
        for name, expected in UPDATES.items():
            close(values[name], expected[number], relative)


def test_three_updates(float64, monkeypatch):
    check_three_updates(monkeypatch, *reference_agent(), relative=1e-6)


def test_three_updates_in_float32(monkeypatch):
    check_three_updates(monkeypatch, *reference_agent(), relative=1e-4)


# --------------------------------------------------------------------------------- generative model


def test_schedule(float64):
    s = dac.vp_schedule(5, 0.1, 10.0, "cpu")
    close(s.sqrt_alpha_bar[1:], [0.896730, 0.659680, 0.398121, 0.197109, 0.080058], 2e-6)
    close(s.sqrt_one_minus_alpha_bar[1:], [0.442577, 0.751546, 0.917333, 0.980382, 0.996790], 2e-6)
    close(s.weight_x0[1:], [1.000000, 0.728435, 0.498410, 0.312681, 0.165654], 5e-6)
    close(s.weight_xt[1:], [0.000000, 0.255116, 0.405078, 0.433466, 0.392901], 5e-6)
    close(s.sqrt_beta[1:].square(), [0.195875, 0.458818, 0.635781, 0.754878, 0.835031], 3e-6)
    t = torch.arange(6) / 5.0
    close(s.sqrt_alpha_bar.square(), torch.exp(-0.1 * t - 0.5 * 9.9 * t**2))


def test_reverse_chain_of_a_known_gaussian(float64):
    """Actions N(0.1, 0.2^2) have a known noise predictor; a fine chain must return such actions."""
    mean, std, schedule = 0.1, 0.2, dac.vp_schedule(50, 0.1, 10.0, "cpu")

    def eps_net(obs, x, t):
        variance = (
            schedule.sqrt_alpha_bar[t] ** 2 * std**2 + schedule.sqrt_one_minus_alpha_bar[t] ** 2
        )
        return (
            schedule.sqrt_one_minus_alpha_bar[t]
            * (x - schedule.sqrt_alpha_bar[t] * mean)
            / variance
        )

    noise = torch.randn(
        50, 40_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    act = dac.sample_actions(eps_net, torch.zeros(40_000, 1), noise, schedule)
    assert abs(act.mean() - mean) < 0.005
    assert abs(act.std() - std) < 0.01


def test_each_draw_of_the_chain_is_used_once_and_the_last_step_has_none(float64):
    schedule = dac.vp_schedule(5, 0.1, 10.0, "cpu")
    noise = (
        torch.randn(5, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.05
    )
    act = lambda n: dac.sample_actions(lambda obs, x, t: 0.5 * x, torch.zeros(1, 1), n, schedule)  # noqa: E731
    for step in range(5):
        changed = noise.clone()
        changed[step] += 0.01
        assert not torch.equal(act(changed), act(noise)), f"draw {step} has no effect"
    # by hand, step by step
    x = noise[0]
    for t, z in zip((5, 4, 3, 2, 1), (*noise[1:], None)):
        x0 = (
            (x - schedule.sqrt_one_minus_alpha_bar[t] * 0.5 * x) / schedule.sqrt_alpha_bar[t]
        ).clamp(-1, 1)
        x = (
            x0
            if z is None
            else schedule.weight_x0[t] * x0 + schedule.weight_xt[t] * x + schedule.sqrt_beta[t] * z
        )
    close(act(noise), x)


def test_mish():
    close(
        dac.mish(torch.tensor([-2.0, -1.0, 0.5, 1.0, 2.0])),
        [-0.252501, -0.303401, 0.375245, 0.865098, 1.943959],
        5e-6,
    )
    x = torch.linspace(-60, 60, 2001, dtype=torch.float64, requires_grad=True)
    y = torch.linspace(-60, 60, 2001, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(dac.mish(x), F.mish(y))
    dac.mish(x).sum().backward()
    F.mish(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    extreme = torch.tensor([-1e30, -200.0, 200.0, 1e30], requires_grad=True)
    dac.mish(extreme).sum().backward()
    assert extreme.grad.isfinite().all()


# ------------------------------------------------------------------------------------------- losses


def test_guided_loss_has_the_optimum_of_theorem_2_with_twice_eta(float64):
    """Theorem 2's target is eps - sqrt(1 - alpha_bar_t) grad Q / eta; the loss is least at half.

    There its gradient vanishes.
    """
    agent, batch, draws = reference_agent(eta=0.7)
    gradient = torch.randn(B, A, generator=torch.Generator().manual_seed(1))
    guidance = agent.schedule.sqrt_one_minus_alpha_bar[draws.t][:, None] * gradient

    def gradient_at(predicted):
        agent.actor = lambda obs, x, t: predicted
        loss, _ = agent.actor_loss(batch, batch.act, draws.t, draws.eps, gradient)
        loss.backward()
        return predicted.grad

    best = (draws.eps - guidance / (2 * 0.7)).requires_grad_()
    close(gradient_at(best), torch.zeros(B, A))
    predicted = torch.randn(B, A, generator=torch.Generator().manual_seed(2), requires_grad=True)
    by_hand = 2 * 0.7 * (predicted.detach() - draws.eps) + guidance
    close(gradient_at(predicted), by_hand / (B * A))


def test_guidance_moves_actions_uphill(float64):
    """With Q(s, a) = 3 a_0 the guided optimum samples a larger a_0 than the unguided one."""
    schedule = dac.vp_schedule(5, 0.1, 10.0, "cpu")
    noise = torch.randn(5, 2000, A, generator=torch.Generator().manual_seed(0))
    uphill = torch.tensor([1.0, 0.0, 0.0])

    def eps_net(weight):  # of a data distribution N(0, 0.3^2), plus guidance
        def predict(obs, x, t):
            variance = (
                schedule.sqrt_alpha_bar[t] ** 2 * 0.3**2 + schedule.sqrt_one_minus_alpha_bar[t] ** 2
            )
            sqrt_one_minus_alpha_bar = schedule.sqrt_one_minus_alpha_bar[t]
            return sqrt_one_minus_alpha_bar * (x / variance - weight * uphill)

        return predict

    obs = torch.zeros(2000, 1)
    plain = dac.sample_actions(eps_net(0.0), obs, noise, schedule)
    guided = dac.sample_actions(eps_net(1.0), obs, noise, schedule)
    assert guided[:, 0].mean() > plain[:, 0].mean() + 0.05
    close(guided[:, 1:], plain[:, 1:])


def test_q_gradient_is_per_row_and_of_the_mean_critic(float64):
    agent, batch, draws = reference_agent()
    x = batch.act + 0.1 * draws.eps
    g = agent.q_gradient(batch, x)
    scale = agent.critic_target(batch.obs, batch.act).abs().mean() + 1e-6
    for column in range(A):  # central differences, each row on its own
        step = torch.zeros(A)
        step[column] = 1e-5
        up, down = (agent.critic_target(batch.obs, x + sign * step).mean(0) for sign in (1, -1))
        close(g[:, column], (up - down) / 2e-5 / scale, 1e-5)
    assert all(p.grad is None for p in agent.critic_target.parameters())
    assert not g.requires_grad


def test_td_target_reduces_actions_before_critics_and_bootstraps_timeouts(float64):
    agent, batch, draws = reference_agent()
    values = torch.arange(H * B * N).double().view(H, B * N) ** 1.5
    agent.critic_target = lambda obs, act: values
    y = agent.td_target(batch, draws.next_noise)
    q = values.view(H, B, N).numpy().mean(2)
    v = q.mean(0) - 1.5 * q.std(0)  # numpy's default is the population standard deviation
    close(y, batch.rew.numpy() + 0.99 * batch.not_done.numpy() * v)
    agent.args.q_target = "min"
    y = agent.td_target(batch, draws.next_noise)
    close(y, batch.rew.numpy() + 0.99 * batch.not_done.numpy() * q.min(0))
    assert y[7] == batch.rew[7]


def test_critic_in_pieces_equals_critic_at_once(float64):
    agent, _, _ = reference_agent()
    obs, act = torch.randn(1100, S), torch.randn(1100, A)
    pieces = dac.in_pieces(agent.critic, obs, act)
    close(pieces.detach(), agent.critic(obs, act).detach())


def test_ensemble_equals_separate_networks(float64):
    agent, batch, _ = reference_agent()
    for head in range(H):
        h = torch.cat([batch.obs, batch.act], 1)
        for number in range(4):
            h = h @ agent.critic.weights[number][head] + agent.critic.biases[number][head, 0]
            h = F.mish(h) if number < 3 else h
        close(agent.critic(batch.obs, batch.act)[head].detach(), h[:, 0].detach())


# ------------------------------------------------------------------------------------------- update


def test_gradient_of_all_critics_is_clipped_together(monkeypatch):
    agent, batch, _ = reference_agent()
    before = []

    def step():
        before.append([p.grad.clone() for p in agent.critic.parameters()])

    monkeypatch.setattr(agent.critic_adam, "step", step)
    loss, _ = agent.critic_loss(batch, torch.full((B,), 100.0))
    dac.gradient_step(agent.critic_adam, loss, 1.0)
    norm = torch.cat([g.flatten() for g in before[0]]).norm()
    assert abs(norm - 1) < 1e-4
    # norm of each critic's own gradient
    heads = torch.stack([g.flatten(1).norm(dim=1) for g in before[0]]).norm(dim=0)
    assert (heads < 0.9).all()


def test_soft_update_direction():
    target, online = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.995 * target.weight + 0.005 * online.weight
    kept = online.weight.clone()
    dac.soft_update(target, online, 0.005)
    torch.testing.assert_close(target.weight, expected)
    assert torch.equal(online.weight, kept)


def test_actor_target_moves_first_at_1005_and_then_each_fifth_update():
    agent, batch, draws = reference_agent(total_steps=2000, num_critics=H)
    agent.step, moved = 990, []
    for _ in range(30):
        n, before = agent.step, agent.actor_target.out.weight.clone()
        critic_before = agent.critic_target.weights[0].clone()
        update(agent, batch, draws)
        assert not torch.equal(critic_before, agent.critic_target.weights[0])  # each update
        if not torch.equal(before, agent.actor_target.out.weight):
            moved.append(n)
    assert moved == [1005, 1010, 1015]


def test_eta_follows_the_behaviour_loss_within_its_bounds():
    agent, batch, draws = reference_agent(bc_threshold=0.0, eta_lr=0.25, eta_max=1.5)
    eta = [1.0] + [update(agent, batch, draws)["eta"].item() for _ in range(4)]
    assert eta == sorted(eta) and eta[-1] == 1.5
    # the violation is clipped to -1
    agent, batch, draws = reference_agent(bc_threshold=100.0, eta_lr=0.25)
    assert update(agent, batch, draws)["eta"].item() == 0.75
    for _ in range(4):
        update(agent, batch, draws)
    assert agent.eta.item() == pytest.approx(agent.args.eta_min)
    agent, batch, draws = reference_agent(bc_threshold=-100.0, eta_lr=0.25)  # and to 1
    assert update(agent, batch, draws)["eta"].item() == 1.25
    agent, batch, draws = reference_agent(eta=200.0, eta_lr=0.0)  # fixed, even beyond eta_max
    assert update(agent, batch, draws)["eta"].item() == 200


def test_learning_rates_follow_a_cosine_to_zero():
    agent, batch, draws = reference_agent(total_steps=8)
    for n in range(9):
        update(agent, batch, draws)
        for adam in (agent.actor_adam, agent.critic_adam):
            expected = 3e-4 * 0.5 * (1 + math.cos(math.pi * n / 8))
            assert adam.param_groups[0]["lr"] == pytest.approx(expected)
    assert agent.actor_adam.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("dims", "actor", "head"),
    [((11, 3), 145_987, 135_681), ((17, 6), 149_062, 137_985), ((29, 8), 153_160, 141_569)],
)
def test_parameter_counts(dims, actor, head):
    agent = dac.DAC(*dims, dac.Args())
    assert sum(p.numel() for p in agent.actor.parameters()) == actor
    assert sum(p.numel() for p in agent.critic.parameters()) == 10 * head


def test_initialisation_is_xavier_uniform_per_critic():
    agent = dac.DAC(S, A, dac.Args())
    for weight in agent.critic.weights:
        limit = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
        assert 0.95 * limit < weight.abs().max() <= limit
    assert all((offset == 0).all() for offset in agent.critic.biases)
    assert not torch.equal(agent.critic.weights[0][0], agent.critic.weights[0][1])
    for online, target in ((agent.actor, agent.actor_target), (agent.critic, agent.critic_target)):
        for o, t in zip(online.parameters(), target.parameters()):
            assert torch.equal(o, t) and not t.requires_grad


def test_evaluation_policy_takes_the_best_of_its_candidates():
    agent = dac.DAC(S, A, dac.Args(num_critics=2, num_eval_actions=10))
    obs = np.random.default_rng(0).normal(size=(4, S)).astype(np.float32)
    torch.manual_seed(3)
    act = agent.act(obs)
    torch.manual_seed(3)
    noise, rows = torch.randn(5, 40, A), torch.as_tensor(obs).repeat_interleave(10, 0)
    with torch.no_grad():
        candidates = dac.sample_actions(agent.actor, rows, noise, agent.schedule)
        q = agent.critic_target(rows, candidates).mean(0)
    for e in range(4):
        own = slice(10 * e, 10 * e + 10)
        np.testing.assert_array_equal(act[e], candidates[own][q[own].argmax()].numpy())
    assert np.abs(act).max() <= 1


# ------------------------------------------------------------------------------------ data handling


def test_reward_transforms():
    rew, ends = np.array([1, 2, 3, 4, 5], np.float32), np.array([0, 1, 0, 0, 1], bool)
    scaled = dac.transform_rewards(rew, ends, "return_range")  # the returns are 3 and 12
    np.testing.assert_allclose(scaled, 1000 * rew / 9, rtol=1e-6)
    np.testing.assert_array_equal(dac.transform_rewards(rew, ends, "minus_one"), rew - 1)
    np.testing.assert_array_equal(dac.transform_rewards(rew, ends, "none"), rew)
    with pytest.raises(SystemExit, match="error: all trajectories have the same return"):
        dac.transform_rewards(np.ones(4, np.float32), np.array([0, 1, 0, 1], bool), "return_range")


def test_batches_are_shuffled_epochs_and_a_function_of_seed_and_step():
    take = lambda seed, step, count: [  # noqa: E731
        rows.tolist()
        for _, rows in zip(range(count), dac.shuffled_batches(10, 4, seed, step, "cpu"))
    ]
    batches = take(0, 0, 7)
    assert [len(rows) for rows in batches] == [4, 4, 2, 4, 4, 2, 4]
    epochs = [sorted(row for rows in part for row in rows) for part in (batches[:3], batches[3:6])]
    assert epochs == [list(range(10))] * 2
    assert batches[:3] != batches[3:6]
    for step in range(7):
        assert take(0, step, 7 - step) == batches[step:]
    assert take(1, 0, 7) != batches


def test_presets_are_the_published_ones():
    assert len(dac.PRESETS) == 15
    expected = {"halfcheetah": 0.0, "hopper": 1.5, "walker2d": 1.0}
    for task, preset in dac.PRESETS.items():
        args = dac.Args(**preset)
        if "antmaze" in task:
            assert (args.eta, args.eta_lr, args.next_action_reduce) == (0.1, 0.0, "max")
            assert args.rho == (1.1 if task == "antmaze-large-play" else 1.0)
            assert args.critic_lr == (1e-3 if "large" in task else 3e-4)
            assert (args.eval_every, args.eval_episodes) == (100_000, 100)
        else:
            assert (args.eta, args.eta_lr, args.next_action_reduce) == (1.0, 1e-3, "mean")
            assert args.critic_lr == 3e-4
            assert args.rho == expected[task.split("-")[0]]
            special = {"halfcheetah-medium-expert": 0.1, "hopper-medium-expert": 0.05}
            assert args.bc_threshold == special.get(task, 1.0)
    args = dac.Args()
    assert (args.total_steps, args.batch_size) == (2_000_000, 256)
    assert (args.num_critics, args.num_next_actions, args.num_eval_actions) == (10, 10, 10)
    assert (args.diffusion_steps, args.beta_min, args.beta_max) == (5, 0.1, 10.0)
    assert (args.discount, args.tau, args.max_grad_norm) == (0.99, 0.005, 1.0)
    assert (args.eval_every, args.eval_episodes) == (10_000, 10)
