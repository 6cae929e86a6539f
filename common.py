"""Datasets and evaluation for dac.py, qdq.py and cped.py; nothing else lives here.

`load_dataset` returns the arrays of a dataset and the plain facts about it (`info`), `evaluate` plays whole episodes: who
copies an algorithm file into another project replaces these two.
Shapes: N transitions, S observation dimension, A action dimension, E episodes. Actions are in [-1, 1] on both sides.
"""

import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal
from xml.etree import ElementTree

import gymnasium as gym
import h5py
import numpy as np
import pooch
import requests
import torch
import tyro
import urllib3
from gymnasium.envs.mujoco import ant_v5
from tqdm import tqdm

# D4RL's reference returns (random policy, expert policy), the same for every dataset version.
REFERENCE_RETURNS = {"hopper": (-20.272305, 3234.3), "halfcheetah": (-280.178953, 12135.0)}
REFERENCE_RETURNS |= {"walker2d": (1.629008, 4592.3), "antmaze": (0.0, 1.0)}
# The -v4 models and rewards are those of D4RL's -v2 data; MuJoCo is pinned below 3.5, which changed Hopper's contacts.
EVALUATION_ENVS = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4"}
MAZES = {  # R start, G goal, one cell is 4 m wide
    "umaze": "##### #R..# ###.# #G..# #####",
    "medium": "######## #R.##..# #..#...# ##...### #..#...# #.#..#.# #...#.G# ########",
    "large": "############ #R...#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....# ##.#.#.#.### #..#...#.G.# "
    "############",
}
ANTMAZE_FILES = {
    "umaze": "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse",
    "umaze-diverse": "Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse",
    "medium-play": "Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse",
    "medium-diverse": "Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse",
    "large-play": "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse",
    "large-diverse": "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse",
}
TASKS = [f"{robot}-{quality}" for robot in EVALUATION_ENVS for quality in ("medium", "medium-replay", "medium-expert")]
TASKS += [f"antmaze-{maze}" for maze in ANTMAZE_FILES]
D4RL_SHA256 = {  # of every D4RL file, as pinned by TensorFlow Datasets
    "hopper-medium-v2": "5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0",
    "hopper-medium-replay-v2": "e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b",
    "hopper-medium-expert-v2": "9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26",
    "halfcheetah-medium-v2": "41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0",
    "halfcheetah-medium-replay-v2": "48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683",
    "halfcheetah-medium-expert-v2": "015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06",
    "walker2d-medium-v2": "cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda",
    "walker2d-medium-replay-v2": "e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db",
    "walker2d-medium-expert-v2": "6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04",
    "antmaze-umaze-v0": "188838316eab5882fa0e1dc8398b5e79772f64f27f0b78d6aebe838402a720c6",
    "antmaze-umaze-diverse-v0": "4aff7f77b97a8dd62e513cac8f57da7cdb458cfac7ac0cec3081b7765f2da59d",
    "antmaze-medium-play-v0": "527385c14b87892e8c222c43246546d6cd461fa2a5476d0b3b105ae422b7637c",
    "antmaze-medium-diverse-v0": "b77764cac90c23e09905539c49ceb3949b49c5b39eb9d51788cc64b9dd0a2c0d",
    "antmaze-large-play-v0": "e37afef5b80b968b30cad2682f9a93ee1b400e3b58c7a7f45e7d425d03a2b03d",
    "antmaze-large-diverse-v0": "dda7acbdde1a94a14aa7b06a7e5d8141e60a03ccdc4578bff34b0444425bf11d",
    "antmaze-umaze-v2": "5ef15257771c50ef4d23c7de001750e96c8bb5d9b6a5e4a821dcfb3065fbd130",
    "antmaze-umaze-diverse-v2": "c771dd63963cd7d9f55f24a6d809064f6b82250a6aeac4c9d13f9a1d06e8c932",
    "antmaze-medium-play-v2": "c9fec1c1daad97c71d61bd47f4ccc9f74faa855b8a2d2e8107d5378018827e5b",
    "antmaze-medium-diverse-v2": "ad9dcbac05d1f8744a7a216083f513662f43f64f28a4a5eb225e9811902dfae7",
    "antmaze-large-play-v2": "6d353df2457829925d7f9d4b0215587469908bd57478ea76f16417cfa944f471",
    "antmaze-large-diverse-v2": "84f775eb7956ea9cc766704710dc520a8ab357adc7522ade47f556f0e335e284",
}
MIRRORS = (  # in this order; the first keeps D4RL's folders, the second has all files in one
    lambda path: f"http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
    lambda path: f"https://huggingface.co/datasets/imone/D4RL/resolve/main/{path.split('/')[-1]}",
)
MINARI_HUB = "https://huggingface.co/datasets/farama-minari"
TIMEOUT = 7.0  # seconds after which a silent server counts as dead: two mirrors stay below 15
BUNDLED = Path(__file__).resolve().parent / "benchmarks" / "data"
MAX_STEP = 1.5  # metres that an ant may move in one step of 0.1 s; farther is a new episode that AntMaze-v0 does not mark
MIN_SPEED, MAX_BYTES = 10_000, 1 << 30  # bytes per second of a download; bytes of a dataset, three times D4RL's largest
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


class UserError(SystemExit):
    """Something the user can put right, in one sentence: what is wrong, where, what to do. Ends a program that does not catch it."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(f"error: {message}")
        self.status = status


@contextlib.contextmanager
def explained(kind: type | tuple[type, ...], what: str, status: int = 1) -> Iterator[None]:
    """Turns errors of a kind, such as those of a disk or of a library that reads somebody's file, into a sentence."""
    try:
        yield
    except kind as error:
        raise error if isinstance(error, UserError) else UserError(f"{what} ({error!r:.200})", status) from None


# ------------------------------------------------------------------------------------------------------------ datasets


def load_dataset(env: str, data: str = "auto", need_env: bool = True) -> tuple[dict[str, np.ndarray], dict]:
    """Finds, checks and loads the dataset of a task.

    env: a task (`TASKS`, with or without version), a Minari id or, with a file as data, any Gymnasium id.
    data: auto | d4rl | minari | bundled, or the path of an HDF5 or NPZ file in D4RL's layout.
    need_env: whether there must be an environment to evaluate in.

    Returns float32 obs [N, S], act [N, A], rew [N], next_obs [N, S], not_done [N] and bool ends [N] (the last transition of
    each trajectory), and `info`: identity, counts, mean return and score, evaluation environment.
    """
    if data.lower().endswith((".hdf5", ".h5", ".npz")):
        facts, path, name = task_facts(env, need_env), Path(data), f"file/{Path(data).name}"
        raw = read_file(path)
    elif data == "minari" or (data == "auto" and "/" in env):
        raw, path, facts = load_minari(env, need_env)
        name = f"minari/{env}"
    elif data in ("auto", "d4rl", "bundled"):
        task, facts = d4rl_name(env), task_facts(env, need_env)
        path, name = find_file(task, data)
        raw = read_file(path)
    else:
        raise UserError(f"--data {data}: neither auto, d4rl, minari or bundled nor an .hdf5 or .npz file", status=2)
    digest = sha256(path)
    if official := [task for task, checksum in D4RL_SHA256.items() if checksum == digest]:
        name = f"d4rl/{official[0]}"
        if strip_version(env) in TASKS and strip_version(env) != strip_version(official[0]):
            raise UserError(f"{path} is D4RL's {official[0]}, not {env}: correct --env or --data", status=2)
    check(raw, facts, path)
    arrays, counts = to_transitions(raw, MAX_STEP if env.startswith("antmaze") else None)
    if counts["transitions"] < 2:
        raise UserError(f"{path}: without those that are cut off there are {counts['transitions']} transitions, too few to learn")
    low, high = np.asarray(facts["act_low"]), np.asarray(facts["act_high"])
    arrays["act"] = ((arrays["act"] - (low + high) / 2) / ((high - low) / 2)).astype(np.float32)
    info = {"id": name, "file": str(path), "sha256": digest, "preset": strip_version(env) in TASKS} | facts | counts
    info["mean_score"] = None if info["ref_min"] is None else float(normalized_score(info["mean_return"], info))
    info["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "gymnasium", "mujoco", "minari")}
    info["versions"] = {"python": sys.version.split()[0]} | info["versions"]
    print(describe(info))
    return arrays, info


def strip_version(env: str) -> str:
    return re.sub(r"-v\d+$", "", env)


def d4rl_name(env: str) -> str:
    """hopper-medium -> hopper-medium-v2; an unknown task is an error that names the nearest ones."""
    name = env if env in D4RL_SHA256 else f"{env}-v2"
    if name not in D4RL_SHA256:
        near = difflib.get_close_matches(strip_version(env), TASKS) or TASKS
        raise UserError(f"--env {env}: unknown task; did you mean {', '.join(near)}?", status=2)
    return name


def task_facts(env: str, need_env: bool) -> dict:
    """Evaluation environment, sizes and reference returns of a task or a Gymnasium id."""
    robot = env.split("-")[0] if env.split("-")[0] in REFERENCE_RETURNS else None  # also of hopper-expert and the like
    env_id = EVALUATION_ENVS.get(robot, env)
    if robot == "antmaze" and strip_version(env) in TASKS:
        env_id = f"D4RLAntMaze-{env.split('-')[1]}-v2"
    ref_min, ref_max = REFERENCE_RETURNS.get(robot, (None, None))
    if not need_env:
        return {"env": None, "ref_min": ref_min, "ref_max": ref_max, "obs_dim": None, "act_low": -1.0, "act_high": 1.0}
    if env_id not in gym.registry:
        near = ", ".join(difflib.get_close_matches(env, [*TASKS, *gym.registry])) or "none"
        reason = "has no evaluation environment here" if robot else f"is no task and no Gymnasium id (near it: {near})"
        raise UserError(f"--env {env} {reason}; --no-eval trains without an environment", status=2)
    with make_env({"env": env_id}) as built:
        obs_dim, box = built.observation_space.shape[0], built.unwrapped.action_space
    facts = {"env": env_id, "ref_min": ref_min, "ref_max": ref_max, "obs_dim": obs_dim}
    return facts | {"act_low": box.low.tolist(), "act_high": box.high.tolist()}


def sha256(path: Path) -> str:
    """Of a file or, for Minari, of all files in a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def find_file(task: str, data: str) -> tuple[Path, str]:
    """File and dataset id of a D4RL task: from the cache, a mirror or, with no network or on request, bundled."""
    name, path = strip_version(task), d4rl_path(task)
    bundled = BUNDLED / f"{name}.hdf5"
    if data == "bundled":
        if bundled.exists():
            return bundled, f"bundled/{name}"
        raise UserError(f"--data bundled: only {[file.stem for file in BUNDLED.glob('*.hdf5')]} come along", status=2)
    # The D4RL package's own folder and file names: what it downloaded is found, and what we download it will find.
    cache = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
    target = cache / path.split("/")[-1]
    if target.exists():
        if sha256(target) != D4RL_SHA256[task]:
            raise UserError(f"{target} is not D4RL's {task}: delete it to download that, or use it with --data {target}")
        return target, f"d4rl/{task}"
    failures = []
    for url in [mirror(path) for mirror in MIRRORS]:
        if not answers(url):
            failures.append(f"{url}: no answer")
            continue
        try:
            pooch.retrieve(url, f"sha256:{D4RL_SHA256[task]}", target.name, cache, downloader=download)  # atomic
            return target, f"d4rl/{task}"
        except (requests.RequestException, ValueError) as error:  # ValueError: another file than D4RL's
            failures.append(f"{url}: {str(error).splitlines()[0]:.200}")
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}; D4RL_DATASET_DIR names another folder") from None
    if data == "auto" and bundled.exists() and all(failure.endswith(": no answer") for failure in failures):
        line = "!" * 100
        print(f"{line}\n!! NO NETWORK for D4RL's {task}: this run uses the small BUNDLED sample instead.", file=sys.stderr)
        print(f"!! Its scores are not D4RL scores. --data d4rl insists on D4RL's file.\n{line}", file=sys.stderr)
        return bundled, f"bundled/{name}"
    ways = [f"  curl -L -o {target} {mirror(path)}" for mirror in MIRRORS]
    ways += ["or train on the small sample with --data bundled"] if bundled.exists() else []
    raise UserError("\n".join([f"{target} does not exist and cannot be downloaded ({'; '.join(failures)}); get it by", *ways]))


def download(url: str, part: str, _: object) -> None:
    """For pooch: fetches url to the file part, and gives up a server that sends next to nothing, or without end."""
    with requests.get(url, stream=True, timeout=TIMEOUT) as response, open(part, "wb") as file:
        response.raise_for_status()
        started, total = time.monotonic(), int(response.headers.get("content-length", 0)) or None
        with tqdm(total=total, unit="B", unit_scale=True, leave=False) as bar:
            try:
                while block := response.raw.read1(1 << 18, decode_content=True):
                    bar.update(file.write(block))
                    if bar.n > MAX_BYTES or bar.n < MIN_SPEED * (time.monotonic() - started - TIMEOUT):
                        raise requests.ConnectionError(f"given up after {bar.n:,} bytes")
            except urllib3.exceptions.HTTPError as error:
                raise requests.ConnectionError(error) from None


def answers(url: str) -> bool:
    """Whether anything answers within TIMEOUT; in a thread, because a name look-up has no time limit of its own."""
    responses = []

    def ask() -> None:
        with contextlib.suppress(requests.RequestException):
            responses.append(requests.head(url, timeout=TIMEOUT, allow_redirects=True))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return bool(responses)


def d4rl_path(task: str) -> str:  # below D4RL's root
    robot, quality = strip_version(task).split("-", 1)
    if robot in EVALUATION_ENVS:
        return f"gym_mujoco_v2/{robot}_{quality.replace('-', '_')}-v2.hdf5"
    folder, end = ("ant_maze_v2", "_fixed") if task.endswith("-v2") else ("ant_maze_new", "")
    return f"{folder}/{ANTMAZE_FILES[quality]}{end}.hdf5"


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Raw arrays of a file in D4RL's flat layout: `KEYS` and, where there, next_observations."""
    if not path.is_file():
        raise UserError(f"{path} does not exist", status=2)
    if path.open("rb").read(512).lstrip().startswith(b"<"):
        raise UserError(f"{path} is a web page, not a dataset: download it again")
    wanted, most = (*KEYS, "next_observations"), most_bytes(path)
    with explained(Exception, f"{path} is no HDF5 or NPZ file, or a damaged one"):  # which can fail anywhere in h5py and numpy
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                if len(set(file.files)) < len(file.files) or sum(part.file_size for part in file.zip.infolist()) > most:
                    raise ValueError(f"a name twice, or more than {most:,} bytes")
                return {key: np.asarray(file[key]) for key in wanted if key in file}
        with h5py.File(path, "r") as file:
            check_contents(file, most)
            parts = {key: file[key] for key in wanted if isinstance(file.get(key), h5py.Dataset)}
            if any(part.shape is None or part.dtype.kind == "O" for part in parts.values()):
                raise ValueError("arrays must be of numbers")
            return {key: part[()] for key, part in parts.items()}


def most_bytes(path: Path) -> int:
    """That the arrays of a file may claim: more would be compressed by more than measurements are."""
    return max(MAX_BYTES, 20 * path.stat().st_size)


def check_contents(file: h5py.File, most: int) -> None:
    """Before anything of it is read: no links, no content of other files, no more than so many bytes."""
    parts = []
    file.visititems(lambda name, part: parts.append(part) if isinstance(part, h5py.Dataset) else None)
    link = file.visititems_links(lambda name, link: None if isinstance(link, h5py.HardLink) else name)
    if link or any(part.external or part.is_virtual for part in parts) or sum(part.nbytes for part in parts if part.shape) > most:
        raise ValueError(f"it has links, content of another file, or claims more than {most:,} bytes")


def load_minari(dataset_id: str, need_env: bool) -> tuple[dict[str, np.ndarray], Path, dict]:
    """Raw arrays, data file and facts of a Minari dataset, local or downloaded; reference returns only if it has its own."""
    import minari  # here, because few runs need it and it takes a while

    if not re.fullmatch(r"([-\w]+/)*[-\w]+-v\d+", dataset_id):
        raise UserError(f"--env {dataset_id}: a Minari id looks like mujoco/hopper/medium-v0", status=2)
    local = dataset_id in minari.list_local_datasets()
    if not local and not answers(MINARI_HUB):  # Minari's own download would wait for ever
        raise UserError(f"{dataset_id} is not among the local Minari datasets, and {MINARI_HUB} does not answer")
    with explained(Exception, f"Minari cannot load {dataset_id}"):  # its storages and remotes raise types of their own
        dataset, columns = minari.load_dataset(dataset_id, download=not local), []
        for path in Path(dataset.storage.data_path).glob("*.hdf5"):
            with h5py.File(path, "r") as file:
                check_contents(file, most_bytes(path))
        for e in dataset.iterate_episodes():
            obs = flatten(dataset.observation_space, e.observations)  # T + 1: the last one is the true next observation
            columns.append((obs[:-1], e.actions, e.rewards, e.terminations, e.truncations, obs[1:]))
        raw = dict(zip((*KEYS, "next_observations"), map(np.concatenate, zip(*columns))))
        facts = {"obs_dim": raw["observations"].shape[1]}
    spec = (dataset._eval_env_spec or dataset.env_spec) if need_env else None  # made by Minari to fit this Gymnasium
    if need_env and spec is None:
        raise UserError(f"{dataset_id} names no environment; see --no-eval")
    spec, box = spec and env_spec(spec.to_json()), dataset.action_space
    if not isinstance(box, gym.spaces.Box) or not box.is_bounded() or not (box.low < box.high).all():
        raise UserError(f"{dataset_id}: the action space is {box}, but only bounded boxes will do")
    facts |= {"env": spec.to_json() if spec else None, "act_low": box.low.tolist(), "act_high": box.high.tolist()}
    refs = [dataset.storage.metadata.get(name) for name in ("ref_min_score", "ref_max_score")]  # anything, in somebody's file
    usable = all(isinstance(ref, int | float) for ref in refs) and refs[0] < refs[1]
    facts |= dict(zip(("ref_min", "ref_max"), refs if usable else (None, None)))
    return raw, Path(dataset.storage.data_path), facts


def flatten(space: gym.Space, obs) -> np.ndarray:
    """Observations, one or a batch, as float vectors; the entries of a dictionary side by side in the order of sorted keys.

    The order of a space is not used, because storing a dataset can change it.
    """
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([flatten(space[key], obs[key]) for key in sorted(space)], axis=-1)
    if not isinstance(space, gym.spaces.Box):
        raise UserError(f"the observation space {space} is neither a box nor a dictionary of boxes")
    return np.reshape(obs, (*np.shape(obs)[: np.ndim(obs) - len(space.shape)], -1))


def check(raw: dict[str, np.ndarray], facts: dict, path: Path) -> None:
    """Raises one sentence about the first thing that is wrong with the raw arrays; [N, 1] columns become [N]."""
    if missing := [key for key in KEYS if key not in raw]:
        raise UserError(f"{path} lacks {', '.join(missing)}: it must hold {', '.join(KEYS)}")
    rows = raw["actions"].shape[:1] or (0,)
    for key in KEYS[2:]:
        raw[key] = raw[key].squeeze(1) if raw[key].shape == (*rows, 1) else raw[key]
    for key, array in raw.items():
        like = raw["observations"].shape if key == "next_observations" else array.shape
        wrong = array.shape[:1] != rows or array.ndim != (1 if key in KEYS[2:] else 2) or array.shape != like
        if wrong or 0 in array.shape[1:] or array.dtype.kind not in "fiub":
            shapes = f"shape {array.shape}, but actions has {raw['actions'].shape}"
            raise UserError(f"{path}: {key} has type {array.dtype} and {shapes}")
        with np.errstate(over="ignore"):
            finite = np.isfinite(array.astype(np.float32))  # as networks see it
        if not finite.all():
            raise UserError(f"{path}: {key} has NaN or infinity in row {np.argwhere(~finite)[0][0]}")
    low, high = np.asarray(facts["act_low"]), np.asarray(facts["act_high"])
    sizes, env_sizes = [raw[key].shape[1] for key in KEYS[:2]], [facts["obs_dim"], low.size]
    if facts["env"] and sizes != env_sizes:
        raise UserError(f"{path}: sizes of observation and action are {sizes}, but {env_sizes} where --env evaluates")
    margin = 1e-5  # rounding of an action that was stored in another precision
    if (outside := (raw["actions"] < low - margin) | (raw["actions"] > high + margin)).any():
        raise UserError(f"{path}: the action in row {np.argwhere(outside)[0][0]} is outside the box of the environment")
    if rows[0] < 2 or raw["timeouts"].all() or not (raw["terminals"].astype(bool) | raw["timeouts"].astype(bool)).any():
        raise UserError(f"{path}: not one whole episode, for there is neither a terminal nor a timeout in {rows[0]} rows")


def to_transitions(raw: dict[str, np.ndarray], max_step: float | None = None) -> tuple[dict[str, np.ndarray], dict]:
    """D4RL's Q-learning view (d4rl.qlearning_dataset) and the counts that describe the file.

    A timeout is not a terminal. Without next_observations the next observation is the following row's, so rows cut by a
    timeout and the last row are dropped; at a terminal it is another episode's first, which not_done = 0 hides.
    max_step drops the rows that jump farther than this in x and y, the first two of an observation.
    """
    obs, terminal, timeout = (raw[key] for key in ("observations", "terminals", "timeouts"))
    terminal, timeout = terminal.astype(bool), timeout.astype(bool)
    if "next_observations" in raw:
        next_obs, keep = raw["next_observations"], np.ones(len(obs), bool)
    else:
        next_obs, keep = np.roll(obs, -1, axis=0), ~timeout
        keep[-1] = False
    jump = np.zeros(len(obs), bool)
    if max_step is not None:
        jump = keep & ~terminal & (np.linalg.norm(next_obs[:, :2] - obs[:, :2], axis=1) > max_step)
    keep &= ~jump
    arrays = {"obs": obs, "act": raw["actions"], "rew": raw["rewards"], "next_obs": next_obs, "not_done": ~terminal}
    arrays = {key: np.ascontiguousarray(array[keep], dtype=np.float32) for key, array in arrays.items()}
    breaks = np.linalg.norm(arrays["obs"][1:] - arrays["next_obs"][:-1], axis=1) > 1e-6  # the authors' rule: DAC, QDQ
    ends = (terminal | timeout)[keep] | np.r_[breaks, True]
    stops = np.flatnonzero(terminal | timeout) + 1  # whole episodes only: an unfinished tail has no return
    returns = np.add.reduceat(raw["rewards"].astype(np.float64)[: stops[-1]], np.r_[0, stops[:-1]])
    counts = {"rows": len(obs), "dropped": int((~keep).sum()), "transitions": int(keep.sum()), "episodes": len(stops)}
    counts |= {"terminals": int(terminal.sum()), "timeouts": int(timeout.sum()), "jumps": int(jump.sum())}
    counts |= {"mean_return": float(returns.mean())}
    return arrays | {"ends": ends}, counts


def describe(info: dict) -> str:
    """What every run prints first: which data this is, and where the policy is evaluated."""
    score = "no reference returns" if info["mean_score"] is None else f"normalised score {info['mean_score']:.1f}"
    names = ("rows", "dropped", "transitions", "episodes", "terminals", "timeouts", "jumps")
    counts = [f"{info[name]:,} {name}" for name in names if name != "jumps" or info[name]]
    spec = env_spec(info["env"]) if info["env"] else None
    place = f"{spec.id}, {spec.max_episode_steps} steps at most" if spec else "none"
    preset = "" if info["preset"] else "\npreset      none for this task: the defaults of --help"
    versions = ", ".join(" ".join(item) for item in info["versions"].items())
    return f"""dataset     {info["id"]} (SHA-256 {info["sha256"][:12]}, {info["file"]})
            {", ".join(counts)}
            mean episode return {info["mean_return"]:.1f}, {score}
evaluation  {place} ({versions}){preset}"""


# ---------------------------------------------------------------------------------------------------------- evaluation


def env_spec(env: str) -> gym.envs.registration.EnvSpec:
    """`info["env"]` is a Gymnasium id or, from Minari, the JSON of an environment's specification.

    It can come out of somebody's checkpoint, and an entry point is code: only what is registered here is built.
    """
    with explained((gym.error.Error, ValueError, TypeError, KeyError), f"there is no environment {env:.80}"):
        spec = gym.envs.registration.EnvSpec.from_json(env) if env.startswith("{") else gym.spec(env)
    if spec.id not in gym.registry:
        with contextlib.suppress(ImportError):  # where it is installed: the mazes, hands and kitchen of Minari's D4RL
            gym.register_envs(importlib.import_module("gymnasium_robotics"))
    known = gym.registry.get(spec.id)
    if known is None or known.entry_point != spec.entry_point or spec.additional_wrappers:
        raise UserError(f"environment {spec.id} is not registered with Gymnasium: install its package, or see --no-eval")
    return spec


class AntMaze(ant_v5.AntEnv):
    """D4RL's AntMaze-v2 over Gymnasium's ant: observation qpos [15] and qvel [14], while the goal stays hidden.

    The origin is the start, x goes with the columns of the maze and y with its rows. Within 0.5 m of the goal, which each reset
    draws anew in its cell, the reward is 1 and the episode over; everywhere else the reward is 0.
    """

    def __init__(self, maze: str, **kwargs):
        cells = {(i, j): cell for i, row in enumerate(MAZES[maze].split()) for j, cell in enumerate(row)}
        where = {cell: np.array(place) for place, cell in cells.items()}  # row and column
        tree = ElementTree.parse(Path(ant_v5.__file__).parent / "assets" / "ant.xml")
        for place in (place for place, cell in cells.items() if cell == "#"):
            y, x = 4 * (place - where["R"])
            wall = {"type": "box", "size": "2 2 1", "pos": f"{x} {y} 1", "contype": "1", "conaffinity": "1"}
            ElementTree.SubElement(tree.find("worldbody"), "geom", wall)
        self.goal = self.goal_cell = 4.0 * (where["G"] - where["R"])[::-1]  # x, y
        settings = {"include_cfrc_ext_in_observation": False, "exclude_current_positions_from_observation": False}
        with tempfile.TemporaryDirectory() as folder:
            tree.write(file := Path(folder) / "maze.xml")
            super().__init__(str(file), terminate_when_unhealthy=False, **settings, **kwargs)
        self.model.opt.timestep = 0.02  # s, five of them per step; Gymnasium has 0.01
        self.model.actuator_gear[:, 0] = 30  # N m at action 1; Gymnasium has 150
        self.model.geom_solimp[:, :3] = 0.8, 0.8, 0.01
        self.metadata["render_fps"] = 10

    def reset_model(self) -> np.ndarray:
        noise = self.np_random.uniform(0, 1, 2) + self.np_random.uniform(0, 0.5, 2)
        self.goal = np.maximum(self.goal_cell + noise, 0)
        return super().reset_model()  # D4RL's start noise: 0.1 uniform on qpos, 0.1 normal on qvel

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, _, _, _, info = super().step(action)
        success = bool(np.linalg.norm(obs[:2] - self.goal) <= 0.5)
        return obs, float(success), success, False, info


for maze in MAZES:
    steps = 700 if maze == "umaze" else 1000
    gym.register(f"D4RLAntMaze-{maze}-v2", AntMaze, max_episode_steps=steps, kwargs={"maze": maze})


def make_env(info: dict, **kwargs) -> gym.Env:
    """The evaluation environment of a dataset: observations flat in the order of `flatten`, actions in [-1, 1]."""
    if info["env"] is None:
        raise UserError("there is no environment to evaluate in: the run was trained with --no-eval")
    spec = env_spec(info["env"])
    with explained(Exception, f"Gymnasium cannot make {spec.id}"), warnings.catch_warnings(action="ignore"):
        env = gym.make(spec, **kwargs)  # with arguments out of a file, and without a warning that there are newer ids than -v4
    if env.spec.max_episode_steps is None:
        raise UserError(f"{env.spec.id} has no time limit, so its episodes may never end")
    if not (isinstance(env.action_space, gym.spaces.Box) and env.action_space.is_bounded()):
        raise UserError(f"{env.spec.id}: the action space is {env.action_space}, but only bounded boxes will do")
    space = env.observation_space
    flat = gym.spaces.Box(-np.inf, np.inf, flatten(space, space.sample()).shape)
    env = gym.wrappers.TransformObservation(env, lambda obs: flatten(space, obs), flat)
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def normalized_score(returns, info: dict):
    """D4RL's score of undiscounted returns: 0 is the random policy, 100 the expert."""
    return 100 * (np.asarray(returns) - info["ref_min"]) / (info["ref_max"] - info["ref_min"])


def evaluate(act: Callable, info: dict, episodes: int, seed: int) -> dict[str, np.ndarray]:
    """Plays whole episodes side by side, with one call of `act` per step for all of them.

    act: observations [E, S] -> actions [E, A] in [-1, 1]. Episode i is reset with seed + i and counts until its first end.
    torch's random numbers depend on `seed` alone and are left as they were. Returns return [E], episode_length [E] and,
    where the dataset has reference returns, normalized_score [E].
    """
    envs = gym.vector.SyncVectorEnv([lambda: make_env(info)] * episodes)
    returns, lengths, running = np.zeros(episodes), np.zeros(episodes), np.ones(episodes, bool)
    with contextlib.closing(envs), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=[seed + i for i in range(episodes)])
        while running.any():
            obs, reward, terminated, truncated, _ = envs.step(act(obs.astype(np.float32)))
            returns += reward * running
            lengths += running
            running &= ~(terminated | truncated)
    result = {"return": returns, "episode_length": lengths}
    return result if info["ref_min"] is None else result | {"normalized_score": normalized_score(returns, info)}


class Evaluator:
    """evaluator(agent, episodes, seed) -> Future of `evaluate`'s result: done at once or, with `workers`, by processes beside
    the training, which take a copy of the agent as it is now. `rebuild()` makes an agent that can load its state."""

    def __init__(self, rebuild: Callable, info: dict, workers: int):
        self.rebuild, self.info, self.pool = rebuild, info, None
        if workers:
            context, precision = multiprocessing.get_context("spawn"), torch.get_float32_matmul_precision()
            self.pool = ProcessPoolExecutor(workers, context, initializer=follow_parent, initargs=(precision,))

    def __call__(self, agent: object, episodes: int, seed: int) -> Future:
        if self.pool:
            torch.save(agent.state_dict(), state := io.BytesIO())
            handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
            try:  # a process that this starts ignores them from its beginning
                return self.pool.submit(evaluate_copy, self.rebuild, state.getvalue(), self.info, episodes, seed)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        future = Future()
        future.set_result(evaluate(agent.act, self.info, episodes, seed))
        return future

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown()


def evaluate_copy(rebuild: Callable, state: bytes, info: dict, episodes: int, seed: int) -> dict[str, np.ndarray]:
    agent = rebuild()
    agent.load_state_dict(torch.load(io.BytesIO(state), map_location="cpu", weights_only=True))
    return evaluate(agent.act, info, episodes, seed)


def follow_parent(precision: str) -> None:
    """A process that evaluates leaves signals to the group to its parent, does not outlive it, and computes as it does."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_float32_matmul_precision(precision)


# ------------------------------------------------------------------ program

VERSIONS = ("python", "torch", "numpy", "gymnasium", "mujoco", "minari")
VIDEO_ENDINGS = (".mp4", ".mkv", ".mov", ".avi")
CHECKPOINT_FORM = {
    "algorithm": str,
    "args": dict,
    "info": dict,
    "obs_dim": int,
    "act_dim": int,
    "agent": dict,
}


@dataclass
class Options:
    """Evaluates the policy of a run, or describes a dataset.

        python common.py runs/hopper-medium/dac/seed0-20260101-120000
        python common.py runs/hopper-medium/dac/seed0-20260101-120000 --video hopper.mp4
        python common.py --env hopper-medium

    The first command repeats the evaluation at the end of the training.
    """

    # checkpoint.pt of a run, or the folder of the run
    checkpoint: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    # with a run: a task or Gymnasium id to evaluate in instead; without: the dataset to describe
    env: str | None = None
    # where the dataset comes from, as in the scripts; None means auto
    data: str | None = None
    # episodes to play; None means as many as the training played at its end
    episodes: int | None = None
    # seed of the first episode; None means the episodes that the training played at its end
    seed: int | None = None
    # file (.mp4, .mkv, .mov, .avi) to film one episode into; nothing else is done
    video: Path | None = None
    # script of the algorithm; None means the one beside common.py
    script: Path | None = None
    # CUDA if available
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main(argv: list[str] | None = None) -> dict[str, np.ndarray] | None:
    options = tyro.cli(Options, args=argv, description=inspect.getdoc(Options))
    check_options(options)
    if options.checkpoint is None:
        describe_dataset(options.env, options.data or "auto")
        return None

    # agent
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = read_checkpoint(options.checkpoint)
    script = import_script(checkpoint["algorithm"], options.script)
    args = stored_args(checkpoint, script)
    agent = build_agent(checkpoint, script, args, device)
    seed = script.FINAL_SEED if options.seed is None else options.seed
    episodes = options.episodes or args.final_episodes
    if not isinstance(episodes, int) or episodes < 1:
        raise UserError(f"the checkpoint's final_episodes is {episodes!r:.80}: type --episodes")

    # environment
    trained = checkpoint["info"]
    info = trained if options.env is None else task_facts(options.env, need_env=True)
    if info["env"] is None:
        raise UserError("this run was trained with --no-eval: say by --env where to evaluate it")
    env = make_env(info)
    env.close()
    check_sizes(checkpoint, env)

    policy = FinitePolicy(agent.act)
    name = checkpoint["algorithm"]
    step = checkpoint["agent"].get("step")
    print(f"policy      {name}, update {step}, trained on {trained.get('id')}")
    if options.video is not None:
        total = record_video(policy, info, options.video, seed)
        print(f"film        {options.video}: {policy.calls} steps, return {total:.2f}, seed {seed}")
        if options.episodes is not None:
            print("            one episode alone: --episodes has no effect beside --video")
        return None

    limit = env.spec.max_episode_steps
    print(f"evaluation  {env.spec.id}, {limit} steps at most; {episodes} episodes, seed {seed}")
    print_versions(trained)
    if info["env"] == trained["env"]:
        for note in mujoco_notes(env, trained, info):
            print(f"note        {note}")
    result = evaluate(policy, info, episodes, seed)
    print_result(result)
    return result


def check_options(options: Options) -> None:
    """Ends the program where options contradict each other, or cannot be met."""
    if options.checkpoint is None:
        if options.env is None:
            raise UserError("name a checkpoint to evaluate, or by --env a dataset to describe")
        for name in ("episodes", "seed", "video", "script"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} needs a checkpoint")
    elif options.data is not None:
        raise UserError("--data names a dataset to describe; a checkpoint needs none")
    if options.episodes is not None and options.episodes < 1:
        raise UserError(f"--episodes {options.episodes}: must be at least 1")
    if options.seed is not None and not 0 <= options.seed < 2**31:
        raise UserError(f"--seed {options.seed}: must be from 0 to {2**31 - 1}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here")
    if options.video is not None:
        if options.video.suffix.lower() not in VIDEO_ENDINGS:
            raise UserError(f"--video {options.video}: must end in {', '.join(VIDEO_ENDINGS)}")
        if not options.video.parent.is_dir():
            raise UserError(f"--video {options.video}: there is no folder {options.video.parent}")


def read_checkpoint(path: Path) -> dict:
    """Reads a checkpoint without running code in it, and checks that its parts are there."""
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.exists():
        raise UserError(f"{path} does not exist: name a checkpoint.pt, or the folder of a run")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise UserError(f"{path} cannot be read: you lack the permission") from None
    except Exception:  # whatever PyTorch raises on other people's files
        raise UserError(f"{path} is not a checkpoint, or a damaged one") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is not a checkpoint of a run")
    for key, kind in CHECKPOINT_FORM.items():
        if not isinstance(checkpoint.get(key), kind):
            raise UserError(f"{path} is not a checkpoint of a run: it lacks {key}")
    info = checkpoint["info"]
    references = [info.get("ref_min"), info.get("ref_max")]
    scored = all(isinstance(reference, int | float) for reference in references)
    if not isinstance(info.get("env"), str | None) or not (scored or references == [None, None]):
        raise UserError(f"{path}: its info has no usable environment or reference returns")
    return checkpoint


def import_script(name: str, path: Path | None) -> ModuleType:
    """Imports the script of algorithm `name`: from this folder, or the file that the user named."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise UserError(f"the checkpoint's algorithm, {name!r:.80}, cannot be the name of a script")
    if path is None:
        path = Path(__file__).resolve().parent / f"{name}.py"
    if not path.is_file():
        raise UserError(f"the checkpoint was written by {name}.py, but there is no {path}")
    text = path.read_text(encoding="utf-8", errors="replace")
    if not re.search(rf"^ALGORITHM = [\"']{name}[\"']$", text, re.MULTILINE):
        raise UserError(f"the checkpoint was written by {name}.py, but {path} is another program")
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    for part in ("Args", "FINAL_SEED", name.upper()):
        if not hasattr(module, part):
            raise UserError(f"{path} lacks {part}, which evaluation needs")
    return module


def stored_args(checkpoint: dict, script: ModuleType) -> object:
    """The script's Args with the values of the checkpoint, not compiled."""
    stored = checkpoint["args"]
    known = {field.name for field in fields(script.Args)}
    unknown = ", ".join(sorted(str(name) for name in stored if name not in known))
    if unknown:
        raise UserError(
            f"the checkpoint is of another version of {script.__file__}: it has arguments that do"
            f" not exist here ({unknown})"
        )
    return script.Args(**{**stored, "compile": False})


def build_agent(checkpoint: dict, script: ModuleType, args: object, device: str) -> object:
    """The agent with the networks that act, as they are in the checkpoint."""
    agent_class = getattr(script, checkpoint["algorithm"].upper())
    try:
        agent = agent_class(checkpoint["obs_dim"], checkpoint["act_dim"], args, device)
    except Exception as error:  # arguments in somebody's file can be anything
        raise UserError(
            f"{script.__file__} cannot use the checkpoint's arguments: {error!r:.200}"
        ) from None
    for name in agent_class.POLICY:
        if name not in checkpoint["agent"]:
            raise UserError(f"the checkpoint lacks the network {name}")
        try:
            getattr(agent, name).load_state_dict(checkpoint["agent"][name])
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"the checkpoint's network {name} does not fit {script.__file__}: {reason:.200}"
            ) from None
    return agent


def check_sizes(checkpoint: dict, env: gym.Env) -> None:
    trained = (checkpoint["obs_dim"], checkpoint["act_dim"])
    there = (env.observation_space.shape[0], env.action_space.shape[0])
    if trained != there:
        raise UserError(
            f"the policy was trained with observations of size {trained[0]} and actions of size"
            f" {trained[1]}, but {env.spec.id} has {there[0]} and {there[1]}"
        )


class FinitePolicy:
    """An agent's `act` that ends the program at an action with NaN or infinity."""

    def __init__(self, act: Callable):
        self.act = act
        self.calls = 0

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        self.calls += 1
        actions = self.act(obs)
        if not np.isfinite(actions).all():
            raise UserError(f"the policy's action has NaN or infinity at step {self.calls}")
        return actions


def current_version(package: str) -> str:
    if package == "python":
        return sys.version.split()[0]
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def trained_version(package: str, info: dict) -> str:
    versions = info.get("versions")
    if not isinstance(versions, dict):
        return "unknown"
    return str(versions.get(package, "unknown"))


def print_versions(trained: dict) -> None:
    """The versions of now beside those of the training."""
    print(f"versions    {'':12}{'now':16}training")
    for package in VERSIONS:
        now = current_version(package)
        then = trained_version(package, trained)
        mark = "" if now == then else "  (differs)"
        print(f"            {package:12}{now:16}{then}{mark}")


def mujoco_notes(env: gym.Env, trained: dict, info: dict) -> list[str]:
    """A sentence for each way in which MuJoCo's version makes the environment another one.

    trained: the checkpoint's info; info: that of the evaluation.
    """
    model = getattr(env.unwrapped, "model", None)
    then = re.match(r"(\d+)\.(\d+)", trained_version("mujoco", trained))
    now = re.match(r"(\d+)\.(\d+)", current_version("mujoco"))
    if not hasattr(model, "geom_margin") or then is None or now is None:
        return []
    then = (int(then[1]), int(then[2]))
    now = (int(now[1]), int(now[2]))
    notes = []
    # Of two margins the larger counts before 3.5, their sum from 3.5 on.
    then_d4rl = then < (3, 5) or bool(trained.get("d4rl_contacts"))
    now_d4rl = now < (3, 5) or bool(info.get("d4rl_contacts"))
    has_margins = model.geom_margin.any()
    if has_margins and then_d4rl and not now_d4rl:
        notes.append(
            "MuJoCo 3.5 changed the contacts of this robot, so these returns are not comparable"
            " with the training's; --env with the name of a D4RL task restores the old contacts"
        )
    if has_margins and now_d4rl and not then_d4rl:
        notes.append(
            "MuJoCo 3.5 changed the contacts of this robot; the training had the new ones, so"
            " these returns are not comparable with the training's"
        )
    if (then >= (4, 0)) != (now >= (4, 0)):
        notes.append(
            "MuJoCo 4 moves free bodies such as the ant slightly differently than MuJoCo 3:"
            " returns can differ from those of the training"
        )
    return notes


def print_result(result: dict[str, np.ndarray]) -> None:
    heads = ("mean", "std. error", "min", "25 %", "median", "75 %", "max")
    print(" " * 17 + "".join(f"{head:>11}" for head in heads))
    for name, values in result.items():
        error = values.std() / len(values) ** 0.5
        numbers = [values.mean(), error, *np.percentile(values, [0, 25, 50, 75, 100])]
        print(f"{name:17}" + "".join(f"{number:11.2f}" for number in numbers))


def record_video(act: Callable, info: dict, path: Path, seed: int) -> float:
    """Films the episode that is reset with `seed`; returns its return."""
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    import imageio.v2 as imageio  # here, because few need it

    part = path.with_stem(f"{path.stem}.part")
    total = 0.0
    frames = 0
    over = False
    torch.manual_seed(seed)
    try:
        with make_env(info, render_mode="rgb_array") as env:
            renderer = getattr(env.unwrapped, "mujoco_renderer", None)
            if renderer is not None and env.unwrapped.model.ncam:
                renderer.camera_id = 0  # the model's own camera, which follows the robot
            obs, _ = env.reset(seed=seed)
            render(env)  # before the first step, and before there is a file
            part.touch()
            fps = env.metadata.get("render_fps", 30)
            with imageio.get_writer(part, fps=fps, ffmpeg_log_level="quiet") as film:
                while not over:
                    action = act(obs[None].astype(np.float32))[0]
                    obs, reward, terminated, truncated, _ = env.step(action)
                    film.append_data(render(env))
                    total += float(reward)
                    frames += 1
                    over = terminated or truncated
        with imageio.get_reader(part) as film:  # ffmpeg fails at the end without an error
            written = film.count_frames()
        if written != frames:
            raise OSError(f"{written} of {frames} frames were written")
        part.replace(path)
    except OSError as error:
        reason = error.strerror or "ffmpeg wrote a part of it, is the disk full?"
        raise UserError(f"cannot write {path}: {reason}") from None
    finally:
        part.unlink(missing_ok=True)
    return total


def render(env: gym.Env) -> np.ndarray:
    try:
        return env.render()
    except Exception as error:  # of OpenGL, whose bindings raise errors of many types
        backend = os.environ.get("MUJOCO_GL", "unset")
        raise UserError(
            f"cannot render {env.spec.id} with MUJOCO_GL {backend} ({error!r:.200}): set MUJOCO_GL"
            " to egl or osmesa, and install its library (Debian: libegl1 or libosmesa6)"
        ) from None


def describe_dataset(env: str, data: str) -> None:
    """Prints what `load_dataset` says, the spaces, and a histogram of the returns."""
    try:
        arrays, info = load_dataset(env, data)
    except UserError as error:
        if strip_version(env) in TASKS:  # which always have an environment
            raise
        arrays, info = load_dataset(env, data, need_env=False)
        print(f"            {str(error).removeprefix('error: ')}")
    obs = arrays["obs"]
    act = arrays["act"]
    low = bound(info["act_low"])
    high = bound(info["act_high"])
    print(f"observation {obs.shape[1]} numbers, {obs.min():.4g} to {obs.max():.4g} in the data")
    print(f"action      {act.shape[1]} numbers, bounded by {low} and {high}")
    print_returns(arrays["rew"], arrays["ends"])


def bound(values: float | list[float]) -> str:
    """One number where all dimensions have the same bound, else all of them."""
    numbers = np.unique(values)
    if len(numbers) == 1:
        return f"{numbers[0]:g}"
    return str(values)


def print_returns(rew: np.ndarray, ends: np.ndarray) -> None:
    """Prints the returns of the trajectories, as numbers and as a histogram of ten lines.

    A row that `load_dataset` drops, such as one cut by a timeout, is missing in them.
    """
    starts = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])
    returns = np.add.reduceat(rew.astype(np.float64), starts)
    low, quarter, median, three_quarters, high = np.percentile(returns, [0, 25, 50, 75, 100])
    print(
        f"returns     of {len(returns):,} trajectories, without the dropped rows: min {low:.2f},"
        f" quartiles {quarter:.2f} {median:.2f} {three_quarters:.2f},"
        f" mean {returns.mean():.2f}, max {high:.2f}"
    )
    counts, edges = np.histogram(returns, bins=10)
    for count, left, right in zip(counts, edges[:-1], edges[1:]):
        bar = "#" * round(50 * count / counts.max())
        print(f"            {left:10.2f} to {right:10.2f} {count:7,} {bar}".rstrip())


if __name__ == "__main__":
    with warnings.catch_warnings(action="ignore"):  # Gymnasium's: AntMaze is registered again
        import common  # as the scripts see it; this file, the program, is another module

    try:
        common.main()
    except OSError as error:
        sys.exit(f"error: {error}")
