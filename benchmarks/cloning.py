"""Behaviour cloning by DAC's diffusion policy: its noise regression alone, one sample at evaluation, no critics.

    python benchmarks/cloning.py --env hopper-medium --total-steps 100000

The flags, files and evaluation are those of dac.py, so a row beside DAC differs in the algorithm and in nothing else.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dac


class Cloning(dac.DAC):
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


if __name__ == "__main__":
    dac.ALGORITHM, dac.DAC = "cloning", Cloning
    try:
        dac.main([*sys.argv[1:], "--num-eval-actions", "1"])
    except dac.UserError as error:
        sys.exit(f"error: {error}")
