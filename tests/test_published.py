"""benchmarks/published.csv: keys, totals and known cells of the papers' tables."""

import csv
from pathlib import Path

import pytest

from common import TASKS

with (Path(__file__).resolve().parent.parent / "benchmarks" / "published.csv").open() as file:
    PUBLISHED = list(csv.DictReader(file))


def test_published_rows_are_well_formed():
    keys = [(row["paper"], row["method"], row["task"]) for row in PUBLISHED]
    assert len(set(keys)) == len(keys) == 264
    assert {row["task"] for row in PUBLISHED} == set(TASKS)
    for row in PUBLISHED:
        assert 0 <= float(row["score"]) < 120 and float(row["std"] or 0) >= 0 and row["source"]
        # only CPED's AntMaze table is on v2 data
        old = row["task"].startswith("antmaze") and row["paper"] != "CPED"
        assert row["version"] == ("v0" if old else "v2")


@pytest.mark.parametrize(
    # the totals that the papers print, or None
    ("paper", "method", "locomotion", "antmaze"),
    [
        ("CPED", "CPED", 791.7, 376.8),
        ("CPED", "SPOT", 773.0, 359.6),
        ("CPED", "IQL", 692.4, 392.4),
        ("CPED", "CQL", 698.5, 218.0),
        ("CPED", "TD3+BC", 677.4, None),
        ("CPED", "PLAS", None, 164.6),
        ("QDQ", "QDQ", 848.0, 400.1),
        ("QDQ", "MCQ", 797.4, None),
        ("QDQ slides", "QDQ", 826.1, 378.1),
        ("DAC", "DAC", 836.4, 459.9),
        ("DAC", "DQL", 791.2, 417.8),
        ("DAC", "IDQL-A", 739.2, 474.6),
    ],
)
def test_published_scores_add_up_to_the_printed_totals(paper, method, locomotion, antmaze):
    rows = [row for row in PUBLISHED if (row["paper"], row["method"]) == (paper, method)]
    for total, mazes, tasks in ((locomotion, False, 9), (antmaze, True, 6)):
        scores = [float(row["score"]) for row in rows if row["task"].startswith("antmaze") == mazes]
        assert len(scores) == (tasks if total else 0)
        assert sum(scores) == pytest.approx(
            total or 0, abs=0.07
        )  # CPED prints one score with two digits


KNOWN = {
    ("CPED", "CPED", "walker2d-medium-expert"): ("113.04", "1.4"),
    ("QDQ", "QDQ", "hopper-medium"): ("99.0", "0.3"),
    ("QDQ slides", "QDQ", "hopper-medium"): ("87.0", "4.3"),
    ("DAC", "DAC", "antmaze-large-diverse"): ("55.3", "10.3"),
    ("DAC", "IQL", "antmaze-large-play"): ("39.6", ""),
    ("CPED or DAC", "BC", "hopper-medium"): ("52.9", ""),
    ("CPED or DAC", "UWAC", "walker2d-medium-replay"): ("23.6", ""),
    ("QDQ or DAC", "SfBC", "antmaze-large-play"): ("59.3", ""),
}


@pytest.mark.parametrize("key", KNOWN)
def test_known_published_cells(key):
    (row,) = [row for row in PUBLISHED if (row["paper"], row["method"], row["task"]) == key]
    assert (row["score"], row["std"]) == KNOWN[key]
