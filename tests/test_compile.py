"""--compile changes the speed and nothing else: after 100 updates from one state, weights agree with eager ones in float64.

Compiling takes a minute per script, so this is done for DAC only, unless pytest itself gets --compile. Then the check numbers
are those of compiled updates, too: python -m pytest --compile tests/test_dac.py tests/test_qdq.py tests/test_cped.py
"""

import subprocess

import pytest
import torch

import cped
import dac
import qdq

SMALL = {
    "dac": {"num_critics": 2, "num_next_actions": 2, "hidden_dim": 16, "actor_target_start": 20},
    "qdq": {"num_samples": 4, "hidden_dim": 32, "teacher_steps": 100, "student_steps": 100},
    "cped": {
        "flow_hidden_dim": 16,
        "hidden_dim": 16,
        "flow_steps": 50,
        "critic_start": 5,
        "actor_q_start": 10,
        "constraint": "dual",
    },
}
AGENTS = {dac: dac.DAC, qdq: qdq.QDQ, cped: cped.CPED}


def weights_after(script, compiled: bool, updates: int) -> dict[str, torch.Tensor]:
    """Of all networks, after so many updates of each stage with the same batches and noise."""
    torch.manual_seed(0)
    agent = AGENTS[script](11, 3, script.Args(**SMALL[script.ALGORITHM], compile=compiled))
    columns = {"obs": torch.randn(64, 11), "act": torch.rand(64, 3) * 2 - 1, "rew": torch.randn(64), "nll": torch.randn(64)}
    columns |= {"next_obs": torch.randn(64, 11), "not_done": torch.ones(64)}
    data = script.Batch(*(columns[name] for name in script.Batch._fields))
    windows = (torch.cat([data.obs, data.act], 1), data.rew[:, None].tanh())
    for stage in ("teacher", "student", "policy") if script is qdq else ("policy",):
        for _ in range(updates):
            index = torch.randint(64, (16,))
            if script is qdq:
                rows = [column[index] for column in (data if stage == "policy" else windows)]
                agent.update(stage, rows, agent.draw(stage, 16))
            else:
                agent.update(script.Batch(*(column[index] for column in data)), agent.draw(16))
    networks = [name for name in vars(agent) if isinstance(getattr(agent, name), torch.nn.Module)]
    return {f"{name}.{key}": value for name in networks for key, value in getattr(agent, name).state_dict().items()}


@pytest.mark.parametrize("script", AGENTS, ids=[script.ALGORITHM for script in AGENTS])
def test_compiled_updates_equal_eager_ones(script, request):
    if script is not dac and not request.config.getoption("--compile"):
        pytest.skip("slow: needs --compile")
    torch.set_default_dtype(torch.float64)
    try:
        eager, compiled = (weights_after(script, mode, 100) for mode in (False, True))
    finally:
        torch.set_default_dtype(torch.float32)
    assert eager.keys() == compiled.keys() and len(eager) > 20
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("script", AGENTS, ids=[script.ALGORITHM for script in AGENTS])
def test_without_a_compiler_it_is_one_sentence(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: lambda x: subprocess.run(["no-such-compiler"], check=True))
    with pytest.raises(script.UserError, match=r"--compile: torch.compile fails here; it needs a C\+\+ compiler"):
        script.main(["--compile", "--run-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())
