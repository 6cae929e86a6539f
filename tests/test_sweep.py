"""benchmarks/sweep.py: which jobs there are, which of them are done, their rows; a killed, an
interrupted and a failing job."""

import contextlib
import csv
import dataclasses
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

import cped
import dac

for name in ("rich", "ray"):
    pytest.importorskip(name, reason="needs benchmarks/requirements.txt")
ROOT = Path(__file__).resolve().parent.parent
import rows  # noqa: E402
import sweep  # noqa: E402

SMALL = (
    "--num-critics 2 --num-next-actions 2 --hidden-dim 16 --batch-size 64 --log-every 5"
    " --checkpoint-minutes 0.0001 --data small.hdf5"
)
EVALUATED = f"{SMALL} --total-steps 40 --eval-every 20 --eval-episodes 1 --final-episodes 2"
needs_proc = pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="looks for processes in /proc"
)


@pytest.fixture
def folder(dataset, tmp_path, monkeypatch):
    """The working directory, with small.hdf5 in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(flags: str, /, **changes) -> list[sweep.Job]:
    values = {
        "algorithms": ("dac",),
        "envs": ("hopper-medium",),
        "seeds": (0,),
        "dac_flags": flags,
    }
    return sweep.plan(sweep.Args(**{**values, **changes}))


def train(flags: str, seed: int = 0) -> dict:
    return dac.main(["--env", "hopper-medium", "--seed", str(seed), *flags.split()])


def train_half(flags: str, monkeypatch) -> None:
    """A run that dies at update 23."""
    update = dac.DAC.update

    def dies(agent, batch):
        if agent.step == 22:
            raise KeyboardInterrupt
        return update(agent, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dac.DAC, "update", dies)
        train(flags)


def table(path: Path = Path("runs/results.csv")) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------- without Ray


def test_jobs_are_all_combinations_seed_by_seed_with_flags_for_each_script(folder):
    jobs = plan(
        "--rho 0.25",
        algorithms=("dac", "cped"),
        envs=("hopper-medium", "walker2d-medium"),
        seeds=(1, 0, 1),
        flags="--data {env}.hdf5 --quick",
        cped_flags="--no-eval",
    )
    triples = [
        ("dac", "hopper-medium"),
        ("cped", "hopper-medium"),
        ("dac", "walker2d-medium"),
        ("cped", "walker2d-medium"),
    ]
    expected = [(*pair, seed) for seed in (1, 0) for pair in triples]
    assert [(job.algorithm, job.env, job.seed) for job in jobs] == expected
    assert jobs[0].flags == ["--data", "hopper-medium.hdf5", "--quick", "--rho", "0.25"]
    assert jobs[3].flags == ["--data", "walker2d-medium.hdf5", "--quick", "--no-eval"]
    args = jobs[0].args
    assert (args["rho"], args["seed"], args["num_critics"]) == (0.25, 1, 2)  # typed, own, --quick
    assert {"run_dir", "resume", "device", "flow"} <= set(sweep.FREE)
    assert not {"data", "eta", "total_steps", "eval_episodes"} & set(sweep.FREE)


def test_a_path_with_a_star_is_the_newest_that_fits(folder):
    for time_of_start in ("1", "3", "2"):
        Path(f"runs/hopper-medium/cped/seed0-{time_of_start}").mkdir(parents=True)
    first, second = plan(
        "",
        algorithms=("cped",),
        envs=("hopper-medium", "walker2d-medium"),
        cped_flags="--flow runs/{env}/cped/s*",
    )
    assert first.flags == ["--flow", "runs/hopper-medium/cped/seed0-3"]
    # there is none: the script will say so
    assert second.flags == ["--flow", "runs/walker2d-medium/cped/s*"]


def test_the_sweeps_of_the_readme_can_be_planned():
    text = (ROOT / "benchmarks" / "README.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("python benchmarks/sweep.py")]
    assert len(lines) >= 5
    for line in lines:
        args = tyro.cli(sweep.Args, args=shlex.split(line)[2:])
        small = dataclasses.replace(args, envs=("hopper-medium",), seeds=args.seeds[:1])
        assert sweep.plan(small)


@pytest.mark.parametrize(
    "flags",
    [
        "--seed 3",
        "--env walker2d-medium",
        "--run-dir elsewhere",
        "--resume runs/x",
        "--resume=runs/x",
        "--critic-lr -1",
    ],
)
def test_flags_that_are_the_sweeps_own_or_wrong_are_refused_before_anything_runs(folder, flags):
    with pytest.raises(SystemExit, match=r"^error: .*(not by --flags|must be from 0)"):
        plan(flags)


def test_a_run_is_known_by_its_arguments(folder, monkeypatch):
    (job,) = plan(EVALUATED)
    assert sweep.find_run(job) == (None, False)
    train_half(EVALUATED, monkeypatch)
    run, finished = sweep.find_run(job)
    assert run.parent == Path("runs/hopper-medium/dac") and not finished
    (other,) = plan(f"{EVALUATED} --eta 2")
    assert sweep.find_run(other) == (None, False)  # another protocol's
    assert sweep.find_run(plan(f"{EVALUATED} --device cpu")[0]) == (run, False)
    assert sweep.find_run(job._replace(seed=2)) == (None, False)
    (run / "result.json").write_text('{"algorithm": "d')  # killed while it was written
    assert sweep.find_run(job) == (run, False)
    later = run.with_name("seed0-99991231-235959")
    later.mkdir()
    (later / "args.json").write_text((run / "args.json").read_text())
    assert sweep.find_run(job) == (run, False)  # the later one has no checkpoint
    (later / "result.json").write_text('{"updates": 40}')
    assert sweep.find_run(job) == (later, True)


def test_a_shorter_run_goes_on_and_a_longer_one_is_left_alone(folder):
    train(f"{EVALUATED} --stop-after 20")
    (short,), (long,), (whole,) = (
        plan(f"{EVALUATED} {end}") for end in ("--stop-after 20", "--stop-after 30", "")
    )
    run, finished = sweep.find_run(short)
    assert finished and sweep.find_run(long) == (run, False) == sweep.find_run(whole)
    sweep.record(short, "", Path("runs/results.csv"))

    sweep.attempt(long, folder)
    assert sweep.find_run(long) == (run, True) and sweep.find_run(short) == (None, False)
    sweep.attempt(whole, folder)
    assert sweep.find_run(whole) == (run, True)
    for job in (whole, whole):
        sweep.record(job, "", Path("runs/results.csv"))
    rows = [(row["policy_updates"], row["arguments"]) for row in table()]
    path = f"hopper-medium/dac/{run.name}/args.json"
    assert rows == [("20", path), ("40", path)]
    assert json.loads((run / "args.json").read_text())["args"]["stop_after"] is None


def test_a_finished_run_has_one_row_with_all_columns(folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = train(EVALUATED)
    (job,) = plan(EVALUATED)
    run, _ = sweep.find_run(job)
    (run / "machine.json").write_text(json.dumps(sweep.machine()))
    for _ in range(2):
        sweep.record(job, "strong {algorithm}", Path("runs/results.csv"))
    (row,) = table()
    assert tuple(row) == rows.COLUMNS
    assert all(row[name] for name in set(row) - {"commit"})  # the files may be edited
    for name in ("algorithm", "env", "sha256", "device"):
        assert row[name] == result[name]
    assert row["label"] == "strong dac"
    assert json.loads(row["versions"]) == result["versions"]
    stored = json.loads((run / "args.json").read_text())
    (read,) = rows.read_table(Path("runs/results.csv"))
    assert read["args"] == stored["args"] and read["commit"] == rows.commit_of(stored["sha256"])
    assert [update for update, _ in read["evaluations"]] == [20, 40]
    for name, key in (
        ("score_last_5", "normalized_score_last_5"),
        ("score_best", "normalized_score_best"),
        ("final_score", "final_normalized_score"),
        ("final_error", "final_normalized_score_error"),
        ("seconds", "seconds"),
    ):
        assert read[name] == pytest.approx(result[key], rel=1e-5), name
    assert (row["cores"], row["threads"]) == (str(os.cpu_count()), "1")
    assert Path("runs", row["arguments"]).parent == run


def test_attempts_resume_what_is_half_done_and_end_badly_where_the_script_does(folder, monkeypatch):
    (job,) = plan(EVALUATED)
    monkeypatch.setattr(sweep, "ROOT", folder)  # with a script that only says how it was called
    script = Path("dac.py")
    script.write_text("import sys\nprint('half way', end='\\r')\nprint(*sys.argv[1:])\nsys.exit(1)")
    with pytest.raises(subprocess.CalledProcessError):  # upon which Ray tries again
        sweep.attempt(job, folder)
    own = f"--env hopper-medium --seed 0 {EVALUATED} --run-dir runs"
    assert sweep.last_line(job.log) == own

    train_half(EVALUATED, monkeypatch)
    run, _ = sweep.find_run(job)
    with pytest.raises(subprocess.CalledProcessError):
        sweep.attempt(job, folder)
    resumed = f"{own} --resume {run} --stop-after None"
    assert sweep.last_line(job.log) == resumed
    log = job.log.read_text()
    assert log.count(f"dac.py {own}") == 2  # all attempts are in the log
    dac.main(resumed.split())  # is a command that the script takes
    sweep.attempt(job, folder)
    assert job.log.read_text() == log  # done: nothing was started


def test_updates_count_from_the_start_of_the_policy_stage(folder):
    flags = "--no-eval --data small.hdf5 --flow-steps 20 --total-steps 10 --log-every 5"
    flags += " --flow-hidden-dim 16 --hidden-dim 16 --batch-size 32"
    cped.main(["--env", "hopper-medium", *flags.split()])
    (job,) = plan("", algorithms=("cped",), cped_flags=flags)
    run, _ = sweep.find_run(job)
    row = rows.read_run(run)
    with (run / "metrics.csv").open() as file:
        metrics = list(csv.DictReader(file))
    speeds = [float(line["time/updates_per_s"]) for line in metrics if int(line["step"]) > 20]
    assert len(speeds) == 2 and row["updates_per_s"] == pytest.approx(statistics.median(speeds))
    assert (row["updates"], row["policy_updates"]) == (30, 10)
    assert (row["evaluations"], row["score_last_5"], row["final_score"]) == ([], None, None)
    assert row["cpu"] is None  # no sweep ran it


def test_a_table_with_other_columns_is_refused(folder):
    Path("old.csv").write_text("algorithm,env\ndac,hopper-medium\n")
    with pytest.raises(SystemExit, match=r"^error: old\.csv has other columns"):
        sweep.main(["--envs", "hopper-medium", "--results", "old.csv"])


@pytest.mark.parametrize(
    ("address", "where"),
    [(None, "cannot be started here"), ("127.0.0.1:1", "at --address 127.0.0.1:1 ")],
)
def test_a_ray_that_cannot_be_had_is_one_sentence(address, where, folder, monkeypatch):
    def init(*args, **kwargs):  # as Ray does where the machine is too busy
        raise Exception("The current node timed out during startup.\nAnd so on")

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(init=init))
    args = sweep.Args(("hopper-medium",), address=address)
    with pytest.raises(SystemExit, match=f"^error: Ray {where}.*the same command tries again$"):
        sweep.run_all(plan(EVALUATED), args, Path("runs/results.csv"))


# ----------------------------------------------------------------------------------- with Ray


def start(*argv: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "benchmarks" / "sweep.py"), "--algorithms", "dac", *argv]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell's background job, which these tests may be, ignores SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition, seconds: float = 300):
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise TimeoutError


def children() -> list[int]:
    """Process ids of the scripts that train in this test's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            here = (path / "cwd").resolve() == Path.cwd()
            if b"dac.py" in (path / "cmdline").read_bytes() and here:
                found.append(int(path.name))
    return found


@needs_proc
def test_a_killed_job_is_resumed_and_a_second_call_runs_only_what_is_missing(
    folder, monkeypatch, capsys
):
    Path("small.hdf5").rename("hopper-medium.hdf5")  # there is none for the other task
    small = SMALL.replace("small", "{env}")
    flags = f"--dac-flags={small} --total-steps 300 --eval-every 300 --eval-episodes 1"
    flags += " --final-episodes 2"
    both = start("--envs", "hopper-medium", "walker2d-medium", "--seeds", "0", flags)
    wait_for(lambda: list(folder.glob("runs/hopper-medium/dac/*/checkpoint.pt")))
    (victim,) = [
        pid for pid in children() if b"hopper" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(victim, signal.SIGKILL)
    said, _ = both.communicate(timeout=240)
    failure = (
        "dac walker2d-medium seed 0 failed; runs/walker2d-medium/dac/seed0.log ends with:"
        " error: walker2d-medium.hdf5 does not"
    )
    assert both.returncode == 1 and f"\nerror: {failure}" in said and "Traceback" not in said, said
    log = Path("runs/walker2d-medium/dac/seed0.log").read_text()
    assert log.count("dac.py --env") == 3  # a mistake of the user is tried again, too
    assert "dac hopper-medium seed 0: last policy" in said
    log = Path("runs/hopper-medium/dac/seed0.log").read_text()
    assert log.count("dac.py --env") == 2 and log.count("--resume") == 1 and "final_return" in log
    (row,) = table()
    assert tuple(row) == rows.COLUMNS
    assert (row["env"], row["updates"], row["threads"]) == ("hopper-medium", "300", "1")
    assert row["cpu"] and len(list(folder.glob("runs/hopper-medium/dac/seed0-*"))) == 1

    monkeypatch.setattr(sweep, "run_all", None)  # a second call has nothing to run
    sweep.main(["--algorithms", "dac", "--envs", "hopper-medium", "--seeds", "0", flags])
    said = capsys.readouterr().out
    assert said == "1 jobs, 1 of them done before; results in runs/results.csv\n"
    assert table() == [row] and Path("runs/hopper-medium/dac/seed0.log").read_text() == log


@needs_proc
def test_an_interrupted_sweep_leaves_checkpoints(folder):
    flags = f"{SMALL} --total-steps 1000000 --no-eval"
    driver = start("--envs", "hopper-medium", "--seeds", "0", "1", f"--flags={flags}")
    wait_for(lambda: len(list(folder.glob("runs/*/dac/*/checkpoint.pt"))) == 2)
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=240)
    assert driver.returncode == 1 and "Traceback" not in said
    assert "error: interrupted; the same command goes on from the last checkpoints" in said
    assert children() == []
    for job in plan(flags, seeds=(0, 1)):
        run, finished = sweep.find_run(job)
        step = torch.load(run / "checkpoint.pt", weights_only=True)["agent"]["step"]
        assert step > 0 and not finished
