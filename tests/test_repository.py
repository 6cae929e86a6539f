"""The repository itself: the README's commands and table, requirements, the form of the scripts."""

import ast
import csv
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import common
import dac

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [name for name in ("dac.py", "qdq.py", "cped.py") if (ROOT / name).exists()]
README = (ROOT / "README.md").read_text()


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def test_the_readme_has_its_two_commands_and_ci_runs_its_test_command():
    assert "python dac.py --env hopper-medium-replay --quick" in readme_commands()
    assert "pip install -r requirements.txt" in readme_commands()
    ci = (ROOT / ".ci" / "run").read_text()
    assert "ruff check . && ruff format --check . && python -m pytest -q" in README
    assert "ruff check . && ruff format --check . && python -m pytest -q" in ci


def python_commands() -> list[str]:
    lines = readme_commands()
    return [line for line in lines if line.startswith("python ") and ".py" in line]


@pytest.mark.parametrize("line", python_commands())
def test_readme_commands_parse(line, monkeypatch, tmp_path):
    """Each flag of each command exists and its values are of the right kind."""
    script, *flags = shlex.split(line)[1:]
    assert (ROOT / script).exists()
    if script in SCRIPTS:
        module = __import__(script.removesuffix(".py"))
        monkeypatch.chdir(tmp_path)
        if "--resume" in flags:
            folder = Path(flags[flags.index("--resume") + 1])
            folder.mkdir(parents=True)
            (folder / "args.json").touch()
            content = {"algorithm": module.ALGORITHM, "args": asdict(module.Args())}
            torch.save(content, folder / "checkpoint.pt")
        args, _ = module.parse_args(flags)
        assert isinstance(args, module.Args)


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_data_of_the_readme_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(python_blocks()[0], {})
    arrays, info = common.load_dataset("Hopper-v4", "my.npz")
    assert info["episodes"] == 10 and len(arrays["obs"]) == 9990


def test_a_policy_acts_and_is_exported_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in python_blocks() if "checkpoint.pt" in block]
    agent = dac.DAC(11, 3, dac.Args())
    content = {"obs_dim": 11, "act_dim": 3, "args": asdict(agent.args), "agent": agent.state_dict()}
    torch.save(content, "checkpoint.pt")
    names = {}
    exec(block, names)
    assert names["actions"].shape == (2, 3)
    exported = torch.export.load("policy.pt2").module()
    for size in (1, 7):
        obs = torch.randn(size, 11)
        noise = torch.randn(5, size, 3)
        expected = dac.sample_actions(agent.actor, obs, noise, agent.schedule)
        torch.testing.assert_close(exported(obs, noise), expected)


def requirements() -> dict[str, str]:
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    return dict(re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?==([\w.]+)", line).groups() for line in lines)


def test_requirements_are_pinned():
    """A MuJoCo 3: with each of them Hopper has D4RL's contacts (tests/test_common.py)."""
    assert requirements()["mujoco"].startswith("3.")


def test_the_lock_has_the_required_versions_and_a_hash_for_every_package():
    head, *entries = re.split(
        r"^(?=[\w.-]+==)", (ROOT / "requirements.lock").read_text(), flags=re.M
    )
    locked = [re.match(r"([\w.-]+)==([\w.+]+)", entry).groups() for entry in entries]
    assert {pair for pair in locked if pair[0] in requirements()} == set(requirements().items())
    assert all("--hash=sha256:" in entry for entry in entries) and not any(
        "://" in part for part in (head, *entries)
    )
    command = "uv pip compile requirements.txt --universal --generate-hashes --python-version 3.11"
    assert re.search(rf"^# +{command} --no-annotate -o requirements.lock$", head, re.M)
    assert (
        "requirements.lock` installs exactly the locked packages; the file's first lines" in README
    )


# ------------------------------------------------------------------------------ form of the scripts

each_script = pytest.mark.parametrize("script", SCRIPTS)


def definitions(script: str) -> dict[str, str]:
    """Lines of each function and class at the top level, and of each method as Class.method."""
    source = (ROOT / script).read_text()
    lines = source.splitlines()
    nodes = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            nodes[node.name] = node
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            nodes.update({f"{node.name}.{part.name}": part for part in methods})
    return {name: "\n".join(lines[n.lineno - 1 : n.end_lineno]) for name, n in nodes.items()}


@each_script
def test_every_argument_is_explained(script):
    source = (ROOT / script).read_text()
    lines = source.splitlines()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    (args,) = [node for node in classes if node.name == "Args"]
    for field in args.body:
        own = lines[field.lineno - 1]
        above = lines[field.lineno - 2].strip()
        assert "  # " in own or (above.startswith("# ") and len(above) > 20), field.target.id


@each_script
def test_a_script_takes_two_names_from_common_and_nothing_from_the_rest_of_the_project(script):
    names = {"common": set()}
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.ImportFrom):
            names.setdefault(node.module, set()).update(alias.name for alias in node.names)
        if isinstance(node, ast.Import):
            names.update({alias.name: set() for alias in node.names})
    assert names["common"] == {"load_dataset", "evaluate"}
    assert not names.keys() & {"benchmarks", "tests", "dac", "qdq", "cped"}


@each_script
def test_main_reads_from_top_to_bottom(script):
    """No function and no lambda inside it; no line of the script is longer than 100 characters."""
    (main,) = ast.parse(definitions(script)["main"]).body
    inner = [node for node in ast.walk(main) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    assert inner == [main]
    assert max(map(len, (ROOT / script).read_text().splitlines())) <= 100


def sections(script: str) -> dict[str, str]:
    """Title -> text."""
    parts = re.split(r"^# -{20,} (.*)$", (ROOT / script).read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def test_the_scripts_have_the_same_sections_and_the_same_helpers():
    titles = [list(sections(script)) for script in SCRIPTS]
    assert titles[0][:2] == ["arguments", "networks"]  # then the generative model, by its name
    assert titles[0][3] == "agent"
    helpers = titles[0][4]
    assert helpers == "helpers, word for word in dac.py, qdq.py, cped.py"
    assert titles[0][5:] == ["main"]
    for script, own in zip(SCRIPTS, titles):
        assert own[:2] + own[3:] == titles[0][:2] + titles[0][3:], script
        assert sections(script)[helpers] == sections("dac.py")[helpers], script
        ending, other = (sections(s)["main"].split("\nif __name__")[1] for s in (script, "dac.py"))
        assert ending == other, script
    assert len({own[2] for own in titles}) == len(SCRIPTS)


def equations() -> list[tuple[str, str, str]]:
    """Rows of the README's tables: script, mark such as Eq. 15, function that carries it."""
    found = []
    row = r"^\| *([^|]*?) *\|.*\| *`(\w+\.py)` *`([\w.]+)` *\|$"
    for marks, script, name in re.findall(row, README, re.M):
        found += [(script, mark, name) for mark in re.findall(r"Eq\. \d+", marks)]
    return found


def test_the_readme_has_a_table_of_equations_for_each_script():
    assert {script for script, _, _ in equations()} == set(SCRIPTS)
    assert len(equations()) >= 12


@pytest.mark.parametrize(("script", "mark", "name"), equations())
def test_each_equation_is_marked_where_the_readme_says(script, mark, name):
    assert re.search(rf"# .*{mark}\b", definitions(script)[name])


@each_script
def test_every_deviation_of_the_docstring_is_marked_at_its_line(script):
    source = (ROOT / script).read_text()
    docstring = ast.get_docstring(ast.parse(source))
    numbers = re.findall(r"^ *(\d+)\. ", docstring, re.M)
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    marked = set()
    for comment in re.findall(r"deviations? ([\d, and]+)", source):
        marked |= set(re.findall(r"\d+", comment))
    assert marked == set(numbers)


@pytest.mark.parametrize(
    ("name", "scripts"),
    [("mish", ["dac.py", "qdq.py"]), ("Batch", ["dac.py", "qdq.py", "cped.py"])],
)
def test_what_several_scripts_need_is_the_same_text_in_each(name, scripts):
    assert len({definitions(script)[name] for script in scripts}) == 1


@each_script
def test_each_script_signs_its_checkpoints_with_its_own_name(script):
    module = __import__(script.removesuffix(".py"))
    assert f"{module.ALGORITHM}.py" == script


def test_bundled_samples_are_those_of_their_readme():
    text = (common.BUNDLED / "README.md").read_text()
    files = sorted(common.BUNDLED.glob("*.hdf5"))
    assert [path.stem for path in files] == ["hopper-medium-replay", "hopper-medium"]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert all(f"| `{path.name}` | `{common.sha256(path)}` |" in text for path in files)
    for path, (low, high) in zip(
        files, ((327, 654), (994, 1988))
    ):  # 0.7 to 1.4 times the mean return of D4RL's file
        _, info = common.load_dataset(path.stem, "bundled")
        assert info["transitions"] >= 100_000 and low <= info["mean_return"] <= high


def test_each_score_of_the_readme_has_its_row_in_the_report():
    """Its table of results: the data, their mean, then a column per algorithm.

    The first row has the policy updates of each column; a row may name its own.
    """
    titles_of = {"cloning-dac": "cloning", "td3_bc": "TD3+BC"}
    known = set()
    for path in ROOT.glob("benchmarks/report/results-*.csv"):
        for row in csv.DictReader(path.read_text().splitlines()):
            name = row["algorithm"].split()[0]
            title = titles_of.get(name, name.upper())
            data = (f"`{row['task']}`", f"{float(row['behaviour'] or 0):.1f}")
            score = f"{float(row['mean']):.1f}"
            if row["mean_std"]:  # the population's; README has the standard error
                score += f" ± {float(row['mean_std']) / (int(row['seeds']) - 1) ** 0.5:.1f}"
            known.add((*data, title, f"{int(row['policy_updates']):,}", score))
    lines = README.split("## Results so far")[1].split("\n## ")[0].splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    titles, _, updates, *tasks = table
    assert len(tasks) >= 2
    for data, mean, *scores in tasks:
        task = data.split(",")[0]  # what follows says which data stand in for it
        own = re.search(r"([\d,]+) updates", data)
        lengths = [own[1]] * len(scores) if own else updates[2:]
        for title, length, score in zip(titles[2:], lengths, scores):
            assert not score or (task, mean, title, length, score) in known, (task, title)


def test_no_placeholder_is_left_in_the_documents():
    for path in [ROOT / "README.md", *ROOT.glob("benchmarks/**/*.md")]:
        assert not re.search(r"^(RESULTS|TABLE|TODO)", path.read_text(), re.M), path


def test_every_record_has_its_commands_and_is_in_the_report():
    report = (ROOT / "benchmarks" / "REPORT.md").read_text()
    records = [path.parent for path in ROOT.glob("benchmarks/results/*/results.csv")]
    assert len(records) >= 4
    for record in records:
        assert (
            "python " in (record / "README.md").read_text()
            and f"[({record.name})](results/{record.name})" in report
        )
