"""Kills, signals and full disks: a run goes on exactly, and its checkpoint is never lost. benchmarks/faults.py kills longer."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_raw, write_hdf5

import cped
import dac
import qdq
from benchmarks import faults
from common import UserError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [dac, qdq, cped]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


class Killed(BaseException):
    """Ends a run at once, as SIGKILL does: no script catches it."""


@pytest.fixture
def run(tmp_path):
    """Runs a small training of a script in a root folder of its own: 12 updates per stage, some checkpoints at odd ones."""
    data = write_hdf5(tmp_path / "a.hdf5", make_raw())

    def run(script, name: str, *more: str) -> dict:
        flags = f"--env hopper-medium --no-eval --data {data} --run-dir {tmp_path / name} --batch-size 8 --log-every 2"
        torch.manual_seed(99)  # the state of the process does not matter
        script.main([*flags.split(), "--checkpoint-every", "5", *faults.STAGES[script.ALGORITHM].format(n=12).split(), *more])
        return faults.contents(tmp_path / name)

    return run


def checkpoint(root: Path) -> Path:
    (path,) = root.glob("hopper-medium/*/*/checkpoint.pt")
    return path


# --------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.skipif(sys.platform != "linux", reason="forks, as the long version does")
@pytest.mark.parametrize("script", [script.ALGORITHM for script in SCRIPTS])
def test_kills_at_random_moments_change_nothing(script):
    command = [sys.executable, "benchmarks/faults.py", script, "--kills", "2", "--steps", "80"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"{script} passed" in done.stdout, done.stdout + done.stderr
    assert sum(line.startswith("kill ") for line in done.stdout.splitlines()) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_kill_between_any_two_saves_changes_nothing(script, run, tmp_path, monkeypatch):
    """Each file that a run replaces is once the one that it did not come to; a run has two at the end of CPED's flow stage."""
    whole, replace, seen = run(script, "whole"), os.replace, []

    def killed(part, path):
        seen.append(path)
        if len(seen) == save:
            raise Killed
        replace(part, path)

    for save in range(2, 30):  # before the first there is nothing to go on with
        seen.clear()
        monkeypatch.setattr(os, "replace", killed)
        try:
            run(script, f"save{save}")
            break
        except Killed:
            monkeypatch.setattr(os, "replace", replace)
            assert not list(faults.differences(whole, run(script, f"save{save}", "--resume"))), f"killed before save {save}"
    assert 4 <= len(seen) == save - 1


def test_every_difference_is_seen():
    state = {"rows": [{"step": 1, "time/updates_per_s": 5}], "agent": {"w": torch.zeros(2)}, "args": {"a": (1, 2)}, "seconds": 1}
    assert not list(faults.differences(state, state | {"rows": [{"step": 1, "time/updates_per_s": 6}], "seconds": 2}))
    for change in (
        {"rows": state["rows"] * 2},
        {"rows": []},
        {"args": {"a": (1, 3)}},
        {"args": {"a": (1, 2), "b": 0}},
        {"more": 0},
    ):
        assert len(list(faults.differences(state, state | change))) == 1, change
    for w in (torch.tensor([0, 1e-45]), torch.zeros(3), torch.zeros(2, 1), torch.zeros(2).double(), 0):
        assert len(list(faults.differences(state, state | {"agent": {"w": w}}))) == 1, w


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("script", [qdq, cped])
def test_sigterm_saves_and_tells_how_to_go_on(script, tmp_path):
    data = write_hdf5(tmp_path / "a.hdf5", make_raw())
    flags = f"--no-eval --data {data} --run-dir {tmp_path} --checkpoint-every 50"
    command = [sys.executable, f"{script.ALGORITHM}.py", *flags.split(), *faults.STAGES[script.ALGORITHM].format(n=10**6).split()]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*/*/*/checkpoint.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    step, path = re.search(
        rf"stopped at update ([\d,]+); go on with: python {script.ALGORITHM}.py --resume (.*)\n", errors
    ).groups()
    agent = script.load_checkpoint(Path(path))["agent"]
    assert (agent["step"] if script is cped else agent["steps"]["teacher"]) == int(step.replace(",", ""))


# ---------------------------------------------------------------------------------------------------------------- disk


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("what", ["torch.save", "os.replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_save_that_fails_keeps_the_last_checkpoint(script, what, number, run, tmp_path, monkeypatch):
    whole, owner = run(script, "whole"), torch if what == "torch.save" else os
    name, kept, calls = what.split(".")[1], getattr(owner, what.split(".")[1]), []

    def failing(first, second):
        calls.append(second)
        if len(calls) == 3:
            if owner is torch:
                Path(second).write_bytes(b"half of it")
            raise OSError(number, os.strerror(number), str(second))
        kept(first, second)

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(UserError, match=r"cannot write .*checkpoint\.pt .*the previous checkpoint is as it was"):
        run(script, "part")
    monkeypatch.setattr(owner, name, kept)
    assert [path.name for path in checkpoint(tmp_path / "part").parent.glob("*.p*t")] == ["checkpoint.pt"]  # and no .part
    assert not list(faults.differences(whole, run(script, "part", "--resume")))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is full")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the file is closed, and cannot be then either
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["metrics.csv", "args.json"])
def test_a_full_disk_while_logging_keeps_the_checkpoint(script, name, run, tmp_path):
    run(script, "part")
    before = checkpoint(tmp_path / "part").read_bytes()
    (table := checkpoint(tmp_path / "part").with_name(name)).unlink()
    table.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        run(script, "part", "--resume")
    assert checkpoint(tmp_path / "part").read_bytes() == before
