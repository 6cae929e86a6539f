"""benchmarks/collect.py: layout, flags, order, resume and Minari output of a tiny collection; the
bundled files."""

import hashlib
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest

import common

pytest.importorskip("stable_baselines3", reason="needs benchmarks/requirements.txt")

ROOT = Path(__file__).resolve().parents[1]
import collect  # noqa: E402

# 0.7 to 1.4 times D4RL's mean return
BUNDLED = {"hopper-medium": (994, 1988), "hopper-medium-replay": (327, 654)}


def tiny_args(tmp_path: Path, **changes) -> "collect.Args":
    values = {
        "quality": ("medium-replay", "medium"),
        "rows": 300,
        "out": tmp_path / "out",
        "work_dir": tmp_path / "work",
        "medium_return": 0.0,
        "eval_episodes": 2,
        "snapshot_every": 200,
        "total_steps": 600,
        "hidden": (16,),
        "batch_size": 16,
        "learning_starts": 50,
    }
    return collect.Args(**{**values, **changes})


def read(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {key: file[key][:] for key in file}


def check_layout(rows: dict[str, np.ndarray], obs_dim: int, act_dim: int) -> None:
    n = len(rows["rewards"])
    assert {key: (values.dtype.str[1:], values.shape) for key, values in rows.items()} == {
        "observations": ("f4", (n, obs_dim)),
        "actions": ("f4", (n, act_dim)),
        "rewards": ("f4", (n,)),
        "terminals": ("b1", (n,)),
        "timeouts": ("b1", (n,)),
    }
    assert all(np.isfinite(rows[key]).all() for key in ("observations", "actions", "rewards"))
    assert np.abs(rows["actions"]).max() <= 1
    assert not (rows["terminals"] & rows["timeouts"]).any()
    assert rows["terminals"][-1] or rows["timeouts"][-1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("collect")
    # a threshold that no snapshot reaches makes the run train for all of total_steps; 0 then picks
    # its first snapshot
    message = "no snapshot within --total-steps 600 reached --medium-return 1e\\+06"
    with pytest.raises(SystemExit, match=message):
        collect.main(tiny_args(folder, medium_return=1e6))
    collect.main(tiny_args(folder))
    return folder


def test_layout_and_attributes(tiny):
    for quality in ("medium-replay", "medium"):
        path = tiny / "out" / f"hopper-{quality}.hdf5"
        rows = read(path)
        check_layout(rows, 11, 3)
        with h5py.File(path) as file:
            attributes = dict(file.attrs)
        returns = collect.episode_returns(rows)
        assert attributes["rows"] == len(rows["rewards"]) and attributes["episodes"] == len(returns)
        assert attributes["terminals"] + attributes["timeouts"] == len(returns)
        assert attributes["mean_return"] == pytest.approx(returns.mean(), rel=1e-5)
        recipe = json.loads(attributes["recipe"])
        assert (
            recipe["quality"] == quality
            and recipe["env_id"] == "Hopper-v4"
            and recipe["hidden"] == [16]
        )
        assert recipe["version_mujoco"] and recipe["version_stable-baselines3"]
    assert len(read(tiny / "out" / "hopper-medium.hdf5")["rewards"]) >= 300
    assert not list((tiny / "out").glob(".*"))


def test_replay_is_the_training_run_in_order(tiny):
    work = tiny / "work" / "hopper" / "seed0"
    medium = collect.find_medium(work, tiny_args(tiny))
    folders = [folder for folder in collect.snapshots(work, 600) if folder <= medium]
    replay = collect.load_replay(folders)
    rows = read(tiny / "out" / "hopper-medium-replay.hdf5")
    assert len(rows["rewards"]) == int(medium.name) == len(replay["rewards"])
    inside = ~(rows["terminals"] | rows["timeouts"])[:-1]
    next_obs = replay["next_observations"].astype("f4")
    np.testing.assert_array_equal(rows["observations"][1:][inside], next_obs[:-1][inside])
    # untrained Hopper falls, it never times out
    np.testing.assert_array_equal(rows["terminals"], replay["dones"] > 0)
    # an episode starts upright: qpos[1] = 1.25 up to the reset noise of 0.005
    starts = rows["observations"][:-1][np.append(True, ~inside[:-1])]
    np.testing.assert_allclose(starts[:, 0], 1.25, atol=0.0051)


def test_full_replay_is_the_whole_training_run(tiny, tmp_path, capsys):
    collect.main(tiny_args(tiny, quality=("full-replay",), medium_return=1e6))  # none is medium
    collect.main(tiny_args(tiny, quality=("full-replay",), medium_return=0.0))  # does not matter
    assert capsys.readouterr().out.count("made before, left alone") == 1
    rows = read(tiny / "out" / "hopper-full-replay.hdf5")
    check_layout(rows, 11, 3)
    scores = collect.snapshots(tiny / "work" / "hopper" / "seed0", 600)
    last = list(scores)[-1]
    assert len(scores) == 3 and len(rows["rewards"]) == int(last.name) >= 600
    medium = read(tiny / "out" / "hopper-medium-replay.hdf5")  # its beginning
    for key, values in medium.items():
        np.testing.assert_array_equal(rows[key][: len(values)], values)
    with h5py.File(tiny / "out" / "hopper-full-replay.hdf5") as file:
        recipe = json.loads(file.attrs["recipe"])
        assert file.attrs["policy_steps"].tolist() == [int(last.name)]
        assert file.attrs["policy_eval_returns"].tolist() == [scores[last]]
    assert (recipe["quality"], recipe["total_steps"]) == ("full-replay", 600)
    with pytest.raises(SystemExit, match="made with other settings"):
        collect.main(tiny_args(tiny, quality=("full-replay",), total_steps=400))
    # a longer run goes on training although the medium policy is reached
    collect.main(tiny_args(tiny, quality=("full-replay",), total_steps=800, out=tmp_path))
    assert len(read(tmp_path / "hopper-full-replay.hdf5")["rewards"]) >= 800


def test_resumed_training_equals_unbroken_training(tiny, tmp_path):
    for steps in (200, 400, 600):
        with pytest.raises(SystemExit, match=f"within --total-steps {steps} "):
            collect.main(tiny_args(tmp_path, medium_return=1e6, total_steps=steps))
    unbroken = collect.snapshots(tiny / "work" / "hopper" / "seed0", 600)
    resumed = collect.snapshots(tmp_path / "work" / "hopper" / "seed0", 600)
    assert len(unbroken) == 3
    names = [(folder.name, score) for folder, score in unbroken.items()]
    assert names == [(folder.name, score) for folder, score in resumed.items()]
    a, b = collect.load_replay(list(unbroken)), collect.load_replay(list(resumed))
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_finished_work_is_not_repeated(tiny, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("finished work was repeated")

    monkeypatch.setattr(collect, "train", refuse)
    monkeypatch.setattr(collect, "rollout", refuse)
    collect.main(tiny_args(tiny))
    assert capsys.readouterr().out.count("made before, left alone") == 2
    with pytest.raises(SystemExit, match="made with other settings"):
        collect.main(tiny_args(tiny, rows=400))
    with pytest.raises(SystemExit, match="trained with other learning_rate"):
        collect.main(tiny_args(tiny, learning_rate=1e-3))


def test_timeouts_minari_and_medium_expert(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    # HalfCheetah never terminates, so every episode of 1000 steps ends in a timeout
    args = tiny_args(
        tmp_path,
        env="halfcheetah",
        quality=("medium-expert",),
        rows=2000,
        medium_return=-1e6,
        eval_episodes=1,
        snapshot_every=1000,
        total_steps=1000,
        steps_per_update=100,
        minari_id="local/halfcheetah/medium-expert-v0",
    )
    collect.main(args)
    rows = read(tmp_path / "out" / "halfcheetah-medium-expert.hdf5")
    check_layout(rows, 17, 6)
    assert not rows["terminals"].any()
    np.testing.assert_array_equal(np.flatnonzero(rows["timeouts"]), [999, 1999])

    dataset = minari.load_dataset(args.minari_id)
    metadata = dataset.storage.metadata
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-280.178953, 12135.0)
    assert dataset.total_episodes == 2 and dataset.total_steps == 2000
    eval_env = dataset.recover_environment(eval_env=True)
    assert eval_env.spec.id == "HalfCheetah-v4"
    for i, episode in enumerate(dataset.iterate_episodes()):
        part = slice(1000 * i, 1000 * i + 1000)
        assert len(episode.observations) == 1001
        np.testing.assert_array_equal(
            episode.observations[:-1].astype("f4"), rows["observations"][part]
        )
        np.testing.assert_array_equal(episode.actions, rows["actions"][part])
        assert episode.truncations[-1] and episode.truncations.sum() == 1
        assert not episode.terminations.any()
        # the last observation must be what the simulator says follows the last action: put it into
        # the last state. The x position is not observed and does not matter; the solver's warm
        # start does, in the last digits
        env = eval_env.unwrapped
        env.reset()
        env.set_state(np.append(0.0, episode.observations[-2][:8]), episode.observations[-2][8:])
        next_obs, *_ = env.step(episode.actions[-1])
        np.testing.assert_allclose(next_obs, episode.observations[-1], atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rows": 0}, "--rows 0 is out of range"),
        ({"tau": 2.0}, "--tau 2.0 is out of range"),
        ({"minari_id": "local/hopper/medium-v0"}, "exactly one --quality"),
        ({"quality": ("medium",), "minari_id": "hopper"}, "not of the form"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, changes, message):
    with pytest.raises(SystemExit) as error:
        collect.main(tiny_args(tmp_path, **changes))
    assert message in error.value.code and "\n" not in error.value.code
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_file(name):
    path = ROOT / "benchmarks" / "data" / f"{name}.hdf5"
    rows = read(path)
    check_layout(rows, 11, 3)
    low, high = BUNDLED[name]
    assert len(rows["rewards"]) >= 100_000
    assert low <= collect.episode_returns(rows).mean() <= high
    assert rows["actions"].std(axis=0).min() > 0.1
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    readme = (ROOT / "benchmarks" / "data" / "README.md").read_text()
    assert re.search(rf"{name}\.hdf5.*{digest}", readme)


def test_bundled_files_fit_the_budget():
    sizes = [path.stat().st_size for path in (ROOT / "benchmarks" / "data").glob("*.hdf5")]
    assert sum(sizes) <= 16_000_000


# ------------------------------------------------------------------------------------- mazes


def test_the_way_through_a_maze_is_a_shortest_one():
    # a ring of eight cells
    free = {(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1), (2, 1)}
    assert collect.way(free, (1, 1), (3, 1)) == [(1, 1), (2, 1), (3, 1)]
    assert len(collect.way(free, (1, 2), (3, 2))) == 5
    assert collect.way(free, (2, 3), (2, 3)) == [(2, 3)]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_maze_is_collected_loaded_and_evaluated(tmp_path, monkeypatch):
    pytest.importorskip("gymnasium_robotics")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    args = collect.Args(env="pointmaze-umaze", rows=2000, minari_id="local/maze-v0")
    collect.main(args)
    arrays, info = common.load_dataset("local/maze-v0")
    assert (
        arrays["obs"].shape == (info["rows"], 8) and info["dropped"] == 0 and info["rows"] >= 2000
    )
    assert (info["ref_min"], info["ref_max"]) == (0, 1)
    achieved, goal, position = arrays["obs"][:, :2], arrays["obs"][:, 2:4], arrays["obs"][:, 4:6]
    np.testing.assert_array_equal(achieved, position)
    reached = np.linalg.norm(arrays["next_obs"][:, :2] - goal, axis=1) <= 0.45
    np.testing.assert_array_equal(arrays["rew"], reached)  # sparse, and the goal ends the episode
    np.testing.assert_array_equal(arrays["not_done"] == 0, reached)
    starts = arrays["obs"][np.r_[0, np.flatnonzero(arrays["ends"])[:-1] + 1], :2]
    # data begin everywhere, evaluation in the farthest cell
    assert len(np.unique(starts.round(), axis=0)) > 3
    seen = []

    def act(obs: np.ndarray) -> np.ndarray:
        seen.append(obs)
        return np.zeros((len(obs), 2), np.float32)

    result = common.evaluate(act, info, 5, seed=0)
    assert (result["normalized_score"] == 0).all() and (result["episode_length"] == 150).all()
    # cells (1, 1) and (3, 1) with their noise
    np.testing.assert_allclose(seen[0][:, :2], np.tile([-1, 1], (5, 1)), atol=0.26)
    np.testing.assert_allclose(seen[0][:, 2:4], np.tile([-1, -1], (5, 1)), atol=0.26)
    with pytest.raises(SystemExit, match="local/maze-v0 exists"):
        collect.main(args)


def test_a_maze_needs_a_name_for_its_dataset():
    message = r"--env pointmaze-umaze needs --minari-id, e\.g\. local/pointmaze/umaze-v0"
    with pytest.raises(SystemExit, match=message):
        collect.main(collect.Args(env="pointmaze-umaze"))
