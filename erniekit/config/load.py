"""Loads a file and overrides into one checked, frozen Config."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from erniekit.config import checks, compat, dialects, peft_keys, read, references, rl_keys, schema, support, synonyms
from erniekit.config.compat_keys import RULES, SECRETS
from erniekit.config.fields import coerce, is_null
from erniekit.config.methods import DEFAULT, METHODS
from erniekit.config.schema import Config
from erniekit.config.schema_qat import QAT_COMPUTE_TYPES, STATIC, WITH_RANGES
from erniekit.config.values import plain, shortened
from erniekit.utils.errors import ConfigError


def load(
    path: str | None = None,
    overrides: Sequence[str] | Mapping[str, Any] | None = None,
    command: str = "train",
    allow_extra: bool = False,
) -> Config:
    """Loads a YAML or JSON file, with overrides that replace its values.

    overrides: words `key=value` or `--key value`, or a mapping. command: the command that will use it (train, eval,
    export, split, chat ...), which decides what is required. allow_extra: unknown keys are reported, not rejected.
    Raises ConfigError that lists every problem: the key, its place, what is wrong and what to do.
    """
    if path is None and not overrides:
        raise ConfigError("Missing configuration files. Give a YAML or JSON file, or --key value.")
    layers = [read.read_file(path, is_known) if path is not None else [], read.read_overrides(overrides, is_known)]
    state = _State(allow_extra=allow_extra)
    resolved, renamed = rl_keys.translate(references.resolve(layers))
    for entries in resolved:
        state.add_layer(entries)
    state.notes += renamed
    state.raise_problems(path)
    return _finish(state, path, command)


def environment_variables(path: str) -> list[str]:
    """The environment variables that values of a file refer to. Raises ConfigError for a file that cannot be read."""
    return references.variables(read.read_file(path, is_known))


def is_known(name: str) -> bool:
    """Whether a name is a key of the schema or has a compatibility rule."""
    return name in _FIELDS or name in RULES


_FIELDS = schema.fields()
_MAX_PROBLEMS = 50  # listed in one message


@dataclasses.dataclass(frozen=True)
class _Given:
    """A converted value of a key, with the text that the user wrote ("from_scratch: 1") and its rank (compat.Alias)."""

    value: Any
    written: str
    place: str
    rank: int = 0

    @property
    def name(self) -> str:
        """The name of the key that the user wrote."""
        return self.written.partition(":")[0]


@dataclasses.dataclass
class _State:
    """The values, problems and notes collected while layers (a file, then overrides) are added; the last layer wins."""

    allow_extra: bool
    given: dict[str, _Given] = dataclasses.field(default_factory=dict)
    extras: dict[str, _Given] = dataclasses.field(default_factory=dict)
    names: set[str] = dataclasses.field(default_factory=set)  # every name that has a value, as the user wrote it
    problems: list[str] = dataclasses.field(default_factory=list)
    fixed: dict[str, str] = dataclasses.field(default_factory=dict)  # the problem of each key that has one value only
    notes: list[str] = dataclasses.field(default_factory=list)
    unknown: list[str] = dataclasses.field(default_factory=list)
    mentioned: set[str] = dataclasses.field(default_factory=set)  # every name in a layer, including keys that are null

    def add_layer(self, entries: Sequence[read.Entry]) -> None:
        """Add the entries of one file or one command line. Within one layer a key must not have two
        different values. A key that is null here removes the value of earlier layers.
        """
        given: dict[str, _Given] = {}
        extras: dict[str, _Given] = {}
        nulls: set[str] = set()
        off: list[tuple[compat.Alias, read.Entry]] = []
        self._note_names(entries)
        for entry in entries:
            rule = peft_keys.rule_of(entry.name, entry.block) or RULES.get(entry.name)
            name = rule.to if isinstance(rule, compat.Alias) else entry.name
            if entry.name not in _FIELDS and rule is None:
                self._unknown(entry)
            elif name in _FIELDS and is_null(_FIELDS[name], entry.value):
                nulls.add(name)
            elif entry.name in _FIELDS and rule is None:
                self._put(given, entry.name, entry, entry.value, 0)
            elif isinstance(rule, compat.Alias):
                if not self._alias(given, rule, entry):
                    off.append((rule, entry))
            elif isinstance(rule, compat.Fixed):
                self._fixed(rule, entry)
            else:
                self._keep(extras, entry.name, _Given(plain(entry.value), _as_written(entry), entry.place))
        for name in sorted(nulls - given.keys()):
            self._forget(name)
        for rule, entry in off:
            self._switch_off(given, rule, entry)
        self._overrule(given)
        self.extras |= extras

    def _forget(self, name: str) -> None:
        """Drop the value of an earlier layer, which may be meant, or an empty variable of a shell: max_steps=$STEPS."""
        old, default = self.given.pop(name, None), plain(_FIELDS[name].default)
        if old is not None and plain(old.value) != default:
            why = f"the command line gives {name} no value, so that its default holds: {shortened(str(default))}"
            self.notes.append(f"{old.written} ({old.place}): no effect: {why}")

    def _switch_off(self, given: dict[str, _Given], rule: compat.Alias, entry: read.Entry) -> None:
        """Drop what an earlier layer switched on with a switch that is off in this one; the key itself decides where
        this layer has it too.
        """
        written = _as_written(entry)
        new, old = given.get(rule.to), self.given.get(rule.to)
        if new is not None and _turns_on(rule, new.value):
            self.notes.append(f"{written} ({entry.place}): no effect: {new.written} decides")
        elif new is None and old is not None and old.name == entry.name:
            del self.given[rule.to]
        elif new is None and old is not None and _turns_on(rule, old.value):
            del self.given[rule.to]
            self.notes.append(f"{old.written} ({old.place}): no effect: {written} ({entry.place}) decides")

    def _note_names(self, entries: Sequence[read.Entry]) -> None:
        self.mentioned |= {entry.name for entry in entries}
        self.names |= {entry.name for entry in entries if entry.value is not None}

    def keys_given(self) -> frozenset[str]:
        """The keys that the user chose to give. For a file with every key, as a run saves it, these are the keys that
        differ from their defaults.
        """
        if self.mentioned >= _FIELDS.keys():
            return frozenset(name for name, given in self.given.items() if given.value != _FIELDS[name].default)
        return frozenset(self.given)

    def _overrule(self, given: dict[str, _Given]) -> None:
        """Put the values of a layer over those of earlier ones, with a note where the two have other names."""
        for name, new in given.items():
            old = self.given.get(name)
            if old is not None and old.value != new.value and old.name != new.name:
                self.notes.append(f"{old.written} ({old.place}): no effect: {new.written} ({new.place}) decides")
        self.given |= given

    def _fixed(self, rule: compat.Fixed, entry: read.Entry) -> None:
        self.fixed.pop(entry.name, None)
        if rule.is_unsupported(entry.value):
            self.fixed[entry.name] = f"{_as_written(entry)}: {rule.why} ({entry.place})"

    def _alias(self, given: dict[str, _Given], rule: compat.Alias, entry: read.Entry) -> bool:
        """Whether the value sets its key; one with a problem counts as that."""
        try:
            converted = rule.convert(entry.value)
        except ValueError as error:
            self.problems.append(f"{entry.name}: {error} ({entry.place})")
            return True
        if rule.remark:
            self.notes.append(f"{entry.name}: {rule.remark} ({entry.place})")
        rest = rule.without_effect(entry.value)
        if rest:
            self.notes.append(f"{entry.name}: no effect: {rest} ({entry.place})")
        if converted is not None:
            self._put(given, rule.to, entry, *converted)
        return converted is not None

    def _put(self, given: dict[str, _Given], name: str, entry: read.Entry, value: Any, rank: int) -> None:
        try:
            value = coerce(_FIELDS[name], value)
        except ValueError as error:
            self.problems.append(f"{entry.name}: {error} ({entry.place})")
            return
        if self._is_other_word(name, entry, value):
            self.notes.append(f"{_as_written(entry)}: read as {value} ({entry.place})")
        self._keep(given, name, _Given(value, _as_written(entry), entry.place, rank))

    @staticmethod
    def _is_other_word(name: str, entry: read.Entry, value: Any) -> bool:
        """Whether the user wrote the value in another toolkit's word for it."""
        written = str(entry.value).lower()  # a bare word keeps its spelling: "no" is not False
        return written in _FIELDS[name].metadata["words"] and written != str(value).lower()

    def _keep(self, target: dict[str, _Given], name: str, new: _Given) -> None:
        old = target.get(name)
        if old is None:
            target[name] = new
        elif old.value != new.value and old.rank == new.rank:
            both = f"{old.written} ({old.place}) and {new.written} ({new.place})"
            self.problems.append(f"{name}: given twice: {both}. Keep one of them.")
        elif old.rank != new.rank:
            winner, loser = (old, new) if old.rank < new.rank else (new, old)
            if winner.value != loser.value:
                self.notes.append(f"{loser.written} ({loser.place}): no effect: {winner.written} decides")
            target[name] = winner

    def _unknown(self, entry: read.Entry) -> None:
        if self.allow_extra:
            self.notes.append(
                f"{entry.name}: no effect: an unknown key, let through as ALLOW_EXTRA_ARGS asks ({entry.place})"
            )
            return
        self.unknown.append(entry.name)
        # Searching for a similar name takes a millisecond, and nobody reads the fiftieth hint.
        hint = synonyms.hint(entry.name, [*_FIELDS, *RULES]) if len(self.problems) < _MAX_PROBLEMS else ""
        self.problems.append(f"{_visible(entry.name)}: unknown key{hint and f'; {hint}'} ({entry.place})")

    def raise_problems(self, path: str | None) -> None:
        """Raise one ConfigError that lists every problem, if there are any."""
        self.problems.extend(self.fixed.values())
        advice = dialects.advice(self.unknown)
        if advice:
            self.problems.append(advice)
        if len(self.problems) == 1:
            raise ConfigError(self.problems[0])
        if self.problems:
            lines = "".join(f"\n  {problem}" for problem in self.problems[:_MAX_PROBLEMS])
            if len(self.problems) > _MAX_PROBLEMS:
                lines += f"\n  and {len(self.problems) - _MAX_PROBLEMS} more"
            message = f"{path or 'the command line'}: {len(self.problems)} problems:{lines}"
            raise ConfigError(message, self.problems)


def _place_of(problem: str, given: Mapping[str, _Given], path: str | None) -> str:
    """The place of the key that a problem begins with, and the names that the user wrote for the keys in it: its cure
    is to change these.
    """
    first = given.get(problem.partition(":")[0])
    place = first.place if first is not None else path or "command line"
    others = (name for name, each in given.items() if each.name != name and re.search(rf"\b{name}\b", problem))
    return place + "".join(f", {name} is written {given[name].name}" for name in others)


def _turns_on(rule: compat.Alias, value: Any) -> bool:
    """Whether a key's value is what the rule's name sets as a switch that is on."""
    try:
        converted = rule.convert(True)
        return converted is not None and bool(coerce(_FIELDS[rule.to], converted[0]) == value)
    except ValueError:  # a number that 0 switches off
        return True


def _visible(name: str) -> str:
    """A name for a message, quoted if it has spaces around it or characters that cannot be seen."""
    return shortened(name if name and name.isprintable() and name == name.strip() else repr(name))


def _as_written(entry: read.Entry) -> str:
    return shortened(f"{entry.name}: {plain(entry.value)}")


def _complete_pretraining(values: dict[str, Any], notes: list[str]) -> None:
    """Complete ERNIE's pretraining files: input_dir implies dataset_type: pretrain, which implies the stage."""
    if values.get("input_dir") and "dataset_type" not in values and not values.get("train_dataset_path"):
        values["dataset_type"] = "pretrain"
        notes.append("dataset_type: not given, so pretrain, because input_dir is")
    if values.get("dataset_type") == "pretrain" and "stage" not in values:
        values["stage"] = next(name for name, facts in METHODS.items() if facts.token_files)
        notes.append(f"stage: not given, so {values['stage']}, because dataset_type is pretrain")


def _quantisation_of_base(state: _State, command: str) -> None:
    """Read quantization as compute_type, in which the base is stored, in commands that write no quantised model. It
    overrides compute_type, which names the products' type.
    """
    given = state.given.get("quantization")
    if command == "export" or given is None:
        return
    del state.given["quantization"]
    if given.value == "none":
        return
    qat, products = (state.given.get(name) for name in ("qat", "compute_type"))
    if (qat is not None and qat.value != "none") or (products is not None and products.value in QAT_COMPUTE_TYPES):
        state.notes.append(f"{given.written}: no effect: with qat it is read only by export ({given.place})")
        return
    if given.value not in compat.QUANTISED_TYPES:
        what = "exported, and not a way of storing the weights of a run: remove it, or set it for `erniekit export`"
        state.problems.append(f"{given.written}: a scheme in which weights are {what} ({given.place})")
        return
    old = state.given.get("compute_type")
    if old is not None and old.value in compat.QUANTISED_TYPES and old.value != given.value:
        both = f"{old.written} ({old.place}) and {given.written} ({given.place})"
        state.problems.append(f"compute_type: given twice: {both}. Keep one of them.")
        return
    state.notes.append(f"{given.written}: read as compute_type: {given.value} ({given.place})")
    state.given["compute_type"] = given


def _complete_lora(values: dict[str, Any], notes: list[str]) -> None:
    """Expand rslora_plus into the three keys that it stands for."""
    if values.get("rslora_plus"):
        given = {"rslora": True, "lora_plus_scale": 4.0, "lora_alpha": 4.0} | values
        values |= {name: given[name] for name in ("lora_plus_scale", "lora_alpha")} | {"rslora": True}
        notes.append(
            f"rslora_plus: rslora, lora_plus_scale: {values['lora_plus_scale']:g}, lora_alpha: {values['lora_alpha']:g}"
        )


def _complete_qat(values: dict[str, Any], command: str, notes: list[str]) -> None:
    """Read ERNIEKit's names of quantisation-aware training, which stand in place of the products' type, and let an
    export of what was trained choose the scales of the training.
    """
    name = values.get("compute_type")
    if name in QAT_COMPUTE_TYPES:
        _name_of_scheme(name, values, notes)
    scheme, written = values.get("qat", "none"), values.get("quantization", "none")
    if command != "export" or scheme == "none":
        return
    wanted = "fp8" if scheme == STATIC else scheme
    paddle = values.get("format") == "paddle"
    layout = f" with format: {'paddle' if scheme in WITH_RANGES else 'pt'}"
    if written != wanted or paddle != (scheme in WITH_RANGES):
        how = "in 16 bits" if written == "none" else f"in {written} with format: {'paddle' if paddle else 'pt'}"
        notes.append(f"qat: {scheme}: exported {how}; quantization: {wanted}{layout} writes the codes of the training")
    elif values.get("quantization_calibration_path"):
        notes.append(f"quantization_calibration_path: codes are calibrated, not those of the training (qat: {scheme})")
    elif values.setdefault("quantization_clip_search", False):
        notes.append(f"quantization_clip_search: True: the codes are not those of the training (qat: {scheme})")
    else:
        notes.append(f"qat: {scheme}: scales are those of the training (quantization_clip_search: False)")
    order = {STATIC: 32, "w4a8": 128}.get(scheme)
    if order and not (values.get("apply_hadamard", True) and values.get("hadamard_block_size") in (None, order)):
        notes.append(
            f"apply_hadamard, hadamard_block_size: FastDeploy rotates by {order}, so the codes are not those of the "
            "training. Train with apply_hadamard: True and without hadamard_block_size"
        )


def _name_of_scheme(name: str, values: dict[str, Any], notes: list[str]) -> None:
    values["compute_type"] = "bf16"
    scheme = values.setdefault("qat", QAT_COMPUTE_TYPES[name])
    differs = "weights stay in bf16, where ERNIEKit keeps them in FP8"
    if scheme == "w8a8":
        differs = "inputs have a scale for each token, where ERNIEKit has a moving one for each matrix"
    elif scheme == "w4a8":
        differs = "only experts have 4 bits, and the other weights 8, as FastDeploy's w4a8 has them"
    notes.append(f"compute_type: {name}: read as qat: {scheme} with compute_type: bf16; {differs}")


def _complete_recompute(values: dict[str, Any], names: set[str], notes: list[str]) -> None:
    """Switch recomputation on where recompute_granularity is given: PaddleFormers has no separate switch."""
    asked = names & {"recompute_method", "recompute_num_layers", "recompute_modules"}
    if "recompute" not in values and "recompute_granularity" in values and asked:
        values["recompute"] = True
        notes.append("recompute: not given, so True, because recompute_granularity is (PaddleFormers' rule)")


def _complete_paths(values: dict[str, Any], notes: list[str]) -> None:
    """Use text_dataset_path as training data where train_dataset_path is given but empty."""
    text = values.get("text_dataset_path")
    if not text or values.get("train_dataset_path") or METHODS[values.get("stage", DEFAULT)].vision:
        return
    for part in ("path", "type", "prob"):
        if f"text_dataset_{part}" in values and not values.get(f"train_dataset_{part}"):
            values[f"train_dataset_{part}"] = values[f"text_dataset_{part}"]
    given = shortened(", ".join(text))
    notes.append(f"train_dataset_path: empty, so {given}, because text_dataset_path is given")


def _complete_evaluation(values: dict[str, Any], notes: list[str]) -> None:
    if values.get("evaluation_strategy", "no") != "no":
        if values.get("do_eval") is False:
            strategy = values["evaluation_strategy"]
            notes.append(f"do_eval: False: no effect: evaluation_strategy: {strategy} evaluates")
        values["do_eval"] = True
    if values.get("evaluation_strategy") == "steps" and values.get("eval_steps") is None:
        values["eval_steps"] = values.get("logging_steps", 500)
        notes.append(f"eval_steps: not given, so {values['eval_steps']} (logging_steps, or ERNIEKit's 500)")


def _finish(state: _State, path: str | None, command: str) -> Config:
    _quantisation_of_base(state, command)
    values = {name: given.value for name, given in state.given.items()}
    if command == "eval":
        values.setdefault("temperature", 0.0)  # scores are deterministic unless the user sets a temperature
    _complete_evaluation(values, state.notes)
    _complete_pretraining(values, state.notes)
    _complete_lora(values, state.notes)
    _complete_qat(values, command, state.notes)
    _complete_recompute(values, state.names, state.notes)
    _complete_paths(values, state.notes)
    rl_keys.complete(values, command, state.notes)
    hidden = "***"  # in place of secrets, since extras are written into every config.yaml
    extras = tuple((name, hidden if name in SECRETS else given.value) for name, given in state.extras.items())
    cfg = Config(**values, extras=extras, given=state.keys_given(), source=path or "")
    for problem in checks.problems(cfg, command):
        state.problems.append(f"{problem} ({_place_of(problem, state.given, path)})")
    state.raise_problems(path)
    lines = [*dialects.note(cfg, state.names | values.keys(), command), *state.notes, *support.notes(cfg, command)]
    if command == "train":
        lines += rl_keys.warnings(cfg)
    return dataclasses.replace(cfg, notes=tuple(lines))
