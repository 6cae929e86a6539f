"""Behaviour cloning by a script's own actor, with that script's flags, files and evaluation and without its critics.

    python benchmarks/cloning.py dac --env hopper-medium --total-steps 100000   # DAC's noise regression, one sample per action
    python benchmarks/cloning.py cped --env hopper-medium --total-steps 40000   # mean squared error of CPED's actor
    python benchmarks/cloning.py qdq --env hopper-medium --total-steps 30000    # likelihood of QDQ's Gaussian actor

So a row beside the script's own differs in the algorithm and in nothing else.
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cped
import dac
import qdq


class DiffusionCloning(dac.DAC):
    """DAC with eta so large that guidance is nothing, which needs no critic."""

    metrics = ("bc_loss",)

    def draw(self, batch_size: int) -> dac.Draws:
        t = torch.randint(1, self.args.diffusion_steps + 1, (batch_size,), device=self.device)
        return dac.Draws(None, t, torch.randn(batch_size, self.act_dim, device=self.device))

    def update(self, batch: dac.Batch, draws: dac.Draws) -> dict[str, torch.Tensor]:
        x = self.schedule.signal[draws.t][:, None] * batch.act + self.schedule.noise[draws.t][:, None] * draws.eps
        loss = (self.actor(batch.obs, x, draws.t) - draws.eps).square().mean()
        dac.cosine_lr(self.actor_adam, self.args.actor_lr, self.step / self.args.total_steps)
        dac.gradient_step(self.actor_adam, loss, self.args.max_grad_norm)
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


class GaussianCloning(qdq.QDQ):
    """QDQ's actor by maximum likelihood, with its cosine, without Q distribution and critics."""

    metrics = ("log_prob",)

    def update(self, stage: str, batch: Iterable[torch.Tensor], draws: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        self.steps[stage] += 1
        if stage != "policy":
            return {}
        batch = qdq.Batch(*batch)
        log_prob = torch.distributions.Normal(*self.actor(batch.obs)).log_prob(batch.act).sum(1).mean()
        qdq.cosine_lr(self.actor_adam, self.args.actor_lr, self.steps[stage] / self.args.total_steps)
        qdq.descend(self.actor_adam, -log_prob)
        return {"log_prob": log_prob}


SCRIPTS = {  # module, name and class of its agent, flags: one sample per action; the shortest earlier stages there are
    "dac": (dac, "DAC", DiffusionCloning, ["--num-eval-actions", "1"]),
    "cped": (cped, "CPED", DeterministicCloning, ["--flow-steps", "1", "--constraint", "schedule"]),
    "qdq": (qdq, "QDQ", GaussianCloning, ["--teacher-steps", "1", "--student-steps", "1"]),
}

if __name__ == "__main__":
    if sys.argv[1:2] not in ([name] for name in SCRIPTS):
        sys.exit("error: name the script whose actor is cloned, then its flags: python benchmarks/cloning.py dac, cped or qdq")
    script, name, agent, flags = SCRIPTS[sys.argv[1]]
    setattr(script, name, agent)
    script.ALGORITHM = f"cloning-{sys.argv[1]}"
    try:
        script.main([*sys.argv[2:], *flags])
    except script.UserError as error:
        sys.exit(f"error: {error}")
