"""The state in a training checkpoint in addition to the weights. With it a resumed run repeats an uninterrupted one bit
for bit.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from erniekit.checkpoint.mismatch import listed
from erniekit.checkpoint.rank_files import RankFiles
from erniekit.checkpoint.reshard import Shares
from erniekit.checkpoint.safetensors_header import Plan
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.stored_state import StoredState, piece_name
from erniekit.config.schema import Config
from erniekit.models.weights import Shape
from erniekit.nn.shard import WHOLE
from erniekit.training.adamw import POWERS, AdamW
from erniekit.training.moment_codes import CODES, MOMENTS, Field, MomentCode, Rounding
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import JsonObject, read_json_object

STATE_FILE = "trainer_state.json"
CONFIG_FILE = "config.yaml"
OPTIMIZER_DIR = "optimizer"


@dataclass
class TrainState:
    """Progress of a run. Random noise needs no state: each step seeds its generator from (seed, step).

    `best_of` is what best_metric was measured under (best.BestModel), `identity` the configuration that the run had
    (resume_checks.noted), `base` its base model (resume_checks.base_of), `max_steps` its last step as planned,
    `has_optimizer` whether the optimizer's state was saved, `loss_scale` the scale of the next step in fp16 and
    `good_steps` the steps since it changed, `skipped_steps` how many updated nothing. A checkpoint of an
    earlier version lacks some of these.
    """

    step: int = 0
    num_tokens: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    best_of: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, int] = field(default_factory=dict)
    max_steps: int | None = None
    has_optimizer: bool | None = None
    loss_scale: float | None = None
    good_steps: int = 0
    skipped_steps: int = 0


def state_writer(cfg: Config, state: TrainState) -> Callable[[Path], None]:
    """A function that writes config.yaml and trainer_state.json, as they are now, into a checkpoint."""
    text = json.dumps(asdict(state), indent=1)

    def write(directory: Path) -> None:
        (directory / CONFIG_FILE).write_text(cfg.to_yaml(), encoding="utf-8")
        (directory / STATE_FILE).write_text(text, encoding="utf-8")

    return write


def optimizer_rank_files(
    optimizer: AdamW, shares: Shares, code: MomentCode | None = None, rounding: Rounding | None = None
) -> RankFiles:
    """This rank's share of the optimizer's state: whole tensors "parameter/key", and of experts that several ranks
    hold "parameter/key[begin:end]", the rows from begin to end. `code`: how the moments are stored; None: in fp32.
    `rounding` collects what a code changes.
    """
    plan: Plan = []
    shapes = optimizer.state_shapes()
    for entry, local in shapes.items():
        name, _, key = entry.rpartition("/")
        rows = None if key in POWERS else shares.rows(name, local)
        if _writes(shares, entry, optimizer):
            shape = local if rows or key in POWERS else shares.whole_shape(name, local)
            plan += [(piece_name(f"{name}/{f}", rows), *kind) for f, kind in _fields(key, shape, code).items()]

    def tensors() -> Iterator[tuple[str, np.ndarray | None]]:
        for entry, local in shapes.items():
            name, _, key = entry.rpartition("/")
            rows = None if key in POWERS else shares.rows(name, local)
            coder = None if key in POWERS else _coder(key, shares.whole_shape(name, local), code)
            if coder is None:
                yield piece_name(entry, rows), _gathered(optimizer, shares, entry)
            elif key == MOMENTS[0]:
                first, second = (_gathered(optimizer, shares, f"{name}/{moment}") for moment in MOMENTS)
                if first is not None and second is not None:
                    coded = coder.encode(name, first, second, rounding or Rounding())
                    yield from ((piece_name(f"{name}/{field}", rows), array) for field, array in coded.items())

    metadata = {"format": "pt"} | ({} if code is None else {_STAGE: code.name})
    return RankFiles(OPTIMIZER_DIR, plan, tensors(), lambda name, array: [(name, array)], metadata)


_STAGE = "ckpt_quant_stage"  # in the headers of files with coded moments


def _fields(key: str, shape: Shape, code: MomentCode | None) -> dict[str, Field]:
    """What a file has for one entry of a parameter's state: of coded moments, all with the first and none with the
    second.
    """
    coder = _coder(key, shape, code)
    if coder is None:
        return {key: Field("F32", shape)}
    return coder.fields(shape) if key == MOMENTS[0] else {}


def _coder(key: str, shape: Shape, code: MomentCode | None) -> MomentCode | None:
    """The code of one entry of the state of a parameter of this shape; None if it is stored in fp32."""
    return code if code is not None and key in MOMENTS and code.applies(shape) else None


def _writes(shares: Shares, entry: str, optimizer: AdamW) -> bool:
    """Whether this rank writes an entry; the powers of the betas, equal for all rows of experts, go with the first."""
    name, _, key = entry.rpartition("/")
    rows = shares.rows(name, optimizer.parameters.tensors[name].shape)
    return shares.writes(name) and (key not in POWERS or rows is None or rows[0] == 0)


def _gathered(optimizer: AdamW, shares: Shares, entry: str) -> np.ndarray | None:
    """The part of an entry that this rank writes, gathered from its chunks on several ranks; None if another
    writes it.
    """
    name, _, key = entry.rpartition("/")
    if key in POWERS:
        return optimizer.state_array(entry) if _writes(shares, entry, optimizer) else None
    if shares.is_repeated(name) or optimizer.parameters.entries[name].placement.replica.index > 0:
        return None
    return shares.gather(name, optimizer.state_array(entry))


def read_state(directory: Path) -> TrainState:
    """Read trainer_state.json. CheckpointError if the directory is not a training checkpoint, or names the key whose
    value cannot be one.
    """
    file = directory / STATE_FILE
    try:
        content = JsonObject(read_json_object(file, CheckpointError), str(file), CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is not a training checkpoint: it has no {STATE_FILE}. To start from its weights, set "
            "model_name_or_path to it."
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f"{error} Resume from an older checkpoint (resume_from_checkpoint).") from error
    hints = get_type_hints(TrainState)
    unknown = sorted(content.values.keys() - hints.keys())
    if unknown or "step" not in content:
        problem = f"{unknown[0]!r:.60}: not a key of this version" if unknown else "step: missing"
        raise CheckpointError(f"{file}: {problem}. Resume from an older checkpoint.")
    values = {name: _typed(content, name, hint) for name, hint in hints.items() if name in content}
    _check_position(content.get_object("data"), content.get_object("data").values.get("position"))
    if not all(type(value) is int for value in content.get_object("layout").values.values()):
        raise CheckpointError(f"{file}: layout: must hold integers. Resume from an older checkpoint.")
    return TrainState(**values)


_BIG = 1 << 62  # the limit of counts, which fit in 64 bits


def _typed(content: JsonObject, name: str, hint: Any) -> Any:
    """The value of one field of TrainState, checked by the field's type; null is for those that may be None."""
    is_object, value = get_origin(hint) is dict, content.values[name]
    kinds = (hint,) if is_object else get_args(hint) or (hint,)
    if value is None:
        if type(None) in kinds:
            return None
        raise CheckpointError(f"{content.where}: {name}: must not be null. Resume from an older checkpoint.")
    if bool in kinds:
        return content.get_bool(name, None)
    if float in kinds:
        return content.get_number(name, None)
    if int in kinds:
        return content.get_int(name, None, 0, _BIG)
    if str in kinds:
        return content.get_text(name, None)
    assert is_object, f"no reader for {name}: {hint}"
    return dict(content.get_object(name).values)


def _check_position(data: JsonObject, value: Any) -> None:
    """The place in the data: natural numbers, true and false, in lists and objects."""
    level = [value]
    while level:
        inner: list[Any] = []
        for part in level:
            if isinstance(part, (list, dict)):
                inner += part.values() if isinstance(part, dict) else part
            elif part is not None and not (isinstance(part, int) and 0 <= part <= _BIG):
                raise CheckpointError(
                    f"{data.where}: position: must hold natural numbers, found {part!r:.60}. Resume from an older "
                    "checkpoint, or set ignore_data_skip: true."
                )
        level = inner


def stored_code(directory: Path) -> MomentCode | None:
    """How the moments of a checkpoint are stored; None: in fp32. CheckpointError for a code of a later version."""
    stage = Reader(directory / OPTIMIZER_DIR).metadata.get(_STAGE)
    if stage is not None and stage not in CODES:
        raise CheckpointError(
            f"{directory / OPTIMIZER_DIR}: {_STAGE} is {stage!r:.40} in its header, which this version does not know. "
            "Set ignore_load_lr_and_optim: true to continue with the weights alone."
        )
    return None if stage is None else CODES[stage]


def load_optimizer(directory: Path, optimizer: AdamW, shares: Shares) -> None:
    """Restore every entry of the optimizer's state, whatever the layout and the code that wrote it; CheckpointError
    lists what is missing, left over or misshapen.
    """
    code = stored_code(directory)
    stored = StoredState(directory / OPTIMIZER_DIR, ("F32",) if code is None else ("F32", "I8", "U8"))
    _require_fit(stored, directory / OPTIMIZER_DIR, optimizer, shares, code)
    for entry, local in optimizer.state_shapes().items():
        name, _, key = entry.rpartition("/")
        if key in POWERS:
            optimizer.load_state_array(entry, stored.read(entry))
            continue
        whole, rows = shares.whole_shape(name, local), shares.rows(name, local)
        coder = _coder(key, whole, code)
        if coder is None:
            optimizer.load_state_array(entry, shares.shard_of(name, stored.read(entry, rows)))
        elif key == MOMENTS[0]:
            coded = {field: stored.read(f"{name}/{field}", rows) for field in coder.fields(whole)}
            for moment, array in coder.decode(coded).items():
                optimizer.load_state_array(f"{name}/{moment}", shares.shard_of(name, array))


def _require_fit(
    stored: StoredState, directory: Path, optimizer: AdamW, shares: Shares, code: MomentCode | None
) -> None:
    """CheckpointError if the tensors in a directory are not those of the optimizer's state under this code."""
    wanted: dict[str, Field] = {}
    for entry, local in optimizer.state_shapes().items():
        name, _, key = entry.rpartition("/")
        shape = local if key in POWERS else shares.whole_shape(name, local)
        wanted |= {f"{name}/{field}": kind for field, kind in _fields(key, shape, code).items()}
    # Entries that this rank does not have are checked by other ranks.
    names = [name for name in stored.keys() if name in wanted or shares.shard == WHOLE]  # noqa: SIM118
    found = {name: Field(*stored.info(name)) for name in names}
    if wanted != found:
        missing, left = (_shown(a.items() - b.items()) for a, b in ((wanted, found), (found, wanted)))
        raise CheckpointError(
            f"{directory} does not fit this model: expected {missing or 'no more'}; found {left or 'none of them'}. "
            "Set ignore_load_lr_and_optim: true to continue with the weights alone."
        )


def _shown(entries: Iterable[tuple[str, Field]]) -> str:
    return listed(f"{name} {kind.dtype} {list(kind.shape)}" for name, kind in sorted(entries))
