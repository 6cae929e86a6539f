"""Result rows: sweep.py and record.py write one for each finished run, and report.py reads them.

A table is a CSV file with one row per run. The arguments of a run are a JSON file beside the
table, which the row names. Scores are normalised if the task has reference returns; else they are
returns. Numbers have six significant digits.
"""

import csv
import fcntl
import hashlib
import importlib
import io
import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from os.path import relpath
from pathlib import Path
from statistics import median

from root import ROOT

SCRIPTS = ("dac", "qdq", "cped")
COLUMNS = (
    "algorithm",
    "label",  # name of the row in reports, if the algorithm's is not enough
    "env",
    "seed",
    "dataset",
    "sha256",
    "behaviour",  # mean score of the data
    "updates",  # of all stages
    "policy_updates",  # of the policy stage alone
    "score_last_5",  # mean of the last five evaluations
    "score_best",  # best evaluation
    "final_score",  # mean of the last policy over its final episodes
    "final_error",  # standard error of final_score
    "final_episodes",
    "evaluations",  # pairs [update of the policy stage, score]
    "seconds",  # of all attempts, evaluations included
    "updates_per_s",  # median over the log rows of the policy stage
    "versions",
    "device",  # of the training: cpu, or the GPU's name
    "cpu",  # from here to threads: the machine that ended the run, if a sweep started it
    "cores",
    "threads",
    "commit",  # whose script and common.py are those of the run
    "command",  # makes the run again; paths of data are file names only
    "arguments",  # path of the JSON file, from the table's folder
)
INTEGERS = ("seed", "updates", "policy_updates", "final_episodes")
FLOATS = ("behaviour", "score_last_5", "score_best", "final_score", "final_error")
FLOATS += ("seconds", "updates_per_s")
JSON = ("evaluations", "versions")
PATHS = ("data", "run_dir", "resume", "flow", "consistency")  # arguments that are paths


def read_json(path: Path) -> dict:
    """Empty if the file is missing, or was cut off when a run died."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def output(*command: str) -> str:
    """What a command prints; empty if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


# -------------------------------------------------------------------- a run


def policy_updates(args: dict) -> int:
    """Updates of the policy stage of a run that has ended."""
    stop = args.get("stop_after") or args["total_steps"]
    return min(stop, args["total_steps"])


def read_run(folder: Path, label: str = "") -> dict:
    """The row of a finished run, with its arguments under "args"; exits if the run is broken."""
    try:
        result = json.loads((folder / "result.json").read_text())
        facts = json.loads((folder / "args.json").read_text())
        with (folder / "metrics.csv").open(newline="") as file:
            metrics = list(csv.DictReader(file))
        return make_row(folder, label, result, facts, metrics)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f"error: {folder} is not the folder of a finished run ({error!r:.100})")


def make_row(folder: Path, label: str, result: dict, facts: dict, metrics: list[dict]) -> dict:
    args = facts["args"]
    before = result["updates"] - policy_updates(args)  # updates of the stages before the policy's
    evaluations = []
    speeds = []
    for row in metrics:
        update = int(row["step"]) - before
        score = row.get("eval/normalized_score") or row.get("eval/return")
        if score:
            evaluations.append((update, float(score)))
        if update > 0 and row.get("time/updates_per_s"):
            speeds.append(float(row["time/updates_per_s"]))
    command = facts.get("command") or command_of(result["algorithm"], args)
    source = result["dataset"].split("/")[0]
    if args.get("data") == "auto" and source in ("bundled", "d4rl"):
        command += f" --data {source}"  # auto may take another one elsewhere
    kind = "normalized_score" if "normalized_score_best" in result else "return"
    final = result.get(f"final_{kind}")
    run = {
        "label": label,
        "behaviour": facts["dataset"].get("mean_score"),
        "policy_updates": policy_updates(args),
        "score_last_5": result.get(f"{kind}_last_5"),
        "score_best": result.get(f"{kind}_best"),
        "final_score": final,
        "final_error": result.get(f"final_{kind}_error"),
        "final_episodes": None if final is None else args["final_episodes"],
        "evaluations": evaluations,
        "updates_per_s": median(speeds) if speeds else None,
        "versions": result.get("versions"),
        "device": result.get("device"),
        "commit": commit_of(facts.get("sha256", {})),
        "command": command,
        "arguments": folder / "args.json",
        "args": args,
    }
    for name in ("algorithm", "env", "seed", "dataset", "sha256", "updates", "seconds"):
        run[name] = result[name]
    machine = read_json(folder / "machine.json")  # written by sweep.py
    for name in ("cpu", "cores", "threads"):
        run[name] = machine.get(name)
    return run


def commit_of(sha256: dict[str, str]) -> str:
    """The newest commit that has these files, {name: SHA-256}; empty if there is none."""
    paths = {}
    for name, digest in sha256.items():
        paths[name if (ROOT / name).exists() else f"benchmarks/{name}"] = digest
    if not paths:
        return ""
    for commit in output("git", "-C", str(ROOT), "log", "--format=%H", "--", *paths).split():
        if all(sha256_at(commit, path) == digest for path, digest in paths.items()):
            return commit
    return ""


def sha256_at(commit: str, path: str) -> str:
    command = ["git", "-C", str(ROOT), "show", f"{commit}:{path}"]
    return hashlib.sha256(subprocess.run(command, capture_output=True).stdout).hexdigest()


def command_of(algorithm: str, args: dict) -> str:
    """The shortest command with these arguments: it omits those of defaults, preset and --quick."""
    if algorithm not in SCRIPTS:
        return ""
    script = importlib.import_module(algorithm)
    flags = ["--env", args["env"], "--seed", str(args["seed"])]
    if args.get("quick"):
        flags.append("--quick")
    start, _ = script.parse_args(flags)
    for name, usual in json.loads(json.dumps(asdict(start))).items():
        value = args.get(name, usual)
        if value == usual or name in ("run_dir", "resume"):
            continue
        flag = name.replace("_", "-")
        if value is True or value is False:
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)]
        elif name in PATHS:
            flags += [f"--{flag}", Path(value).name]
        else:
            flags += [f"--{flag}", str(value)]
    return shlex.join(["python", f"{algorithm}.py", *flags])


def public(facts: dict) -> dict:
    """Contents of args.json without the folders of the machine that it was written on."""
    args = dict(facts["args"])
    for name in PATHS:
        if args.get(name):
            args[name] = Path(args[name]).name
    kept = {name: facts[name] for name in ("device", "sha256", "command") if name in facts}
    return {"args": args, **kept}


# ------------------------------------------------------------------ a table


def six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def encode(run: dict, table: Path) -> dict[str, str]:
    """A row as text. The path of the arguments is relative to the table."""
    row = {}
    for name in COLUMNS:
        value = run.get(name)
        if value is None:
            row[name] = ""
        elif name == "evaluations":
            row[name] = json.dumps([(update, six_digits(score)) for update, score in value])
        elif name in JSON:
            row[name] = json.dumps(value)
        elif name in FLOATS:
            row[name] = f"{value:.6g}"
        elif name == "arguments":
            row[name] = relpath(value, table.parent)
        else:
            row[name] = str(value)
    return row


def decode(row: dict[str, str], table: Path) -> dict:
    """The run of a row, with its arguments under "args"."""
    run = dict(row)
    for name in INTEGERS:
        run[name] = int(row[name]) if row[name] else None
    for name in FLOATS:
        run[name] = float(row[name]) if row[name] else None
    for name in JSON:
        run[name] = json.loads(row[name])
    run["evaluations"] = [(update, score) for update, score in run["evaluations"]]
    run["arguments"] = table.parent / row["arguments"]
    run["args"] = json.loads(run["arguments"].read_text())["args"]
    return run


def split(text: str, table: Path) -> list[dict[str, str]]:
    """The complete rows of a table's text: a crash can have cut off the last one."""
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    if reader.fieldnames and tuple(reader.fieldnames) != COLUMNS:
        sys.exit(f"error: {table} has other columns than sweep.py and record.py write")
    return list(reader)


def read_table(table: Path) -> list[dict]:
    """The runs of a table."""
    try:
        rows = split(table.read_text(), table)
        return [decode(row, table) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {table} is not a table of sweep.py or record.py ({error!r:.200})")


def write_table(table: Path, runs: list[dict]) -> None:
    """Replaces a table."""
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for run in runs:
            writer.writerow(encode(run, table))


def append(table: Path, run: dict) -> bool:
    """Adds a row to a table unless it has that run at that update; returns whether it did.

    A last row that a crash has cut off is removed first.
    """
    row = encode(run, table)
    with table.open("a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another sweep may write to the same table
        file.seek(0)
        text = file.read()
        rows = split(text, table)
        whole = text[: text.rfind("\n") + 1]
        file.truncate(len(whole.encode()))
        for other in rows:
            if (other["arguments"], other["updates"]) == (row["arguments"], row["updates"]):
                return False
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not whole:
            writer.writeheader()
        writer.writerow(row)
    return True
