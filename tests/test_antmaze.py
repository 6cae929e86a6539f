"""AntMaze: D4RL's environment over Gymnasium's ant, entry by entry, and faults of -v0 data."""

import gymnasium as gym
import numpy as np
import pytest
from conftest import make_raw, write_hdf5

import common

NAMES = [task for task in common.TASKS if task.startswith("antmaze")]


def build(task: str) -> gym.Env:
    return common.make_env(common.task_facts(task, need_env=True))


def walls(maze: str) -> list[tuple[float, float]]:
    """Centres (x, y) in metres from the start: x with columns, y with rows, 4 m per cell."""
    rows = common.MAZES[maze].split()
    ((i0, j0),) = [
        (i, j) for i, row in enumerate(rows) for j, cell in enumerate(row) if cell == "R"
    ]
    return [
        (4 * (j - j0), 4 * (i - i0))
        for i, row in enumerate(rows)
        for j, cell in enumerate(row)
        if cell == "#"
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("version", ["", "-v0", "-v2"])
def test_each_name_has_its_maze_horizon_and_score(name, version):
    facts = common.task_facts(name + version, need_env=True)
    maze = name.split("-")[1]
    assert (
        facts["env"] == f"D4RLAntMaze-{maze}-v2"
        and facts["obs_dim"] == 29
        and len(facts["act_low"]) == 8
    )
    assert gym.spec(facts["env"]).max_episode_steps == (700 if maze == "umaze" else 1000)
    assert common.normalized_score(1.0, facts) == 100 and common.normalized_score(0.0, facts) == 0


@pytest.mark.parametrize(
    ("maze", "goal"), [("umaze", (0, 8)), ("medium", (20, 20)), ("large", (32, 24))]
)
def test_model_and_maze(maze, goal):
    with build(f"antmaze-{maze}" + ("" if maze == "umaze" else "-play")) as env:
        model = env.unwrapped.model
        assert model.opt.timestep == 0.02 and env.unwrapped.dt == pytest.approx(0.1)
        np.testing.assert_array_equal(model.actuator_gear[:, 0], np.full(8, 30))
        np.testing.assert_array_equal(model.actuator_ctrlrange, [[-1, 1]] * 8)
        np.testing.assert_array_equal(
            model.geom_solimp[:, :3], np.tile([0.8, 0.8, 0.01], (model.ngeom, 1))
        )
        margin = 0.005 if common.adds_margins() else 0.01  # two of them are added, or one counts
        np.testing.assert_array_equal(model.geom_margin, np.full(model.ngeom, margin))
        boxes = [i for i in range(model.ngeom) if model.geom_type[i] == 6]
        assert {tuple(model.geom_pos[i][:2]) for i in boxes} == set(walls(maze)) and len(
            boxes
        ) == len(walls(maze))
        np.testing.assert_array_equal(model.geom_size[boxes], np.tile([2, 2, 1], (len(boxes), 1)))
        np.testing.assert_array_equal(env.unwrapped.goal_cell, goal)


@pytest.mark.parametrize(
    "task", ["antmaze-umaze", "antmaze-medium-play", "antmaze-large-diverse-v0"]
)
def test_observation_is_the_state_of_the_simulator(task):
    with build(task) as env:
        obs, _ = env.reset(seed=0)
        env.action_space.seed(0)
        for _ in range(20):
            data = env.unwrapped.data
            assert obs.shape == (29,)
            np.testing.assert_array_equal(obs[:15], data.qpos)
            np.testing.assert_array_equal(obs[15:], data.qvel)
            obs, reward, terminated, _, _ = env.step(env.action_space.sample())
            assert reward == 0 and not terminated  # not even where the ant falls on its back


def test_start_noise():
    with build("antmaze-umaze") as env:
        starts = np.array([env.reset(seed=i)[0] for i in range(300)])
        qpos, qvel = starts[:, :15] - env.unwrapped.init_qpos, starts[:, 15:]
    assert np.abs(qpos).max() <= 0.1 and np.abs(qpos).max(0).min() > 0.09
    np.testing.assert_allclose(qvel.std(0), 0.1, rtol=0.2)


def test_goals_of_the_resets():
    with build("antmaze-umaze") as env:
        goals = []
        for i in range(1000):
            env.reset(seed=i)
            goals.append(env.unwrapped.goal)
        env.reset(seed=3)
        np.testing.assert_array_equal(env.unwrapped.goal, goals[3])
    noise = np.array(goals) - [0, 8]
    assert noise.min() >= 0 and 1.4 < noise.max() <= 1.5
    np.testing.assert_allclose(noise.mean(0), 0.75, atol=0.04)
    np.testing.assert_allclose(noise.var(0), (1 + 0.25) / 12, rtol=0.15)


def test_success_ends_the_episode():
    with build("antmaze-medium-play") as env:
        for distance, success in ((0.3, True), (0.7, False)):
            env.reset(seed=1)
            ant = env.unwrapped
            qpos = ant.init_qpos.copy()
            qpos[:2] = ant.goal - [distance, 0]
            ant.set_state(qpos, np.zeros(14))
            _, reward, terminated, truncated, _ = env.step(np.zeros(8, np.float32))
            assert (reward, terminated, truncated) == (float(success), success, False)


def test_walls_stop_the_ant():
    with build("antmaze-umaze") as env:
        env.reset(seed=0)
        ant = env.unwrapped
        ant.set_state(
            ant.init_qpos, np.r_[0, -8.0, np.zeros(12)]
        )  # 8 m/s towards the wall above the start
        rows = [env.step(np.zeros(8, np.float32))[0][1] for _ in range(15)]
    assert min(rows) > -2  # whose face is 2 m away; without it the ant is at -4 after five steps


def test_evaluation_reports_the_success_rate(monkeypatch):
    """An "ant" that is put beside the goal in some episodes scores 100 there and 0 elsewhere."""
    put_down = common.AntMaze.reset_model

    def reset_model(self):
        obs = put_down(self)
        if self.np_random.integers(2):
            qpos = self.init_qpos.copy()
            qpos[:2] = self.goal
            self.set_state(qpos, self.init_qvel)
            obs = self._get_obs()
        return obs

    monkeypatch.setattr(common.AntMaze, "reset_model", reset_model)
    monkeypatch.setattr(gym.registry["D4RLAntMaze-umaze-v2"], "max_episode_steps", 10)
    info = common.task_facts("antmaze-umaze-diverse", need_env=True)
    result = common.evaluate(lambda obs: np.zeros((len(obs), 8), np.float32), info, 10, seed=0)
    assert set(result["normalized_score"]) == {0.0, 100.0}
    np.testing.assert_array_equal(result["episode_length"], np.where(result["return"] == 1, 1, 10))


def test_rows_that_jump_through_the_maze_are_dropped_and_counted(tmp_path):
    raw = make_raw(obs_dim=29, act_dim=8)  # episodes of 50 rows
    raw["observations"][:, :2] = (
        0.1 * (np.arange(600) % 50)[:, None] + 8 * (np.arange(600) // 50)[:, None]
    )
    raw["rewards"][:] = raw["terminals"]
    raw["timeouts"] = np.roll(
        raw["timeouts"], -10
    )  # as in -v0: ten rows before the true end, which is not marked
    path = write_hdf5(tmp_path / "maze.hdf5", raw)
    arrays, info = common.load_dataset("antmaze-medium-play-v0", str(path))
    assert info["jumps"] == 6 and info["dropped"] == 6 + 6 + 1  # jumps, timeouts and the last row
    moved = np.linalg.norm((arrays["next_obs"] - arrays["obs"])[:, :2], axis=1)
    assert moved[arrays["not_done"] == 1].max() < common.MAX_STEP
    assert "6 jumps" in common.describe(info)
    number = np.round(arrays["obs"][:, 0] // 8)  # no trajectory holds rows of two episodes
    same = ~arrays["ends"][:-1]
    assert (number[1:] == number[:-1])[same].all()
    _, info = common.load_dataset("antmaze-medium-play-v0", str(path), need_env=False)
    assert info["jumps"] == 6
