"""Kill a training again and again, resume it each time and compare it with one that nobody disturbed; or watch one for leaks.

    python benchmarks/faults.py dac --kills 50     # SIGKILL at random moments: in every stage, evaluating, saving
    python benchmarks/faults.py dac --soak 60      # an hour with an evaluation every few seconds: memory, files, processes

The runs that are killed are small, the one that is watched has --quick's sizes; bundled sample, one thread of a CPU. Where
all that they leave is not the same to the bit, wall-clock times excepted, or something grows, the exit status is 1. Linux only.
"""

import csv
import faulthandler
import gc
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

import gymnasium as gym
import numpy as np
import torch
import torch._dynamo  # every run imports it; here, so that a forked one need not
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
FORK = multiprocessing.get_context("fork")  # a run then starts within a fraction of a second, and most kills hit training
FLAGS = "--env hopper-medium --data bundled --device cpu --eval-episodes 2 --batch-size 32 --log-every 7 --checkpoint-every 13"
STAGES = {  # n: updates of each stage
    "dac": "--num-critics 2 --num-next-actions 2 --hidden-dim 16 --total-steps {n}",
    "qdq": "--num-samples 4 --hidden-dim 32 --teacher-steps {n} --student-steps {n} --total-steps {n}",
    "cped": "--flow-hidden-dim 16 --hidden-dim 16 --critic-start 20 --actor-q-start 30 --flow-steps {n} --total-steps {n} "
    "--flow-training joint --joint-steps 60 --constraint dual",
}
SOAK = {  # beside --quick: a short way to the policy, an evaluation, a row and a checkpoint every few seconds of an idle core
    "dac": "--eval-every 20 --log-every 20 --checkpoint-every 20",
    "qdq": "--eval-every 20 --log-every 20 --checkpoint-every 20 --teacher-steps 40 --student-steps 40",
    "cped": "--eval-every 50 --log-every 50 --checkpoint-every 50 --flow-steps 50",
}
MOST = {"memory in MB": 5, "open files": 0, "children": 0, "threads": 0, "environments": 0}  # that may grow in half a soak
ENVIRONMENTS = FORK.Value("i", 0)  # alive in the run at its latest SIGUSR2
PLACES = {"save_checkpoint": "saving", "evaluate": "evaluating", "update": "updating"}  # functions that tell where a run is


@dataclass
class Args:
    script: Annotated[Literal["dac", "qdq", "cped"], tyro.conf.Positional]  # whose runs
    kills: int = 50  # SIGKILLs, spread over as many runs as it takes
    steps: int = 1_000  # updates of each stage of a run
    seed: int = 0  # of the random moments
    soak: float | None = None  # minutes of one undisturbed run that is watched instead


def main(args: Args) -> None:
    torch.set_num_threads(1)
    importlib.import_module(args.script).load_dataset("hopper-medium", "bundled")  # imports, again
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    failures = soak(args, folder) if args.soak else kill(args, folder)
    if failures:
        sys.exit(f"{args.script} FAILED: {'; '.join(failures[:5])} (the runs are in {folder})")
    shutil.rmtree(folder)
    print(f"{args.script} passed")


def start(script: str, folder: Path, flags: str) -> multiprocessing.Process:
    """The script's main in a process that writes to folder/output and, on SIGUSR1, where it is to folder/trace.

    On SIGUSR2 it counts its environments.
    """

    def count(*_) -> None:
        ENVIRONMENTS.value = sum(issubclass(type(thing), gym.Env) for thing in gc.get_objects())

    def child() -> None:
        faulthandler.register(signal.SIGUSR1, trace)
        signal.signal(signal.SIGUSR2, count)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.modules[script].main(f"{FLAGS} --run-dir {folder} {flags}".split())

    folder.mkdir(exist_ok=True)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # for a child that has not come to register it
    with (folder / "trace").open("w") as trace, (folder / "output").open("a") as output:
        process = FORK.Process(target=child)
        process.start()
    return process


def kill(args: Args, folder: Path) -> list[str]:
    """Kills and resumes runs until all kills are used up; returns what they differ in from an undisturbed run."""
    flags, begun = f"{STAGES[args.script].format(n=args.steps)} --eval-every {args.steps // 10}", time.monotonic()
    start(args.script, folder / "whole", flags).join()
    length, moments, kills, runs, failures = time.monotonic() - begun, random.Random(args.seed), 0, 0, []
    while kills < args.kills and not failures:
        runs, process, part = runs + 1, None, folder / f"run{runs + 1}"
        while process is None or process.exitcode:
            if not (resume := any(part.glob("hopper-medium/*/*/checkpoint.pt"))):  # there is nothing yet to go on with
                shutil.rmtree(part, ignore_errors=True)
            process = start(args.script, part, flags + " --resume" * resume)
            process.join(moments.uniform(0, 0.3 * length) if kills < args.kills else None)
            if process.is_alive():
                kills += 1
                print(f"kill {kills} of run {runs}: {end(process, part)}", flush=True)
            elif process.exitcode:
                return [f"run {runs} ended with {process.exitcode}: {(part / 'output').read_text()[-500:]}"]
        failures = list(differences(contents(folder / "whole"), contents(part)))
    print(f"{args.script}: {kills} kills of {runs} runs of {length:.0f} s, {len(failures)} differences", flush=True)
    return failures


def end(process: multiprocessing.Process, folder: Path) -> str:
    """Kills a run; returns where it was and which checkpoint it left."""
    os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.01)
    process.kill()
    process.join()
    functions = [line.split()[-1] for line in (folder / "trace").read_text().splitlines() if "File" in line]
    place = next((PLACES[name] for name in functions if name in PLACES), "in between")
    for path in folder.glob("hopper-medium/*/*/checkpoint.pt"):
        agent, part = torch.load(path, weights_only=True)["agent"], path.with_suffix(".part").exists()
        place += f", checkpoint of update {agent.get('step', agent.get('steps'))}" + " beside half a new one" * part
    return place


def contents(folder: Path) -> dict:
    """All that the finished run in a root folder left; TensorBoard's events hold the same numbers as metrics.csv."""
    (run,) = folder.glob("hopper-medium/*/*")
    found = {path.name: json.loads(path.read_text()) for path in run.glob("*.json")}
    found |= {path.name: torch.load(path, weights_only=True) for path in run.glob("*.pt")}
    return found | {"metrics.csv": list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))}


def differences(a, b, name: str = "") -> Iterator[str]:
    """Names of the entries in which two nested structures differ, to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        yield from (f"{name}/{key} is in one only" for key in a.keys() ^ b.keys())
        for key in (a.keys() & b.keys()) - {"seconds", "time/updates_per_s", "run_dir"}:  # wall-clock times
            yield from differences(a[key], b[key], f"{name}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b)):
            yield from differences(*pair, f"{name}/{i}")
    elif type(a) is not type(b) or (a.dtype != b.dtype or not torch.equal(a, b) if isinstance(a, torch.Tensor) else a != b):
        yield f"{name} is {a!s:.40} and {b!s:.40}"


def soak(args: Args, folder: Path) -> list[str]:
    """Watches one run, 240 times if it is an hour; prints what it sees as CSV and returns what grew."""
    process = start(args.script, folder / "soak", f"--quick --batch-size 256 --total-steps 1000000000 {SOAK[args.script]}")
    own, samples, begun = Path(f"/proc/{process.pid}"), [], time.monotonic()
    print("minutes", *MOST, sep=",")
    while (minutes := (time.monotonic() - begun) / 60) < args.soak and process.is_alive():
        os.kill(process.pid, signal.SIGUSR2)
        memory = int((own / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        children = len((own / f"task/{process.pid}/children").read_text().split())
        files, threads = len(os.listdir(own / "fd")), len(os.listdir(own / "task"))
        samples.append((memory, files, children, threads, ENVIRONMENTS.value))
        print(f"{minutes:.2f},{memory:.1f},{files},{children},{threads},{ENVIRONMENTS.value}", flush=True)
        process.join(max(args.soak / 4, 5))  # seconds, for counting takes its time
    process.terminate()
    process.join()
    if "go on with" not in (output := (folder / "soak" / "output").read_text()):
        return [f"the run ended with {process.exitcode}, without a way to go on: {output[-500:]}"]
    rows = contents(folder / "soak")["metrics.csv"]
    evaluations = sum(bool(row["eval/return"]) for row in rows)
    print(f"{args.script}: {rows[-1]['step']} updates, {evaluations} evaluations; grew by {growth(samples)}", flush=True)
    return [f"{kind} grew by {more:.1f}" for kind, more in growth(samples).items() if more > MOST[kind]]


def growth(samples: list[tuple[float, ...]]) -> dict[str, float]:
    """Of each column from begin to end of the second half: by a straight line for memory, between the quarters' least for counts.

    The least, because files and environments come and go with each evaluation.
    """
    half = np.array(samples[len(samples) // 2 :])
    slope, _ = np.polyfit(np.linspace(0, 1, len(half)), half[:, 0], 1)
    third, fourth = (quarter.min(0) for quarter in np.array_split(half[:, 1:], 2))
    return dict(zip(MOST, (round(float(slope), 2), *(fourth - third).tolist())))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
