"""Makes offline datasets in the D4RL layout: trains SAC, keeps what it saw, rolls it out.

    pip install -r benchmarks/requirements.txt
    python benchmarks/collect.py --env hopper --quality medium-replay medium  # files in collected/
    python benchmarks/collect.py --env hopper --quality full-replay --total-steps 400000
    python benchmarks/collect.py --env walker2d --quality medium-expert --total-steps 1000000
    python benchmarks/collect.py --env hopper --quality medium --minari-id local/hopper/medium-v0

Qualities, after D4RL (Fu et al., arXiv:2004.07219):
  medium-replay   every transition of the training run, in order, until the medium policy is reached
  full-replay     every transition of the training run of --total-steps, in order
  medium          episodes of the medium policy: the first snapshot whose evaluation reaches
                  --medium-return
  expert          episodes of the snapshot with the best evaluation within --total-steps
  medium-expert   rows/2 of each, medium first
All policies sample their actions, as in SAC's training. Evaluation samples, too, so that
--medium-return is about the data.

    python benchmarks/collect.py --env pointmaze-umaze --rows 200000 \\
        --minari-id local/pointmaze/umaze-v0

A maze has one quality, play, and nothing is trained. From random places a noisy controller pushes
a point along the shortest way to random cells. It does not know the goal, which gives reward 1 and
ends the episode. Evaluation begins in the cell farthest from the goal. Mazes are written for Minari
only, because files in D4RL's layout do not carry their environments.

Files hold observations, actions, rewards (float32), terminals, timeouts (bool), one row per step.
Only whole episodes are written: each ends in a terminal or in a timeout, never in both. The
attributes record how the file was made. These are not the D4RL files, and a score on them is not a
D4RL score.

Everything can be killed and continued with the same command. Training goes on from its last
snapshot with the same result as without the break, and finished files are left alone.
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
import root  # noqa: F401
import torch
import tyro
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path
from tqdm import tqdm

from common import EVALUATION_ENVS, REFERENCE_RETURNS, build_env

try:
    from stable_baselines3 import SAC
except ImportError:
    sys.exit("error: stable-baselines3 is missing: pip install -r benchmarks/requirements.txt")

Rows = dict[str, np.ndarray]  # one row per step: the keys of DTYPES and next_observations
DTYPES = {"observations": "f4", "actions": "f4", "rewards": "f4", "terminals": "?", "timeouts": "?"}

# mean returns of D4RL's medium-v2 files
MEDIUM_RETURNS = {"hopper": 1420.0, "halfcheetah": 4770.0, "walker2d": 2850.0}
REPLAYS = ("medium-replay", "full-replay")  # made of the training run; the others are rolled out
# PointMaze of gymnasium-robotics: environment, its map, goal (row, column), steps of an episode
MAZES = {
    "pointmaze-umaze": ("PointMaze_UMaze-v3", "U_MAZE", (3, 1), 150),
    "pointmaze-medium": ("PointMaze_Medium-v3", "MEDIUM_MAZE", (6, 6), 400),
    "pointmaze-large": ("PointMaze_Large-v3", "LARGE_MAZE", (7, 10), 600),
}
MAZE_NOISE = 0.5  # standard deviation of the noise on the controller's force, which is in [-1, 1]


Env = Literal[
    "hopper", "halfcheetah", "walker2d", "pointmaze-umaze", "pointmaze-medium", "pointmaze-large"
]
Quality = Literal["medium-replay", "full-replay", "medium", "expert", "medium-expert"]


@dataclass
class Args:
    # what to make
    env: Env = "hopper"
    """Hopper-v4, HalfCheetah-v4 or Walker2d-v4; or a maze (uses --rows, --minari-id and --seed)"""
    quality: tuple[Quality, ...] = ("medium-replay", "medium")
    """one or more datasets to make, all from one training run"""
    rows: int = 1_000_000
    """minimum rows of a rolled-out file, which ends with the episode that reaches them"""
    out: Path = Path("collected")
    """folder of the files, named <env>-<quality>.hdf5"""
    minari_id: str | None = None
    """also write a local Minari dataset of this id, e.g. local/hopper/medium-v0; one --quality"""
    work_dir: Path = Path("runs/collect")
    """folder of the snapshots; those of a training run are in <work-dir>/<env>/seed<seed>"""
    # snapshots
    medium_return: float | None = None
    """mean return that makes a snapshot "medium"; by default that of D4RL's file"""
    eval_episodes: int = 20
    """episodes per evaluation of a snapshot"""
    snapshot_every: int = 5_000
    """environment steps between snapshots; each waits for the end of the episode"""
    total_steps: int = 300_000
    """environment steps of training, up to the next snapshot; medium stops once it is reached"""
    # Soft Actor-Critic
    seed: int = 0
    """seed of training, evaluation and rollouts"""
    learning_rate: float = 3e-4
    """Adam step size of actor, critics and temperature"""
    hidden: tuple[int, ...] = (128, 128)
    """widths of the hidden ReLU layers of actor and critics"""
    batch_size: int = 256
    """transitions per update"""
    discount: float = 0.99
    """discount factor gamma"""
    tau: float = 0.005
    """rate of the target critics"""
    learning_starts: int = 1_000
    """environment steps with uniform random actions, without updates"""
    steps_per_update: int = 2
    """environment steps per update; the updates are made at the end of each episode"""


class BehaviourSAC(SAC):
    """SAC that collects a whole episode, then makes one update per `steps_per_update` of its steps.

    Every snapshot thus falls between two episodes, and a resumed run cuts none.
    """

    steps_per_update: int

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        super().train(max(1, gradient_steps // self.steps_per_update), batch_size)


def fail(message: str) -> None:
    """Ends the program with one sentence and exit status 1."""
    sys.exit(f"error: {message}")


def make_env(env_id: str) -> gym.Env:
    """The environment of D4RL's v2 datasets, with Hopper's contacts as they were then."""
    return build_env({"env": env_id, "d4rl_contacts": env_id == EVALUATION_ENVS["hopper"]})


def derive_seed(*parts: int) -> int:
    """An independent 32-bit seed for each tuple of numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def episode_ends(rows: Rows) -> np.ndarray:
    """Index one past the last row of each episode."""
    return np.flatnonzero(rows["terminals"] | rows["timeouts"]) + 1


def episode_returns(rows: Rows) -> np.ndarray:
    sums = np.cumsum(rows["rewards"], dtype=np.float64)
    return np.diff(sums[episode_ends(rows) - 1], prepend=0.0)


def concatenate(parts: list[Rows]) -> Rows:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


# --------------------------------------------------------------- Rollouts


def rollout(
    model: SAC,
    env_id: str,
    seed: int,
    min_episodes: int = 1,
    min_rows: int = 1,
    label: str = "",
) -> Rows:
    """Whole episodes of the sampling policy until there are `min_episodes` and `min_rows`.

    Episodes run in parallel, so that one network call serves all. They are kept in the order in
    which they *started*; the order in which they end would favour short ones.
    With a label there is a progress bar.
    """
    parallel = min(20, max(min_episodes, min_rows // 100 + 1))
    envs = [make_env(env_id) for _ in range(parallel)]
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
                # falling in the very last step is a terminal
                timeout = truncated and not terminal
                running[i].append((obs[i], actions[i], reward, terminal, timeout, next_obs))
                obs[i] = next_obs
                if terminal or truncated:
                    finished[index[i]] = [np.array(column) for column in zip(*running[i])]
                    index[i] = max(index) + 1
                    running[i] = []
                    obs[i], _ = env.reset(seed=derive_seed(seed, 1 + index[i]))
            while kept in finished and (kept < min_episodes or rows < min_rows):
                rows += len(finished[kept][0])
                kept += 1
            bar.update(min(rows, min_rows) - bar.n)
    columns = zip(*(finished[episode] for episode in range(kept)))
    return dict(zip([*DTYPES, "next_observations"], map(np.concatenate, columns)))


# --------------------------------------------------------------- Training


def snapshots(work: Path, total_steps: int) -> dict[Path, float]:
    """Evaluated mean return of each finished snapshot folder up to `total_steps`, oldest first."""
    folders = sorted(path.parent for path in work.glob("[0-9]*/score.json"))
    scores = {}
    for folder in folders:
        score = json.loads((folder / "score.json").read_text())
        scores[folder] = score["mean_return"]
        if int(folder.name) >= total_steps:
            break
    return scores


def find_medium(work: Path, args: Args) -> Path | None:
    for folder, score in snapshots(work, args.total_steps).items():
        if score >= args.medium_return:
            return folder
    return None


def load_replay(folders: list[Path]) -> Rows:
    return concatenate([dict(np.load(folder / "replay.npz")) for folder in folders])


def train(args: Args, work: Path, until_medium: bool) -> None:
    """Trains SAC until the medium policy or for `total_steps`, a folder per `snapshot_every` steps.

    A folder <steps>/ holds the model with its optimisers, the transitions since the snapshot
    before, and the score. It appears under its name only when complete. Environment and random
    numbers start afresh at every snapshot, from a seed that depends on the step, so continuing
    from a folder gives exactly what an unbroken run gives.
    """
    env = make_env(EVALUATION_ENVS[args.env])
    model = load_or_make_model(args, work, env)
    bar = tqdm(
        total=args.total_steps,
        initial=model.num_timesteps,
        desc="SAC",
        unit="step",
        mininterval=1.0,
    )

    def count(*_) -> bool:
        bar.update(1)
        return True  # goes on

    with bar:
        while model.num_timesteps < args.total_steps:
            if until_medium and find_medium(work, args) is not None:
                break
            first = model.num_timesteps
            target = (first // args.snapshot_every + 1) * args.snapshot_every
            model.set_random_seed(derive_seed(args.seed, first))
            model._last_obs = None  # SB3's sign that the environment has to be reset
            model.learn(target - first, callback=count, reset_num_timesteps=False)
            mean_return = save_snapshot(args, work, model, first)
            bar.set_postfix_str(f"return {mean_return:.0f}")


def load_or_make_model(args: Args, work: Path, env: gym.Env) -> BehaviourSAC:
    """The newest snapshot with its replay buffer, or an untrained model."""
    # The buffer is the replay dataset, so it must never wrap; the last episode can go beyond the
    # last snapshot.
    capacity = args.total_steps + args.snapshot_every + env.spec.max_episode_steps
    folders = list(snapshots(work, args.total_steps))
    if folders:
        path = folders[-1] / "model.zip"
        model = BehaviourSAC.load(path, env=env, device="cpu", buffer_size=capacity)
        for key, values in load_replay(folders).items():
            getattr(model.replay_buffer, key)[: len(values), 0] = values
        model.replay_buffer.pos = model.num_timesteps
        return model
    model = BehaviourSAC(
        "MlpPolicy",
        env,
        device="cpu",
        seed=args.seed,
        buffer_size=capacity,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        gamma=args.discount,
        tau=args.tau,
        learning_starts=args.learning_starts,
        train_freq=(1, "episode"),
        gradient_steps=-1,
        policy_kwargs={"net_arch": list(args.hidden)},
    )
    model.steps_per_update = args.steps_per_update
    return model


def save_snapshot(args: Args, work: Path, model: BehaviourSAC, first: int) -> float:
    """Saves and evaluates the model; returns its mean return.

    first: step of the snapshot before.
    """
    steps = model.num_timesteps
    part = work / "part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    model.save(part / "model.zip")
    replay = {}
    for key in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        replay[key] = getattr(model.replay_buffer, key)[first:steps, 0]
    np.savez(part / "replay.npz", **replay)
    seed = derive_seed(args.seed, steps, 1)
    returns = episode_returns(rollout(model, EVALUATION_ENVS[args.env], seed, args.eval_episodes))
    score = {"steps": steps, "mean_return": returns.mean(), "std_return": returns.std()}
    (part / "score.json").write_text(json.dumps(score))
    os.replace(part, work / f"{steps:08d}")
    return returns.mean()


def training_recipe(args: Args) -> dict[str, object]:
    """All that determines the training run, which is only continued with the same recipe."""
    recipe = {
        "algorithm": "SAC, stable-baselines3, automatic temperature",
        "env_id": EVALUATION_ENVS[args.env],
    }
    for field in (
        "seed",
        "learning_rate",
        "batch_size",
        "discount",
        "tau",
        "learning_starts",
        "steps_per_update",
        "snapshot_every",
        "eval_episodes",
    ):
        recipe[field] = getattr(args, field)
    recipe["hidden"] = list(args.hidden)
    for package in ("gymnasium", "mujoco", "stable-baselines3", "torch", "numpy"):
        recipe[f"version_{package}"] = version(package)
    return recipe


# --------------------------------------------------------------- Datasets


def collect(args: Args, quality: str, work: Path) -> tuple[Rows, dict[str, object]]:
    """The rows of one dataset and a record of the snapshots they come from.

    Trains first if that is not done yet.
    """
    train(args, work, until_medium=quality in ("medium", "medium-replay"))
    scores = snapshots(work, args.total_steps)
    best = max(scores, key=scores.get)
    last = list(scores)[-1]
    medium = None
    if quality.startswith("medium"):
        medium = find_medium(work, args)
        if medium is None:
            fail(
                f"no snapshot within --total-steps {args.total_steps} reached --medium-return"
                f" {args.medium_return:g}; the best one, after {int(best.name)} steps, reached"
                f" {scores[best]:.1f}"
            )
    used = {
        "medium-replay": [medium],
        "full-replay": [last],
        "medium": [medium],
        "expert": [best],
        "medium-expert": [medium, best],
    }[quality]
    record = {
        "policy_steps": [int(folder.name) for folder in used],
        "policy_eval_returns": [scores[folder] for folder in used],
    }
    if quality in REPLAYS:
        rows = load_replay([folder for folder in scores if folder <= used[0]])
        # SB3 sets a timeout only where the episode did not end by itself
        rows["timeouts"] = rows["timeouts"].astype(bool)
        rows["terminals"] = rows["dones"].astype(bool) & ~rows["timeouts"]
        return rows, record
    parts = []
    for folder in used:
        steps = int(folder.name)
        model = BehaviourSAC.load(folder / "model.zip", device="cpu", buffer_size=1)
        part = rollout(
            model,
            EVALUATION_ENVS[args.env],
            derive_seed(args.seed, steps, 2),
            min_rows=args.rows // len(used),
            label=f"{quality}, step {steps}",
        )
        parts.append(part)
    return concatenate(parts), record


def write_hdf5(path: Path, rows: Rows, attributes: dict[str, object]) -> None:
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    with h5py.File(part, "w") as file:
        for key, dtype in DTYPES.items():
            data = rows[key].astype(dtype)
            # a chunk has one column, whose values change smoothly: the file is 7 % smaller
            chunks = (min(len(data), 16_384), *[1] * (data.ndim - 1))
            file.create_dataset(
                key, data=data, chunks=chunks, compression="gzip", compression_opts=9, shuffle=True
            )
        file.attrs.update(attributes)
    os.replace(part, path)


def minari_buffers(rows: Rows) -> list[EpisodeBuffer]:
    """T+1 observations per episode, the last being the true one after the last action."""
    buffers = []
    first = 0
    for index, end in enumerate(episode_ends(rows)):
        steps = slice(first, end)
        last = rows["next_observations"][end - 1 : end]
        buffer = EpisodeBuffer(
            id=index,
            observations=np.concatenate([rows["observations"][steps], last]),
            actions=rows["actions"][steps],
            rewards=rows["rewards"][steps],
            terminations=rows["terminals"][steps],
            truncations=rows["timeouts"][steps],
        )
        buffers.append(buffer)
        first = end
    return buffers


def write_minari(
    dataset_id: str,
    buffers: list[EpisodeBuffer],
    specs: tuple,
    scores: tuple[float, float],
    **texts: str,
) -> None:
    """Local Minari dataset; specs: environments of data and evaluation.

    scores: its reference returns (min, max).
    """
    namespace = dataset_id.rpartition("/")[0]
    home = get_dataset_path()
    if namespace and namespace not in list_local_namespaces():
        create_namespace(namespace)
    # Minari writes in place under the final name; a temporary folder keeps half a dataset out of
    # sight until it is complete
    with (
        warnings.catch_warnings(action="ignore"),
        tempfile.TemporaryDirectory(prefix=".collect", dir=home) as part,
    ):
        os.environ["MINARI_DATASETS_PATH"] = part
        try:
            minari.create_dataset_from_buffers(
                dataset_id,
                buffers,
                env=specs[0],
                eval_env=specs[1],
                ref_min_score=scores[0],
                ref_max_score=scores[1],
                requirements=[f"{name}=={version(name)}" for name in ("gymnasium", "mujoco")],
                **texts,
            )
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(home)
        os.replace(Path(part) / dataset_id, home / dataset_id)


# ------------------------------------------------------------------ Mazes


Cell = tuple[int, int]  # row and column


def way(free: set[Cell], start: Cell, target: Cell) -> list[Cell]:
    """A shortest way through neighbouring free cells, both ends included.

    By breadth-first search from the target.
    """
    following = {target: None}
    queue = deque([target])
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


def make_mazes(name: str) -> tuple[gym.Env, gym.Env, set[Cell]]:
    """The environments of data and of evaluation, and the free cells.

    Data start in any free cell, evaluation in the farthest one.
    """
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
        marks = {**dict.fromkeys(starts, "r"), goal: "g"}
        maze_map = []
        for i, row in enumerate(walls):
            maze_map.append([marks.get((i, j), int(wall)) for j, wall in enumerate(row)])
        env = gym.make(env_id, maze_map=maze_map, continuing_task=False, max_episode_steps=steps)
        envs.append(env)
    return *envs, free


def play(env: gym.Env, free: set[Cell], rng: np.random.Generator, seed: int) -> EpisodeBuffer:
    """One episode: a noisy spring pulls the point to one random cell after the other."""
    maze = env.unwrapped.maze
    cells = []  # the way that is left
    over = False
    obs, _ = env.reset(seed=seed)
    all_obs = [obs]
    steps = []
    while not over:
        position = obs["observation"][:2]
        velocity = obs["observation"][2:]
        while not cells or distance(maze, cells[0], position) < 0.3:
            cells = cells[1:]
            if not cells:
                here = tuple(maze.cell_xy_to_rowcol(position).tolist())
                cells = way(free, here, sorted(free)[rng.integers(len(free))])
        spring = 10 * (maze.cell_rowcol_to_xy(np.array(cells[0])) - position)
        pull = spring - velocity + MAZE_NOISE * rng.normal(size=2)
        action = pull.clip(-1, 1).astype(np.float32)
        obs, reward, terminal, truncated, _ = env.step(action)
        over = terminal or truncated
        steps.append((action, reward, terminal, truncated and not terminal))
        all_obs.append(obs)
    actions, rewards, terminations, truncations = map(np.array, zip(*steps))
    return EpisodeBuffer(
        observations={key: np.stack([obs[key] for obs in all_obs]) for key in obs},
        actions=actions,
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
    )


def distance(maze, cell: Cell, position: np.ndarray) -> float:
    """Between the middle of a cell and a point."""
    return float(np.linalg.norm(maze.cell_rowcol_to_xy(np.array(cell)) - position))


def make_maze(args: Args) -> None:
    """Makes a Minari dataset of wandering.

    Also prints how often the same wandering reaches the goal from the start of evaluation.
    """
    if get_dataset_path(args.minari_id).exists():
        fail(f"{args.minari_id} exists: choose another --minari-id, or remove it")
    data_env, eval_env, free = make_mazes(args.env)
    rng = np.random.default_rng(args.seed)
    buffers = []
    rows = 0
    with tqdm(total=args.rows, desc=args.env, unit="row") as bar:
        while rows < args.rows:
            buffer = play(data_env, free, rng, derive_seed(args.seed, 0, len(buffers)))
            buffers.append(buffer)
            rows += len(buffer.rewards)
            bar.update(len(buffer.rewards))
    tests = [play(eval_env, free, rng, derive_seed(args.seed, 1, i)) for i in range(200)]
    success = {
        "data": np.mean([buffer.rewards[-1] for buffer in buffers]),
        "evaluation": np.mean([buffer.rewards[-1] for buffer in tests]),
    }
    recipe = {"command": typed_command(), "success": success}
    for name in ("gymnasium-robotics", "mujoco", "numpy"):
        recipe[f"version_{name}"] = version(name)
    texts = {"algorithm_name": "waypoint controller", "description": json.dumps(recipe)}
    write_minari(args.minari_id, buffers, (data_env, eval_env), (0.0, 1.0), **texts)
    counts = f"{rows:,} rows, {len(buffers):,} episodes"
    print(f"{args.minari_id}: {counts}, {success['data']:.1%} with the goal reached")
    print(
        "from the start of evaluation, 200 episodes of the same behaviour reach it in"
        f" {success['evaluation']:.1%}"
    )


# ------------------------------------------------- Making what is missing


def typed_command() -> str:
    return f"python benchmarks/collect.py {shlex.join(sys.argv[1:])}"


def file_recipe(args: Args, quality: str) -> str:
    """All that determines the contents of a file."""
    rule = {"quality": quality}
    if quality == "full-replay":
        rule["total_steps"] = args.total_steps
    else:
        rule["medium_return"] = args.medium_return
    if quality not in REPLAYS:
        rule["rows_asked"] = args.rows
    if "expert" in quality:
        rule["total_steps"] = args.total_steps
    return json.dumps({**training_recipe(args), **rule})


def stored_recipes(args: Args, path: Path) -> dict[str, str | None]:
    """The recipes of the file and the Minari dataset, as far as they exist."""
    found = {}
    if path.exists():
        with h5py.File(path) as file:
            found[str(path)] = file.attrs.get("recipe")
    if args.minari_id is not None:
        metadata = get_dataset_path(args.minari_id) / "data" / "metadata.json"
        if metadata.exists():
            found[args.minari_id] = json.loads(metadata.read_text()).get("description")
    return found


def make(args: Args, quality: str, work: Path) -> None:
    """Makes those files of one quality that do not exist yet."""
    recipe = file_recipe(args, quality)
    path = args.out / f"{args.env}-{quality}.hdf5"
    found = stored_recipes(args, path)
    for name, stored in found.items():
        if stored != recipe:
            fail(
                f"{name} exists and was made with other settings: choose another --out or"
                " --minari-id, or remove it"
            )
        print(f"{name}: made before, left alone")
    if len(found) == 1 + (args.minari_id is not None):
        return

    rows, record = collect(args, quality, work)
    returns = episode_returns(rows)
    low, high = REFERENCE_RETURNS[args.env]
    attributes = {
        **record,
        "recipe": recipe,
        "command": typed_command(),
        "note": "made by benchmarks/collect.py; not D4RL data, and scores on it are not D4RL's",
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
    if args.minari_id is not None and args.minari_id not in found:
        spec = make_env(EVALUATION_ENVS[args.env]).spec
        texts = {"algorithm_name": "SAC", "description": recipe}
        write_minari(args.minari_id, minari_buffers(rows), (spec, spec), (low, high), **texts)
    counts = f"{attributes['rows']:,} rows, {len(returns):,} episodes"
    score = attributes["normalized_score"]
    print(f"{path}: {counts}, mean return {returns.mean():.1f}, normalised {score:.1f}")


def check_args(args: Args) -> None:
    """Ends the program if an argument is out of range or missing."""
    if args.env in MAZES and args.minari_id is None:
        fail(f"--env {args.env} needs --minari-id, e.g. local/{args.env.replace('-', '/')}-v0")
    valid = {
        "rows": args.rows >= 1,
        "eval_episodes": args.eval_episodes >= 1,
        "snapshot_every": args.snapshot_every >= 1,
        "total_steps": args.total_steps >= 1,
        "batch_size": args.batch_size >= 1,
        "steps_per_update": args.steps_per_update >= 1,
        "quality": len(args.quality) > 0,
        "seed": args.seed >= 0,
        "learning_rate": args.learning_rate > 0,
        "hidden": min(args.hidden, default=0) >= 1,
        "discount": 0 <= args.discount <= 1,
        "tau": 0 < args.tau <= 1,
        "learning_starts": args.learning_starts >= 0,
    }
    for name, fits in valid.items():
        if not fits:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range")
    if args.minari_id is not None:
        if len(args.quality) != 1 and args.env not in MAZES:
            fail("--minari-id names one dataset and needs exactly one --quality")
        if not re.fullmatch(r"([-\w]{2,}/)*[-\w]+-v\d+", args.minari_id):
            fail(f"--minari-id {args.minari_id} is not of the form namespace/name-v0")


def main(args: Args) -> None:
    check_args(args)
    if args.env in MAZES:
        make_maze(args)
        return
    if args.medium_return is None:
        args.medium_return = MEDIUM_RETURNS[args.env]
    # One thread makes the result repeatable, and the networks are too small to gain from more.
    torch.set_num_threads(1)
    work = args.work_dir / args.env / f"seed{args.seed}"
    recipe = training_recipe(args)
    if (work / "recipe.json").exists():
        stored = json.loads((work / "recipe.json").read_text())
        changed = [key for key in recipe if stored.get(key) != recipe[key]]
        if changed:
            fail(
                f"{work} was trained with other {', '.join(changed)}: choose another --work-dir or"
                " remove the folder"
            )
    try:
        work.mkdir(parents=True, exist_ok=True)
        (work / "recipe.json").write_text(json.dumps(recipe))
        args.out.mkdir(parents=True, exist_ok=True)
        for quality in args.quality:
            make(args, quality, work)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command goes on from the last snapshot")


if __name__ == "__main__":
    main(tyro.cli(Args))
