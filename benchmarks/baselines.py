"""BC, TD3+BC and IQL of the library d3rlpy on the scripts' data and by their evaluation: peers that were run, not quoted.

    pip install -r benchmarks/requirements.txt && pip install --no-deps d3rlpy==2.8.1
    python benchmarks/baselines.py td3_bc --env hopper-medium --seed 0
    python benchmarks/baselines.py iql --env antmaze-umaze --expectile 0.9 --temperature 10 --reward-transform minus_one

Settings are d3rlpy's own. td3_bc and iql: its reproductions of Fujimoto and Gu (2021), Kostrikov et al. (2022), with batches of
256, Adam steps of 3e-4, and observations that are standardised, or an actor's step that falls to zero by a cosine. bc: the
defaults of its BCConfig, a deterministic actor by squared error, with batches of 100 and an Adam step of 1e-3. All networks
have two hidden layers of 256. Folders and files are those of the scripts, but a run cannot be resumed.
"""

import csv
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import d3rlpy
import numpy as np
import tyro
from d3rlpy.dataset import TransitionMiniBatch
from d3rlpy.optimizers import AdamFactory, CosineAnnealingLRFactory
from d3rlpy.preprocessing import StandardObservationScaler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, describe, evaluate, load_dataset
from dac import EVAL_COLUMNS, transform_rewards

METRICS = {"bc": ("loss",), "td3_bc": ("critic_loss", "actor_loss", "bc_loss"), "iql": ("q_loss", "v_loss", "actor_loss")}


@dataclass
class Args:
    algorithm: Annotated[Literal["bc", "td3_bc", "iql"], tyro.conf.Positional]
    env: str = "hopper-medium"  # task, Minari id or, with a file as data, any Gymnasium id
    data: str = "auto"  # auto, d4rl, minari, bundled, or the path of an HDF5 or NPZ file in D4RL's layout
    seed: int = 0  # seed of initialisation, batches and noise; evaluation has seeds of its own
    total_steps: int = 500_000  # updates, also the length of the cosine of IQL's actor
    eval_every: int = 5_000  # updates between evaluations, beginning before the first update
    eval_episodes: int = 10  # episodes per evaluation
    log_every: int = 1_000  # updates between log rows, which show the newest minibatch
    run_dir: Path = Path("runs")  # root folder of all runs
    # 1000 r / range of trajectory returns, r - 1 or r; by default return_range for iql and none for the others
    reward_transform: Literal["return_range", "minus_one", "none"] | None = None
    alpha: float = 2.5  # td3_bc: weight of the normalised Q beside the squared error
    expectile: float = 0.7  # iql: tau of the value's expectile regression
    temperature: float = 3.0  # iql: beta, inverse temperature of the actor's weights


def build(args: Args, obs: np.ndarray) -> d3rlpy.algos.QLearningAlgoBase:
    if args.algorithm == "bc":
        return d3rlpy.algos.BCConfig().create("cpu:0")
    if args.algorithm == "td3_bc":
        scaler = StandardObservationScaler(mean=obs.mean(0), std=obs.std(0))
        return d3rlpy.algos.TD3PlusBCConfig(alpha=args.alpha, observation_scaler=scaler).create("cpu:0")
    decay = AdamFactory(lr_scheduler_factory=CosineAnnealingLRFactory(T_max=args.total_steps))
    weights = {"expectile": args.expectile, "weight_temp": args.temperature}
    return d3rlpy.algos.IQLConfig(actor_optim_factory=decay, **weights).create("cpu:0")


def main(argv: list[str] | None = None) -> dict:
    args = tyro.cli(Args, args=argv, description=__doc__)
    args.reward_transform = args.reward_transform or ("return_range" if args.algorithm == "iql" else "none")
    arrays, info = load_dataset(args.env, args.data)
    info["versions"]["d3rlpy"] = d3rlpy.__version__
    print(describe(info))
    # The loader's transitions as they are: d3rlpy's MDPDataset takes the next observation from the following row, and where a
    # timeout has cut an episode the loader has dropped that row.
    rew = transform_rewards(arrays["rew"], arrays["ends"], args.reward_transform)
    obs, act, next_obs, terminal = arrays["obs"], arrays["act"], arrays["next_obs"], 1 - arrays["not_done"]
    d3rlpy.seed(args.seed)
    algo = build(args, obs)
    algo.create_impl(obs.shape[1:], act.shape[1])

    folder = args.run_dir / args.env / args.algorithm / time.strftime(f"seed{args.seed}-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    print(f"run folder  {folder}")
    stored = {name: value for name, value in asdict(args).items() if name != "run_dir"}
    facts = {"args": stored, "dataset": info, "d3rlpy": json.loads(algo.config.serialize())}
    (folder / "args.json").write_text(json.dumps(facts, indent=1))
    columns = ["step", *(f"train/{name}" for name in METRICS[args.algorithm]), *EVAL_COLUMNS, "time/updates_per_s"]
    table = csv.DictWriter((folder / "metrics.csv").open("w", buffering=1), columns)
    table.writeheader()

    rng, size, metrics, scores = np.random.default_rng(args.seed), algo.config.batch_size, {}, []
    started = window = time.perf_counter()
    for step in tqdm(range(args.total_steps + 1), unit=" updates", mininterval=0.5):
        row = {}
        if step:
            i = rng.integers(len(obs), size=size)
            ones = np.ones((size, 1), np.float32)  # steps from obs to next_obs; the next action is used by none of the three
            batch = TransitionMiniBatch(obs[i], act[i], rew[i, None], next_obs[i], act[i], terminal[i, None], ones, [])
            metrics |= algo.update(batch)  # TD3+BC's actor learns in every second update; in the others its values stay
            if step % args.log_every == 0:
                row = {f"train/{name}": metrics[name] for name in METRICS[args.algorithm]}
                if broken := [f"{name} is {value}" for name, value in row.items() if not math.isfinite(value)]:
                    raise UserError(f"{', '.join(broken)} at update {step}")
                row["time/updates_per_s"] = args.log_every / (time.perf_counter() - window)
        if step % args.eval_every == 0 or step == args.total_steps:
            result = evaluate(algo.predict, info, args.eval_episodes, seed=1_000_000 + step)  # the same episodes in all runs
            means = {f"eval/{name}": float(values.mean()) for name, values in result.items()}
            tqdm.write(f"update {step:,}: " + ", ".join(f"{name} {value:.2f}" for name, value in means.items()))
            scores += [means.get("eval/normalized_score", means["eval/return"])] * (step > 0)
            row |= means
        if row:
            table.writerow({"step": step} | row)
            window = time.perf_counter()

    algo.save(str(folder / "model.d3"))
    result = {"algorithm": args.algorithm, "env": args.env, "seed": args.seed, "dataset": info["id"], "sha256": info["sha256"]}
    result |= {"updates": step, "seconds": time.perf_counter() - started, "versions": info["versions"]}
    result |= {"final_score": float(np.mean(scores[-5:])), "last_score": scores[-1], "best_score": max(scores)}
    print(f"final score {result['final_score']:.1f} on {info['id']} (mean of the last {len(scores[-5:])} evaluations)")
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "status", 1))
