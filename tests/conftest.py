import dataclasses
import os

# before torch: threads that wait leave the core to the others
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import h5py
import numpy as np
import pytest
import torch

import cped
import dac
import qdq

# the matrices of the tests are small; more threads only wait for each other
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--compile",
        action="store_true",
        help="also the slow tests of compiled updates; the check numbers compiled",
    )


def pytest_configure(config):
    if not config.getoption("--compile"):
        return
    for script in (dac, qdq, cped):  # Args() then has compile=True
        names = [field.name for field in dataclasses.fields(script.Args)]
        defaults = list(script.Args.__init__.__defaults__)
        defaults[names.index("compile")] = True
        script.Args.__init__.__defaults__ = tuple(defaults)


@pytest.fixture
def float64():
    """Everything that is built inside the test is double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_raw(
    rows: int = 600, obs_dim: int = 11, act_dim: int = 3, episode: int = 50, seed: int = 0
) -> dict[str, np.ndarray]:
    """Raw arrays in D4RL's layout; episodes end by a terminal and by a timeout in turn."""
    rng = np.random.default_rng(seed)
    ends = np.arange(1, rows + 1) % episode == 0
    odd = (np.arange(rows) // episode) % 2 == 1
    return {
        "observations": rng.normal(size=(rows, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, act_dim)).astype(np.float32),
        "rewards": rng.uniform(0, 2, rows).astype(np.float32),
        "terminals": ends & odd,
        "timeouts": ends & ~odd,
    }


def write_hdf5(path, raw: dict[str, np.ndarray]):
    with h5py.File(path, "w") as file:
        for key, array in raw.items():
            file[key] = array
    return path


@pytest.fixture
def dataset(tmp_path):
    """A small file that looks like a Hopper dataset."""
    return write_hdf5(tmp_path / "small.hdf5", make_raw())
