"""benchmarks/sweep.py: which jobs there are, which of them are done, their rows; a killed, an interrupted and a failing job."""

import contextlib
import csv
import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import tyro

pytest.importorskip("rich", reason="needs benchmarks/requirements.txt")

import dac

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("sweep", ROOT / "benchmarks" / "sweep.py")
sweep = importlib.util.module_from_spec(spec)
sys.modules["sweep"] = sweep  # dataclasses look their module up there
spec.loader.exec_module(sweep)

SMALL = (
    "--num-critics 2 --num-next-actions 2 --hidden-dim 16 --batch-size 64 --log-every 5 --checkpoint-every 20 --data small.hdf5"
)
EVALUATED = f"{SMALL} --total-steps 40 --eval-every 20 --eval-episodes 1"


@pytest.fixture
def folder(dataset, tmp_path, monkeypatch):
    """The working directory, with small.hdf5 in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(flags: str, /, **changes) -> list["sweep.Job"]:
    values = {"algorithms": ("dac",), "envs": ("hopper-medium",), "seeds": (0,), "dac_flags": flags}
    return sweep.plan(sweep.Args(**(values | changes)))


def train(flags: str, seed: int = 0) -> dict:
    return dac.main(["--env", "hopper-medium", "--seed", str(seed), *flags.split()])


def train_half(flags: str, monkeypatch) -> None:
    """A run that is interrupted by a signal at update 23."""
    update, half = dac.DAC.update, monkeypatch.context()

    def interrupted(agent, *batch):
        if agent.step == 22:
            signal.raise_signal(signal.SIGTERM)
        return update(agent, *batch)

    with half as patch, pytest.raises(dac.UserError, match="stopped at update 23"):
        patch.setattr(dac.DAC, "update", interrupted)
        train(flags)


def table(path: Path = Path("runs/results.csv")) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------------------------------- without Ray


def test_jobs_are_all_combinations_seed_by_seed_with_flags_for_each_script(folder):
    names = {"algorithms": ("dac", "cped"), "envs": ("hopper-medium", "walker2d-medium"), "seeds": (1, 0, 1)}
    jobs = plan("--rho 0.25", flags="--data {env}.hdf5 --quick", cped_flags="--no-eval", **names)
    triples = [("dac", "hopper-medium"), ("cped", "hopper-medium"), ("dac", "walker2d-medium"), ("cped", "walker2d-medium")]
    assert [(job.algorithm, job.env, job.seed) for job in jobs] == [(*pair, seed) for seed in (1, 0) for pair in triples]
    assert jobs[0].flags == ["--data", "hopper-medium.hdf5", "--quick", "--rho", "0.25"]
    assert jobs[3].flags == ["--data", "walker2d-medium.hdf5", "--quick", "--no-eval"]
    assert (jobs[0].args["rho"], jobs[0].args["seed"], jobs[0].args["num_critics"]) == (0.25, 1, 2)  # typed, own, of --quick
    assert not {"run_dir", "resume", "device", "flow"} & (jobs[0].args.keys() | jobs[1].args.keys())


def test_a_path_with_a_star_is_the_newest_that_fits(folder):
    for time_of_start in ("1", "3", "2"):
        Path(f"runs/hopper-medium/cped/seed0-{time_of_start}").mkdir(parents=True)
    first, second = plan(
        "", algorithms=("cped",), envs=("hopper-medium", "walker2d-medium"), cped_flags="--flow runs/{env}/cped/s*"
    )
    assert first.flags == ["--flow", "runs/hopper-medium/cped/seed0-3"]
    assert second.flags == ["--flow", "runs/walker2d-medium/cped/s*"]  # there is none: the script will say so
    assert "flow" not in first.args  # a run with its own flow is as good


def test_the_sweeps_of_the_readme_can_be_planned():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("python benchmarks/sweep.py")]
    assert len(commands) >= 5
    for line in commands:
        args = tyro.cli(sweep.Args, args=shlex.split(line)[2:])
        assert sweep.plan(dataclasses.replace(args, envs=("hopper-medium",), seeds=args.seeds[:1]))


@pytest.mark.parametrize("flags", ["--seed 3", "--env walker2d-medium", "--run-dir elsewhere", "--critic-lr -1"])
def test_flags_that_are_the_sweeps_own_or_wrong_are_refused_before_anything_runs(folder, flags):
    with pytest.raises(sweep.UserError, match=r"not for --flags|must be 0 or more") as refusal:
        plan(flags)
    assert refusal.value.status == 2


def test_a_run_is_known_by_its_arguments(folder, monkeypatch):
    (job,) = plan(EVALUATED)
    assert sweep.find_run(job) == (None, {})
    train_half(EVALUATED, monkeypatch)
    run, result = sweep.find_run(job)
    assert run.parent == Path("runs/hopper-medium/dac") and result == {}
    (other,) = plan(f"{EVALUATED} --eta 2")
    assert sweep.find_run(other) == (None, {})  # another protocol's
    assert sweep.find_run(plan(f"{EVALUATED} --device cpu")[0])[0] == run
    assert sweep.find_run(job._replace(seed=2)) == (None, {})
    (run / "result.json").write_text('{"algorithm": "d')  # killed while it was written
    assert sweep.find_run(job) == (run, {})
    later = run.with_name("seed0-99991231-235959")
    later.mkdir()
    (later / "args.json").write_text((run / "args.json").read_text())
    assert sweep.find_run(job)[0] == run  # the later one has no checkpoint
    (later / "result.json").write_text('{"updates": 40}')
    assert sweep.find_run(job) == (later, {"updates": 40})


def test_a_finished_run_has_one_row_with_all_columns(folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = train(EVALUATED)
    (job,) = plan(EVALUATED)
    run, _ = sweep.find_run(job)
    (run / "machine.json").write_text(json.dumps(sweep.machine()))
    for _ in range(2):
        sweep.record(job, Path("runs/results.csv"))
    (row,) = table()
    assert tuple(row) == sweep.COLUMNS and all(row[name] for name in set(row) - {"gpu"})
    assert [row[name] for name in ("algorithm", "env", "seed", "sha256")] == ["dac", "hopper-medium", "0", result["sha256"]]
    stored = json.loads((run / "args.json").read_text())
    assert json.loads(row["arguments"]) == stored["args"] and json.loads(row["versions"]) == result["versions"]
    assert json.loads(row["behaviour"]) == stored["dataset"]["mean_score"] and row["flags"] == EVALUATED
    evaluations = json.loads(row["evaluations"])
    assert [update for update, _ in evaluations] == [0, 20, 40] and evaluations[-1][1] == result["last_score"]
    assert (float(row["final_score"]), float(row["seconds"])) == (result["final_score"], result["seconds"])
    assert row["commit"].removesuffix("-dirty").isalnum() and len(row["commit"]) >= 40
    assert (int(row["cores"]), row["threads"], Path("runs", row["run"])) == (os.cpu_count(), "1", run)


def test_attempts_resume_what_is_half_done_and_tell_a_mistake_from_a_failure(folder, monkeypatch):
    (job,) = plan(EVALUATED)
    monkeypatch.setattr(sweep, "ROOT", folder)  # with a script that only says how it was called
    Path("dac.py").write_text("import sys\nprint('half way', end='\\r')\nprint(*sys.argv[1:])\nsys.exit(2)")
    assert sweep.attempt(job, folder) == 2
    own = f"--env hopper-medium --seed 0 {EVALUATED} --run-dir runs"
    assert sweep.last_line(job.log) == own

    train_half(EVALUATED, monkeypatch)
    run, _ = sweep.find_run(job)
    assert sweep.attempt(job, folder) == 2 and sweep.last_line(job.log) == f"{own} --resume {run}"
    Path("dac.py").write_text("raise SystemExit(1)")
    with pytest.raises(subprocess.CalledProcessError):  # upon which Ray tries again
        sweep.attempt(job, folder)
    log = job.log.read_text()
    assert log.count(f"dac.py {own}") == 3  # all attempts are in the log
    train(f"{EVALUATED} --resume {run}")
    assert sweep.attempt(job, folder) == 0 and job.log.read_text() == log  # done: nothing was started


def test_updates_count_from_the_start_of_the_policy_stage(folder):
    flags = ["--no-eval", "--data", "small.hdf5", "--flow-steps", "20", "--total-steps", "10", "--log-every", "5"]
    flags += ["--flow-hidden-dim", "16", "--hidden-dim", "16", "--batch-size", "32"]
    import cped

    cped.main(["--env", "hopper-medium", *flags])
    (job,) = plan("", algorithms=("cped",), cped_flags=" ".join(flags))
    row = sweep.result_row(job, Path("runs/results.csv"))
    with (sweep.find_run(job)[0] / "metrics.csv").open() as file:
        speeds = [float(row["time/updates_per_s"]) for row in csv.DictReader(file) if int(row["step"]) > 20]
    assert row["updates_per_s"] == pytest.approx(statistics.median(speeds))
    assert (row["updates"], row["evaluations"], row["final_score"], row["commit"]) == (30, "[]", "", "")  # no sweep ran it


def test_a_table_with_other_columns_is_refused(folder):
    Path("old.csv").write_text("algorithm,env\ndac,hopper-medium\n")
    with pytest.raises(sweep.UserError, match=r"old\.csv has other columns"):
        sweep.main(["--envs", "hopper-medium", "--results", "old.csv"])


@pytest.mark.parametrize(("address", "where"), [(None, "cannot be started here"), ("127.0.0.1:1", "at --address 127.0.0.1:1 ")])
def test_a_ray_that_cannot_be_had_is_one_sentence(address, where, folder, monkeypatch):
    def init(*args, **kwargs):
        raise Exception("The current node timed out during startup.\nAnd so on")  # as Ray does where the machine is too busy

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(init=init))
    with pytest.raises(sweep.UserError, match=f"^Ray {where}.*the same command tries again$"):
        sweep.run_all(plan(EVALUATED), sweep.Args(("hopper-medium",), address=address), Path("runs/results.csv"))


# ------------------------------------------------------------------------------------------------------------ with Ray


def start(*argv: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "benchmarks" / "sweep.py"), "--algorithms", "dac", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds: float = 120):
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise TimeoutError


def children() -> list[int]:
    """Process ids of the scripts that train in this test's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"dac.py" in (path / "cmdline").read_bytes() and (path / "cwd").resolve() == Path.cwd():
                found.append(int(path.name))
    return found


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_a_killed_job_is_resumed_and_a_second_call_runs_only_what_is_missing(folder, monkeypatch, capsys):
    pytest.importorskip("ray", reason="needs benchmarks/requirements.txt")
    Path("small.hdf5").rename("hopper-medium.hdf5")  # there is none for the other task
    flags = f"--dac-flags={SMALL.replace('small', '{env}')} --total-steps 300 --eval-every 300 --eval-episodes 1"
    both = start("--envs", "hopper-medium", "walker2d-medium", "--seeds", "0", flags)
    wait_for(lambda: list(folder.glob("runs/hopper-medium/dac/*/checkpoint.pt")))
    (victim,) = [pid for pid in children() if b"hopper" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    said, _ = both.communicate(timeout=240)
    failure = (
        "dac walker2d-medium seed 0 failed; runs/walker2d-medium/dac/seed0.log ends with: error: walker2d-medium.hdf5 does not"
    )
    assert both.returncode == 1 and f"\nerror: {failure}" in said and "Traceback" not in said, said
    assert "dac hopper-medium seed 0: final score" in said
    log = Path("runs/hopper-medium/dac/seed0.log").read_text()
    assert log.count("dac.py --env") == 2 and log.count("--resume") == 1 and "final score" in log
    (row,) = table()
    assert tuple(row) == sweep.COLUMNS and (row["env"], row["updates"], row["threads"]) == ("hopper-medium", "300", "1")
    assert row["cpu"] and row["commit"] and len(list(folder.glob("runs/hopper-medium/dac/seed0-*"))) == 1

    monkeypatch.setattr(sweep, "run_all", None)  # a second call has nothing to run
    sweep.main(["--algorithms", "dac", "--envs", "hopper-medium", "--seeds", "0", flags])
    assert capsys.readouterr().out == "1 jobs, 1 of them done before; results in runs/results.csv\n"
    assert table() == [row] and Path("runs/hopper-medium/dac/seed0.log").read_text() == log


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_an_interrupted_sweep_leaves_checkpoints(folder):
    pytest.importorskip("ray", reason="needs benchmarks/requirements.txt")
    flags = f"{SMALL} --total-steps 1000000 --no-eval"
    driver = start("--envs", "hopper-medium", "--seeds", "0", "1", f"--flags={flags}")
    wait_for(lambda: len([path for path in folder.glob("runs/*/dac/*/metrics.csv") if len(path.read_text().split()) > 3]) == 2)
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=240)
    assert driver.returncode == 1 and "error: interrupted; the same command goes on" in said and "Traceback" not in said
    assert children() == []
    for job in plan(flags, seeds=(0, 1)):
        run, result = sweep.find_run(job)
        step = torch.load(run / "checkpoint.pt", weights_only=True)["agent"]["step"]
        assert step > 0 and sweep.last_line(job.log).startswith(f"error: stopped at update {step:,}") and not result
