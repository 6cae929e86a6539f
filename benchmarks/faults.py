"""Kills a training again and again, resumes it, and compares it with an undisturbed one.

    python benchmarks/faults.py dac --kills 50

SIGKILL comes at random moments: in every stage, while evaluating, while saving. A run that has no
checkpoint yet starts anew, the others go on with --resume. The exit status is 1 unless all that
they leave, except wall-clock times, is equal bit for bit. The runs are small and use the bundled
sample and one thread of a CPU. Linux only.
"""

import csv
import faulthandler
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import root  # noqa: F401
import torch
import torch._dynamo
import tyro

# A forked run starts within a fraction of a second, and most kills hit the training.
FORK = multiprocessing.get_context("fork")
FLAGS = (
    "--env hopper-medium --data bundled --device cpu --eval-episodes 2 --final-episodes 2"
    " --batch-size 32 --log-every 7"
)
STAGES = {  # n: updates of each stage
    "dac": "--num-critics 2 --num-next-actions 2 --hidden-dim 16 --total-steps {n}",
    "qdq": (
        "--num-samples 4 --hidden-dim 64 --teacher-steps {n} --student-steps {n} --total-steps {n}"
    ),
    "cped": (
        "--flow-hidden-dim 16 --hidden-dim 16 --critic-start 20 --actor-q-start 30"
        " --flow-steps {n} --total-steps {n} --flow-training joint --joint-steps 60"
        " --constraint dual"
    ),
}
# functions that show what a run is doing
PLACES = {"save": "saving", "evaluate": "evaluating", "update": "updating"}
TIMES = {"seconds", "time/updates_per_s"}  # what may differ


@dataclass
class Args:
    script: Annotated[Literal["dac", "qdq", "cped"], tyro.conf.Positional]  # whose runs are killed
    kills: int = 50  # number of SIGKILLs, over as many runs as needed
    steps: int = 1_000  # updates of each stage of a run
    checkpoint_minutes: float = 0.003  # minutes between checkpoints of a run
    seed: int = 0  # seed of the random moments


def run_flags(args: Args) -> str:
    stages = STAGES[args.script].format(n=args.steps)
    every = max(1, args.steps // 10)
    return f"{FLAGS} {stages} --eval-every {every} --checkpoint-minutes {args.checkpoint_minutes}"


def start(script: str, folder: Path, flags: str) -> multiprocessing.Process:
    """The script's main in a process of its own, with the folder as its working directory.

    It prints to folder/output; on SIGUSR1 it writes its stack to folder/trace.
    """

    def child() -> None:
        faulthandler.register(signal.SIGUSR1, trace)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.chdir(folder)
        sys.modules[script].main(flags.split())

    folder.mkdir(exist_ok=True)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # for a child that has not registered it yet
    with (folder / "trace").open("w") as trace, (folder / "output").open("a") as output:
        process = FORK.Process(target=child)
        process.start()
    return process


def resume_flags(folder: Path) -> str | None:
    """Flags that continue the run below a folder; None if it has no checkpoint."""
    for path in folder.glob("runs/hopper-medium/*/*/checkpoint.pt"):
        return f"--resume {path.parent.relative_to(folder)}"
    return None


def kill_and_compare(args: Args, folder: Path) -> list[str]:
    """Kills and resumes runs until all kills are used up.

    Returns how they differ from an undisturbed run.
    """
    flags = run_flags(args)
    begun = time.monotonic()
    start(args.script, folder / "whole", flags).join()
    length = time.monotonic() - begun
    whole = contents(folder / "whole")
    moments = random.Random(args.seed)
    kills = 0
    runs = 0
    failures = []
    while kills < args.kills and not failures:
        runs += 1
        part = folder / f"run{runs}"
        process = None
        while process is None or process.exitcode != 0:
            resume = resume_flags(part)
            if resume is None:
                shutil.rmtree(part, ignore_errors=True)
            process = start(args.script, part, resume or flags)
            patience = moments.uniform(0, 0.3 * length) if kills < args.kills else None
            process.join(patience)
            if process.is_alive():
                kills += 1
                print(f"kill {kills} of run {runs}: {end(process, part)}", flush=True)
            elif process.exitcode != 0:
                text = (part / "output").read_text()[-500:]
                return [f"run {runs} ended with {process.exitcode}: {text}"]
        failures = list(differences(whole, contents(part)))
    summary = f"{kills} kills of {runs} runs of {length:.0f} s, {len(failures)} differences"
    print(f"{args.script}: {summary}", flush=True)
    return failures


def end(process: multiprocessing.Process, folder: Path) -> str:
    """Kills a run; returns what it was doing and which checkpoint it left."""
    os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.01)
    process.kill()
    process.join()
    lines = (folder / "trace").read_text().splitlines()
    functions = [line.split()[-1] for line in lines if "File" in line]
    place = next((PLACES[name] for name in functions if name in PLACES), "in between")
    checkpoints = list(folder.glob("runs/hopper-medium/*/*/checkpoint.pt"))
    if not checkpoints:
        return f"{place}, no checkpoint yet"
    step = torch.load(checkpoints[0], weights_only=True)["agent"]["step"]
    place += f", checkpoint of update {step}"
    if checkpoints[0].with_suffix(".part").exists():
        place += " beside half a new one"
    return place


def contents(folder: Path) -> dict:
    """All that the run below a folder left.

    TensorBoard's events hold the same numbers as metrics.csv and are left out.
    """
    (run,) = folder.glob("runs/hopper-medium/*/*")
    found = {path.name: json.loads(path.read_text()) for path in run.glob("*.json")}
    for path in run.glob("*.pt"):
        found[path.name] = torch.load(path, weights_only=True)
    with (run / "metrics.csv").open(newline="") as file:
        found["metrics.csv"] = list(csv.DictReader(file))
    return found


def differences(a, b, name: str = "") -> Iterator[str]:
    """Names of the entries in which two nested structures differ, to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() ^ b.keys():
            yield f"{name}/{key} is in one only"
        for key in (a.keys() & b.keys()) - TIMES:
            yield from differences(a[key], b[key], f"{name}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            yield from differences(x, y, f"{name}/{i}")
    elif not same(a, b):
        yield f"{name} is {a!s:.40} and {b!s:.40}"


def same(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def main(args: Args) -> None:
    torch.set_num_threads(1)
    script = importlib.import_module(args.script)
    script.load_dataset("hopper-medium", "bundled", need_env=True)  # imports what a run imports
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    failures = kill_and_compare(args, folder)
    if failures:
        words = "; ".join(failures[:5])
        sys.exit(f"error: {args.script} failed: {words} (the runs are in {folder})")
    shutil.rmtree(folder)
    print(f"{args.script} passed")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
