"""--compile changes the speed and nothing else: after 100 updates from one state, weights agree with eager ones in float64.

Compiling takes a minute per script, so this is done for DAC only, unless pytest itself gets --compile. Then the check numbers
are those of compiled updates, too: python -m pytest --compile tests/test_dac.py tests/test_qdq.py tests/test_cped.py
On CUDA compiled updates are CUDA graphs, too. Elsewhere a stand-in for torch's graphs shows which updates are replayed on what.
"""

import contextlib
import subprocess
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_map

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


def weights_after(script, compiled: bool, updates: int, device: str = "cpu", wrap=lambda agent: None) -> dict[str, torch.Tensor]:
    """Of all networks, after so many updates of each stage with the same batches and noise; every ninth batch is a short one."""
    torch.manual_seed(0)
    agent = AGENTS[script](11, 3, script.Args(**SMALL[script.ALGORITHM], compile=compiled), "cpu")
    start, columns = agent.state_dict(), {"obs": torch.randn(64, 11), "act": torch.rand(64, 3) * 2 - 1, "rew": torch.randn(64)}
    columns |= {"nll": torch.randn(64), "next_obs": torch.randn(64, 11), "not_done": torch.ones(64)}
    data = script.Batch(*(columns[name] for name in script.Batch._fields))
    windows = (torch.cat([data.obs, data.act], 1), data.rew[:, None].tanh())
    on_cpu, agent = agent, AGENTS[script](11, 3, script.Args(**SMALL[script.ALGORITHM], compile=compiled), device)
    script.restore(agent, {"path": "", "agent": start, "rng": torch.get_rng_state()})
    wrap(agent)
    for stage in ("teacher", "student", "policy") if script is qdq else ("policy",):
        for number in range(updates):
            index = torch.randint(64, (16 if number % 9 else 8,))
            rows = [column[index].to(device) for column in (windows if stage in ("teacher", "student") else data)]
            named = [stage] if script is qdq else []
            draws = tree_map(lambda x: x.to(device), on_cpu.draw(*named, len(index)))  # the same on every device
            agent.update(*named, rows if script is qdq else script.Batch(*rows), draws)
    networks = [name for name in vars(agent) if isinstance(getattr(agent, name), torch.nn.Module)]
    return {f"{name}.{key}": value.cpu() for name in networks for key, value in getattr(agent, name).state_dict().items()}


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
def test_replayed_updates_equal_those_that_run(script, float64, monkeypatch):
    """With a stand-in for CUDA graphs, whose capture runs nothing and whose replay may not look at the agent's counters."""
    recording, replays = [], []

    @contextlib.contextmanager
    def graph(graph, stream):
        recording.append(graph)
        yield

    def wrap(agent):
        real = agent.one_update

        def one_update(batch, draws, *flags):
            if not recording:
                return real(batch, draws, *flags)

            def replay():
                counters = {name: vars(agent).pop(name) for name in ("step", "steps", "actor_metrics") if name in vars(agent)}
                metrics.update(real(batch, draws, *flags))
                vars(agent).update(counters)
                replays.append(flags)

            metrics, recording.pop().replay = {}, replay
            return metrics

        agent.one_update = script.GraphedUpdate(one_update)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": contextlib.nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    eager, replayed = weights_after(script, False, 100), weights_after(script, False, 100, wrap=wrap)
    assert not recording and len(replays) > 50 and len(set(replays)) >= {"dac": 2, "qdq": 5, "cped": 4}[script.ALGORITHM]
    assert all(torch.equal(replayed[name], value) for name, value in eager.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", AGENTS, ids=[script.ALGORITHM for script in AGENTS])
def test_cuda_graphs_equal_eager_updates(script, float64):
    eager, graphed = (weights_after(script, mode, 100, "cuda") for mode in (False, True))
    for name, value in eager.items():
        torch.testing.assert_close(graphed[name], value, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("script", AGENTS, ids=[script.ALGORITHM for script in AGENTS])
def test_without_a_compiler_it_is_one_sentence(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: lambda x: subprocess.run(["no-such-compiler"], check=True))
    with pytest.raises(script.UserError, match=r"--compile: torch.compile fails here; it needs a C\+\+ compiler"):
        script.main(["--compile", "--run-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())
