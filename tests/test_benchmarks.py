"""The small programs in benchmarks/, each run once at toy size; cloning by the scripts' flags."""

import csv
import json
import runpy
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_raw, write_hdf5

import cped
import dac
import qdq
from common import load_dataset

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
README = (BENCHMARKS / "README.md").read_text().replace("\\\n", " ")


def run_program(monkeypatch, name: str, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")


# --------------------------------------------------------------------------------- the README


def test_each_program_is_in_the_readme_and_each_that_it_names_exists():
    programs = {path.name for path in BENCHMARKS.glob("*.py")} - {"root.py", "rows.py"}
    table = {line.split("`")[1] for line in README.splitlines() if line.startswith("| [`")}
    assert programs <= table
    for text in [README, *(path.read_text() for path in BENCHMARKS.glob("results/**/*.md"))]:
        if "git checkout" in text:  # the commands are those of an older commit
            continue
        for word in text.split():
            if word.startswith("benchmarks/") and word.endswith(".py"):
                assert (ROOT / word).exists(), word


def test_an_interrupted_program_ends_with_one_sentence():
    command = [sys.executable, "-c", "import root; raise KeyboardInterrupt"]
    run = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert run.returncode != 0
    assert run.stderr == "error: interrupted\n"

    command[-1] = "import root; raise RuntimeError('all others keep their traceback')"
    run = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert "Traceback" in run.stderr and "all others" in run.stderr


# ------------------------------------------------------------------------------------ cloning


def flags_of(label: str) -> list[str]:
    """The flags of a line of the README that begins with a label."""
    for line in README.splitlines():
        if line.startswith(f"| `{label}` |"):
            return line.split("`")[3].split()
    raise AssertionError(f"no {label} in the README")


def shift(before: torch.nn.Module, after: torch.nn.Module) -> torch.Tensor:
    pairs = zip(before.parameters(), after.parameters())
    return torch.cat([(new - old).flatten() for old, new in pairs]).detach()


def apart(start, one, other) -> float:
    """By how much two ways from a start differ, as a share of the second."""
    expected = shift(start, other)
    return float((shift(start, one) - expected).norm() / expected.norm())


def random_batch(kind: type, size: int = 32):
    obs, next_obs = torch.randn(2, size, 11)
    columns = {
        "obs": obs,
        "act": torch.rand(size, 3) * 2 - 1,
        "rew": torch.rand(size),
        "next_obs": next_obs,
        "not_done": torch.ones(size),
    }
    return kind(*(columns[name] for name in kind._fields))


def test_dac_with_a_large_eta_clones_by_noise_regression():
    flags = flags_of("cloning-dac")
    args, _ = dac.parse_args([*flags, "--num-critics", "2", "--hidden-dim", "32"])
    torch.manual_seed(0)
    agent = dac.DAC(11, 3, args)
    start = deepcopy(agent.actor)
    plain = deepcopy(agent.actor)
    adam = torch.optim.Adam(plain.parameters(), args.actor_lr)
    for step in range(20):
        batch = random_batch(dac.Batch)
        torch.manual_seed(step)
        agent.update(batch)
        torch.manual_seed(step)  # the same draws
        torch.randn(args.diffusion_steps, 32 * args.num_next_actions, 3)
        t = torch.randint(1, args.diffusion_steps + 1, (32,))
        eps = torch.randn(32, 3)
        x = dac.add_noise(batch.act, t, eps, agent.schedule)
        loss = args.eta * (plain(batch.obs, x, t) - eps).square().mean()
        dac.set_lr(adam, dac.cosine(args.actor_lr, step / args.total_steps))
        dac.gradient_step(adam, loss, args.max_grad_norm)
    assert agent.eta == args.eta == 1000
    assert apart(start, agent.actor, plain) < 0.02
    # and the policy asks no critic
    assert args.num_eval_actions == 1


def test_qdq_with_a_large_gamma_clones_by_likelihood():
    flags = flags_of("cloning-qdq")
    args, _ = qdq.parse_args([*flags, "--hidden-dim", "64", "--num-samples", "4"])
    torch.manual_seed(0)
    agent = qdq.QDQ(11, 3, args)
    agent.step = args.teacher_steps + args.student_steps
    assert agent.step == 2
    start = deepcopy(agent.actor)
    plain = deepcopy(agent.actor)
    adam = torch.optim.Adam(plain.parameters(), args.actor_lr)
    for n in range(20):
        batch = random_batch(qdq.Batch)
        agent.update("policy", batch)
        if n % qdq.POLICY_EVERY == 0:
            normal = torch.distributions.Normal(*plain(batch.obs))
            loss = -normal.log_prob(batch.act).sum(dim=1).mean()
            qdq.set_lr(adam, qdq.cosine(args.actor_lr, n // 2 / args.total_steps))
            qdq.gradient_step(adam, loss)
    assert apart(start, agent.actor, plain) < 0.02


def test_cped_without_q_climbs_its_flow():
    args, _ = cped.parse_args([*flags_of("cped-flow"), "--flow-hidden-dim", "16"])
    torch.manual_seed(0)
    agent = cped.CPED(11, 3, args)
    agent.step = args.flow_steps
    for layer in agent.flow.shifts.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()  # a flow that is not near the identity
    start = deepcopy(agent.actor)
    critic = deepcopy(agent.critic)
    plain = deepcopy(agent.actor)
    adam = torch.optim.Adam(plain.parameters(), args.actor_lr)
    for n in range(20):
        batch = random_batch(cped.Batch)
        agent.update(batch)
        if n % args.policy_every == 1:
            loss = -agent.flow.log_density(batch.obs, plain(batch.obs)).mean()
            cped.gradient_step(adam, loss)
    assert apart(start, agent.actor, plain) < 0.02
    assert (shift(critic, agent.critic) == 0).all()


def test_cloning_improves_and_is_recorded(dataset, tmp_path, monkeypatch):
    flags = f"--env hopper-medium --data {dataset} --run-dir {tmp_path} --total-steps 400"
    flags += " --log-every 100 --eval-every 400 --eval-episodes 1 --final-episodes 1"
    flags += " --num-critics 2 --num-next-actions 1 --hidden-dim 32"
    result = dac.main([*flags.split(), *flags_of("cloning-dac")])
    (folder,) = tmp_path.glob("hopper-medium/dac/seed0-*")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    losses = [float(row["train/bc_loss"]) for row in rows]
    assert len(losses) == 4 and losses[-1] < losses[0]

    pytest.importorskip("matplotlib", reason="needs benchmarks/requirements.txt")
    kept = tmp_path / "kept"
    options = "--labels", "cloning-dac", "--panels", "eval/normalized_score", "train/bc_loss"
    run_program(monkeypatch, "record.py", folder, "--out", kept, *options)
    (row,) = csv.DictReader((kept / "results.csv").open())
    assert (row["algorithm"], row["label"]) == ("dac", "cloning-dac")
    assert float(row["final_score"]) == pytest.approx(result["final_normalized_score"], rel=1e-5)
    assert (kept / "curves.svg").exists()
    names = {path.name for path in kept.glob("hopper-medium-*")}
    assert names == {f"hopper-medium-cloning-dac-seed0.{kind}" for kind in ("csv", "json")}


# ---------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("algorithm", ["bc", "td3_bc", "iql"])
def test_baselines_learn_from_the_loaders_transitions(algorithm, dataset, tmp_path, monkeypatch):
    d3rlpy = pytest.importorskip("d3rlpy", reason="needs d3rlpy")
    base = d3rlpy.algos.QLearningAlgoBase
    update = base.update
    seen = []
    monkeypatch.setattr(
        base, "update", lambda algo, batch: seen.append(batch) or update(algo, batch)
    )
    flags = f"--env hopper-medium --data {dataset} --run-dir {tmp_path} --total-steps 6"
    flags += " --log-every 2 --eval-every 3 --eval-episodes 1 --final-episodes 2"
    run_program(monkeypatch, "baselines.py", algorithm, *flags.split())
    (folder,) = tmp_path.glob(f"hopper-medium/{algorithm}/seed0-*")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    scored = [row for row in rows if row["eval/normalized_score"]]
    assert [row["step"] for row in scored] == ["3", "6"]
    result = json.loads((folder / "result.json").read_text())
    scores = [float(row["eval/normalized_score"]) for row in scored]
    assert result["normalized_score_last_5"] == pytest.approx(np.mean(scores))
    assert result["normalized_score_best"] == max(scores) and result["updates"] == 6
    assert {"final_normalized_score", "final_normalized_score_error"} <= result.keys()

    import rows as result_rows

    run = result_rows.read_run(folder)
    assert [step for step, _ in run["evaluations"]] == [3, 6] and run["policy_updates"] == 6
    start = f"python benchmarks/baselines.py {algorithm} --env hopper-medium --data small.hdf5"
    assert run["command"].startswith(start)

    arrays, _ = load_dataset("hopper-medium", str(dataset), need_env=True)
    kind = "return_range" if algorithm == "iql" else "none"
    rew = dac.transform_rewards(arrays["rew"], arrays["ends"], kind)[:, None]
    terminal = 1 - arrays["not_done"][:, None]
    columns = (arrays["obs"], arrays["act"], rew, arrays["next_obs"], terminal)
    known = {row.tobytes() for row in np.concatenate(columns, axis=1)}
    assert len(known) == 593  # 600 rows without those that six timeouts cut, and the last
    for batch in seen:
        fed = (
            batch.observations,
            batch.actions,
            batch.rewards,
            batch.next_observations,
            batch.terminals,
        )
        assert {row.tobytes() for row in np.concatenate(fed, axis=1)} < known


def test_baselines_without_d3rlpy_are_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "d3rlpy", None)
    with pytest.raises(SystemExit, match=r"^error: d3rlpy is missing"):
        run_program(monkeypatch, "baselines.py", "bc")


# ----------------------------------------------------------------------------------- pictures


def test_picture_and_table_of_bandits(tmp_path):
    pytest.importorskip("matplotlib", reason="needs benchmarks/requirements.txt")
    flags = "--out", str(tmp_path / "toy.png"), "--scale", "0.005", "--seed", "3"
    # its rows are processes of their own
    subprocess.run([sys.executable, str(BENCHMARKS / "toy.py"), *flags], check=True)
    assert (tmp_path / "toy.png").stat().st_size > 10_000
    with (tmp_path / "toy.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["algorithm", "quantity", "value", "gaussian", "seed"]
    assert {row["seed"] for row in table} == {"3"}
    for row in table:
        assert np.isfinite(float(row["value"])), row
        is_fit = row["quantity"] in ("energy distance", "held-out log-density")
        assert is_fit == (row["gaussian"] != ""), row
        if is_fit:
            assert np.isfinite(float(row["gaussian"])), row
    for algorithm in ("dac", "cped", "qdq"):
        quantities = {row["quantity"] for row in table if row["algorithm"] == algorithm}
        scores = {f"true reward: {what}" for what in ("data", "policy", "greedy")}
        assert scores | {"energy distance"} <= quantities


def test_uncertainty_of_a_trained_student(tmp_path, monkeypatch):
    for name in ("matplotlib", "scipy"):
        pytest.importorskip(name, reason="needs benchmarks/requirements.txt")
    # episodes long enough for windows between windows
    data = write_hdf5(tmp_path / "long.hdf5", make_raw(2000, episode=500))
    flags = f"--env hopper-medium --data {data} --no-eval --total-steps 1 --hidden-dim 64"
    flags += " --teacher-steps 20 --student-steps 20"
    qdq.main([*flags.split(), "--run-dir", str(tmp_path / "whole")])
    (student,) = tmp_path.glob("whole/hopper-medium/qdq/*")
    shared = ["--run-dir", str(tmp_path / "policy"), "--consistency", str(student)]
    qdq.main([*flags.split(), *shared])
    (folder,) = tmp_path.glob("policy/hopper-medium/qdq/*")
    kept = tmp_path / "kept"
    options = "--rows", "50", "--samples", "8"
    run_program(monkeypatch, "uncertainty.py", folder, "--out", kept, *options)
    (table,) = (json.loads(path.read_text()) for path in kept.glob("uncertainty-*.json"))
    assert set(table["H"]) == {"data", "data + 0.1", "data + 0.3", "data + 1.0", "uniform"}
    assert all(row["mean"] > 0 for row in table["H"].values())
    assert len(list(kept.glob("uncertainty-*.png"))) == 1
    # no path of this machine
    assert table["args"]["data"] == "long.hdf5" and table["args"]["consistency"] == student.name


def test_the_teachers_samples_follow_its_denoiser(monkeypatch):
    """With D(x, t) = 0.25 everywhere, all of the teacher's samples are 0.25, in return units."""
    pytest.importorskip("scipy", reason="needs benchmarks/requirements.txt")
    import uncertainty

    agent = qdq.QDQ(11, 3, qdq.Args(hidden_dim=64))
    agent.q_range[0], agent.q_range[1] = 100, 300
    monkeypatch.setattr(qdq, "denoise", lambda teacher, obs, act, x, t, args: 0.25 + 0 * x)
    batch = random_batch(qdq.Batch, 5)
    samples = uncertainty.teacher_samples(agent, batch.obs, batch.act, samples=4, levels=6)
    assert samples.shape == (5, 4)
    np.testing.assert_allclose(samples, 225, rtol=1e-6)


# --------------------------------------------------------------------------------- throughput


def test_throughput_counts_the_products_and_writes_a_row(tmp_path, monkeypatch):
    import throughput

    layer = torch.nn.Linear(5, 7)
    x = torch.randn(3, 5)
    with throughput.Products() as products:
        layer(x).sum().backward()
        torch.baddbmm(torch.zeros(2, 3, 4), torch.ones(2, 3, 6), torch.ones(2, 6, 4))
    # forward, weight gradient, batch of two
    assert products.shapes == {(1, 3, 5, 7): 1, (1, 7, 3, 5): 1, (2, 3, 6, 4): 1}

    # Products of 750 x 750, in every second update: four couplings forward, and back to the action
    # through three; the first one sees no action.
    step = throughput.make_step("cped", "policy", False, throughput.Args(), "cpu")
    with throughput.Products() as products:
        for _ in range(4):
            step()
    assert products.shapes[1, 256, 750, 750] == (4 + 3) * 2

    monkeypatch.setitem(throughput.STAGES, "cped", ("policy",))
    args = throughput.Args(
        scripts=("cped",),
        modes=("eager",),
        device="cpu",
        windows=2,
        seconds=0.01,
        evaluation=False,
        out=tmp_path,
    )
    throughput.main(args, "--scripts cped")
    lines = (tmp_path / "throughput.jsonl").read_text().splitlines()
    (row,) = (json.loads(line) for line in lines)
    assert row["stage"] == "policy" and row["updates_per_s"] > 0 and row["memory_mb"] > 100
    products = sum(count * throughput.flops(shape) for shape, count in products.shapes.items())
    assert row["gflop_per_update"] == pytest.approx(products / 4 / 1e9, rel=1e-6)
    text = (tmp_path / "throughput.md").read_text()
    assert "| cped | policy | eager |" in text
    assert f"By `python benchmarks/throughput.py --scripts cped` at commit {row['commit']}" in text


@pytest.mark.parametrize(("script", "stage"), [("dac", "policy"), ("qdq", "teacher")])
def test_throughput_measures_other_stages(script, stage, monkeypatch):
    import throughput

    step = throughput.make_step(script, stage, False, throughput.Args(), "cpu")
    assert throughput.seconds_of(step, 1, "cpu") > 0
