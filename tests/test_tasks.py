"""Every task name and each kind of Minari dataset through the three scripts, file to score."""

import csv
import json

import gymnasium as gym
import numpy as np
import pytest
from conftest import make_raw, write_hdf5

import common
import cped
import dac
import qdq

SMALL = {  # small networks, short stages; the published settings of the task otherwise
    dac: "--hidden-dim 16 --num-critics 2",
    qdq: "--hidden-dim 64 --num-samples 2 --teacher-steps 2 --student-steps 2",
    cped: "--hidden-dim 16 --flow-hidden-dim 8 --flow-steps 2 --critic-start 1 --actor-q-start 2",
}
SMALL = {
    script: f"{flags} --total-steps 4 --eval-episodes 2 --final-episodes 2 --log-every 2"
    for script, flags in SMALL.items()
}


def train(script, env: str, folder, *more: str) -> tuple[dict, dict]:
    """result.json and the last row of metrics.csv."""
    script.main(["--env", env, "--run-dir", str(folder), *SMALL[script].split(), *more])
    (run,) = folder.glob(f"{env}/{script.ALGORITHM}/seed0-*")
    with (run / "metrics.csv").open() as file:
        return json.loads((run / "result.json").read_text()), list(csv.DictReader(file))[-1]


@pytest.fixture
def short_episodes(monkeypatch):
    """The real environments, but 20 steps long."""
    for env_id in [
        *common.EVALUATION_ENVS.values(),
        *(f"D4RLAntMaze-{maze}-v2" for maze in common.MAZES),
    ]:
        monkeypatch.setattr(gym.registry[env_id], "max_episode_steps", 20)


@pytest.mark.parametrize("script", SMALL)
@pytest.mark.parametrize("task", common.TASKS)
def test_every_task_is_trained_and_scored(script, task, tmp_path, short_episodes):
    obs_dim, act_dim = {"hopper": (11, 3), "antmaze": (29, 8)}.get(task.split("-")[0], (17, 6))
    raw = make_raw(obs_dim=obs_dim, act_dim=act_dim)
    if task.startswith("antmaze"):
        raw["observations"][:, :2] = 0.1 * (np.arange(600) % 50)[:, None]  # no jumps
        raw["terminals"][20] = True  # not all episodes that reach the goal are equally long
        raw["rewards"][:] = raw["terminals"]
    path = write_hdf5(tmp_path / "data.hdf5", raw)
    result, row = train(script, task, tmp_path, "--data", str(path))
    low, high = common.REFERENCE_RETURNS[task.split("-")[0]]
    assert result["dataset"] == "file/data.hdf5"
    score = 100 * (float(row["eval/return"]) - low) / (high - low)
    assert result["normalized_score_last_5"] == pytest.approx(score)  # there is one evaluation
    final = 100 * (result["final_return"] - low) / (high - low)
    assert result["final_normalized_score"] == pytest.approx(final)
    if task.startswith("antmaze"):  # nobody reaches the goal in 20 steps
        assert score == final == 0 and float(row["eval/episode_length"]) == 20


@pytest.mark.parametrize(
    ("task", "skipped", "clipped"),
    [("hopper", 1, 10), ("halfcheetah", 1, np.inf), ("walker2d", 1, 10)],
)
def test_locomotion_observations_are_the_state_of_the_simulator(task, skipped, clipped):
    """All positions but x, then all velocities, clipped to 10 for hopper and walker2d."""
    with common.make_env(common.task_facts(f"{task}-medium", need_env=True)) as env:
        obs, _ = env.reset(seed=0)
        env.action_space.seed(0)
        for _ in range(10):
            data = env.unwrapped.data
            np.testing.assert_array_equal(
                obs, np.r_[data.qpos[skipped:], data.qvel.clip(-clipped, clipped)]
            )
            obs, *_ = env.step(env.action_space.sample())


class Corridor(gym.Env):
    """A point on a line that is pushed to a goal; its observation is a dictionary, as in mazes."""

    observation_space = gym.spaces.Dict(
        observation=gym.spaces.Box(-np.inf, np.inf, (2,)),
        desired_goal=gym.spaces.Box(-np.inf, np.inf, (1,)),
        achieved_goal=gym.spaces.Box(-np.inf, np.inf, (1,)),
    )
    action_space = gym.spaces.Box(-0.4, 0.4, (1,), np.float32)

    def observe(self) -> dict[str, np.ndarray]:
        return {
            "observation": np.array([self.x, self.v], np.float32),
            "desired_goal": np.ones(1, np.float32),
            "achieved_goal": np.array([self.x], np.float32),
        }

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.v = float(self.np_random.uniform(-0.1, 0.1)), 0.0
        return self.observe(), {}

    def step(self, action):
        self.v = float(np.clip(self.v + action[0], -1, 1))
        self.x += 0.1 * self.v
        return self.observe(), float(self.x > 1), False, False, {}


gym.register("Corridor-v0", f"{__name__}:Corridor", max_episode_steps=15)


def collect_minari(dataset_id: str, env: gym.Env, **metadata) -> None:
    """Six episodes of random actions."""
    minari = pytest.importorskip("minari")
    env.action_space.seed(0)
    buffers = []
    for seed in range(6):
        obs, steps = [env.reset(seed=seed)[0]], []
        while not (steps and (steps[-1][2] or steps[-1][3])):
            action = env.action_space.sample()
            next_obs, *rest = env.step(action)
            obs.append(next_obs)
            steps.append((action, *rest[:3]))
        columns = dict(
            zip(("actions", "rewards", "terminations", "truncations"), map(np.array, zip(*steps)))
        )
        obs = (
            {key: np.array([o[key] for o in obs]) for key in obs[0]}
            if isinstance(obs[0], dict)
            else np.array(obs)
        )
        buffers.append(minari.data_collector.EpisodeBuffer(observations=obs, **columns))
    minari.create_dataset_from_buffers(dataset_id, buffers, env=env, **metadata)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("script", SMALL)
@pytest.mark.parametrize("kind", ["locomotion", "maze", "other"])
def test_every_kind_of_minari_dataset_is_trained_and_scored(
    script, kind, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    env, metadata = {
        "locomotion": (
            gym.make("Hopper-v5", max_episode_steps=30),
            {},
        ),  # no reference returns, as Minari's mujoco
        "maze": (
            gym.make("Corridor-v0"),
            {"ref_min_score": 0.0, "ref_max_score": 2.0},
        ),  # as Minari's D4RL
        "other": (gym.make("Pendulum-v1", max_episode_steps=15), {}),
    }[kind]
    collect_minari(f"tests/{kind}-v0", env, **metadata)
    result, row = train(script, f"tests/{kind}-v0", tmp_path / "runs")
    out = capsys.readouterr().out
    assert (
        "preset      none for this task" in out
        and f"minari/tests/{kind}-v0" in out
        and " 0 dropped" in out
    )
    if kind == "maze":  # twice the return in percent of 2
        score = 50 * float(row["eval/return"])
        assert result["normalized_score_last_5"] == pytest.approx(score)
        assert float(row["eval/episode_length"]) == 15
    else:  # raw returns, never D4RL's reference
        assert row.get("eval/normalized_score", "") == ""
        assert not [name for name in result if "score" in name]
        assert result["return_last_5"] == float(row["eval/return"])


def test_dictionary_observations_come_in_one_order():
    """Sorted keys: achieved goal, desired goal, observation; this space has another order."""
    assert next(iter(Corridor.observation_space)) == "observation"
    info = common.task_facts("Corridor-v0", need_env=True)
    with common.make_env(info) as env:
        obs, _ = env.reset(seed=0)
        for push in (1.0, -0.5):
            corridor = env.unwrapped
            np.testing.assert_allclose(obs, [corridor.x, 1, corridor.x, corridor.v], rtol=1e-6)
            v = corridor.v
            obs, *_ = env.step(np.array([push], np.float32))
            assert corridor.v == pytest.approx(
                v + 0.4 * push
            )  # [-1, 1] is the whole range of the environment's actions


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_dataset_with_discrete_actions_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    collect_minari("tests/pole-v0", gym.make("CartPole-v1", max_episode_steps=5))
    with pytest.raises(
        common.UserError, match=r"action space is Discrete\(2\), but only bounded boxes"
    ):
        common.load_dataset("tests/pole-v0")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("script", SMALL)
def test_minaris_antmaze(script, tmp_path, monkeypatch):
    """As D4RL/antmaze/*-v1: Gymnasium-Robotics' ant, and a task that goes on after success.

    Dense rewards in place of sparse ones, for nobody reaches the goal in 15 steps.
    """
    robotics = pytest.importorskip("gymnasium_robotics")
    gym.register_envs(robotics)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    collect_minari(
        "tests/antmaze-v1",
        gym.make("AntMaze_UMazeDense-v4", max_episode_steps=15),
        ref_min_score=0.0,
        ref_max_score=1.0,
    )
    result, row = train(script, "tests/antmaze-v1", tmp_path / "runs")
    assert (
        result["dataset"] == "minari/tests/antmaze-v1" and float(row["eval/episode_length"]) == 15
    )
    arrays, info = common.load_dataset("tests/antmaze-v1")
    with common.make_env(info) as env:
        obs, _ = env.reset(seed=0)
        data = env.unwrapped.ant_env.data
        goal = env.unwrapped.goal
        np.testing.assert_allclose(
            obs, np.r_[data.qpos[:2], goal, data.qpos[2:], data.qvel], rtol=1e-6
        )
    assert arrays["obs"].shape[1] == len(obs) == 31
