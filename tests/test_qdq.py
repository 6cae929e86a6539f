"""qdq.py: check numbers, closed forms, conventions, whole runs of the three stages.

The check numbers were computed in float64 by the authors' update code with the weights and the
random numbers that are written out below.
"""

import csv
import dataclasses
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import make_raw, write_hdf5

import common
import qdq

B, S, A, K, M = 8, 11, 3, 5, 30
STAGE_BEGIN = {"teacher": 0, "student": 4, "policy": 14}  # of the reference agent
COLUMN = torch.arange(B, dtype=torch.float64)[:, None]
RULES = {
    "mujoco": {"alpha": 0.75, "beta": 0.8, "gamma_ent": 0.8},
    "diverse": {"alpha": 0.01, "beta": 0.9, "gamma_ent": 1.5, "outside_multiplier": 1.0},
    "awr": {
        "alpha": 0.75,
        "beta": 0.9,
        "gamma_ent": 0.0,
        "outside_multiplier": 1.0,
        "inside_multiplier": "expand",
    }
    | {"actor_objective": "awr"},
}


def kernel(fan_in: int, fan_out: int, layer: int, phase: float) -> torch.Tensor:
    i, j = (
        torch.arange(fan_in, dtype=torch.float64)[:, None] + 1,
        torch.arange(fan_out, dtype=torch.float64) + 1,
    )
    return torch.sin(0.37 * i * j + 0.1 * layer + 0.9 * phase) / math.sqrt(fan_in)


def bias(fan_out: int, layer: int, phase: float) -> torch.Tensor:
    return 0.05 * torch.cos(torch.arange(fan_out, dtype=torch.float64) + layer + 0.9 * phase)


def scale_offset(size: int, layer: int, phase: float) -> tuple[torch.Tensor, torch.Tensor]:
    j = torch.arange(size, dtype=torch.float64)
    return 1 + 0.1 * torch.sin(0.7 * j + layer + 0.9 * phase), 0.05 * torch.sin(
        0.3 * j + layer + 0.9 * phase
    )


def set_linear(layer: torch.nn.Linear, number: int, phase: float) -> None:
    layer.weight.copy_(kernel(layer.in_features, layer.out_features, number, phase).T)
    layer.bias.copy_(bias(layer.out_features, number, phase))


@torch.no_grad()
def set_weights(agent: qdq.QDQ) -> None:
    for net, phase in ((agent.teacher, 0), (agent.student, 1), (agent.student_target, 1.25)):
        net.frequencies.copy_(
            16 * torch.sin(1.7 * torch.arange(1, 9, dtype=torch.float64) + 0.9 * phase)
        )
        linears = (net.time1, net.time2, net.layer1, net.layer2, net.layer3, net.out)
        for number, layer in enumerate(linears):
            set_linear(layer, number, phase)
        for number, norm in enumerate((net.norm1, net.norm2, net.norm3), 2):
            for parameter, value in zip((norm.weight, norm.bias), scale_offset(256, number, phase)):
                parameter.copy_(value)
    for net, phase in ((agent.actor, 0), (agent.actor_target, 0.25)):
        for number, layer in enumerate((*net.layers, net.out)):
            set_linear(layer, number, phase)
        net.log_std.copy_(
            -0.3 + 0.2 * torch.sin(torch.arange(A, dtype=torch.float64) + 0.9 * phase)
        )
    for net, shift in ((agent.critic, 0), (agent.critic_target, 0.25)):
        for number, (weight, offset) in enumerate(zip(net.weights, net.biases)):
            for head in range(2):
                weight[head].copy_(kernel(weight.shape[1], weight.shape[2], number, head + shift))
                offset[head, 0].copy_(bias(weight.shape[2], number, head + shift))


def reference_agent(rule: str = "mujoco", stage: str = "policy", **changes) -> qdq.QDQ:
    fields = {"num_samples": K, "batch_size": B, "teacher_steps": 4, "student_steps": 10}
    fields |= {"total_steps": 4, "max_grad_norm": 1.0}
    agent = qdq.QDQ(S, A, qdq.Args(**fields | RULES[rule] | changes))
    set_weights(agent)
    agent.q_range.copy_(torch.tensor([40.0, 60.0]))
    agent.step = STAGE_BEGIN[stage]
    return agent


def cast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x if x.dtype == torch.int64 else x.to(torch.get_default_dtype()) for x in tensors]


def batch() -> qdq.Batch:
    k, a, b = torch.arange(S), torch.arange(A), COLUMN
    columns = (
        torch.sin(b + 0.5 * k),
        0.9 * torch.cos(0.3 * b + a),
        0.1 * b[:, 0],
        torch.cos(b + 0.5 * k),
    )
    return qdq.Batch(*cast(*columns, (torch.arange(B) < 7).double()))


def windows() -> qdq.Windows:
    one = batch()
    return qdq.Windows(one.obs, one.act, *cast(0.8 * torch.sin(1.3 * COLUMN + 0.2)))


def teacher_draws() -> list[torch.Tensor]:
    """The normals behind ln t, and z."""
    return cast(1.1 * torch.cos(0.9 * COLUMN), 1.2 * torch.sin(0.7 * COLUMN + 0.5))


def student_draws() -> list[torch.Tensor]:
    return [998 - 141 * torch.arange(B), teacher_draws()[1]]


class Draws(NamedTuple):
    """The random numbers of one policy update, all standard normal."""

    next_noise: torch.Tensor  # [B, A]
    smoothing: torch.Tensor  # [B, A]
    return_noise: torch.Tensor  # [B, K]
    act_noise: torch.Tensor  # [M, B, A]

    def of_targets(self) -> tuple[torch.Tensor, ...]:
        return self[:3]


def draws() -> Draws:
    a, q = torch.arange(A), torch.arange(B * K, dtype=torch.float64).view(B, K)
    row = 30 * COLUMN + torch.arange(M)  # [B, M]
    actions = 1.2 * torch.sin(0.37 * row[..., None] + 2.1 * a).transpose(0, 1)
    normal = 1.1 * torch.cos(1.1 * COLUMN + 0.7 * a)
    smoothing = 3 * torch.sin(0.9 * COLUMN + 1.3 * a)
    return Draws(*cast(normal, smoothing, 1.5 * torch.cos(0.53 * q), actions))


def update(agent: qdq.QDQ, stage: str) -> dict[str, torch.Tensor]:
    """agent.update, which draws the given numbers; each must be asked for in its shape."""
    normal = {"teacher": teacher_draws(), "student": student_draws()[1:], "policy": list(draws())}
    normal = normal[stage]
    even = (agent.step - STAGE_BEGIN[stage]) % 2 == 0
    if stage == "policy" and not (even and agent.args.actor_objective == "awr"):
        normal.pop()

    def randn(*shape, device):
        numbers = normal.pop(0)
        assert numbers.shape == shape
        return numbers

    def randint(low, high, shape, device):
        assert (low, high, shape) == (1, 999, (B,)) and stage == "student"
        return student_draws()[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", randn)
        patch.setattr(torch, "randint", randint)
        metrics = agent.update(stage, batch() if stage == "policy" else windows())
    assert not normal
    assert all(not value.requires_grad for value in metrics.values())
    return metrics


def close(value, expected, relative: float = 1e-6, absolute: float = 0.0) -> None:
    """expected may have ten printed decimals: the absolute tolerance is at least half of one."""
    value, expected = (
        torch.as_tensor(value).detach().double().flatten(),
        torch.as_tensor(expected, dtype=torch.float64).flatten(),
    )
    torch.testing.assert_close(value, expected, rtol=relative, atol=max(absolute, relative / 20))


def sums(net: torch.nn.Module) -> tuple[float, float]:
    """Sum and sum of squares of all parameters but the frequencies, which are never trained."""
    flat = torch.cat(
        [
            p.detach().double().flatten()
            for name, p in net.named_parameters()
            if name != "frequencies"
        ]
    )
    return flat.sum().item(), flat.square().sum().item()


def gradient_norm(net: torch.nn.Module) -> float:
    return math.sqrt(
        sum(p.grad.double().square().sum().item() for p in net.parameters() if p.grad is not None)
    )


# ---------------------------------------------------------------- Q dataset


def test_worked_example_of_the_windows():
    def returns(*lengths_and_rewards):
        rew = np.concatenate([np.array(r, float) for r in lengths_and_rewards])
        ends = np.concatenate([np.arange(len(r)) == len(r) - 1 for r in lengths_and_rewards])
        return qdq.truncated_returns(rew, ends, 4, 2, 0.9)

    rows, q = returns([1, 2, 0, 3, 1, 4, 2], [1, 1, -2])
    assert rows.tolist() == [0, 2, 4, 7]
    np.testing.assert_allclose(q, [4.987, 6.426, 6.220, 0.280], rtol=1e-12)
    np.testing.assert_allclose(
        2 * (q - q.min()) / (q.max() - q.min()) - 1, [0.5317, 1.0, 0.9330, -1.0], atol=5e-5
    )
    np.testing.assert_allclose(returns([1, 2, 0, 3, 1, 4, 2, 5])[1][-1], 9.865, rtol=1e-12)


LENGTHS = [
    (150, 1, 150),
    (200, 1, 200),
    (201, 2, 191),
    (210, 2, 200),
    (457, 27, 197),
    (999, 81, 199),
    (1000, 81, 200),
]


@pytest.mark.parametrize("length, count, tail", LENGTHS)
def test_number_of_windows(length, count, tail):
    rows, q = qdq.truncated_returns(np.ones(length), np.arange(length) == length - 1, 200, 10, 1.0)
    assert (
        rows.tolist() == list(range(0, 10 * count, 10)) and q[-1] == tail and (q[:-1] == 200).all()
    )


def test_check_numbers_of_the_q_dataset(tmp_path):
    lengths, k = (457, 200, 201, 150, 1000, 1, 210), np.arange(S)
    columns = {key: [] for key in ("observations", "next_observations", "rewards", "terminals")}
    for j, length in enumerate(lengths):
        t = np.arange(length + 1)[:, None]
        obs = np.sin(0.01 * t + j + 0.5 * k)
        columns["observations"].append(obs[:-1])
        columns["next_observations"].append(obs[1:])
        columns["rewards"].append(((7 * t[:-1, 0] + 3 * j) % 11) / 8 - 0.25)
        columns["terminals"].append((np.arange(length) == length - 1) & (j in (1, 2, 3, 5)))
    raw = {key: np.concatenate(parts).astype(np.float32) for key, parts in columns.items()}
    raw |= {
        "actions": np.zeros((sum(lengths), A), np.float32),
        "timeouts": np.zeros(sum(lengths), bool),
    }
    raw["terminals"] = raw["terminals"].astype(bool)
    arrays, _ = common.load_dataset(
        "hopper-medium", str(write_hdf5(tmp_path / "q.hdf5", raw)), need_env=False
    )
    _, q = qdq.truncated_returns(arrays["rew"], arrays["ends"], 200, 10, 0.99)
    assert len(q) == 115 and q.argmin() == 112 and q.argmax() == 8
    expected = {
        0: 32.31077474,
        1: 32.15392969,
        2: 32.61588531,
        -3: 0.25,
        -2: 32.90658808,
        -1: 32.31077474,
    }
    expected |= {
        26: 31.92926788,
        27: 32.74299773,
        29: 32.56132643,
        30: 29.26877537,
        111: 32.27854183,
        112: 0.25,
    }
    expected |= {114: 32.31077474, 8: 33.01513895}
    np.testing.assert_allclose(q[list(expected)], list(expected.values()), rtol=1e-9)
    assert q.sum() == pytest.approx(3697.7700782, rel=1e-10)
    x = 2 * (q - q.min()) / (q.max() - q.min()) - 1
    np.testing.assert_allclose(x[[0, 1, 2]], [0.95700527, 0.94743137, 0.97562936], atol=5e-9)
    np.testing.assert_allclose(x[-3:], [-1, 0.99337400, 0.95700527], atol=5e-9)
    assert x.sum() == pytest.approx(108.9587681, rel=1e-9)


def slow_windows(rew: np.ndarray, ends: np.ndarray) -> tuple[list[int], list[float]]:
    """One trajectory and one window after the other, straight from the rule."""
    rows, returns, first = [], [], 0
    for last in np.flatnonzero(ends):
        length, start = last + 1 - first, 0
        while True:
            whole = length > 200 and start + 200 < length
            window = (
                rew[first + start : first + start + 200] if whole else rew[first + start : last + 1]
            )
            rows.append(first + start)
            returns.append(float(np.dot(0.99 ** np.arange(len(window)), window.astype(np.float64))))
            if not whole:
                break
            start += 10
        first = last + 1
    return rows, returns


@pytest.mark.parametrize("source", ["random", "bundled"])
def test_windows_agree_with_a_slow_loop(source):
    if source == "random":
        rng = np.random.default_rng(0)
        rew, ends = rng.normal(size=20_000), rng.random(20_000) < 1 / 250
        ends[-1] = True
    else:
        arrays, _ = common.load_dataset("hopper-medium-replay", "bundled", need_env=False)
        rew, ends = arrays["rew"], arrays["ends"]
    rows, q = qdq.truncated_returns(rew, ends, 200, 10, 0.99)
    slow_rows, slow_q = slow_windows(rew, ends)
    assert rows.tolist() == slow_rows
    np.testing.assert_allclose(q, slow_q, rtol=1e-10, atol=1e-12)


Q_RANGES = {
    "halfcheetah-medium-v2": (-36.69315, 524.7129),
    "halfcheetah-medium-replay-v2": (-76.832146, 492.48297),
    "halfcheetah-medium-expert-v2": (-50.62466, 1076.0223),
    "hopper-medium-v2": (115.09845, 334.08118),
    "hopper-medium-replay-v2": (-0.6511922, 330.22455),
    "hopper-medium-expert-v2": (138.31244, 396.26437),
    "walker2d-medium-v2": (-16.571163, 474.80557),
    "walker2d-medium-replay-v2": (-31.768223, 434.36954),
    "walker2d-medium-expert-v2": (-16.571163, 478.14096),
} | {
    task: (-86.602036, 0.0)
    for task in common.D4RL_SHA256
    if task.startswith("antmaze") and task.endswith("-v0")
}


@pytest.mark.parametrize("task", Q_RANGES)
def test_range_of_the_truncated_returns_on_d4rl(task):
    cache = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
    if not (cache / common.d4rl_path(task).split("/")[-1]).exists():
        pytest.skip(f"D4RL's {task} is not in {cache}")
    arrays, _ = common.load_dataset(task, "d4rl", need_env=False)
    _, q = qdq.truncated_returns(
        arrays["rew"] - task.startswith("antmaze"), arrays["ends"], 200, 10, 0.99
    )
    np.testing.assert_allclose([q.min(), q.max()], Q_RANGES[task], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- teacher check numbers


def check_teacher(relative: float) -> None:
    agent = reference_agent(stage="teacher")
    (obs, act, x), (log_t, z) = windows(), teacher_draws()
    t = torch.exp(-1.2 + 1.2 * log_t)
    close(t[:3], (1.127496852, 0.684220639, 0.223150965), max(relative, 1e-8))
    with torch.no_grad():
        d = qdq.denoise(agent.teacher, obs, act, x + t * z, t, agent.args)
        close(d[:4], (0.191804260, 0.830978454, 0.682649339, -0.477187244), relative)
        close(d.sum(), 0.6488608931, relative, relative)
        for level, expected in (
            (80.0, (0.312347701, 0.653478652, 0.795896639)),
            (0.002, (0.161361457, 0.800457283, 0.271841057)),
        ):
            level = torch.full((1, 1), level)
            d = qdq.denoise(agent.teacher, obs, act, x, level, agent.args)
            close(d[:3], expected, relative)
    close(sums(agent.teacher), (877.38706698, 1191.60728788), relative)
    for loss, norm, *expected in (
        (1.9964585329, 23.9508471867, 877.48455894, 1191.76723856),
        (0.7148091283, 10.8426106315, 877.72472099, 1191.92851715),
        (0.2979517013, 5.8837593921, 877.88614750, 1192.02834818),
    ):
        close(update(agent, "teacher")["teacher_loss"], loss, relative)
        close(gradient_norm(agent.teacher), norm, relative)
        close(sums(agent.teacher), expected, relative)


def test_teacher_check_numbers(float64):
    check_teacher(1e-6)


def test_teacher_check_numbers_in_single_precision():
    check_teacher(1e-4)


# ---------------------------------------------------------------- student check numbers


def test_noise_levels():
    grid = qdq.karras_grid(1000, 0.002, 80.0, 7.0)[:, 0]
    places, levels = zip(*STUDENT_LEVELS.items())
    close(grid[list(places)], levels)
    assert (grid.diff() < 0).all() and grid.float()[-1] == torch.tensor(0.002)


STUDENT_LEVELS = {
    0: 80,
    1: 79.56383,
    2: 79.12969,
    250: 17.49811,
    500: 2.503974,
    750: 0.1680835,
    998: 0.002050197,
    999: 0.002,
}
X_T = (
    0.1601150,
    0.8368893,
    0.5627393,
    0.1093362,
    -1.4546422,
    -11.4692247,
    -38.8559502,
    -69.7394636,
)
X_H = (
    0.1601749,
    0.8373553,
    0.5663458,
    0.1160162,
    -1.4452451,
    -11.3899226,
    -38.6165626,
    -69.3536267,
)
STEP = (
    0.000059923,
    0.000466044,
    0.003606513,
    0.006679973,
    0.009397044,
    0.079302085,
    0.239387657,
    0.385836923,
)
F_ONLINE = (
    0.16016305,
    0.86140600,
    0.84304964,
    0.63901590,
    0.71436482,
    0.23715858,
    0.47532582,
    0.86427063,
)
F_TARGET = (
    0.16017489,
    0.86396063,
    0.95218781,
    0.63508545,
    0.34079228,
    0.11109801,
    -0.18407885,
    0.75856645,
)
# loss, gradient norm, student's sums, target's sums, first frequency of the target
STUDENT_UPDATES = {
    1: (
        0.0766710907,
        2.4485790820,
        816.47098538,
        1190.53161530,
        792.79854855,
        1189.26937839,
        4.997620,
    ),
    2: (
        0.0724325553,
        2.3653119400,
        816.46746325,
        1190.53132314,
        792.79854855,
        1189.26937839,
        4.997620,
    ),
    3: (
        0.0702331695,
        2.3233312158,
        816.46425074,
        1190.53105889,
        792.79854855,
        1189.26937839,
        4.997620,
    ),
    6: (
        0.0652017592,
        2.2238629667,
        816.47003552,
        1190.53117246,
        792.91690599,
        1189.17097830,
        5.013872,
    ),
    7: (
        0.0618139545,
        2.1599469906,
        816.47947173,
        1190.53162065,
        792.91690599,
        1189.17097830,
        5.013872,
    ),
}


def check_student(relative: float) -> None:
    agent = reference_agent(stage="student")
    (obs, act, x), (i, z), small = windows(), student_draws(), max(relative / 10, 1e-7)
    args = agent.args
    t, t_next = agent.grid[i], agent.grid[i + 1]
    x_t = x + t * z
    with torch.no_grad():
        for level, expected, total in (
            (torch.tensor([[80.0]]), (0.341461035, 0.617844853, 1.002033009), 3.9420896087),
            (agent.grid[500][None], (0.065397474, 0.634125538, 0.690070347), 2.0578915030),
        ):
            f = qdq.consistency_fn(agent.student, obs, act, level * x, level, args)
            close(f[:3], expected, relative)
            close(f.sum(), total, relative)
        f = qdq.consistency_fn(agent.student, obs, act, x, torch.tensor([[0.002]]), args)
        assert torch.equal(f, x)
        close(f[:3], (0.158935465, 0.797995989, 0.267990520), relative)
        close(f.sum(), 1.1670187677, relative)
        close(t[:3], (0.002050197, 0.034774386, 0.259562465), relative)
        x_h = qdq.heun_step(agent.teacher, obs, act, x_t, t, t_next, args)
        for value, expected in ((x_t, X_T), (x_h, X_H), (x_h - x_t, STEP)):
            close(value, expected, relative, small)
        f = qdq.consistency_fn(agent.student, obs, act, x_t, t, args)
        close(f, F_ONLINE, relative)
        f = qdq.consistency_fn(agent.student_target, obs, act, x_h, t_next, args)
        close(f, F_TARGET, relative)
    close(
        sums(agent.student) + sums(agent.student_target),
        (816.47468652, 1190.53192473, 792.67959158, 1189.36933186),
        relative,
    )
    close(agent.student_target.frequencies[0], 4.981286, relative)
    for number in range(1, 8):
        loss = update(agent, "student")["student_loss"]
        if number in STUDENT_UPDATES:
            expected_loss, norm, *expected, frequency = STUDENT_UPDATES[number]
            # PyTorch's RAdam places eps elsewhere: the last loss moves by 8e-8, gradients alike
            close(loss, expected_loss, relative, 1e-7)
            close(gradient_norm(agent.student), norm, 2 * relative)
            close(sums(agent.student) + sums(agent.student_target), expected, relative)
            close(agent.student_target.frequencies[0], frequency, relative)


def test_student_check_numbers(float64):
    check_student(1e-6)


def test_student_check_numbers_in_single_precision():
    check_student(1e-4)


# ---------------------------------------------------------------- policy check numbers

H = {
    "mujoco": (
        3.8609527,
        0.7840498,
        0.7984599,
        2.2258421,
        0.6709309,
        2.6349382,
        3.0571603,
        2.6287366,
    ),
    "awr": (4.0980241, 0.3984965, 0.8329746, 1.9773998, 0.5903256, 2.7251897, 3.3647688, 3.4972473),
}
H["diverse"] = H["mujoco"]
Q_NEXT = {
    "mujoco": (
        0.74018585,
        0.38706707,
        0.10115048,
        -0.15235610,
        -0.09681506,
        0.58270063,
        0.74253984,
        0.61945588,
    ),
    "awr": (
        0.73458389,
        0.38953355,
        0.13557364,
        -0.15768990,
        -0.16820296,
        0.58233532,
        0.73035978,
        0.68123120,
    ),
}
MULTIPLIER = {
    "mujoco": (0.2590034, 0.8, 0.8, 0.8, 0.8, 0.8, 0.3271009, 0.8),
    "diverse": (0.2590034, 1, 1, 1, 1, 1, 1, 1),
    "awr": (1.0755980, 1, 1, 1, 1, 1, 1, 1),
}
THRESHOLD = {
    "mujoco": (2.8882714237, [0, 6]),
    "diverse": (3.2982979921, [0]),
    "awr": (3.6774803609, [0]),
}
TARGETS = {  # y_H, y_L, blended
    "mujoco": (
        (0.7327840, 0.4831964, 0.3001390, 0.1491675, 0.3041531, 1.0768736, 1.3351144, 0.7),
        (0.1897936, 0.4065571, 0.2801112, 0.1793340, 0.3233225, 0.9614989, 0.8404566, 0.7),
        (0.5970364, 0.4640366, 0.2951320, 0.1567091, 0.3089454, 1.0480299, 1.2114500, 0.7),
    ),
    "diverse": (
        (0.7327840, 0.4831964, 0.3001390, 0.1491675, 0.3041531, 1.0768736, 1.3351144, 0.7),
        (0.1897936, 0.4831964, 0.3001390, 0.1491675, 0.3041531, 1.0768736, 1.3351144, 0.7),
        (0.1952235, 0.4831964, 0.3001390, 0.1491675, 0.3041531, 1.0768736, 1.3351144, 0.7),
    ),
    "awr": (
        (0.7272381, 0.4856382, 0.3342179, 0.1438870, 0.2334791, 1.0765120, 1.3230562, 0.7),
        (0.7822158, 0.4856382, 0.3342179, 0.1438870, 0.2334791, 1.0765120, 1.3230562, 0.7),
        (0.7409825, 0.4856382, 0.3342179, 0.1438870, 0.2334791, 1.0765120, 1.3230562, 0.7),
    ),
}
UPDATES = {  # per update; those of the actor after updates 1 and 3
    "mujoco": {
        "critic": (1.1447683604, 1.0247708249, 0.9187236707),
        "parts": (
            (1.2257705703, 0.9017617308),
            (1.1018892914, 0.7934154255),
            (0.9918861597, 0.6992362035),
        ),
        "norm": (3.6939347408, 3.2424051022, 2.8457472776),
        "h": (2.0826337851, 2.0828662606, 2.0828662606),
        "actor": (2.8124087776, 2.6866658463),
        "log_prob": (-3.7953358229, -3.6835698056),
        "value": (0.2238598807, 0.2601899982),
        "actor_norm": (4.0407593516, 4.0408102212),
        "sums": (
            (
                94.61227927,
                772.60919040,
                77.96534359,
                772.27080789,
                63.78453126,
                387.61180170,
                61.03960080,
                387.90372866,
            ),
            (
                93.43011881,
                772.54281303,
                77.96534359,
                772.27080789,
                63.78453126,
                387.61180170,
                61.03960080,
                387.90372866,
            ),
            (
                92.72274632,
                772.52292356,
                78.03913061,
                772.08020979,
                63.50736976,
                387.59761625,
                61.05193965,
                387.80633285,
            ),
        ),
        "log_std": ((-0.3003000, -0.1314058, -0.1178405),) * 2
        + ((-0.3005562, -0.1311814, -0.1175886),),
    },
    "diverse": {
        "critic": (1.2012829841, 1.0800994884, 0.9734985717),
        "parts": (
            (1.2257705703, 1.2010356348),
            (1.1036974400, 1.0798611252),
            (0.9956816799, 0.9732744999),
        ),
        "norm": (3.7831554850, 3.3057309335, 2.8873709847),
        "h": (2.0826337851, 2.0828660628, 2.0828660628),
        "actor": (5.4711803458, 5.2730471956),
        "log_prob": (-3.7953358229, -3.6835189792),
        "value": (0.2218233885, 0.2522312733),
        "actor_norm": (7.5511405103, 7.4869055809),
        "sums": (
            (
                94.92751540,
                772.60176100,
                77.96691977,
                772.27075283,
                63.67869320,
                387.60919112,
                61.03907161,
                387.90371482,
            ),
            (
                93.72630179,
                772.51710316,
                77.96691977,
                772.27075283,
                63.67869320,
                387.60919112,
                61.03907161,
                387.90371482,
            ),
            (
                92.72177061,
                772.47994640,
                78.04069403,
                772.07988528,
                63.35345525,
                387.59513415,
                61.05064353,
                387.80630509,
            ),
        ),
        "log_std": ((-0.3003000, -0.1314058, -0.1178405),) * 2
        + ((-0.3005562, -0.1311814, -0.1175886),),
    },
    "awr": {
        "critic": (1.2034571063, 1.0815197904, 0.9730389605),
        "parts": (
            (1.2008144330, 1.2113851264),
            (1.0790238991, 1.0890074642),
            (0.9706953435, 0.9800698113),
        ),
        "norm": (3.6879140604, 3.2604495716, 2.8882593752),
        "h": (2.1855533097, 2.1860169006, 2.1860169006),
        "actor": (9.6064383900, 13.5627570424),
        "log_prob": (-3.7953358229, -3.6868165179),
        "value": (0.20424425, None),  # the mean of AWR_VALUE
        "actor_norm": (11.2118974330, 16.5856380552),
        "sums": (
            (
                94.65840667,
                772.61611414,
                77.96557423,
                772.27085638,
                63.44588241,
                387.61617079,
                61.03790756,
                387.90376047,
            ),
            (
                93.62093425,
                772.55477845,
                77.96557423,
                772.27085638,
                63.44588241,
                387.61617079,
                61.03790756,
                387.90376047,
            ),
            (
                93.12662900,
                772.54464450,
                78.04137950,
                772.08039725,
                62.79297626,
                387.60540494,
                61.04668290,
                387.80642788,
            ),
        ),
        "log_std": ((-0.2997000, -0.1314058, -0.1178405),) * 2
        + ((-0.2994536, -0.1311537, -0.1175847),),
    },
}
AWR_VALUE = (
    0.22245595,
    0.44959652,
    0.54542125,
    0.25627615,
    -0.15531752,
    -0.21306772,
    0.11103294,
    0.41755640,
)
AWR_WEIGHT = (
    1.0624749,
    2.0627851,
    1.5219879,
    1.2753924,
    0.9041255,
    1.0716257,
    0.4149906,
    7.5843295,
)


def record(function, calls: list):
    """The function, which also notes arguments and result of every call."""

    def recorded(*args):
        calls.append((args, function(*args)))
        return calls[-1][1]

    return recorded


def check_quantities(monkeypatch, rule: str, relative: float) -> None:
    """Everything between the next action and the target, before any update."""
    agent, samples, multipliers, values = reference_agent(rule, compile=False), [], [], []
    monkeypatch.setattr(qdq, "sample_returns", record(qdq.sample_returns, samples))
    monkeypatch.setattr(qdq, "multiplier", record(qdq.multiplier, multipliers))
    agent.critic_target.forward = record(agent.critic_target.forward, values)
    y_high, y_low, metrics = agent.td_targets(batch(), *draws().of_targets())
    next_act = samples[0][0][2]
    if rule == "awr":
        close(next_act.sum(), 11.93958272, relative)
    else:
        close(next_act[:2], (1, 1, 0.8689288, 1, 0.8196670, -0.8588323), relative)
        close(next_act.sum(), 8.92586420, relative)
        assert (next_act.abs() == 1).sum() == 12
        close(samples[0][1][0], (53.738976, 53.856884, 55.212540, 61.670275, 62.455556), relative)
        close(metrics["sampled_return"], 56.0877661, relative)
    assert ((0.2 * draws().smoothing).abs() > 0.5).sum() == 7
    (h, _), m = multipliers[0]
    close(h, H[rule], relative, relative)
    threshold, in_u = THRESHOLD[rule]
    close(torch.quantile(h, agent.args.beta), threshold, relative)
    assert (h > torch.quantile(h, agent.args.beta)).nonzero().flatten().tolist() == in_u
    close(m, MULTIPLIER[rule], relative, 1e-7)
    q = values[0][1].amin(0)
    close(q, Q_NEXT["awr" if rule == "awr" else "mujoco"], relative)
    target = agent.args.alpha * y_high + (1 - agent.args.alpha) * y_low
    for value, expected in zip((y_high, y_low, target), TARGETS[rule]):
        close(value, expected, relative, 1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_policy_check_numbers_before_any_update(monkeypatch, float64, rule):
    check_quantities(monkeypatch, rule, 1e-6)


def test_policy_check_numbers_before_any_update_in_single_precision(monkeypatch):
    check_quantities(monkeypatch, "mujoco", 1e-4)


def test_online_networks_at_the_data(float64):
    agent, one = reference_agent(), batch()
    mean, std = agent.actor_target(one.next_obs)
    close(mean[0], (0.92327552, 0.78570343, 0.39729951))
    q = agent.critic(one.obs, one.act)
    close(q[:, 0], (0.17248545, 0.56787942))
    close(q.mean(), 0.45641269)
    mean, std = agent.actor(one.obs)
    close(mean[0], (0.61356184, 0.79301260, 0.85258644))
    log_prob = torch.distributions.Normal(mean, std).log_prob(one.act).sum(1)
    close(log_prob[:3], (-3.2965245, -3.5179549, -2.8607910))
    close(
        sums(agent.actor) + sums(agent.actor_target),
        (65.51410961, 387.64756090, 61.02580718, 388.00237861),
    )
    close(
        sums(agent.critic) + sums(agent.critic_target),
        (96.46726808, 772.73205761, 77.88169065, 772.46310689),
    )


def check_updates(monkeypatch, rule: str, relative: float) -> None:
    agent, expected, norms, actor_number = reference_agent(rule), UPDATES[rule], [], 0
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args)))
    for number in range(3):
        blend = agent.args.alpha
        metrics = update(agent, "policy")
        close(metrics["critic_loss"], expected["critic"][number], relative)
        high, low = expected["parts"][number]
        close(metrics["loss_high"], high, relative)
        close(metrics["loss_low"], low, relative)  # the printed parts make the printed mixture
        assert blend * high + (1 - blend) * low == pytest.approx(
            expected["critic"][number], rel=1e-8
        )
        close(norms[number], expected["norm"][number], relative)
        close(metrics["uncertainty"], expected["h"][number], relative)
        if number != 1:
            close(metrics["actor_loss"], expected["actor"][actor_number], relative)
            close(metrics["log_prob"], expected["log_prob"][actor_number], relative)
            if expected["value"][actor_number] is not None:
                close(metrics["policy_value"], expected["value"][actor_number], max(relative, 1e-6))
            close(gradient_norm(agent.actor), expected["actor_norm"][actor_number], relative)
            actor_number += 1
        nets = (agent.critic, agent.critic_target, agent.actor, agent.actor_target)
        close([value for net in nets for value in sums(net)], expected["sums"][number], relative)
        close(agent.actor.log_std, expected["log_std"][number], relative, 1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_policy_check_numbers_of_three_updates(monkeypatch, float64, rule):
    check_updates(monkeypatch, rule, 1e-6)


def test_policy_check_numbers_of_three_updates_in_single_precision(monkeypatch):
    check_updates(monkeypatch, "mujoco", 1e-4)


def test_check_numbers_of_the_advantage_weights(monkeypatch, float64):
    agent, one, calls = reference_agent("awr", compile=False), batch(), []
    *targets, _ = agent.td_targets(one, *draws().of_targets())
    qdq.gradient_step(agent.critic_adam, agent.critic_loss(one, *targets)[0], 1.0)
    monkeypatch.setattr(agent.critic, "forward", record(agent.critic.forward, calls))
    loss, _ = agent.awr_loss(one, draws().act_noise)
    value = calls[0][1].amin(0).view(M, B).mean(0)
    close(value, AWR_VALUE)
    weight = torch.exp(6 * (calls[1][1].amin(0) - value))
    close(weight, AWR_WEIGHT, 1e-6, 1e-7)
    log_prob = torch.distributions.Normal(*agent.actor(one.obs)).log_prob(one.act).sum(1)
    torch.testing.assert_close(loss, -(weight * log_prob).mean())
    huge = one._replace(
        act=one.act * 0 + 1e4
    )  # an advantage beyond the cap, whose weight is then 100
    monkeypatch.setattr(agent.critic, "forward", lambda obs, act: act.sum(1).expand(2, -1))
    loss, _ = agent.awr_loss(huge, draws().act_noise)
    log_prob = torch.distributions.Normal(*agent.actor(one.obs)).log_prob(huge.act).sum(1)
    torch.testing.assert_close(loss, -(100 * log_prob).mean())


@torch.no_grad()
def test_layer_norm_of_the_critics(float64):
    agent, one = reference_agent(critic_layer_norm=True), batch()
    for number, (scales, offsets) in enumerate(zip(agent.critic.scales, agent.critic.offsets)):
        for head in range(2):
            scale, offset = scale_offset(256, number, head)
            scales[head, 0].copy_(scale)
            offsets[head, 0].copy_(offset)
    q = agent.critic(one.obs, one.act)
    close(q[:, 0], (1.94665193, 4.49993037))
    close(q.sum(), 55.2870861806)


# ---------------------------------------------------------------- closed forms and rules


def test_group_norm_has_32_groups_of_its_own_mean_and_variance(float64):
    net = qdq.ReturnNetwork(3, 1, 64)
    obs, act, x, t = torch.randn(10, 3), torch.randn(10, 1), torch.randn(10, 1), torch.rand(10, 1)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    angle = 2 * math.pi * net.frequencies * t.log() / 4
    silu = torch.nn.functional.silu
    code = silu(net.time2(silu(net.time1(torch.cat([angle.sin(), angle.cos()], 1)))))
    h = torch.cat([obs, act, x, code], 1)
    for layer, norm in zip((net.layer1, net.layer2, net.layer3), (net.norm1, net.norm2, net.norm3)):
        groups = layer(h).view(10, 32, 2)
        centred = groups - groups.mean(2, keepdim=True)
        groups = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
        h = silu(groups.view(10, 64) * norm.weight + norm.bias)
    torch.testing.assert_close(net(obs, act, x, t), net.out(h), rtol=1e-10, atol=1e-10)


def test_samples_in_pieces_equal_the_student_row_by_row(float64):
    torch.manual_seed(0)
    net, args = qdq.ReturnNetwork(3, 1, 256), qdq.Args()
    obs, act, noise = torch.randn(100, 3), torch.randn(100, 1), torch.randn(100, 5)  # two pieces
    many = qdq.sample_returns(net, obs, act, noise, torch.tensor([-1.0, 1.0]), args)
    torch.testing.assert_close(many, qdq.one_step_samples(net, obs, act, noise, args))
    for sample in range(5):
        x, t = 80 * noise[:, sample, None], torch.full((100, 1), 80.0)
        one = qdq.consistency_fn(net, obs, act, x, t, args)[:, 0]
        torch.testing.assert_close(many[:, sample], one, rtol=1e-12, atol=1e-12)


def test_a_teacher_without_output_is_the_skip_connection(float64):
    agent = qdq.QDQ(3, 1, qdq.Args(hidden_dim=64))
    torch.nn.init.zeros_(agent.teacher.out.weight)
    obs, act, x, t = torch.randn(6, 3), torch.randn(6, 1), torch.randn(6, 1), torch.rand(6, 1)
    t = t + 0.01
    d = qdq.denoise(agent.teacher, obs, act, x, t, agent.args)
    torch.testing.assert_close(d, 0.25 / (t**2 + 0.25) * x)
    one = qdq.Windows(torch.zeros(1, 3), torch.zeros(1, 1), torch.ones(1, 1))
    loss = agent.teacher_loss(one, torch.full((1, 1), 0.5), torch.ones(1, 1))
    # the weight at t = 0.5 is 8
    torch.testing.assert_close(loss, torch.tensor(8.0) * (0.5 * 1.5 - 1) ** 2)


@torch.no_grad()
def test_the_student_is_the_identity_at_t_min_and_smooth_in_t(float64):
    net, x = qdq.ReturnNetwork(3, 1, 256), torch.randn(6, 1)
    obs, act, args = torch.randn(6, 3), torch.randn(6, 1), qdq.Args()

    def f(t):
        return qdq.consistency_fn(net, obs, act, x, torch.as_tensor(t).view(1, 1), args)

    assert torch.equal(f(0.002), x)
    assert (f(0.002 + 1e-6) - x).abs().max() < 1e-4
    path = torch.stack([f(t) for t in torch.linspace(0.5, 0.6, 1001)])
    assert path.diff(dim=0).abs().max() < 0.1  # steps of 1e-4 in t


class GaussianTeacher(torch.nn.Module):
    """The network whose denoiser is the exact one of N(0.3, 0.4^2)."""

    def forward(self, obs, act, x_in, t):
        total = (t**2 + 0.25).sqrt()
        x = x_in * total
        denoised = (0.4**2 * x + t**2 * 0.3) / (0.4**2 + t**2)
        return (denoised - 0.25 / total**2 * x) * total / (t * 0.5)


def test_one_heun_step_on_a_gaussian(float64):
    mean, std = 0.3, 0.4  # x - mean scales with sqrt(std^2 + t^2)
    grid, x = qdq.karras_grid(1000, 0.002, 80.0, 7.0), torch.tensor([[1.7]])

    def step(x, t, t_next):
        nothing = torch.zeros(1, 0)
        return qdq.heun_step(GaussianTeacher(), nothing, nothing, x, t, t_next, qdq.Args())

    for i in (1, 300, 600, 900, 998):
        t, t_next = grid[i : i + 1], grid[i + 1 : i + 2]
        exact = mean + (x - mean) * ((std**2 + t_next**2) / (std**2 + t**2)).sqrt()
        fine, levels = x, torch.linspace(t.item(), t_next.item(), 201)[:, None, None]
        for a, b in zip(levels, levels[1:]):
            fine = step(fine, a, b)
        one = step(x, t, t_next)
        torch.testing.assert_close(fine, exact, rtol=1e-9, atol=1e-10)
        assert (one - exact).abs() < 1e-5 and (one - exact).abs() < 0.02 * (x - exact).abs()


class MixtureTeacher(torch.nn.Module):
    """The network whose denoiser is the exact one of `centres`, each with spread 0.15."""

    def centres(self, obs, act):  # [B, 2], of equal weight
        return torch.cat([-0.2 + 0.3 * obs, 0.4 + 0.2 * act], 1)

    def forward(self, obs, act, x_in, t):
        total = (t**2 + 0.25).sqrt()
        x, variance, centres = x_in * total, 0.15**2 + t**2, self.centres(obs, act)
        share = torch.softmax(-((x - centres) ** 2) / (2 * variance), 1)
        mean = (share * (0.15**2 * x + t**2 * centres) / variance).sum(1, keepdim=True)
        return (mean - 0.25 / total**2 * x) * total / (t * 0.5)


def test_the_student_learns_a_known_mixture(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(qdq, "STUDENT_TARGET_EVERY", 1)
    args = qdq.Args(
        grid_points=16, t_max=20.0, teacher_steps=1, student_steps=600,
        student_lr=1e-3, student_tau=0.5,
    )  # fmt: skip
    agent = qdq.QDQ(1, 1, args)
    agent.teacher = MixtureTeacher()
    agent.step = 1
    for _ in range(600):
        cond, side = torch.rand(128, 2) * 2 - 1, torch.randint(0, 2, (128, 1))
        obs, act = cond[:, :1], cond[:, 1:]
        x = agent.teacher.centres(obs, act).gather(1, side) + 0.15 * torch.randn(128, 1)
        i = torch.randint(0, 15, (128,))
        with pytest.MonkeyPatch.context() as patch:  # with t_0, unlike the code
            patch.setattr(torch, "randint", lambda *args, i=i, **kwargs: i)
            agent.update("student", qdq.Windows(obs, act, x))
    obs, act = torch.tensor([[-0.8], [0.8], [-0.8]]), torch.tensor([[-0.8], [0.8], [0.8]])
    samples = qdq.sample_returns(
        agent.student, obs, act, torch.randn(3, 4000), agent.q_range, agent.args
    )
    centres = agent.teacher.centres(obs, act)
    std = (0.15**2 + (centres[:, 0] - centres[:, 1]).square() / 4).sqrt()
    assert (samples.mean(1) - centres.mean(1)).abs().max() < 0.08  # measured: 0.03
    assert (samples.std(1) / std - 1).abs().max() < 0.15  # measured: 0.04


def test_samples_are_in_return_units_and_not_clipped(float64):
    net = qdq.ReturnNetwork(3, 1, 64)
    torch.nn.init.zeros_(net.out.weight)
    torch.nn.init.constant_(net.out.bias, 4.0)
    args, noise = qdq.Args(), torch.zeros(100, 7)
    x = 80 * 0.5 / math.sqrt(80**2 + 0.25) * 4 * (80 - 0.002) / 80
    obs, act, q_range = torch.zeros(100, 3), torch.zeros(100, 1), torch.tensor([40.0, 60.0])
    samples = qdq.sample_returns(net, obs, act, noise, q_range, args)
    torch.testing.assert_close(samples, torch.full((100, 7), 40 + (x + 1) / 2 * 20))
    assert samples.max() > 60


def test_the_standard_deviation_divides_by_the_number_of_samples(monkeypatch, float64):
    agent, calls = reference_agent(compile=False), []
    fixed = torch.tensor([[0.0, 2.0]]).repeat(B, 1) * torch.arange(1, B + 1)[:, None]
    monkeypatch.setattr(qdq, "sample_returns", lambda *args: fixed)
    monkeypatch.setattr(qdq, "multiplier", record(qdq.multiplier, calls))
    agent.td_targets(batch(), *draws().of_targets())
    torch.testing.assert_close(calls[0][0][0], torch.arange(1.0, B + 1))


@pytest.mark.parametrize("beta, rows", [(0.8, 51), (0.9, 26)])
def test_size_of_the_uncertain_set(beta, rows):
    h = torch.randperm(256) + 5.0
    m = qdq.multiplier(h, qdq.Args(beta=beta))
    assert (m != beta).sum() == rows and torch.equal(m[m != beta], 1 / h[m != beta])
    assert torch.equal(
        qdq.multiplier(torch.full((256,), 3.0), qdq.Args(beta=beta)), torch.full((256,), beta)
    )  # strict


@pytest.mark.parametrize("inside", ["inverse", "expand"])
def test_the_multiplier_is_finite_where_the_samples_agree(inside):
    h = torch.tensor([0.0, 0.0, 0.0, 1e-44])  # 1 / 1e-44 is infinite in float32
    assert qdq.multiplier(h, qdq.Args(beta=0.5, inside_multiplier=inside)).isfinite().all()


def test_linear_quantile():
    h = torch.tensor(
        [1.0, 2.0, 3.0, 4.0]
    )  # place 0.5 * 3 = 1.5: 2.5 between the second and the third
    assert (qdq.multiplier(h, qdq.Args(beta=0.5)) == torch.tensor([0.5, 0.5, 1 / 3, 0.25])).all()
    assert (
        qdq.multiplier(h, qdq.Args(beta=0.5, inside_multiplier="expand", outside_multiplier=1.0))[
            :2
        ]
        == 1
    ).all()
    torch.testing.assert_close(
        qdq.multiplier(h, qdq.Args(beta=0.9, inside_multiplier="expand"))[3], torch.tensor(1.075)
    )


def test_the_blended_target_has_the_gradient_of_the_two_losses(float64):
    agent, one = reference_agent(), batch()
    high, low, _ = agent.td_targets(one, *draws().of_targets())
    parameters = list(agent.critic.parameters())
    mixed, metrics = agent.critic_loss(one, high, low)
    target = 0.75 * high + 0.25 * low
    close(metrics["td_target"], target.mean())
    blended = (agent.critic(one.obs, one.act) - target).square().sum(0).mean()
    gap = 2 * 0.75 * 0.25 * (high - low).square().mean()  # once for each critic
    torch.testing.assert_close(blended + gap, mixed)
    gradients = torch.autograd.grad(mixed, parameters)
    for a, b in zip(gradients, torch.autograd.grad(blended, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_without_uncertainty_the_target_is_td3s(float64):
    agent, one = reference_agent(beta=1.0), batch()
    high, low, _ = agent.td_targets(one, *draws().of_targets())
    mean, std = agent.actor_target(one.next_obs)
    smoothing = (0.2 * draws().smoothing).clamp(-0.5, 0.5)
    act = (mean + std * draws().next_noise + smoothing).clamp(-1, 1)
    plain = one.rew + 0.99 * one.not_done * agent.critic_target(one.next_obs, act).amin(0)
    torch.testing.assert_close(high, plain.detach())
    torch.testing.assert_close(low, plain.detach())


@pytest.mark.parametrize("beta, factor", [(0.8, 0.9984), (0.9, 0.9992)])
def test_factor_outside_the_uncertain_set(float64, beta, factor):
    agent, one = reference_agent(alpha=0.992, beta=beta), batch()
    high, low, _ = agent.td_targets(one, *draws().of_targets())
    blended = agent.args.alpha * high + (1 - agent.args.alpha) * low
    ratio = ((blended - one.rew) / (high - one.rew))[:7]
    assert (ratio.sub(factor).abs() < 1e-12).sum() >= 5 and ratio.min() < factor - 1e-4


def test_density_of_the_data_action(float64):
    agent, one = reference_agent(actor_objective="q", gamma_ent=1.0), batch()
    torch.nn.init.zeros_(agent.actor.log_std)
    at_mean = one._replace(act=agent.actor(one.obs)[0].detach())
    _, metrics = agent.actor_loss(at_mean)
    assert metrics["log_prob"].item() == pytest.approx(-1.5 * math.log(2 * math.pi), rel=1e-12)


@pytest.mark.parametrize("task", qdq.PRESETS)
def test_parameter_counts(task):
    args = dataclasses.replace(qdq.Args(env=task), **qdq.PRESETS[task])
    obs_dim, act_dim = {"hopper": (11, 3), "antmaze": (29, 8)}.get(task.split("-")[0], (17, 6))
    agent = qdq.QDQ(obs_dim, act_dim, args)
    student, actor, critics = {
        3: (147273, 135430, 271362),
        6: (149577, 137740, 275970),
        8: (153161, 75536, 151554),
    }[act_dim]
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    assert (
        count(agent.teacher) == count(agent.student) == student
        and agent.student.frequencies.numel() == 8
    )
    assert count(agent.actor) == actor
    assert count(agent.critic) == critics + (2048 if "large" in task else 0)


def test_frequencies_are_fixed_but_averaged():
    agent = qdq.QDQ(2, 1, qdq.Args(hidden_dim=64, teacher_steps=1))
    frozen, other = agent.student.frequencies.clone(), agent.student_target.frequencies.clone()
    assert not torch.equal(frozen, other)
    assert not torch.equal(frozen, agent.teacher.frequencies)
    for stage in ("teacher", "student"):
        agent.update(stage, qdq.Windows(torch.randn(8, 2), torch.randn(8, 1), torch.randn(8, 1)))
    assert torch.equal(agent.student.frequencies, frozen)
    mixture = 0.995 * other + 0.005 * frozen
    torch.testing.assert_close(agent.student_target.frequencies, mixture)


def small_agent(**changes) -> qdq.QDQ:
    """At the beginning of its policy stage."""
    fields = {"hidden_dim": 64, "num_samples": 3, "teacher_steps": 3, "student_steps": 4}
    agent = qdq.QDQ(S, A, qdq.Args(**fields | changes))
    agent.step = 7
    return agent


def test_update_counters():
    agent, one = small_agent(total_steps=20), batch()
    targets = []
    for _ in range(20):
        agent.update("policy", one)
        targets.append(sums(agent.critic_target) + sums(agent.actor_target))
    # they move in every second update, beginning with the first
    assert len(set(targets)) == 10
    assert [targets[i] == targets[i + 1] for i in range(19)] == [True, False] * 9 + [True]
    assert next(iter(agent.actor_adam.state.values()))["step"] == 10
    assert next(iter(agent.critic_adam.state.values()))["step"] == 20
    agent.update("policy", one)
    # of the actor's update 10, at half of its decay
    assert agent.actor_adam.param_groups[0]["lr"] == pytest.approx(1.5e-4)
    assert agent.critic_adam.param_groups[0]["lr"] == 3e-4
    assert agent.step == 28


def test_step_sizes_count_the_updates_of_their_own_stage():
    agent = qdq.QDQ(S, A, qdq.Args(hidden_dim=64, teacher_steps=4, student_steps=8))
    found = {"teacher": [], "student": []}
    for stage, updates in (("teacher", 4), ("student", 8)):
        for _ in range(updates):
            agent.update(stage, windows())
            optimizer = agent.teacher_adam if stage == "teacher" else agent.student_radam
            found[stage].append(optimizer.param_groups[0]["lr"])
    for stage, start in (("teacher", 5e-4), ("student", 4e-4)):
        updates = len(found[stage])
        cosine = [start * (1 + math.cos(math.pi * n / updates)) / 2 for n in range(updates)]
        assert found[stage] == pytest.approx(cosine)


def test_each_stage_changes_its_own_networks_alone():
    agent = small_agent()
    own = {
        "teacher": {"teacher"},
        "student": {"student", "student_target"},
        "policy": {"actor", "actor_target", "critic", "critic_target"},
    }
    agent.step = 0
    for stage, updates in (("teacher", 3), ("student", 4), ("policy", 2)):
        before = {name: sums(getattr(agent, name)) for name in agent.NETWORKS}
        for _ in range(updates):
            metrics = agent.update(stage, batch() if stage == "policy" else windows())
            assert not any(value.requires_grad for value in metrics.values())
            assert set(metrics) <= set(agent.METRICS)
        after = {name: sums(getattr(agent, name)) for name in agent.NETWORKS}
        assert {name for name in before if before[name] != after[name]} == own[stage]


def test_metrics_of_an_update_are_not_changed_by_the_next():
    agent = small_agent()
    first = agent.update("policy", batch())
    values = {name: value.item() for name, value in first.items()}
    for _ in range(3):
        agent.update("policy", batch())
    assert {name: value.item() for name, value in first.items()} == values


def test_without_behaviour_term_the_log_std_is_left_alone():
    agent = small_agent(gamma_ent=0.0)
    for _ in range(4):
        agent.update("policy", batch())
    assert torch.equal(agent.actor.log_std, torch.zeros(A))


def test_ranges_of_the_draws(monkeypatch):
    agent = qdq.QDQ(S, A, qdq.Args(hidden_dim=64, teacher_steps=1))
    given = {}

    def record_draws(name):
        def loss(batch, first, z):
            given[name] = first
            given[f"{name} z"] = z
            return next(getattr(agent, name).parameters()).sum() * 0

        return loss

    for stage in ("teacher", "student"):
        loss = record_draws(stage)
        monkeypatch.setattr(agent, f"{stage}_loss", loss)
    monkeypatch.setattr(qdq, "gradient_step", lambda *args: None)
    torch.manual_seed(0)
    many = qdq.Windows(torch.zeros(200_000, 1), torch.zeros(200_000, 1), torch.zeros(200_000, 1))
    for stage in ("teacher", "student"):
        agent.update(stage, many)
        close(given[f"{stage} z"].mean(), 0, 0, 0.02)
        close(given[f"{stage} z"].std(), 1, 0, 0.02)
    assert given["student"].min() == 1 and given["student"].max() == 998
    close(given["teacher"].log().mean(), -1.2, 0, 0.02)
    close(given["teacher"].log().std(), 1.2, 0, 0.02)


# ---------------------------------------------------------------- whole runs

TINY = "--teacher-steps=12 --student-steps=12 --total-steps=12 --hidden-dim=64 --batch-size=32"
TINY += " --num-samples=4 --log-every=4 --no-eval"


@pytest.fixture
def run(tmp_path, dataset):
    """run(name, *more) trains in the root folder tmp_path / name; returns the run's folder."""

    def run(name: str, *more: str) -> Path:
        torch.manual_seed(12345)  # the state of the process does not matter
        flags = f"--env hopper-medium --data {dataset} --run-dir {tmp_path / name} {TINY}"
        qdq.main([*flags.split(), *more])
        (folder,) = (tmp_path / name).glob("*/qdq/*")
        return folder

    return run


def state_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_state(a, b, path: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_state(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_state(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def read(folder: Path) -> list[dict]:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "time/updates_per_s"} for row in rows]


def test_all_stages_in_one_run(run, dataset):
    folder = run("all")
    files = {path.name for path in folder.iterdir()}
    assert {"args.json", "checkpoint.pt", "metrics.csv", "result.json"} < files
    rows = read(folder)
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16, 20, 24, 28, 32, 36]
    learned = [bool(row["train/teacher_loss"]) for row in rows]
    assert learned == [True] * 3 + [False] * 6
    learned = [bool(row["train/student_loss"]) for row in rows]
    assert learned == [False] * 3 + [True] * 3 + [False] * 3
    assert all(row["train/critic_loss"] and row["train/actor_loss"] for row in rows[6:])
    before = state_of(folder)["agent"]
    assert before["step"] == 36
    arrays, _ = common.load_dataset("hopper-medium", str(dataset), need_env=False)
    _, q = qdq.truncated_returns(arrays["rew"], arrays["ends"], 200, 10, 0.99)
    torch.testing.assert_close(before["q_range"], torch.tensor([q.min(), q.max()]).float())
    # the final state can be resumed, which changes nothing
    qdq.main(["--resume", str(folder)])
    assert_same_state(state_of(folder)["agent"], before)
    assert read(folder) == rows


@pytest.mark.parametrize("number", [5, 12, 17, 24, 25, 27])
@pytest.mark.parametrize("minutes", [0.0, 5.0], ids=["every-update", "boundaries"])
def test_resume_is_exact_in_every_stage(run, monkeypatch, number, minutes):
    """Killed in the update after `number`: in a stage, at its end, after a stage's first update.

    At 27 the next row shows metrics of the actor that are older than the checkpoint.
    """
    whole = run("whole")
    update, count = qdq.QDQ.update, [0]

    def interrupted(self, *args):
        if count[0] == number:
            raise KeyboardInterrupt
        count[0] += 1
        return update(self, *args)

    more = ["--checkpoint-minutes", str(minutes)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(qdq.QDQ, "update", interrupted)
        run("part", *more)
    (part,) = whole.parents[3].glob("part/*/qdq/*")
    assert not (part / "result.json").exists()
    if not (part / "checkpoint.pt").exists():
        assert minutes > 0 and number < 12  # nothing was saved in the first stage
        return
    saved = state_of(part)["agent"]["step"]
    assert saved == (number if minutes == 0 else number // 12 * 12)
    torch.manual_seed(54321)
    qdq.main(["--resume", str(part)])
    first, second = state_of(whole), state_of(part)
    assert_same_state(first["agent"], second["agent"])
    assert torch.equal(first["rng"], second["rng"])
    assert read(whole) == read(part)


def test_evaluations_count_policy_updates_and_resume(run, monkeypatch):
    seeds = []

    def evaluate(act, info, episodes, seed):
        seeds.append(seed)
        return {"return": np.ones(episodes), "episode_length": np.ones(episodes)}

    monkeypatch.setattr(qdq, "evaluate", evaluate)
    folder = run("once", "--eval", "--eval-every", "5", "--eval-episodes", "1", "--stop-after", "7")
    assert seeds == [1_000_005, 1_000_000_000]  # after 7 updates come the final episodes
    assert state_of(folder)["agent"]["step"] == 31
    qdq.main(["--resume", str(folder), "--stop-after", "99"])
    assert seeds[2:] == [1_000_010, 1_000_012, 1_000_000_000]
    assert [int(row["step"]) for row in read(folder) if row["eval/return"]] == [29, 34, 36]


def test_reuse_of_a_trained_student(run):
    first = run("first")
    second = run("second", "--seed", "1", "--consistency", str(first))
    third = run("third", "--seed", "1", "--consistency", str(first / "checkpoint.pt"))
    states = [state_of(folder)["agent"] for folder in (first, second, third)]
    for name in ("teacher", "student"):
        assert_same_state(states[0][name], states[1][name])
    assert states[1]["step"] == 36
    assert not torch.equal(states[0]["actor"]["out.weight"], states[1]["actor"]["out.weight"])
    assert [int(row["step"]) for row in read(second)] == [28, 32, 36]
    assert_same_state(states[1], states[2])


def test_a_run_with_a_reused_student_resumes_without_it(run, monkeypatch):
    first = run("first")
    whole = run("whole", "--consistency", str(first))
    part = run("part", "--consistency", str(first), "--stop-after", "5")
    (first / "checkpoint.pt").unlink()
    qdq.main(["--resume", str(part), "--stop-after", "12"])
    assert_same_state(state_of(whole)["agent"], state_of(part)["agent"])
    assert read(whole) == read(part)


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--student-lr", "1e-3", "has --student-lr 0.0004, this run 0.001"),
        ("--student-tau", "0.5", "has --student-tau 0.005, this run 0.5"),
        ("--teacher-steps", "13", "has --teacher-steps 12, this run 13"),
        ("--discount", "0.98", "discount"),
        ("--hidden-dim", "96", "hidden-dim"),
        ("--data", "other", "was trained on other data, file/small"),
    ],
)
def test_a_student_made_otherwise_is_refused(run, tmp_path, flag, value, message):
    first = run("first")
    other = write_hdf5(tmp_path / "other.hdf5", make_raw(seed=1))
    value = str(other) if value == "other" else value
    with pytest.raises(SystemExit, match=message) as error:
        run("second", "--consistency", str(first), flag, value)
    assert str(error.value).startswith("error: --consistency")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "second").exists()


def test_every_setting_of_the_student_is_compared():
    """All arguments but those of the run, of evaluations and of the policy stage."""
    others = {"env", "seed", "quick", "consistency", "actor_lr", "critic_lr", "max_grad_norm"}
    others |= {"tau", "hidden_layers", "critic_layer_norm", "num_samples", "alpha", "beta"}
    others |= {"outside_multiplier", "inside_multiplier", "gamma_ent", "actor_objective"}
    others |= set(qdq.RESUME_MAY_CHANGE)
    names = {field.name for field in dataclasses.fields(qdq.Args)}
    assert others <= names
    assert set(qdq.STUDENT_DEPENDS_ON) == names - others


def test_a_file_that_holds_no_student_is_refused(run, tmp_path):
    folder = run("first")
    state = state_of(folder)
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save(state | {"algorithm": "dac"}, tmp_path / "dac.pt")
    old = {"stage": "all", **state["args"]}
    torch.save(state | {"args": old}, tmp_path / "old.pt")
    torch.save(state | {"agent": state["agent"] | {"step": 23}}, tmp_path / "unfinished.pt")
    for name, message in (
        ("nowhere.pt", "does not exist"),
        ("text.pt", "is not a checkpoint"),
        ("dac.pt", "is not a checkpoint of qdq.py"),
        ("old.pt", "is from another version of qdq.py"),
        ("unfinished.pt", "the student of .*unfinished.pt is not finished"),
    ):
        with pytest.raises(SystemExit, match=f"^error: --consistency.*{message}"):
            run("mistake", "--consistency", str(tmp_path / name))
    assert not (tmp_path / "mistake").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        ("--beta 1.5", "--beta 1.5: must be from 0 to 1"),
        ("--alpha 1.5", "--alpha 1.5: must be from 0 to 1"),
        ("--hidden-dim 32", "--hidden-dim 32: must be a multiple of 32 and at least 64"),
        ("--hidden-dim 80", "--hidden-dim 80: must be a multiple of 32 and at least 64"),
        ("--grid-points 2", "--grid-points 2: must be 3 or more"),
        ("--t-min 0", "--t-min 0.0: must be above 0 and below --t-max 80.0"),
        ("--t-min 80", "--t-min 80.0: must be above 0 and below --t-max 80.0"),
        ("--sigma-data 0", "--sigma-data 0: must be above 0"),
        ("--karras-rho 0", "--karras-rho 0: must be above 0"),
        ("--student-tau nan", "--student-tau nan: must be from 0 to 1"),
    ],
)
def test_mistakes(run, tmp_path, more, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run("mistake", *more.split())
    assert not (tmp_path / "mistake").exists()


def test_returns_without_a_range_are_refused(run, tmp_path):
    raw = make_raw(episode=50) | {"rewards": np.zeros(600, np.float32)}
    path = write_hdf5(tmp_path / "zero.hdf5", raw)
    with pytest.raises(SystemExit, match="truncated returns are equal"):
        run("zero", "--data", str(path))


def test_speed_is_counted_from_the_last_row(run, monkeypatch):
    """An evaluation between two log rows neither counts as training nor hides updates."""
    now = [0.0]
    monkeypatch.setattr(qdq.time, "perf_counter", lambda: now[0])
    update = qdq.QDQ.update

    def slow_update(self, *args):
        now[0] += 0.5
        return update(self, *args)

    def slow_evaluate(act, info, episodes, seed):
        now[0] += 1000
        return {"return": np.ones(episodes), "episode_length": np.ones(episodes)}

    monkeypatch.setattr(qdq.QDQ, "update", slow_update)
    monkeypatch.setattr(qdq, "evaluate", slow_evaluate)
    folder = run("speed", "--eval", "--eval-every", "3", "--checkpoint-minutes", "1e6")
    with (folder / "metrics.csv").open() as file:
        speeds = [row["time/updates_per_s"] for row in csv.DictReader(file)]
    speeds = [float(speed) for speed in speeds if speed]
    assert len(speeds) == 9
    assert speeds == pytest.approx([2.0] * 9)


# ---------------------------------------------------------------- presets

MUJOCO = {  # alpha, beta, gamma, updates of the student
    "halfcheetah-medium": (0.992, 0.9, 0.0, 1_600_000),
    "halfcheetah-medium-replay": (0.992, 0.9, 0.1, 1_000_000),
    "halfcheetah-medium-expert": (0.992, 0.9, 2.0, 1_600_000),
    "hopper-medium": (0.992, 0.8, 0.8, 1_600_000),
    "hopper-medium-replay": (0.992, 0.8, 0.8, 1_600_000),
    "hopper-medium-expert": (0.992, 0.8, 2.0, 1_600_000),
    "walker2d-medium": (0.992, 0.8, 0.8, 1_600_000),
    "walker2d-medium-replay": (0.992, 0.8, 0.8, 1_600_000),
    "walker2d-medium-expert": (0.992, 0.8, 2.0, 2_000_000),
}
ANTMAZE = {  # alpha, gamma, critic clip, LayerNorm, objective
    "antmaze-umaze": (0.99, 0.0, 7.0, False, "awr"),
    "antmaze-umaze-diverse": (0.01, 1.5, 7.0, False, "q"),
    "antmaze-medium-play": (0.99, 0.0, 7.0, False, "awr"),
    "antmaze-medium-diverse": (0.99, 1.0, 7.0, False, "awr"),
    "antmaze-large-play": (0.99, 0.0, 7.0, True, "awr"),
    "antmaze-large-diverse": (0.99, 0.0, 3.0, True, "awr"),
}
COMMON = {  # of every task
    "batch_size": 256, "discount": 0.99, "teacher_steps": 800_000, "teacher_lr": 5e-4,
    "student_lr": 4e-4, "student_tau": 0.005, "tau": 0.005, "actor_lr": 3e-4, "critic_lr": 3e-4,
    "hidden_dim": 256, "sigma_data": 0.5, "t_min": 0.002, "t_max": 80.0, "karras_rho": 7.0,
    "grid_points": 1000, "num_samples": 50, "total_steps": 1_000_000,
}  # fmt: skip


def test_presets_are_the_published_values():
    assert set(qdq.PRESETS) == set(MUJOCO) | set(ANTMAZE) == set(common.TASKS)
    for task in qdq.PRESETS:
        args, _ = qdq.parse_args(["--env", task])
        for name, value in COMMON.items():
            assert getattr(args, name) == value, (task, name)
    for task, (alpha, beta, gamma, student_steps) in MUJOCO.items():
        args, _ = qdq.parse_args(["--env", task])
        assert (args.alpha, args.beta, args.gamma_ent) == (alpha, beta, gamma)
        assert args.student_steps == student_steps
        assert (args.max_grad_norm, args.hidden_layers, args.critic_layer_norm) == (10, 3, False)
        assert (args.outside_multiplier, args.inside_multiplier) == (None, "inverse")
        assert (args.actor_objective, args.reward_transform) == ("q", "none")
        assert (args.eval_every, args.eval_episodes) == (5_000, 10)
    for task, (alpha, gamma, clip, layer_norm, objective) in ANTMAZE.items():
        args, _ = qdq.parse_args(["--env", task])
        assert (args.alpha, args.beta, args.gamma_ent) == (alpha, 0.9, gamma)
        assert args.student_steps == 1_600_000
        assert (args.max_grad_norm, args.hidden_layers) == (clip, 2)
        assert args.critic_layer_norm == layer_norm
        assert args.outside_multiplier == 1
        assert args.inside_multiplier == ("expand" if objective == "awr" else "inverse")
        assert (args.actor_objective, args.reward_transform) == (objective, "minus_one")
        assert (args.eval_every, args.eval_episodes) == (100_000, 100)


def test_the_papers_values_are_flags():
    flags = "--env walker2d-medium-v2 --alpha 0.95 --beta 0.9 --gamma-ent 1"
    args, _ = qdq.parse_args(flags.split())
    assert (args.alpha, args.beta, args.gamma_ent) == (0.95, 0.9, 1.0)
    assert args.outside_multiplier is None
    maze, _ = qdq.parse_args(["--env", "antmaze-medium-diverse-v0"])
    assert (maze.actor_objective, maze.gamma_ent, maze.hidden_layers) == ("awr", 1.0, 2)
    assert maze.reward_transform == "minus_one"
    quick, _ = qdq.parse_args(["--env", "antmaze-umaze", "--quick"])
    assert (quick.gamma_ent, quick.final_episodes, quick.beta) == (16.0, 20, 0.9)
