"""Behaviour cloning by a script's own actor, with that script's flags, files and evaluation and without its critics.

    python benchmarks/cloning.py dac --env hopper-medium --total-steps 100000   # DAC's noise regression, one sample per action
    python benchmarks/cloning.py cped --env hopper-medium --total-steps 40000   # mean squared error of CPED's actor

So a row beside the script's own differs in the algorithm and in nothing else.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cped
import dac


class DiffusionCloning(dac.DAC):
    """DAC with eta so large that guidance is nothing, which needs no critic."""

    metrics = ("bc_loss",)

    def draw(self, batch_size: int) -> dac.Draws:
        t = torch.randint(1, self.args.diffusion_steps + 1, (batch_size,), device=self.device)
        return dac.Draws(None, t, torch.randn(batch_size, self.act_dim, device=self.device))

    def update(self, batch: dac.Batch, draws: dac.Draws) -> dict[str, torch.Tensor]:
        x = self.schedule.signal[draws.t][:, None] * batch.act + self.schedule.noise[draws.t][:, None] * draws.eps
        loss = (self.actor(batch.obs, x, draws.t) - draws.eps).square().mean()
        dac.gradient_step(self.actor_adam, loss, self.args.max_grad_norm)
        self.actor_decay.step()
        self.step += 1
        return {"bc_loss": loss}


class DeterministicCloning(cped.CPED):
    """CPED's actor by regression, without flow and critics."""

    metrics = ("bc_loss",)

    def update(self, batch: cped.Batch, draws: cped.Draws) -> dict[str, torch.Tensor]:
        loss = (self.actor(batch.obs) - batch.act).square().mean()
        cped.gradient_step(self.actor_adam, loss, math.inf)
        self.step += 1
        return {"bc_loss": loss}


if __name__ == "__main__":
    if sys.argv[1:2] not in (["dac"], ["cped"]):
        sys.exit("error: name the script whose actor is cloned first: python benchmarks/cloning.py dac or cped, then its flags")
    if sys.argv[1] == "dac":
        script, dac.DAC, own = dac, DiffusionCloning, ["--num-eval-actions", "1"]
    else:  # the shortest flow stage there is, and no table of its densities
        script, cped.CPED, own = cped, DeterministicCloning, ["--flow-steps", "1", "--constraint", "schedule"]
    script.ALGORITHM = f"cloning-{sys.argv[1]}"
    try:
        script.main([*sys.argv[2:], *own])
    except script.UserError as error:
        sys.exit(f"error: {error}")
