"""Trains BC, TD3+BC and IQL of the library d3rlpy on the scripts' data, with their evaluation.

    pip install -r benchmarks/requirements-d3rlpy.txt && pip install --no-deps d3rlpy==2.8.1
    python benchmarks/baselines.py td3_bc --env hopper-medium --seed 0
    python benchmarks/baselines.py iql --env antmaze-umaze --expectile 0.9 --temperature 10 \\
        --reward-transform minus_one

Settings are d3rlpy's own. td3_bc and iql are its reproductions of Fujimoto and Gu (2021) and of
Kostrikov et al. (2022), with batches of 256 and Adam step sizes of 3e-4. td3_bc standardises the
observations; in iql the actor's step size falls to zero by a cosine. bc has the defaults of
d3rlpy's BCConfig: a deterministic actor, squared error, batches of 100, an Adam step size of 1e-3.
All networks have two hidden layers of 256. Folders and files are as in the scripts, but a run
cannot be resumed.
"""

import hashlib
import inspect
import itertools
import json
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Literal

import numpy as np
import root  # noqa: F401
import tyro
from tqdm import tqdm

from common import evaluate, load_dataset
from dac import EVAL_METRICS, EVAL_SEED, FINAL_SEED, Log, stop_if_not_finite, transform_rewards

try:
    import d3rlpy
    from d3rlpy.dataset import TransitionMiniBatch
    from d3rlpy.optimizers import AdamFactory, CosineAnnealingLRFactory
    from d3rlpy.preprocessing import StandardObservationScaler
except ImportError:
    sys.exit("error: d3rlpy is missing: see the first lines of benchmarks/requirements-d3rlpy.txt")

METRICS = {
    "bc": ("loss",),
    "td3_bc": ("critic_loss", "actor_loss", "bc_loss"),
    "iql": ("q_loss", "v_loss", "actor_loss"),
}


@dataclass
class Args:
    algorithm: Annotated[Literal["bc", "td3_bc", "iql"], tyro.conf.Positional]
    env: str = "hopper-medium"  # D4RL task, Minari id or, with a file as --data, Gymnasium id
    data: str = "auto"  # auto, d4rl, minari, bundled, or the path of a file in D4RL's layout
    seed: int = 0  # seed of initialisation, batches and noise; evaluation has its own
    total_steps: int = 500_000  # updates, and length of the cosine of IQL's actor
    eval_every: int = 5_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per evaluation
    final_episodes: int = 100  # episodes that the last policy is scored on
    log_every: int = 1_000  # updates between log rows; each shows the newest minibatch
    run_dir: str = "runs"  # root folder of all runs
    # return_range: 1000 r / (range of trajectory returns); minus_one: r - 1; none: r; the default
    # is return_range for iql and none for the others
    reward_transform: Literal["return_range", "minus_one", "none"] | None = None
    alpha: float = 2.5  # td3_bc: weight of the normalised Q against the squared error
    expectile: float = 0.7  # iql: tau, the expectile that V learns
    temperature: float = 3.0  # iql: beta, inverse temperature of the actor's weights


def build(args: Args, obs: np.ndarray) -> "d3rlpy.algos.QLearningAlgoBase":
    if args.algorithm == "bc":
        config = d3rlpy.algos.BCConfig()
    elif args.algorithm == "td3_bc":
        scaler = StandardObservationScaler(mean=obs.mean(axis=0), std=obs.std(axis=0))
        config = d3rlpy.algos.TD3PlusBCConfig(alpha=args.alpha, observation_scaler=scaler)
    else:
        cosine = CosineAnnealingLRFactory(T_max=args.total_steps)
        config = d3rlpy.algos.IQLConfig(
            actor_optim_factory=AdamFactory(lr_scheduler_factory=cosine),
            expectile=args.expectile,
            weight_temp=args.temperature,
        )
    return config.create("cpu:0")


def new_folder(args: Args) -> Path:
    """As in the scripts: <run_dir>/<task>/<algorithm>/seed<k>-<time>, with a suffix if needed."""
    parent = Path(args.run_dir) / args.env / args.algorithm
    parent.mkdir(parents=True, exist_ok=True)
    name = time.strftime(f"seed{args.seed}-%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def digests() -> dict[str, str]:
    """SHA-256 of this file and of the two that it takes functions from."""
    sources = [__file__, inspect.getsourcefile(load_dataset), inspect.getsourcefile(Log)]
    return {
        Path(path).name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in sources
    }


def main(argv: list[str] | None = None) -> dict:
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.reward_transform is None:
        args.reward_transform = "return_range" if args.algorithm == "iql" else "none"

    # data: the loader's transitions as they are, not d3rlpy's MDPDataset. That takes the next
    # observation from the following row, which the loader has dropped at a timeout.
    arrays, info = load_dataset(args.env, args.data, need_env=True)
    info["versions"]["d3rlpy"] = d3rlpy.__version__
    obs = arrays["obs"]
    act = arrays["act"]
    rew = transform_rewards(arrays["rew"], arrays["ends"], args.reward_transform)[:, None]
    next_obs = arrays["next_obs"]
    terminal = 1 - arrays["not_done"][:, None]

    # agent
    d3rlpy.seed(args.seed)
    algo = build(args, obs)
    algo.create_impl(obs.shape[1:], act.shape[1])

    # run folder
    folder = new_folder(args)
    print(f"run folder  {folder}")
    words = sys.argv[1:] if argv is None else argv
    words = [Path(word).name if Path(word).exists() else word for word in words]
    record = {
        "args": asdict(args),
        "dataset": info,
        "device": "cpu",
        "sha256": digests(),
        "command": shlex.join(["python", "benchmarks/baselines.py", *words]),
        "d3rlpy": json.loads(algo.config.serialize()),
    }
    (folder / "args.json").write_text(json.dumps(record, indent=1))
    train_metrics = [f"train/{name}" for name in METRICS[args.algorithm]]
    columns = ["step", *train_metrics, *EVAL_METRICS, "time/updates_per_s"]
    log = Log(folder, columns, [])

    # training
    rng = np.random.default_rng(args.seed)
    size = algo.config.batch_size
    one_step = np.ones((size, 1), np.float32)  # from obs to next_obs
    metrics = {}
    started = window = time.perf_counter()
    for step in tqdm(range(1, args.total_steps + 1), unit=" updates", mininterval=0.5):
        i = rng.integers(len(obs), size=size)
        # none of the three uses the next action
        batch = TransitionMiniBatch(
            obs[i], act[i], rew[i], next_obs[i], act[i], terminal[i], one_step, []
        )
        metrics.update(algo.update(batch))  # TD3+BC's actor learns in every second update

        row = {"step": step}
        if step % args.log_every == 0:
            for name in METRICS[args.algorithm]:
                if name in metrics:
                    row[f"train/{name}"] = float(metrics[name])
            row["time/updates_per_s"] = args.log_every / (time.perf_counter() - window)
        if step % args.eval_every == 0 or step == args.total_steps:
            evaluation = evaluate(algo.predict, info, args.eval_episodes, EVAL_SEED + step)
            for name, values in evaluation.items():
                row[f"eval/{name}"] = float(values.mean())
            means = [f"{name} {values.mean():.1f}" for name, values in evaluation.items()]
            tqdm.write(f"update {step:,}: {', '.join(means)}")
        if len(row) > 1:
            stop_if_not_finite(row, step, folder)
            log.write(row)
            window = time.perf_counter()

    # result
    algo.save(str(folder / "model.d3"))
    result = {
        "algorithm": args.algorithm,
        "env": args.env,
        "seed": args.seed,
        "dataset": info["id"],
        "sha256": info["sha256"],
        "updates": args.total_steps,
        "seconds": time.perf_counter() - started,
        "versions": info["versions"],
        "device": "cpu",
    }
    for name in ("return", "normalized_score"):
        values = [row[f"eval/{name}"] for row in log.rows if f"eval/{name}" in row]
        if values:  # a task without reference returns has no normalized score
            result[f"{name}_last_5"] = mean(values[-5:])
            result[f"{name}_best"] = max(values)
    final = evaluate(algo.predict, info, args.final_episodes, FINAL_SEED)
    for name, values in final.items():
        result[f"final_{name}"] = float(values.mean())
        result[f"final_{name}_error"] = float(values.std() / len(values) ** 0.5)
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    log.close()
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
