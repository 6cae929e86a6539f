"""benchmarks/report.py, record.py and rows.py: the numbers of the tables, and which rows may stand
side by side."""

import csv
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import cped
import dac
import qdq
from common import TASKS

for name in ("matplotlib", "scipy"):
    pytest.importorskip(name, reason="needs benchmarks/requirements.txt")
ROOT = Path(__file__).resolve().parent.parent
import record  # noqa: E402
import report  # noqa: E402
import rows  # noqa: E402

HOPPER = "d4rl/hopper-medium-replay-v2"


def write_run(
    root,
    scores,
    algorithm="dac",
    seed=0,
    dataset=HOPPER,
    env="hopper-medium-replay",
    before=0,
    final=None,
    **arguments,
):
    """A run folder with an evaluation each 10 updates, after `before` updates of other stages.

    final: score and standard error of the last policy.
    """
    folder = root / env / algorithm / f"seed{seed}-{len(list(root.rglob('result.json')))}"
    folder.mkdir(parents=True)
    steps = [10 * (i + 1) for i in range(len(scores))]
    arguments = {
        "env": env,
        "seed": seed,
        "total_steps": steps[-1] if steps else 10,
        "eval_episodes": 4,
        "final_episodes": 9,
        **arguments,
    }
    result = {
        "algorithm": algorithm,
        "env": env,
        "seed": seed,
        "dataset": dataset,
        "sha256": "ab" * 32,
        "updates": before + rows.policy_updates(arguments),
        "seconds": 60.0,
        "versions": {},
        "device": "cpu",
    }
    if scores:
        result["return_last_5"] = 30 * np.mean(scores[-5:])
        result["return_best"] = 30 * max(scores)
        result["normalized_score_last_5"] = np.mean(scores[-5:])
        result["normalized_score_best"] = max(scores)
    if final is not None:
        result["final_normalized_score"], result["final_normalized_score_error"] = final
    (folder / "result.json").write_text(json.dumps(result, default=float))
    facts = {"args": arguments, "dataset": {"mean_score": 17.5}, "device": "cpu", "sha256": {}}
    (folder / "args.json").write_text(json.dumps(facts))
    lines = ["step,train/loss,eval/return,eval/normalized_score,time/updates_per_s"]
    lines.append(f"{before + 5},0.1,,,40.5")
    lines += [f"{before + step},,{30 * score},{score}," for step, score in zip(steps, scores)]
    (folder / "metrics.csv").write_text("\n".join(lines))
    return folder


def make(root, *sources) -> str:
    """The page; its tables lie in root / "page"."""
    report.main(report.Args(sources or (root,), root / "page.md", reps=100))
    return (root / "page.md").read_text()


def table(path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------- page


def test_the_row_of_three_seeds(tmp_path):
    for seed, end in enumerate((50, 60, 100)):
        scores = [900, end, end, end, end - 10, end + 10]
        write_run(tmp_path, scores, seed=seed, before=1000, final=(end + 1, 0.5))
    page = make(tmp_path)
    (row,) = table(tmp_path / "page" / "results-d4rl.csv")
    assert (row["seeds"], row["episodes"], row["policy_updates"]) == ("3", "60", "60")
    assert float(row["mean"]) == 70
    assert float(row["mean_std"]) == pytest.approx(21.6025, abs=1e-4)  # the population's
    assert (float(row["last"]), row["last_episodes"]) == (71, "27")
    assert float(row["best"]) == 900
    assert 50 <= float(row["low"]) < 70 < float(row["high"]) <= 100
    assert "| 70.0 ± 21.6 | 60 | [" in page
    assert "| 71.0 ± 21.6 | 27 | 900.0 ± 0.0 |" in page
    assert "Too few runs" in page


def test_the_last_policy_of_one_seed_has_its_own_error_and_old_runs_have_an_evaluation(tmp_path):
    write_run(tmp_path, [10, 20, 30], "dac", final=(25.0, 1.25))
    write_run(tmp_path, [10, 20, 30], "cped")
    page = make(tmp_path)
    assert "| dac | 30 | 1 | 20.0 | 12 |  | 25.0 ± 1.2 | 9 | 30.0 |" in page
    assert "| cped | 30 | 1 | 20.0 | 12 |  | 30.0 | 4 | 30.0 |" in page


def test_interval_against_the_closed_form():
    scores = np.random.default_rng(0).normal(50, 10, 60)
    low, high = report.interval([scores], report.mean_of, reps=4000)
    half = 1.96 * scores.std() / 60**0.5  # of the bootstrap's normal limit
    assert low == pytest.approx(scores.mean() - half, abs=0.3)
    assert high == pytest.approx(scores.mean() + half, abs=0.3)


def test_the_bootstrap_is_stratified():
    """Seeds are drawn within each task, so that differences between tasks add nothing."""
    tasks = [np.zeros(3), np.full(3, 100.0)]
    assert report.interval(tasks, report.mean_of, 200) == (50, 50)


SCRIPTS = [  # one stage, and stages before the policy's
    (
        dac,
        "--hidden-dim 16 --num-critics 2 --num-next-actions 1 --num-eval-actions 1",
    ),
    (cped, "--flow-steps 20 --flow-hidden-dim 16"),
    (qdq, "--teacher-steps 2 --student-steps 2 --hidden-dim 64"),
]


@pytest.mark.parametrize(("script", "flags"), SCRIPTS)
def test_folders_of_the_scripts_are_read(script, flags, dataset, tmp_path):
    own = (
        f"--env hopper-medium --data {dataset} --run-dir {tmp_path} --total-steps 5 --stop-after 3"
    )
    evaluation = "--eval-every 1 --eval-episodes 1 --final-episodes 2"
    result = script.main(f"{own} {flags} {evaluation}".split())
    (run,) = report.read(tmp_path)
    assert [step for step, _ in run["evaluations"]] == [1, 2, 3]
    mean = np.mean([score for _, score in run["evaluations"]])
    assert result["normalized_score_last_5"] == run["score_last_5"] == pytest.approx(mean)
    assert run["score_best"] == result["normalized_score_best"]
    assert run["last"] == result["final_normalized_score"]
    assert run["final_error"] == result["final_normalized_score_error"]
    assert (run["dataset"], run["episodes"], run["last_episodes"]) == ("file/small.hdf5", 3, 2)
    assert run["updates_per_s"] is None and run["behaviour"] is not None
    assert f"python {script.ALGORITHM}.py --env hopper-medium" in run["command"]
    assert "--total-steps 5 --stop-after 3" in run["command"]
    assert "--data small.hdf5" in run["command"]  # no folder of this machine


def test_kinds_of_data_are_never_mixed(tmp_path):
    datasets = (
        "bundled/hopper-medium-replay",
        "file/hopper_medium-replay-v2.hdf5",
        "minari/mujoco/hopper/medium-v0",
        HOPPER,
    )
    for dataset in datasets:
        write_run(tmp_path, [1, 2], dataset=dataset)
    page = make(tmp_path)
    assert page.count("| mean of last five | episodes | 95 %") == 4
    assert page.count("### Beside published scores") == 1
    d4rl, others = page.split("## Bundled samples")
    assert "103.1 ± 0.3" in d4rl and "103.1" not in others
    for dataset in datasets:
        (row,) = table(tmp_path / "page" / f"results-{dataset.split('/')[0]}.csv")
        assert row["dataset"] == dataset


def test_without_d4rl_rows_nothing_stands_beside_published_scores(tmp_path):
    write_run(tmp_path, [1, 2], dataset="bundled/hopper-medium-replay")
    page = make(tmp_path)
    ours, published = page.split("## Published scores")
    assert "There is no run on D4RL's own files yet" in ours and "103.1" not in ours
    # all that is known, apart
    assert "| DAC | DAC | 101.2 ± 2.0 | 103.1 ± 0.3 |" in published and "dac" not in published
    assert "| CPED | CPED | 96.8 ± 2.6 |" in published and "bundled" not in published
    assert not (tmp_path / "page" / "beside-published.csv").exists()


def test_published_rows_of_the_same_task_stand_below_ours(tmp_path):
    write_run(tmp_path, [1, 2], dataset="d4rl/antmaze-umaze-v2", env="antmaze-umaze")
    make(tmp_path)
    beside = table(tmp_path / "page/beside-published.csv")
    cells = {(row["method"], row["printed by"]): row["antmaze-umaze-v2"] for row in beside}
    assert cells["**dac**", "here"] == "**1.5**"
    assert cells["DAC", "DAC"] == "99.5 ± 0.9 (v0)" and cells["CPED", "CPED"] == "96.8 ± 2.6"
    assert cells["IQL", "DAC"] == "87.5 (v0)" and cells["IQL", "CPED"] == "89.6"


def test_only_the_seed_may_differ_within_a_row(tmp_path):
    write_run(tmp_path, [1, 2], seed=0, num_critics=10)
    write_run(tmp_path, [3, 4], seed=1, num_critics=10)
    write_run(tmp_path, [5, 6], seed=0, num_critics=2)
    write_run(tmp_path, [7, 8], seed=0, num_critics=2)  # the same run again
    write_run(tmp_path, [7, 8], seed=0, quick=True)
    write_run(tmp_path, [], seed=3)
    page = make(tmp_path)
    rows = {row["algorithm"]: row for row in table(tmp_path / "page" / "results-d4rl.csv")}
    assert {name: row["seeds"] for name, row in rows.items()} == {
        "dac --quick": "1",
        "dac, num_critics 10": "2",
        "dac, num_critics 2": "1",
    }
    assert rows["dac, num_critics 2"]["last"] == "8.0" and rows["dac, num_critics 2"]["low"] == ""
    assert "dac, num_critics 2 on d4rl/hopper-medium-replay-v2, seed 0: given twice" in page
    assert "seed 3: no evaluation on the way" in page


def test_the_begin_of_a_run_and_a_whole_run_are_two_rows(tmp_path):
    """A typed end at the last update changes nothing; an earlier one is another row."""
    write_run(tmp_path, [1, 2], seed=0, total_steps=40, stop_after=20)
    write_run(tmp_path, [1, 2, 3, 4], seed=0, total_steps=40, stop_after=40)
    write_run(tmp_path, [1, 2, 3, 4], seed=1, total_steps=40, stop_after=None)
    make(tmp_path)
    rows = table(tmp_path / "page" / "results-d4rl.csv")
    assert [(row["algorithm"], row["seeds"], row["policy_updates"]) for row in rows] == [
        ("dac, policy_updates 20", "1", "20"),
        ("dac, policy_updates 40", "2", "40"),
    ]


def test_aggregates_over_three_tasks(tmp_path):
    finals = {}
    for i, env in enumerate(TASKS[:3]):
        for algorithm, level in (("dac", 60), ("cped", 40)):
            for seed in range(4):
                score = finals[algorithm, i, seed] = level + 10 * i + seed**3 / 8
                write_run(tmp_path, [score, score], algorithm, seed, f"d4rl/{env}-v2", env)
    write_run(tmp_path, [1, 1], "qdq", 0, f"d4rl/{TASKS[0]}-v2", TASKS[0])
    page = make(tmp_path)
    aggregates = table(tmp_path / "page" / "aggregates-d4rl.csv")
    rows = {(row["metric"], row["algorithm"]): row for row in aggregates}
    scores = sorted(score for (algorithm, *_), score in finals.items() if algorithm == "dac")
    middle = np.mean(scores[3:-3])  # 12 scores less 3 on each side
    assert abs(middle - np.mean(scores[1:-1])) > 0.1
    gap = 100 - np.mean(scores)
    assert float(rows["interquartile mean", "dac"]["value"]) == pytest.approx(middle, abs=1e-4)
    assert float(rows["optimality gap to 100", "dac"]["value"]) == pytest.approx(gap, abs=1e-4)
    pair = rows["probability of improvement", "cped better than dac"]
    assert float(pair["value"]) == 0
    assert "Not here, for want of two seeds on each of these: qdq." in page
    assert (tmp_path / "page" / "profiles-d4rl.svg").exists()


def test_two_tasks_are_too_few_for_aggregates(tmp_path):
    for env in TASKS[:2]:
        for algorithm in ("dac", "cped"):
            for seed in range(2):
                write_run(tmp_path, [1, 2], algorithm, seed, f"d4rl/{env}-v2", env)
    assert "Too few runs" in make(tmp_path)


def test_a_run_that_is_as_often_better_as_worse_improves_in_half_of_the_cases():
    same = np.array([1.0, 2.0, 3.0])
    assert report.improvement(same, same, axis=-1) == 0.5
    assert report.improvement(same + 10, same, same, same + 10, axis=-1) == 0.5  # of two tasks
    assert report.improvement(same + 10, same, same, same, axis=-1) == 0.75


def test_a_name_cannot_break_the_tables(tmp_path):
    write_run(tmp_path, [1, 2], "a|b\n<script>", dataset="bundled/hopper-medium-replay")
    page = make(tmp_path)
    (line,) = [line for line in page.splitlines() if "script>" in line]
    assert "| a\\|b &lt;script> | 20 |" in line


# ------------------------------------------------------------------ tables


def test_a_table_says_the_same_as_the_folders_and_the_page_is_reproducible(tmp_path):
    for seed in range(2):
        write_run(tmp_path / "runs", [1, 2 + seed], seed=seed, before=100, final=(3.5, 0.25))
    for run in report.read(tmp_path / "runs"):
        assert rows.append(tmp_path / "sweep.csv", run)
        assert not rows.append(tmp_path / "sweep.csv", run)  # once is enough
    page = make(tmp_path, tmp_path / "runs")
    curves = (tmp_path / "page" / "curves-d4rl.svg").read_bytes()
    assert make(tmp_path, tmp_path / "sweep.csv") == page
    assert (tmp_path / "page" / "curves-d4rl.svg").read_bytes() == curves


def test_a_row_has_all_columns_and_six_digits(tmp_path):
    folder = write_run(tmp_path / "runs", [100 / 3, 200 / 3], before=3, final=(1e6 / 7, 1 / 3))
    run = rows.read_run(folder, "dac strong")
    rows.append(tmp_path / "table.csv", run)
    (row,) = table(tmp_path / "table.csv")
    assert tuple(row) == rows.COLUMNS
    assert (row["final_score"], row["final_error"]) == ("142857", "0.333333")
    assert row["evaluations"] == "[[10, 33.3333], [20, 66.6667]]"
    assert (row["updates"], row["policy_updates"], row["updates_per_s"]) == ("23", "20", "40.5")
    assert row["arguments"] == f"runs/hopper-medium-replay/dac/{folder.name}/args.json"
    (read,) = rows.read_table(tmp_path / "table.csv")
    assert read["args"] == run["args"] and read["label"] == "dac strong"
    assert (read["score_last_5"], read["score_best"]) == (50, 66.6667)


def test_a_row_that_a_crash_has_cut_off_is_mended(tmp_path):
    first, second = (write_run(tmp_path / "runs", [1, 2], seed=seed) for seed in (0, 1))
    whole = tmp_path / "whole.csv"
    for folder in (first, second):
        rows.append(whole, rows.read_run(folder))
    text = whole.read_text()
    lines = text.splitlines(keepends=True)
    path = tmp_path / "table.csv"
    for cut in (10, len(lines[0]) - 1, len(lines[0]) + 40, len(text) - 30, len(text) - 1):
        path.write_text(text[:cut])
        if cut > len(lines[0]):
            read = rows.read_table(path)
            assert [run["seed"] for run in read] == [0] * (cut > len(lines[0] + lines[1]))
        for folder in (first, second):
            rows.append(path, rows.read_run(folder))
        assert path.read_text() == text, cut


def test_the_commit_of_a_run_is_the_newest_that_has_its_files():
    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True).stdout

    commits = git("log", "--format=%H", "--", "dac.py", "common.py").decode().split()
    if len(commits) < 2:
        pytest.skip("needs the history of the repository")
    for commit in commits[:2]:
        digests = {name: rows.sha256_at(commit, name) for name in ("dac.py", "common.py")}
        assert rows.commit_of(digests) == commit
    assert rows.commit_of({**digests, "dac.py": "0" * 64}) == ""
    assert rows.commit_of({}) == ""


def test_the_command_of_a_run_makes_it_again():
    typed = "--env hopper-medium-expert --seed 3 --quick --rho 0.5 --no-eval --compile"
    args, _ = dac.parse_args([*typed.split(), "--data", "/somewhere/my file.hdf5"])
    command = rows.command_of("dac", vars(args))
    assert command.startswith("python dac.py --env hopper-medium-expert --seed 3 --quick ")
    assert sorted(command.split()[2:]) == sorted([*typed.split(), "--data", "'my", "file.hdf5'"])
    assert rows.command_of("dac", vars(dac.parse_args(["--env", "antmaze-umaze"])[0])) == (
        "python dac.py --env antmaze-umaze --seed 0"
    )


@pytest.mark.parametrize(
    ("data", "dataset", "ending"),
    [
        ("auto", "bundled/hopper-medium-replay", " --data bundled"),
        ("auto", HOPPER, " --data d4rl"),
        ("bundled", "bundled/hopper-medium-replay", " --data bundled"),
        ("d4rl", HOPPER, " --data d4rl"),
        ("auto", "minari/mujoco/hopper/medium-v0", ""),
    ],
)
def test_the_command_names_the_data_that_auto_took(data, dataset, ending, tmp_path):
    folder = write_run(tmp_path, [1, 2], dataset=dataset, data=data)
    command = rows.read_run(folder)["command"]
    assert command.count("--data") == (1 if ending else 0)
    assert ending in command


# ----------------------------------------------------------------- records


def test_recorded_runs_need_no_folders_and_lead_to_their_commands(tmp_path):
    """record.py keeps all that the page says of a run; labels and records tell rows apart."""
    folders = []
    for seed in (0, 1):
        data = "/home/me/hopper.hdf5"
        folder = write_run(tmp_path / "runs", [1, 2 + seed], seed=seed, before=100, data=data)
        folders.append(folder)
    folders.append(write_run(tmp_path / "runs", [5, 9], seed=0, eta=2.0, rho=1.5))
    kept = tmp_path / "results" / "first"
    panels = ("eval/normalized_score", "train/loss", "train/missing")
    record.main(record.Args(tuple(folders), kept, ("", "", "dac strong"), panels))
    (kept / "README.md").write_text("the commands")
    record.main(record.Args((folders[0],), tmp_path / "results" / "second", (), panels))
    page = make(tmp_path, tmp_path / "results")
    results = table(tmp_path / "page" / "results-d4rl.csv")
    assert [(row["algorithm"], row["seeds"], row["mean"]) for row in results] == [
        ("dac", "1", "1.5"),  # no README, no link
        ("dac (first)", "2", "1.75"),
        ("dac strong (first)", "1", "7.0"),
    ]
    assert "| dac strong [(first)](results/first) | 20 | 1 | 7.0 | 8 |" in page
    assert "| 17.5 | dac | 20 |" in page
    stem = "hopper-medium-replay-dac"
    stems = [f"{stem}-seed0", f"{stem}-seed1", f"{stem}-strong-seed0"]
    assert {path.name for path in kept.glob("*.csv")} == {
        "results.csv",
        *(f"{stem}.csv" for stem in stems),
    }
    assert {path.name for path in kept.glob("*.json")} == {f"{stem}.json" for stem in stems}
    assert (kept / "curves.svg").stat().st_size > 10_000
    for path in kept.iterdir():
        assert "/home/me" not in path.read_text() and str(tmp_path) not in path.read_text(), path
    with pytest.raises(SystemExit, match=r"is the second hopper-medium-replay-dac-seed0: --labels"):
        record.main(record.Args((folders[0], folders[2]), kept))


def test_records_share_a_colour_unless_a_panel_has_one_name_twice():
    def run(folder):
        return [{"record": Path("results") / folder} if folder else {}]

    one = {"dac (a)": run("a"), "iql (a)": run("a"), "cped": run(None)}
    two = {"dac (b)": run("b"), "dac --quick (c)": run("c")}
    assert report.names_in_pictures({"one": one, "two": two}) == {
        "dac (a)": "dac",
        "dac (b)": "dac",
        "iql (a)": "iql",
        "cped": "cped",
        "dac --quick (c)": "dac --quick",
    }
    labels = {**one, **two}
    assert report.names_in_pictures({"one": labels}) == {label: label for label in labels}


@pytest.mark.parametrize("broken", ["result.json", "args.json", "metrics.csv"])
@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"args": {}}', "step\nx\n"])
def test_a_broken_run_folder_is_one_sentence(broken, content, tmp_path):
    folder = write_run(tmp_path / "runs", [1, 2])
    if broken == "metrics.csv" and content in ("", "{", "[]", '{"args": {}}'):
        pytest.skip("a table without rows")
    (folder / broken).unlink()
    if content is not None:
        (folder / broken).write_text(content)
    with pytest.raises(SystemExit, match=f"^error: {folder} is not the folder of a finished run"):
        record.main(record.Args((folder,), tmp_path / "kept"))


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "env,algorithm\nhopper-medium,dac\n",
        "seed,arguments,evaluations\n0,{,[]\n",
        ",".join(rows.COLUMNS) + "\n" + "," * (len(rows.COLUMNS) - 1) + "\n",
    ],
)
def test_a_wrong_source_is_one_sentence(content, tmp_path):
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=r"^error: .*table.csv "):
        make(tmp_path, path)


@pytest.mark.parametrize("wrong", [{"sources": ()}, {"out": Path("page")}, {"reps": 10}])
def test_wrong_arguments_are_one_sentence(wrong, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: needed are"):
        report.main(report.Args(**{"sources": (tmp_path,), **wrong}))
