"""Pictures of the flow-GAN of cped.py on densities in the plane: data, samples of the flow, and its density.

    python benchmarks/density.py                             # all toys and flows into benchmarks/results/density/density.png
    python benchmarks/density.py --updates 500 --out try.png

One row per toy (mixture of Gaussians, rings, pinwheel, moons), in the square [-1, 1]^2, as actions are: cped.py's RealNVP only
ever expands, towards a wider prior. Columns: the data; NICE and RealNVP, each trained by likelihood alone and by likelihood plus
the adversarial term (hybrid), with 2,000 samples over the contours of the density. The titles give the mean log-density of
held-out data in nats. A coupling halves the plane into its two coordinates: "observation" and "action".
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cped

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FLOWS = [(flow_type, hybrid) for flow_type in ("nice", "realnvp") for hybrid in (False, True)]


@dataclass
class Args:
    out: Path = Path(__file__).resolve().parent / "results" / "density" / "density.png"  # the picture
    toys: tuple[Literal["gaussians", "rings", "pinwheel", "moons"], ...] = ("gaussians", "rings", "pinwheel", "moons")  # its rows
    updates: int = 6_000  # updates of each flow
    batch_size: int = 256  # rows per update
    num_couplings: int = 12  # coupling layers: the plane wants more than cped.py has
    hidden_dim: int = 64  # width of the couplings' networks
    lr: float = 1e-3  # step size of the discriminator and, at first, of the flow: a cosine takes it to a thirtieth
    disc_updates: int = 1  # steps of the discriminator per step of the flow
    seed: int = 0  # seed of data, initialisation and noise


def toy(name: str, rows: int, rng: np.random.Generator, blades: int = 5) -> np.ndarray:
    """Rows [N, 2] of a toy density, within about 4 of the origin."""
    if name == "gaussians":  # eight of them on a circle
        angle = rng.integers(8, size=rows) * np.pi / 4
        return 3 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.3 * rng.normal(size=(rows, 2))
    if name == "rings":
        angle, radius = rng.uniform(0, 2 * np.pi, rows), rng.integers(1, 4, size=rows) + 0.1 * rng.normal(size=rows)
        return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    if name == "moons":  # two half circles, each around one end of the other
        angle, lower = np.pi * rng.uniform(size=rows), rng.integers(2, size=rows)
        x, y = np.where(lower, 1 - np.cos(angle), np.cos(angle)), np.where(lower, 0.5 - np.sin(angle), np.sin(angle))
        return 2.4 * np.stack([x - 0.5, y - 0.25], 1) + 0.15 * rng.normal(size=(rows, 2))
    blade = (
        rng.integers(blades, size=rows) * 2 * np.pi / blades
    )  # pinwheel: stretched Gaussians, turned the more, the farther out
    along, across = 1.8 + 0.7 * rng.normal(size=rows), 0.15 * rng.normal(size=rows)
    angle = blade + 0.35 * along
    return np.stack([along * np.cos(angle) - across * np.sin(angle), along * np.sin(angle) + across * np.cos(angle)], 1)


def spread_weights(flow: cped.Flow) -> None:
    """Starts the couplings of NICE at torch's own weights, uniform within fan_in^-0.5, where cped.py has 0.01.

    From so small weights a density that is symmetric about the origin gives the shifts no gradient to first order, and the
    flow stays a rescaled logistic for longer than a picture can wait.
    """
    for layer in flow.nets.modules():
        if isinstance(layer, torch.nn.Linear) and not flow.affine:
            layer.reset_parameters()


def train(data: torch.Tensor, flow_type: str, hybrid: bool, args: Args) -> cped.CPED:
    """The flow stage of cped.py on rows [N, 2]; without hybrid, the likelihood weighs so much that nothing else counts."""
    settings = {"flow_type": flow_type, "num_couplings": args.num_couplings, "flow_hidden_dim": args.hidden_dim}
    settings |= {"flow_lr": args.lr, "flow_lr_end": args.lr / 30, "disc_lr": args.lr}
    settings |= {"disc_updates": args.disc_updates if hybrid else 1}
    torch.manual_seed(args.seed)
    agent = cped.CPED(1, 1, cped.Args(mle_weight=1.0 if hybrid else 1e9, flow_steps=args.updates, **settings))
    spread_weights(agent.flow)
    for _ in tqdm(range(args.updates), desc=f"{flow_type}{' hybrid' if hybrid else ''}"):
        rows = data[torch.randint(len(data), (args.batch_size,))]
        agent.update(cped.Batch(rows[:, :1], rows[:, 1:], None, None, None, None), agent.draw(args.batch_size))
    return agent


@torch.no_grad()
def main(args: Args) -> None:
    size = (3 * (1 + len(FLOWS)), 3.2 * len(args.toys))
    figure, axes = plt.subplots(len(args.toys), 1 + len(FLOWS), figsize=size, squeeze=False, sharex=True, sharey=True)
    axis = torch.linspace(-1, 1, 181)
    x, y = (c.reshape(-1, 1) for c in torch.meshgrid(axis, axis, indexing="xy"))
    for name, row in zip(args.toys, axes):
        rng = np.random.default_rng(args.seed)
        data, held_out = (torch.as_tensor(toy(name, n, rng) / 4.5, dtype=torch.float32) for n in (50_000, 5_000))
        row[0].scatter(*data[:2000].T, s=2, c="tab:blue", linewidths=0)
        row[0].set_ylabel(name)
        row[0].set_title("data")
        for (flow_type, hybrid), panel in zip(FLOWS, row[1:]):
            with torch.enable_grad():
                agent = train(data, flow_type, hybrid, args)
            score = agent.flow.log_density(held_out[:, :1], held_out[:, 1:]).mean().item()
            density = agent.flow.log_density(x, y).exp().view(len(axis), len(axis))
            panel.contourf(axis, axis, density, levels=20, cmap="Greys")
            samples = agent.flow.inverse(agent.draw(2000).latent)
            panel.scatter(*samples.T, s=2, c="tab:orange", linewidths=0, alpha=0.6)
            label = "NICE" if flow_type == "nice" else "RealNVP"
            panel.set_title(f"{label}, {'hybrid' if hybrid else 'likelihood'}: {score:.2f}")
            print(f"{name}, {label}, {'hybrid' if hybrid else 'likelihood'}: held-out log-density {score:.3f}")
    for panel in axes.flat:
        panel.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xticks=[], yticks=[])
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    print(f"picture in {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
