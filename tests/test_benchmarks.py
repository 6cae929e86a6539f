"""The small programs beside the scripts: cloning, likelihoods, records and pictures, each run once at toy size."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import cped
import dac

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run_script(monkeypatch, name: str, *argv: str) -> None:
    for module, classes in ((dac, ("DAC", "ALGORITHM")), (cped, ("CPED", "ALGORITHM"))):
        for attribute in classes:  # cloning.py puts its own in their place
            monkeypatch.setattr(module, attribute, getattr(module, attribute))
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")


@pytest.mark.parametrize(("script", "small"), [("dac", ["--hidden-dim", "32"]), ("cped", ["--flow-hidden-dim", "8"])])
def test_cloning_lowers_its_loss_and_is_recorded(script, small, dataset, tmp_path, monkeypatch):
    flags = ["--env", "hopper-medium", "--data", dataset, "--run-dir", tmp_path, "--total-steps", "400", "--log-every", "100"]
    flags += ["--eval-every", "400", "--eval-episodes", "1"]
    run_script(monkeypatch, "cloning.py", script, *flags, *small)
    (folder,) = tmp_path.glob(f"hopper-medium/cloning-{script}/seed0-*")
    losses = [float(row["train/bc_loss"]) for row in csv.DictReader((folder / "metrics.csv").open()) if row["train/bc_loss"]]
    assert len(losses) == 4 and losses[-1] < losses[0]

    pytest.importorskip("matplotlib")
    run_script(monkeypatch, "record.py", folder, "--out", tmp_path / "kept", "--panels", "eval/normalized_score", "train/bc_loss")
    (row,) = csv.DictReader((tmp_path / "kept" / "results.csv").open())
    assert float(row["final_score"]) == json.loads((folder / "result.json").read_text())["final_score"]
    assert (tmp_path / "kept" / "curves.svg").exists() and len(list((tmp_path / "kept").glob("hopper-medium-*.csv"))) == 1


def test_cloning_wants_the_name_of_a_script(monkeypatch):
    with pytest.raises(SystemExit, match="error: name the script"):
        run_script(monkeypatch, "cloning.py", "--env", "hopper-medium")


def test_likelihoods_of_a_trained_flow(dataset, tmp_path, monkeypatch):
    flags = ["--env", "hopper-medium", "--data", str(dataset), "--run-dir", str(tmp_path), "--no-eval", "--total-steps", "1"]
    cped.main([*flags, "--flow-steps", "20", "--flow-hidden-dim", "16", "--log-every", "10"])
    (folder,) = tmp_path.glob("hopper-medium/cped/*")
    run_script(monkeypatch, "likelihood.py", folder, "--out", tmp_path / "table.csv")
    gaussian, nice = csv.DictReader((tmp_path / "table.csv").open())
    assert (gaussian["model"], nice["model"], nice["updates"]) == ("gaussian", "nice", "20")
    state = torch.load(folder / "flow.pt", weights_only=True)
    assert float(nice["held_out"]) == pytest.approx(state["rows"][-1]["log_density/held_out"], abs=1e-4)
    # the rows are normal and uniform: the Gaussian's own entropy is known, 11 normals and 3 uniforms with variance 1/3
    expected = -0.5 * (14 * torch.log(torch.tensor(2 * torch.pi)) + 3 * torch.log(torch.tensor(1 / 3)) + 14)
    assert float(gaussian["train"]) == pytest.approx(float(expected), abs=0.7)


def test_pictures_of_densities(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    run_script(monkeypatch, "density.py", "--out", tmp_path / "toys.png", "--updates", "3", "--toys", "rings")
    assert (tmp_path / "toys.png").stat().st_size > 10_000
