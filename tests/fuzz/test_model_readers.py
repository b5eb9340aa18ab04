"""Every file of a model directory or a checkpoint that somebody else wrote, damaged in thousands of ways: reading it
succeeds or says what is wrong (a UserError), and neither takes long nor much memory.

More seeds than the suite has time for: FUZZ_CASES=20000 FUZZ_SEED=1 python -m pytest tests/fuzz
"""

import json
import os
import random
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.mutations import mutated_bytes, mutated_json
from support.quantised import quantised_model, saved_model
from support.tiny_models import tiny_model

import erniekit
from erniekit import lora
from erniekit.checkpoint.adapter_config import base_of
from erniekit.checkpoint.generation_config import not_used, read_generation_config
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.peft_attach import save_adapter
from erniekit.checkpoint.peft_read import read_adapter
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.checkpoint.stored_state import StoredState
from erniekit.models.config import ModelConfig
from erniekit.training.reference_cache import read_cache, write_cache
from erniekit.training.state import TrainState, read_state
from erniekit.utils.errors import UserError

CASES = int(os.environ.get("FUZZ_CASES", "500"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS = 3  # of one case, on a busy machine
MEGABYTES = 300  # added by all cases of a test

Read = Callable[[], object]


@contextmanager
def _in_time() -> Iterator[None]:
    def late(signum: int, frame: object) -> None:
        raise TimeoutError(f"not read after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def outcome(read: Read) -> str | None:
    """None where reading succeeds, or the error message."""
    with _in_time():
        try:
            read()
        except UserError as error:
            return str(error)
    return None


def fuzz(file: Path, damage: Callable[[random.Random], bytes], read: Read, name: str | None = None) -> list[bytes]:
    """Read `CASES` damaged versions of `file`; errors name it (or `name`). Returns the versions that were accepted."""
    good, before, accepted = file.read_bytes(), _peak_megabytes(), []
    assert outcome(read) is None, "the undamaged file is read"
    for case in range(CASES):
        rng = random.Random(f"{SEED}/{file.name}/{case}")
        data = damage(rng)
        with open(file, "r+b") as opened:  # in place: a file system may flush a file that is emptied and written anew
            opened.write(data)
            opened.truncate()
        try:
            message = outcome(read)
        except BaseException as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {error}: {data[:3000]!r}") from error
        if message is None:
            accepted.append(data)
        else:
            assert (name or str(file.parent)) in message, (case, message, data[:3000])
    file.write_bytes(good)
    assert _peak_megabytes() - before < MEGABYTES
    assert len(accepted) < CASES * 0.9, "hardly any damage is noticed"
    return accepted


def json_damage(file: Path) -> Callable[[random.Random], bytes]:
    content = json.loads(file.read_bytes())
    return lambda rng: mutated_json(content, rng)


def header_damage(file: Path) -> Callable[[random.Random], bytes]:
    """A safetensors file: its header as JSON, its length, or any of its bytes."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]

    def damage(rng: random.Random) -> bytes:
        kind = rng.randrange(10)
        if kind == 0:
            return mutated_bytes(data, rng)
        if kind == 1:
            wrong = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, rng.randrange(2**64)))
            return struct.pack("<Q", wrong) + data[8:]
        text = mutated_json(header, rng)
        if kind == 2:  # the two ways of writing what is no natural number
            text = text.replace(b"0,", rng.choice((b"-0,", b"0.0,", b"0e0,")), 1)
        return struct.pack("<Q", len(text)) + text + (body if kind < 9 else body[: rng.randrange(len(body) + 1)])

    return damage


def read_all(reader: Reader) -> None:
    for name in reader.keys():  # noqa: SIM118 - a Reader is not iterable
        reader.read(name)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories dense, moe (several weight files) and adapter (of moe)."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("dense", "moe"):
        erniekit.save_model(tiny_model(kind), root / kind, max_shard_size="20KB" if kind == "moe" else "5GB")
        adapted = tiny_model(kind)
        lora.attach(adapted, lora.LoraOptions(rank=2, alpha=4.0))
        save_adapter(adapted, root / f"{kind}-adapter")
    return root


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy that a test may damage."""
    return lambda kind: Path(shutil.copytree(models / kind, tmp_path / kind))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_config_json(model: Callable[[str], Path], kind: str) -> None:
    file = model(kind) / "config.json"
    content = json.loads(file.read_bytes())
    content |= {"rope_scaling": None, "moe_capacity": [64, 64], "layer_types": None, "sliding_window": None}
    accepted = fuzz(file, lambda rng: mutated_json(content, rng), lambda: ModelConfig.from_dir(file.parent))
    for data in accepted[:: max(1, len(accepted) // 20)]:  # what is accepted is a model, or the weights say it is not
        file.write_bytes(data)
        outcome(lambda: ModelReader(file.parent))
        config = ModelConfig.from_dir(file.parent)
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))).rope_theta == config.rope_theta


def test_safetensors_header(model: Callable[[str], Path]) -> None:
    library = pytest.importorskip("safetensors")
    directory = model("dense")
    file = directory / "model.safetensors"
    tensors = {"a": np.ones((2, 3), np.float32), "b": np.zeros(0, np.float32), "c": np.arange(4)}
    types = {"a": "F32", "b": "F32", "c": "I64"}
    with Writer(directory, [(n, types[n], t.shape) for n, t in tensors.items()], metadata={"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    for data in fuzz(file, header_damage(file), lambda: read_all(Reader(file))):
        library.deserialize(data)  # the format's own library accepts what is accepted here


def test_model_weights(model: Callable[[str], Path]) -> None:
    file = model("dense") / "model.safetensors"
    fuzz(file, header_damage(file), lambda: ModelReader(file.parent))


def test_index(model: Callable[[str], Path]) -> None:
    file = model("moe") / "model.safetensors.index.json"
    fuzz(file, json_damage(file), lambda: read_all(Reader(file.parent)))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_adapter_config(model: Callable[[str], Path], kind: str) -> None:
    directory, config = model(f"{kind}-adapter"), tiny_model(kind).config
    file = directory / "adapter_config.json"
    content = json.loads(file.read_bytes()) | {"base_model_name_or_path": str(directory)}
    content |= {"alpha_pattern": {r"layers\.0\..*": 3}, "layers_to_transform": None, "eva_config": None}
    file.write_text(json.dumps(content))

    def read() -> None:
        read_adapter(directory, config)
        base_of(directory, None)

    fuzz(file, lambda rng: mutated_json(content, rng), read)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_adapter_weights(model: Callable[[str], Path], kind: str) -> None:
    directory, config = model(f"{kind}-adapter"), tiny_model(kind).config
    file = directory / "adapter_model.safetensors"
    fuzz(file, header_damage(file), lambda: read_adapter(directory, config))


def test_trainer_state(tmp_path: Path) -> None:
    counts = {"samples": 3, "cut": 0, "dropped": 0, "rows": 3, "tokens": 60, "supervised_tokens": 30}
    place = {"round": 1, "start": 4, "carried": [[0, 1]], "emitted": 2, "window_counts": counts, "counts": counts}
    state = TrainState(2, 60, {"version": 1, "position": place, "data": {"seed": 1}}, 1.5, 2)
    state.identity, state.layout = {"seed": 42, "max_seq_len": 64}, {"data": 1}
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps(vars(state)))
    fuzz(file, json_damage(file), lambda: read_state(tmp_path))


def test_generation_config(tmp_path: Path) -> None:
    content = {"do_sample": True, "temperature": 0.8, "eos_token_id": [2, 3], "pad_token_id": 0, "bad_words_ids": [[1]]}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(content))
    config = tiny_model("dense").config
    run: dict[str, Any] = {"do_sample": False, "temperature": 0.0}
    fuzz(file, json_damage(file), lambda: not_used(read_generation_config(tmp_path, config), run))


def test_optimizer_state(tmp_path: Path) -> None:
    tensors = {f"experts/moment1[{i}:{i + 2}]": np.ones((2, 3), np.float32) for i in (0, 2)}
    tensors |= {"norm/moment1": np.ones(3, np.float32)}
    with Writer(tmp_path, [(name, "F32", tensor.shape) for name, tensor in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    file = tmp_path / "model.safetensors"

    def read() -> None:
        stored = StoredState(tmp_path)
        for name in stored.keys():  # noqa: SIM118 - no mapping
            assert stored.read(name).shape == stored.shape(name)

    fuzz(file, header_damage(file), read)


def test_reference_cache(tmp_path: Path) -> None:
    file, model = tmp_path / "reference.npz", {"weights": "a"}
    write_cache(file, model, {f"{i:032x}": (-1.0 - i, -2.0) for i in range(3)})
    good = file.read_bytes()
    fuzz(file, lambda rng: mutated_bytes(good, rng), lambda: read_cache(file, model))


def test_named_pipes_are_refused_at_once(model: Callable[[str], Path]) -> None:
    directory, adapter = model("dense"), model("dense-adapter")
    config = ModelConfig.from_dir(directory)
    for file, read in (
        (directory / "generation_config.json", lambda: read_generation_config(directory, config)),
        (directory / "config.json", lambda: ModelConfig.from_dir(directory)),
        (directory / "trainer_state.json", lambda: read_state(directory)),
        (directory / "model.safetensors", lambda: Reader(directory / "model.safetensors")),
        (adapter / "adapter_model.safetensors", lambda: read_adapter(adapter, config)),
    ):
        file.unlink(missing_ok=True)
        os.mkfifo(file)
        assert str(file.parent) in str(outcome(read))


@pytest.mark.parametrize(
    ("name", "format", "file"), [("wint4", "pt", "model.safetensors"), ("wint8", "paddle", "config.json")]
)
def test_quantised_directories(tmp_path: Path, name: str, format: Any, file: str) -> None:
    quantised_model(saved_model(tmp_path / "model", "dense", num_hidden_layers=1), tmp_path / "q", name, format)
    target = tmp_path / "q" / file
    damage = json_damage(target) if file == "config.json" else header_damage(target)
    fuzz(target, damage, lambda: ModelReader(tmp_path / "q"))
