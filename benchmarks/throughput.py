"""Measures updates per second of every stage of the three scripts, eager and compiled.

    python benchmarks/throughput.py                               # all: ten minutes on two cores
    python benchmarks/throughput.py --scripts cped --modes eager  # one script
    python benchmarks/throughput.py --device cuda --seconds 1     # on a GPU

Random rows with a task's sizes replace its dataset; the speed is the same. Each stage runs in a
process of its own, with the published settings and the agent's own update. Nothing else should run
on the machine. At the end throughput.md and throughput.jsonl are written into --out; a row has
  updates/s     median over the windows, after a warm-up; includes drawing batch and noise, but not
                evaluation and logging
  CPU s/update  of all threads
  memory        largest resident memory of the process; on CUDA the largest allocation there
  GFLOP/update  of all matrix products, counted
  floor         updates/s if only these products were computed, each at the speed that its shape
                reaches here by itself
  share         updates/s divided by floor
"""

import importlib
import json
import os
import platform
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from root import ROOT, processes
from rows import output
from torch.utils._python_dispatch import TorchDispatchMode

from common import evaluate, load_dataset

STAGES = {
    "dac": ("policy",),
    "qdq": ("teacher", "student", "policy"),
    "cped": ("flow", "policy"),
}
ROWS = 100_000  # of the random dataset
CYCLE = 10  # updates after which all delayed parts have moved as often as on average
COLUMNS = ("script", "stage", "mode", "updates/s", "CPU s/update", "memory, MB")
COLUMNS += ("GFLOP/update", "floor, updates/s", "share")


@dataclass
class Args:
    scripts: tuple[Literal["dac", "qdq", "cped"], ...] = ("dac", "qdq", "cped")  # what to measure
    modes: tuple[Literal["eager", "compile"], ...] = ("eager", "compile")  # modes of each
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA if there is a GPU
    task: str = "hopper-medium"  # task whose preset is measured
    obs_dim: int = 11  # size of its observations
    act_dim: int = 3  # size of its actions
    windows: int = 5  # windows per stage
    seconds: float = 4.0  # seconds per window
    evaluation: bool = True  # also time an evaluation of ten episodes of 1,000 steps
    out: Path = Path("runs") / "throughput"  # folder of throughput.md and throughput.jsonl


class Products(TorchDispatchMode):
    """Counts the matrix products that run inside: (batch, m, k, n) -> how many."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.count(*args[:2])
        elif name in ("addmm", "baddbmm"):
            self.count(*args[1:3])
        return func(*args, **(kwargs or {}))

    def count(self, a: torch.Tensor, b: torch.Tensor) -> None:
        batch = a.shape[0] if a.ndim == 3 else 1
        self.shapes[(batch, a.shape[-2], a.shape[-1], b.shape[-1])] += 1


def flops(shape: tuple[int, ...]) -> int:
    """Of one product of that shape."""
    return 2 * torch.Size(shape).numel()


# --------------------------------------------------------------- one stage


def make_agent(script: str, obs_dim: int, act_dim: int, task: str, compiled: bool, device: str):
    module = importlib.import_module(script)
    args = module.Args(**{**module.PRESETS.get(task, {}), "compile": compiled})
    return getattr(module, script.upper())(obs_dim, act_dim, args, device)


def make_step(script: str, stage: str, compiled: bool, args: Args, device: str) -> Callable:
    """One update of a stage, batch included, when all of its parts are active."""
    module = importlib.import_module(script)
    agent = make_agent(script, args.obs_dim, args.act_dim, args.task, compiled, device)
    columns = {
        "obs": torch.randn(ROWS, args.obs_dim, device=device),
        "act": torch.rand(ROWS, args.act_dim, device=device) * 2 - 1,
        "rew": torch.rand(ROWS, device=device),
        "next_obs": torch.randn(ROWS, args.obs_dim, device=device),
        "not_done": torch.ones(ROWS, device=device),
        "x": torch.rand(ROWS, 1, device=device) * 2 - 1,  # truncated returns of QDQ
    }
    kind = module.Batch
    if script == "qdq" and stage != "policy":
        kind = module.Windows
    data = kind(*(columns[name] for name in kind._fields))
    batch_size = agent.args.batch_size
    agent.step = first_update(agent, script, stage)

    def step() -> None:
        index = torch.randint(ROWS, (batch_size,), device=device)
        batch = kind(*(column.index_select(0, index) for column in data))
        if script == "qdq":
            agent.update(stage, batch)
        else:
            agent.update(batch)

    return step


def first_update(agent, script: str, stage: str) -> int:
    """Number of an update in which all parts of the stage are active."""
    if script == "dac":
        return agent.args.actor_target_start
    begin = 0
    for name, length in agent.stages:
        if name == stage:
            break
        begin += length
    if script == "cped" and stage == "policy":
        begin += agent.args.actor_q_start
    return begin


def seconds_of(step: Callable[[], None], repeats: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def floor_seconds(shapes: Counter, device: str) -> float:
    """Seconds of the counted products, each shape measured by itself.

    Shapes below 1 % of the arithmetic are left out.
    """
    everything = sum(count * flops(shape) for shape, count in shapes.items())
    total = 0.0
    for shape, count in shapes.items():
        if count * flops(shape) < 0.01 * everything:
            continue
        batch, m, k, n = shape
        a = torch.randn(batch, m, k, device=device)
        b = torch.randn(batch, k, n, device=device)
        if batch == 1:
            a, b = a[0], b[0]
        repeats = max(3, int(3e8 // flops(shape)))
        runs = [seconds_of(lambda a=a, b=b: a @ b, repeats, device) for _ in range(10)]
        total += count * min(runs[1:]) / repeats
    return total


def measure(script: str, stage: str, mode: str, args: Args) -> dict:
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    eager = make_step(script, stage, False, args, device)
    with Products() as products:
        for _ in range(CYCLE):
            eager()
    floor = CYCLE / floor_seconds(products.shapes, device)

    step = make_step(script, stage, mode == "compile", args, device)
    seconds_of(step, CYCLE, device)  # compiles
    per_cycle = seconds_of(step, CYCLE, device)
    repeats = CYCLE * max(1, round(args.seconds / per_cycle))
    cpu = time.process_time()
    rates = [repeats / seconds_of(step, repeats, device) for _ in range(args.windows)]
    cpu = (time.process_time() - cpu) / (repeats * args.windows)
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    arithmetic = sum(count * flops(shape) for shape, count in products.shapes.items())
    rate = statistics.median(rates)
    return {
        "script": script,
        "stage": stage,
        "mode": mode,
        "device": device,
        "updates_per_s": rate,
        "windows": rates,
        "cpu_s_per_update": cpu,
        "memory_mb": memory / 1e6,
        "gflop_per_update": arithmetic / CYCLE / 1e9,
        "floor": floor,
        "share": rate / floor,
        "threads": torch.get_num_threads(),
    }


def time_evaluation(script: str) -> float:
    """Seconds of ten HalfCheetah episodes, which are 1,000 steps long whatever the policy does."""
    rng = np.random.default_rng(0)
    raw = {
        "observations": rng.normal(size=(100, 17)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (100, 6)).astype(np.float32),
        "rewards": rng.uniform(size=100).astype(np.float32),
        "terminals": np.zeros(100, bool),
        "timeouts": np.arange(100) == 99,
    }
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        np.savez(Path(folder) / "random.npz", **raw)
        _, info = load_dataset("HalfCheetah-v4", str(Path(folder) / "random.npz"), need_env=True)
    agent = make_agent(script, 17, 6, "halfcheetah-medium", False, "cpu")
    started = time.perf_counter()
    evaluate(agent.act, info, 10, seed=0)
    return time.perf_counter() - started


# ------------------------------------------------------------------- table


def hardware() -> dict:
    cpu = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":")[1].strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu}


def commit() -> str:
    """Of this checkout, with -dirty where files are edited."""
    words = ("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return output("git", "-C", str(ROOT), *words) or "unknown"


def table_line(cells: tuple) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main(args: Args, flags: str = "") -> None:
    facts = {
        **hardware(),
        "torch": version("torch"),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": f"python benchmarks/throughput.py {flags}".strip(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }
    where = f"{facts['cores']} cores of {facts['cpu']}"
    if facts["gpu"]:
        where += f", {facts['gpu']}"
    if facts["omp_num_threads"]:
        where += f", OMP_NUM_THREADS={facts['omp_num_threads']}"
    lines = [
        "# Throughput",
        "",
        f"By `{facts['command']}` at commit {facts['commit']}: {args.task}, {where},",
        f"torch {facts['torch']}, python {facts['python']}, {facts['date']}.",
        "",
        table_line(COLUMNS),
        table_line(("---",) * len(COLUMNS)),
    ]
    print("\n".join(lines), flush=True)
    settings = {**asdict(args), "out": None}
    records = []
    with processes(1, max_tasks_per_child=1) as pool:  # a new one for each measurement
        for script in args.scripts:
            for stage in STAGES[script]:
                for mode in args.modes:
                    row = pool.submit(measure, script, stage, mode, args).result()
                    records.append(json.dumps({**row, **facts, "args": settings}))
                    cells = (
                        script,
                        stage,
                        mode,
                        f"{row['updates_per_s']:.3g}",
                        f"{row['cpu_s_per_update']:.4f}",
                        f"{row['memory_mb']:.0f}",
                        f"{row['gflop_per_update']:.2f}",
                        f"{row['floor']:.3g}",
                        f"{row['share']:.0%}",
                    )
                    lines.append(table_line(cells))
                    print(lines[-1], flush=True)
        if args.evaluation:
            lines.append("")
            for script in args.scripts:
                seconds = pool.submit(time_evaluation, script).result()
                lines.append(
                    f"Ten HalfCheetah episodes of 1,000 steps by {script}: {seconds:.1f} s."
                )
                print(lines[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "throughput.md").write_text("\n".join(lines) + "\n")
    (args.out / "throughput.jsonl").write_text("\n".join(records) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__), shlex.join(sys.argv[1:]))
