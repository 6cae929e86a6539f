"""benchmarks/report.py: the numbers of the tables, and which rows may stand side by side."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import cped
import dac
import qdq
from common import TASKS

for name in ("matplotlib", "pandas", "rliable"):  # in benchmarks/requirements.txt
    pytest.importorskip(name)
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import record  # noqa: E402
import report  # noqa: E402

sys.path.remove(str(BENCHMARKS))
HOPPER = "d4rl/hopper-medium-replay-v2"


def write_run(root, scores, algorithm="dac", seed=0, dataset=HOPPER, env="hopper-medium-replay", before=0, **arguments):
    """A run folder with an evaluation each 10 updates, the first before the first update, after `before` of other stages."""
    folder = root / env / algorithm / f"seed{seed}-{len(list(root.rglob('result.json')))}"
    folder.mkdir(parents=True)
    steps = [10 * i for i in range(len(scores))]
    arguments = {"env": env, "seed": seed, "total_steps": steps[-1] if steps else 10, "eval_episodes": 4} | arguments
    result = {"algorithm": algorithm, "env": env, "seed": seed, "dataset": dataset, "sha256": "ab" * 32}
    result |= {"updates": before + arguments["total_steps"], "seconds": 60.0, "versions": {}}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "args.json").write_text(json.dumps({"args": arguments, "dataset": {"mean_score": 17.5}}))
    rows = [f"{before + step},,{30 * score},{score}" for step, score in zip(steps, scores)]
    rows.insert(1, f"{before + 5},0.1,,")
    (folder / "metrics.csv").write_text("\n".join(["step,train/loss,eval/return,eval/normalized_score", *rows]))
    return folder


def make(root, *sources) -> str:
    """The page; its tables lie in root / "page"."""
    report.main(report.Args(sources or (root,), root / "page.md", reps=100))
    return (root / "page.md").read_text()


def table(path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_row_of_three_seeds(tmp_path):
    for seed, end in enumerate((50, 60, 100)):
        write_run(tmp_path, [0, 900, end, end, end, end - 10, end + 10], seed=seed, before=1000)
    page = make(tmp_path)
    (row,) = table(tmp_path / "page" / "results-d4rl.csv")
    assert (row["seeds"], row["episodes"], row["policy_updates"]) == ("3", "60", "60")
    assert float(row["final_mean"]) == 70 and float(row["final_std"]) == pytest.approx(21.6025, abs=1e-4)  # population's
    assert float(row["last_mean"]) == 80 and float(row["best_mean"]) == 900
    assert 50 <= float(row["final_low"]) < 70 < float(row["final_high"]) <= 100
    assert "| 70.0 ± 21.6 | [" in page and "| 80.0 ± 21.6 | 900.0 ± 0.0 |" in page
    assert "Too few runs" in page


def test_interval_against_the_closed_form():
    scores = np.random.default_rng(0).normal(50, 10, (60, 1))
    low, high = report.interval(scores, reps=4000)[:, 0]
    half = 1.96 * scores.std() / 60**0.5  # of the bootstrap's normal limit
    assert (low, high) == (pytest.approx(scores.mean() - half, abs=0.3), pytest.approx(scores.mean() + half, abs=0.3))


def test_the_bootstrap_is_stratified():
    """Seeds are drawn within each task, so that differences between tasks add nothing."""
    scores = np.array([[0.0, 100.0], [0.0, 100.0], [0.0, 100.0]])
    assert (report.interval(scores, 200, lambda x: np.array([x.mean()])) == 50).all()


SCRIPTS = [  # one stage, and stages before the policy's
    (dac, ["--hidden-dim", "16", "--num-critics", "2", "--num-next-actions", "1", "--num-eval-actions", "1"]),
    (cped, ["--flow-steps", "20", "--flow-hidden-dim", "16"]),
    (qdq, ["--teacher-steps", "2", "--student-steps", "2", "--hidden-dim", "32"]),
]


@pytest.mark.parametrize(("script", "flags"), SCRIPTS)
def test_folders_of_the_scripts_are_read(script, flags, dataset, tmp_path):
    common = ["--env", "hopper-medium", "--data", str(dataset), "--run-dir", str(tmp_path), "--total-steps", "3"]
    result = script.main([*common, *flags, "--eval-every", "1", "--eval-episodes", "1"])
    (run,) = report.read(tmp_path)
    assert [step for step, _ in run["evaluations"]] == [0, 1, 2, 3]
    assert result["final_score"] == pytest.approx(
        np.mean([score for _, score in run["evaluations"][1:]])
    )  # without the untrained
    assert [run[name] for name in ("final", "last", "best")] == [result[f"{name}_score"] for name in ("final", "last", "best")]
    assert (run["dataset"], run["episodes"]) == ("file/small.hdf5", 3)


def test_kinds_of_data_are_never_mixed(tmp_path):
    datasets = ("bundled/hopper-medium-replay", "file/hopper_medium-replay-v2.hdf5", "minari/mujoco/hopper/medium-v0", HOPPER)
    for dataset in datasets:
        write_run(tmp_path, [0, 1, 2], dataset=dataset)
    page = make(tmp_path)
    assert page.count("mean of last five | 95 %") == 4 and page.count("### Beside published scores") == 1
    d4rl, others = page.split("## Bundled samples")
    assert "103.1 ± 0.3" in d4rl and "103.1" not in others
    for dataset in datasets:
        (row,) = table(tmp_path / "page" / f"results-{dataset.split('/')[0]}.csv")
        assert row["dataset"] == dataset


def test_without_d4rl_rows_nothing_stands_beside_published_scores(tmp_path):
    write_run(tmp_path, [0, 1, 2], dataset="bundled/hopper-medium-replay")
    page = make(tmp_path)
    ours, published = page.split("## Published scores")
    assert "No run on D4RL's own files so far" in ours and "103.1" not in ours
    assert "| DAC | DAC | 101.2 ± 2.0 | 103.1 ± 0.3 |" in published and "dac" not in published  # all that is known, apart
    assert "| CPED | CPED | 96.8 ± 2.6 |" in published and "bundled" not in published
    assert not (tmp_path / "page" / "beside-published.csv").exists()


def test_published_rows_of_the_same_task_stand_below_ours(tmp_path):
    write_run(tmp_path, [0, 1, 2], dataset="d4rl/antmaze-umaze-v2", env="antmaze-umaze")
    make(tmp_path)
    cells = {(row["method"], row["printed by"]): row["antmaze-umaze-v2"] for row in table(tmp_path / "page/beside-published.csv")}
    assert cells["**dac**", "here"] == "**1.5**"
    assert cells["DAC", "DAC"] == "99.5 ± 0.9 (v0)" and cells["CPED", "CPED"] == "96.8 ± 2.6"
    assert cells["IQL", "DAC"] == "87.5 (v0)" and cells["IQL", "CPED"] == "89.6"


def test_only_the_seed_may_differ_within_a_row(tmp_path):
    write_run(tmp_path, [0, 1, 2], seed=0, num_critics=10)
    write_run(tmp_path, [0, 3, 4], seed=1, num_critics=10)
    write_run(tmp_path, [0, 5, 6], seed=0, num_critics=2)
    write_run(tmp_path, [0, 7, 8], seed=0, num_critics=2)  # the same run again
    write_run(tmp_path, [0, 7, 8], seed=0, quick=True)
    write_run(tmp_path, [], seed=3)
    page = make(tmp_path)
    rows = {row["algorithm"]: row for row in table(tmp_path / "page" / "results-d4rl.csv")}
    assert {name: row["seeds"] for name, row in rows.items()} == {
        "dac --quick": "1",
        "dac, num_critics 10": "2",
        "dac, num_critics 2": "1",
    }
    assert rows["dac, num_critics 2"]["last_mean"] == "8.0" and rows["dac, num_critics 2"]["final_low"] == ""
    assert "dac, num_critics 2 on d4rl/hopper-medium-replay-v2, seed 0: given twice" in page
    assert "seed 3: not evaluated" in page


def test_aggregates_over_tasks(tmp_path):
    finals = {}
    for i, env in enumerate(TASKS[:2]):
        for algorithm, level in (("dac", 60), ("cped", 40)):
            for seed in range(3):
                score = finals[algorithm, i, seed] = level + 10 * i + seed
                write_run(tmp_path, [0, score, score], algorithm, seed, f"d4rl/{env}-v2", env)
    write_run(tmp_path, [0, 1, 1], "qdq", 0, f"d4rl/{TASKS[0]}-v2", TASKS[0])
    page = make(tmp_path)
    rows = {(row["metric"], row["algorithm"]): row for row in table(tmp_path / "page" / "aggregates-d4rl.csv")}
    middle = sorted(score for (algorithm, *_), score in finals.items() if algorithm == "dac")[
        1:-1
    ]  # 6 scores less 1 on each side
    assert float(rows["interquartile mean", "dac"]["value"]) == np.mean(middle)
    assert float(rows["optimality gap to 100", "dac"]["value"]) == 100 - 66
    assert float(rows["probability of improvement", "cped better than dac"]["value"]) == 0
    assert "Not here, for want of two seeds on each of these: qdq." in page
    assert (tmp_path / "page" / "profiles-d4rl.svg").exists()


def test_a_results_table_says_the_same_as_the_folders_and_the_page_is_reproducible(tmp_path):
    for seed in range(2):
        write_run(tmp_path / "runs", [0, 1, 2 + seed], seed=seed, before=100)
    rows = []
    for run in report.read(tmp_path / "runs"):
        texts = {key: json.dumps(run[key]) for key in ("arguments", "evaluations", "seed", "behaviour")}
        rows.append({key: run[key] for key in ("algorithm", "env", "dataset", "sha256")} | texts)
    report.write_csv(tmp_path / "sweep.csv", rows)
    page = make(tmp_path, tmp_path / "runs")
    curves = (tmp_path / "page" / "curves-d4rl.svg").read_bytes()
    assert make(tmp_path, tmp_path / "sweep.csv") == page
    assert (tmp_path / "page" / "curves-d4rl.svg").read_bytes() == curves


def test_recorded_runs_need_no_folders_and_lead_to_their_commands(tmp_path):
    """record.py keeps all that the page says of a run; labels and records tell rows apart, whatever else differs in them."""
    folders = [
        write_run(tmp_path / "runs", [0, 1, 2 + seed], seed=seed, before=100, data="/home/me/hopper.hdf5") for seed in (0, 1)
    ]
    folders += [write_run(tmp_path / "runs", [0, 5, 9], seed=0, eta=2.0, rho=1.5)]
    kept = tmp_path / "results" / "first"
    record.main(record.Args(tuple(folders), kept, ("", "", "strong"), ("eval/normalized_score",)))
    (kept / "README.md").write_text("the commands")
    record.main(record.Args((folders[0],), tmp_path / "results" / "second", (), ("eval/normalized_score",)))
    page = make(tmp_path, tmp_path / "results")
    rows = table(tmp_path / "page" / "results-d4rl.csv")
    assert [(row["algorithm"], row["seeds"], row["final_mean"]) for row in rows] == [
        ("dac", "1", "1.5"),  # no README, no link
        ("dac (first)", "2", "1.75"),
        ("dac strong (first)", "1", "7.0"),
    ]
    assert "| dac strong [(first)](results/first) | 20 | 1 | 8 | 7.0 |" in page and "| 17.5 | dac | 20 |" in page
    assert {path.name for path in kept.glob("*.csv")} == {
        "results.csv",
        "hopper-medium-replay-dac-seed0.csv",
        "hopper-medium-replay-dac-seed1.csv",
        "hopper-medium-replay-dac-strong-seed0.csv",
    }
    assert "/home/me" not in (kept / "results.csv").read_text()
    with pytest.raises(SystemExit, match=r"is the second hopper-medium-replay-dac-seed0.csv: --labels"):
        record.main(record.Args((folders[0], folders[2]), kept))


@pytest.mark.parametrize("content", [None, "", "env,algorithm\nhopper-medium,dac\n", "seed,arguments,evaluations\n0,{,[]\n"])
def test_a_wrong_source_is_one_sentence(content, tmp_path):
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=r"^error: .*table.csv "):
        make(tmp_path, path)


@pytest.mark.parametrize("wrong", [{"sources": ()}, {"out": Path("page")}, {"reps": 10}])
def test_wrong_arguments_are_one_sentence(wrong, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: needed are"):
        report.main(report.Args(**{"sources": (tmp_path,)} | wrong))
