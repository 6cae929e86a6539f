"""Loading, downloading and evaluating: D4RL's semantics on hand-made files, every kind of bad file, counted episodes."""

import hashlib
import http.server
import json
import socket
import threading

import gymnasium as gym
import h5py
import numpy as np
import pytest
from conftest import make_raw, write_hdf5

import common
from common import UserError, load_dataset

# ----------------------------------------------------------------------------------------------------------- semantics


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


@pytest.mark.parametrize("raw", [hand_made(), make_raw(), make_raw(rows=601)], ids=["by hand", "larger", "unfinished tail"])
def test_transitions_are_those_of_d4rl(raw):
    arrays, _ = common.to_transitions(raw)
    for key, expected in d4rl_loop(raw).items():
        assert arrays[key].dtype == np.float32
        np.testing.assert_array_equal(arrays[key], expected.astype(np.float32))


def test_counts_ends_and_mean_return():
    arrays, counts = common.to_transitions(hand_made())
    assert arrays["rew"].tolist() == [0, 1, 2, 3, 4, 6, 8]  # 5 and 7 cut by a timeout, 9 the last row
    assert arrays["not_done"].tolist() == [1, 1, 0, 1, 1, 1, 1]
    assert arrays["ends"].tolist() == [False, False, True, False, True, True, True]
    assert counts == {
        "rows": 10, "transitions": 7, "dropped": 3, "episodes": 3, "terminals": 2, "timeouts": 2,
        "jumps": 0, "mean_return": np.mean([0 + 1 + 2, 3 + 4 + 5, 6 + 7]),
    }  # fmt: skip


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
    for env, low, high in (("hopper", -20.272305, 3234.3), ("halfcheetah", -280.178953, 12135.0), ("walker2d", 1.629008, 4592.3)):
        facts = common.task_facts(f"{env}-medium", need_env=True)
        assert common.normalized_score(low, facts) == 0
        assert common.normalized_score(high, facts) == pytest.approx(100)
    assert common.REFERENCE_RETURNS["antmaze"] == (0.0, 1.0)


def test_every_task_has_a_file_name_and_a_checksum():
    assert len(common.TASKS) == 15 and len(common.D4RL_SHA256) == 21
    assert all(common.d4rl_name(task) == f"{task}-v2" for task in common.TASKS)
    assert common.d4rl_path("hopper-medium-replay-v2") == "gym_mujoco_v2/hopper_medium_replay-v2.hdf5"
    expected = "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse"
    assert common.d4rl_path("antmaze-large-play-v0") == f"ant_maze_new/{expected}.hdf5"
    assert common.d4rl_path("antmaze-large-play-v2") == f"ant_maze_v2/{expected}_fixed.hdf5"


# ------------------------------------------------------------------------------------------------------- kinds of files


def test_hdf5_and_npz_load_alike(tmp_path):
    raw = make_raw()
    np.savez(tmp_path / "a.npz", **raw)
    from_npz, info = load_dataset("hopper-medium", str(tmp_path / "a.npz"))
    from_hdf5, _ = load_dataset("hopper-medium", str(write_hdf5(tmp_path / "a.hdf5", raw)))
    assert all(np.array_equal(from_npz[key], from_hdf5[key]) for key in from_npz)
    assert info["id"] == "file/a.npz" and info["env"] == "Hopper-v4"
    assert info["sha256"] == hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest()
    assert info["mean_score"] == pytest.approx(100 * (info["mean_return"] + 20.272305) / (3234.3 + 20.272305))
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
    """Three episodes of five random steps of Hopper-v5 as a local Minari dataset; returns their last observations."""
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
                observations=np.array(observations), actions=np.array(actions), rewards=rewards, terminations=terminations,
                truncations=truncations,
            )
        )  # fmt: skip
    minari.create_dataset_from_buffers(dataset_id, buffers, env=env, **metadata)
    return np.array([buffer.observations[-1] for buffer in buffers])


def test_minari_dataset_keeps_the_last_transition_and_its_own_scores(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    last = make_minari("local/hopper/tiny-v0", ref_min_score=0.0, ref_max_score=50.0)
    arrays, info = load_dataset("local/hopper/tiny-v0")
    assert info["id"] == "minari/local/hopper/tiny-v0" and (info["ref_min"], info["ref_max"]) == (0.0, 50.0)
    assert info["dropped"] == 0 and info["episodes"] == info["timeouts"] == 3
    assert arrays["not_done"].all() and arrays["ends"].nonzero()[0].tolist() == [4, 9, 14]
    np.testing.assert_allclose(arrays["next_obs"][arrays["ends"]], np.float32(last))
    result = common.evaluate(lambda obs: np.zeros((len(obs), 3), np.float32), info, 2, seed=0)
    assert result["episode_length"].tolist() == [5, 5]
    np.testing.assert_allclose(result["normalized_score"], 2 * result["return"])


def test_dictionary_observations_are_flattened_in_the_order_of_sorted_keys():
    box = gym.spaces.Box
    space = gym.spaces.Dict(b=box(-1, 1, (2,)), a=gym.spaces.Dict(d=box(-1, 1, (2, 2)), c=box(-1, 1, (1,))))  # not sorted
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
    path.write_text(path.read_text().replace("gymnasium.envs.mujoco.hopper_v5:HopperEnv", "os:system"))
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


# ------------------------------------------------------------------------------------------------------------ bad files


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
        ({k: v for k, v in make_raw().items() if k != "timeouts"}, "lacks timeouts"),
        ({}, "lacks observations"),
        (broken("rewards", with_value(np.nan)), "rewards has NaN or infinity in row 7"),
        (broken("observations", with_value(np.inf)), "observations has NaN or infinity in row 7"),
        (broken("actions", with_value(1.5)), "action in row 7 is outside"),
        (broken("rewards", lambda a: a[:-1]), "rewards has type float32 and shape"),
        (broken("actions", lambda a: a[:, 0]), "actions has type float32 and shape"),
        (broken("observations", lambda a: a[:, :5]), "sizes of observation and action are .5, 3."),
        (broken("terminals", lambda a: a.astype("S1")), "terminals has type .S1"),
        (make_raw() | {"terminals": np.zeros(600, bool), "timeouts": np.zeros(600, bool)}, "not one whole episode"),
        (make_raw(rows=0), "not one whole episode"),
        (make_raw() | {"actions": np.float32(1)}, "observations has type float32 and shape .*, but actions has"),
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
        ("hopper-medium", "nowhere", "neither auto, d4rl, minari or bundled"),
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
    with pytest.raises(UserError, match=r"no task and no Gymnasium id .*Hopper-v"):
        load_dataset("Hoper-v4", str(dataset))
    with pytest.raises(UserError, match="no evaluation environment"):
        load_dataset("antmaze-tiny", str(dataset))
    arrays, info = load_dataset("my-robot", str(dataset), need_env=False)
    assert info["env"] is None and len(arrays["obs"]) == 593
    assert "evaluation  none" in common.describe(info)


# ------------------------------------------------------------------------------------------------------------- download


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
            self.wfile.write(self.content[: len(self.content) // 2] if self.mode == "cut" else self.content)

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
        common, "MIRRORS", (lambda path: "http://127.0.0.1:1/" + path, lambda path: address + path.split("/")[-1])
    )
    digest = hashlib.sha256(Hub.content).hexdigest()
    monkeypatch.setattr(common, "D4RL_SHA256", common.D4RL_SHA256 | {"hopper-medium-v2": digest, "walker2d-medium-v2": "0" * 64})
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    server.shutdown()
    server.server_close()


def test_download_from_the_second_mirror_and_then_from_the_cache(hub, monkeypatch):
    arrays, info = load_dataset("hopper-medium")
    assert info["id"] == "d4rl/hopper-medium-v2" and len(arrays["obs"]) > 500
    assert [path.name for path in hub.iterdir()] == ["hopper_medium-v2.hdf5"]  # nothing temporary is left
    monkeypatch.setattr(common, "MIRRORS", ())
    again, info = load_dataset("hopper-medium", "d4rl")
    assert np.array_equal(arrays["obs"], again["obs"]) and info["file"] == str(hub / "hopper_medium-v2.hdf5")


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
    with pytest.raises(UserError, match=r"(?s)cannot be downloaded.*curl -L -o .*hopper_medium-v2\.hdf5") as error:
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
    monkeypatch.setattr(common, "MIRRORS", (lambda path: "http://127.0.0.1:1/" + path,))
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
        monkeypatch.setattr(common, "MIRRORS", (lambda path: url + path, lambda path: url + path))
        monkeypatch.setattr(common, "MINARI_HUB", url)
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        with pytest.raises(UserError, match="no answer"):  # and not a wait without end
            load_dataset("hopper-medium", "d4rl")
        with pytest.raises(UserError, match="does not answer"):
            load_dataset("mujoco/hopper/medium-v0")


# ----------------------------------------------------------------------------------------------------------- evaluation


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
                obs, reward, terminated, truncated, _ = env.step(linear_policy(obs[None].astype(np.float32))[0])
                total, length, over = total + reward, length + 1, terminated or truncated
        assert together["return"][i] == total and together["episode_length"][i] == length
        assert together["normalized_score"][i] == common.normalized_score(total, info)


class Counting(gym.Env):
    """Episode k of a fresh environment lasts `seed % 4 + 2` steps, every later one 1 step; each step is worth 1."""

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
        np.testing.assert_allclose(result["return"], 4 * result["episode_length"])  # action 1 is the box's upper end, 4
        assert "normalized_score" not in result
    finally:
        del gym.registry["Counting-v0"]


def test_environments_that_cannot_be_used_are_refused():
    gym.register("Endless-v0", Counting)
    try:
        for env, message in (("Endless-v0", "no time limit"), ("CartPole-v1", "only bounded boxes")):
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
