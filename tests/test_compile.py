"""--compile changes the speed and nothing else: 100 updates agree with eager ones in float64.

Compiling takes a minute per script, so the plain suite does this for DAC alone. With --compile,
pytest does it for all three, and the check numbers are those of compiled updates, too:
python -m pytest --compile tests/test_compile.py tests/test_{dac,qdq,cped}.py
"""

import pytest
import torch

import cped
import dac
import qdq

SMALL = {
    dac: dict(num_critics=2, num_next_actions=2, hidden_dim=16, actor_target_start=20),
    qdq: dict(num_samples=4, hidden_dim=128, teacher_steps=100, student_steps=100),
    cped: dict(
        flow_hidden_dim=16,
        hidden_dim=16,
        flow_steps=50,
        critic_start=5,
        actor_q_start=10,
        constraint="dual",
    ),
}
UPDATES = {dac: 100, qdq: 300, cped: 100}  # of all stages together
SCRIPTS = list(SMALL)
NAMES = [script.ALGORITHM for script in SCRIPTS]


def weights_after_updates(script, compiled: bool, device: str) -> dict[str, torch.Tensor]:
    """Of all networks, with the same batches and noise; every ninth batch is a short one."""
    torch.manual_seed(0)
    args = script.Args(**SMALL[script], compile=compiled)
    agent = getattr(script, script.ALGORITHM.upper())(11, 3, args, device)
    columns = {
        "obs": torch.randn(64, 11, device=device),
        "act": torch.rand(64, 3, device=device) * 2 - 1,
        "rew": torch.randn(64, device=device),
        "next_obs": torch.randn(64, 11, device=device),
        "not_done": torch.ones(64, device=device),
        "x": torch.randn(64, 1, device=device).tanh(),
    }
    for number in range(UPDATES[script]):
        indices = torch.randint(64, (16 if number % 9 else 8,), device=device)
        rows = {name: column[indices] for name, column in columns.items()}
        if script is not qdq:
            agent.update(script.Batch(*(rows[name] for name in script.Batch._fields)))
            continue
        stage = ("teacher", "student", "policy")[number // 100]
        kind = qdq.Batch if stage == "policy" else qdq.Windows
        agent.update(stage, kind(*(rows[name] for name in kind._fields)))
    weights = {}
    for name in agent.NETWORKS:
        for key, tensor in getattr(agent, name).state_dict().items():
            weights[f"{name}.{key}"] = tensor.cpu()
    return weights


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_compiled_updates_equal_eager_ones(script, device, request, float64):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if script is not dac and not request.config.getoption("--compile"):
        pytest.skip("slow: needs --compile")
    eager = weights_after_updates(script, False, device)
    compiled = weights_after_updates(script, True, device)
    assert eager.keys() == compiled.keys()
    assert len(eager) > 20
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-6, atol=1e-8, msg=name)
