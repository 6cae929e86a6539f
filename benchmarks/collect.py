"""Make offline datasets in the D4RL layout: train a behaviour policy with SAC, keep what it saw, roll it out.

    pip install -r benchmarks/requirements.txt
    python benchmarks/collect.py --env hopper --quality medium-replay medium       # two files in collected/
    python benchmarks/collect.py --env walker2d --quality expert medium-expert --total-steps 1000000
    python benchmarks/collect.py --env hopper --quality medium --minari-id local/hopper/medium-v0

Qualities, after D4RL (Fu et al., arXiv:2004.07219):
  medium-replay   every transition of the training run, in order, until the medium policy is reached
  medium          episodes of the medium policy: the first snapshot whose evaluation reaches --medium-return
  expert          episodes of the snapshot with the best evaluation within --total-steps
  medium-expert   rows/2 of each, medium first
All policies act as SAC trained them, by sampling; evaluation samples too, so --medium-return speaks about the data.

    python benchmarks/collect.py --env pointmaze-umaze --rows 200000 --minari-id local/pointmaze/umaze-v0

A maze has one quality, play, and nothing is trained: from random places a controller pushes a point along the shortest way to
random cells, with noise, and does not know the goal, which gives reward 1 and ends the episode. Evaluation begins in the cell
farthest from the goal. This is written for Minari only, for files in D4RL's layout do not carry their environments.

Files hold observations, actions, rewards (float32), terminals, timeouts (bool), one row per step. Only whole episodes
are written: each ends in a terminal or in a timeout, never in both. The attributes record how the file was made. These
are not the D4RL files, and a score on them is not a D4RL score.

Everything may be killed and started again with the same command: training goes on from its last snapshot with the same
result as without the break, and finished files are left alone.
"""

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from collections import deque
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
import tyro
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path
from tqdm import tqdm

try:
    from stable_baselines3 import SAC
except ImportError:
    sys.exit("collect.py: error: stable-baselines3 is missing: pip install -r benchmarks/requirements.txt")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import EVALUATION_ENVS, REFERENCE_RETURNS

Rows = dict[str, np.ndarray]  # one row per step: the keys of DTYPES and next_observations
DTYPES = {"observations": "f4", "actions": "f4", "rewards": "f4", "terminals": "?", "timeouts": "?"}

MEDIUM_RETURNS = {"hopper": 1420.0, "halfcheetah": 4770.0, "walker2d": 2850.0}  # mean returns of D4RL's medium-v2 files
# evaluation environment, D4RL's reference scores (random, expert), and the mean return of D4RL's medium-v2 file
ENVS = {robot: (EVALUATION_ENVS[robot], *REFERENCE_RETURNS[robot], MEDIUM_RETURNS[robot]) for robot in MEDIUM_RETURNS}
# PointMaze of gymnasium-robotics: environment, name of its map, goal (row, column), steps of an episode
MAZES = {"pointmaze-umaze": ("PointMaze_UMaze-v3", "U_MAZE", (3, 1), 150)}
MAZES |= {"pointmaze-medium": ("PointMaze_Medium-v3", "MEDIUM_MAZE", (6, 6), 400)}
MAZES |= {"pointmaze-large": ("PointMaze_Large-v3", "LARGE_MAZE", (7, 10), 600)}
MAZE_NOISE = 0.5  # standard deviation of the noise on the controller's force, which is in [-1, 1]


@dataclass
class Args:
    # what to make
    env: Literal["hopper", "halfcheetah", "walker2d", "pointmaze-umaze", "pointmaze-medium", "pointmaze-large"] = "hopper"
    """robot; Hopper-v4, HalfCheetah-v4 or Walker2d-v4 of Gymnasium; or a maze, which uses --rows, --minari-id and --seed only"""
    quality: tuple[Literal["medium-replay", "medium", "expert", "medium-expert"], ...] = ("medium-replay", "medium")
    """one or more datasets to make, all from one training run"""
    rows: int = 1_000_000
    """least number of rows of a rolled-out file (it ends with the episode that reaches it); medium-replay ignores it"""
    out: Path = Path("collected")
    """folder of the files, named <env>-<quality>.hdf5"""
    minari_id: str | None = None
    """also write a local Minari dataset of this id, e.g. local/hopper/medium-v0; needs exactly one --quality"""
    work_dir: Path = Path("runs/collect")
    """folder of the snapshots; a training run is found again in <work-dir>/<env>/seed<seed>"""
    # which snapshot is what
    medium_return: float | None = None
    """mean return that makes a snapshot "medium"; default D4RL's: 1420 hopper, 4770 halfcheetah, 2850 walker2d"""
    eval_episodes: int = 20
    """episodes per evaluation of a snapshot"""
    snapshot_every: int = 5_000
    """environment steps between snapshots; one is taken at the first end of an episode after that"""
    total_steps: int = 300_000
    """environment steps of training, to the next snapshot; expert needs them all, medium stops when it is reached"""
    # Soft Actor-Critic
    seed: int = 0
    """seed of training, evaluation and rollouts"""
    learning_rate: float = 3e-4
    """of actor, critics and temperature (Adam)"""
    hidden: tuple[int, ...] = (128, 128)
    """widths of the hidden ReLU layers of actor and critics"""
    batch_size: int = 256
    """transitions per update"""
    discount: float = 0.99
    """gamma"""
    tau: float = 0.005
    """rate of the target critics"""
    learning_starts: int = 1_000
    """environment steps with uniform random actions, without updates"""
    steps_per_update: int = 2
    """environment steps per update; the updates are made at the end of each episode"""


class BehaviourSAC(SAC):
    """SAC that collects one whole episode, then makes one update per `steps_per_update` of its steps.

    Training in whole episodes lets every snapshot fall between two episodes, so a resumed run cuts none.
    """

    steps_per_update: int

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        super().train(max(1, gradient_steps // self.steps_per_update), batch_size)


def fail(message: str) -> None:
    """End the program with one sentence and exit code 1."""
    sys.exit(f"collect.py: error: {message}")


def make_env(env_id: str) -> gym.Env:
    """`gym.make` without the notice that v5 exists: v4 is the environment of D4RL's v2 datasets."""
    level, gym.logger.min_level = gym.logger.min_level, gym.logger.ERROR
    try:
        return gym.make(env_id)
    finally:
        gym.logger.min_level = level


def derive_seed(*parts: int) -> int:
    """An independent 32-bit seed for each tuple of numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def episode_ends(rows: Rows) -> np.ndarray:
    """Index one past the last row of each episode."""
    return np.flatnonzero(rows["terminals"] | rows["timeouts"]) + 1


def episode_returns(rows: Rows) -> np.ndarray:
    return np.diff(np.cumsum(rows["rewards"], dtype=np.float64)[episode_ends(rows) - 1], prepend=0.0)


def concatenate(parts: list[Rows]) -> Rows:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


# --- Rollouts ---------------------------------------------------------------------------------------------------------


def rollout(model: SAC, env_id: str, seed: int, min_episodes: int = 1, min_rows: int = 1, label: str = "") -> Rows:
    """Whole episodes of the sampling policy until there are `min_episodes` and `min_rows`; a progress bar if labelled.

    Episodes run in parallel so that one network call serves all, and are kept in the order in which they *started*:
    keeping them in the order in which they end would favour short ones.
    """
    envs = [make_env(env_id) for _ in range(min(20, max(min_episodes, min_rows // 100 + 1)))]
    torch.manual_seed(derive_seed(seed, 0))  # the policy's noise
    index = list(range(len(envs)))  # which episode each environment runs
    running: list[list[tuple]] = [[] for _ in envs]  # and its steps so far
    obs = [env.reset(seed=derive_seed(seed, 1 + i))[0] for i, env in enumerate(envs)]
    finished: dict[int, list[np.ndarray]] = {}  # episode -> its columns
    kept = rows = 0  # episodes, and their rows, before the oldest one that still runs
    with tqdm(total=min_rows, desc=label, unit="row", mininterval=1.0, disable=not label) as bar:
        while kept < min_episodes or rows < min_rows:
            actions, _ = model.predict(np.stack(obs), deterministic=False)
            for i, env in enumerate(envs):
                next_obs, reward, terminal, truncated, _ = env.step(actions[i])
                timeout = truncated and not terminal  # falling in the very last step is a terminal
                running[i].append((obs[i], actions[i], reward, terminal, timeout, next_obs))
                obs[i] = next_obs
                if terminal or truncated:
                    finished[index[i]] = [np.array(column) for column in zip(*running[i])]
                    index[i], running[i] = max(index) + 1, []
                    obs[i], _ = env.reset(seed=derive_seed(seed, 1 + index[i]))
            while kept in finished and (kept < min_episodes or rows < min_rows):
                rows += len(finished[kept][0])
                kept += 1
            bar.update(min(rows, min_rows) - bar.n)
    columns = zip(*(finished[episode] for episode in range(kept)))
    return dict(zip([*DTYPES, "next_observations"], map(np.concatenate, columns)))


# --- Training ---------------------------------------------------------------------------------------------------------


def snapshots(work: Path, total_steps: int) -> dict[Path, float]:
    """Evaluated mean return of each finished snapshot folder up to `total_steps`, oldest first."""
    folders = sorted(path.parent for path in work.glob("[0-9]*/score.json"))
    within = [f for i, f in enumerate(folders) if i == 0 or int(folders[i - 1].name) < total_steps]
    return {folder: json.loads((folder / "score.json").read_text())["mean_return"] for folder in within}


def find_medium(work: Path, args: Args) -> Path | None:
    scores = snapshots(work, args.total_steps)
    return next((folder for folder, score in scores.items() if score >= args.medium_return), None)


def load_replay(folders: list[Path]) -> Rows:
    return concatenate([dict(np.load(folder / "replay.npz")) for folder in folders])


def train(args: Args, work: Path, until_medium: bool) -> None:
    """Train SAC, one snapshot folder per `snapshot_every` steps, until the medium policy or for `total_steps`.

    A folder <steps>/ holds the model with its optimisers, the transitions since the snapshot before, and the score. It
    appears under its name only when complete. Environment and random numbers start afresh at every snapshot, from a
    seed that depends on the step, so continuing from a folder gives exactly what an unbroken run gives.
    """
    env = make_env(ENVS[args.env][0])
    # the buffer never wraps, for it is the medium-replay dataset; the last episode may pass the last snapshot
    capacity = args.total_steps + args.snapshot_every + env.spec.max_episode_steps
    folders = list(snapshots(work, args.total_steps))
    if folders:
        model = BehaviourSAC.load(folders[-1] / "model.zip", env=env, device="cpu", buffer_size=capacity)
        for key, values in load_replay(folders).items():
            getattr(model.replay_buffer, key)[: len(values), 0] = values
        model.replay_buffer.pos = model.num_timesteps
    else:
        model = BehaviourSAC(
            "MlpPolicy", env, device="cpu", seed=args.seed, buffer_size=capacity, learning_rate=args.learning_rate,
            batch_size=args.batch_size, gamma=args.discount, tau=args.tau, learning_starts=args.learning_starts,
            train_freq=(1, "episode"), gradient_steps=-1, policy_kwargs={"net_arch": list(args.hidden)},
        )  # fmt: skip
        model.steps_per_update = args.steps_per_update
    with tqdm(total=args.total_steps, initial=model.num_timesteps, desc="SAC", unit="step", mininterval=1.0) as bar:
        while model.num_timesteps < args.total_steps and not (until_medium and find_medium(work, args)):
            first = model.num_timesteps
            target = (first // args.snapshot_every + 1) * args.snapshot_every
            model.set_random_seed(derive_seed(args.seed, first))
            model._last_obs = None  # SB3's sign that the environment has to be reset
            model.learn(target - first, callback=lambda *_: bar.update(1) or True, reset_num_timesteps=False)
            steps = model.num_timesteps
            part = work / "part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            model.save(part / "model.zip")
            keys = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
            np.savez(part / "replay.npz", **{key: getattr(model.replay_buffer, key)[first:steps, 0] for key in keys})
            returns = episode_returns(rollout(model, env.spec.id, derive_seed(args.seed, steps, 1), args.eval_episodes))
            score = {"steps": steps, "mean_return": returns.mean(), "std_return": returns.std()}
            (part / "score.json").write_text(json.dumps(score))
            os.replace(part, work / f"{steps:08d}")
            bar.set_postfix_str(f"return {returns.mean():.0f}")


def training_recipe(args: Args) -> dict[str, object]:
    """All that decides what the training run does; a run is only continued with the same recipe."""
    packages = ("gymnasium", "mujoco", "stable-baselines3", "torch", "numpy")
    fields = ("seed", "learning_rate", "batch_size", "discount", "tau", "learning_starts", "steps_per_update",
              "snapshot_every", "eval_episodes")  # fmt: skip
    return (
        {"algorithm": "SAC, stable-baselines3, automatic temperature", "env_id": ENVS[args.env][0]}
        | {field: getattr(args, field) for field in fields}
        | {"hidden": list(args.hidden)}
        | {f"version_{package}": version(package) for package in packages}
    )


# --- Datasets ---------------------------------------------------------------------------------------------------------


def collect(args: Args, quality: str, work: Path) -> tuple[Rows, dict[str, object]]:
    """The rows of one dataset and a record of the snapshots they come from; trains first where that is still to do."""
    train(args, work, until_medium="expert" not in quality)
    scores = snapshots(work, args.total_steps)
    best, medium = max(scores, key=scores.get), find_medium(work, args)
    if medium is None and quality != "expert":
        fail(
            f"no snapshot within --total-steps {args.total_steps} reached --medium-return {args.medium_return:g}; "
            f"the best one, after {int(best.name)} steps, reached {scores[best]:.1f}"
        )
    used = {"expert": [best], "medium-expert": [medium, best]}.get(quality, [medium])
    record = {"policy_steps": [int(folder.name) for folder in used], "policy_eval_returns": [scores[f] for f in used]}
    if quality == "medium-replay":
        rows = load_replay([folder for folder in scores if folder <= medium])
        timeouts = rows["timeouts"].astype(bool)  # SB3 sets it only where the episode did not end by itself
        return rows | {"terminals": rows["dones"].astype(bool) & ~timeouts, "timeouts": timeouts}, record
    parts = []
    for folder in used:
        model = BehaviourSAC.load(folder / "model.zip", device="cpu", buffer_size=1)
        seed, label = derive_seed(args.seed, int(folder.name), 2), f"{quality}, step {int(folder.name)}"
        parts.append(rollout(model, ENVS[args.env][0], seed, min_rows=args.rows // len(used), label=label))
    return concatenate(parts), record


def write_hdf5(path: Path, rows: Rows, attributes: dict[str, object]) -> None:
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    with h5py.File(part, "w") as file:
        for key, dtype in DTYPES.items():
            data = rows[key].astype(dtype)
            # one column to a chunk: its values change smoothly, and the file gets 7 % smaller than with rows in a chunk
            chunks = (min(len(data), 16_384), *[1] * (data.ndim - 1))
            file.create_dataset(key, data=data, chunks=chunks, compression="gzip", compression_opts=9, shuffle=True)
        file.attrs.update(attributes)
    os.replace(part, path)


def minari_buffers(rows: Rows) -> list[EpisodeBuffer]:
    """T+1 observations per episode, the last being the true one after the last action."""
    buffers, first = [], 0
    for index, end in enumerate(episode_ends(rows)):
        steps, first = slice(first, end), end
        observations = np.concatenate([rows["observations"][steps], rows["next_observations"][end - 1 : end]])
        flags = {"terminations": rows["terminals"][steps], "truncations": rows["timeouts"][steps]}
        actions, rewards = rows["actions"][steps], rows["rewards"][steps]
        buffers.append(EpisodeBuffer(id=index, observations=observations, actions=actions, rewards=rewards, **flags))
    return buffers


def write_minari(dataset_id: str, buffers: list[EpisodeBuffer], specs: tuple, scores: tuple[float, float], **texts: str) -> None:
    """Local Minari dataset; specs: environments of data and evaluation; scores: its reference returns (min, max)."""
    namespace, root = dataset_id.rpartition("/")[0], get_dataset_path()
    if namespace and namespace not in list_local_namespaces():
        create_namespace(namespace)
    # Minari writes in place under the final name; a root of its own until then keeps half a dataset out of sight
    with warnings.catch_warnings(action="ignore"), tempfile.TemporaryDirectory(prefix=".collect", dir=root) as part:
        os.environ["MINARI_DATASETS_PATH"] = part
        try:
            minari.create_dataset_from_buffers(
                dataset_id, buffers, env=specs[0], eval_env=specs[1], ref_min_score=scores[0], ref_max_score=scores[1],
                requirements=[f"{name}=={version(name)}" for name in ("gymnasium", "mujoco")], **texts,
            )  # fmt: skip
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(root)
        os.replace(Path(part) / dataset_id, root / dataset_id)


# --- Mazes ------------------------------------------------------------------------------------------------------------


def way(free: set[tuple[int, int]], start: tuple[int, int], target: tuple[int, int]) -> list[tuple[int, int]]:
    """A shortest way through neighbouring free cells, both ends included, by breadth-first search from the target."""
    following, queue = {target: None}, deque([target])
    while queue:
        i, j = cell = queue.popleft()
        for neighbour in ((i, j + 1), (i + 1, j), (i, j - 1), (i - 1, j)):
            if neighbour in free and neighbour not in following:
                following[neighbour] = cell
                queue.append(neighbour)
    cells = [start]
    while cells[-1] != target:
        cells.append(following[cells[-1]])
    return cells


def make_mazes(name: str) -> tuple[gym.Env, gym.Env, set[tuple[int, int]]]:
    """The environments of data (starts in any free cell) and of evaluation (in the farthest one), and the free cells."""
    try:
        import gymnasium_robotics
    except ImportError:
        fail("gymnasium-robotics is missing: pip install -r benchmarks/requirements.txt")
    gym.register_envs(gymnasium_robotics)
    env_id, map_name, goal, steps = MAZES[name]
    walls = getattr(gymnasium_robotics.envs.maze.maps, map_name)
    free = {(i, j) for i, row in enumerate(walls) for j, wall in enumerate(row) if wall == 0}
    farthest = max(sorted(free), key=lambda cell: len(way(free, cell, goal)))
    envs = []
    for starts in (free, {farthest}):
        marks = dict.fromkeys(starts, "r") | {goal: "g"}
        maze_map = [[marks.get((i, j), int(wall)) for j, wall in enumerate(row)] for i, row in enumerate(walls)]
        envs.append(gym.make(env_id, maze_map=maze_map, continuing_task=False, max_episode_steps=steps))
    return *envs, free


def play(env: gym.Env, free: set[tuple[int, int]], rng: np.random.Generator, seed: int) -> EpisodeBuffer:
    """One episode: a noisy spring pulls the point from cell to cell, along a way to one random cell after the other."""
    maze, cells, over = env.unwrapped.maze, [], False
    obs, _ = env.reset(seed=seed)
    steps, all_obs = [], [obs]
    while not over:
        position, velocity = obs["observation"][:2], obs["observation"][2:]
        while not cells or np.linalg.norm(maze.cell_rowcol_to_xy(np.array(cells[0])) - position) < 0.3:
            cells = cells[1:] or way(
                free, tuple(maze.cell_xy_to_rowcol(position).tolist()), sorted(free)[rng.integers(len(free))]
            )
        pull = 10 * (maze.cell_rowcol_to_xy(np.array(cells[0])) - position) - velocity + MAZE_NOISE * rng.normal(size=2)
        action = pull.clip(-1, 1).astype(np.float32)
        obs, reward, terminal, truncated, _ = env.step(action)
        over = terminal or truncated
        steps.append((action, reward, terminal, truncated and not terminal))
        all_obs.append(obs)
    observations = {key: np.stack([obs[key] for obs in all_obs]) for key in obs}
    columns = dict(zip(("actions", "rewards", "terminations", "truncations"), map(np.array, zip(*steps))))
    return EpisodeBuffer(observations=observations, **columns)


def make_maze(args: Args) -> None:
    """A Minari dataset of wandering, and how often the same wandering reaches the goal from where evaluation begins."""
    if get_dataset_path(args.minari_id).exists():
        fail(f"{args.minari_id} exists: choose another --minari-id, or remove it")
    (data_env, eval_env, free), rng = make_mazes(args.env), np.random.default_rng(args.seed)
    buffers, rows = [], 0
    with tqdm(total=args.rows, desc=args.env, unit="row") as bar:
        while rows < args.rows:
            buffers.append(play(data_env, free, rng, derive_seed(args.seed, 0, len(buffers))))
            rows += len(buffers[-1].rewards)
            bar.update(len(buffers[-1].rewards))
    success = {"data": np.mean([buffer.rewards[-1] for buffer in buffers])}
    success["evaluation"] = np.mean([play(eval_env, free, rng, derive_seed(args.seed, 1, i)).rewards[-1] for i in range(200)])
    recipe = {"command": f"python benchmarks/collect.py {shlex.join(sys.argv[1:])}", "success": success}
    recipe |= {f"version_{name}": version(name) for name in ("gymnasium-robotics", "mujoco", "numpy")}
    texts = {"algorithm_name": "waypoint controller", "description": json.dumps(recipe)}
    write_minari(args.minari_id, buffers, (data_env, eval_env), (0.0, 1.0), **texts)
    print(f"{args.minari_id}: {rows:,} rows, {len(buffers):,} episodes, {success['data']:.1%} with the goal reached")
    print(f"from the start of evaluation, 200 episodes of the same behaviour reach it in {success['evaluation']:.1%}")


# --- Making what is missing -------------------------------------------------------------------------------------------


def make(args: Args, quality: str, work: Path) -> None:
    """Make those files of one quality that do not exist yet."""
    rule = {"quality": quality, "medium_return": args.medium_return}
    if quality != "medium-replay":
        rule["rows_asked"] = args.rows
    if "expert" in quality:
        rule["total_steps"] = args.total_steps
    recipe = json.dumps(training_recipe(args) | rule)
    path = args.out / f"{args.env}-{quality}.hdf5"
    found = {}  # the recipe of each file that exists already
    if path.exists():
        with h5py.File(path) as file:
            found[str(path)] = file.attrs.get("recipe")
    if args.minari_id and (metadata := get_dataset_path(args.minari_id) / "data" / "metadata.json").exists():
        found[args.minari_id] = json.loads(metadata.read_text()).get("description")
    for name, stored in found.items():
        if stored != recipe:
            fail(f"{name} exists and was made with other settings: choose another --out or --minari-id, or remove it")
        print(f"{name}: made before, left alone")
    if len(found) == 1 + (args.minari_id is not None):
        return
    rows, record = collect(args, quality, work)
    returns = episode_returns(rows)
    _, low, high, _ = ENVS[args.env]
    attributes = record | {
        "recipe": recipe,
        "command": f"python benchmarks/collect.py {shlex.join(sys.argv[1:])}",
        "note": "made by benchmarks/collect.py; not D4RL data, and a score on it is not a D4RL score",
        "rows": len(rows["rewards"]),
        "episodes": len(returns),
        "terminals": int(rows["terminals"].sum()),
        "timeouts": int(rows["timeouts"].sum()),
        "mean_return": returns.mean(),
        "min_return": returns.min(),
        "max_return": returns.max(),
        "normalized_score": 100 * (returns.mean() - low) / (high - low),
    }
    if str(path) not in found:
        write_hdf5(path, rows, attributes)
    if args.minari_id and args.minari_id not in found:
        spec = make_env(ENVS[args.env][0]).spec
        write_minari(args.minari_id, minari_buffers(rows), (spec, spec), (low, high), algorithm_name="SAC", description=recipe)
    summary = f"{len(rows['rewards']):,} rows, {len(returns):,} episodes, mean return {returns.mean():.1f}"
    print(f"{path}: {summary}, normalised {attributes['normalized_score']:.1f}")


def main(args: Args) -> None:
    if args.env in MAZES and args.minari_id is None:
        fail(f"--env {args.env} needs --minari-id, e.g. local/{args.env.replace('-', '/')}-v0")
    if args.medium_return is None and args.env in ENVS:
        args.medium_return = ENVS[args.env][3]
    counts = ("rows", "eval_episodes", "snapshot_every", "total_steps", "batch_size", "steps_per_update")
    valid = {name: getattr(args, name) >= 1 for name in counts} | {
        "quality": len(args.quality) > 0,
        "seed": args.seed >= 0,
        "learning_rate": args.learning_rate > 0,
        "hidden": min(args.hidden, default=0) >= 1,
        "discount": 0 <= args.discount <= 1,
        "tau": 0 < args.tau <= 1,
        "learning_starts": args.learning_starts >= 0,
    }
    for name in valid:
        if not valid[name]:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range")
    if args.minari_id is not None:
        if len(args.quality) != 1 and args.env in ENVS:
            fail("--minari-id names one dataset and needs exactly one --quality")
        if not re.fullmatch(r"([-\w]{2,}/)*[-\w]+-v\d+", args.minari_id):
            fail(f"--minari-id {args.minari_id} is not of the form namespace/name-v0")
    if args.env in MAZES:
        return make_maze(args)
    torch.set_num_threads(1)  # the networks are too small to gain from more, and one thread makes the result repeatable
    work = args.work_dir / args.env / f"seed{args.seed}"
    recipe = training_recipe(args)
    if (work / "recipe.json").exists():
        stored = json.loads((work / "recipe.json").read_text())
        changed = [key for key in recipe if stored.get(key) != recipe[key]]
        if changed:
            fail(f"{work} was trained with other {', '.join(changed)}: choose another --work-dir or remove the folder")
    try:
        work.mkdir(parents=True, exist_ok=True)
        (work / "recipe.json").write_text(json.dumps(recipe))
        args.out.mkdir(parents=True, exist_ok=True)
        for quality in args.quality:
            make(args, quality, work)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("collect.py: interrupted; the same command goes on from the last snapshot")


if __name__ == "__main__":
    main(tyro.cli(Args))
