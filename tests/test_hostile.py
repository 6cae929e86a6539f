"""Files and servers that are damaged or mean harm: one sentence each, and nothing is run."""

import contextlib
import csv
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import make_raw, write_hdf5
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_common import make_minari

import common
import cped
import dac
import qdq
from common import KEYS, UserError, load_dataset

SCRIPTS = [dac, qdq, cped]
EXAMPLES = int(
    os.environ.get("FUZZ_EXAMPLES", 0)
)  # for a longer fuzzing, of other examples each time
FUZZ = settings(max_examples=EXAMPLES or 100, derandomize=not EXAMPLES, database=None)
FUZZ = settings(FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
FLAGS = {
    "dac": "--num-critics 2 --num-next-actions 1 --hidden-dim 8",
    "qdq": "--num-samples 2 --hidden-dim 64 --teacher-steps 2 --student-steps 2",
    "cped": "--flow-hidden-dim 8 --hidden-dim 8 --flow-steps 2",
}


def load(path: Path) -> dict[str, np.ndarray]:
    """Loads a file and asserts that what comes through is fit to be trained on."""
    arrays, info = load_dataset("hopper-medium", str(path), need_env=False)
    assert len(arrays["obs"]) == info["transitions"]
    sound(arrays)
    return arrays


def sound(arrays: dict[str, np.ndarray]) -> None:
    assert all(
        np.isfinite(array).all() and array.dtype == np.float32
        for name, array in arrays.items()
        if name != "ends"
    )
    assert len({len(array) for array in arrays.values()}) == 1 and len(arrays["obs"]) > 0
    assert (
        min(arrays["obs"].shape[1], arrays["act"].shape[1]) > 0
        and np.abs(arrays["act"]).max() <= 1.0001
    )


def refused(path: Path, message: str | None = None) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert (
        "\n" not in str(error.value)
        and len(str(error.value)) < 1000
        and path.name in str(error.value)
    )


@contextlib.contextmanager
def judged():
    """What is loaded in here may be refused in one way; hypothesis' statistics say how often."""
    begun = time.perf_counter()
    try:
        yield
        event("accepted")
    except UserError:
        event("refused")
    event(f"in less than {10 ** math.ceil(math.log10(time.perf_counter() - begun)):g} s")


def write_npz(path: Path, members: dict) -> Path:
    """np.savez_compressed, but a member may be raw bytes, and a list stands under one name."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in members.items():
            for value in values if isinstance(values, list) else [values]:
                stream = io.BytesIO(value if isinstance(value, bytes) else b"")
                if not isinstance(value, bytes):
                    np.lib.format.write_array(stream, value)
                archive.writestr(f"{name}.npy", stream.getvalue())
    return path


def npy_header(*shape: int, descr: str = "<f4") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"shape": shape, "fortran_order": False, "descr": descr}
    )
    return stream.getvalue()


# ------------------------------------------------------------------- HDF5


def other_file(file: h5py.File) -> Path:
    """Good rewards, in a file that nobody named."""
    return write_hdf5(
        Path(file.filename).with_name("other.hdf5"), {"rewards": make_raw()["rewards"]}
    )


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((600,), "f4")
    layout[:] = h5py.VirtualSource(other_file(file), "rewards", (600,))
    file.create_virtual_dataset("rewards", layout)


def external_link(file: h5py.File) -> None:
    file["rewards"] = h5py.ExternalLink(other_file(file), "rewards")


def link_to_a_link(file: h5py.File) -> None:
    file["here"], file["rewards"] = (
        h5py.ExternalLink(other_file(file), "rewards"),
        h5py.SoftLink("/here"),
    )


TWO = ("rewards", "next_observations")
HDF5 = {  # what is written in place of rewards
    "an external link": external_link,
    "a link to an external link": link_to_a_link,
    "a link to itself": lambda file: file.__setitem__("rewards", h5py.SoftLink("/rewards")),
    "raw data in another file": lambda file: file.create_dataset(
        "rewards", (600,), "f4", external=[(__file__, 0, 2400)]
    ),
    "an endless device": lambda file: file.create_dataset(
        "rewards", (600,), "f4", external=[("/dev/zero", 0, 2400)]
    ),
    "a virtual dataset": virtual,
    "object references": lambda file: file.create_dataset(
        "rewards", data=[file["actions"].ref] * 600, dtype=h5py.ref_dtype
    ),
    "one object reference": lambda file: file.create_dataset(
        "rewards", data=file["actions"].ref, dtype=h5py.ref_dtype
    ),
    "a group": lambda file: file.create_group("rewards/rewards"),
    "a named type": lambda file: file.__setitem__("rewards", np.dtype("f4")),
    "no data space": lambda file: file.__setitem__("rewards", h5py.Empty("f4")),
    "text": lambda file: file.__setitem__("rewards", "much"),
    "texts": lambda file: file.__setitem__("rewards", ["much"] * 600),
    "a compound type": lambda file: file.__setitem__("rewards", np.zeros(600, [("reward", "f4")])),
    "complex numbers": lambda file: file.__setitem__("rewards", np.full(600, 1j)),
    "rows of several lengths": lambda file: file.create_dataset(
        "rewards", (600,), h5py.vlen_dtype("f4")
    ),
    "2^40 rows": lambda file: file.create_dataset("rewards", (2**40,), "f4", chunks=(1024,)),
    "2^29 rows without data": lambda file: file.create_dataset(
        "rewards", (2**29,), "f4", chunks=(1 << 20,)
    ),
    "2^61 rows in one piece": lambda file: file.create_dataset("rewards", (2**61,), "f4"),
    "too much together": lambda file: [
        file.create_dataset(key, (2**27,), "f8", chunks=(2**20,)) for key in TWO
    ],
    "numbers beyond float32": lambda file: file.__setitem__("rewards", np.full(600, 1e300)),
}


@pytest.mark.parametrize("kind", HDF5)
def test_hostile_hdf5(kind, tmp_path):
    path = write_hdf5(
        tmp_path / "a.hdf5", {key: array for key, array in make_raw().items() if key != "rewards"}
    )
    with h5py.File(path, "r+") as file:
        HDF5[kind](file)
    tracemalloc.start()
    try:
        refused(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


NPZ = {  # members that differ from a good file
    "duplicate members": {"rewards": [np.zeros(600, np.float32), np.ones(600, np.float32)]},
    "an object array": {"rewards": npy_header(600, descr="|O") + pickle.dumps([0.0] * 600)},
    "no array": {"rewards": b"hello"},
    "no header": {"rewards": b"\x93NUMPY\x01\x00\xff\xff"},
    "code in the header": {
        "rewards": b"\x93NUMPY\x01\x00\x20\x00" + b"__import__('os')._exit(3)".ljust(32)
    },
    "2^40 rows": {"rewards": npy_header(2**40)},
    "2^33 rows": {"rewards": npy_header(2**33)},
    "2^93 entries": {"rewards": npy_header(2**31, 2**31, 2**31)},
    "-1 rows": {"rewards": npy_header(-1)},
    "fewer bytes than declared": {"rewards": npy_header(600) + bytes(2399)},
    "a zip bomb": {
        "rewards": npy_header(2**24) + bytes(2**26),
        "actions": npy_header(2**23) + bytes(2**25),
    },
    "an array with fields": {"rewards": np.zeros(600, [("reward", "f4")])},
    "next observations of another width": {"next_observations": np.zeros((600, 3), np.float32)},
    "dates": {"rewards": np.zeros(600, "M8[s]")},
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", NPZ)
def test_hostile_npz(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "MAX_BYTES", 1 << 24)  # so that the bomb can be a small one
    path = write_npz(tmp_path / "a.npz", make_raw() | NPZ[kind])
    tracemalloc.start()
    try:
        refused(path)
        assert (
            tracemalloc.get_traced_memory()[1] < 50e6 or "rows" in kind
        )  # which numpy reserves and never touches
    finally:
        tracemalloc.stop()


def test_one_kind_of_file_under_the_name_of_another(tmp_path):
    write_hdf5(tmp_path / "hdf5", make_raw())
    write_npz(tmp_path / "npz", make_raw())
    np.save(tmp_path / "npy.npy", make_raw()["rewards"])
    (tmp_path / "pickle").write_bytes(pickle.dumps(make_raw()))
    (tmp_path / "page").write_bytes(
        b"\xef\xbb\xbf  <!doctype html><title>Sign in</title>" + bytes(10_000)
    )
    for name, suffix in (
        ("hdf5", "npz"),
        ("npz", "hdf5"),
        ("npy.npy", "npz"),
        ("pickle", "npz"),
        ("pickle", "hdf5"),
        ("page", "npz"),
    ):
        (path := tmp_path / f"a.{suffix}").write_bytes((tmp_path / name).read_bytes())
        refused(path, "damaged|web page")
    for name in ("folder.hdf5", "pipe.npz"):
        Path(tmp_path / name).mkdir() if name[0] == "f" else os.mkfifo(tmp_path / name)
        refused(tmp_path / name, "does not exist")


# ----------------------------------------------------- damage and numbers


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """Small good files, by kind."""
    folder, raw = tmp_path_factory.mktemp("whole"), make_raw(rows=100)
    np.savez_compressed(folder / "a.npz", **raw)
    with h5py.File(folder / "a.hdf5", "w") as file:  # compressed in pieces, as D4RL's files are
        for key, array in raw.items():
            file.create_dataset(key, data=array, compression="gzip", chunks=(50, *array.shape[1:]))
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


def damaged(whole: bytes, data) -> bytes:
    """A few bits flipped, a piece overwritten, or the end cut off or made longer."""
    content = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, 8 * len(content) - 1), max_size=8)):
        content[place // 8] ^= 1 << place % 8
    start, piece = data.draw(st.integers(0, len(content))), data.draw(st.binary(max_size=16))
    content[start : start + len(piece)] = piece
    return bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])


@FUZZ
@given(st.data())
def test_damaged_datasets_are_refused_or_still_sound(whole, tmp_path_factory, data):
    kind = data.draw(st.sampled_from(sorted(whole)))
    path = tmp_path_factory.getbasetemp() / f"damaged{kind}"
    path.write_bytes(damaged(whole[kind], data))
    with judged():
        load(path)


@FUZZ
@given(
    st.sampled_from((*KEYS, "next_observations")),
    st.sampled_from(("any.npz", "any.hdf5")),
    st.data(),
)
def test_any_array_in_any_place(tmp_path_factory, key, name, data):
    """Types, shapes and values as wild as numpy has them, beside four good arrays."""
    dtypes = hnp.scalar_dtypes() | hnp.byte_string_dtypes() | hnp.unicode_string_dtypes()
    shapes = hnp.array_shapes(min_dims=0, min_side=0, max_side=4) | st.sampled_from(
        [(40,), (40, 1), (40, 3), (40, 11)]
    )
    array = data.draw(hnp.arrays(data.draw(dtypes), data.draw(shapes)))
    path, raw = tmp_path_factory.getbasetemp() / name, make_raw(rows=40, episode=10) | {key: array}
    if path.suffix == ".npz" or array.dtype.kind in "MmU":  # which HDF5 does not have
        np.savez(path := path.with_suffix(".npz"), **raw)
    else:
        write_hdf5(path, raw)
    with judged():
        load(path)


@pytest.fixture(scope="module")
def minari(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder := tmp_path_factory.mktemp("minari")))
        make_minari("local/hopper/tiny-v0", ref_min_score=0.0, ref_max_score=50.0)
        yield folder / "local/hopper/tiny-v0/data"


@FUZZ
@given(st.sampled_from(("main_data.hdf5", "metadata.json")), st.booleans(), st.data())
def test_damaged_minari_datasets_are_refused_or_still_sound(minari, name, need_env, data):
    whole = (minari / name).read_bytes()
    (minari / name).write_bytes(damaged(whole, data))
    try:
        with judged():
            arrays, _ = load_dataset("local/hopper/tiny-v0", need_env=need_env)
            sound(arrays)
    finally:
        (minari / name).write_bytes(whole)


@pytest.mark.parametrize("kind", ["a link", "a claim"])
def test_minari_files_do_not_reach_into_others_or_claim_too_much(kind, minari, tmp_path):
    whole = (path := minari / "main_data.hdf5").read_bytes()
    with h5py.File(path, "r+") as file:
        del file["episode_0/rewards"]
        if kind == "a link":
            file["episode_0/rewards"] = h5py.ExternalLink(
                write_hdf5(tmp_path / "other.hdf5", {"r": np.full(5, 77.0)}), "r"
            )
        else:
            file.create_dataset("episode_0/rewards", (2**30,), "f4", chunks=(1024,))
    try:
        with pytest.raises(
            UserError,
            match=r"Minari cannot load .*(rewards is a link|it claims more)",
        ):
            load_dataset("local/hopper/tiny-v0")
    finally:
        path.write_bytes(whole)


METADATA = {
    "an action space without width": {"action_space": {"low": [1.0, 1.0, 1.0]}},
    "an environment with arguments of its own": {"env_spec": {"kwargs": {"xml_file": 3}}},
    "an environment without arguments": {"env_spec": {"kwargs": None}},
    "an environment that is no object": {"env_spec": {"id": None}},
}


@pytest.mark.parametrize("kind", METADATA)
def test_hostile_minari_metadata(kind, minari):
    whole = (path := minari / "metadata.json").read_text()
    metadata = json.loads(whole)
    for key, value in METADATA[kind].items():  # spaces and specifications are JSON inside of JSON
        metadata[key] = (
            json.dumps(json.loads(metadata[key]) | value) if isinstance(value, dict) else value
        )
    path.write_text(json.dumps(metadata))
    try:
        with pytest.raises(UserError) as error:
            _, info = load_dataset("local/hopper/tiny-v0")
            common.make_env(info)
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    finally:
        path.write_text(whole)


ARGUMENTS = {  # of an environment, and what is said about them; None where they are harmless
    "a file": ({"xml_file": "/tmp/evil.xml"}, "xml_file names the file or module /tmp/evil.xml"),
    "a file here": ({"xml_file": "evil.xml"}, "names the file or module evil.xml"),
    "a file above": ({"xml_file": "../evil.xml"}, "names the file or module"),
    "a file at home": ({"xml_file": "~/evil"}, "names the file or module"),
    "a file of Windows": ({"xml_file": "C:evil"}, "names the file or module"),
    "a file inside": ({"reward": [{"a": ["b/c"]}]}, "reward names the file or module b/c"),
    "a file as a key": ({"reward": {"b/c": 1}}, "reward names the file or module b/c"),
    "a module": ({"model": "os:system"}, "model names the file or module os:system"),
    "frames without end": ({"frame_skip": 10**9}, "frame_skip is 1000000000, but must be"),
    "no frame": ({"frame_skip": 0}, "frame_skip is 0, but must be a whole number from 1"),
    "frames in words": ({"frame_skip": "many"}, "frame_skip is 'many', but must be"),
    "a word for a number": ({"ctrl_cost_weight": "much"}, "Hopper-v5: a first step fails"),
    "a list for a number": ({"healthy_reward": [1]}, "Hopper-v5: a first step fails|cannot make"),
    "a name that is unknown": ({"gravity": 3}, "Gymnasium cannot make Hopper-v5"),
    "a window": ({"render_mode": "human"}, None),
    "a render mode that is none": ({"render_mode": 3}, None),
    "another number": ({"ctrl_cost_weight": 0.5}, None),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_of_somebodys_environment(kind, minari, capsys):
    whole = (path := minari / "metadata.json").read_text()
    arguments, message = ARGUMENTS[kind]
    metadata = json.loads(whole)
    spec = json.loads(metadata["env_spec"])
    spec["kwargs"] = {**spec["kwargs"], **arguments}
    path.write_text(json.dumps({**metadata, "env_spec": json.dumps(spec)}))
    try:
        if message:
            with pytest.raises(UserError, match=message) as error:
                load_dataset("local/hopper/tiny-v0")
            assert "\n" not in str(error.value) and len(str(error.value)) < 600
            load_dataset("local/hopper/tiny-v0", need_env=False)
            return
        _, info = load_dataset("local/hopper/tiny-v0")
        with common.make_env(info) as env:
            assert env.render_mode is None
        out = capsys.readouterr().out
        assert "Hopper-v5, 5 steps at most" in out and "render_mode" not in out
        assert ('with {"ctrl_cost_weight": 0.5}' in out) == (kind == "another number")
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("limit", [10**12, "long", 0, -1, 2.5, True, [5]])
def test_time_limits_that_are_none(limit, minari):
    whole = (path := minari / "metadata.json").read_text()
    metadata = json.loads(whole)
    spec = {**json.loads(metadata["env_spec"]), "max_episode_steps": limit}
    path.write_text(json.dumps({**metadata, "env_spec": json.dumps(spec)}))
    try:
        with pytest.raises(UserError, match=r"max_episode_steps is .* a whole number from 1 to"):
            load_dataset("local/hopper/tiny-v0")
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("kind", ["another entry point", "a window", "the registered one"])
def test_spaces_that_are_missing_run_nothing(kind, minari, tmp_path, monkeypatch):
    """Minari builds the environment then, whichever its metadata name."""
    monkeypatch.chdir(tmp_path)
    whole = (path := minari / "metadata.json").read_text()
    metadata = json.loads(whole)
    spec = json.loads(metadata["env_spec"])
    if kind == "another entry point":
        spec.update(entry_point="os:mkdir", kwargs={"path": "ran"})
    if kind == "a window":
        spec["kwargs"] = {"render_mode": "human"}
    metadata["env_spec"] = json.dumps(spec)
    del metadata["observation_space"]
    path.write_text(json.dumps(metadata))
    try:
        if kind == "the registered one":
            load_dataset("local/hopper/tiny-v0")
        else:
            for need_env in (True, False):
                with pytest.raises(UserError):
                    load_dataset("local/hopper/tiny-v0", need_env=need_env)
    finally:
        path.write_text(whole)
    assert not Path("ran").exists()


class Failing(gym.Env):
    """Fails in its reset or in a step, at once or later."""

    observation_space = gym.spaces.Box(-1, 1, (11,))
    action_space = gym.spaces.Box(-1, 1, (3,))

    def __init__(self, where: str):
        self.where, self.steps = where, 0

    def reset(self, seed=None, options=None):
        if self.where == "reset":
            raise RuntimeError("no robot\nat the port")
        if self.where == "observation":
            return np.zeros(5, np.float32), {}
        return np.zeros(11, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.where == "step" or (self.where == "later" and self.steps == 3):
            raise KeyError("torque")
        return np.zeros(11, np.float32), 0.0, False, False, {}


@pytest.mark.parametrize("where", ["reset", "observation", "step", "later"])
def test_what_an_environment_raises_is_one_sentence(where, tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", make_raw())
    gym.register("Failing-v0", Failing, max_episode_steps=5, kwargs={"where": where})
    try:
        if where != "later":
            with pytest.raises(UserError, match="Failing-v0: ") as error:
                load_dataset("Failing-v0", str(path))
            assert "\n" not in str(error.value)
        info = {"env": "Failing-v0", "ref_min": None}
        with pytest.raises(UserError, match=r"fails in (its reset|a step)") as error:
            common.evaluate(lambda obs: np.zeros((len(obs), 3)), info, 2, 0)
        assert "\n" not in str(error.value)
    finally:
        del gym.registry["Failing-v0"]


# ------------------------------------------------------ more than is needed


def nested(file: h5py.File, count: int) -> None:
    group = file.create_group("infos")
    for _ in range(count):
        group = group.create_group("a")


def crowd(file: h5py.File, count: int) -> None:
    for i in range(count):
        file.create_dataset(f"infos/{i}", (0,))


CROWDS = {
    "1,000 nested groups": lambda file: nested(file, 1000),
    "10,000 nested groups": lambda file: nested(file, 10_000),
    "5,000 empty datasets": lambda file: crowd(file, 5000),
    "a link elsewhere": lambda file: file.__setitem__("infos", h5py.ExternalLink("absent", "x")),
    "a link without end": lambda file: file.__setitem__("infos", h5py.SoftLink("/")),
    "another dataset of 2^40 rows": lambda file: file.create_dataset(
        "infos", (2**40,), "f4", chunks=(1024,)
    ),
}


@pytest.mark.parametrize("kind", CROWDS)
def test_only_the_wanted_arrays_are_looked_at(kind, tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", make_raw())
    with h5py.File(path, "r+") as file:
        CROWDS[kind](file)
    tracemalloc.start()
    begun = time.perf_counter()
    try:
        arrays = load(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    assert len(arrays["obs"]) == 593 and time.perf_counter() - begun < 5


def test_groups_in_a_minari_file_are_nested_in_bounds(minari):
    whole = (path := minari / "main_data.hdf5").read_bytes()
    with h5py.File(path, "r+") as file:
        nested(file["episode_0"], 2000)
    begun = time.perf_counter()
    try:
        with pytest.raises(UserError, match="groups are nested too deeply"):
            load_dataset("local/hopper/tiny-v0")
    finally:
        path.write_bytes(whole)
    assert time.perf_counter() - begun < 5


def test_a_hash_takes_no_memory(tmp_path):
    (tmp_path / "folder").mkdir()
    big = tmp_path / "folder" / "big"
    with big.open("wb") as file:
        file.truncate(1 << 26)
    (tmp_path / "folder" / "end").write_bytes(b"end")
    tracemalloc.start()
    try:
        digests = [common.sha256(big), common.sha256(tmp_path / "folder")]
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
    content = bytes(1 << 26)
    expected = [hashlib.sha256(part).hexdigest() for part in (content, content + b"end")]
    assert digests == expected


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED])
@pytest.mark.parametrize("name", ["actions", "rewards", "infos"])
def test_members_are_stored_or_deflated(method, name, tmp_path):
    path = tmp_path / "a.npz"
    members = {**make_raw(), "infos": np.zeros(5)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in members.items():
            stream = io.BytesIO()
            np.lib.format.write_array(stream, array)
            kind = method if key == name else None
            archive.writestr(f"{key}.npy", stream.getvalue(), compress_type=kind)
    if method == zipfile.ZIP_STORED or name == "infos":
        load(path)
    else:
        refused(path, f"{name} is compressed by another method than numpy's")


@pytest.mark.parametrize("name", ["rewards", "actions", "next_observations"])
def test_a_chunk_counts_as_memory(name, tmp_path):
    raw = make_raw()
    raw["next_observations"] = raw["observations"]
    path = write_hdf5(tmp_path / "a.hdf5", raw)
    with h5py.File(path, "r+") as file:
        del file[name]
        shape = raw[name].shape
        chunks = (2**28 // math.prod(shape[1:]) + 1, *shape[1:])  # 1 GiB and a little
        limits = (None, *shape[1:])
        file.create_dataset(name, shape, "f4", chunks=chunks, maxshape=limits, compression="gzip")
    refused(path, "claims more than")


@pytest.mark.parametrize("score", [[0.0], "0", None, 50.0, math.nan])
def test_reference_returns_that_make_no_scale_are_none(score, minari):
    whole = (path := minari / "metadata.json").read_text()
    path.write_text(json.dumps(json.loads(whole) | {"ref_min_score": score}))
    try:
        _, info = load_dataset("local/hopper/tiny-v0")
        assert info["ref_min"] is info["ref_max"] is info["mean_score"] is None
    finally:
        path.write_text(whole)


ROWS = {  # terminals and timeouts of files with hardly any rows or episodes
    "one row": ([1], [0]),
    "a cut row and a last one": ([0, 0], [1, 0]),
    "nothing but cut rows": ([0, 0, 0, 0], [1, 1, 1, 0]),
    "two rows": ([0, 1], [0, 0]),
    "three rows": ([0, 0, 1], [0, 0, 0]),
    "empty episodes": ([0] * 6, [1, 1, 0, 1, 1, 1]),
    "terminals only": ([1] * 6, [0] * 6),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ROWS)
def test_hardly_any_rows(script, kind, tmp_path):
    """Refused with a sentence, or trained on to the end."""
    terminals, timeouts = (np.array(column, bool) for column in ROWS[kind])
    raw = make_raw(rows=len(terminals)) | {"terminals": terminals, "timeouts": timeouts}
    path = write_npz(tmp_path / "a.npz", raw)
    flags = f"--data {path} --env robot --no-eval --run-dir {tmp_path} --total-steps 2"
    flags += " --batch-size 4 --log-every 1"
    with contextlib.suppress(SystemExit):
        script.main([*flags.split(), *FLAGS[script.ALGORITHM].split()])
        (metrics,) = tmp_path.glob("*/*/*/metrics.csv")
        assert len(list(csv.DictReader(metrics.open()))) >= 2


# --------------------------------------------------------------- checkpoints


class Payload:
    """What an attacker's pickle does when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("place", ["args", "agent", "rng", "all of it"])
def test_a_pickle_in_a_checkpoint_is_not_run(script, place, tmp_path):
    """Neither inside of torch's format nor in its place."""
    run, ran = tmp_path / "run", tmp_path / "ran"
    run.mkdir()
    (run / "args.json").write_text("{}")
    path = run / "checkpoint.pt"
    state = {"algorithm": script.ALGORITHM, "args": {}, "agent": {}, place: Payload(ran)}
    if place == "all of it":
        path.write_bytes(pickle.dumps(state))
        pickle.loads(path.read_bytes())
    else:
        torch.save(state, path)
        torch.load(path, weights_only=False)
    assert ran.exists()  # it would run
    ran.unlink()
    with pytest.raises((SystemExit, pickle.UnpicklingError)):
        script.main(["--resume", str(run)])
    assert not ran.exists()


HOPPER = {
    "id": "Hopper-v4",
    "entry_point": "gymnasium.envs.mujoco.hopper_v4:HopperEnv",
    "additional_wrappers": [],
    "kwargs": {},
    "max_episode_steps": 1000,
}
RAN = {"path": "ran"}
ENVS = {
    "entry point": HOPPER | {"entry_point": "os:mkdir", "kwargs": RAN, "max_episode_steps": 5},
    "wrapper": HOPPER
    | {"additional_wrappers": [{"name": "a", "entry_point": "os:mkdir", "kwargs": RAN}]},
    "unknown id": HOPPER | {"id": "Unknown-v0"},
    "id with a module": HOPPER | {"id": "ran:Hopper-v4"},
    "id that is no text": HOPPER | {"id": ["Hopper-v4"]},
    "no specification": {"id": "Hopper-v4"},
    "arguments that are none": HOPPER | {"kwargs": "ab"},
    "module": "ran:Hopper-v4",
    "module of a module": "ran.ran:Hopper-v4",
    "unknown": "Hopper-v99",
    "no name": "",
    "no JSON": "{",
    "nested without end": "{" + '"a":[' * 100_000,
}


@pytest.mark.parametrize("kind", ENVS)
def test_an_environment_out_of_a_checkpoint_must_be_a_registered_one(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ran.py").write_text("import os; os.mkdir('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    env = ENVS[kind] if isinstance(ENVS[kind], str) else json.dumps(ENVS[kind])
    for action in (
        lambda: common.make_env({"env": env}),
        lambda: common.evaluate(len, {"env": env, "ref_min": None}, 1, 0),
    ):
        with pytest.raises(UserError) as error:
            action()
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert not Path("ran").exists()


# -------------------------------------------------------------- downloads


class Server(http.server.BaseHTTPRequestHandler):
    """A host that behaves as `mode` says; `taken` lists where the client took all that came."""

    mode, content, taken = "", b"", []

    def do_HEAD(self):
        self.redirect() if self.mode == "loop" else self.answer()

    def do_GET(self):
        if (mode := self.mode) in ("loop", "loop of GET", "elsewhere"):
            self.redirect()
            return
        length = {
            "too short": len(self.content) - 9,
            "too long": len(self.content) + 9,
            "no number": "many",
        }
        headers = {"Content-Length": length.get(mode, len(self.content))}
        self.answer(
            {}
            if mode == "endless"
            else {"Content-Encoding": "gzip"}
            if mode == "no gzip"
            else headers
        )
        with contextlib.suppress(OSError):  # the client has gone
            if mode in ("slow", "endless"):
                for _ in range(100):
                    self.wfile.write(b"." if mode == "slow" else bytes(1 << 20))
                    time.sleep(0.1 if mode == "slow" else 0)
            elif mode == "silent":
                time.sleep(2)
            else:
                self.wfile.write(self.content)
            self.taken.append(mode)

    def answer(self, headers=None):
        self.send_response(200)
        for name, value in (headers or {}).items():
            self.send_header(name, str(value))
        self.end_headers()

    def redirect(self):
        self.send_response(302)
        self.send_header(
            "Location", "file:///etc/passwd" if self.mode == "elsewhere" else self.path
        )
        self.end_headers()

    def log_message(self, *args):
        pass


MODES = [
    "loop",
    "loop of GET",
    "elsewhere",
    "too short",
    "too long",
    "no number",
    "no gzip",
    "flipped bit",
]


@pytest.mark.parametrize("mode", [*MODES, "silent", "slow", "endless"])
def test_hostile_servers(mode, tmp_path, monkeypatch):
    content = bytearray(write_hdf5(tmp_path / "a.hdf5", make_raw()).read_bytes())
    digest = common.sha256(tmp_path / "a.hdf5")
    content[5000] ^= mode == "flipped bit"
    Server.mode, Server.content = mode, bytes(content)
    monkeypatch.setattr(common, "TIMEOUT", 1.0)
    monkeypatch.setattr(common, "MAX_BYTES", 1 << 22)
    monkeypatch.setattr(common, "D4RL_SHA256", common.D4RL_SHA256 | {"walker2d-medium-v2": digest})
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(common, "MIRRORS", (address + "{path}",))
        try:
            with pytest.raises(UserError, match="cannot be downloaded"):
                load_dataset("walker2d-medium")
        finally:
            server.shutdown()
    assert not list((tmp_path / "cache").glob("*"))
    assert not {"slow", "endless"} & set(Server.taken)  # it was the client that gave up
