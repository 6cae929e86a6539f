"""Algorithms x tasks x seeds on Ray: each job is the plain command, goes on from its own checkpoint, and leaves one row.

    pip install -r benchmarks/requirements.txt
    python benchmarks/sweep.py --algorithms dac cped --envs hopper-medium hopper-medium-replay --seeds 0 1 2 --flags="--quick"
    python benchmarks/sweep.py --envs hopper-medium --address 10.0.0.1:6379 --gpus 0.25 --dac-flags="--compile"

A job that fails is tried again from its checkpoint. After Ctrl-C, which lets running jobs save, and after a crash the same
command goes on: finished runs are left alone, half-done ones resumed. A run is a job's if its args.json has the job's arguments.
The machines of a cluster need this repository, its Python packages, the data and --run-dir under the same paths.
"""

import contextlib
import csv
import fcntl
import glob
import importlib
import itertools
import json
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError

ROOT = Path(__file__).resolve().parent.parent
# behaviour: mean score of the data. seconds: of all attempts, evaluations included. updates_per_s: median over the log rows of
# the policy stage. evaluations: pairs [update of the policy stage, score]. cpu to commit: where and by what the run was ended.
COLUMNS = ("algorithm", "env", "seed", "dataset", "sha256", "behaviour", "updates", "final_score", "last_score", "best_score")
COLUMNS += ("seconds", "updates_per_s", "evaluations", "flags", "arguments", "versions")
COLUMNS += ("cpu", "cores", "threads", "gpu", "commit", "run")


@dataclass
class Args:
    envs: tuple[str, ...]  # tasks
    algorithms: tuple[Literal["dac", "qdq", "cped"], ...] = ("dac", "qdq", "cped")  # scripts
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of the runs
    # for all scripts, written with an equals sign: --flags="--total-steps 30000"; {env} in it stands for the task, a path with *
    # for the newest that fits: --cped-flags="--flow runs/{env}/cped/seed0-*" reuses the flow of each task's seed 0
    flags: str = ""
    dac_flags: str = ""  # for dac.py alone
    qdq_flags: str = ""  # for qdq.py alone
    cped_flags: str = ""  # for cped.py alone
    run_dir: Path = Path("runs")  # root folder of all runs and logs
    results: Path | None = None  # table with one row per finished run, by default results.csv in run_dir
    # HOST:PORT of a running Ray cluster, or auto; by default Ray is started here. RAY_AUTH_MODE=token if it wants Ray's token
    address: str | None = None
    cpus: float = 1  # CPU cores per job, which are also its threads
    gpus: float | None = None  # GPUs per job, 0.25 for four jobs on each; by default one where there is any
    retries: int = 2  # attempts after the first


class Job(NamedTuple):
    algorithm: str
    env: str
    seed: int
    run_dir: Path
    flags: list[str]  # what the user adds to the command
    args: dict  # the arguments that make a run this job's

    def __str__(self) -> str:
        return f"{self.algorithm} {self.env} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.run_dir / self.env / self.algorithm / f"seed{self.seed}.log"


def plan(args: Args) -> list[Job]:
    """All jobs, seed by seed; mistakes in the flags are found here, before anything runs."""
    jobs = []
    for seed, env, algorithm in dict.fromkeys(itertools.product(args.seeds, args.envs, args.algorithms)):
        script = importlib.import_module(algorithm)
        flags = shlex.split(f"{args.flags} {getattr(args, f'{algorithm}_flags')}".replace("{env}", env))
        flags = [max(glob.glob(flag), default=flag) if "*" in flag else flag for flag in flags]
        own = ["--env", env, "--seed", str(seed), "--run-dir", str(args.run_dir)]
        resolved, state = script.parse_args([*own, *flags])
        if state or (resolved.env, resolved.seed, resolved.run_dir) != (env, seed, args.run_dir):
            raise UserError("--env, --seed, --run-dir, --resume and --eval-only are the sweep's own, not for --flags", status=2)
        free = (*script.PER_CALL, "device", "compile")  # how it runs is not what is run
        kept = {name: value for name, value in asdict(resolved).items() if name not in free}
        jobs.append(Job(algorithm, env, seed, args.run_dir, flags, json.loads(json.dumps(kept))))  # as args.json has them
    return jobs


def read_json(path: Path) -> dict:
    """Nothing where the file is missing, or was cut off by the end of a run."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


def find_run(job: Job) -> tuple[Path | None, dict]:
    """Run folder and result of a job that is done; else the newest run folder to go on from, if there is one, and nothing."""
    newest = None
    for path in sorted(job.log.parent.glob(f"seed{job.seed}-*/args.json")):
        if job.args.items() <= read_json(path).get("args", {}).items():
            if result := read_json(path.with_name("result.json")):
                return path.parent, result
            newest = path.parent if path.with_name("checkpoint.pt").exists() else newest
    return newest, {}


def output(*command: str) -> str:
    """What a command prints; nothing where it fails or does not exist."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""


def machine() -> dict[str, str | int]:
    """Columns about this machine, what of it a job is given, and the code; threads is what Ray makes of the CPU share."""
    cpuinfo, gpu = Path("/proc/cpuinfo"), os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    row = {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count()}
    row |= {"threads": os.environ.get("OMP_NUM_THREADS", "")}
    row |= {"gpu": gpu and output("nvidia-smi", f"--id={gpu}", "--query-gpu=name", "--format=csv,noheader")}
    return row | {"commit": output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")}


def attempt(job: Job, cwd: Path) -> int:
    """The Ray task: the job's command, from its newest checkpoint to its end; returns the exit status, 0 or 2."""
    os.chdir(cwd)  # the sweep's: paths in flags are relative to it
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # held by the command too: two sweeps never write to one run folder
        run, result = find_run(job)
        if result:
            return 0
        command = [sys.executable, str(ROOT / f"{job.algorithm}.py"), "--env", job.env, "--seed", str(job.seed), *job.flags]
        command += ["--run-dir", str(job.run_dir), *(["--resume", str(run)] if run else [])]
        facts = machine()
        log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {platform.node()}: {shlex.join(command)}\n")
        log.flush()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                time.sleep(0.2)  # not process.wait(): Ray cancels by an exception, which needs Python to take a step
        finally:
            process.terminate()  # if it still runs: it saves and exits
            process.wait()
        if process.returncode not in (0, 2):  # 2 is the user's mistake, the same each time
            raise subprocess.CalledProcessError(process.returncode, command)
        if process.returncode == 0:
            (find_run(job)[0] / "machine.json").write_text(json.dumps(facts))
        return process.returncode


def result_row(job: Job, table: Path) -> dict:
    """The row of a finished job; the columns from cpu to commit are empty where the run was not ended by a sweep."""
    run, result = find_run(job)
    facts, hardware = read_json(run / "args.json"), read_json(run / "machine.json")
    with (run / "metrics.csv").open() as file:
        before = result["updates"] - facts["args"]["total_steps"]  # those of the stages before the policy's
        rows = [row | {"update": int(row["step"]) - before} for row in csv.DictReader(file)]
    speeds = [float(row["time/updates_per_s"]) for row in rows if row["update"] > 0 and row["time/updates_per_s"]]
    scored = [row for row in rows if row["eval/return"]]
    evaluations = [(row["update"], float(row["eval/normalized_score"] or row["eval/return"])) for row in scored]
    row = result | hardware | {"updates_per_s": median(speeds) if speeds else "", "evaluations": json.dumps(evaluations)}
    row |= {"behaviour": json.dumps(facts["dataset"]["mean_score"]), "flags": shlex.join(job.flags)}
    row |= {"arguments": json.dumps(facts["args"]), "versions": json.dumps(result["versions"])}
    row |= {"gpu": "" if facts["args"]["device"] == "cpu" else hardware.get("gpu", "")}
    return {name: row.get(name, "") for name in COLUMNS} | {"run": os.path.relpath(run, table.parent)}


def recorded(table: Path) -> set[str]:
    """The run folders that have a row."""
    if not table.exists():
        return set()
    with table.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or COLUMNS) != COLUMNS:
            raise UserError(f"{table} has other columns than a sweep writes: name another file with --results", status=2)
        return {row["run"] for row in reader}


def record(job: Job, table: Path) -> None:
    """Appends the row of a finished job, once."""
    row = result_row(job, table)
    with table.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another sweep may write to the same table
        if row["run"] in recorded(table):
            return
        writer = csv.DictWriter(file, COLUMNS)
        if not table.stat().st_size:
            writer.writeheader()
        writer.writerow(row)
    score = "not evaluated" if row["final_score"] == "" else f"final score {row['final_score']:.1f}"
    print(f"{job}: {score}, {row['seconds'] / 60:.1f} minutes")


def last_line(log: Path) -> str:
    """The newest state of a progress bar, or the sentence in which a run has ended."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        return re.split(r"[\r\n]+", file.read().decode(errors="replace").strip())[-1].strip()


def run_all(jobs: list[Job], args: Args, table: Path) -> list[Job]:
    """Runs the jobs on Ray, records each that ends well and returns those that failed."""
    os.environ.setdefault("RAY_enable_output_error_log_if_still_retry", "0")  # the logs tell of attempts that failed
    import ray  # here, because nothing else needs it and it takes a while

    try:
        if ":" in (args.address or ""):  # Ray itself would try for minutes
            socket.create_connection(args.address.removeprefix("ray://").rsplit(":", 1), timeout=5).close()
        ray.init(args.address or "local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray's are of many kinds; on a machine that is too busy a bare Exception after 30 seconds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        where = f"at --address {args.address} cannot be used" if args.address else "cannot be started here"
        raise UserError(f"Ray {where} ({reason:.200}); the same command tries again") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    shares = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = min(1, max(share.get("GPU", 0) for share in shares)) if args.gpus is None else args.gpus
    if not any(share.get("CPU", 0) >= args.cpus and share.get("GPU", 0) >= gpus for share in shares):
        raise UserError(f"no machine here has {args.cpus:g} CPU cores and {gpus:g} GPUs: lower --cpus or --gpus", status=2)
    again = {"max_retries": args.retries, "retry_exceptions": [subprocess.CalledProcessError]}
    task = ray.remote(num_cpus=args.cpus, num_gpus=gpus, **again)(attempt)
    since, failed, pending = time.time(), [], {task.remote(job, Path.cwd()): job for job in jobs}
    try:
        with Live(console=Console(markup=False, highlight=False), transient=True) as live:
            while pending:
                for ref in ray.wait(list(pending), timeout=1)[0]:
                    job, status = pending.pop(ref), None
                    with contextlib.suppress(ray.exceptions.RayError):  # the last attempt failed
                        status = ray.get(ref)
                    if status == 0:
                        record(job, table)
                    else:
                        failed.append(job)
                        print(f"{job}: failed")
                counts = f"{len(jobs) - len(pending)} of {len(jobs)} jobs have ended, {len(failed)} failed"
                picture = Table("job", Column("progress", ratio=1, no_wrap=True), box=None, caption=counts, expand=True)
                for job in pending.values():
                    if job.log.exists() and job.log.stat().st_mtime >= since:  # it runs
                        picture.add_row(str(job), last_line(job.log))
                live.update(picture)
    except KeyboardInterrupt:
        print("each running job now saves and ends; once more kills them")
        for ref in pending:
            ray.cancel(ref)
        for ref in pending:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(ref)
        raise UserError("interrupted; the same command goes on") from None
    return failed


def main(argv: list[str] | None = None) -> None:
    args = tyro.cli(Args, args=argv, description=__doc__)
    table = args.results or args.run_dir / "results.csv"
    recorded(table)  # a table that does not fit is better known before the first run
    jobs = plan(args)
    todo = [job for job in jobs if not find_run(job)[1]]
    print(f"{len(jobs)} jobs, {len(jobs) - len(todo)} of them done before; results in {table}")
    table.parent.mkdir(parents=True, exist_ok=True)
    for job in [job for job in jobs if job not in todo]:
        record(job, table)  # where an earlier sweep could not
    if todo and (failed := run_all(todo, args, table)):
        raise UserError("\n".join(f"{job} failed; {job.log} ends with: {last_line(job.log)}" for job in failed))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "status", 1))
    except KeyboardInterrupt:  # while Ray starts, or the second one
        sys.exit("error: interrupted; the same command goes on")
