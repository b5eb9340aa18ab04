"""Reads adapters in PEFT's format: those of adapter.py, PEFT's own, and the older form with a module an expert. What
does not fit the model is refused with the difference.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.checkpoint.adapter import PREFIX, fingerprint, is_parameter, part_sizes
from erniekit.checkpoint.folder import ADAPTER_CONFIG_FILE, ADAPTER_FILE, is_adapter
from erniekit.checkpoint.safetensors import Reader
from erniekit.hub import resolve_model
from erniekit.lora import LoraOptions, Slot
from erniekit.lora.layers import own_name
from erniekit.lora.targets import SAVEABLE, hf_name, is_stacked
from erniekit.models.config import ModelConfig
from erniekit.models.weights import logical_tensors
from erniekit.utils.errors import CheckpointError

_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>A|B|magnitude_vector)(\.default)?(\.weight)?")
_EXPERT = re.compile(r"(?P<prefix>.+\.mlp\.experts)\.(?P<expert>\d+)\.(?P<half>gate|up|down)_proj")
_SHOWN = 6
# PEFT's options that change what the factors mean, with the values under which they mean what they do here.
_ONLY = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "velora_config": (None,),
    "kasa_config": (None,),
}
_BASE_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that also change the base's weights


@dataclass
class StoredAdapter:
    """An adapter read from a directory and found to fit a model. `tensors`: our parameter name -> fp32 array, of the
    adapters and of the parameters saved whole.
    """

    path: Path
    options: LoraOptions
    slots: dict[str, dict[str, Slot]]
    saved: tuple[str, ...]
    tensors: dict[str, np.ndarray] = field(repr=False)


def read_adapter(directory: str | Path, config: ModelConfig, model_dir: str | Path | None = None) -> StoredAdapter:
    """The adapter in `directory`, for the model of `config`; with `model_dir`, also checked against its weights.

    Raises CheckpointError: not an adapter, an option of PEFT that is not known here, or an adapter for another base,
    with what differs.
    """
    path = Path(directory)
    content = read_config(path)
    reader = Reader(path / ADAPTER_FILE)
    made_for = reader.metadata.get("base_fingerprint")
    base = content.get("base_model_name_or_path")
    if made_for and model_dir is not None and made_for != fingerprint(model_dir):
        raise CheckpointError(
            f"{path} is an adapter for another base: it was trained on {base} (fingerprint {made_for}), {model_dir} "
            f"has other weights (fingerprint {fingerprint(model_dir)}). Set model_name_or_path to the model it was "
            "trained on."
        )
    return _Reading(path, content, reader, config).result()


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json, refused where it says what is not known here."""
    if not is_adapter(path):
        raise CheckpointError(f"{path} holds no adapter: {ADAPTER_CONFIG_FILE} and {ADAPTER_FILE} are needed.")
    try:
        content = json.loads((path / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
        assert isinstance(content, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise CheckpointError(f"{path / ADAPTER_CONFIG_FILE} cannot be read: {error}") from None
    if content.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {content.get('peft_type')!r}: only LORA adapters can be applied.")
    for name, allowed in _ONLY.items():
        if name in content and content[name] not in allowed:
            raise CheckpointError(f"{path}: {name}: {content[name]!r}: this kind of adapter is not known here.")
    start = str(content.get("init_lora_weights"))
    if start.lower().startswith(_BASE_CHANGED):
        raise CheckpointError(
            f"{path}: init_lora_weights: {start}: such adapters belong to a base with changed weights. Convert it to a "
            "plain one with PEFT first (path_initial_model_for_weight_conversion)."
        )
    return content


def base_of(directory: str | Path, named: str | None, hub: str | None = None) -> Path:
    """The directory of the model that an adapter belongs to: `named` (model_name_or_path), or what the adapter itself
    says. Raises CheckpointError if neither is there.
    """
    base = named or read_config(Path(directory)).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"model_name_or_path: {directory} is an adapter and does not say of which model: name its base."
        )
    return resolve_model(base, hub)


class _Reading:
    """Reads one adapter: finds each tensor's place, then checks that all are there and fit."""

    def __init__(self, path: Path, content: dict[str, Any], reader: Reader, config: ModelConfig) -> None:
        self.path, self.content, self.reader, self.config = path, content, reader, config
        self.sizes = part_sizes(config)
        self.by_hf = {hf_name(*key): key for key in self.sizes}
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []
        self.factors: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        self.stacked: dict[str, dict[str, np.ndarray]] = {}  # by PEFT's module name
        self.scales: dict[tuple[str, str], float] = {}
        self.tensors: dict[str, np.ndarray] = {}
        self.saved: list[str] = []

    def result(self) -> StoredAdapter:
        experts: dict[tuple[str, str], dict[int, dict[str, np.ndarray]]] = {}
        for name in self.reader.keys():  # noqa: SIM118 - a Reader is not iterable
            bare = name.removeprefix(PREFIX)
            match = _TENSOR.fullmatch(bare)
            if match is None:
                self._take_saved(name, bare)
                continue
            kind = "magnitude" if match["kind"] == "magnitude_vector" else match["kind"]
            array = self.reader.read(name, as_fp32=True)
            expert = _EXPERT.fullmatch(match["module"])
            if expert:
                of_half = experts.setdefault((expert["prefix"], expert["half"]), {})
                of_half.setdefault(int(expert["expert"]), {})[kind] = array
            else:
                self._take(name, match["module"], kind, array)
        self._take_stacked()
        self._stack(experts)
        slots: dict[str, dict[str, Slot]] = {}
        for key in [key for key in self.sizes if key in self.factors]:
            self._place(key, slots)
        self._complain([hf_name(*key) for key in self._targeted() if key not in self.factors])
        return StoredAdapter(self.path, self._options(), slots, tuple(self.saved), self.tensors)

    def _take(self, name: str, module: str, kind: str, array: np.ndarray) -> None:
        if module.removesuffix(".base_layer").endswith(".mlp.experts"):
            self.stacked.setdefault(module, {})[kind] = array
        elif module in self.by_hf:
            self.factors.setdefault(self.by_hf[module], {})[kind] = array
        else:
            self.unexpected.append(name)

    def _take_stacked(self) -> None:
        """PEFT's names do not say which of the two stacked parameters an adapter belongs to: its sizes do."""
        for module, found in self.stacked.items():
            prefix = module.removesuffix(".base_layer")
            keys = [(f"{prefix}.{leaf}", "") for leaf in ("up_gate_proj", "down_proj")]
            fitting = [key for key in keys if key in self.sizes and self._fits(key, found)]
            if keys[0] not in self.sizes:
                self.unexpected.append(module)
            else:
                nested = f"{prefix}.base_layer" in self.stacked
                inner = module.endswith(".base_layer") or not nested
                self.factors[fitting[0] if fitting else keys[0 if inner else 1]] = found

    def _fits(self, key: tuple[str, str], found: dict[str, np.ndarray]) -> bool:
        _, num_in, num_out = self.sizes[key]
        return set(found) == {"A", "B"} and found["A"].shape[1] == num_in and found["B"].shape[0] == num_out

    def _take_saved(self, name: str, bare: str) -> None:
        bare = bare.replace(".modules_to_save.default", "")
        logical = next((one for one in logical_tensors(self.config) if one.pt[0].name == bare), None)
        if bare == "lm_head.weight" and self.config.tie_word_embeddings:
            self._check_tied_head(name)
        elif logical is None or bare.split(".")[-2] not in SAVEABLE:
            self.unexpected.append(name)
        elif self.reader.info(name).shape != logical.pt[0].shape:
            self.misshapen.append(f"{bare} {list(self.reader.info(name).shape)}, here {list(logical.pt[0].shape)}")
        else:
            self.saved.append(logical.param)
            self.tensors[logical.param] = logical.from_file([self.reader.read(name, as_fp32=True)], "pt")
            if logical.param == "model.embed_tokens.weight" and self.config.tie_word_embeddings:
                self._require_tied()

    def _check_tied_head(self, name: str) -> None:
        embeddings = name.replace("lm_head", "model.embed_tokens")
        if embeddings not in self.reader or not np.array_equal(self.reader.read(name), self.reader.read(embeddings)):
            raise CheckpointError(f"{self.path} has a head of its own, but this model's head is its embeddings.")

    def _require_tied(self) -> None:
        if not self.content.get("ensure_weight_tying"):
            raise CheckpointError(
                f"{self.path} trained the embeddings (modules_to_save) apart from the head, which in this model is the "
                "same matrix. PEFT keeps them together with ensure_weight_tying: true."
            )

    def _stack(self, experts: dict[tuple[str, str], dict[int, dict[str, np.ndarray]]]) -> None:
        """Older files have a module an expert: gate and up side by side become one adapter of the stacked projection,
        on a block diagonal.
        """
        for prefix in dict.fromkeys(prefix for prefix, _ in experts):
            for leaf, halves in (("up_gate_proj", ("gate", "up")), ("down_proj", ("down",))):
                found = {half: experts[prefix, half] for half in halves if (prefix, half) in experts}
                numbers = list(range(self.sizes.get((f"{prefix}.{leaf}", ""), (0,))[0]))
                if found and len(found) == len(halves) and all(sorted(one) == numbers for one in found.values()):
                    self._stack_one(prefix, leaf, found)
                elif found:
                    numbers = sorted(number for one in found.values() for number in one)
                    self.unexpected.append(f"{prefix}: {'/'.join(found)}_proj of experts {numbers[0]}..{numbers[-1]}")

    def _stack_one(self, prefix: str, leaf: str, found: dict[str, dict[int, dict[str, np.ndarray]]]) -> None:
        numbers = range(len(next(iter(found.values()))))
        scales = [self._scaling(f"{prefix}.0.{half}_proj", one[0]["A"].shape[0]) for half, one in found.items()]
        a = np.stack([np.concatenate([one[e]["A"] for one in found.values()]) for e in numbers])
        parts = list(zip(found.values(), scales, strict=True))
        b = np.stack([_block_diagonal([one[e]["B"] * (s / scales[0]) for one, s in parts]) for e in numbers])
        key = (f"{prefix}.{leaf}", "")
        self.scales[key] = scales[0]
        self.factors[key] = {"A": a.reshape(-1, a.shape[2]), "B": b.transpose(1, 2, 0).reshape(b.shape[1], -1)}

    def _scaling(self, name: str, rank: int) -> float:
        alpha = self.content.get("lora_alpha", 8)
        for pattern, value in (self.content.get("alpha_pattern") or {}).items():
            if any(re.match(rf"(.*\.)?({pattern})$", form) for form in (name, f"{name}.weight")):
                alpha = value
                break
        return float(alpha) / (rank**0.5 if self.content.get("use_rslora") else rank)

    def _place(self, key: tuple[str, str], slots: dict[str, dict[str, Slot]]) -> None:
        """Check one adapter's shapes and bring it into our layout."""
        module, part = key
        experts, num_in, num_out = self.sizes[key]
        factors = self.factors[key]
        a, b, magnitude = factors.get("A"), factors.get("B"), factors.get("magnitude")
        if a is None or b is None or (magnitude is None) == bool(self.content.get("use_dora")):
            self.misshapen.append(f"{hf_name(*key)}: has only {', '.join(sorted(factors))}")
            return
        rank = a.shape[0] // experts
        if a.shape != (rank * experts, num_in) or b.shape != (num_out, rank * experts):
            self.misshapen.append(
                f"{hf_name(*key)}: A {list(a.shape)}, B {list(b.shape)}; here {num_in} in, {num_out} out"
                + (f", {experts} experts" if experts > 1 else "")
            )
            return
        scaling = self.scales.get(key) or self._scaling(hf_name(*key), rank)
        slots.setdefault(module, {})[part] = Slot(rank, scaling)
        name = f"{module}.adapter."
        if is_stacked(module):
            ours = (
                a.reshape(experts, rank, num_in).transpose(0, 2, 1),
                b.reshape(num_out, rank, experts).transpose(2, 1, 0),
            )
        else:
            ours = a.T, b.T
        self.tensors[name + own_name("A", part)], self.tensors[name + own_name("B", part)] = map(
            np.ascontiguousarray, ours
        )
        if magnitude is not None:
            self.tensors[name + own_name("magnitude", part)] = magnitude.reshape(-1)

    def _targeted(self) -> Iterator[tuple[str, str]]:
        """What PEFT would adapt in this model, as far as the configuration says it plainly."""
        content = self.content
        if content.get("layers_to_transform") is not None or content.get("exclude_modules"):
            return
        modules, parameters = content.get("target_modules") or [], content.get("target_parameters") or []
        for key, (experts, *_) in self.sizes.items():
            name = hf_name(*key)
            if isinstance(modules, str):
                hit = modules != "all-linear" and re.fullmatch(modules, name) is not None
            else:
                # In a mixture of experts PEFT may mean the stacked experts alone by a feed-forward name.
                hit = not is_parameter(key[0], self.config) and _ends(name, modules)
            if hit or _ends(name if experts > 1 else f"{name}.weight", parameters):
                yield key

    def _options(self) -> LoraOptions:
        content = self.content
        return LoraOptions(
            rank=int(content.get("r", 8)),
            alpha=float(content.get("lora_alpha", 8)),
            dropout=float(content.get("lora_dropout") or 0.0),
            rslora=bool(content.get("use_rslora")),
            dora=bool(content.get("use_dora")),
        )

    def _complain(self, missing: list[str]) -> None:
        lines = []
        for what, names in (
            ("missing", missing),
            ("not in this model", self.unexpected),
            ("of another size", self.misshapen),
        ):
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                lines.append(f"  {len(names)} {what}: {'; '.join(names[:_SHOWN])}{more}")
        if lines or not self.factors:
            base = self.content.get("base_model_name_or_path")
            lines = lines or ["  it has no factors at all"]
            raise CheckpointError(
                "\n".join(
                    [
                        f"{self.path}: the adapter does not fit this model.",
                        *lines,
                        f"It was trained on {base}: set model_name_or_path to that model.",
                    ]
                )
            )


def _ends(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    out = np.zeros((sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks)), np.float32)
    row = column = 0
    for block in blocks:
        out[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return out
