"""What the flows of finished flow stages know: held-out log-likelihood beside a Gaussian's, and data against random actions.

    python benchmarks/likelihood.py runs/hopper-medium/cped/seed0-20260101-120000 --out benchmarks/results/likelihood.csv

One row per flow and one for the Gaussian with full covariance that fits its training rows best. All values are means in nats
over the 5 % of the rows that the flow did not learn from; `share` is how often the data's action is likelier than a random one.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cped
from common import UserError, load_dataset


@dataclass
class Args:
    flows: Annotated[tuple[Path, ...], tyro.conf.Positional]  # files flow.pt, or their run folders
    data: str | None = None  # where the dataset lies now, by default where the run found it
    out: Path = Path(__file__).resolve().parent / "results" / "likelihood.csv"  # table to write


@torch.no_grad()
def main(args: Args) -> None:
    table = []
    for path in args.flows:
        state = cped.load_checkpoint(path / "flow.pt" if path.is_dir() else path)
        arrays, info = load_dataset(state["args"]["env"], args.data or state["args"]["data"], need_env=False)
        if info["sha256"] != state["info"]["sha256"]:
            raise UserError(f"{path} was trained on {state['info']['id']}, not on {info['file']}", status=2)
        order, split = cped.shuffled_rows(len(arrays["rew"]))
        obs, act = (torch.as_tensor(arrays[name][order]) for name in ("obs", "act"))
        random = torch.rand(act[split:].shape, generator=torch.Generator().manual_seed(0)) * 2 - 1

        own = state["args"]
        agent = cped.CPED(obs.shape[1], act.shape[1], cped.Args(**own))
        agent.flow.load_state_dict(state["agent"]["flow"])
        x = torch.cat([obs, act], 1).double()
        gaussian = torch.distributions.MultivariateNormal(x[:split].mean(0), torch.cov(x[:split].T))
        models = {"gaussian": lambda o, a: gaussian.log_prob(torch.cat([o, a], 1).double())}  # noqa: B023
        for model, log_density in (models | {own["flow_type"]: agent.flow.log_density}).items():
            held_out, at_random = log_density(obs[split:], act[split:]), log_density(obs[split:], random)
            row = {"dataset": info["id"], "model": model, "updates": None, "flow_steps": None, "width": None}
            if model != "gaussian":  # a step of the flow falls on each disc_updates-th update
                steps = state["agent"]["step"] // own["disc_updates"]
                row |= {"updates": state["agent"]["step"], "flow_steps": steps, "width": own["flow_hidden_dim"]}
            row |= {"train": float(log_density(obs[:split:19], act[:split:19]).mean()), "held_out": float(held_out.mean())}
            row |= {"held_out_per_dim": row["held_out"] / x.shape[1], "random_actions": float(at_random.mean())}
            table.append(row | {"share": float((held_out > at_random).double().mean())})
            print(" ".join(f"{name}={value}" for name, value in table[-1].items()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(row for i, row in enumerate(table) if row not in table[:i])


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
