"""Kills at random moments, by benchmarks/faults.py, which kills longer."""

import os
import subprocess
import sys
from pathlib import Path

import faults
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="forks, as the long version does")
@pytest.mark.parametrize("script", ["dac", "qdq", "cped"])
def test_kills_at_random_moments_change_nothing(script):
    command = [sys.executable, "benchmarks/faults.py", script, "--kills", "2", "--steps", "80"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{script} passed" in done.stdout
    assert sum(line.startswith("kill ") for line in done.stdout.splitlines()) == 2


def test_every_difference_is_seen():
    state = {
        "rows": [{"step": 1, "time/updates_per_s": 5}],
        "agent": {"w": torch.zeros(2)},
        "args": {"a": (1, 2)},
        "seconds": 1,
    }
    same = state | {"rows": [{"step": 1, "time/updates_per_s": 6}], "seconds": 2}
    assert not list(faults.differences(state, same))
    for change in (
        {"rows": state["rows"] * 2},
        {"rows": []},
        {"args": {"a": (1, 3)}},
        {"args": {"a": (1, 2), "b": 0}},
        {"more": 0},
    ):
        assert len(list(faults.differences(state, state | change))) == 1, change
    wrong = (
        torch.tensor([0, 1e-45]),
        torch.zeros(3),
        torch.zeros(2, 1),
        torch.zeros(2).double(),
        0,
    )
    for w in wrong:
        assert len(list(faults.differences(state, state | {"agent": {"w": w}}))) == 1, w
