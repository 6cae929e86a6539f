"""The small programs beside the scripts: cloning, likelihoods, records and pictures, each run once at toy size."""

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_raw, write_hdf5

import cped
import dac
import qdq
from common import load_dataset

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run_script(monkeypatch, name: str, *argv: str) -> None:
    for module, agent in ((dac, "DAC"), (cped, "CPED"), (qdq, "QDQ")):
        for attribute in (agent, "ALGORITHM"):  # cloning.py puts its own in their place
            monkeypatch.setattr(module, attribute, getattr(module, attribute))
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")


CLONING = [
    ("dac", "--hidden-dim", "bc_loss", -1),
    ("cped", "--flow-hidden-dim", "bc_loss", -1),
    ("qdq", "--hidden-dim", "log_prob", 1),
]


@pytest.mark.parametrize(("script", "width", "metric", "sign"), CLONING)
def test_cloning_improves_and_is_recorded(script, width, metric, sign, dataset, tmp_path, monkeypatch):
    flags = ["--env", "hopper-medium", "--data", dataset, "--run-dir", tmp_path, "--total-steps", "400", "--log-every", "100"]
    flags += ["--eval-every", "400", "--eval-episodes", "1"]
    run_script(monkeypatch, "cloning.py", script, *flags, width, "32")
    (folder,) = tmp_path.glob(f"hopper-medium/cloning-{script}/seed0-*")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    values = [float(row[f"train/{metric}"]) for row in rows if row[f"train/{metric}"]]
    assert len(values) == 4 and sign * (values[-1] - values[0]) > 0

    pytest.importorskip("matplotlib")
    run_script(
        monkeypatch, "record.py", folder, "--out", tmp_path / "kept", "--panels", "eval/normalized_score", f"train/{metric}"
    )
    (row,) = csv.DictReader((tmp_path / "kept" / "results.csv").open())
    assert float(row["final_score"]) == json.loads((folder / "result.json").read_text())["final_score"]
    assert (tmp_path / "kept" / "curves.svg").exists() and len(list((tmp_path / "kept").glob("hopper-medium-*.csv"))) == 1


def test_cloning_wants_the_name_of_a_script(monkeypatch):
    with pytest.raises(SystemExit, match="error: name the script"):
        run_script(monkeypatch, "cloning.py", "--env", "hopper-medium")


@pytest.mark.parametrize("algorithm", ["bc", "td3_bc", "iql"])
def test_baselines_learn_from_the_loaders_transitions_and_are_recorded(algorithm, dataset, tmp_path, monkeypatch):
    base = pytest.importorskip("d3rlpy", reason="needs d3rlpy").algos.QLearningAlgoBase
    update, seen = base.update, []
    monkeypatch.setattr(base, "update", lambda algo, batch: seen.append(batch) or update(algo, batch))
    flags = ["--env", "hopper-medium", "--data", dataset, "--run-dir", tmp_path, "--total-steps", "6", "--log-every", "2"]
    run_script(monkeypatch, "baselines.py", algorithm, *flags, "--eval-every", "3", "--eval-episodes", "1")
    (folder,) = tmp_path.glob(f"hopper-medium/{algorithm}/seed0-*")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["eval/normalized_score"]] == ["0", "3", "6"]
    result = json.loads((folder / "result.json").read_text())
    assert result["last_score"] == float(rows[-1]["eval/normalized_score"]) and result["updates"] == 6
    arrays, _ = load_dataset("hopper-medium", str(dataset))
    rew = dac.transform_rewards(arrays["rew"], arrays["ends"], "return_range" if algorithm == "iql" else "none")
    columns = (arrays["obs"], arrays["act"], rew[:, None], arrays["next_obs"], 1 - arrays["not_done"][:, None])
    known = {row.tobytes() for row in np.concatenate(columns, 1)}
    assert len(known) == 593  # 600 rows without those that six timeouts cut, and the last
    for batch in seen:
        fed = (batch.observations, batch.actions, batch.rewards, batch.next_observations, batch.terminals)
        assert {row.tobytes() for row in np.concatenate(fed, 1)} < known


def test_likelihoods_of_a_trained_flow(dataset, tmp_path, monkeypatch):
    flags = ["--env", "hopper-medium", "--data", str(dataset), "--run-dir", str(tmp_path), "--no-eval", "--total-steps", "1"]
    cped.main([*flags, "--flow-steps", "20", "--flow-hidden-dim", "16", "--log-every", "10"])
    (folder,) = tmp_path.glob("hopper-medium/cped/*")
    run_script(monkeypatch, "likelihood.py", folder, "--out", tmp_path / "table.csv")
    gaussian, nice = csv.DictReader((tmp_path / "table.csv").open())
    assert (gaussian["model"], nice["model"], nice["updates"]) == ("gaussian", "nice", "20")
    state = torch.load(folder / "flow.pt", weights_only=True)
    assert float(nice["held_out"]) == pytest.approx(state["row"]["log_density/held_out"], abs=1e-4)
    # the rows are normal and uniform: the Gaussian's own entropy is known, 11 normals and 3 uniforms with variance 1/3
    expected = -0.5 * (14 * torch.log(torch.tensor(2 * torch.pi)) + 3 * torch.log(torch.tensor(1 / 3)) + 14)
    assert float(gaussian["train"]) == pytest.approx(float(expected), abs=0.7)


def test_pictures_of_densities(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    run_script(monkeypatch, "density.py", "--out", tmp_path / "toys.png", "--updates", "3", "--toys", "rings")
    assert (tmp_path / "toys.png").stat().st_size > 10_000


def test_pictures_of_bandits(tmp_path):
    pytest.importorskip("matplotlib")
    flags = "--out", str(tmp_path / "toy.png"), "--scale", "0.005", "--toys", "moons"
    subprocess.run([sys.executable, str(BENCHMARKS / "toy.py"), *flags], check=True)  # its rows are processes of their own
    assert (tmp_path / "toy.png").stat().st_size > 10_000


def test_uncertainty_of_a_trained_student(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    dataset = write_hdf5(tmp_path / "long.hdf5", make_raw(2000, episode=500))  # has windows between windows
    flags = ["--env", "hopper-medium", "--data", str(dataset), "--no-eval", "--total-steps", "1"]
    flags += ["--teacher-steps", "20", "--student-steps", "20", "--hidden-dim", "32"]
    qdq.main([*flags, "--run-dir", str(tmp_path / "whole")])
    (student,) = tmp_path.glob("whole/hopper-medium/qdq/*")
    qdq.main([*flags, "--run-dir", str(tmp_path / "policy"), "--stage", "policy", "--consistency", str(student)])
    (folder,) = tmp_path.glob("policy/hopper-medium/qdq/*")
    run_script(monkeypatch, "uncertainty.py", folder, "--out", tmp_path / "kept", "--rows", "50", "--samples", "8")
    (table,) = (json.loads(path.read_text()) for path in (tmp_path / "kept").glob("uncertainty-*.json"))
    assert set(table["H"]) == {"data", "data + 0.1", "data + 0.3", "data + 1.0", "uniform"}
    assert all(row["mean"] > 0 for row in table["H"].values())
    assert len(list((tmp_path / "kept").glob("uncertainty-*.png"))) == 1
    assert (table["args"]["data"], table["args"]["consistency"]) == ("long.hdf5", student.name)  # no path of this machine


def test_throughput_counts_the_products_and_writes_a_row(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import throughput

    layer, x = torch.nn.Linear(5, 7), torch.randn(3, 5)
    with throughput.Products() as products:
        layer(x).sum().backward()
        torch.baddbmm(torch.zeros(2, 3, 4), torch.ones(2, 3, 6), torch.ones(2, 6, 4))
    assert products.shapes == {(1, 3, 5, 7): 1, (1, 7, 3, 5): 1, (2, 3, 6, 4): 1}  # forward, weight gradient, batch of two

    monkeypatch.setitem(throughput.STAGES, "cped", ("policy",))
    small = {"scripts": ("cped",), "modes": ("eager",), "windows": 2, "seconds": 0.01, "evaluation": False}
    throughput.main(throughput.Args(device="cpu", out=tmp_path, **small))
    (row,) = (json.loads(line) for line in (tmp_path / "throughput.jsonl").read_text().splitlines())
    assert row["stage"] == "policy" and row["updates_per_s"] > 0 and row["memory_mb"] > 100
    # in every second update, 750 x 750 products: four couplings forward, and back to the action through all but the first
    couplings = (4 + 3) * 2e-9 * 256 * 750 * 750 / 2
    assert couplings < row["gflop_per_update"] < 1.6 * couplings
    assert "| cped | policy | eager |" in (tmp_path / "throughput.md").read_text()
