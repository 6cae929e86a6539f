"""Runs as a user starts them: files, exact resume, interruptions, mistakes; in each script."""

import csv
import errno
import hashlib
import importlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from conftest import make_raw, write_hdf5

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}

# Small networks; {n} updates of each stage before the policy's.
SMALL = {
    "dac": "--num-critics 2 --num-next-actions 2 --hidden-dim 16",
    "qdq": "--num-samples 4 --hidden-dim 64 --teacher-steps {n} --student-steps {n}",
    "cped": "--flow-hidden-dim 16 --hidden-dim 16 --critic-start 3 --actor-q-start 6"
    " --flow-steps {n} --flow-training joint --joint-steps 8 --constraint dual",
}
SCRIPTS = list(SMALL)
# Networks of the usual width, whose products torch shares out among threads.
WIDE = {
    "dac": "--num-critics 2 --num-next-actions 1 --total-steps 1",
    "qdq": "--num-samples 2 --teacher-steps 1 --student-steps 1 --total-steps 1",
    "cped": "--flow-hidden-dim 256 --flow-steps 1 --disc-updates 1 --total-steps 2"
    " --critic-start 1 --actor-q-start 1",
}

each_script = pytest.mark.parametrize("script", SCRIPTS)


def module(script: str):
    return importlib.import_module(script)


def first_updates(script: str, n: int) -> int:
    """Updates before the policy stage, where each earlier stage has n."""
    return n * SMALL[script].count("{n}")


@pytest.fixture
def run(tmp_path, dataset):
    """run(script, name, *more) trains in the root folder tmp_path / name; returns the result."""

    def run(script: str, name: str, *more: str, n: int = 4) -> dict:
        torch.manual_seed(99)  # the state of the process does not matter
        flags = f"--env hopper-medium --data {dataset} --run-dir {tmp_path / name} --no-eval"
        flags += f" --batch-size 64 --total-steps 12 --log-every 2 {SMALL[script].format(n=n)}"
        return module(script).main([*flags.split(), *more])

    return run


@pytest.fixture
def folder(tmp_path):
    """folder(name) is the only run folder in the root folder tmp_path / name."""

    def folder(name: str) -> Path:
        (path,) = (tmp_path / name).glob("*/*/seed*")
        return path

    return folder


@pytest.fixture
def command(tmp_path, dataset):
    """command(script, *flags) runs a script as a program."""

    def command(script: str, *flags: str) -> subprocess.CompletedProcess:
        own = f"--env hopper-medium --data {dataset} --run-dir {tmp_path / 'runs'}"
        own += f" {SMALL[script].format(n=4)}"
        return subprocess.run(
            [sys.executable, f"{script}.py", *own.split(), *flags],
            cwd=ROOT,
            env=ENV,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return command


def rows(folder: Path) -> list[dict]:
    """metrics.csv without the column that holds a speed."""
    with (folder / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "time/updates_per_s"} for row in table]


def contents(root: Path) -> dict:
    """All that the only run below a root folder left, but for TensorBoard's events."""
    (folder,) = root.glob("*/*/seed*")
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    for path in folder.glob("*.pt"):
        found[path.name] = torch.load(path, weights_only=True)
    return found | {"metrics.csv": rows(folder)}


def differences(a, b) -> list[str]:
    """In what two runs differ, to the bit, but for wall-clock times, folders and their length."""
    found = faults.differences(a, b)
    free = ("/args/run_dir ", "/args/stop_after ")
    return [line for line in found if not any(name in line for name in free)]


def assert_same(a: Path, b: Path) -> None:
    assert not differences(contents(a), contents(b))


# ---------------------------------------------------------------- files


@each_script
def test_a_run_leaves_its_files(script, run, folder):
    flags = "--total-steps 8 --eval --eval-every 4 --eval-episodes 2 --final-episodes 3"
    result = run(script, "runs", *flags.split())
    own = folder("runs")
    files = {path.name for path in own.iterdir()}
    assert {"args.json", "checkpoint.pt", "metrics.csv", "result.json"} < files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not [name for name in files if name.endswith(".part")]
    assert result == json.loads((own / "result.json").read_text())

    before = first_updates(script, 4)
    table = rows(own)
    assert [int(row["step"]) for row in table] == list(range(2, before + 9, 2))
    scored = [row for row in table if row["eval/return"]]
    assert [int(row["step"]) - before for row in scored] == [4, 8]
    for name in ("return", "normalized_score"):
        values = [float(row[f"eval/{name}"]) for row in scored]
        assert result[f"{name}_last_5"] == pytest.approx(np.mean(values))
        assert result[f"{name}_best"] == max(values)
        assert math.isfinite(result[f"final_{name}"])
        assert result[f"final_{name}_error"] >= 0
    assert result["updates"] == before + 8
    assert result["dataset"] == "file/small.hdf5"
    assert result["device"] == "cpu"

    record = json.loads((own / "args.json").read_text())
    assert record["args"]["env"] == "hopper-medium"
    assert record["args"]["total_steps"] == 8
    assert record["dataset"]["sha256"] == result["sha256"]
    assert record["device"] == "cpu"
    assert record["sha256"].keys() == {f"{script}.py", "common.py"}
    for name, digest in record["sha256"].items():
        assert digest == hashlib.sha256((ROOT / name).read_bytes()).hexdigest()


def test_the_preset_comes_before_quick_and_quick_before_what_is_typed():
    dac = module("dac")
    for env in ("hopper-medium", "hopper-medium-v2"):
        args, _ = dac.parse_args(["--env", env, "--quick", "--num-critics", "3"])
        assert args.rho == 1.5
        assert args.eta == dac.QUICK["eta"]
        assert args.num_critics == 3
    assert dac.parse_args(["--env", "my-robot"])[0].rho == dac.Args().rho


def test_the_means_are_of_the_last_five_evaluations(run, folder):
    flags = "--total-steps 14 --eval --eval-every 2 --eval-episodes 1 --final-episodes 1"
    result = run("dac", "runs", *flags.split())
    scores = [float(row["eval/normalized_score"]) for row in rows(folder("runs"))]
    assert len(scores) == 7
    assert result["normalized_score_last_5"] == pytest.approx(np.mean(scores[-5:]))


@each_script
def test_speed_is_per_update_whatever_else_falls_between(script, run, folder, monkeypatch):
    """A clock that advances by 10 s at each look: an evaluation begins a window of its own."""
    clock = iter(range(0, 100_000, 10))
    monkeypatch.setattr(module(script).time, "perf_counter", lambda: next(clock))
    flags = "--total-steps 10 --eval --eval-every 3 --eval-episodes 1 --final-episodes 1"
    run(script, "runs", *flags.split(), "--log-every", "5", "--checkpoint-minutes", "1000", n=5)
    with (folder("runs") / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    before = first_updates(script, 5)
    speeds = {int(row["step"]) - before: row["time/updates_per_s"] for row in table}
    # rows of updates 3, 5, 6, 9, 10; one look at the clock per update, one at the row, one after it
    assert float(speeds[5]) == pytest.approx(2 / 30)
    assert float(speeds[10]) == pytest.approx(1 / 20)


@each_script
def test_training_without_an_environment(script, run, folder):
    result = run(script, "runs", "--env", "my-robot")
    assert not any(row["eval/return"] for row in rows(folder("runs")))
    assert not [name for name in result if name.startswith(("final", "return", "normalized"))]


@each_script
def test_a_task_with_a_version_has_the_folder_of_its_name(script, run, tmp_path):
    run(script, "runs", "--env", "hopper-medium-v2")
    assert list(tmp_path.glob(f"runs/hopper-medium-v2/{script}/seed0-*/result.json"))


@each_script
def test_runs_of_one_second_take_a_suffix(script, run, tmp_path, monkeypatch):
    monkeypatch.setattr(module(script).time, "strftime", lambda text: "seed0-then")
    for _ in range(3):
        run(script, "runs", "--total-steps", "2")
    folders = tmp_path.glob(f"runs/hopper-medium/{script}/*")
    assert {path.name for path in folders} == {"seed0-then", "seed0-then-2", "seed0-then-3"}
    assert len(list(tmp_path.glob("runs/*/*/*/result.json"))) == 3


# ---------------------------------------------------------------- resume


@each_script
def test_a_kill_between_any_two_saves_changes_nothing(script, run, folder, tmp_path, monkeypatch):
    """A checkpoint after each update; each of them is once the one that a run was killed before."""

    class Killed(BaseException):
        pass

    always = ("--checkpoint-minutes", "0")
    run(script, "whole", *always)
    replace = os.replace
    saves = []

    def killed(part, path):
        saves.append(path)
        if len(saves) == last:
            raise Killed
        replace(part, path)

    for last in range(2, 100):  # before the first save there is nothing to go on with
        saves.clear()
        monkeypatch.setattr(os, "replace", killed)
        try:
            run(script, f"save{last}", *always)
            break
        except Killed:
            monkeypatch.setattr(os, "replace", replace)
            own = str(folder(f"save{last}"))
            module(script).main(["--resume", own])
            assert_same(tmp_path / "whole", tmp_path / f"save{last}")
    assert len(saves) == last - 1 >= 12 + first_updates(script, 4)


def test_resume_is_exact_after_sigkill(tmp_path, dataset, run, folder):
    """SIGKILL at an arbitrary moment, with evaluations; benchmarks/faults.py kills longer."""
    flags = "--total-steps 1500 --eval --eval-every 600 --eval-episodes 1 --final-episodes 2"
    flags += " --checkpoint-minutes 0.002 --log-every 5"
    run("dac", "whole", *flags.split())
    small = SMALL["dac"]
    own = f"--env hopper-medium --data {dataset} --run-dir {tmp_path / 'runs'} --batch-size 64"
    process = subprocess.Popen(
        [sys.executable, "dac.py", *f"{own} {small} {flags}".split()],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while not list((tmp_path / "runs").glob("*/dac/*/checkpoint.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    time.sleep(0.7)
    process.kill()
    process.communicate()
    reached = torch.load(folder("runs") / "checkpoint.pt", weights_only=True)["agent"]["step"]
    assert reached < 1500
    module("dac").main(["--resume", str(folder("runs"))])
    assert_same(tmp_path / "whole", tmp_path / "runs")


@each_script
def test_resume_of_a_finished_run_changes_nothing(script, run, folder):
    flags = "--eval --eval-every 6 --eval-episodes 1 --final-episodes 2"
    first = run(script, "runs", *flags.split())
    before = rows(folder("runs"))
    again = module(script).main(["--resume", str(folder("runs"))])
    assert rows(folder("runs")) == before
    del first["seconds"], again["seconds"]
    assert again == first


@each_script
def test_a_run_stopped_early_goes_on_as_if_it_had_not(script, run, folder, tmp_path):
    flags = ("--eval", "--eval-every", "6", "--eval-episodes", "1", "--final-episodes", "1")
    run(script, "whole", *flags)
    result = run(script, "part", *flags, "--stop-after", "7")
    assert result["updates"] == first_updates(script, 4) + 7
    own = folder("part")
    assert json.loads((own / "result.json").read_text()) == result

    def no_result_on_the_way(*_):
        assert not (own / "result.json").exists()

    agent = getattr(module(script), script.upper())
    update = agent.update

    def checked(*args):
        no_result_on_the_way()
        return update(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "update", checked)
        module(script).main(["--resume", str(own), "--stop-after", "9"])
    module(script).main(["--resume", str(own), "--stop-after", "1000"])
    assert_same(tmp_path / "whole", tmp_path / "part")


@each_script
def test_a_checkpoint_beyond_the_end_is_refused(script, run, folder, tmp_path):
    run(script, "runs")
    before = contents(tmp_path / "runs")
    done = first_updates(script, 4) + 12
    with pytest.raises(SystemExit, match=f"is at update {done}, beyond its end at {done - 7}"):
        module(script).main(["--resume", str(folder("runs")), "--stop-after", "5"])
    assert not differences(before, contents(tmp_path / "runs"))


@each_script
def test_a_stopped_run_says_how_it_goes_on(script, run, folder, capsys):
    run(script, "runs", "--stop-after", "5")
    assert "stop        it has ended" not in capsys.readouterr().out
    result = module(script).main(["--resume", str(folder("runs"))])
    assert result["updates"] == first_updates(script, 4) + 5
    out = capsys.readouterr().out
    assert "stop        it has ended; a larger --stop-after or --total-steps continues it" in out
    result = module(script).main(["--resume", str(folder("runs")), "--stop-after", "None"])
    assert result["updates"] == first_updates(script, 4) + 12


def test_a_run_folder_that_cannot_be_made_is_an_error(run, tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "absent" / "disk")
    with pytest.raises(OSError):
        run("dac", "runs")


@each_script
def test_evaluations_do_not_disturb_training(script, run, folder):
    run(script, "a")
    flags = "--eval --eval-every 5 --eval-episodes 1 --final-episodes 1"
    run(script, "b", *flags.split())
    a, b = (torch.load(folder(name) / "checkpoint.pt")["agent"] for name in "ab")
    assert not differences(a, b)


@pytest.mark.parametrize("threads", [1, 2])
@each_script
def test_the_seed_decides_every_bit(script, threads, dataset, tmp_path):
    torch.set_num_threads(threads)
    try:
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            flags = f"--env hopper-medium --data {dataset} --run-dir {tmp_path / name} --no-eval"
            flags += f" --log-every 1 --seed {seed} {WIDE[script]}"
            module(script).main(flags.split())
    finally:
        torch.set_num_threads(1)
    assert_same(tmp_path / "a", tmp_path / "b")
    a, c = (contents(tmp_path / name)["checkpoint.pt"]["agent"] for name in "ac")
    for part in {"actor", "critic", "flow", "student"} & a.keys():
        assert any(not torch.equal(a[part][name], c[part][name]) for name in a[part]), part


# ------------------------------------------------------------ what resume takes and what it refuses


@each_script
def test_what_may_be_typed_beside_resume(script, run, folder, dataset, tmp_path):
    run(script, "runs")
    moved = shutil.copy(dataset, tmp_path / "moved.hdf5")
    more = f"--data {moved} --total-steps 16 --log-every 3 --checkpoint-minutes 1 --device cpu"
    more += " --eval --eval-every 4 --eval-episodes 1 --final-episodes 1"
    result = module(script).main(["--resume", str(folder("runs")), *more.split()])
    assert result["updates"] == first_updates(script, 4) + 16
    assert "final_return" in result


@each_script
def test_resume_refuses_what_would_make_another_run(script, run, folder, tmp_path):
    run(script, "runs")
    own = folder("runs")
    before = contents(tmp_path / "runs")
    other = write_hdf5(tmp_path / "other.hdf5", make_raw(seed=1))
    for flags, message in (
        (
            "--discount 0.5",
            "error: --discount cannot change on --resume: the run was started with 0.99",
        ),
        ("--seed 1", "error: --seed cannot change on --resume: the run was started with 0"),
        (
            "--env walker2d-medium",
            "error: --env cannot change on --resume: the run was started with hopper-medium",
        ),
        ("--quick", "error: --quick cannot change on --resume: the run was started with False"),
        (f"--data {other}", r"was trained on file/small\.hdf5"),
        ("--tau 2", "error: --tau 2.0: must be from 0 to 1"),
    ):
        with pytest.raises(SystemExit, match=message):
            module(script).main(["--resume", str(own), *flags.split()])
    assert not differences(before, contents(tmp_path / "runs"))


@each_script
def test_resume_of_something_else_is_refused(script, run, folder, tmp_path):
    run(script, "runs")
    good = folder("runs")
    other = next(name for name in SMALL if name != script)
    checkpoint = torch.load(good / "checkpoint.pt", weights_only=True)
    old = checkpoint | {"args": checkpoint["args"] | {"tf32": False, "checkpoint_every": 5}}

    def copy(name: str, content) -> Path:
        shutil.copytree(good, tmp_path / name)
        path = tmp_path / name / "checkpoint.pt"
        if isinstance(content, dict):
            torch.save(content, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.unlink()
        return tmp_path / name

    half = (good / "checkpoint.pt").read_bytes()[:10_000]
    (tmp_path / "downloads").mkdir()
    shutil.copy(good / "checkpoint.pt", tmp_path / "downloads")
    for path, message in (
        (tmp_path / "absent", "not the folder of a run"),
        (tmp_path / "downloads", "not the folder of a run"),
        (good / "checkpoint.pt", "not the folder of a run"),
        (copy("none", None), "the run wrote none yet; start it again"),
        (copy("half", half), "is not a checkpoint, or is damaged"),
        (copy("text", b"no checkpoint"), "is not a checkpoint, or is damaged"),
        (copy("other", checkpoint | {"algorithm": other}), f"was written by {other}.py"),
        (
            copy("old", old),
            f"is from another version of {script}.py, with checkpoint_every, tf32",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            module(script).main(["--resume", str(path)])
    assert sorted(path.name for path in (tmp_path / "downloads").iterdir()) == ["checkpoint.pt"]


@each_script
def test_a_flag_that_an_earlier_version_lacked_takes_its_default(script, run, folder):
    run(script, "runs", "--stop-after", "6")
    path = folder("runs") / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["args"]["final_episodes"]
    torch.save(checkpoint, path)
    args, _ = module(script).parse_args(["--resume", str(folder("runs"))])
    assert args.final_episodes == module(script).Args().final_episodes


@each_script
def test_a_saved_policy_is_rebuilt_in_three_lines(script, run, folder):
    run(script, "runs")
    state = torch.load(folder("runs") / "checkpoint.pt", map_location="cpu", weights_only=True)
    args = module(script).Args(**state["args"])
    agent = getattr(module(script), script.upper())(state["obs_dim"], state["act_dim"], args)
    agent.load_state_dict(state["agent"])
    act = agent.act(np.zeros((2, 11)))  # float64, as Gymnasium's MuJoCo environments give it
    assert act.shape == (2, 3)
    assert np.abs(act).max() <= 1


# ---------------------------------------------------------------- copies


COMMON = """import numpy as np

rng = np.random.default_rng(0)
rows = 500


def load_dataset(env, data, need_env):
    obs, next_obs = rng.normal(size=(2, rows, 5)).astype(np.float32)
    act = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    rew = rng.normal(size=rows).astype(np.float32)
    not_done = np.ones(rows, np.float32)
    ends = np.arange(1, rows + 1) % 50 == 0
    arrays = dict(obs=obs, act=act, rew=rew, next_obs=next_obs, not_done=not_done, ends=ends)
    return arrays, {"id": "mine", "sha256": "1"}


def evaluate(act, info, episodes, seed):
    return {"return": act(np.zeros((episodes, 5), np.float32)).sum(axis=1)}
"""


@each_script
def test_a_script_works_alone_with_two_functions_of_ones_own(script, tmp_path):
    """It trains, evaluates, is resumed and acts, without h5py, minari, mujoco and gymnasium."""
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    (tmp_path / "common.py").write_text(COMMON)
    assert len(COMMON.splitlines()) <= 20
    blocked = f"""if True:
        import sys
        for name in ("h5py", "minari", "mujoco", "gymnasium", "pooch", "requests"):
            sys.modules[name] = None
        import {script}
        import numpy, torch
        flags = "--env mine --total-steps 6 --log-every 2 --eval-every 3 --final-episodes 4"
        flags += " --batch-size 64 {SMALL[script].format(n=2)}"
        first = {script}.main([*flags.split(), "--stop-after", "4"])
        from pathlib import Path
        (folder,) = Path("runs/mine/{script}").iterdir()
        last = {script}.main(["--resume", str(folder), "--stop-after", "6"])
        assert last["updates"] == first["updates"] + 2
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        agent = {script}.{script.upper()}(5, 2, {script}.Args(**state["args"]))
        agent.load_state_dict(state["agent"])
        print("acts", agent.act(numpy.zeros((3, 5), numpy.float32)).shape)"""
    done = subprocess.run(
        [sys.executable, "-c", blocked],
        cwd=tmp_path,
        env={name: value for name, value in ENV.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "acts (3, 2)" in done.stdout, done.stderr
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {
        f"{script}.py",
        "common.py",
        "runs",
    }


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ("--ro 3", 2, "Unrecognized"),
        ("--eta much", 2, "eta"),
        ("--device toaster", 2, "toaster"),
        ("--env hoper-medium --data auto", 1, "did you mean hopper-medium"),
        ("--num-critics 0", 1, "error: --num-critics 0: must be from 1 to"),
        ("--device cuda", 1, "error: --device cuda: PyTorch finds no CUDA device here"),
        ("--data absent.hdf5", 1, "absent.hdf5 does not exist"),
        ("--env halfcheetah-medium", 1, "error: "),
        ("--resume absent", 1, "error: --resume absent: this is not the folder of a run"),
        ("--run-dir README.md", 1, "README.md"),
    ],
)
def test_mistakes_end_in_one_sentence(command, flags, status, message, tmp_path):
    if torch.cuda.is_available() and "cuda" in flags:
        pytest.skip("there is a GPU here")
    done = command("dac", *flags.split())
    assert done.returncode == status, done.stderr
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


RANGES = [
    "--discount 1.01",
    "--tau 2",
    "--tau -0.1",
    "--critic-lr nan",
    "--actor-lr inf",
    "--actor-lr -1",
    "--batch-size 0",
    "--total-steps 0",
    "--stop-after 0",
    "--log-every 0",
    "--eval-every -5",
    "--final-episodes 0",
    "--checkpoint-minutes -1",
    "--checkpoint-minutes nan",
    "--hidden-dim 0",
    "--seed -1",
    "--seed 99999999999",
]
OWN_RANGES = {
    "dac": [
        "--num-eval-actions 0",
        "--diffusion-steps 0",
        "--rho -1",
        "--eta inf",
        "--eta-min 2 --eta-max 1",
    ],
    "qdq": [
        "--beta 1.5",
        "--alpha 1.1",
        "--hidden-dim 32",
        "--hidden-dim 80",
        "--grid-points 2",
        "--t-min 0",
        "--t-min 5 --t-max 5",
        "--num-samples 0",
    ],
    "cped": [
        "--lagrange-table 1 2 --lagrange-from 0",
        "--lagrange-from 5 0 --lagrange-table 1 2",
        "--lagrange-from 3 5 --lagrange-table 1 2",
        "--lagrange-table -1",
        "--lagrange-table nan",
        "--epsilon-quantile 1.5",
        "--lagrange-min 2 --lagrange-max 1",
        "--disc-updates 0",
    ],
}


@pytest.mark.parametrize(
    ("script", "flags"),
    [(script, flags) for script in SCRIPTS for flags in RANGES + OWN_RANGES[script]],
)
def test_flags_out_of_their_range_are_one_sentence(script, flags, tmp_path):
    with pytest.raises(SystemExit, match=rf"^error: .*{flags.split()[0]}") as caught:
        module(script).main([*flags.split(), "--data", "bundled", "--run-dir", str(tmp_path)])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "env", ["", "/tmp/x", "..", "../x", "a/../../x", "a//b", "*", "a b", "~", "."]
)
def test_a_task_cannot_leave_the_folder_of_the_runs(env, dataset, tmp_path):
    (tmp_path / "in").mkdir()
    before = sorted(tmp_path.rglob("*"))
    flags = ["--data", str(dataset), "--no-eval", "--run-dir", str(tmp_path / "in" / "runs")]
    with pytest.raises(SystemExit, match="error: --env "):
        module("dac").main(["--env", env, *flags])
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- full disks, bad numbers


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    dac = module("dac")
    path = tmp_path / "checkpoint.pt"
    dac.save({"weights": torch.zeros(1000)}, path)
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with pytest.raises(OSError, match="too large"):
            dac.save({"weights": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


@each_script
@pytest.mark.parametrize("what", ["torch.save", "os.replace", "os.fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_save_that_fails_keeps_the_last_checkpoint(
    script, what, number, run, folder, tmp_path, monkeypatch
):
    owner = torch if what == "torch.save" else os
    name = what.split(".")[1]
    kept = getattr(owner, name)
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            if owner is torch:
                args[1].write(b"half of it")
            raise OSError(number, os.strerror(number))
        return kept(*args)

    always = ("--checkpoint-minutes", "0")
    run(script, "whole", *always)
    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(OSError, match=os.strerror(number)):
        run(script, "part", *always)
    monkeypatch.setattr(owner, name, kept)
    assert [path.name for path in folder("part").glob("*.p*t")] == ["checkpoint.pt"]
    module(script).main(["--resume", str(folder("part"))])
    assert_same(tmp_path / "whole", tmp_path / "part")


FULL_DISK = 'OSError(errno.ENOSPC, "No space left on device")'
FULL_DISK_SENTENCE = (
    "error: [Errno 28] No space left on device (the last checkpoint, if there is one, is intact"
)
CTRL_C_SENTENCE = "stopped: --resume continues from the last checkpoint; without one, start again"


@pytest.mark.parametrize(
    "name, error, sentence",
    [
        ("writerow", FULL_DISK, FULL_DISK_SENTENCE),
        ("add_scalar", FULL_DISK, FULL_DISK_SENTENCE),
        ("add_scalar", "KeyboardInterrupt", CTRL_C_SENTENCE),
    ],
)
def test_a_full_disk_or_ctrl_c_is_one_sentence_and_the_run_goes_on(
    name, error, sentence, tmp_path, dataset
):
    """As a program: the exception is caught at the very end of the script."""
    code = f"""if True:
        import csv, errno, runpy, sys
        import torch.utils.tensorboard
        owner = csv.DictWriter if {name!r} == "writerow" else torch.utils.tensorboard.SummaryWriter
        kept, calls = getattr(owner, {name!r}), []
        def full(*args):
            calls.append(args)
            if len(calls) == 4:
                raise {error}
            return kept(*args)
        setattr(owner, {name!r}, full)
        sys.argv = ["dac.py", *sys.argv[1:]]
        runpy.run_path("dac.py", run_name="__main__")"""
    flags = f"--env hopper-medium --data {dataset} --run-dir {tmp_path / 'runs'} --no-eval"
    flags += f" --total-steps 40 --log-every 2 --checkpoint-minutes 0 {SMALL['dac']}"
    done = subprocess.run(
        [sys.executable, "-c", code, *flags.split()],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    (own,) = (tmp_path / "runs").glob("*/dac/*")
    result = module("dac").main(["--resume", str(own)])
    assert result["updates"] == 40
    assert [int(row["step"]) for row in rows(own)] == list(range(2, 41, 2))


def test_divergence_stops_with_its_name_and_step(run, folder):
    flags = "--total-steps 200 --critic-lr 1e3 --max-grad-norm 2e9 --checkpoint-minutes 0"
    with pytest.raises(
        SystemExit, match=r"error: \S+ is -?(nan|inf) at update \d+; the last good checkpoint"
    ):
        run("dac", "runs", *flags.split())
    state = torch.load(folder("runs") / "checkpoint.pt", weights_only=True)
    assert all(math.isfinite(tensor.sum()) for tensor in state["agent"]["critic"].values())


@each_script
def test_a_checkpoint_never_holds_parameters_that_are_not_finite(script, run, folder, monkeypatch):
    """Even where no metric shows it: one weight of the actor becomes NaN between two log rows."""
    agent_type = getattr(module(script), script.upper())
    update = agent_type.update
    count = first_updates(script, 4) + 7

    def poisoned(self, *args):
        metrics = update(self, *args)
        if self.step == count:
            with torch.no_grad():
                next(self.actor.parameters()).view(-1)[0] = math.nan
        return metrics

    monkeypatch.setattr(agent_type, "update", poisoned)
    with pytest.raises(SystemExit, match=rf"error: actor\.\S+ is nan at update {count}; "):
        run(script, "runs", "--checkpoint-minutes", "0", "--log-every", "1000")
    state = torch.load(folder("runs") / "checkpoint.pt", weights_only=True)
    assert state["agent"]["step"] == count - 1
    assert all(tensor.isfinite().all() for tensor in state["agent"]["actor"].values())
