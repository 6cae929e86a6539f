"""`python common.py`: evaluation of checkpoints, films, descriptions of datasets, and mistakes."""

import copy
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import make_raw, write_hdf5

import common
import dac
from common import UserError

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--num-critics=2",
    "--num-next-actions=2",
    "--hidden-dim=16",
    "--batch-size=64",
    "--total-steps=10",
    "--final-episodes=4",
]


def train(root: Path, *flags: str) -> tuple[Path, dict]:
    """Folder and result of a short run of dac.py."""
    path = write_hdf5(root / "small.hdf5", make_raw())
    where = ["--env", "hopper-medium", "--data", str(path), "--run-dir", str(root / "runs")]
    result = dac.main([*where, *SMALL, *flags])
    (folder,) = (root / "runs").glob("*/dac/*")
    return folder, result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), "--eval-episodes=1")


@pytest.fixture
def checkpoint(trained) -> dict:
    """Content of the run's checkpoint, to be changed."""
    folder, _ = trained
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def program(*arguments: object) -> dict[str, np.ndarray] | None:
    return common.main([str(argument) for argument in arguments])


def saved(content: object, folder: Path) -> Path:
    path = folder / "changed.pt"
    torch.save(content, path)
    return path


def refused(message: str, *arguments: object) -> None:
    """The program ends in one sentence, with exit status 1."""
    with pytest.raises(UserError, match=message) as error:
        program(*arguments)
    assert isinstance(error.value.code, str)  # which Python prints, with exit status 1
    assert error.value.code.startswith("error: ") and "\n" not in error.value.code


# --------------------------------------------------------------- evaluation


def test_it_repeats_the_final_episodes_of_the_training(trained):
    folder, printed = trained
    for path in (folder, folder / "checkpoint.pt"):
        result = program(path)
        assert result.keys() == {"return", "episode_length", "normalized_score"}
        for name, values in result.items():
            assert len(values) == 4
            assert values.mean() == printed[f"final_{name}"]
            assert values.std() / 2 == printed[f"final_{name}_error"]


def test_started_as_a_program(trained, tmp_path):
    """From another folder, without a warning: both modules of common.py register AntMaze."""
    folder, printed = trained
    run = subprocess.run(
        [sys.executable, str(ROOT / "common.py"), str(folder)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0 and run.stderr == ""
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("return ")]
    assert line.split()[1] == f"{printed['final_return']:.2f}"
    assert line.split()[2] == f"{printed['final_return_error']:.2f}"
    assert "Hopper-v4, 1000 steps at most; 4 episodes, seed 1000000000" in run.stdout
    assert "policy      dac, update 10, trained on file/small.hdf5" in run.stdout


def test_a_mistake_ends_in_exit_status_1(tmp_path):
    run = subprocess.run(
        [sys.executable, "common.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_episodes_and_seed(trained):
    folder, _ = trained
    ten = program(folder, "--episodes", 10, "--seed", 3)["return"]
    assert len(ten) == 10
    assert np.array_equal(ten, program(folder, "--episodes", 10, "--seed", 3)["return"])
    assert not np.array_equal(ten, program(folder, "--episodes", 10, "--seed", 4)["return"])


def test_the_table(capsys):
    common.print_result({"return": np.array([1.0, 2, 3, 4, 10])})
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "return", "4.00", "1.41", "1.00", "2.00", "3.00", "4.00", "10.00",
    ]  # fmt: skip


def test_only_the_networks_that_act_are_needed(checkpoint, trained, tmp_path):
    _, printed = trained
    checkpoint["agent"] = {name: checkpoint["agent"][name] for name in dac.DAC.POLICY}
    result = program(saved(checkpoint, tmp_path))
    assert result["return"].mean() == printed["final_return"]


def test_nothing_is_compiled(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("it compiles"))
    checkpoint["args"]["compile"] = True
    program(saved(checkpoint, tmp_path), "--episodes", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device(trained):
    folder, _ = trained
    refused("PyTorch finds no CUDA device", folder, "--device", "cuda")


def test_another_environment(trained, capsys):
    folder, _ = trained
    result = program(folder, "--env", "Hopper-v5", "--episodes", 1)
    assert "normalized_score" not in result  # D4RL's scores are for its own tasks
    assert "Hopper-v5" in capsys.readouterr().out
    assert "normalized_score" in program(folder, "--env", "hopper-expert", "--episodes", 1)
    refused(
        r"size 11 and actions of size 3, but Walker2d-v4 has 17 and 6",
        folder,
        "--env",
        "walker2d-medium",
    )
    refused("Hoper-v4", folder, "--env", "Hoper-v4")


def test_a_run_without_an_environment(tmp_path):
    folder, _ = train(tmp_path, "--no-eval")
    refused("trained with --no-eval: name an environment", folder)
    assert len(program(folder, "--env", "hopper-medium")["normalized_score"]) == 4


@pytest.mark.parametrize("name", ["dac", "qdq", "cped"])
def test_every_script_keeps_the_contract(name, checkpoint, tmp_path):
    script = importlib.import_module(name)
    args = script.Args()
    agent = getattr(script, name.upper())(11, 3, args, "cpu")
    checkpoint["algorithm"] = name
    checkpoint["args"] = vars(args)
    checkpoint["agent"] = agent.state_dict()
    assert len(program(saved(checkpoint, tmp_path), "--episodes", 1)["return"]) == 1


def test_a_script_elsewhere(checkpoint, trained, tmp_path):
    _, printed = trained
    path = tmp_path / "mine.py"
    path.write_text(
        (ROOT / "dac.py")
        .read_text()
        .replace('ALGORITHM = "dac"', 'ALGORITHM = "mine"')
        .replace("class DAC", "class MINE")
    )
    checkpoint["algorithm"] = "mine"
    changed = saved(checkpoint, tmp_path)
    refused(r"written by mine\.py, but there is no", changed)
    assert program(changed, "--script", path)["return"].mean() == printed["final_return"]
    refused("README.md is another program", changed, "--script", ROOT / "README.md")


def test_actions_that_are_not_finite(checkpoint, tmp_path):
    for tensor in checkpoint["agent"]["actor"].values():
        tensor.fill_(np.nan)
    changed = saved(checkpoint, tmp_path)
    refused("action has NaN or infinity at step 1", changed)

    policy = common.FinitePolicy(lambda obs: 1 / obs)
    assert policy(np.array([1.0])) == 1
    with np.errstate(divide="ignore"), pytest.raises(UserError, match="at step 2"):
        policy(np.array([0.0]))


# ----------------------------------------------------------------- versions


def test_versions_of_the_training_beside_those_of_now(checkpoint, tmp_path, capsys):
    checkpoint["info"]["versions"]["numpy"] = "1.26.0"
    checkpoint["info"]["versions"]["mujoco"] = "1.50.0"
    del checkpoint["info"]["versions"]["torch"]
    program(saved(checkpoint, tmp_path), "--episodes", 1)
    out = capsys.readouterr().out
    assert re.search(r"numpy +\S+ +1\.26\.0  \(differs\)\n", out)
    assert re.search(r"torch +\S+ +unknown  \(differs\)\n", out)
    assert re.search(r"python +(\S+) +\1\n", out)
    assert re.search(r"mujoco +\S+ +1\.50\.0  \(differs\)\n", out)


def test_another_mujoco_gets_a_sentence(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "running_version", lambda package: "4.0.0")
    checkpoint["info"]["versions"]["mujoco"] = "3.4.0"
    changed = saved(checkpoint, tmp_path)
    program(changed, "--episodes", 1)
    assert "note        MuJoCo 4 moves free bodies" in capsys.readouterr().out
    program(changed, "--episodes", 1, "--env", "Hopper-v5")  # another environment in any case
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("env", "then", "now", "messages"),
    [
        ("Hopper-v4", "3.4.0", "3.4.0", []),
        ("Hopper-v4", "2.3.7", "3.4.0", []),
        ("Hopper-v4", "3.4.0", "3.5.0", ["contacts"]),
        ("Hopper-v4", "3.17.0", "3.4.0", ["contacts"]),
        ("Hopper-v4", "3.5.0", "3.17.0", []),
        ("Hopper-v4", "3.4.0", "4.0.0", ["contacts", "MuJoCo 4"]),
        ("Hopper-v4", "3.17.0", "4.0.0", ["MuJoCo 4"]),
        ("D4RLAntMaze-umaze-v2", "3.4.0", "3.17.0", ["contacts"]),
        ("Walker2d-v4", "3.4.0", "3.17.0", []),  # its contacts have no margin
        ("HalfCheetah-v4", "3.4.0", "3.17.0", []),
        ("Pendulum-v1", "3.4.0", "4.0.0", []),  # it has no MuJoCo
        ("Hopper-v4", "unknown", "4.0.0", []),
        ("Hopper-v4", "3.4.0", "none", []),
    ],
)
def test_notes_on_mujoco(env, then, now, messages, monkeypatch):
    monkeypatch.setattr(common, "running_version", lambda package: now)
    trained = {"versions": {"mujoco": then}}
    with common.make_env({"env": env}) as built:
        notes = common.mujoco_notes(built, trained, {})
    assert len(notes) == len(messages)
    for note, message in zip(notes, messages):
        assert message in note


@pytest.mark.parametrize(
    ("then", "trained_restored", "now", "now_restored", "same"),
    [
        ("3.4.0", False, "3.17.0", True, True),
        ("3.17.0", True, "3.4.0", False, True),
        ("3.17.0", True, "3.17.0", True, True),
        ("3.17.0", True, "3.17.0", False, False),
        ("3.17.0", False, "3.17.0", True, False),
    ],
)
def test_restored_contacts_are_those_of_d4rl(
    then, trained_restored, now, now_restored, same, monkeypatch
):
    monkeypatch.setattr(common, "running_version", lambda package: now)
    trained = {"versions": {"mujoco": then}, "d4rl_contacts": trained_restored}
    with common.make_env({"env": "Hopper-v4"}) as built:
        notes = common.mujoco_notes(built, trained, {"d4rl_contacts": now_restored})
    assert (notes == []) == same


# ---------------------------------------------------------- bad checkpoints


def test_files_that_are_no_checkpoints(trained, tmp_path):
    folder, _ = trained
    whole = (folder / "checkpoint.pt").read_bytes()
    damaged = {
        "text.pt": b"hello\n",
        "empty.pt": b"",
        "zeros.pt": bytes(1000),
        "truncated.pt": whole[: len(whole) // 2],
        "start.pt": whole[:100],
        "middle.pt": whole[:2000] + bytes(2000) + whole[4000:],
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        refused(f"{name} is not a checkpoint, or is damaged", tmp_path / name)
    refused("absent.pt does not exist", tmp_path / "absent.pt")
    refused("checkpoint.pt does not exist", tmp_path)
    refused("small.hdf5 is not a checkpoint", folder.parents[3] / "small.hdf5")


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("the pickle ran",))


def test_a_checkpoint_runs_no_code(checkpoint, tmp_path):
    checkpoint["info"]["trap"] = Trap()
    refused("not a checkpoint, or is damaged", saved(checkpoint, tmp_path))


@pytest.mark.parametrize("key", list(common.CHECKPOINT_FORM))
def test_parts_that_are_missing_or_of_another_kind(key, checkpoint, tmp_path):
    value = checkpoint.pop(key)
    refused(f"lacks {key}", saved(checkpoint, tmp_path))
    checkpoint[key] = [value]
    refused(f"lacks {key}", saved(checkpoint, tmp_path))
    refused("not a checkpoint of a run", saved(torch.zeros(3), tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env": 3}, "no usable environment"),
        ({"ref_min": None}, "no usable environment or reference returns"),
        ({"ref_max": "x"}, "no usable environment or reference returns"),
        ({"env": "NoSuch-v0"}, "NoSuch"),
        ({"env": "{"}, "there is no environment"),
        ({"env": "CartPole-v1"}, "only bounded boxes"),
    ],
)
def test_info_that_cannot_be_used(change, message, checkpoint, tmp_path):
    checkpoint["info"].update(change)
    refused(message, saved(checkpoint, tmp_path))


def test_a_module_that_a_checkpoint_names_is_not_imported(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("import pytest\npytest.fail('it was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint["info"]["env"] = "evil_module:Env-v0"
    refused("evil_module:Env-v0", saved(checkpoint, tmp_path))
    checkpoint["algorithm"] = "evil_module"
    refused("there is no", saved(checkpoint, tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../dac", "cannot be the name of a script"),
        ("benchmarks.sweep", "cannot be the name of a script"),
        ("", "cannot be the name of a script"),
        ("däc", "cannot be the name of a script"),
        ("os", "written by os.py, but there is no"),
        ("common", "common.py is another program"),
    ],
)
def test_algorithms_that_are_no_scripts(name, message, checkpoint, tmp_path):
    checkpoint["algorithm"] = name
    refused(message, saved(checkpoint, tmp_path))


def test_arguments_of_another_version(checkpoint, tmp_path):
    first = copy.deepcopy(checkpoint)
    old = {"checkpoint_every": 10_000, "eval_workers": 0, "tf32": False}
    first["args"].update(old)
    first["row"] = {}
    refused(r"not exist here \(checkpoint_every, eval_workers, tf32\)", saved(first, tmp_path))

    checkpoint["args"]["hidden_dim"] = "wide"
    refused("cannot use the checkpoint's arguments", saved(checkpoint, tmp_path))


def test_an_argument_that_is_not_stored_takes_its_default(checkpoint, trained, tmp_path):
    _, printed = trained
    del checkpoint["args"]["log_every"]
    assert program(saved(checkpoint, tmp_path))["return"].mean() == printed["final_return"]
    del checkpoint["args"]["final_episodes"]
    assert len(program(saved(checkpoint, tmp_path))["return"]) == dac.Args().final_episodes
    checkpoint["args"]["final_episodes"] = "many"
    refused("type --episodes", saved(checkpoint, tmp_path))


def test_networks_that_do_not_fit(checkpoint, tmp_path):
    wide = copy.deepcopy(checkpoint)
    wide["args"]["hidden_dim"] = 32
    refused("network actor does not fit .*size mismatch", saved(wide, tmp_path))
    extra = copy.deepcopy(checkpoint)
    extra["agent"]["critic_target"]["more"] = torch.zeros(1)
    refused("network critic_target does not fit .*more", saved(extra, tmp_path))
    other = copy.deepcopy(checkpoint)
    other["agent"]["actor"] = 3
    refused("network actor does not fit", saved(other, tmp_path))
    del checkpoint["agent"]["actor"]
    refused("lacks the network actor", saved(checkpoint, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a run to evaluate, or a dataset"),
        (["--env=hopper-medium", "--video=a.mp4"], "--video needs a checkpoint"),
        (["--env=hopper-medium", "--episodes=3"], "--episodes needs a checkpoint"),
        (["x.pt", "--data=bundled"], "--data names a dataset"),
        (["x.pt", "--episodes=0"], "--episodes 0: must be at least 1"),
        (["x.pt", "--seed=-1"], "--seed -1: must be from 0"),
        (["x.pt", "--video=a.txt"], "a.txt: must end in .mp4"),
        (["x.pt", "--video=absent/a.mp4"], "there is no folder absent"),
    ],
)
def test_options_that_contradict(arguments, message):
    refused(message, *arguments)


# -------------------------------------------------------------------- films


class Filmed(gym.Env):
    """Renders without a graphics card; an episode lasts seed % 4 + 2 steps, a step is worth 4."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode=None):
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        self.left = seed % 4 + 2
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(2, np.float32), 4.0, self.left == 0, False, {}

    def render(self):
        return np.full((32, 32, 3), 50 * self.left, np.uint8)


class Dark(Filmed):
    def render(self):
        raise RuntimeError("no graphics")


@pytest.fixture
def films():
    gym.register("Filmed-v0", Filmed, max_episode_steps=100)
    gym.register("Dark-v0", Dark, max_episode_steps=100)
    yield
    del gym.registry["Filmed-v0"]
    del gym.registry["Dark-v0"]


def highest(obs: np.ndarray) -> np.ndarray:
    return np.ones((len(obs), 1), np.float32)


def test_a_film_is_one_whole_episode(films, tmp_path):
    info = {"env": "Filmed-v0", "ref_min": None}
    path = tmp_path / "a.mp4"
    total = common.record_video(highest, info, path, seed=2)
    assert total == pytest.approx(4 * 4)
    assert imageio.get_reader(path).count_frames() == 4
    with pytest.raises(UserError, match=r"cannot write .*absent/a\.mp4"):
        common.record_video(highest, info, tmp_path / "absent" / "a.mp4", seed=2)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_without_a_renderer(films, tmp_path):
    with pytest.raises(UserError, match=r"cannot render Dark-v0 .*no graphics.*MUJOCO_GL"):
        common.record_video(highest, {"env": "Dark-v0"}, tmp_path / "a.mp4", seed=2)
    assert not list(tmp_path.iterdir())


def test_frames_that_ffmpeg_lost_are_missed(films, tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    common.record_video(highest, {"env": "Filmed-v0"}, path, seed=1)  # 3 frames
    short = imageio.get_reader(path)
    monkeypatch.setattr(imageio, "get_reader", lambda _: short)
    with pytest.raises(UserError, match="ffmpeg wrote a part of it"):
        common.record_video(highest, {"env": "Filmed-v0"}, path, seed=2)  # 4 frames


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk(films, tmp_path, capfd):
    """An earlier film stays, and nothing half-written; ffmpeg adds no lines to the sentence."""
    for ending in common.VIDEO_ENDINGS:
        path = tmp_path / f"a{ending}"
        path.write_text("earlier")
        (tmp_path / f"a.part{ending}").symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"cannot write .*is the disk full"):
            common.record_video(highest, {"env": "Filmed-v0"}, path, seed=2)
        assert path.read_text() == "earlier"
    assert len(list(tmp_path.iterdir())) == len(common.VIDEO_ENDINGS)
    assert capfd.readouterr().err == ""


def test_the_program_films_hopper_and_does_nothing_else(trained, tmp_path, monkeypatch, capsys):
    folder, _ = trained
    monkeypatch.setattr(common, "evaluate", lambda *_: pytest.fail("it evaluates"))
    path = tmp_path / "hopper.mp4"
    try:
        assert program(folder, "--video", path, "--seed", 5, "--episodes", 100) is None
    except UserError as error:
        if "cannot render" in str(error):
            pytest.skip(str(error))
        raise
    out = capsys.readouterr().out
    assert "--episodes has no effect with --video" in out
    steps = int(re.search(r"hopper\.mp4: (\d+) steps, return", out)[1])
    with imageio.get_reader(path) as film:
        assert film.count_frames() == steps > 1
        assert np.std(film.get_data(0)) > 10  # a picture, and not one colour


# ----------------------------------------------------------------- datasets


def test_the_description_of_a_dataset(tmp_path, capsys):
    raw = make_raw(rows=500)
    raw["observations"] = raw["observations"].clip(-2, 3)
    raw["rewards"][:] = 0
    raw["rewards"][::50] = np.arange(10) ** 2  # the returns of the ten episodes
    path = write_hdf5(tmp_path / "a.hdf5", raw)
    assert program("--env", "hopper-medium", "--data", path) is None
    out = capsys.readouterr().out
    assert "file/a.hdf5" in out and "10 episodes" in out
    assert "observation 11 numbers, -2 to 3 in the data" in out
    assert "actions     3 in [-1, 1], the box of the environment" in out
    expected = "min 0.00, quartiles 5.25 20.50 45.75, mean 28.50, max 81.00"  # of 0, 1, 4, ..., 81
    assert f"returns     of 10 trajectories, without the dropped rows: {expected}" in out
    bins = [line.split() for line in out.splitlines()[-10:]]
    assert [int(words[3]) for words in bins] == [3, 2, 0, 1, 1, 0, 1, 1, 0, 1]
    assert bins[0][:3] == ["0.00", "to", "8.10"] and bins[-1][2] == "81.00"
    assert len(bins[0][4]) == 50 and len(bins[1][4]) == 33 and len(bins[2]) == 4


def test_one_return_alone_has_a_histogram(capsys):
    common.print_returns(np.ones(5, np.float32), np.array([0, 0, 0, 0, 1], bool))
    assert "min 5.00" in capsys.readouterr().out


def test_a_dataset_without_an_environment(dataset, capsys):
    program("--env", "my-robot", "--data", dataset)
    out = capsys.readouterr().out
    assert "evaluation  none" in out and "my-robot is neither a task nor a Gymnasium id" in out
    assert "of 12 trajectories" in out
    refused("does not exist", "--env", "my-robot", "--data", "absent.hdf5")
    refused("did you mean hopper-medium", "--env", "hoper-medium", "--data", "bundled")
