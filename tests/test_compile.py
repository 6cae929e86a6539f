"""--compile changes the speed and nothing else: 100 updates agree with eager ones in float64.

Compiling takes a minute per script, so the plain suite does this for DAC alone. With --compile,
pytest does it for all three, and the check numbers are those of compiled updates, too:
python -m pytest --compile tests/test_compile.py tests/test_dac.py tests/test_qdq.py tests/test_cped.py
"""

import pytest
import torch

import cped
import dac
import qdq

SMALL = {
    dac: dict(num_critics=2, num_next_actions=2, hidden_dim=16, actor_target_start=20),
    qdq: dict(num_samples=4, hidden_dim=64, teacher_steps=100, student_steps=100),
    cped: dict(
        flow_hidden_dim=16,
        hidden_dim=16,
        flow_steps=50,
        critic_start=5,
        actor_q_start=10,
        constraint="dual",
    ),
}
SCRIPTS = list(SMALL)
NAMES = [script.ALGORITHM for script in SCRIPTS]
DEVICES = ["cpu", "cuda"]


def weights_after(script, compiled: bool, updates: int, device: str) -> dict[str, torch.Tensor]:
    """Of all networks, after so many updates of each stage; every ninth batch is a short one."""
    torch.manual_seed(0)
    args = script.Args(**SMALL[script], compile=compiled)
    agent = getattr(script, script.ALGORITHM.upper())(11, 3, args, device)
    columns = {
        "obs": torch.randn(64, 11),
        "act": torch.rand(64, 3) * 2 - 1,
        "rew": torch.randn(64),
        "next_obs": torch.randn(64, 11),
        "not_done": torch.ones(64),
    }
    columns = {name: column.to(device) for name, column in columns.items()}
    for stage in STAGES[script]:
        for number in range(updates):
            indices = torch.randint(64, (16 if number % 9 else 8,))
            agent.update(*arguments(script, stage, columns, indices.to(device)))
    weights = {}
    for name in agent.NETWORKS:
        for key, tensor in getattr(agent, name).state_dict().items():
            weights[f"{name}.{key}"] = tensor.cpu()
    return weights
