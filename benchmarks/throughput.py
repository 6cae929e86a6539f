"""How fast are the three scripts? Updates per second of every stage, and what the matrix products alone would allow.

    python benchmarks/throughput.py                                    # everything, eager and compiled: ten minutes on two cores
    python benchmarks/throughput.py --scripts cped --modes eager       # one script
    python benchmarks/throughput.py --device cuda --seconds 1          # on a GPU, where --compile makes each update a CUDA graph

Random rows of the sizes of a task take the place of its dataset: the speed is the same. Each stage runs in a process of its own
with the published settings. A row of the table, and a line of throughput.jsonl in --out, has for each
  updates/s     median of the windows, after a warm-up, draws of batch and noise included, evaluation and logging not
  CPU s/update  of all threads
  memory        largest resident memory of the process; on CUDA the largest allocation there
  GFLOP/update  of all matrix products, counted
  floor         updates/s if these products alone were done, each at the speed that its shape reaches here by itself
  share         updates/s by floor
"""

import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cped
import dac
import qdq
from common import evaluate, task_facts

AGENTS = {"dac": (dac, dac.DAC), "qdq": (qdq, qdq.QDQ), "cped": (cped, cped.CPED)}
STAGES = {"dac": ("policy",), "qdq": ("teacher", "student", "policy"), "cped": ("flow", "policy")}
ROWS = 100_000  # of the random dataset


@dataclass
class Args:
    scripts: tuple[Literal["dac", "qdq", "cped"], ...] = ("dac", "qdq", "cped")  # which to measure
    modes: tuple[Literal["eager", "compile"], ...] = ("eager", "compile")  # of each
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    task: str = "hopper-medium"  # its preset is measured
    obs_dim: int = 11  # sizes of its observations
    act_dim: int = 3  # and actions
    windows: int = 5  # per stage
    seconds: float = 4.0  # per window
    evaluation: bool = True  # also time an evaluation of ten episodes of 1,000 steps
    out: Path = Path(__file__).resolve().parent / "results"  # folder of throughput.md and throughput.jsonl


class Products(TorchDispatchMode):
    """Counts the matrix products that run inside: (batch, m, k, n) -> how many."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = args[-2:] if name in ("mm", "bmm") else args[1:3]
            self.shapes[(a.shape[0] if a.ndim == 3 else 1, a.shape[-2], a.shape[-1], b.shape[-1])] += 1
        return func(*args, **(kwargs or {}))


def make_step(script: str, stage: str, compiled: bool, args: Args, device: torch.device) -> Callable[[], None]:
    """One update of a stage, with the draws of its batch and noise, in the state in which all of its parts are at work."""
    module, agent_type = AGENTS[script]
    settings = module.Args(**(module.PRESETS.get(args.task, {}) | {"compile": compiled}))
    obs, next_obs = torch.randn(2, ROWS, args.obs_dim, device=device)
    act, rew, ones = torch.rand(ROWS, args.act_dim, device=device) * 2 - 1, torch.rand(ROWS, device=device), torch.ones(ROWS)
    columns = {"obs": obs, "act": act, "rew": rew, "next_obs": next_obs, "not_done": ones.to(device), "nll": rew}
    data = module.Batch(*(columns[name] for name in module.Batch._fields))
    windows = (torch.cat([obs, act], 1), rew[:, None])
    agent = agent_type(args.obs_dim, args.act_dim, settings, device)
    if script == "cped" and stage == "policy":
        agent.step = settings.flow_steps + settings.actor_q_start

    def step() -> None:
        index = torch.randint(ROWS, (settings.batch_size,), device=device)
        if script == "qdq":
            rows = [column[index] for column in (data if stage == "policy" else windows)]
            agent.update(stage, rows, agent.draw(stage, settings.batch_size))
        else:
            agent.update(module.Batch(*(column[index] for column in data)), agent.draw(settings.batch_size))

    return step


def seconds_of(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def floor_seconds(shapes: Counter, device: torch.device) -> float:
    """Seconds of the counted products, each shape measured by itself; those below 1 % of the arithmetic are left out."""
    flops = {shape: 2 * count * torch.Size(shape).numel() for shape, count in shapes.items()}
    total = 0.0
    for shape in (shape for shape in shapes if flops[shape] > 0.01 * sum(flops.values())):
        batch, m, k, n = shape
        a, b = torch.randn(batch, m, k, device=device), torch.randn(batch, k, n, device=device)
        repeats = max(3, int(3e8 // (flops[shape] // shapes[shape])))
        product = torch.bmm if batch > 1 else lambda a, b: torch.mm(a[0], b[0])
        runs = [seconds_of(lambda a=a, b=b, product=product: product(a, b), repeats, device) for _ in range(10)]
        total += shapes[shape] * min(runs[1:]) / repeats
    return total


def measure(script: str, stage: str, mode: str, args: Args) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    torch.manual_seed(0)
    products, eager = Products(), make_step(script, stage, False, args, device)
    cycle = 10  # updates after which everything that is delayed has moved as often as it does on average
    with products:
        for _ in range(cycle):
            eager()
    floor = cycle / floor_seconds(products.shapes, device)
    step = make_step(script, stage, mode == "compile", args, device)
    seconds_of(step, 4 * cycle if device.type == "cuda" else cycle, device)  # compiles; on CUDA records the graphs, too
    repeats = cycle * max(1, round(args.seconds * cycle / seconds_of(step, cycle, device) / cycle))
    cpu = time.process_time()
    rates = [repeats / seconds_of(step, repeats, device) for _ in range(args.windows)]
    cpu = (time.process_time() - cpu) / (repeats * args.windows)
    rate = statistics.median(rates)
    memory = (
        torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    gflop = sum(2e-9 * count * torch.Size(shape).numel() for shape, count in products.shapes.items()) / cycle
    row = {"script": script, "stage": stage, "mode": mode, "device": device.type, "updates_per_s": rate, "windows": rates}
    row |= {"cpu_s_per_update": cpu, "memory_mb": memory / 1e6, "gflop_per_update": gflop, "floor": floor}
    return row | {"share": rate / floor, "threads": torch.get_num_threads()}


def time_evaluation(script: str, args: Args) -> float:
    """Seconds of ten episodes of HalfCheetah, which are 1,000 steps long whatever the policy does."""
    (module, agent_type), info = AGENTS[script], task_facts("halfcheetah-medium", need_env=True)
    agent = agent_type(17, 6, module.Args())
    started = time.perf_counter()
    evaluate(agent.act, info, 10, seed=0)
    return time.perf_counter() - started


def hardware() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "gpu": gpu}


def main(args: Args) -> None:
    facts = hardware() | {"torch": version("torch"), "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    where = f"{facts['cores']} cores of {facts['cpu']}" + (f", {facts['gpu']}" if facts["gpu"] else "")
    lines = [
        f"# Throughput\n\nBy `python benchmarks/throughput.py`, {args.task}, {where}, torch {facts['torch']}, {facts['date']}.\n"
    ]
    lines += ["| script | stage | mode | updates/s | CPU s/update | memory, MB | GFLOP/update | floor, updates/s | share |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    args.out.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:  # a fresh process for each
        for script, stage, mode in ((s, t, m) for s in args.scripts for t in STAGES[s] for m in args.modes):
            row = pool.submit(measure, script, stage, mode, args).result()
            with (args.out / "throughput.jsonl").open("a") as file:
                print(json.dumps(row | facts | {"args": asdict(args) | {"out": None}}), file=file)
            numbers = f"{row['updates_per_s']:.3g} | {row['cpu_s_per_update']:.4f} | {row['memory_mb']:.0f}"
            numbers += f" | {row['gflop_per_update']:.2f} | {row['floor']:.3g} | {row['share']:.0%}"
            lines.append(f"| {script} | {stage} | {mode} | {numbers} |")
            print(lines[-1], flush=True)
        for script in args.scripts if args.evaluation else ():
            seconds = pool.submit(time_evaluation, script, args).result()
            lines.append(f"\nEvaluation of {script}, ten HalfCheetah episodes of 1,000 steps: {seconds:.1f} s.")
            print(lines[-1].strip(), flush=True)
    (args.out / "throughput.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
