"""Kills, signals and full disks: a run goes on exactly, and its checkpoint is never lost. benchmarks/faults.py kills longer."""

import csv
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
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


def test_what_grows_in_a_soak_is_seen():
    rng = np.random.default_rng(0)
    busy = np.arange(240)[:, None] % 3 == 0  # an evaluation: more files, environments and memory for a while
    flat = np.array([500, 20, 1, 6, 0]) + busy * [30, 2, 2, 0, 4] + rng.normal(size=(240, 1)) * [5, 0, 0, 0, 0]
    assert all(more <= faults.MOST[kind] for kind, more in faults.growth(flat.tolist()).items())
    for i, (kind, most) in enumerate(faults.MOST.items()):
        leak = flat + np.eye(5)[i] * np.arange(240)[:, None] // (12 if i else 6)  # MB in 90 s, or one in 3 min of an hour
        assert faults.growth(leak.tolist())[kind] > most, kind


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
    with pytest.raises(UserError, match=r"cannot write .*checkpoint\.pt; the previous checkpoint is as it was"):
        run(script, "part")
    monkeypatch.setattr(owner, name, kept)
    assert [path.name for path in checkpoint(tmp_path / "part").parent.glob("*.p*t")] == ["checkpoint.pt"]  # and no .part
    assert not list(faults.differences(whole, run(script, "part", "--resume")))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("what", ["table", "board"])
def test_a_full_disk_while_logging_keeps_the_checkpoint_and_names_the_folder(script, what, run, tmp_path, monkeypatch):
    owner, name = {"table": (csv.DictWriter, "writerow"), "board": (script.SummaryWriter, "add_scalar")}[what]
    kept, calls = getattr(owner, name), []

    def full(*args):
        calls.append(args)
        if len(calls) == {"table": 5, "board": 20}[what]:
            raise OSError(errno.ENOSPC, "No space left on device")  # which names no file
        return kept(*args)

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(UserError, match=r"cannot write to .*seed0-\S+; its checkpoint is as it was .*No space left"):
        run(script, "part")
    monkeypatch.setattr(owner, name, kept)
    run(script, "part", "--resume")


# ------------------------------------------------------------------------------------------------ two processes, a signal


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_second_process_in_a_run_folder_is_refused(script, run, tmp_path):
    """For as long as the first one lives, by SIGKILL or not; evaluation needs no lock."""
    before = run(script, "part")
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", code, checkpoint(tmp_path / "part").with_name("lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=r"seed0-\S+ is in use: another process trains this run"):
            run(script, "part", "--resume")
        assert not list(faults.differences(before, faults.contents(tmp_path / "part")))
        other.kill()
    run(script, "part", "--resume")


def test_two_runs_of_one_second_do_not_share_a_folder(run, tmp_path, monkeypatch):
    monkeypatch.setattr(dac.time, "strftime", lambda format: "seed0-then")
    run(dac, "part")
    with pytest.raises(FileExistsError, match="seed0-then"):
        run(dac, "part")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_save_or_an_evaluation_is_heeded_after_it(script, number, run, tmp_path, monkeypatch):
    whole, replace = run(script, "whole"), os.replace

    def interrupted(part, path):
        monkeypatch.setattr(os, "replace", replace)
        os.kill(os.getpid(), number)
        replace(part, path)

    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    monkeypatch.setattr(os, "replace", interrupted)
    try:
        with pytest.raises(UserError, match=rf"stopped at update \d+; go on with: python {script.ALGORITHM}.py --resume"):
            run(script, "part")
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
    assert not list(faults.differences(whole, run(script, "part", "--resume")))


def test_an_interruption_before_the_first_update_is_one_line():
    code = """if True:
        import os, runpy, signal, sys, common
        common.load_dataset = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGINT)
        sys.argv = ["dac.py"]
        runpy.run_path("dac.py", run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == "error: interrupted before the training began\n"
