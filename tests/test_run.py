"""Runs of dac.py as a user starts them: files, exact resume, evaluation of checkpoints, interruptions, mistakes."""

import csv
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_raw, write_hdf5

import dac
from benchmarks import faults

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--num-critics=2",
    "--num-next-actions=2",
    "--hidden-dim=16",
    "--batch-size=64",
    "--log-every=5",
    "--checkpoint-every=20",
]

WIDE = {  # networks of the usual width, whose products torch shares out among threads; few updates, for waiting takes time
    "dac": "--num-critics 2 --num-next-actions 1 --total-steps 1",
    "qdq": "--num-samples 2 --teacher-steps 1 --student-steps 1 --total-steps 1",
    "cped": "--flow-hidden-dim 256 --flow-steps 1 --disc-updates 1 --total-steps 2 --critic-start 1 --actor-q-start 1",
}


@pytest.fixture
def flags(tmp_path, dataset):
    return ["--env", "hopper-medium", "--data", str(dataset), "--run-dir", str(tmp_path / "runs"), *SMALL]


def run_folder(tmp_path) -> Path:
    (folder,) = (tmp_path / "runs").glob("*/dac/*")
    return folder


def command(flags, **kwargs):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "dac.py", *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, **kwargs
    )


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint, weights_only=True)["agent"]
    flat = {"eta": state["eta"]}
    for part in ("actor", "actor_target", "critic", "critic_target"):
        flat |= {f"{part}.{name}": tensor for name, tensor in state[part].items()}
    for part in ("actor_adam", "critic_adam"):
        flat |= {f"{part}.{i}.{k}": v for i, own in state[part]["state"].items() for k, v in own.items()}
    return flat


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def rows(folder: Path) -> list[dict]:
    """metrics.csv without the column that holds a speed."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "time/updates_per_s"} for row in csv.DictReader(file)]


# --------------------------------------------------------------------------------------------------------------- files


def test_a_run_leaves_its_files(flags, tmp_path):
    result = dac.main([*flags, "--total-steps", "40", "--eval-every", "20", "--eval-episodes", "2"])
    folder = run_folder(tmp_path)
    assert {"args.json", "checkpoint.pt", "metrics.csv", "result.json"} < {path.name for path in folder.iterdir()}
    assert any(path.name.startswith("events.out.tfevents") for path in folder.iterdir())
    assert result == json.loads((folder / "result.json").read_text())
    table = rows(folder)
    assert [int(row["step"]) for row in table] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    scores = [float(row["eval/normalized_score"]) for row in table if row["eval/normalized_score"]]
    assert len(scores) == 3 and result["last_score"] == scores[-1]
    assert result["final_score"] == pytest.approx(np.mean(scores[1:]))  # the untrained policy's score is not a result
    assert result["best_score"] == max(scores[1:]) and result["dataset"] == "file/small.hdf5"
    assert all(row["train/critic_loss"] for row in table[1:])
    stored = json.loads((folder / "args.json").read_text())
    assert stored["args"]["rho"] == 1.5 and stored["args"]["num_critics"] == 2  # preset of the task, then what was typed
    assert stored["dataset"]["sha256"] == result["sha256"]


def test_final_score_is_the_mean_of_the_last_five_evaluations(flags, tmp_path):
    result = dac.main([*flags, "--total-steps", "14", "--eval-every", "2", "--eval-episodes", "1"])
    scores = [float(row["eval/normalized_score"]) for row in rows(run_folder(tmp_path)) if row["eval/normalized_score"]]
    assert len(scores) == 8 and result["final_score"] == pytest.approx(np.mean(scores[-5:]))


def test_speed_is_per_update_whatever_else_falls_between(flags, tmp_path, monkeypatch):
    clock = iter(range(0, 100_000, 10))
    monkeypatch.setattr(dac.time, "perf_counter", lambda: next(clock))
    dac.main([*flags, "--total-steps", "10", "--eval-every", "3", "--eval-episodes", "1"])
    with (run_folder(tmp_path) / "metrics.csv").open() as file:
        speeds = {row["step"]: row["time/updates_per_s"] for row in csv.DictReader(file) if row["time/updates_per_s"]}
    assert speeds == {"5": repr(2 / 10), "10": repr(1 / 10)}  # since the rows of updates 3 and 9


def test_metrics_have_the_announced_names(flags, tmp_path):
    agent = dac.DAC(11, 3, dac.Args(num_critics=2, hidden_dim=16))
    batch = dac.Batch(torch.zeros(4, 11), torch.zeros(4, 3), torch.zeros(4), torch.zeros(4, 11), torch.ones(4))
    assert set(agent.update(batch, agent.draw(4))) == set(dac.DAC.metrics)


def test_training_without_an_environment(flags, tmp_path):
    dac.main([*flags, "--env", "my-robot", "--total-steps", "20", "--no-eval"])
    folder = run_folder(tmp_path)
    assert not any(row["eval/return"] for row in rows(folder))
    with pytest.raises(dac.UserError, match="no-eval"):
        dac.main(["--eval-only", str(folder)])


# -------------------------------------------------------------------------------------------------------------- resume


def test_resume_is_exact_after_a_kill(flags, tmp_path, dataset):
    """SIGKILL at an arbitrary moment, then --resume: the same weights and rows as without the kill."""
    flags = [*flags, "--total-steps", "1500", "--eval-every", "600", "--eval-episodes", "1"]
    dac.main([*flags, "--run-dir", str(tmp_path / "whole")])
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "dac.py", *flags], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not list((tmp_path / "runs").glob("*/dac/*/checkpoint.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    time.sleep(0.7)
    process.kill()
    process.communicate()
    folder = run_folder(tmp_path)
    reached = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]["step"]
    assert reached < 1500
    dac.main([*flags, "--resume"])
    (whole,) = (tmp_path / "whole").glob("*/dac/*")
    assert_same_weights(folder / "checkpoint.pt", whole / "checkpoint.pt")
    assert rows(folder) == rows(whole)


def test_signals_save_and_tell_how_to_go_on(flags, tmp_path):
    flags = [*flags, "--total-steps", "100000", "--no-eval"]
    process = subprocess.Popen(
        [sys.executable, "dac.py", *flags], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list((tmp_path / "runs").glob("*/dac/*/checkpoint.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "--resume" in errors and "Traceback" not in errors
    state = torch.load(run_folder(tmp_path) / "checkpoint.pt", weights_only=True)
    assert f"stopped at update {state['agent']['step']:,}" in errors


def test_resume_of_a_finished_run_changes_nothing(flags, tmp_path):
    first = dac.main([*flags, "--total-steps", "20", "--eval-every", "20", "--eval-episodes", "1"])
    before = rows(run_folder(tmp_path))
    again = dac.main(["--resume", str(run_folder(tmp_path))])
    assert rows(run_folder(tmp_path)) == before
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}


def test_evaluations_do_not_disturb_training(flags, tmp_path):
    dac.main([*flags, "--total-steps", "20", "--no-eval", "--run-dir", str(tmp_path / "a")])
    dac.main([*flags, "--total-steps", "20", "--eval-every", "7", "--eval-episodes", "1", "--run-dir", str(tmp_path / "b")])
    (a,), (b,) = ((tmp_path / name).glob("*/dac/*/checkpoint.pt") for name in "ab")
    assert_same_weights(a, b)


@pytest.mark.parametrize("script", WIDE)
def test_evaluations_beside_the_training_have_the_same_result(script, dataset, tmp_path):
    more = "--total-steps 6 --eval-every 2 --eval-episodes 2 --log-every 3 --checkpoint-every 4"
    for name, workers in (("in-line", 0), ("beside", 1)):
        flags = f"--env hopper-medium --data {dataset} --run-dir {tmp_path / name} --eval-workers {workers} {WIDE[script]} {more}"
        __import__(script).main(flags.split())
    in_line, beside = (faults.contents(tmp_path / name) for name in ("in-line", "beside"))
    assert not [line for line in faults.differences(in_line, beside) if "eval_workers" not in line]
    (folder,) = (tmp_path / "beside").glob("*/*/seed*")
    assert len([row for row in rows(folder) if row["eval/return"]]) == 4 and not multiprocessing.active_children()


@pytest.mark.parametrize(("number", "evaluated"), [(signal.SIGINT, 0), (signal.SIGTERM, 2), (signal.SIGKILL, 2)])
def test_processes_that_evaluate_end_with_the_run(number, evaluated, flags, tmp_path):
    """At once as they start, and later; Ctrl-C and many schedulers signal all processes of a group."""
    flags = [*flags, "--total-steps", "100000", "--eval-every", "20", "--eval-episodes", "1", "--eval-workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "dac.py", *flags], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    family, children = Path(f"/proc/{process.pid}/task/{process.pid}/children"), []
    while not children or len(rows(run_folder(tmp_path))) < evaluated:
        assert process.poll() is None, process.stderr.read()
        children = family.read_text().split() if list((tmp_path / "runs").glob("*/dac/*/checkpoint.pt")) else []
        time.sleep(0.02)
    (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert number == signal.SIGKILL or ("stopped at update" in errors and "Traceback" not in errors)
    for _ in range(200):
        alive = [child for child in children if Path(f"/proc/{child}/exe").exists()]  # not of a zombie
        if not alive:
            break
        time.sleep(0.05)
    assert not alive


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("script", WIDE)
def test_the_seed_decides_every_bit(script, threads, dataset, tmp_path):
    torch.set_num_threads(threads)
    try:
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            flags = f"--env hopper-medium --data {dataset} --run-dir {tmp_path / name} --no-eval --log-every 1 --seed {seed}"
            __import__(script).main([*flags.split(), *WIDE[script].split()])
    finally:
        torch.set_num_threads(1)
    a, b, c = (faults.contents(tmp_path / name) for name in "abc")
    assert not list(faults.differences(a, b))
    for part in {"actor", "critic", "flow", "student"} & a["checkpoint.pt"]["agent"].keys():
        first, second = (run["checkpoint.pt"]["agent"][part] for run in (a, c))
        assert any(not torch.equal(first[name], second[name]) for name in first), part


def test_resume_refuses_what_would_make_another_run(flags, tmp_path, dataset):
    dac.main([*flags, "--total-steps", "20", "--no-eval"])
    folder = str(run_folder(tmp_path))
    with pytest.raises(dac.UserError, match=r"--rho 0.5: .* was made with 1.5"):
        dac.main(["--resume", folder, "--rho", "0.5"])
    other = write_hdf5(tmp_path / "other.hdf5", make_raw(seed=1))
    with pytest.raises(dac.UserError, match=r"was trained on file/small\.hdf5"):
        dac.main(["--resume", folder, "--data", str(other)])
    with pytest.raises(dac.UserError, match="has no dac run of hopper-medium, seed 5"):
        dac.main([*flags, "--seed", "5", "--resume"])
    state = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    torch.save(state | {"algorithm": "qdq"}, tmp_path / "qdq.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name, message in (
        ("qdq.pt", "not written by this version of dac.py"),
        ("text.pt", "no checkpoint"),
        ("absent.pt", "does not exist"),
    ):
        with pytest.raises(dac.UserError, match=message):
            dac.main(["--resume", str(tmp_path / name)])


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_eval_only_reproduces_the_score_of_the_run(flags, tmp_path):
    result = dac.main([*flags, "--total-steps", "20", "--eval-every", "20", "--eval-episodes", "3"])
    again = dac.main(["--eval-only", str(run_folder(tmp_path) / "checkpoint.pt")])
    assert again["eval/normalized_score"] == result["last_score"]
    assert dac.main(["--eval-only", str(run_folder(tmp_path)), "--episodes", "2"]) != again


def test_a_saved_policy_is_rebuilt_in_three_lines(flags, tmp_path):
    dac.main([*flags, "--total-steps", "20", "--no-eval"])
    state = torch.load(run_folder(tmp_path) / "checkpoint.pt", map_location="cpu", weights_only=True)
    agent = dac.DAC(state["obs_dim"], state["act_dim"], dac.Args(**state["args"]))
    agent.load_state_dict(state["agent"])
    act = agent.act(np.zeros((2, 11), np.float32))
    assert act.shape == (2, 3) and np.abs(act).max() <= 1


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        (["--env", "hoper-medium", "--data", "auto"], 2, "did you mean hopper-medium"),
        (["--ro", "3"], 2, "Unrecognized"),
        (["--eta", "much"], 2, "eta"),
        (["--num-critics", "0"], 2, "--num-critics 0: must be 1 or more"),
        (["--actor-lr", "-1"], 2, "--actor-lr -1.0: must be 0 or more"),
        (["--device", "cuda"], 2, "--device cuda: there is no CUDA"),
        (["--device", "toaster"], 2, "toaster"),
        (["--data", "absent.hdf5"], 2, "absent.hdf5 does not exist"),
        (["--env", "halfcheetah-medium"], 1, "sizes of observation and action"),
        (["--env", "antmaze-tiny"], 2, "no evaluation environment here"),
        (["--resume", "absent.pt"], 2, "absent.pt does not exist"),
        (["--eval-only", "README.md"], 2, "is no checkpoint"),
        (["--video", "hopper.mp4"], 2, "--episodes and --video go with --eval-only"),
        (["--seed", "99999999999"], 2, "less than 2^31"),
        (["--env", "Hopper-v2"], 1, "Gymnasium cannot make Hopper-v2"),
        (["--run-dir", "README.md"], 1, "README.md"),
    ],
)
def test_mistakes_end_in_one_sentence(flags, changes, status, message):
    if torch.cuda.is_available() and "cuda" in changes:
        pytest.skip("there is a GPU here")
    done = command([*flags, *changes])
    assert done.returncode == status, done.stderr
    assert message in done.stderr + done.stdout and "Traceback" not in done.stderr


def test_a_full_disk_keeps_the_previous_checkpoint(flags, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    dac.save_checkpoint(path, {"weights": torch.zeros(1000)})
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with pytest.raises(dac.UserError, match=r"cannot write .*checkpoint\.pt"):
            dac.save_checkpoint(path, {"weights": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and list(tmp_path.glob("*.part")) == []


def test_divergence_stops_with_its_name_and_step(flags, tmp_path):
    with pytest.raises(dac.UserError, match=r" is (nan|inf) at update \d+; the last good checkpoint is in"):
        dac.main([*flags, "--total-steps", "200", "--no-eval", "--critic-lr", "2e9", "--max-grad-norm", "2e9"])
    state = torch.load(run_folder(tmp_path) / "checkpoint.pt", weights_only=True)
    assert all(math.isfinite(tensor.sum()) for tensor in state["agent"]["critic"].values())
