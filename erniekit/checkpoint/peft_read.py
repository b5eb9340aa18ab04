"""Reads adapters in PEFT's format: those of peft_write.py, PEFT's own, and the older form with a module for each
expert. An adapter that does not fit the model is rejected with the differences.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from erniekit.checkpoint.adapter_config import AdapterConfig, ends, read_adapter_config
from erniekit.checkpoint.fingerprint import fingerprint
from erniekit.checkpoint.mismatch import mismatch_lines
from erniekit.checkpoint.model_dir import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from erniekit.checkpoint.peft_write import PREFIX, is_parameter, part_sizes, peft_path
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.lora import LoraOptions, Slot
from erniekit.lora.layers import parameter_name
from erniekit.lora.targets import SAVEABLE, hf_name, is_stacked
from erniekit.models.config import ModelConfig
from erniekit.models.weights import logical_tensors
from erniekit.utils.errors import CheckpointError

_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>A|B|magnitude_vector)(\.default)?(\.weight)?")
_NOT_ADAPTED = re.compile(r"(^|\.)(embed_tokens|lm_head|mlp\.gate)\.(base_layer|lora_)")
_EXPERT = re.compile(r"(?P<prefix>.+\.mlp\.(?:vision_)?experts)\.(?P<expert>[0-9]{1,6})\.(?P<half>gate|up|down)_proj")


@dataclass
class StoredAdapter:
    """An adapter that was read from a directory and fits a model. `tensors`: our parameter name -> fp32 array, of the
    adapters and of the parameters saved whole.
    """

    path: Path
    options: LoraOptions
    slots: dict[str, dict[str, Slot]]
    saved: tuple[str, ...]
    tensors: dict[str, np.ndarray] = field(repr=False)


def read_adapter(directory: str | Path, config: ModelConfig, model_dir: str | Path | None = None) -> StoredAdapter:
    """Read the adapter in `directory` for the model of `config`; with `model_dir`, it is also compared with its
    weights.

    Raises CheckpointError: not an adapter, an unknown option of PEFT, or an adapter for another base, with the
    differences.
    """
    path = Path(directory)
    content = read_adapter_config(path)
    reader = Reader(path / ADAPTER_FILE)
    made_for = reader.metadata.get("base_fingerprint")
    if made_for and model_dir is not None and made_for != fingerprint(model_dir):
        raise CheckpointError(
            f"{path} is an adapter for another base: it was trained on {content.base} (fingerprint {made_for}), "
            f"{model_dir} has other weights (fingerprint {fingerprint(model_dir)}). Set model_name_or_path to the "
            "model it was trained on."
        )
    return _Reading(path, content, reader, config).result()


class _Reading:
    """Reads one adapter: assigns each tensor to a parameter, then checks that all are there and fit."""

    def __init__(self, path: Path, content: AdapterConfig, reader: Reader, config: ModelConfig) -> None:
        self.path, self.content, self.reader, self.config = path, content, reader, config
        self.sizes = part_sizes(config)
        self.by_path = {self._path(key): key for key in self.sizes}
        stacks = {key[0].rpartition(".")[0] for key in self.sizes if is_stacked(key[0])}
        self.stacks = {peft_path(prefix, config): prefix for prefix in stacks}
        self.logicals = {peft_path(logical.pt[0].name, config): logical for logical in logical_tensors(config)}
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []
        self.factors: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        self.stacked: dict[str, dict[str, np.ndarray]] = {}  # by PEFT's module name
        self.experts: dict[tuple[str, str], dict[int, dict[str, np.ndarray]]] = {}  # by prefix and half, then number
        self.scales: dict[tuple[str, str], float] = {}
        self.tensors: dict[str, np.ndarray] = {}
        self.saved: list[str] = []

    def _path(self, key: tuple[str, str]) -> str:
        """PEFT's name of a projection's part."""
        return peft_path(hf_name(*key), self.config)

    def result(self) -> StoredAdapter:
        for name in self.reader.keys():  # noqa: SIM118 - a Reader is not iterable
            bare = name.removeprefix(PREFIX)
            match = _TENSOR.fullmatch(bare)
            if match is None:
                self._take_saved(name, bare)
            else:
                self._read_factor(name, match["module"], match["kind"].removesuffix("_vector"))
        self._take_stacked()
        self._stack()
        slots: dict[str, dict[str, Slot]] = {}
        for key in [key for key in self.sizes if key in self.factors]:
            self._place(key, slots)
        self._complain([*(self._path(key) for key in self._targeted() if key not in self.factors), *self._not_saved()])
        return StoredAdapter(self.path, self._options(), slots, tuple(self.saved), self.tensors)

    def _read_factor(self, name: str, module: str, kind: str) -> None:
        shape, factors = self.reader.info(name).shape, self._factors_of(module)
        if factors is None or kind in factors:  # not in this model, or present under two names
            self.unexpected.append(name)
        elif not all(shape) or len(shape) > 2 or (kind != "magnitude" and len(shape) != 2):
            self.misshapen.append(f"{name} {list(shape)}")
        else:
            factors[kind] = self.reader.read(name, as_fp32=True)
            if not np.isfinite(factors[kind]).all():
                raise CheckpointError(
                    f"{self.path}: {name} has values that are not finite: the training diverged, or the file is "
                    "damaged. Use an earlier checkpoint."
                )

    def _factors_of(self, module: str) -> dict[str, np.ndarray] | None:
        """The factors read so far of one adapter, by PEFT's module name; None for a module that the model lacks."""
        expert = _EXPERT.fullmatch(module)
        if expert:
            of_half = self.experts.setdefault((expert["prefix"], expert["half"]), {})
            return of_half.setdefault(int(expert["expert"]), {})
        bare = module.removesuffix(".base_layer")
        if bare in self.stacks or bare.endswith(".mlp.experts"):
            return self.stacked.setdefault(module, {})
        return self.factors.setdefault(self.by_path[module], {}) if module in self.by_path else None

    def _take_stacked(self) -> None:
        """Assign an adapter of stacked experts by its sizes: PEFT's names do not tell which of the two stacked
        parameters it belongs to.
        """
        for module, factors in self.stacked.items():
            path = module.removesuffix(".base_layer")
            keys = [(f"{self.stacks.get(path, path)}.{leaf}", "") for leaf in ("up_gate_proj", "down_proj")]
            fitting = [key for key in keys if key in self.sizes and self._fits(key, factors)]
            if keys[0] not in self.sizes:
                self.unexpected.append(module)
            else:
                nested = f"{path}.base_layer" in self.stacked
                inner = module.endswith(".base_layer") or not nested
                self.factors[fitting[0] if fitting else keys[0 if inner else 1]] = factors

    def _fits(self, key: tuple[str, str], factors: dict[str, np.ndarray]) -> bool:
        _, num_in, num_out = self.sizes[key]
        return set(factors) == {"A", "B"} and factors["A"].shape[1] == num_in and factors["B"].shape[0] == num_out

    def _take_saved(self, name: str, bare: str) -> None:
        bare = bare.replace(".modules_to_save.default", "")
        logical = self.logicals.get(bare)
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

    def _not_saved(self) -> Iterator[str]:
        """The modules that should be in the file as a whole (modules_to_save) and are not."""
        inside = [name.removeprefix(PREFIX).replace(".modules_to_save.default", "") for name in self.reader.keys()]  # noqa: SIM118
        for name in self.content.saved:
            expected = [piece.rpartition(".")[0] for piece in self.logicals if ends(piece.rpartition(".")[0], (name,))]
            if expected and not any(f"{module}.weight" in inside for module in expected):
                yield f"{name} (modules_to_save)"

    def _check_tied_head(self, name: str) -> None:
        embeddings = name.replace("lm_head", peft_path("model.embed_tokens", self.config))
        if embeddings not in self.reader or not np.array_equal(self.reader.read(name), self.reader.read(embeddings)):
            raise CheckpointError(f"{self.path} has a head of its own, but this model's head is its embeddings.")

    def _require_tied(self) -> None:
        if not self.content.ties_weights:
            raise CheckpointError(
                f"{self.path} trained the embeddings (modules_to_save) apart from the head, which in this model is the "
                "same matrix. PEFT keeps them together with ensure_weight_tying: true."
            )

    def _stack(self) -> None:
        """Combine the adapters of older files, which have a module for each expert: those of gate and up become one
        adapter of the fused stacked projection, with a block-diagonal B.
        """
        for prefix in dict.fromkeys(prefix for prefix, _ in self.experts):
            for leaf, halves in (("up_gate_proj", ("gate", "up")), ("down_proj", ("down",))):
                by_half = {half: self.experts[prefix, half] for half in halves if (prefix, half) in self.experts}
                num_experts = self.sizes.get((f"{prefix}.{leaf}", ""), (0,))[0]
                if len(by_half) == len(halves) and _fit_together(list(by_half.values()), num_experts):
                    self._stack_one(prefix, leaf, by_half)
                elif by_half:
                    numbers = sorted(number for adapters in by_half.values() for number in adapters)
                    self.unexpected.append(f"{prefix}: {'/'.join(by_half)}_proj of experts {numbers[0]}..{numbers[-1]}")

    def _stack_one(self, prefix: str, leaf: str, by_half: dict[str, dict[int, dict[str, np.ndarray]]]) -> None:
        numbers = range(len(next(iter(by_half.values()))))
        scales = [
            self.content.scaling(f"{prefix}.0.{half}_proj", adapters[0]["A"].shape[0])
            for half, adapters in by_half.items()
        ]
        a = np.stack([np.concatenate([adapters[e]["A"] for adapters in by_half.values()]) for e in numbers])
        halves = list(zip(by_half.values(), scales, strict=True))
        b = np.stack([_block_diagonal([adapters[e]["B"] * (s / scales[0]) for adapters, s in halves]) for e in numbers])
        key = (f"{prefix}.{leaf}", "")
        self.scales[key] = scales[0]
        self.factors[key] = {"A": a.reshape(-1, a.shape[2]), "B": b.transpose(1, 2, 0).reshape(b.shape[1], -1)}

    def _place(self, key: tuple[str, str], slots: dict[str, dict[str, Slot]]) -> None:
        """Check the shapes of one adapter and convert it to our layout."""
        module, part = key
        experts, num_in, num_out = self.sizes[key]
        factors = self.factors[key]
        a, b, magnitude = factors.get("A"), factors.get("B"), factors.get("magnitude")
        if a is None or b is None or (magnitude is None) == self.content.dora:
            self.misshapen.append(f"{self._path(key)}: has only {', '.join(sorted(factors))}")
            return
        rank = a.shape[0] // experts
        width = num_out if magnitude is None else magnitude.size
        if not rank or a.shape != (rank * experts, num_in) or b.shape != (width, rank * experts) or width != num_out:
            self.misshapen.append(
                f"{self._path(key)}: A {list(a.shape)}, B {list(b.shape)}; here {num_in} in, {num_out} out"
                + (f", {experts} experts" if experts > 1 else "")
            )
            return
        expected = self.content.rank_of(self._path(key))
        if key not in self.scales and rank != expected:  # those of experts one by one have another rank together
            self.misshapen.append(f"{self._path(key)}: rank {rank}, and {ADAPTER_CONFIG_FILE} says {expected}")
            return
        scaling = self.scales.get(key) or self.content.scaling(self._path(key), rank)
        slots.setdefault(module, {})[part] = Slot(rank, scaling)
        name = f"{module}.adapter."
        if is_stacked(module):
            ours = (
                a.reshape(experts, rank, num_in).transpose(0, 2, 1),
                b.reshape(num_out, rank, experts).transpose(2, 1, 0),
            )
        else:
            ours = a.T, b.T
        self.tensors[name + parameter_name("A", part)], self.tensors[name + parameter_name("B", part)] = map(
            np.ascontiguousarray, ours
        )
        if magnitude is not None:
            self.tensors[name + parameter_name("magnitude", part)] = magnitude.reshape(-1)

    def _targeted(self) -> Iterator[tuple[str, str]]:
        """The projections that PEFT would adapt in this model, as far as the configuration lists them plainly."""
        modules, parameters = self.content.targets, self.content.target_parameters
        if modules is None and not parameters:
            return
        for key, (experts, *_) in self.sizes.items():
            name = self._path(key)
            if isinstance(modules, re.Pattern):
                hit = modules.fullmatch(name) is not None
            else:
                # In a mixture of experts PEFT may mean the stacked experts alone by a feed-forward name.
                hit = not is_parameter(key[0], self.config) and ends(name, modules or ())
            if hit or ends(name if experts > 1 else f"{name}.weight", parameters):
                yield key

    def _options(self) -> LoraOptions:
        content = self.content
        return LoraOptions(content.rank, content.alpha, content.dropout, content.rslora, content.dora)

    def _is_beyond(self, name: str) -> bool:
        """Whether an unexpected tensor is of a kind that PEFT trains and that is not applied here."""
        return _NOT_ADAPTED.search(name) is not None or any(f".{module}." in name for module in self.content.saved)

    def _complain(self, missing: list[str]) -> None:
        lines = mismatch_lines(
            {"missing": missing, "not in this model": self.unexpected, "of another size": self.misshapen}
        )
        if lines or not self.factors:
            advice = f"It was trained on {self.content.base}: set model_name_or_path to that model."
            if not missing and not self.misshapen and all(map(self._is_beyond, self.unexpected or [""])):
                advice = (
                    "Adapters of embeddings, head and routers are not applied here, nor modules_to_save other than "
                    f"{', '.join(sorted(SAVEABLE))}: merge this one into its base with PEFT, and use the result as a "
                    "model."
                )
            lines = lines or ["  it has no factors at all"]
            raise CheckpointError("\n".join([f"{self.path}: the adapter does not fit this model.", *lines, advice]))


def _fit_together(halves: list[dict[int, dict[str, np.ndarray]]], num_experts: int) -> bool:
    """Whether every half has all experts, with factors A and B of one rank and of the same shapes."""
    inputs = set()
    for experts in halves:
        shapes = {tuple((kind, factors[kind].shape) for kind in sorted(factors)) for factors in experts.values()}
        if sorted(experts) != list(range(num_experts)) or len(shapes) != 1 or set(experts[0]) != {"A", "B"}:
            return False
        inputs.add(experts[0]["A"].shape[1])
        if experts[0]["A"].shape[0] != experts[0]["B"].shape[1]:
            return False
    return len(inputs) == 1


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    out = np.zeros((sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks)), np.float32)
    row = column = 0
    for block in blocks:
        out[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return out
