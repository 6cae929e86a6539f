"""Datasets and evaluation for dac.py, qdq.py and cped.py.

A script imports two functions from here. `load_dataset` returns the arrays of a dataset and
plain facts about it (`info`), and `evaluate` plays whole episodes. To use a script in another
project, replace these two.

Shapes: N transitions, S observation dimension, A action dimension, E episodes. Actions are
in [-1, 1], in the data and in evaluation; the environment's own bounds appear only in this file.

D4RL was recorded in gym's -v2 environments under MuJoCo 2.1. Gymnasium's -v4 environments
have the same models, rewards and ends of episodes, and one step agrees to rounding. D4RL's own
policies return here on average 0.8 normalised points less on hopper, 1.4 less on halfcheetah,
where the fastest run 2 to 8 % slower, and 0.5 more on walker2d; single policies differ by more
than 10. Since MuJoCo 3.5 the contact margins of two geoms are added; before, the larger one
counted. All geoms of Hopper and of the ant have the same margin, so halving it restores D4RL's
contacts exactly.

AntMaze changes Gymnasium's ant into D4RL's: the time step, the torque, the contacts' solimp, the
maze with the start as origin, the noise of start and goal, and an episode that ends at the goal.
One step agrees to rounding, and success rates of D4RL's own policies agree within about 10 points.
"""

import contextlib
import copy
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
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
from tqdm import tqdm

try:
    import mujoco
    from gymnasium.envs.mujoco import ant_v5
except Exception as error:  # after `pip install ogbench`, which puts MuJoCo 4 over MuJoCo 3
    reason = str(error).split("\n")[0]
    repair = "pip uninstall -y mujoco mujoco-core mujoco-studio && pip install -r requirements.txt"
    sys.exit(f"error: MuJoCo cannot be imported ({reason}); repair it by: {repair}")

# D4RL's reference returns (random policy, expert policy), the same for every dataset version
REFERENCE_RETURNS = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0),
}
EVALUATION_ENVS = {
    "hopper": "Hopper-v4",
    "halfcheetah": "HalfCheetah-v4",
    "walker2d": "Walker2d-v4",
}
QUALITIES = ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")
MAZES = {  # R start, G goal; one cell is 4 m wide
    "umaze": "##### #R..# ###.# #G..# #####",
    "medium": "######## #R.##..# #..#...# ##...### #..#...# #.#..#.# #...#.G# ########",
    "large": "############ #R...#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....#"
    " ##.#.#.#.### #..#...#.G.# ############",
}
ANTMAZE_FILES = {
    "umaze": "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse",
    "umaze-diverse": "Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse",
    "medium-play": "Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse",
    "medium-diverse": "Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse",
    "large-play": "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse",
    "large-diverse": "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse",
}
TASKS = [
    f"{robot}-{quality}"
    for robot in EVALUATION_ENVS
    for quality in ("medium", "medium-replay", "medium-expert")
]
TASKS += [f"antmaze-{maze}" for maze in ANTMAZE_FILES]
D4RL_SHA256 = {  # of every file, as pinned by TensorFlow Datasets
    "hopper-medium-v2": "5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0",
    "hopper-medium-replay-v2": "e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b",
    "hopper-medium-expert-v2": "9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26",
    "halfcheetah-medium-v2": "41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0",
    "halfcheetah-medium-replay-v2": "48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683",  # noqa: E501
    "halfcheetah-medium-expert-v2": "015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06",  # noqa: E501
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
MIRRORS = (  # tried in this order; the first has D4RL's folders, the second a single folder
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/{name}",
)
MINARI_HUB = "https://huggingface.co/datasets/farama-minari"
# Minari's ids for other D4RL tasks
MINARI_NAMES = {
    "pen": "D4RL/pen/{}-v2",
    "door": "D4RL/door/{}-v2",
    "hammer": "D4RL/hammer/{}-v2",
    "relocate": "D4RL/relocate/{}-v2",
    "kitchen": "D4RL/kitchen/{}-v2",
    "maze2d": "D4RL/pointmaze/{}-v2",
}
BUNDLED = Path(__file__).resolve().parent / "benchmarks" / "data"
TIMEOUT = 7.0  # seconds after which a silent server counts as dead: two mirrors take less than 15
MIN_SPEED = 10_000  # bytes per second of a download
MAX_BYTES = 1 << 30  # of a dataset, three times D4RL's largest
MAX_STEP = 1.5  # metres that an ant can move in one step of 0.1 s; farther is another episode
MAX_EPISODE_STEPS = 1_000_000  # of an environment that a dataset describes
MAX_FRAME_SKIP = 1_000

VERSIONS = ("python", "torch", "numpy", "gymnasium", "mujoco", "minari")
FILES = (".hdf5", ".h5", ".npz")
ARRAYS = ("observations", "actions", "rewards", "terminals")  # a file must hold these
KEYS = (*ARRAYS, "timeouts")
WANTED = (*KEYS, "next_observations")
MATRICES = ("observations", "actions", "next_observations")


class UserError(SystemExit):
    """Ends the program with status 1 and one sentence: what is wrong, where, and what to do."""

    def __init__(self, message: str):
        super().__init__(f"error: {message}")


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns what a library raises about somebody's file or environment into one sentence."""
    try:
        yield
    except Exception as error:  # UserError is no Exception, so it passes unchanged
        reason = " ".join(repr(error).split())[:200]
        raise UserError(f"{what} ({reason})") from None


# ----------------------------------------------------------------- datasets


def load_dataset(
    env: str, data: str = "auto", need_env: bool = True
) -> tuple[dict[str, np.ndarray], dict]:
    """Finds, checks and loads the dataset of a task, and prints what it is.

    env: a task (`TASKS`, with or without version), a Minari id or, with a file as data, any
        Gymnasium id. As in Gymnasium, MODULE:NAME first imports the module.
    data: auto | d4rl | minari | bundled, or the path of an HDF5 or NPZ file in D4RL's layout.
    need_env: whether there must be an environment to evaluate in.

    Returns float32 obs [N, S], act [N, A], rew [N], next_obs [N, S], not_done [N] and bool
    ends [N] (the last transition of each trajectory), and `info`, which is plain JSON.
    """
    name = import_module_of(env)

    # raw arrays, and what is known about the environment
    if data.lower().endswith(FILES):
        path = Path(data)
        dataset_id = f"file/{path.name}"
        raw = read_file(path)
        facts = task_facts(env, need_env)
    elif data == "minari" or (data == "auto" and "/" in name):
        dataset_id = f"minari/{name}"
        raw, path, facts = load_minari(name, need_env)
    elif data in ("auto", "d4rl", "bundled"):
        path, dataset_id = find_file(d4rl_name(env), data)
        raw = read_file(path)
        facts = task_facts(env, need_env)
    else:
        raise UserError(
            f"--data {data}: must be auto, d4rl, minari, bundled, or an .hdf5 or .npz file"
        )

    # an official file gets its official name
    digest = sha256(path)
    for official, checksum in D4RL_SHA256.items():
        if checksum == digest:
            dataset_id = f"d4rl/{official}"
            task = strip_version(env)
            if task in TASKS and task != strip_version(official):
                raise UserError(f"{path} is D4RL's {official}, not {env}: correct --env or --data")

    # arrays
    check_arrays(raw, path)
    check_widths(raw, facts, path)
    check_actions(raw["actions"], facts, path)
    is_antmaze = d4rl_robot(env) == "antmaze"
    arrays, counts = to_transitions(raw, MAX_STEP if is_antmaze else None)
    if counts["episodes"] == 0:
        raise UserError(
            f"{path}: there is no whole episode, as none of the {counts['rows']} rows is a"
            " terminal or a timeout"
        )
    if counts["transitions"] < 2:
        raise UserError(
            f"{path}: too few transitions to learn from: {counts['transitions']} are left"
            " without those that are cut off"
        )
    low = np.asarray(facts["act_low"])
    high = np.asarray(facts["act_high"])
    act = (arrays["act"] - (low + high) / 2) / ((high - low) / 2)
    arrays["act"] = act.astype(np.float32)

    # facts
    versions = {package: running_version(package) for package in VERSIONS}
    info = {
        "id": dataset_id,
        "file": str(path),
        "sha256": digest,
        "preset": strip_version(env) in TASKS,
        **facts,
        **counts,
        "mean_score": None,
        "act_used": float(np.abs(arrays["act"]).max()),
        "versions": versions,
    }
    if info["ref_min"] is not None:
        info["mean_score"] = float(normalized_score(info["mean_return"], info))
    print(describe(info))
    return arrays, info


def running_version(package: str) -> str:
    if package == "python":
        return sys.version.split()[0]
    if package == "mujoco":
        return mujoco.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def strip_version(env: str) -> str:
    return re.sub(r"-v\d+$", "", env)


def d4rl_robot(env: str) -> str | None:
    """hopper for hopper-medium or hopper-expert-v1; None for a name that is not D4RL's."""
    robot, _, quality = re.sub(r"-v[012]$", "", env).partition("-")
    if robot in EVALUATION_ENVS and quality in QUALITIES:
        return robot
    if robot == "antmaze" and quality in ANTMAZE_FILES:
        return robot
    return None


def d4rl_name(env: str) -> str:
    """hopper-medium -> hopper-medium-v2; for an unknown task, an error with similar names."""
    name = env if env in D4RL_SHA256 else f"{env}-v2"
    if name in D4RL_SHA256:
        return name
    robot, _, quality = strip_version(env).partition("-")
    if robot in MINARI_NAMES:
        hint = f"Minari has such data: try --env {MINARI_NAMES[robot].format(quality)}"
    elif d4rl_robot(env):
        hint = "D4RL's file of it is not downloaded here: get it, and add --data FILE.hdf5"
    elif env in gym.registry or ":" in env:
        hint = "this is an environment: name its data with --data FILE"
    else:
        near = difflib.get_close_matches(strip_version(env), TASKS)
        hints = []
        if near:
            hints.append(f"did you mean {', '.join(near)}?")
        if re.search(r"-v\d+$", env):
            hints.append("a Minari dataset without a namespace is loaded with --data minari")
        hint = "; ".join(hints) or f"the tasks are {', '.join(TASKS)}"
    raise UserError(f"--env {env}: unknown task; {hint}")


def sha256(path: Path) -> str:
    """Of a file or, for Minari, of the contents of a folder's files, sorted by name."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def find_file(task: str, data: str) -> tuple[Path, str]:
    """File and id of a D4RL task's dataset: from the cache, a mirror or the bundled sample."""
    name = strip_version(task)
    bundled = BUNDLED / f"{name}.hdf5"
    if data == "bundled":
        if bundled.exists():
            return bundled, f"bundled/{name}"
        names = ", ".join(file.stem for file in sorted(BUNDLED.glob("*.hdf5")))
        raise UserError(f"--data bundled: only {names} are bundled")

    # The folder and file names are the D4RL package's own, so both find what the other downloaded.
    remote = d4rl_path(task)
    cache = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
    target = cache / Path(remote).name
    if target.exists():
        if sha256(target) != D4RL_SHA256[task]:
            raise UserError(
                f"{target} is not D4RL's {task}: delete it to download D4RL's, or use it"
                f" with --data {target}"
            )
        return target, f"d4rl/{task}"

    urls = [mirror.format(path=remote, name=target.name) for mirror in MIRRORS]
    failures = []
    for url in urls:
        if not answers(url):
            failures.append(f"{url}: no answer")
            continue
        try:
            checksum = f"sha256:{D4RL_SHA256[task]}"
            pooch.retrieve(url, checksum, target.name, cache, downloader=download)  # atomic
            return target, f"d4rl/{task}"
        except (requests.RequestException, ValueError) as error:  # ValueError: another file
            failures.append(f"{url}: {str(error).splitlines()[0]:.200}")
        except OSError as error:
            raise UserError(
                f"cannot write {target}: {error.strerror or error}; D4RL_DATASET_DIR names"
                " another folder"
            ) from None

    no_network = all(failure.endswith(": no answer") for failure in failures)
    if data == "auto" and bundled.exists() and no_network:
        line = "!" * 100
        print(
            f"{line}\n!! NO NETWORK for D4RL's {task}: this run uses the small BUNDLED sample"
            " instead.\n!! Its scores are not D4RL scores. --data d4rl insists on D4RL's file."
            f"\n{line}",
            file=sys.stderr,
        )
        return bundled, f"bundled/{name}"
    reasons = "; ".join(failures)
    lines = [f"{target} does not exist and cannot be downloaded ({reasons}); get it with"]
    lines += [f"  curl -L --create-dirs -o {target} {url}" for url in urls]
    if bundled.exists():
        lines.append("or train on the small sample with --data bundled")
    raise UserError("\n".join(lines))


def download(url: str, part: str, _: object) -> None:
    """For pooch: fetches url to the file part. Gives up if this is too slow or does not end."""
    started = time.monotonic()
    with requests.get(url, stream=True, timeout=TIMEOUT) as response, open(part, "wb") as file:
        response.raise_for_status()
        total = int(response.headers.get("content-length", 0)) or None
        with tqdm(total=total, unit="B", unit_scale=True, leave=False) as bar:
            try:
                while block := response.raw.read1(1 << 18, decode_content=True):
                    file.write(block)
                    bar.update(len(block))
                    seconds = time.monotonic() - started
                    if bar.n > MAX_BYTES or bar.n < MIN_SPEED * (seconds - TIMEOUT):
                        raise requests.ConnectionError(f"given up after {bar.n:,} bytes")
            except urllib3.exceptions.HTTPError as error:
                raise requests.ConnectionError(error) from None


def answers(url: str) -> bool:
    """Whether a server answers in time; in a thread, as a DNS lookup has no time limit."""
    responses = []

    def ask() -> None:
        with contextlib.suppress(requests.RequestException):
            responses.append(requests.head(url, timeout=TIMEOUT, allow_redirects=True))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return bool(responses)


def d4rl_path(task: str) -> str:
    """Path of a task's file below D4RL's root."""
    robot, quality = strip_version(task).split("-", 1)
    if robot in EVALUATION_ENVS:
        return f"gym_mujoco_v2/{robot}_{quality.replace('-', '_')}-v2.hdf5"
    if task.endswith("-v2"):
        return f"ant_maze_v2/{ANTMAZE_FILES[quality]}_fixed.hdf5"
    return f"ant_maze_new/{ANTMAZE_FILES[quality]}.hdf5"


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Raw arrays of a file in D4RL's flat layout: those of `WANTED` that it has."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with path.open("rb") as file:
        start = file.read(512)
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        raise UserError(f"{path} is a web page, not a dataset: download it again")
    with explained(f"{path} is not an HDF5 or NPZ file, or is damaged"):
        if path.suffix.lower() == ".npz":
            return read_npz(path)
        return read_hdf5(path)


def most_bytes(path: Path) -> int:
    """Largest size of a file's arrays; measurements are not compressed by more than 20."""
    return max(MAX_BYTES, 20 * path.stat().st_size)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        members = {}
        for member in file.zip.infolist():
            name = member.filename.removesuffix(".npy")
            if name not in WANTED:
                continue
            if name in members:
                raise ValueError(f"{name} is in it twice")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is compressed by another method than numpy's")
            members[name] = member
        claimed = sum(member.file_size for member in members.values())
        if claimed > most_bytes(path):
            raise ValueError(f"it claims more than {most_bytes(path):,} bytes")
        return {name: np.asarray(file[name]) for name in WANTED if name in members}


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path, "r") as file:
        parts = {}
        claimed = 0
        for name in WANTED:
            if name not in file:
                continue
            part = hdf5_part(file, name)
            if isinstance(part, h5py.Dataset):
                if part.dtype.kind == "O":
                    raise ValueError(f"{name} is not an array of numbers")
                claimed += claimed_bytes(part)
                parts[name] = part
        if claimed > most_bytes(path):
            raise ValueError(f"it claims more than {most_bytes(path):,} bytes")
        return {name: part[()] for name, part in parts.items()}


def hdf5_part(group: h5py.Group, name: str) -> h5py.Dataset | h5py.Group:
    """A member of a group, which may not be a link or reach into other files."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is a link")
    part = group[name]
    if isinstance(part, h5py.Dataset) and (part.external or part.is_virtual):
        raise ValueError(f"{name} has its content in another file")
    return part


def claimed_bytes(part: h5py.Dataset) -> int:
    """Memory that reading takes: that of the array and, as it is read in chunks, of one chunk."""
    if part.shape is None:
        raise ValueError(f"{part.name} has no shape")
    entries = math.prod(part.shape)
    if part.chunks:
        entries = max(entries, math.prod(part.chunks))
    return entries * part.dtype.itemsize


def claimed_by_group(group: h5py.Group, depth: int = 0) -> int:
    """Memory of everything in a group, because Minari reads all of it."""
    if depth > 8:
        raise ValueError("groups are nested too deeply")
    total = 0
    for name in group:
        part = hdf5_part(group, name)
        if isinstance(part, h5py.Dataset):
            total += claimed_bytes(part)
        elif isinstance(part, h5py.Group):
            total += claimed_by_group(part, depth + 1)
    return total


def load_minari(dataset_id: str, need_env: bool) -> tuple[dict[str, np.ndarray], Path, dict]:
    """Raw arrays, folder and facts of a Minari dataset, local or downloaded.

    Minari stores episodes, so their last rows are known: `episode_ends` marks them. The dataset
    is scored by its own reference returns, if it has them.
    """
    if not re.fullmatch(r"([-\w]+/)*[-\w]+-v\d+", dataset_id):
        raise UserError(f"--env {dataset_id}: a Minari id looks like mujoco/hopper/medium-v0")
    import minari  # here, because few runs need it and it takes a while
    from minari.storage.datasets_root_dir import get_dataset_path

    with explained(f"Minari cannot load {dataset_id}"):
        folder = get_dataset_path(dataset_id) / "data"
        if not folder.is_dir():
            if not answers(MINARI_HUB):  # Minari's own download would wait forever
                raise UserError(
                    f"{dataset_id} is not among the local Minari datasets, and {MINARI_HUB}"
                    " does not answer"
                )
            minari.download_dataset(dataset_id)
        metadata = json.loads((folder / "metadata.json").read_text())
        if "observation_space" not in metadata or "action_space" not in metadata:
            # Minari builds the environment to find them, so it must be one that we would build
            spec = env_spec(metadata["env_spec"])
            if spec.kwargs != json.loads(metadata["env_spec"])["kwargs"]:
                raise ValueError("it stores no spaces, and its environment has a render mode")
        for path in folder.glob("*.hdf5"):
            with h5py.File(path, "r") as file:
                if claimed_by_group(file) > most_bytes(path):
                    raise ValueError(f"it claims more than {most_bytes(path):,} bytes")
        dataset = minari.load_dataset(dataset_id)
        low, high = action_bounds(dataset.action_space, dataset_id)
        sizes = observation_sizes(dataset.observation_space, dataset_id)
        raw = minari_arrays(dataset)

    facts = {
        "env": None,
        "evaluation": "none",
        "ref_min": None,
        "ref_max": None,
        "d4rl_contacts": False,
        "halved_margins": False,
        "obs_dim": sum(sizes.values()),
        "act_low": low.tolist(),
        "act_high": high.tolist(),
        "box": "dataset",
    }
    low_score = metadata.get("ref_min_score")
    high_score = metadata.get("ref_max_score")
    are_numbers = type(low_score) in (int, float) and type(high_score) in (int, float)
    if are_numbers and -1e12 < low_score < high_score < 1e12:
        facts["ref_min"] = low_score
        facts["ref_max"] = high_score

    if need_env:
        stored = metadata.get("eval_env_spec") or metadata.get("env_spec")
        if stored is None:
            raise UserError(f"{dataset_id} names no environment; --no-eval trains without one")
        facts["env"] = stored.strip()
        known, env_sizes = environment_facts(facts, trial=True)
        facts["evaluation"] = known["evaluation"]
        if sizes != env_sizes:
            raise UserError(
                f"{dataset_id} has observations of {size_text(sizes)}, but {known['evaluation']}"
                f" has {size_text(env_sizes)}: a policy of one cannot act on the other;"
                " --no-eval trains without an environment"
            )
        check_same_box(dataset_id, facts, known)
    return raw, folder, facts


def minari_arrays(dataset) -> dict[str, np.ndarray]:
    columns = {name: [] for name in (*WANTED, "episode_ends")}
    for episode in dataset.iterate_episodes():
        steps = len(episode.rewards)
        obs = flatten(dataset.observation_space, episode.observations)  # [T + 1, S]
        lengths = {len(episode.actions), len(episode.terminations), len(episode.truncations)}
        if lengths != {steps} or len(obs) != steps + 1:
            raise ValueError(f"episode {episode.id} has columns of different lengths")
        if steps == 0:
            continue
        last = np.zeros(steps, bool)
        last[-1] = True
        columns["observations"].append(obs[:-1])
        columns["actions"].append(episode.actions)
        columns["rewards"].append(episode.rewards)
        columns["terminals"].append(episode.terminations)
        columns["timeouts"].append(episode.truncations)
        columns["next_observations"].append(obs[1:])  # the true one at the end, too
        columns["episode_ends"].append(last)
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def flatten(space: gym.Space, obs) -> np.ndarray:
    """Observations, one or a batch, as vectors; entries of a dictionary in the order of their keys.

    The order of the space itself is not used, because storing a dataset can change it.
    """
    if isinstance(space, gym.spaces.Dict):
        parts = [flatten(space[key], obs[key]) for key in sorted(space)]
        return np.concatenate(parts, axis=-1)
    if not isinstance(space, gym.spaces.Box):
        raise UserError(f"the observation space {space} is neither a box nor a dictionary of boxes")
    batch = np.shape(obs)[: np.ndim(obs) - len(space.shape)]
    return np.reshape(obs, (*batch, -1))


def check_arrays(raw: dict[str, np.ndarray], path: Path) -> None:
    """Ends the program if something is wrong with the raw arrays; turns [N, 1] columns into [N]."""
    missing = [name for name in ARRAYS if name not in raw]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it must hold {', '.join(ARRAYS)}")

    counts = [raw[name].shape[:1] for name in ("actions", "observations")]
    rows = max(counts)  # () of a single number
    for name, array in raw.items():
        wanted = "two dimensions, rows and entries" if name in MATRICES else "one number per row"
        if name not in MATRICES and array.shape == (*rows, 1):
            array = array.squeeze(1)
            raw[name] = array
        has = f"{path}: {name} has type {array.dtype} and shape {array.shape}"
        if array.dtype.kind not in "fiub":
            raise UserError(f"{has}: it must be an array of numbers")
        if array.ndim != (2 if name in MATRICES else 1):
            hint = ""
            if name in MATRICES and array.ndim == 1:
                hint = f": make it {name}[:, None] if each row has one entry"
            raise UserError(f"{has}, but it must have {wanted}{hint}")
        if 0 in array.shape[1:]:
            raise UserError(f"{has}, but it must have {wanted}")
        if array.shape[:1] != rows:
            raise UserError(f"{has}, but {path.name} has {rows[0]:,} rows")
        if name == "next_observations" and array.shape != raw["observations"].shape:
            raise UserError(f"{has}, but observations has {raw['observations'].shape}")
        with np.errstate(over="ignore"):
            finite = np.isfinite(array.astype(np.float32))  # as networks see it
        if not finite.all():
            row = np.argwhere(~finite)[0][0]
            raise UserError(f"{path}: {name} has NaN or infinity in row {row}")
    if not rows or rows[0] < 2:
        raise UserError(f"{path}: there is no whole episode in {rows[0]} rows")


def check_widths(raw: dict[str, np.ndarray], facts: dict, path: Path) -> None:
    obs_dim = raw["observations"].shape[1]
    act_dim = raw["actions"].shape[1]
    wanted_obs = facts["obs_dim"] or obs_dim
    wanted_act = np.size(facts["act_low"]) if facts["box"] != "assumed" else act_dim
    if (obs_dim, act_dim) != (wanted_obs, wanted_act):
        raise UserError(
            f"{path}: sizes of observation and action are [{obs_dim}, {act_dim}], but"
            f" [{wanted_obs}, {wanted_act}] in the environment of --env"
        )


def check_same_box(dataset_id: str, data: dict, env: dict) -> None:
    """Ends the program if data and environment have different bounds: rescaling would be wrong."""
    for side in ("act_low", "act_high"):
        same_size = len(data[side]) == len(env[side])
        if not same_size or not np.allclose(data[side], env[side], rtol=1e-5, atol=1e-6):
            raise UserError(
                f"{dataset_id} has {box_text(data)}, but {env['evaluation']} has {box_text(env)}:"
                " record it in the environment's own bounds, or train with --no-eval"
            )


def check_actions(actions: np.ndarray, facts: dict, path: Path) -> None:
    """Ends the program if actions leave their box by more than rounding."""
    low = np.asarray(facts["act_low"])
    high = np.asarray(facts["act_high"])
    actions = actions.astype(np.float64)
    distance = np.maximum(low - actions, actions - high)  # outside of the box where positive
    outside = np.argwhere(distance > 1e-5)
    if len(outside) == 0:
        return
    row, entry = outside[0]
    whose = f"the box of the {facts['box']}"
    if facts["box"] == "assumed":
        whose = "the box that is assumed without an environment"
    lows = f"{low.min():g}" if low.min() == low.max() else low.tolist()
    highs = f"{high.min():g}" if high.min() == high.max() else high.tolist()
    raise UserError(
        f"{path}: the action in row {row} is outside of {box_text(facts)}, {whose}: entry {entry}"
        f" is {actions[row, entry]:g}, and {len(np.unique(outside[:, 0])):,} rows are outside by"
        f" up to {distance.max():g}; to clip them: actions = np.clip(actions, {lows}, {highs})"
    )


def to_transitions(
    raw: dict[str, np.ndarray], max_step: float | None = None
) -> tuple[dict[str, np.ndarray], dict]:
    """Transitions as in d4rl.qlearning_dataset, and the counts that describe the file.

    A timeout is not a terminal. Without next_observations, the next observation is that of the
    following row, so the last row and rows cut by a timeout are dropped. At a terminal it belongs
    to another episode, which not_done = 0 hides. AntMaze-v0 does not mark where episodes begin, so
    rows are dropped that move by more than max_step in x and y, the first two observed numbers.

    A trajectory ends at a flag and before a dropped row. With next_observations, it also ends
    where the next row does not continue it, unless that is so for most rows.
    """
    obs = raw["observations"]
    num_rows = len(obs)
    terminal = raw["terminals"].astype(bool)
    timeout = np.zeros(num_rows, bool)
    if "timeouts" in raw:
        timeout = raw["timeouts"].astype(bool)
    flagged = terminal | timeout
    if "episode_ends" in raw:
        flagged = flagged | raw["episode_ends"]

    # which rows are transitions
    keep = np.ones(num_rows, bool)
    if "next_observations" in raw:
        next_obs = raw["next_observations"]
    else:
        next_obs = np.roll(obs, -1, axis=0)
        keep = ~timeout
        keep[-1] = False
    jump = np.zeros(num_rows, bool)
    if max_step is not None:
        distance = np.linalg.norm(next_obs[:, :2] - obs[:, :2], axis=1)
        jump = keep & ~terminal & (distance > max_step)
        keep = keep & ~jump
    columns = {
        "obs": obs,
        "act": raw["actions"],
        "rew": raw["rewards"],
        "next_obs": next_obs,
        "not_done": ~terminal,
    }
    arrays = {}
    for name, column in columns.items():
        arrays[name] = np.ascontiguousarray(column[keep], dtype=np.float32)

    # where trajectories end
    kept = np.flatnonzero(keep)
    ends = flagged[keep]
    ends[:-1] |= np.diff(kept) > 1  # the next row was dropped
    ends[-1:] = True
    stop = flagged.copy()  # rows that end an episode
    ends_from = "flags"
    if "next_observations" in raw and "episode_ends" not in raw:
        step = np.linalg.norm(arrays["obs"][1:] - arrays["next_obs"][:-1], axis=1)
        unflagged = ~ends[:-1]
        breaks = unflagged & (step > 1e-6)
        if breaks.sum() <= unflagged.sum() / 2:  # else the two columns are measured differently
            ends[:-1] |= breaks
            if not timeout.any():  # cut episodes were not flagged
                stop[kept[:-1][breaks]] = True
            if breaks.any():
                ends_from = f"flags and {breaks.sum():,} rows that the next one does not follow"
    if "timeouts" not in raw:
        ends_from = "terminals alone, as there are no timeouts: a cut episode continues in the next"
        if "next_observations" in raw:
            ends_from = (
                f"terminals and {stop.sum() - terminal.sum():,} rows that the next one does not"
                " follow, as there are no timeouts"
            )

    # whole episodes only: an unfinished tail has no return
    if "episode_ends" in raw:
        stop = raw["episode_ends"]
        unmarked = int((stop & ~terminal & ~timeout).sum())
        if unmarked:
            ends_from = f"Minari's episodes, {unmarked:,} of which end without a flag"
    stops = np.flatnonzero(stop) + 1
    mean_return = 0.0
    if len(stops):
        rewards = raw["rewards"].astype(np.float64)[: stops[-1]]
        starts = np.r_[0, stops[:-1]]
        mean_return = float(np.add.reduceat(rewards, starts).mean())
    counts = {
        "rows": num_rows,
        "dropped": int((~keep).sum()),
        "transitions": int(keep.sum()),
        "trajectories": int(ends.sum()),
        "episodes": len(stops),
        "terminals": int(terminal.sum()),
        "timeouts": int(timeout.sum()),
        "jumps": int(jump.sum()),
        "mean_return": mean_return,
        "ends_from": ends_from,
    }
    return {**arrays, "ends": ends}, counts


def describe(info: dict) -> str:
    """What every run prints first: its data, and where its policy is evaluated."""
    names = ["rows", "dropped", "transitions", "trajectories", "episodes", "terminals", "timeouts"]
    if info["jumps"]:
        names.append("jumps")
    counts = ", ".join(f"{info[name]:,} {name}" for name in names)
    score = "no reference returns"
    if info["mean_score"] is not None:
        score = f"normalised score {info['mean_score']:.1f}"
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())

    lines = [
        f"dataset     {info['id']} (SHA-256 {info['sha256'][:12]}, {info['file']})",
        f"            {counts}",
        f"            mean episode return {info['mean_return']:.1f}, {score}",
    ]
    if info["ends_from"] != "flags":
        lines.append(f"            ends of trajectories from {info['ends_from']}")
    if info["box"] == "assumed":
        lines.append("actions     assumed to be in [-1, 1]: no environment is known")
    else:
        lines.append(f"actions     {box_text(info)}, the box of the {info['box']}")
    if info["act_used"] < 0.55:
        lines.append(
            f"            they fill at most {100 * info['act_used']:.0f} % of it; rescale them"
            " first if they were recorded in other units"
        )
    lines.append(f"evaluation  {info['evaluation']} ({versions})")
    if info["env"] and info["halved_margins"]:
        lines.append(
            "            geom margins halved, because MuJoCo adds those of two geoms since 3.5;"
            " D4RL's took the larger one"
        )
    if int(info["versions"]["mujoco"].split(".")[0]) > 3:
        lines.append(
            f"warning     MuJoCo {info['versions']['mujoco']} is newer than the one in"
            " requirements.txt: Hopper is the same in it, the ant of AntMaze nearly"
        )
    if not info["preset"]:
        lines.append("preset      none for this task: the script's defaults hold, see its --help")
    return "\n".join(lines)


def box_text(facts: dict) -> str:
    low = np.asarray(facts["act_low"])
    high = np.asarray(facts["act_high"])
    text = f"{low.size} in [{low.min():g}, {high.max():g}]"
    if low.min() < low.max() or high.min() < high.max():
        text += " at the widest"
    return text


def size_text(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}".strip() for name, size in sizes.items())


# ------------------------------------------------------------- environments


def import_module_of(env: str) -> str:
    """Imports the module of MODULE:NAME, Gymnasium's notation, and returns NAME.

    Only for what the user typed: nothing is imported because a file or a checkpoint says so.
    """
    module, colon, name = env.rpartition(":")
    if colon:
        with explained(f"--env {env}: {module} cannot be imported; is it on PYTHONPATH?"):
            importlib.import_module(module)
    return name


def task_facts(env: str, need_env: bool = True) -> dict:
    """Environment, sizes, action bounds and reference returns of a task or a Gymnasium id.

    It was typed by the user, so the module of MODULE:NAME is imported.
    """
    import_module_of(env)
    robot = d4rl_robot(env)
    env_id = EVALUATION_ENVS.get(robot, env)
    if robot == "antmaze":
        env_id = f"D4RLAntMaze-{env.split('-')[1]}-v2"
    ref_min, ref_max = REFERENCE_RETURNS.get(robot, (None, None))
    contacts = robot == "hopper" or env_id.startswith("D4RLAntMaze-")
    facts = {
        "env": env_id,
        "evaluation": "none",
        "ref_min": ref_min,
        "ref_max": ref_max,
        "d4rl_contacts": contacts,
        "halved_margins": contacts and adds_margins(),
        "obs_dim": None,
        "act_low": -1.0,
        "act_high": 1.0,
        "box": "assumed",
    }
    if need_env:
        if find_spec(env_id.split(":")[-1]) is None:
            near = ", ".join(difflib.get_close_matches(env, [*TASKS, *gym.registry])) or "none"
            raise UserError(
                f"--env {env} is neither a task nor a Gymnasium id (similar: {near}); --no-eval"
                " trains without an environment"
            )
        known, _ = environment_facts(facts, trial=True)
        return {**facts, **known}

    # no evaluation, but if the environment is known, the bounds of actions are its own
    if find_spec(env_id.split(":")[-1]) is not None:
        with contextlib.suppress(UserError):  # such as one whose actions are not a box
            known, _ = environment_facts(facts, trial=False)
            for name in ("act_low", "act_high", "box"):
                facts[name] = known[name]
    facts["env"] = None
    return facts


def environment_facts(info: dict, trial: bool) -> tuple[dict, dict[str, int]]:
    """Builds an environment; returns facts about it and the sizes of its observation's entries.

    trial: whether to reset it and to take one step, so that a failure shows at load.
    """
    with build_env(info) as env:
        name = env.spec.id
        low, high = action_bounds(env.action_space, name)
        sizes = observation_sizes(env.observation_space, name)
        if trial:
            with explained(f"{name}: a first step fails"):
                obs, _ = env.reset(seed=0)
                size = flatten(env.observation_space, obs).shape
                if size != (sum(sizes.values()),):
                    raise ValueError(f"an observation of shape {np.shape(obs)}")
                _, reward, *_ = env.step(((low + high) / 2).astype(env.action_space.dtype))
                if np.shape(reward) != ():
                    raise ValueError(f"a reward of shape {np.shape(reward)}")
        arguments = {}
        registered = gym.registry[name].kwargs
        for key, value in env_spec(info["env"]).kwargs.items():
            if key not in registered or registered[key] != value:
                arguments[key] = value
        evaluation = f"{name}, {time_limit(env):,} steps at most" if trial else name
        if arguments:
            evaluation += f", with {json.dumps(arguments)[:200]}"
    facts = {
        "evaluation": evaluation,
        "obs_dim": sum(sizes.values()),
        "act_low": low.tolist(),
        "act_high": high.tolist(),
        "box": "environment",
    }
    return facts, sizes


def action_bounds(space: gym.Space, owner: str) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest actions [A] of a box that can be mapped to [-1, 1]."""
    is_box = isinstance(space, gym.spaces.Box) and space.dtype.kind == "f"
    if is_box and len(space.shape) == 1 and space.shape[0] > 0:
        with np.errstate(over="ignore", invalid="ignore"):
            width = space.high - space.low
        if np.isfinite(width).all() and (width > 0).all():
            return space.low, space.high
    text = " ".join(str(space).split())[:200]
    raise UserError(
        f"{owner}: the action space is {text}, but only bounded boxes can be used: a vector of"
        " floats with low < high in each entry"
    )


def observation_sizes(space: gym.Space, owner: str, name: str = "") -> dict[str, int]:
    """Entries of an observation by name, in the order of `flatten`; a plain box has one, ''."""
    if isinstance(space, gym.spaces.Dict):
        sizes = {}
        for key in sorted(space):
            sizes.update(observation_sizes(space[key], owner, f"{name}/{key}".lstrip("/")))
        return sizes
    if not isinstance(space, gym.spaces.Box):
        text = " ".join(str(space).split())[:200]
        raise UserError(
            f"{owner}: the observation space {text} is neither a box nor a dictionary of boxes"
        )
    return {name: math.prod(space.shape)}


def find_spec(name: str) -> gym.envs.registration.EnvSpec | None:
    """The registered environment of a name; Gymnasium-Robotics' too, where it is installed."""
    if name not in gym.registry:
        with contextlib.suppress(Exception):  # Minari's D4RL mazes, hands and kitchen
            gym.register_envs(importlib.import_module("gymnasium_robotics"))
    return gym.registry.get(name)


def env_spec(env: str) -> gym.envs.registration.EnvSpec:
    """`info["env"]` is a Gymnasium id or, from Minari, the JSON of an environment's specification.

    It can come from somebody else's file, and an entry point is code. So only what is registered
    here is built, and the module of MODULE:NAME must have been imported before.
    """
    if env.startswith("{"):
        return stored_spec(env)
    module, _, name = env.rpartition(":")
    if module and module not in sys.modules:
        raise UserError(
            f"environment {env:.80} needs its module, which is imported only when you type it:"
            f" add --env {env:.80}"
        )
    spec = find_spec(name)
    if spec is None:
        raise UserError(
            f"environment {name:.80} is not registered with Gymnasium: install the package that"
            " has it, or import its module by --env MODULE:NAME"
        )
    return spec


def stored_spec(text: str) -> gym.envs.registration.EnvSpec:
    """The registered environment with the arguments and the time limit of a specification."""
    with explained(f"there is no environment {text:.80}"):
        stored = json.loads(text)
        name = stored["id"]
        entry_point = stored["entry_point"]
        wrappers = stored["additional_wrappers"]
        arguments = dict(stored["kwargs"])
        limit = stored["max_episode_steps"]
        spec = copy.deepcopy(find_spec(name))
    if spec is None:
        raise UserError(
            f"environment {name:.80} is not registered with Gymnasium: install the package that"
            " has it, or import its module by --env MODULE:DATASET; --no-eval trains without it"
        )
    if spec.entry_point != entry_point:
        raise UserError(
            f"environment {name:.80} is not registered with Gymnasium as {entry_point!s:.80},"
            f" but as {spec.entry_point!s:.80}; --no-eval trains without it"
        )
    if wrappers:
        raise UserError(
            f"environment {name:.80} has wrappers of its own, and these are not built from"
            " data: register the wrapped environment under a name, or train with --no-eval"
        )
    if limit is not None:
        if type(limit) is not int or not 1 <= limit <= MAX_EPISODE_STEPS:
            raise UserError(
                f"environment {name:.80}: max_episode_steps is {limit!r:.80}, but must be a whole"
                f" number from 1 to {MAX_EPISODE_STEPS:,}"
            )
        spec.max_episode_steps = limit
    for key, value in arguments.items():
        if key == "render_mode" or (key in spec.kwargs and spec.kwargs[key] == value):
            continue
        for string in strings_in(value):
            if re.search(r"[/\\:~]|^\.|\.[A-Za-z]\w*$", string):
                raise UserError(
                    f"environment {name:.80}: its argument {key:.80} names the file or module"
                    f" {string:.80}; data cannot make this program load it"
                )
        spec.kwargs[key] = value
    skip = spec.kwargs.get("frame_skip", 1)
    if type(skip) is not int or not 1 <= skip <= MAX_FRAME_SKIP:
        raise UserError(
            f"environment {name:.80}: frame_skip is {skip!r:.80}, but must be a whole number from"
            f" 1 to {MAX_FRAME_SKIP:,}"
        )
    return spec


def strings_in(value) -> list[str]:
    """All strings in nested lists and dictionaries."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, list):
        return []
    return [string for part in value for string in strings_in(part)]


class AntMaze(ant_v5.AntEnv):
    """D4RL's AntMaze-v2 over Gymnasium's ant: observation qpos [15] and qvel [14], no goal.

    The origin is the start; x runs along the columns of the maze and y along its rows. Each reset
    draws the goal anew in its cell. Within 0.5 m of it the reward is 1 and the episode is over;
    everywhere else the reward is 0.
    """

    def __init__(self, maze: str, **kwargs):
        places = {}
        walls = []
        for i, row in enumerate(MAZES[maze].split()):
            for j, cell in enumerate(row):
                places[cell] = np.array([j, i])  # x by column, y by row
                if cell == "#":
                    walls.append(places[cell])
        start = places["R"]
        self.goal_cell = 4.0 * (places["G"] - start)
        self.goal = self.goal_cell

        tree = ElementTree.parse(Path(ant_v5.__file__).parent / "assets" / "ant.xml")
        world = tree.find("worldbody")
        for place in walls:
            x, y = 4 * (place - start)
            wall = {"type": "box", "size": "2 2 1", "pos": f"{x} {y} 1"}
            wall.update({"contype": "1", "conaffinity": "1"})
            ElementTree.SubElement(world, "geom", wall)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "maze.xml"
            tree.write(file)
            super().__init__(
                str(file),
                terminate_when_unhealthy=False,
                include_cfrc_ext_in_observation=False,
                exclude_current_positions_from_observation=False,
                **kwargs,
            )
        self.model.opt.timestep = 0.02  # s, five of them per step; Gymnasium has 0.01
        self.model.actuator_gear[:, 0] = 30  # N m at action 1; Gymnasium has 150
        self.model.geom_solimp[:, :3] = (0.8, 0.8, 0.01)  # Gymnasium has 0.9, 0.95, 0.001
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
    env_id = f"D4RLAntMaze-{maze}-v2"
    steps = 700 if maze == "umaze" else 1000
    if env_id not in gym.registry:  # this file can be imported twice, as program and as `common`
        gym.register(env_id, AntMaze, max_episode_steps=steps, kwargs={"maze": maze})


def adds_margins() -> bool:
    """Whether this MuJoCo adds the margins of two geoms; before 3.5 it took the larger one."""
    major, minor = re.findall(r"\d+", mujoco.__version__)[:2]
    return (int(major), int(minor)) >= (3, 5)


@contextlib.contextmanager
def without_notices() -> Iterator[None]:
    """Hides deprecation notices: Gymnasium's about -v4, MuJoCo's about HalfCheetah's model.

    MuJoCo would also write MUJOCO_LOG.TXT into the current folder at each build.
    """

    def show(message: str) -> None:
        if "deprecated" not in message:
            print(f"MuJoCo: {message}", file=sys.stderr)

    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(show)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        mujoco.set_mju_user_warning(before)


def build_env(info: dict, **kwargs) -> gym.Env:
    """The environment as it is registered, with D4RL's contacts if the task is D4RL's."""
    if info["env"] is None:
        raise UserError("there is no environment to evaluate in: the run was made with --no-eval")
    spec = env_spec(info["env"])
    with explained(f"Gymnasium cannot make {spec.id}"), without_notices():
        env = gym.make(spec, **kwargs)
    model = getattr(env.unwrapped, "model", None)  # a checkpoint can claim the contacts for any
    if info.get("d4rl_contacts") and adds_margins() and hasattr(model, "geom_margin"):
        model.geom_margin[:] *= 0.5
    return env


def time_limit(env: gym.Env) -> int:
    if env.spec.max_episode_steps is None:
        raise UserError(f"{env.spec.id} has no time limit, so its episodes may never end")
    return env.spec.max_episode_steps


def make_env(info: dict, **kwargs) -> gym.Env:
    """The evaluation environment: observations flat in `flatten`'s order, actions in [-1, 1]."""
    env = build_env(info, **kwargs)
    time_limit(env)
    action_bounds(env.action_space, env.spec.id)
    space = env.observation_space
    size = sum(observation_sizes(space, env.spec.id).values())
    flat = gym.spaces.Box(-np.inf, np.inf, (size,))
    env = gym.wrappers.TransformObservation(env, lambda obs: flatten(space, obs), flat)
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


# --------------------------------------------------------------- evaluation


def normalized_score(returns, info: dict):
    """D4RL's score of undiscounted returns: 0 is the random policy, 100 the expert."""
    return 100 * (np.asarray(returns) - info["ref_min"]) / (info["ref_max"] - info["ref_min"])


def evaluate(act: Callable, info: dict, episodes: int, seed: int) -> dict[str, np.ndarray]:
    """Plays whole episodes side by side, with one call of `act` per step for all of them.

    act: observations [E, S] -> actions [E, A] in [-1, 1]. Episode i is reset with seed + i and
    counts until its first end. torch's random numbers depend on `seed` alone, and its generator
    is left as it was. Returns return [E], episode_length [E] and, if there are reference returns,
    normalized_score [E].
    """
    envs = gym.vector.SyncVectorEnv([lambda: make_env(info)] * episodes)
    returns = np.zeros(episodes)
    lengths = np.zeros(episodes)
    running = np.ones(episodes, bool)
    devices = range(torch.cuda.device_count())
    with contextlib.closing(envs), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        with explained("the environment fails in its reset"):
            obs, _ = envs.reset(seed=[seed + i for i in range(episodes)])
        while running.any():
            actions = act(obs.astype(np.float32))
            with explained("the environment fails in a step"):
                obs, reward, terminated, truncated, _ = envs.step(actions)
            returns += reward * running
            lengths += running
            running &= ~(terminated | truncated)
    result = {"return": returns, "episode_length": lengths}
    if info["ref_min"] is not None:
        result["normalized_score"] = normalized_score(returns, info)
    return result


# ------------------------------------------------------------------ program

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
    # with a run: task or Gymnasium id to evaluate in, if not its own; without: dataset to describe
    env: str | None = None
    # where the dataset comes from, as in the scripts; None means auto
    data: str | None = None
    # episodes to play; None means as many as the training played at its end
    episodes: int | None = None
    # seed of the first episode; None repeats the episodes that the training played at its end
    seed: int | None = None
    # film one episode into this file (.mp4, .mkv, .mov, .avi), and do nothing else
    video: Path | None = None
    # script of the algorithm; None means the one in the folder of common.py
    script: Path | None = None
    # auto takes CUDA if there is a GPU
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
        raise UserError("this run was trained with --no-eval: name an environment with --env")
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
            print("            only one episode: --episodes has no effect with --video")
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
    """Ends the program if options contradict each other or cannot be met."""
    if options.checkpoint is None:
        if options.env is None:
            raise UserError("name a run to evaluate, or a dataset to describe with --env")
        for name in ("episodes", "seed", "video", "script"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} needs a checkpoint")
    elif options.data is not None:
        raise UserError("--data names a dataset to describe: leave it out with a checkpoint")
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
        raise UserError(f"{path} is not a checkpoint, or is damaged") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is not a checkpoint of a run")
    for key, kind in CHECKPOINT_FORM.items():
        if not isinstance(checkpoint.get(key), kind):
            raise UserError(f"{path} is not a checkpoint of a run: it lacks {key}")
    info = checkpoint["info"]
    for key in ("env", "ref_min", "ref_max"):
        info.setdefault(key)  # the script may have used another load_dataset
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
            f"the checkpoint is from another version of {script.__file__}: it has arguments that"
            f" do not exist here ({unknown})"
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


def trained_version(package: str, info: dict) -> str:
    versions = info.get("versions")
    if not isinstance(versions, dict):
        return "unknown"
    return str(versions.get(package, "unknown"))


def print_versions(trained: dict) -> None:
    """Prints the versions now and in the training."""
    print(f"versions    {'':12}{'now':16}training")
    for package in VERSIONS:
        now = running_version(package)
        then = trained_version(package, trained)
        mark = "" if now == then else "  (differs)"
        print(f"            {package:12}{now:16}{then}{mark}")


def mujoco_notes(env: gym.Env, trained: dict, info: dict) -> list[str]:
    """One sentence for each way in which another MuJoCo changes the environment.

    trained: the checkpoint's info; info: that of the evaluation.
    """
    model = getattr(env.unwrapped, "model", None)
    then = re.match(r"(\d+)\.(\d+)", trained_version("mujoco", trained))
    now = re.match(r"(\d+)\.(\d+)", running_version("mujoco"))
    if not hasattr(model, "geom_margin") or then is None or now is None:
        return []
    then = (int(then[1]), int(then[2]))
    now = (int(now[1]), int(now[2]))
    notes = []
    # Before 3.5 the larger of two margins counts, from 3.5 on their sum.
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
    """Prints what `load_dataset` says, the range of observations and a histogram of the returns."""
    try:
        arrays, _ = load_dataset(env, data)
    except UserError as error:
        if strip_version(env) in TASKS:  # a task always has an environment
            raise
        arrays, _ = load_dataset(env, data, need_env=False)
        print(f"            {str(error).removeprefix('error: ')}")
    obs = arrays["obs"]
    print(f"observation {obs.shape[1]} numbers, {obs.min():.4g} to {obs.max():.4g} in the data")
    print_returns(arrays["rew"], arrays["ends"])


def print_returns(rew: np.ndarray, ends: np.ndarray) -> None:
    """Prints the returns of the trajectories, as numbers and as a histogram of ten lines.

    Rows that `load_dataset` drops, such as those cut by a timeout, do not count.
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
    import common  # the module that the scripts import, not this program's

    try:
        common.main()
    except OSError as error:
        sys.exit(f"error: {error}")
