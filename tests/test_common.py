"""Loading, downloading and evaluating: D4RL's semantics, every kind of bad file, episodes."""

import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
from conftest import make_raw, write_hdf5

import common
from common import UserError, load_dataset

# -------------------------------------------------------------- semantics


def hand_made(**changes) -> dict[str, np.ndarray]:
    """Ten rows: a terminal at 2, a timeout at 5, both at 7, and a last row that ends nothing."""
    raw = {
        "observations": np.arange(20, dtype=np.float64).reshape(10, 2),
        "actions": np.linspace(-1, 1, 10)[:, None],
        "rewards": np.arange(10, dtype=np.float64),
        "terminals": np.isin(np.arange(10), [2, 7]),
        "timeouts": np.isin(np.arange(10), [5, 7]),
    }
    return raw | changes


def d4rl_loop(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """D4RL's Q-learning view written as its definition: a loop over rows that skips timeouts."""
    rows = [i for i in range(len(raw["observations"]) - 1) if not raw["timeouts"][i]]
    return {
        "obs": raw["observations"][rows],
        "act": raw["actions"][rows],
        "rew": raw["rewards"][rows],
        "next_obs": raw["observations"][[i + 1 for i in rows]],
        "not_done": ~raw["terminals"][rows],
    }


@pytest.mark.parametrize(
    "raw",
    [hand_made(), make_raw(), make_raw(rows=601)],
    ids=["by hand", "larger", "unfinished tail"],
)
def test_transitions_are_those_of_d4rl(raw):
    arrays, _ = common.to_transitions(raw)
    for key, expected in d4rl_loop(raw).items():
        assert arrays[key].dtype == np.float32
        np.testing.assert_array_equal(arrays[key], expected.astype(np.float32))


def test_counts_ends_and_mean_return():
    arrays, counts = common.to_transitions(hand_made())
    assert arrays["rew"].tolist() == [
        0,
        1,
        2,
        3,
        4,
        6,
        8,
    ]  # 5 and 7 cut by a timeout, 9 the last row
    assert arrays["not_done"].tolist() == [1, 1, 0, 1, 1, 1, 1]
    assert arrays["ends"].tolist() == [False, False, True, False, True, True, True]
    assert counts == {
        "rows": 10,
        "transitions": 7,
        "dropped": 3,
        "trajectories": 4,  # that of the unfinished tail too
        "episodes": 3,
        "terminals": 2,
        "timeouts": 2,
        "jumps": 0,
        "mean_return": np.mean([0 + 1 + 2, 3 + 4 + 5, 6 + 7]),
        "ends_from": "flags",
    }


def test_with_next_observations_no_row_is_dropped():
    next_observations = hand_made()["observations"] + 2
    next_observations[[2, 5, 7, 9]] = 100  # true ends of the episodes
    arrays, counts = common.to_transitions(hand_made(next_observations=next_observations))
    assert counts["transitions"] == 10 and counts["dropped"] == 0
    np.testing.assert_array_equal(arrays["next_obs"], next_observations)
    assert arrays["ends"].nonzero()[0].tolist() == [2, 5, 7, 9]
    assert arrays["not_done"].tolist() == [1, 1, 0, 1, 1, 1, 1, 0, 1, 1]


def test_nothing_bootstraps_across_episodes():
    raw = make_raw()
    raw["observations"][:, 0] = np.arange(600) // 50  # the first observation tells the episode
    arrays, _ = common.to_transitions(raw)
    crossing = arrays["obs"][:, 0] != arrays["next_obs"][:, 0]
    assert crossing.any() and not arrays["not_done"][crossing].any()


def test_score_constants():
    for env, low, high in (
        ("hopper", -20.272305, 3234.3),
        ("halfcheetah", -280.178953, 12135.0),
        ("walker2d", 1.629008, 4592.3),
    ):
        facts = common.task_facts(f"{env}-medium", need_env=True)
        assert common.normalized_score(low, facts) == 0
        assert common.normalized_score(high, facts) == pytest.approx(100)
    assert common.REFERENCE_RETURNS["antmaze"] == (0.0, 1.0)


def test_every_task_has_a_file_name_and_a_checksum():
    assert len(common.TASKS) == 15 and len(common.D4RL_SHA256) == 21
    assert all(common.d4rl_name(task) == f"{task}-v2" for task in common.TASKS)
    assert (
        common.d4rl_path("hopper-medium-replay-v2") == "gym_mujoco_v2/hopper_medium_replay-v2.hdf5"
    )
    expected = "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse"
    assert common.d4rl_path("antmaze-large-play-v0") == f"ant_maze_new/{expected}.hdf5"
    assert common.d4rl_path("antmaze-large-play-v2") == f"ant_maze_v2/{expected}_fixed.hdf5"


# --------------------------------------------------------- kinds of files


def test_hdf5_and_npz_load_alike(tmp_path):
    raw = make_raw()
    np.savez(tmp_path / "a.npz", **raw)
    from_npz, info = load_dataset("hopper-medium", str(tmp_path / "a.npz"))
    from_hdf5, _ = load_dataset("hopper-medium", str(write_hdf5(tmp_path / "a.hdf5", raw)))
    assert all(np.array_equal(from_npz[key], from_hdf5[key]) for key in from_npz)
    assert info["id"] == "file/a.npz" and info["env"] == "Hopper-v4"
    assert info["sha256"] == hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest()
    assert info["mean_score"] == pytest.approx(
        100 * (info["mean_return"] + 20.272305) / (3234.3 + 20.272305)
    )
    json.dumps(info)  # plain values only


def test_columns_and_float64_are_accepted(tmp_path):
    raw = make_raw()
    raw |= {key: raw[key][:, None] for key in ("rewards", "terminals", "timeouts")}
    raw["observations"] = raw["observations"].astype(np.float64)
    arrays, _ = load_dataset("hopper-medium", str(write_hdf5(tmp_path / "a.hdf5", raw)))
    assert arrays["rew"].ndim == 1 and arrays["obs"].dtype == np.float32


def test_bundled_samples_load():
    for task in ("hopper-medium", "hopper-medium-replay"):
        arrays, info = load_dataset(task, "bundled")
        assert info["id"] == f"bundled/{task}" and len(arrays["obs"]) > 100_000
        print(common.describe(info))
    with pytest.raises(UserError, match="hopper-medium-replay"):
        load_dataset("walker2d-medium", "bundled")


def make_minari(dataset_id: str, **metadata) -> np.ndarray:
    """Three episodes of five steps of Hopper-v5 as a Minari dataset; their last observations."""
    minari = pytest.importorskip("minari")
    env, buffers = gym.make("Hopper-v5", max_episode_steps=5), []
    for seed in range(3):
        observations = [env.reset(seed=seed)[0]]
        env.action_space.seed(seed)
        actions = [env.action_space.sample() for _ in range(5)]
        steps = [env.step(action) for action in actions]
        observations += [step[0] for step in steps]
        rewards, terminations, truncations = ([step[i] for step in steps] for i in (1, 2, 3))
        buffers.append(
            minari.data_collector.EpisodeBuffer(
                observations=np.array(observations),
                actions=np.array(actions),
                rewards=rewards,
                terminations=terminations,
                truncations=truncations,
            )
        )
    minari.create_dataset_from_buffers(dataset_id, buffers, env=env, **metadata)
    return np.array([buffer.observations[-1] for buffer in buffers])


def test_minari_dataset_keeps_the_last_transition_and_its_own_scores(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    last = make_minari("local/hopper/tiny-v0", ref_min_score=0.0, ref_max_score=50.0)
    arrays, info = load_dataset("local/hopper/tiny-v0")
    assert info["id"] == "minari/local/hopper/tiny-v0" and (info["ref_min"], info["ref_max"]) == (
        0.0,
        50.0,
    )
    assert info["dropped"] == 0 and info["episodes"] == info["timeouts"] == 3
    assert arrays["not_done"].all() and arrays["ends"].nonzero()[0].tolist() == [4, 9, 14]
    np.testing.assert_allclose(arrays["next_obs"][arrays["ends"]], np.float32(last))
    result = common.evaluate(lambda obs: np.zeros((len(obs), 3), np.float32), info, 2, seed=0)
    assert result["episode_length"].tolist() == [5, 5]
    np.testing.assert_allclose(result["normalized_score"], 2 * result["return"])


def test_dictionary_observations_are_flattened_in_the_order_of_sorted_keys():
    box = gym.spaces.Box
    space = gym.spaces.Dict(
        b=box(-1, 1, (2,)), a=gym.spaces.Dict(d=box(-1, 1, (2, 2)), c=box(-1, 1, (1,)))
    )  # not sorted
    space.seed(0)
    samples = [space.sample() for _ in range(4)]
    batch = {"b": np.stack([s["b"] for s in samples])}
    batch |= {"a": {key: np.stack([s["a"][key] for s in samples]) for key in "cd"}}
    rows = [np.r_[s["a"]["c"], s["a"]["d"].ravel(), s["b"]] for s in samples]
    np.testing.assert_array_equal(common.flatten(space, batch), rows)
    np.testing.assert_array_equal(common.flatten(space, samples[2]), rows[2])
    with pytest.raises(UserError, match="neither a box nor a dictionary of boxes"):
        common.flatten(gym.spaces.Dict(a=gym.spaces.Discrete(3)), {"a": np.zeros(4)})


def test_minari_environment_must_be_a_registered_one(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    make_minari("local/hopper/evil-v0")
    path = tmp_path / "local/hopper/evil-v0/data/metadata.json"
    path.write_text(
        path.read_text().replace("gymnasium.envs.mujoco.hopper_v5:HopperEnv", "os:system")
    )
    with pytest.raises(UserError, match="not registered"):
        load_dataset("local/hopper/evil-v0")
    arrays, info = load_dataset("local/hopper/evil-v0", need_env=False)
    assert info["env"] is None and len(arrays["obs"]) == 15


def test_other_qualities_of_a_known_robot_are_scored(dataset):
    _, info = load_dataset("hopper-expert", str(dataset))
    assert info["env"] == "Hopper-v4" and info["ref_max"] == 3234.3


def test_actions_of_another_box_are_scaled_to_one(tmp_path):
    raw = make_raw(obs_dim=348, act_dim=17)
    raw["actions"] *= np.float32(0.4)
    arrays, info = load_dataset("Humanoid-v5", str(write_hdf5(tmp_path / "a.hdf5", raw)))
    np.testing.assert_allclose(np.abs(arrays["act"]).max(), 1, atol=1e-3)
    assert info["ref_min"] is None and info["mean_score"] is None
    with common.make_env(info) as env:
        assert env.action_space.low.min() == -1 and env.action_space.high.max() == 1


# -------------------------------------------------------------- bad files


def broken(key: str, change) -> dict[str, np.ndarray]:
    raw = make_raw()
    raw[key] = change(raw[key].copy())
    return raw


def with_value(value, row=7):
    def change(array):
        array[row] = value
        return array

    return change


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({k: v for k, v in make_raw().items() if k != "rewards"}, "lacks rewards"),
        ({}, "lacks observations"),
        (broken("rewards", with_value(np.nan)), "rewards has NaN or infinity in row 7"),
        (broken("observations", with_value(np.inf)), "observations has NaN or infinity in row 7"),
        (broken("actions", with_value(1.5)), "action in row 7 is outside"),
        (broken("rewards", lambda a: a[:-1]), "rewards has type float32 and shape"),
        (broken("actions", lambda a: a[:, 0]), "actions has type float32 and shape"),
        (broken("observations", lambda a: a[:, :5]), "sizes of observation and action are .5, 3."),
        (broken("terminals", lambda a: a.astype("S1")), "terminals has type .S1"),
        (
            make_raw() | {"terminals": np.zeros(600, bool), "timeouts": np.zeros(600, bool)},
            "there is no whole episode",
        ),
        (make_raw(rows=0), "there is no whole episode"),
        (
            make_raw() | {"actions": np.float32(1)},
            "actions has type float32 and shape .., but it must have two dimensions",
        ),
    ],
)
def test_wrong_arrays_get_one_sentence(tmp_path, raw, message):
    with pytest.raises(UserError, match=message) as error:
        load_dataset("hopper-medium", str(write_hdf5(tmp_path / "a.hdf5", raw)))
    assert "\n" not in str(error.value)


def test_wrong_files_get_one_sentence(tmp_path, dataset):
    whole = dataset.read_bytes()
    cases = {
        "truncated.hdf5": (whole[: len(whole) // 2], "damaged"),
        "empty.hdf5": (b"", "damaged"),
        "page.hdf5": (b"\n<!DOCTYPE html><html>not here</html>", "web page"),
        "noise.npz": (b"PK\x03\x04" + bytes(100), "damaged"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_dataset("hopper-medium", str(tmp_path / name))
    with pytest.raises(UserError, match="does not exist"):
        load_dataset("hopper-medium", str(tmp_path / "absent.hdf5"))


def test_a_pickle_inside_npz_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle ran",))

    raw = make_raw()
    np.savez(tmp_path / "a.npz", **(raw | {"rewards": np.array([Trap()], dtype=object)}))
    with pytest.raises(UserError, match="damaged"):
        load_dataset("hopper-medium", str(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    ("env", "data", "message"),
    [
        ("hoper-medium", "auto", "did you mean hopper-medium"),
        ("hopper-medium-v1", "auto", "hopper-medium"),
        ("hopper-medium", "nowhere", "must be auto, d4rl, minari, bundled, or"),
        ("mujoco/hopper", "auto", "a Minari id looks like"),
        ("hopper-medium", "minari", "not among the local|a Minari id looks like|cannot load"),
    ],
)
def test_wrong_names_get_one_sentence(env, data, message, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "MINARI_HUB", "http://127.0.0.1:1")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(UserError, match=message):
        load_dataset(env, data)


def test_a_file_without_a_known_environment(dataset):
    with pytest.raises(UserError, match=r"neither a task nor a Gymnasium id .*Hopper-v"):
        load_dataset("Hoper-v4", str(dataset))
    with pytest.raises(UserError, match="neither a task nor a Gymnasium id"):
        load_dataset("antmaze-tiny", str(dataset))
    arrays, info = load_dataset("my-robot", str(dataset), need_env=False)
    assert info["env"] is None and len(arrays["obs"]) == 593
    assert "evaluation  none" in common.describe(info)


# --------------------------------------------------------------- download


class Hub(http.server.BaseHTTPRequestHandler):
    """A dataset host on this machine; `content` is what it sends, `mode` how."""

    content, mode = b"", "whole"

    def do_HEAD(self):
        self.send_response(404 if self.mode == "missing" else 200)
        self.end_headers()

    def do_GET(self):
        self.send_response(404 if self.mode == "missing" else 200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if self.mode != "missing":
            self.wfile.write(
                self.content[: len(self.content) // 2] if self.mode == "cut" else self.content
            )

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(dataset, tmp_path, monkeypatch):
    """The hub serves `dataset` as D4RL's walker2d-medium, which no bundled sample can replace."""
    Hub.content, Hub.mode = dataset.read_bytes(), "whole"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr(
        common,
        "MIRRORS",
        (
            "http://127.0.0.1:1/{path}",
            address + "{name}",
        ),
    )
    digest = hashlib.sha256(Hub.content).hexdigest()
    monkeypatch.setattr(
        common,
        "D4RL_SHA256",
        common.D4RL_SHA256 | {"hopper-medium-v2": digest, "walker2d-medium-v2": "0" * 64},
    )
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    server.shutdown()
    server.server_close()


def test_download_from_the_second_mirror_and_then_from_the_cache(hub, monkeypatch):
    arrays, info = load_dataset("hopper-medium")
    assert info["id"] == "d4rl/hopper-medium-v2" and len(arrays["obs"]) > 500
    assert [path.name for path in hub.iterdir()] == [
        "hopper_medium-v2.hdf5"
    ]  # nothing temporary is left
    monkeypatch.setattr(common, "MIRRORS", ())
    again, info = load_dataset("hopper-medium", "d4rl")
    assert np.array_equal(arrays["obs"], again["obs"]) and info["file"] == str(
        hub / "hopper_medium-v2.hdf5"
    )


def test_a_file_with_a_known_checksum_gets_its_official_name(hub, dataset):
    _, info = load_dataset("hopper-medium", str(dataset))
    assert info["id"] == "d4rl/hopper-medium-v2"
    with pytest.raises(UserError, match="is D4RL's hopper-medium-v2, not hopper-medium-expert"):
        load_dataset("hopper-medium-expert", str(dataset))


@pytest.mark.parametrize("mode", ["cut", "missing", "other"])
def test_failed_downloads_leave_nothing_and_do_not_fall_back(hub, mode):
    Hub.mode = mode
    if mode == "other":
        Hub.content = b"<html>moved</html>" * 100
    with pytest.raises(
        UserError,
        match=r"(?s)cannot be downloaded.*curl -L --create-dirs -o .*hopper_medium-v2\.hdf5",
    ) as error:
        load_dataset("hopper-medium")
    assert "--data bundled" in str(error.value)
    assert not hub.exists() or not list(hub.iterdir())


def test_a_wrong_file_in_the_cache_is_kept_and_named(hub):
    hub.mkdir()
    (hub / "hopper_medium-v2.hdf5").write_bytes(b"mine")
    with pytest.raises(UserError, match="is not D4RL's hopper-medium-v2"):
        load_dataset("hopper-medium")
    assert (hub / "hopper_medium-v2.hdf5").read_bytes() == b"mine"


def test_an_unwritable_cache_is_named(hub, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="D4RL_DATASET_DIR"):
        load_dataset("hopper-medium")


def test_without_network_auto_falls_back_loudly_and_d4rl_never(hub, monkeypatch, capsys):
    monkeypatch.setattr(common, "MIRRORS", ("http://127.0.0.1:1/{path}",))
    _, info = load_dataset("hopper-medium")
    assert info["id"] == "bundled/hopper-medium"
    assert "NO NETWORK" in capsys.readouterr().err
    for env, data in (("hopper-medium", "d4rl"), ("walker2d-medium", "auto")):
        with pytest.raises(UserError, match="cannot be downloaded"):
            load_dataset(env, data)


def test_a_server_that_never_answers_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "TIMEOUT", 0.5)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(common, "MIRRORS", (url + "{path}", url + "{path}"))
        monkeypatch.setattr(common, "MINARI_HUB", url)
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        with pytest.raises(UserError, match="no answer"):  # and not a wait without end
            load_dataset("hopper-medium", "d4rl")
        with pytest.raises(UserError, match="does not answer"):
            load_dataset("mujoco/hopper/medium-v0")


# ------------------------------------------------------------- evaluation


def linear_policy(obs: np.ndarray) -> np.ndarray:
    """Deterministic, and the same for a row whatever stands beside it."""
    weights = np.sin(np.arange(33, dtype=np.float32)).reshape(11, 3)
    return np.tanh((obs[:, :, None] * weights).sum(1)).astype(np.float32)


def test_episodes_side_by_side_equal_episodes_one_by_one():
    info = common.task_facts("hopper-medium", need_env=True)
    together = common.evaluate(linear_policy, info, 10, seed=100)
    assert len(set(together["episode_length"])) > 1  # so that some go on while others are over
    for i in range(10):
        with common.make_env(info) as env:
            obs, _ = env.reset(seed=100 + i)
            total, length, over = 0.0, 0, False
            while not over:
                obs, reward, terminated, truncated, _ = env.step(
                    linear_policy(obs[None].astype(np.float32))[0]
                )
                total, length, over = total + reward, length + 1, terminated or truncated
        assert together["return"][i] == total and together["episode_length"][i] == length
        assert together["normalized_score"][i] == common.normalized_score(total, info)


class Counting(gym.Env):
    """The first episode lasts `seed % 4 + 2` steps, every later one 1; each step is worth 1."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-2, 4, (1,))

    def reset(self, seed=None, options=None):
        self.left = 1 if seed is None else seed % 4 + 2
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.left -= 1
        return np.zeros(2, np.float32), float(action[0]), self.left == 0, False, {}


def test_an_episode_counts_once_whatever_follows_it():
    gym.register("Counting-v0", Counting, max_episode_steps=100)
    try:
        info = {"env": "Counting-v0", "ref_min": None}
        result = common.evaluate(lambda obs: np.ones((len(obs), 1), np.float32), info, 6, seed=0)
        assert result["episode_length"].tolist() == [2, 3, 4, 5, 2, 3]
        np.testing.assert_allclose(
            result["return"], 4 * result["episode_length"]
        )  # action 1 is the box's upper end, 4
        assert "normalized_score" not in result
    finally:
        del gym.registry["Counting-v0"]


def test_environments_that_cannot_be_used_are_refused():
    gym.register("Endless-v0", Counting)
    try:
        for env, message in (
            ("Endless-v0", "no time limit"),
            ("CartPole-v1", "only bounded boxes"),
        ):
            with pytest.raises(UserError, match=message):
                common.make_env({"env": env})
    finally:
        del gym.registry["Endless-v0"]


def test_hdf5_links_to_other_files_are_not_followed_silently(tmp_path, dataset):
    """A link to a file that is not there is a missing key, not a crash."""
    path = tmp_path / "link.hdf5"
    with h5py.File(path, "w") as file:
        for key in common.KEYS:
            file[key] = h5py.ExternalLink("absent.hdf5", key)
    with pytest.raises(UserError):
        load_dataset("hopper-medium", str(path))


# ------------------------------------------------- two sources of a space


BOX = gym.spaces.Box
PLAIN = BOX(-np.inf, np.inf, (3,))


class Point(gym.Env):
    """Any spaces; each step is worth 1."""

    def __init__(self, observation_space=PLAIN, action_space=None, render_mode=None, **kwargs):
        self.observation_space = observation_space
        self.action_space = BOX(-1, 1, (2,)) if action_space is None else action_space
        self.render_mode = render_mode
        self.kwargs = kwargs
        self.metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 10}
        self.observation_space.seed(0)

    def reset(self, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        if self.kwargs.get("fails"):
            return action + "text"
        return self.observation_space.sample(), 1.0, False, False, {}


@pytest.fixture
def register(monkeypatch):
    """Registers environments until the end of the test."""
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    monkeypatch.setattr(gym, "registry", gym.envs.registration.registry)

    def register(env_id: str, entry_point=Point, steps: int | None = 5, **kwargs) -> str:
        gym.register(env_id, entry_point, max_episode_steps=steps, kwargs=kwargs)
        return env_id

    return register


def sample(space: gym.Space, count: int):
    if isinstance(space, gym.spaces.Dict):
        return {key: sample(space[key], count) for key in space}
    return np.stack([space.sample() for _ in range(count)])


def write_minari(
    folder,
    dataset_id: str,
    env_id: str,
    obs=None,
    act=None,
    episodes=4,
    steps=5,
    flags=None,
    **more,
):
    """A Minari dataset with spaces that may differ from its environment's; flags by episode."""
    minari = pytest.importorskip("minari")
    folder.mkdir(exist_ok=True)
    env = gym.make(env_id)
    obs = env.observation_space if obs is None else obs
    act = env.action_space if act is None else act
    obs.seed(0)
    act.seed(0)
    buffers = []
    for episode in range(episodes):
        last = np.arange(steps) == steps - 1
        flagged = flags is None or flags[episode]
        buffers.append(
            minari.data_collector.EpisodeBuffer(
                observations=sample(obs, steps + 1),
                actions=sample(act, steps),
                rewards=np.full(steps, float(episode)),
                terminations=np.zeros(steps, bool),
                truncations=last & flagged,
            )
        )
    minari.create_dataset_from_buffers(
        dataset_id, buffers, env=env, observation_space=obs, action_space=act, **more
    )
    return folder / dataset_id / "data"


GOAL = BOX(-1, 1, (2,))
MAZE = gym.spaces.Dict(observation=BOX(-1, 1, (4,)), achieved_goal=GOAL, desired_goal=GOAL)
SPACES = {  # what the dataset and the environment have, and what the sentence says
    "one key of a dictionary": (dict(obs=MAZE["observation"]), dict(obs=MAZE), "observations of 4"),
    "a dictionary for a box": (dict(obs=gym.spaces.Dict(a=PLAIN)), {}, "observations of a 3"),
    "other keys of the same sizes": (
        dict(obs=gym.spaces.Dict(a=GOAL, b=GOAL)),
        dict(obs=gym.spaces.Dict(a=GOAL, c=GOAL)),
        "a 2, b 2.*a 2, c 2",
    ),
    "the same entries, divided otherwise": (
        dict(obs=gym.spaces.Dict(a=BOX(-1, 1, (1,)), b=PLAIN)),
        dict(obs=gym.spaces.Dict(a=GOAL, b=GOAL)),
        "a 1, b 3.*a 2, b 2",
    ),
    "fewer actions": (dict(act=BOX(-1, 1, (1,))), {}, r"has 1 in \[-1, 1\], but .* 2 in"),
    "half the box": ({}, dict(act=BOX(-2, 2, (2,))), r"2 in \[-1, 1\], but .* 2 in \[-2, 2\]"),
    "ten times the box": (dict(act=BOX(-10, 10, (2,))), {}, r"2 in \[-10, 10\], but"),
    "one other bound": (
        dict(act=BOX(np.float32([-1, -1]), np.float32([1, 2]))),
        {},
        r"2 in \[-1, 2\] at the widest",
    ),
    "a box that is moved": (dict(act=BOX(0, 2, (2,))), {}, r"2 in \[0, 2\], but"),
}


@pytest.mark.parametrize("kind", SPACES)
def test_a_minari_dataset_must_have_the_spaces_of_its_environment(
    kind, tmp_path, monkeypatch, register
):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    data, env, message = SPACES[kind]
    register("Point-v0", f"{__name__}:Point")
    own = {"obs": env.get("obs"), "act": BOX(-1, 1, (2,)), **data}
    write_minari(tmp_path, "tests/point-v0", "Point-v0", **own)
    names = {"obs": "observation_space", "act": "action_space"}
    gym.registry["Point-v0"].kwargs = {names[name]: space for name, space in env.items()}
    with pytest.raises(UserError, match=message) as error:
        load_dataset("tests/point-v0")
    assert "\n" not in str(error.value) and "tests/point-v0 has" in str(error.value)
    arrays, info = load_dataset("tests/point-v0", need_env=False)  # by the dataset's own box
    assert info["box"] == "dataset" and 0.9 < np.abs(arrays["act"]).max() <= 1.0001


def test_a_file_that_fills_half_the_box_is_named(tmp_path, capsys):
    raw = make_raw(obs_dim=3, act_dim=1)  # actions in [-1, 1], where Pendulum's are in [-2, 2]
    path = str(write_hdf5(tmp_path / "a.hdf5", raw))
    _, info = load_dataset("Pendulum-v1", path)
    out = capsys.readouterr().out
    assert "actions     1 in [-2, 2], the box of the environment" in out
    assert "they fill at most 50 % of it" in out and info["act_used"] == pytest.approx(
        0.5, abs=0.01
    )
    raw["actions"] *= 2
    load_dataset("Pendulum-v1", str(write_hdf5(tmp_path / "b.hdf5", raw)))
    assert "they fill" not in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [(11, 4), (11, 2), (17, 3)])
def test_a_file_of_other_sizes_is_refused(sizes, tmp_path):
    raw = make_raw(obs_dim=sizes[0], act_dim=sizes[1])
    with pytest.raises(UserError, match=rf"are \[{sizes[0]}, {sizes[1]}\], but \[11, 3\] in"):
        load_dataset("hopper-medium", str(write_hdf5(tmp_path / "a.hdf5", raw)))


class Wrapped(gym.Wrapper):
    """An environment whose entry point halves the box of its inside."""

    def __init__(self):
        super().__init__(gym.wrappers.RescaleAction(Point(), -0.5, 0.5))


def test_bounds_are_those_of_the_outermost_environment(register):
    register("Wrapped-v0", lambda: Wrapped())
    assert common.task_facts("Wrapped-v0")["act_high"] == [0.5, 0.5]


# ---------------------------------------------------- boxes that are none


NO_BOXES = {
    "low = high in one dimension": BOX(np.float32([-1, 0]), np.float32([1, 0])),
    "integers": BOX(-3, 3, (2,), np.int64),
    "bytes": BOX(0, 255, (2,), np.uint8),
    "no bound above": BOX(np.float32([0, 0]), np.float32([1, np.inf])),
    "a width beyond float32": BOX(-3e38, 3e38, (2,)),
    "a matrix": BOX(-1, 1, (2, 2)),
    "a single number": BOX(-1, 1, ()),
    "no entry": BOX(-1, 1, (0,)),
    "several numbers": gym.spaces.MultiDiscrete([3, 3]),
    "a dictionary": gym.spaces.Dict(a=BOX(-1, 1, (2,))),
}


@pytest.mark.parametrize("kind", NO_BOXES)
def test_boxes_that_are_none(kind, tmp_path, register):
    register("Odd-v0", action_space=NO_BOXES[kind])
    path = str(write_hdf5(tmp_path / "a.hdf5", make_raw(obs_dim=3, act_dim=2)))
    for action in (
        lambda: load_dataset("Odd-v0", path),
        lambda: common.make_env({"env": "Odd-v0"}),
        lambda: common.evaluate(len, {"env": "Odd-v0", "ref_min": None}, 2, 0),
    ):
        with pytest.raises(
            UserError, match=r"Odd-v0: the action space is .*only bounded boxes"
        ) as error:
            action()
        assert "\n" not in str(error.value)


def test_a_minari_box_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for name, act in (("int", BOX(-2, 2, (1,), np.int32)), ("flat", BOX(0, 0, (1,)))):
        write_minari(tmp_path, f"tests/{name}-v0", "Pendulum-v1", act=act)
        for need_env in (True, False):
            with pytest.raises(UserError, match=r"action space is Box.*only bounded boxes"):
                load_dataset(f"tests/{name}-v0", need_env=need_env)


# ---------------------------------------------- bounds without evaluation


@pytest.mark.parametrize(
    ("env", "sizes", "high"),
    [("Humanoid-v5", (348, 17), 0.4), ("Pendulum-v1", (3, 1), 2.0), ("Pusher-v5", (23, 7), 2.0)],
)
def test_without_evaluation_the_box_is_still_the_environments(env, sizes, high, tmp_path):
    raw = make_raw(obs_dim=sizes[0], act_dim=sizes[1])
    raw["actions"] *= np.float32(high)
    path = str(write_hdf5(tmp_path / "a.hdf5", raw))
    with_env, _ = load_dataset(env, path)
    without, info = load_dataset(env, path, need_env=False)
    np.testing.assert_array_equal(with_env["act"], without["act"])
    assert info["env"] is None and info["box"] == "environment"
    assert info["act_high"] == pytest.approx([high] * sizes[1])


def test_a_box_is_assumed_only_where_nothing_is_known_and_that_is_said(tmp_path, capsys):
    path = str(write_hdf5(tmp_path / "a.hdf5", make_raw()))
    for env in ("my-robot", "CartPole-v1"):  # one is unknown, the other has no box
        _, info = load_dataset(env, path, need_env=False)
        assert (info["act_low"], info["act_high"], info["box"]) == (-1.0, 1.0, "assumed")
        assert "assumed to be in [-1, 1]: no environment is known" in capsys.readouterr().out
    raw = make_raw()
    raw["actions"] *= 3
    with pytest.raises(UserError, match=r"\[-1, 1\], the box that is assumed without an env"):
        load_dataset("my-robot", str(write_hdf5(tmp_path / "b.hdf5", raw)), need_env=False)
    with pytest.raises(UserError, match=r"\[11, 3\], but \[11, 17\]"):
        load_dataset("Humanoid-v5", path, need_env=False)


# ------------------------------------------------------- ends of episodes


def ring(episodes: int = 20, steps: int = 50) -> dict[str, np.ndarray]:
    """A walk on a ring of five cells; each episode is cut by a time limit."""
    rng = np.random.default_rng(0)
    cells = []
    for _ in range(episodes):
        start = rng.integers(5)
        cells.append((start + np.cumsum(rng.choice([-1, 1], steps))) % 5)
    raw = make_raw(rows=episodes * steps, obs_dim=5)
    raw["observations"] = np.eye(5, dtype=np.float32)[np.concatenate(cells)]
    raw["terminals"][:] = False
    raw["timeouts"] = np.arange(1, episodes * steps + 1) % steps == 0
    return raw


def test_flags_end_trajectories_where_observations_do_not(tmp_path, capsys):
    arrays, counts = common.to_transitions(ring())
    assert counts["trajectories"] == counts["episodes"] == 20
    assert arrays["ends"].nonzero()[0].tolist() == list(range(48, 980, 49))
    still = ring()
    still["observations"][:] = 1  # rows that cannot be told apart at all
    _, counts = common.to_transitions(still)
    assert counts["trajectories"] == 20
    path = write_hdf5(tmp_path / "a.hdf5", ring())
    load_dataset("ring", str(path), need_env=False)
    assert "20 trajectories, 20 episodes, 0 terminals, 20 timeouts" in capsys.readouterr().out


def test_the_row_before_a_dropped_one_ends_a_trajectory():
    """AntMaze-v0: a jump is dropped, and what follows it may begin at the very same place."""
    raw = make_raw(rows=100, episode=100, obs_dim=4)
    raw["observations"][:] = 0
    raw["observations"][30, :2] = 9  # rows 29 and 30 jump
    arrays, counts = common.to_transitions(raw, max_step=1.5)
    assert counts["jumps"] == 2
    assert arrays["ends"].nonzero()[0].tolist() == [28, len(arrays["ends"]) - 1]


def with_next(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    next_obs = np.roll(raw["observations"], -1, axis=0)
    last = raw["terminals"] | raw["timeouts"]
    last[-1] = True
    next_obs[last] = 7
    return {**raw, "next_observations": next_obs}


def test_noise_in_next_observations_ends_nothing():
    """Sensors that are read twice: the flags decide."""
    raw = with_next(make_raw())
    expected, _ = common.to_transitions(raw)
    noise = np.random.default_rng(1).normal(size=raw["observations"].shape).astype(np.float32)
    arrays, counts = common.to_transitions(
        {**raw, "next_observations": raw["next_observations"] + 1e-3 * noise}
    )
    np.testing.assert_array_equal(arrays["ends"], expected["ends"])
    assert counts["trajectories"] == 12 and counts["ends_from"] == "flags"


def test_a_row_that_does_not_follow_is_a_start_where_the_others_follow():
    """Two files in one, of which the first has an unfinished tail, as D4RL's medium-expert."""
    parts = [with_next(make_raw(rows=70, seed=1)), with_next(make_raw(rows=100))]
    raw = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays, counts = common.to_transitions(raw)
    assert arrays["ends"].nonzero()[0].tolist() == [49, 69, 119, 169]
    assert counts["episodes"] == 3 and counts["trajectories"] == 4
    assert counts["ends_from"] == "flags and 1 rows that the next one does not follow"


def test_timeouts_that_were_never_set_are_found():
    raw = with_next(make_raw())
    raw["timeouts"] = np.zeros(600, bool)
    arrays, counts = common.to_transitions(raw)
    assert arrays["ends"].nonzero()[0].tolist() == list(range(49, 600, 50))
    assert counts["episodes"] == 12
    assert counts["mean_return"] == pytest.approx(raw["rewards"].reshape(12, 50).sum(1).mean())


@pytest.mark.parametrize("flags", [[False] * 4, [True, False, False, True], [True] * 4])
def test_minari_episodes_are_known_by_construction(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write_minari(tmp_path, "tests/some-v0", "Pendulum-v1", flags=flags)
    arrays, info = load_dataset("tests/some-v0")
    assert arrays["ends"].nonzero()[0].tolist() == [4, 9, 14, 19] and arrays["not_done"].all()
    assert info["episodes"] == info["trajectories"] == 4 and info["timeouts"] == sum(flags)
    assert info["mean_return"] == 5 * np.mean([0, 1, 2, 3])
    missing = f"{4 - sum(flags)} of which end without a flag"
    assert (missing in capsys.readouterr().out) == (not all(flags))


def test_flags_inside_of_a_minari_episode_make_no_episodes(tmp_path, monkeypatch):
    """As in tasks that go on after success; the trajectories still end there."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    folder = write_minari(tmp_path, "tests/goes-on-v0", "Pendulum-v1")
    with h5py.File(folder / "main_data.hdf5", "r+") as file:
        file["episode_1/terminations"][2] = True
        file["episode_3/truncations"][0] = True
    arrays, info = load_dataset("tests/goes-on-v0")
    assert arrays["ends"].nonzero()[0].tolist() == [4, 7, 9, 14, 15, 19]
    assert info["episodes"] == 4 and info["trajectories"] == 6
    assert info["mean_return"] == 5 * np.mean([0, 1, 2, 3])


def test_minari_episodes_that_begin_where_the_last_one_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    still = BOX(0, np.float32(1e-12), (3,))  # all observations are equal
    write_minari(tmp_path, "tests/still-v0", "Pendulum-v1", obs=still, flags=[False] * 4)
    _, info = load_dataset("tests/still-v0", need_env=False)
    assert info["trajectories"] == 4


# ------------------------------------------------- files without timeouts


def test_timeouts_are_optional(tmp_path, capsys):
    raw = with_next(make_raw())  # every second episode is cut
    del raw["timeouts"]
    arrays, info = load_dataset("hopper-medium", str(write_hdf5(tmp_path / "a.hdf5", raw)))
    assert info["rows"] == info["transitions"] == 600 and info["timeouts"] == 0
    assert info["episodes"] == info["trajectories"] == 12
    assert arrays["ends"].nonzero()[0].tolist() == list(range(49, 600, 50))
    assert arrays["not_done"].sum() == 594
    out = capsys.readouterr().out
    assert "ends of trajectories from terminals and 6 rows that the next one does not follow" in out

    raw["terminals"][:] = False  # nothing ever ends, as in HalfCheetah
    _, info = load_dataset("hopper-medium", str(write_hdf5(tmp_path / "b.hdf5", raw)))
    assert info["episodes"] == 11 and info["trajectories"] == 12  # the last one may be unfinished


def test_without_timeouts_and_next_observations_terminals_alone_are_known(tmp_path, capsys):
    raw = make_raw()
    del raw["timeouts"]
    path = tmp_path / "a.npz"
    np.savez(path, **raw)
    _, info = load_dataset("hopper-medium", str(path))
    assert info["trajectories"] == info["episodes"] == 6 and info["dropped"] == 1
    assert "a cut episode continues in the next" in capsys.readouterr().out
    raw["terminals"][:] = False
    np.savez(path, **raw)
    with pytest.raises(UserError, match="there is no whole episode"):
        load_dataset("hopper-medium", str(path))


# ------------------------------------------------------------------ names


ANT = (BOX(-np.inf, np.inf, (29,)), BOX(-1, 1, (8,)))


@pytest.mark.parametrize(
    ("name", "spaces"),
    [
        ("antmaze-large-singletask-v0", ANT),
        ("antmaze-umaze-v5", ANT),
        ("hopper-mine-v0", (PLAIN, BOX(-1, 1, (2,)))),
        ("walker2d-medium-v3", (PLAIN, BOX(-1, 1, (2,)))),
    ],
)
def test_names_that_merely_begin_alike(name, spaces, tmp_path, register):
    register(name, observation_space=spaces[0], action_space=spaces[1])
    raw = make_raw(obs_dim=spaces[0].shape[0], act_dim=spaces[1].shape[0])
    raw["observations"][:, :2] *= 10  # jumps, if this were an ant's maze
    raw["rewards"] -= 1000
    _, info = load_dataset(name, str(write_hdf5(tmp_path / "a.hdf5", raw)))
    assert info["env"] == name and info["evaluation"] == f"{name}, 5 steps at most"
    assert info["ref_min"] is info["mean_score"] is None and info["jumps"] == 0
    assert not info["d4rl_contacts"]
    result = common.evaluate(lambda obs: np.zeros((len(obs), len(info["act_low"]))), info, 2, 0)
    assert result["return"].tolist() == [5, 5] and "normalized_score" not in result


def test_d4rl_names_are_exact():
    for name in ("hopper-medium", "halfcheetah-random-v0", "walker2d-full-replay-v1"):
        assert common.d4rl_robot(name) == name.split("-")[0]
    for name in ("antmaze-umaze", "antmaze-large-diverse-v0", "antmaze-medium-play-v2"):
        assert common.d4rl_robot(name) == "antmaze"
    for name in ("hopper", "hopper-v2", "hopper-medium-v3", "antmaze-umaze-play", "ant-medium",
                 "m:hopper-medium", "Hopper-v4", "antmaze-giant-v0"):  # fmt: skip
        assert common.d4rl_robot(name) is None


# -------------------------------------- environments that exist are found


MODULE = """
import gymnasium as gym, numpy as np

class Own(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 1.0, False, False, {}

gym.register("Own-v0", "NAME:Own", max_episode_steps=5)
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch, register):
    """Makes a module that registers Own-v0; it is forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str) -> str:
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(MODULE.replace("NAME", name))
        made.append(name)
        return name

    made = []
    yield make
    for name in made:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["own_robot", "own_package.robots"])
def test_a_typed_module_is_imported(name, own_module, tmp_path):
    env = f"{own_module(name)}:Own-v0"
    path = str(write_hdf5(tmp_path / "a.hdf5", make_raw(obs_dim=3, act_dim=2)))
    _, info = load_dataset(env, path)
    assert info["evaluation"] == "Own-v0, 5 steps at most" and info["env"] == env
    assert common.evaluate(lambda obs: np.zeros((len(obs), 2)), info, 2, 0)["return"].max() == 5

    # a checkpoint that says so imports nothing
    del sys.modules[name]
    with pytest.raises(UserError, match=f"imported only when you type it: add --env {env}"):
        common.make_env(info)
    assert name not in sys.modules
    assert common.task_facts(env)["env"] == env  # typed again
    common.make_env(info).close()


def test_a_typed_module_also_stands_before_a_minari_id(own_module, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    module = own_module("own_again")
    common.import_module_of(f"{module}:Own-v0")
    write_minari(tmp_path / "minari", "tests/own-v0", "Own-v0")
    del sys.modules[module]
    del gym.registry["Own-v0"]
    with pytest.raises(UserError, match=r"Own-v0 is not registered .* --env MODULE:DATASET"):
        load_dataset("tests/own-v0")
    assert module not in sys.modules
    _, info = load_dataset(f"{module}:tests/own-v0")
    assert info["id"] == "minari/tests/own-v0"


@pytest.mark.parametrize("text", ["raise RuntimeError('a\\nb')", "import absent_module", "1 +"])
def test_a_module_that_cannot_be_imported_is_one_sentence(text, tmp_path, monkeypatch, dataset):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_module.py").write_text(text)
    for env in ("broken_module:Own-v0", "absent_module:Own-v0", "os:Absent-v0"):
        with pytest.raises(UserError, match=r"be imported|neither a task nor a Gymnasium") as error:
            load_dataset(env, str(dataset))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("env", "sizes"),
    [
        ("AdroitHandPen-v1", (45, 24)),
        ("PointMaze_UMaze-v3", (8, 2)),
        ("AntMaze_UMaze-v4", (31, 8)),
        ("gymnasium_robotics:PointMaze_Medium-v3", (8, 2)),
    ],
)
def test_environments_of_gymnasium_robotics_are_found(env, sizes, tmp_path):
    pytest.importorskip("gymnasium_robotics")
    path = write_hdf5(tmp_path / "a.hdf5", make_raw(obs_dim=sizes[0], act_dim=sizes[1]))
    _, info = load_dataset(env, str(path))
    assert info["obs_dim"] == sizes[0] and env.split(":")[-1] in info["evaluation"]


def test_a_wrapped_specification_is_named_as_that(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    path = write_minari(tmp_path, "tests/wrapped-v0", "Pendulum-v1") / "metadata.json"
    metadata = json.loads(path.read_text())
    env = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), -1, 1)
    path.write_text(json.dumps({**metadata, "env_spec": env.spec.to_json()}))
    with pytest.raises(UserError, match="Pendulum-v1 has wrappers of its own") as error:
        load_dataset("tests/wrapped-v0")
    assert "install" not in str(error.value)
    load_dataset("tests/wrapped-v0", need_env=False)


# -------------------------------------------------------- Minari's folder


@pytest.mark.parametrize("kind", ["folder", "file", "broken dataset", "link"])
def test_a_stray_entry_in_minaris_folder_is_no_matter(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write_minari(tmp_path, "tests/good-v0", "Pendulum-v1")
    if kind == "folder":
        (tmp_path / "backup" / "data").mkdir(parents=True)
    elif kind == "file":
        (tmp_path / "notes.txt").write_text("mine")
    elif kind == "broken dataset":
        (tmp_path / "tests/bad-v0/data").mkdir(parents=True)
        (tmp_path / "tests/bad-v0/data/metadata.json").write_text("{")
    else:
        (tmp_path / "round").symlink_to(tmp_path)
    _, info = load_dataset("tests/good-v0")
    assert info["episodes"] == 4
    if kind == "broken dataset":
        with pytest.raises(UserError, match="Minari cannot load tests/bad-v0"):
            load_dataset("tests/bad-v0")


# --------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("actions", lambda a: a[:, 0], r"\(600,\), but it must have two dim.*actions\[:, None\]"),
        ("observations", lambda a: a[:, 0], r"\(600,\), but it must .*observations\[:, None\]"),
        ("actions", lambda a: a[:, :, None], r"\(600, 3, 1\), but it must have two dimensions"),
        ("rewards", lambda a: a[:, None].repeat(2, 1), r"\(600, 2\), but it must have one number"),
        ("rewards", lambda a: a[:-1], r"\(599,\), but a.hdf5 has 600 rows"),
        ("actions", lambda a: a[:-5], r"actions .*\(595, 3\), but a.hdf5 has 600 rows"),
    ],
)
def test_shapes_are_explained(name, change, message, tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", broken(name, change))
    with pytest.raises(UserError, match=message):
        load_dataset("hopper-medium", str(path))


@pytest.mark.parametrize("suffix", [".NPZ", ".Npz", ".HDF5", ".H5", ".h5"])
def test_suffixes_in_any_case(suffix, tmp_path):
    path = tmp_path / f"X{suffix}"
    if suffix.lower() == ".npz":
        with path.open("wb") as file:
            np.savez(file, **make_raw())
    else:
        write_hdf5(path, make_raw())
    _, info = load_dataset("hopper-medium", str(path))
    assert info["transitions"] == 593


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("my-data-v0", "unknown task;.*without a namespace is loaded with --data minari"),
        ("pen-human-v1", "try --env D4RL/pen/human-v2"),
        ("door-cloned-v0", "try --env D4RL/door/cloned-v2"),
        ("kitchen-partial-v0", "try --env D4RL/kitchen/partial-v2"),
        ("maze2d-umaze-v1", "try --env D4RL/pointmaze/umaze-v2"),
        ("hopper-expert-v2", "is not downloaded here: get it, and add --data FILE.hdf5"),
        ("Hopper-v4", "this is an environment: name its data with --data FILE"),
        ("halfcheeta-medium", "did you mean halfcheetah-medium"),
    ],
)
def test_unknown_tasks_get_a_hint(env, message):
    with pytest.raises(UserError, match=message) as error:
        load_dataset(env)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_actions_outside_of_the_box_can_be_clipped_as_the_message_says(tmp_path):
    raw = make_raw()
    raw["actions"][[7, 9], 1] = (1.25, -1.5)
    with pytest.raises(UserError) as error:
        load_dataset("hopper-medium", str(write_hdf5(tmp_path / "a.hdf5", raw)))
    message = str(error.value)
    assert "row 7 is outside of 3 in [-1, 1]" in message and "entry 1 is 1.25" in message
    assert "2 rows are outside by up to 0.5" in message
    line = message.split("to clip them: ")[1]
    scope = {"np": np, "actions": raw["actions"]}
    exec(line, scope)
    raw["actions"] = scope["actions"]
    load_dataset("hopper-medium", str(write_hdf5(tmp_path / "b.hdf5", raw)))


@pytest.mark.parametrize("kind", ["no package", "half a package", "another error"])
def test_a_damaged_mujoco_is_one_sentence(kind, tmp_path):
    """As after `pip install ogbench`, which puts MuJoCo 4 over MuJoCo 3."""
    text = {
        "no package": "raise ImportError('No module named mujoco')",
        "half a package": "raise ImportError('core bindings are missing.\\nRepair them with:')",
        "another error": "MJTNUM",
    }[kind]
    (tmp_path / "mujoco.py").write_text(text)
    paths = os.pathsep.join([str(tmp_path), str(Path(common.__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", "import common"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: MuJoCo cannot be imported (")
    assert done.stderr.count("\n") == 1 and "pip install -r requirements.txt" in done.stderr


def test_a_mistake_ends_a_program_with_status_1_and_its_sentence_alone():
    command = [sys.executable, "-c", "import common; common.load_dataset('hoper-medium')"]
    folder = Path(common.__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: --env hoper-medium: unknown task")
    assert done.stderr.count("\n") == 1


# -------------------------------------------------------- D4RL's contacts


# returns of the actions below in Hopper-v4 under MuJoCo 3.4.0, before the margins were added
REPLAYED = [38.6133, 14.3877, 20.634, 15.6364, 50.057, 23.2724, 18.0224, 14.5189, 10.6099, 42.2308]


def replayed(info: dict) -> np.ndarray:
    returns = []
    for episode in range(10):
        rng = np.random.default_rng(episode)
        with common.make_env(info) as env:
            env.reset(seed=episode)
            total, over = 0.0, False
            while not over:
                action = 0.6 * rng.uniform(-1, 1, 3).astype(np.float32)
                _, reward, over, _, _ = env.step(action)
                total += reward
        returns.append(total)
    return np.array(returns)


def test_hopper_has_the_contacts_of_d4rl_with_any_mujoco():
    facts = common.task_facts("hopper-medium")
    np.testing.assert_allclose(replayed(facts), REPLAYED, atol=1e-3)
    assert facts["d4rl_contacts"] and facts["halved_margins"] == common.adds_margins()
    if common.adds_margins():  # and without the line it has others
        shipped = replayed({"env": "Hopper-v4"})
        assert (np.abs(shipped - REPLAYED) > 1e-3).sum() >= 8


@pytest.mark.parametrize("task", ["halfcheetah-medium", "hopper-medium", "walker2d-medium"])
def test_building_an_environment_says_and_writes_nothing(task, tmp_path, monkeypatch, capfd):
    """MuJoCo 3.17 warns of HalfCheetah's model, on standard error and in a file of its own."""
    monkeypatch.chdir(tmp_path)
    common.make_env(common.task_facts(task)).close()
    out = capfd.readouterr()
    assert out.out == out.err == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("version", "adds"),
    [("2.3.7", False), ("3.4.0", False), ("3.5.0", True), ("3.17.0", True), ("4.0.0", True)],
)
def test_margins_are_halved_for_d4rls_tasks_alone(version, adds, monkeypatch, capsys, dataset):
    monkeypatch.setattr(common.mujoco, "__version__", version)
    assert common.adds_margins() == adds

    def margins(facts: dict) -> set[float]:
        with common.make_env(facts) as env:
            return set(env.unwrapped.model.geom_margin)

    d4rl = common.task_facts("hopper-medium-replay")
    assert margins(d4rl) == {0.0005 if adds else 0.001}
    json.dumps(d4rl)
    assert margins(common.task_facts("Hopper-v4")) == {0.001}  # as it is shipped
    assert margins(common.task_facts("Hopper-v5")) == {0.001}
    assert margins(common.task_facts("Ant-v5")) == {0.01}
    _, info = load_dataset("hopper-medium", str(dataset))
    out = capsys.readouterr().out
    assert ("geom margins halved" in out) == info["halved_margins"] == adds
    assert (f"warning     MuJoCo {version} is newer" in out) == (version == "4.0.0")
    _, info = load_dataset("Hopper-v4", str(dataset))
    assert "geom margins" not in capsys.readouterr().out and not info["halved_margins"]


# ------------------------------------------------------- OGBench's layout


def test_data_in_ogbenchs_layout(tmp_path, monkeypatch):
    """The recipe of the README: ends of recordings in terminals, success in masks."""
    monkeypatch.chdir(tmp_path)
    readme = (Path(common.__file__).parent / "README.md").read_text()
    blocks = [b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "masks" in b]
    raw = with_next(make_raw(rows=200))
    masks = np.ones(200, np.float32)
    masks[[30, 31, 99]] = 0  # success, on the way and at the end of an episode
    ends = raw["terminals"] | raw["timeouts"]
    np.savez(
        "ogbench.npz",
        observations=raw["observations"],
        actions=raw["actions"],
        next_observations=raw["next_observations"],
        terminals=ends.astype(np.float32),
        masks=masks,
        rewards=raw["rewards"],
        qpos=np.zeros((200, 6)),
    )
    exec(blocks[0], {})
    arrays, info = load_dataset("Hopper-v4", "my-ogbench.npz")
    assert arrays["not_done"].tolist() == masks.tolist()
    assert np.array_equal(arrays["rew"], raw["rewards"])
    assert arrays["ends"].nonzero()[0].tolist() == [30, 31, 49, 99, 149, 199]
    assert (info["terminals"], info["timeouts"], info["dropped"]) == (3, 3, 0)
