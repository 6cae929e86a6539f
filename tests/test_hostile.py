"""Files and servers that mean harm or are damaged: each ends in one sentence, in bounded memory, and nothing of them is run."""

import contextlib
import csv
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
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))  # for a longer fuzzing, of other examples each time
FUZZ = settings(max_examples=EXAMPLES or 100, derandomize=not EXAMPLES, database=None)
FUZZ = settings(FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
FLAGS = {
    "dac": "--num-critics 2 --num-next-actions 1 --hidden-dim 8",
    "qdq": "--num-samples 2 --hidden-dim 32 --teacher-steps 2 --student-steps 2",
    "cped": "--flow-hidden-dim 8 --hidden-dim 8 --flow-steps 2",
}


def load(path: Path) -> dict[str, np.ndarray]:
    """Loads a file and asserts that what comes through is fit to be trained on."""
    arrays, info = load_dataset("hopper-medium", str(path), need_env=False)
    assert len(arrays["obs"]) == info["transitions"]
    sound(arrays)
    return arrays


def sound(arrays: dict[str, np.ndarray]) -> None:
    assert all(np.isfinite(array).all() and array.dtype == np.float32 for name, array in arrays.items() if name != "ends")
    assert len({len(array) for array in arrays.values()}) == 1 and len(arrays["obs"]) > 0
    assert min(arrays["obs"].shape[1], arrays["act"].shape[1]) > 0 and np.abs(arrays["act"]).max() <= 1.0001


def refused(path: Path, message: str | None = None) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000 and path.name in str(error.value)


@contextlib.contextmanager
def judged():
    """What is loaded in here may be refused, but in no other way; --hypothesis-show-statistics tells how often and how slowly."""
    begun = time.perf_counter()
    try:
        yield
        event("accepted")
    except UserError:
        event("refused")
    event(f"in less than {10 ** math.ceil(math.log10(time.perf_counter() - begun)):g} s")


def write_npz(path: Path, members: dict) -> Path:
    """Like np.savez_compressed, but a member may also be raw bytes, and a list of several stands under one name."""
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
    np.lib.format.write_array_header_1_0(stream, {"shape": shape, "fortran_order": False, "descr": descr})
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------------------------- HDF5


def other_file(file: h5py.File) -> Path:
    """Good rewards, in a file that nobody named."""
    return write_hdf5(Path(file.filename).with_name("other.hdf5"), {"rewards": make_raw()["rewards"]})


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((600,), "f4")
    layout[:] = h5py.VirtualSource(other_file(file), "rewards", (600,))
    file.create_virtual_dataset("rewards", layout)


def external_link(file: h5py.File) -> None:
    file["rewards"] = h5py.ExternalLink(other_file(file), "rewards")


def link_to_a_link(file: h5py.File) -> None:
    file["here"], file["rewards"] = h5py.ExternalLink(other_file(file), "rewards"), h5py.SoftLink("/here")


TWO = ("rewards", "next_observations")
HDF5 = {  # what is written in place of rewards
    "an external link": external_link,
    "a link to an external link": link_to_a_link,
    "a link to itself": lambda file: file.__setitem__("rewards", h5py.SoftLink("/rewards")),
    "raw data in another file": lambda file: file.create_dataset("rewards", (600,), "f4", external=[(__file__, 0, 2400)]),
    "an endless device": lambda file: file.create_dataset("rewards", (600,), "f4", external=[("/dev/zero", 0, 2400)]),
    "a virtual dataset": virtual,
    "object references": lambda file: file.create_dataset("rewards", data=[file["actions"].ref] * 600, dtype=h5py.ref_dtype),
    "one object reference": lambda file: file.create_dataset("rewards", data=file["actions"].ref, dtype=h5py.ref_dtype),
    "a group": lambda file: file.create_group("rewards/rewards"),
    "a named type": lambda file: file.__setitem__("rewards", np.dtype("f4")),
    "no data space": lambda file: file.__setitem__("rewards", h5py.Empty("f4")),
    "text": lambda file: file.__setitem__("rewards", "much"),
    "texts": lambda file: file.__setitem__("rewards", ["much"] * 600),
    "a compound type": lambda file: file.__setitem__("rewards", np.zeros(600, [("reward", "f4")])),
    "complex numbers": lambda file: file.__setitem__("rewards", np.full(600, 1j)),
    "rows of several lengths": lambda file: file.create_dataset("rewards", (600,), h5py.vlen_dtype("f4")),
    "2^40 rows": lambda file: file.create_dataset("rewards", (2**40,), "f4", chunks=(1024,)),
    "2^29 rows without data": lambda file: file.create_dataset("rewards", (2**29,), "f4", chunks=(1 << 20,)),
    "2^61 rows in one piece": lambda file: file.create_dataset("rewards", (2**61,), "f4"),
    "too much together": lambda file: [file.create_dataset(key, (2**27,), "f8", chunks=(2**20,)) for key in TWO],
    "numbers beyond float32": lambda file: file.__setitem__("rewards", np.full(600, 1e300)),
}


@pytest.mark.parametrize("kind", HDF5)
def test_hostile_hdf5(kind, tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", {key: array for key, array in make_raw().items() if key != "rewards"})
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
    "code in the header": {"rewards": b"\x93NUMPY\x01\x00\x20\x00" + b"__import__('os')._exit(3)".ljust(32)},
    "2^40 rows": {"rewards": npy_header(2**40)},
    "2^33 rows": {"rewards": npy_header(2**33)},
    "2^93 entries": {"rewards": npy_header(2**31, 2**31, 2**31)},
    "-1 rows": {"rewards": npy_header(-1)},
    "fewer bytes than declared": {"rewards": npy_header(600) + bytes(2399)},
    "a zip bomb": {"rewards": npy_header(2**24) + bytes(2**26), "actions": npy_header(2**23) + bytes(2**25)},
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
        assert tracemalloc.get_traced_memory()[1] < 50e6 or "rows" in kind  # which numpy reserves and never touches
    finally:
        tracemalloc.stop()


def test_one_kind_of_file_under_the_name_of_another(tmp_path):
    write_hdf5(tmp_path / "hdf5", make_raw())
    write_npz(tmp_path / "npz", make_raw())
    np.save(tmp_path / "npy.npy", make_raw()["rewards"])
    (tmp_path / "pickle").write_bytes(pickle.dumps(make_raw()))
    (tmp_path / "page").write_bytes(b"\xef\xbb\xbf  <!doctype html><title>Sign in</title>" + bytes(10_000))
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


# --------------------------------------------------------------------------------------------------- damage and numbers


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
@given(st.sampled_from((*KEYS, "next_observations")), st.sampled_from(("any.npz", "any.hdf5")), st.data())
def test_any_array_in_any_place(tmp_path_factory, key, name, data):
    """Types, shapes and values as wild as numpy has them, beside four good arrays."""
    dtypes = hnp.scalar_dtypes() | hnp.byte_string_dtypes() | hnp.unicode_string_dtypes()
    shapes = hnp.array_shapes(min_dims=0, min_side=0, max_side=4) | st.sampled_from([(40,), (40, 1), (40, 3), (40, 11)])
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
            file["episode_0/rewards"] = h5py.ExternalLink(write_hdf5(tmp_path / "other.hdf5", {"r": np.full(5, 77.0)}), "r")
        else:
            file.create_dataset("episode_0/rewards", (2**30,), "f4", chunks=(1024,))
    try:
        with pytest.raises(UserError, match=r"Minari cannot load .*it has links, content of another file, or claims more"):
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
        metadata[key] = json.dumps(json.loads(metadata[key]) | value) if isinstance(value, dict) else value
    path.write_text(json.dumps(metadata))
    try:
        with pytest.raises(UserError) as error:
            _, info = load_dataset("local/hopper/tiny-v0")
            common.make_env(info)
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    finally:
        path.write_text(whole)


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
    flags = f"--data {path} --env robot --no-eval --run-dir {tmp_path} --total-steps 2 --batch-size 4 --log-every 1"
    with contextlib.suppress(UserError):
        script.main([*flags.split(), *FLAGS[script.ALGORITHM].split()])
        (metrics,) = tmp_path.glob("*/*/*/metrics.csv")
        assert len(list(csv.DictReader(metrics.open()))) >= 2


# --------------------------------------------------------------------------------------------------------- checkpoints


class Payload:
    """What an attacker's pickle does when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    data = write_hdf5(folder / "a.hdf5", make_raw())
    flags = f"--env hopper-medium --data {data} --run-dir {folder} --total-steps 2 --batch-size 8 --no-eval"
    dac.main([*flags.split(), *FLAGS["dac"].split()])
    (path,) = folder.glob("*/dac/*/checkpoint.pt")
    return path


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_pickle_in_a_checkpoint_is_not_run(script, tmp_path):
    path, ran = tmp_path / "a.pt", tmp_path / "ran"
    state = {"algorithm": script.ALGORITHM, "args": Payload(ran)}
    for save in (torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))):
        save(state, path)
        with contextlib.suppress(Exception):
            torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
        assert ran.exists()  # it would
        ran.unlink()
        with pytest.raises(UserError, match="is no checkpoint, or a damaged one"):
            script.main(["--eval-only", str(path)])
        assert not ran.exists()


def flat(value) -> list:
    """All leaves of a nested structure, with the keys."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in [key, *flat(value[key])]]
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list | tuple) else [value]


@FUZZ
@given(st.data())
def test_a_damaged_checkpoint_is_refused_or_unharmed(checkpoint, tmp_path_factory, data):
    """Not one weight may change unnoticed."""
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(damaged(checkpoint.read_bytes(), data))
    with judged():
        loaded, expected = (flat(dac.load_checkpoint(file) | {"path": None}) for file in (path, checkpoint))
        pairs = zip(loaded, expected, strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


CHANGES = {
    "without arguments": lambda state: state.pop("args"),
    "with an unknown argument": lambda state: state["args"].update(gamma=1),
    "without an argument": lambda state: state["args"].pop("rho"),
}


def resave(path: Path, state: dict, compression: int = zipfile.ZIP_STORED) -> None:
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture(scope="module", params=SCRIPTS, ids=[script.ALGORITHM for script in SCRIPTS])
def trained(request, tmp_path_factory) -> tuple:
    """A script, the flags of a run and its folder."""
    script, folder = request.param, tmp_path_factory.mktemp("trained")
    data = write_hdf5(folder / "a.hdf5", make_raw())
    flags = (
        f"--env hopper-medium --data {data} --no-eval --run-dir {folder} --total-steps 2 --batch-size 8 {FLAGS[script.ALGORITHM]}"
    )
    script.main(flags.split())
    return script, flags.split(), next(folder.glob("*/*/*/checkpoint.pt")).parent


FORGED = {  # what is done to a whole checkpoint
    "a network of another shape": lambda state: state["agent"].update(
        actor=dict.fromkeys(state["agent"]["actor"], torch.ones(1))
    ),
    "no actor": lambda state: state["agent"].pop("actor"),
    "no agent": lambda state: state.pop("agent"),
    "an agent that is a list": lambda state: state.update(agent=[]),
    "no random state": lambda state: state.pop("rng"),
    "a random state of one byte": lambda state: state.update(rng=torch.zeros(1, dtype=torch.uint8)),
    "moments of one entry": lambda state: state["agent"]["actor_adam"]["state"][0].update(exp_avg=torch.zeros(1)),
    "moments of fewer entries": lambda state: state["agent"]["actor_adam"]["state"][0].update(exp_avg_sq=torch.zeros(1, 1)),
    "moments that are no tensor": lambda state: state["agent"]["actor_adam"]["state"][0].update(exp_avg="much"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_state_is_refused(trained, kind, tmp_path):
    """Before anything of it is used: a fused Adam trusts its moments' sizes and would write past their end."""
    script, _, folder = trained
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    FORGED[kind](state)
    resave(tmp_path / "a.pt", state)
    for flag in ("--eval-only", "--resume"):
        with pytest.raises(UserError, match=r"a.pt does not hold what its arguments describe \(") as error:
            script.main([flag, str(tmp_path / "a.pt")])
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("kind", ["no agent", "an agent that is a list"])
def test_a_forged_stage_is_refused(trained, kind, tmp_path):
    script, flags, folder = trained
    if script is dac:
        pytest.skip("has one stage")
    state = torch.load(folder / ("flow.pt" if script is cped else "checkpoint.pt"), weights_only=True)
    FORGED[kind](state)
    resave(tmp_path / "a.pt", state)
    with pytest.raises(UserError, match=r"a.pt holds no "):
        script.main([*flags, "--run-dir", str(tmp_path), "--flow" if script is cped else "--consistency", str(tmp_path / "a.pt")])


def test_a_compressed_checkpoint_is_refused(checkpoint, tmp_path):
    """torch would expand a megabyte into gigabytes."""
    resave(tmp_path / "a.pt", torch.load(checkpoint, weights_only=True) | {"path": None}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"no checkpoint, or a damaged one .*compressed"):
        dac.load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", CHANGES)
def test_a_checkpoint_of_another_version_is_refused(kind, checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    CHANGES[kind](state)
    torch.save(state, tmp_path / "a.pt")
    for flag in ("--eval-only", "--resume"):
        with pytest.raises(UserError, match=r"a\.pt was not written by this version of dac\.py") as error:
            dac.main([flag, str(tmp_path / "a.pt")])
        assert "\n" not in str(error.value)


HOPPER = {"id": "Hopper-v4", "entry_point": "gymnasium.envs.mujoco.hopper_v4:HopperEnv", "additional_wrappers": []}
ENVS = {
    "entry point": HOPPER | {"entry_point": "pathlib:os.mkdir", "kwargs": {"path": "ran"}, "max_episode_steps": 5},
    "wrapper": HOPPER | {"additional_wrappers": [{"name": "a", "entry_point": "os:mkdir", "kwargs": {"path": "ran"}}]},
    "unknown id": HOPPER | {"id": "Unknown-v0"},
    "no specification": {"id": "Hopper-v4"},
    "module": "ran:Hopper-v4",
    "unknown": "Hopper-v99",
    "no name": "",
    "no JSON": "{",
}


@pytest.mark.parametrize("kind", ENVS)
def test_an_environment_out_of_a_checkpoint_must_be_a_registered_one(kind, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ran.py").write_text("import os; os.mkdir('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    state = torch.load(checkpoint, weights_only=True)
    state["info"]["env"] = ENVS[kind] if isinstance(ENVS[kind], str) else json.dumps(ENVS[kind])
    torch.save(state, "a.pt")
    with pytest.raises(UserError):
        dac.main(["--eval-only", "a.pt", "--episodes", "1"])
    assert not Path("ran").exists()


# ------------------------------------------------------------------------------------------------------------ downloads


class Server(http.server.BaseHTTPRequestHandler):
    """A host of datasets that behaves as `mode` says; `taken` lists where the client took all that came."""

    mode, content, taken = "", b"", []

    def do_HEAD(self):
        self.redirect() if self.mode == "loop" else self.answer()

    def do_GET(self):
        if (mode := self.mode) in ("loop", "loop of GET", "elsewhere"):
            self.redirect()
            return
        length = {"too short": len(self.content) - 9, "too long": len(self.content) + 9, "no number": "many"}
        headers = {"Content-Length": length.get(mode, len(self.content))}
        self.answer({} if mode == "endless" else {"Content-Encoding": "gzip"} if mode == "no gzip" else headers)
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
        self.send_header("Location", "file:///etc/passwd" if self.mode == "elsewhere" else self.path)
        self.end_headers()

    def log_message(self, *args):
        pass


MODES = ["loop", "loop of GET", "elsewhere", "too short", "too long", "no number", "no gzip", "flipped bit"]


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
        monkeypatch.setattr(common, "MIRRORS", (lambda path: address + path,))
        try:
            with pytest.raises(UserError, match="cannot be downloaded"):
                load_dataset("walker2d-medium")
        finally:
            server.shutdown()
    assert not list((tmp_path / "cache").glob("*"))
    assert not {"slow", "endless"} & set(Server.taken)  # it was the client that gave up
