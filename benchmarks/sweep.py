"""Runs algorithms x tasks x seeds on Ray: each job is a script's command and adds one row.

    pip install -r benchmarks/requirements.txt
    python benchmarks/sweep.py --envs hopper-medium --seeds 0 1 2 --flags="--data bundled --quick"
    python benchmarks/sweep.py --envs hopper-medium --address 10.0.0.1:6379 --gpus 0.25

A job that fails is tried again from its last checkpoint, at most --retries times. After Ctrl-C or
a crash the same command goes on: finished runs are left alone, unfinished ones are resumed. A run
belongs to a job if its args.json has the job's arguments. With a larger --stop-after the runs of
an earlier sweep are continued.
The machines of a cluster need this repository, its Python packages, the data and --run-dir under
the same paths.
"""

import contextlib
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
from typing import Literal, NamedTuple

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from root import ROOT
from rows import append, policy_updates, read_json, read_run, read_table

# Arguments in which a run may differ from its job.
FREE = ("resume", "run_dir", "flow", "consistency", "device", "compile")
FREE += ("log_every", "checkpoint_minutes", "stop_after")


@dataclass
class Args:
    envs: tuple[str, ...]  # tasks
    algorithms: tuple[Literal["dac", "qdq", "cped"], ...] = ("dac", "qdq", "cped")  # scripts
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # seeds of the runs
    # flags for all scripts, given with an equals sign: --flags="--stop-after 30000"; {env} in it
    # stands for the task, and a path with * for the newest match
    flags: str = ""
    dac_flags: str = ""  # flags for dac.py alone
    qdq_flags: str = ""  # flags for qdq.py alone
    cped_flags: str = ""  # flags for cped.py alone
    # name of the rows in reports, by default the algorithm's, for which {algorithm} stands in it
    label: str = ""
    run_dir: Path = Path("runs")  # root folder of all runs and logs
    results: Path | None = None  # table with a row per finished run; default results.csv in run_dir
    # HOST:PORT of a running Ray cluster, or auto; by default Ray is started here; a cluster with
    # Ray's token needs RAY_AUTH_MODE=token
    address: str | None = None
    cpus: float = 1  # CPU cores, and so threads, per job
    # GPUs per job, 0.25 for four jobs on each; by default 1 if there is a GPU
    gpus: float | None = None
    retries: int = 2  # attempts after the first


class Job(NamedTuple):
    algorithm: str
    env: str
    seed: int
    run_dir: Path
    flags: list[str]  # what the user adds to the command
    args: dict  # all arguments, as args.json has them

    def __str__(self) -> str:
        return f"{self.algorithm} {self.env} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.run_dir / self.env / self.algorithm / f"seed{self.seed}.log"


# ----------------------------------------------------------- jobs and runs


def plan(args: Args) -> list[Job]:
    """All jobs, seed by seed; finds mistakes in the flags before anything runs."""
    jobs = []
    triples = itertools.product(args.seeds, args.envs, args.algorithms)
    for seed, env, algorithm in dict.fromkeys(triples):
        script = importlib.import_module(algorithm)
        flags = []
        text = f"{args.flags} {getattr(args, f'{algorithm}_flags')}"
        for flag in shlex.split(text.replace("{env}", env)):
            flags.append(max(glob.glob(flag), default=flag) if "*" in flag else flag)
        if any(flag.split("=")[0] == "--resume" for flag in flags):
            sys.exit("error: --resume is set by the sweep, not by --flags")
        own = ["--env", env, "--seed", str(seed), "--run-dir", str(args.run_dir)]
        resolved, _ = script.parse_args([*own, *flags])
        if (resolved.env, resolved.seed, resolved.run_dir) != (env, seed, str(args.run_dir)):
            sys.exit("error: --env, --seed and --run-dir are set by the sweep, not by --flags")
        arguments = json.loads(json.dumps(asdict(resolved)))
        jobs.append(Job(algorithm, env, seed, args.run_dir, flags, arguments))
    return jobs


def belongs(stored: dict, job: Job) -> bool:
    """Whether arguments from an args.json are a job's, or those of a shorter run like it."""
    for name, value in job.args.items():
        if name not in FREE and stored.get(name, value) != value:
            return False
    return bool(stored) and policy_updates(stored) <= policy_updates(job.args)


def find_run(job: Job) -> tuple[Path | None, bool]:
    """The folder of a job's finished run, or of the newest to resume; and whether it is done."""
    newest = None
    for path in sorted(job.log.parent.glob(f"seed{job.seed}-*/args.json")):
        folder = path.parent
        stored = read_json(path).get("args", {})
        if not belongs(stored, job):
            continue
        whole = policy_updates(stored) == policy_updates(job.args)
        if whole and read_json(folder / "result.json"):
            return folder, True
        if (folder / "checkpoint.pt").exists():
            newest = folder
    return newest, False


# ------------------------------------------------------------ one job's run


def machine() -> dict[str, str | int | None]:
    """Columns about this machine; Ray sets the threads by the CPU share."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text())
        cpu = models[0] if models else cpu
    threads = os.environ.get("OMP_NUM_THREADS")
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads}


def command(job: Job, run: Path | None) -> list[str]:
    """The command of a job; with --resume, too, it has the flags that may change."""
    words = [sys.executable, str(ROOT / f"{job.algorithm}.py")]
    words += ["--env", job.env, "--seed", str(job.seed), *job.flags, "--run-dir", str(job.run_dir)]
    if run is not None:  # a shorter run has stored an earlier end
        words += ["--resume", str(run), "--stop-after", str(job.args["stop_after"])]
    return words


def attempt(job: Job, cwd: Path) -> None:
    """The Ray task: the job's command, from its newest checkpoint to its end."""
    # Ray cancels by SIGINT, which a shell's background job ignores, and so do its workers.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)  # the sweep's: paths in flags are relative to it
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log:
        # The command holds this lock, too, so two sweeps never write to one run folder.
        fcntl.flock(log, fcntl.LOCK_EX)
        run, finished = find_run(job)
        if finished:
            return
        words = command(job, run)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        log.write(f"\n{now} {platform.node()}: {shlex.join(words)}\n")
        log.flush()
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                time.sleep(0.2)  # not process.wait(): Ray cancels by an exception between two lines
        finally:
            process.terminate()  # if it still runs
            process.wait()
        if process.returncode != 0:
            raise subprocess.CalledProcessError(process.returncode, words)
        run, _ = find_run(job)
        (run / "machine.json").write_text(json.dumps(machine()))


def record(job: Job, label: str, table: Path) -> None:
    """Appends the row of a finished job, once."""
    folder, _ = find_run(job)
    run = read_run(folder, label.replace("{algorithm}", job.algorithm))
    if append(table, run):
        score = "not evaluated"
        if run["final_score"] is not None:
            score = f"last policy {run['final_score']:.1f}"
        print(f"{job}: {score}, {run['seconds'] / 60:.1f} minutes")


def last_line(log: Path) -> str:
    """The newest state of a progress bar, or the last sentence of a run."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        text = file.read().decode(errors="replace")
    return re.split(r"[\r\n]+", text.strip())[-1].strip()


# --------------------------------------------------------------------- Ray


def start_ray(address: str | None) -> None:
    os.environ.setdefault("RAY_enable_output_error_log_if_still_retry", "0")  # the logs tell it
    import ray  # here, because nothing else needs it and it takes a while

    try:
        if address is not None and ":" in address:  # Ray itself would try for minutes
            host, port = address.removeprefix("ray://").rsplit(":", 1)
            socket.create_connection((host, port), timeout=5).close()
        where = address or "local"
        ray.init(where, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # of many kinds; on a busy machine a bare Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        where = f"at --address {address} cannot be used" if address else "cannot be started here"
        sys.exit(f"error: Ray {where} ({reason:.200}); the same command tries again")


def remote_attempt(args: Args):
    """attempt() as a Ray task with its share of a machine."""
    import ray

    shares = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = args.gpus
    if gpus is None:
        gpus = min(1, max(share.get("GPU", 0) for share in shares))
    for share in shares:
        if share.get("CPU", 0) >= args.cpus and share.get("GPU", 0) >= gpus:
            return ray.remote(
                num_cpus=args.cpus,
                num_gpus=gpus,
                max_retries=args.retries,
                retry_exceptions=[subprocess.CalledProcessError],
            )(attempt)
    sys.exit(
        f"error: no machine here has {args.cpus:g} CPU cores and {gpus:g} GPUs:"
        " lower --cpus or --gpus"
    )


def picture(pending: list[Job], since: float, caption: str) -> Table:
    """The jobs that run, with the newest line of each log."""
    progress = Column("progress", ratio=1, no_wrap=True)
    table = Table("job", progress, box=None, caption=caption, expand=True)
    for job in pending:
        if job.log.exists() and job.log.stat().st_mtime >= since:
            table.add_row(str(job), last_line(job.log))
    return table


def run_all(jobs: list[Job], args: Args, table: Path) -> list[Job]:
    """Runs the jobs on Ray, records each that ends well and returns those that failed."""
    start_ray(args.address)
    import ray

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    task = remote_attempt(args)
    since = time.time()
    pending = {task.remote(job, Path.cwd()): job for job in jobs}
    failed = []
    try:
        with Live(console=Console(markup=False, highlight=False), transient=True) as live:
            while pending:
                ended, _ = ray.wait(list(pending), timeout=1)
                for ref in ended:
                    job = pending.pop(ref)
                    try:
                        ray.get(ref)
                        record(job, args.label, table)
                    except ray.exceptions.RayError:  # the last attempt failed
                        failed.append(job)
                        print(f"{job}: failed")
                done = len(jobs) - len(pending)
                caption = f"{done} of {len(jobs)} jobs have ended, {len(failed)} failed"
                live.update(picture(list(pending.values()), since, caption))
    except KeyboardInterrupt:
        print("ending the running jobs")
        for ref in pending:
            ray.cancel(ref)
        for ref in pending:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(ref)
        sys.exit("error: interrupted; the same command goes on from the last checkpoints")
    return failed


def main(argv: list[str] | None = None) -> None:
    args = tyro.cli(Args, args=argv, description=__doc__)
    table = args.results or args.run_dir / "results.csv"
    if table.exists():
        read_table(table)  # so that a wrong table shows before the first run
    jobs = plan(args)
    done = [job for job in jobs if find_run(job)[1]]
    todo = [job for job in jobs if job not in done]
    print(f"{len(jobs)} jobs, {len(done)} of them done before; results in {table}")
    table.parent.mkdir(parents=True, exist_ok=True)
    for job in done:
        record(job, args.label, table)  # where an earlier sweep could not
    failed = run_all(todo, args, table) if todo else []
    if failed:
        sentences = [f"{job} failed; {job.log} ends with: {last_line(job.log)}" for job in failed]
        sys.exit("error: " + "\n".join(sentences))


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk, a folder that cannot be written
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # while Ray starts, or the second one
        sys.exit("error: interrupted; the same command goes on")
