"""The repository itself: the README's commands, file lengths, pinned requirements, helpers that must stay the same."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import common

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


@pytest.mark.parametrize("line", [line for line in readme_commands() if line.startswith("python ") and ".py" in line])
def test_readme_commands_parse(line, monkeypatch, tmp_path):
    """Each flag of each command exists and its values are of the right kind; checkpoints are taken as given."""
    script, *flags = shlex.split(line)[1:]
    assert (ROOT / script).exists()
    if script in SCRIPTS:
        module = __import__(script.removesuffix(".py"))
        state = {"args": {}, "path": tmp_path / "checkpoint.pt"}
        monkeypatch.setattr(module, "load_checkpoint", lambda path: state)
        monkeypatch.chdir(tmp_path)
        newest = tmp_path / f"runs/hopper-medium/{module.ALGORITHM}/seed1-20260101-120000/checkpoint.pt"
        newest.parent.mkdir(parents=True)
        newest.touch()
        args, _ = module.parse_args(flags)
        assert isinstance(args, module.Args)


def test_the_python_examples_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(blocks[0], {})
    arrays, info = common.load_dataset("Hopper-v4", "my.npz")
    assert info["episodes"] == 10 and len(arrays["obs"]) == 9990
    for block in blocks[1:]:
        ast.parse(block)


@pytest.mark.parametrize("name", [*SCRIPTS, "common.py"])
def test_file_lengths(name):
    ceiling = {"common.py": 580, "cped.py": 655, "qdq.py": 750}.get(name, 620)  # an environment; two stages, three stages
    lines = len((ROOT / name).read_text().splitlines())
    assert lines <= ceiling
    assert re.search(rf"^\| \[`{name}`\].*\| {lines} \|$", README, re.M), f"README's table: {name} has {lines} lines"


def requirements() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    return dict(re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?==([\w.]+)", line).groups() for line in lines)


def test_requirements_are_pinned():
    assert tuple(map(int, requirements()["mujoco"].split(".")))[:2] < (3, 5)  # 3.5 changed Hopper's contacts


def test_the_lock_has_the_required_versions_and_a_hash_for_every_package():
    head, *entries = re.split(r"^(?=[\w.-]+==)", (ROOT / "requirements.lock").read_text(), flags=re.M)
    locked = [re.match(r"([\w.-]+)==([\w.+]+)", entry).groups() for entry in entries]
    assert {pair for pair in locked if pair[0] in requirements()} == set(requirements().items())
    assert all("--hash=sha256:" in entry for entry in entries) and not any("://" in part for part in (head, *entries))
    assert (command := re.search(r"^#\s+(uv pip compile .*)$", head, re.M)) and f"`{command[1]}`" in README


def test_every_argument_is_explained():
    source = (ROOT / "dac.py").read_text()
    (args,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    lines = source.splitlines()
    for field in args.body:
        own, above = lines[field.lineno - 1], lines[field.lineno - 2].strip()
        assert "  # " in own or (above.startswith("# ") and len(above) > 20), field.target.id


def functions(name: str) -> dict[str, str]:
    source = (ROOT / name).read_text()
    return {
        node.name: ast.get_source_segment(source, node)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


SHARED = ("soft_update", "gradient_step", "cosine_lr", "GraphedUpdate", "shuffled_batches")
SHARED += ("save_checkpoint", "load_checkpoint", "restore", "parse_args")


def test_shared_helpers_are_the_same_text_in_all_scripts():
    reference = functions("dac.py")
    assert set(SHARED) <= set(reference)
    for script in SCRIPTS[1:]:
        own = functions(script)
        for name in SHARED:
            assert own.get(name, reference[name]) == reference[name], f"{name} differs between dac.py and {script}"


def test_the_scripts_have_the_same_sections():
    banner = r"^# -{20,} (.*)$"
    sections = re.findall(banner, (ROOT / "dac.py").read_text(), re.M)
    assert len(sections) == 7
    for script in SCRIPTS[1:]:
        assert re.findall(banner, (ROOT / script).read_text(), re.M) == sections


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_signs_its_checkpoints_with_its_own_name(script):
    module = __import__(script.removesuffix(".py"))
    assert f"{module.ALGORITHM}.py" == script


def test_bundled_samples_are_those_of_their_readme():
    text = (common.BUNDLED / "README.md").read_text()
    files = sorted(common.BUNDLED.glob("*.hdf5"))
    assert [path.stem for path in files] == ["hopper-medium-replay", "hopper-medium"]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert all(f"| `{path.name}` | `{common.sha256(path)}` |" in text for path in files)
    for path, (low, high) in zip(files, ((327, 654), (994, 1988))):  # 0.7 to 1.4 times the mean return of D4RL's file
        _, info = common.load_dataset(path.stem, "bundled")
        assert info["transitions"] >= 100_000 and low <= info["mean_return"] <= high


def test_no_placeholder_is_left_in_the_documents():
    for path in [ROOT / "README.md", *ROOT.glob("benchmarks/**/*.md")]:
        assert not re.search(r"^(RESULTS|TABLE|TODO)", path.read_text(), re.M), path


def test_every_record_has_its_commands_and_is_in_the_report():
    report = (ROOT / "benchmarks" / "REPORT.md").read_text()
    records = [path.parent for path in ROOT.glob("benchmarks/results/*/results.csv")]
    assert len(records) >= 4
    for record in records:
        assert "python " in (record / "README.md").read_text() and f"[({record.name})](results/{record.name})" in report
