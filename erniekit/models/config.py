"""A checkpoint's architecture, from its config.json in either spelling: Hugging Face ("-PT") or Baidu ("-Paddle")."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from erniekit.models import config_vision
from erniekit.models.config_keys import PADDLE_ONLY, PT_ONLY
from erniekit.models.config_rope import written_rope
from erniekit.models.config_values import ARCHITECTURES, CAUSAL, SEQUENCE, read_values, token_ids
from erniekit.models.vision_config import VisionConfig
from erniekit.nn.frequencies import RopeScaling
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import read_json_object

__all__ = ["ARCHITECTURES", "CONFIG_FILE", "FORMATS", "Format", "ModelConfig", "token_ids"]

Format = Literal["pt", "paddle"]
FORMATS: tuple[Format, ...] = ("pt", "paddle")

CONFIG_FILE = "config.json"
_MOE_FIELDS = (
    "moe_num_experts",
    "moe_k",
    "moe_intermediate_size",
    "moe_num_shared_experts",
    "moe_layer_start_index",
    "moe_layer_end_index",
    "moe_layer_interval",
    "moe_norm_min",
)
# Ways of routing that transformers does not know: in the file only where the model has them.
_RARE_ROUTING = {"moe_gate_act": "softmax", "moe_group_experts": False}
_NEVER_WRITTEN = frozenset(("auto_map",))
# Far above any model: more than this is a slip of the keyboard, and even a list of the tensors' names would not fit.
_MAX_EXPERTS_IN_ALL = 1 << 15
_MAX_PARAMETERS = 10**14


@dataclass(frozen=True)
class ModelConfig:
    """A model of the ERNIE 4.5 family: of text or, with a `vision` part, of text, images and videos. Sizes are numbers
    of features; `moe_num_experts == 0` is a dense model.

    Sources: the ERNIE 4.5 technical report, and transformers' `Ernie4_5Config`, `Ernie4_5_MoeConfig` and
    `Ernie4_5_VLMoeConfig`, whose defaults stand for keys that are absent.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of dense layers
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # not always hidden_size / num_attention_heads: the 0.3B model has 128 with 1024 / 16
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None  # of models for longer texts
    max_position_embeddings: int = 131072
    use_bias: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = 0  # of these three, null and -1 are no token
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    moe_num_experts: int = 0
    moe_k: int = 0
    moe_intermediate_size: int = 0  # of one expert
    moe_num_shared_experts: int = 0
    moe_layer_start_index: int = 0
    moe_layer_end_index: int = -1  # resolved: the index of the last layer that may be sparse, inclusive
    moe_layer_interval: int = 1
    moe_norm_min: float = 1e-12
    moe_gate_act: Literal["softmax", "sigmoid"] = "softmax"
    moe_group_experts: bool = False  # the best expert of each of moe_k groups, instead of the moe_k best of all
    moe_capacity_factor: float | None = None  # training only: see moe.router.RouterOptions.capacity
    num_nextn_predict_layers: int = 0  # multi-token-prediction depths
    has_score_head: bool = False  # a reward model: one number a text instead of logits (models/score_head.py)
    vision: VisionConfig | None = None  # None: a model of text alone
    dtype: str | None = None  # of the weights in the file, as config.json says ("bfloat16")
    extra: Mapping[str, Any] = field(
        default_factory=dict, hash=False
    )  # keys of config.json that are not fields, as read

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the file may list several, or none."""
        several = self.extra.get("eos_token_id", [self.eos_token_id])
        return tuple(token for token in several if token is not None and token >= 0)

    @property
    def fill_id(self) -> int:
        """What fills rows that have ended: the padding token, or 0 where the model has none."""
        return max(self.pad_token_id or 0, 0)

    @property
    def has_head_bias(self) -> bool:
        """Whether the output head has a bias: as in transformers, only that of a text model with experts can have."""
        return self.use_bias and self.moe_num_experts > 0 and self.vision is None and not self.has_score_head

    @property
    def expert_sizes(self) -> tuple[int, ...]:
        """The width of one expert by modality: of text and, in a vision-language model, of vision."""
        text = self.moe_intermediate_size
        return (text,) if self.vision is None else (text, self.vision.expert_size)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) has experts."""
        in_range = self.moe_layer_start_index <= layer <= self.moe_layer_end_index
        return self.moe_num_experts > 0 and in_range and (layer + 1) % self.moe_layer_interval == 0

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that have experts."""
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe_layer(i))

    @property
    def layer_types(self) -> list[str]:
        """ "dense" or "sparse" for each layer."""
        return ["sparse" if self.is_moe_layer(i) else "dense" for i in range(self.num_hidden_layers)]

    @classmethod
    def from_dir(cls, path: str | Path, quiet: bool = False) -> "ModelConfig":
        """Read `path`/config.json. CheckpointError names the file, and the key where there is one. `quiet`: without log
        lines about keys, for a file that was written from another one, of which they have been logged.
        """
        file = Path(path) / CONFIG_FILE
        try:
            values = read_json_object(file, CheckpointError)
        except FileNotFoundError:
            raise CheckpointError(
                f"{file} not found. A model directory holds config.json beside its weights; check the path."
            ) from None
        return cls.from_dict(values, source=str(file), quiet=quiet)

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        source: str = CONFIG_FILE,
        hint: str = "Copy config.json again from the model's source",
        quiet: bool = False,
    ) -> "ModelConfig":
        """Build from the contents of a config.json; `source` is the file name that errors show, `hint` what they advise
        where values contradict one another. `quiet`: see `from_dir`.
        """
        fields, lines = read_values(values, source)
        config = cls(**fields)
        config.check(source, hint)
        for line in () if quiet else lines:
            log.once(f"{source}: {line}")
        return config

    def to_dict(self, format: Format = "pt") -> dict[str, Any]:
        """The contents of a config.json in `format`.

        Extra keys of the source are kept, except those that only the other format knows and `auto_map` (remote code).
        """
        if format not in FORMATS:
            raise CheckpointError(f"unknown weight format {format!r}: use 'pt' (Hugging Face) or 'paddle'.")
        other_only = (PADDLE_ONLY if format == "pt" else PT_ONLY) | _NEVER_WRITTEN
        left_out = {"extra", "dtype", "vision", "moe_capacity_factor", "has_score_head", "rope_scaling"}
        left_out |= set(_MOE_FIELDS) if self.model_type == "ernie4_5" else set()
        left_out |= {key for key, usual in _RARE_ROUTING.items() if vars(self)[key] == usual}
        out = {key: value for key, value in vars(self).items() if key not in left_out}
        architecture = ARCHITECTURES[format][self.model_type]
        if self.has_score_head:
            architecture = architecture.replace(CAUSAL, SEQUENCE)
            out["num_labels"] = 1
        out.update(
            architectures=[architecture],
            model_type=self.model_type,
            hidden_act="silu",
            **written_rope(self.rope_theta, self.rope_scaling, with_parameters=format == "pt"),
        )
        if self.dtype is not None:
            out["torch_dtype" if format == "pt" else "dtype"] = self.dtype
        out.update({key: value for key, value in self.extra.items() if key not in other_only})
        if self.vision is not None:
            return config_vision.join(out, self.vision, self.layer_types, format)
        return dict(sorted(out.items()))

    def check(self, source: str, hint: str) -> None:
        """Raise CheckpointError where values contradict one another; each value by itself was checked on reading."""

        def fail(what: str) -> None:
            raise CheckpointError(f"{source}: {what}. {hint}.")

        if self.num_attention_heads % self.num_key_value_heads:
            fail(
                f"num_attention_heads {self.num_attention_heads} is not a multiple "
                f"of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            fail(f"head_dim {self.head_dim} must be even and positive: rotary positions turn pairs of features")
        if self.moe_num_experts:
            self._check_experts(fail)
        if self.vision is not None:
            if self.rope_scaling is not None:
                fail(
                    f"rope_scaling {self.rope_scaling.kind}: positions of pictures (time, height, width) are not scaled"
                )
            self._check_vision(self.vision, fail)
        if self.num_hidden_layers * max(1, self.moe_num_experts) > _MAX_EXPERTS_IN_ALL:
            fail(f"num_hidden_layers {self.num_hidden_layers} of moe_num_experts {self.moe_num_experts} is too many")
        mlp = max(
            self.intermediate_size, self.moe_intermediate_size * (self.moe_num_experts + self.moe_num_shared_experts)
        )
        heads = (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        parameters = self.hidden_size * (2 * self.vocab_size + self.num_hidden_layers * (2 * heads + 3 * mlp))
        if parameters > _MAX_PARAMETERS:
            fail(
                f"hidden_size {self.hidden_size}, num_hidden_layers {self.num_hidden_layers} and the other sizes make "
                f"{parameters:.1e} parameters, more than any model has"
            )

    def _check_experts(self, fail: Callable[[str], None]) -> None:
        if self.moe_k > self.moe_num_experts:
            fail(f"moe_k {self.moe_k} is larger than moe_num_experts {self.moe_num_experts}")
        if not any(self.is_moe_layer(layer) for layer in range(self.num_hidden_layers)):
            fail(
                f"moe_layer_start_index {self.moe_layer_start_index}, moe_layer_end_index {self.moe_layer_end_index} "
                f"and moe_layer_interval {self.moe_layer_interval} leave no layer of {self.num_hidden_layers} with "
                "experts"
            )
        if self.moe_group_experts and self.moe_num_experts % self.moe_k:
            fail(f"moe_group_experts: {self.moe_num_experts} experts do not divide into moe_k {self.moe_k} groups")

    def _check_vision(self, vision: VisionConfig, fail: Callable[[str], None]) -> None:
        if vision.hidden_size % vision.num_heads or vision.head_dim % 4:
            fail(
                f"vision_config: hidden_size {vision.hidden_size} of num_heads {vision.num_heads}: the size of a head "
                "must be a multiple of 4, half for rows and half for columns"
            )
        if vision.in_channels != 3:
            fail(f"vision_config: in_channels {vision.in_channels}: pictures have 3 colour channels")
        if vision.temporal_merge_size != 2:
            fail(f"temporal_merge_size {vision.temporal_merge_size}: ERNIE 4.5 joins 2 frames")
        rest = self.head_dim // 2 - vision.time_frequencies
        if rest <= 0 or rest % 2:
            fail(
                f"{vision.time_frequencies} of {self.head_dim // 2} rotary frequencies follow time: an even, positive "
                "number must be left for height and width"
            )
        large = [token for token in vision.placeholders if token >= self.vocab_size]
        if large:
            fail(f"image_token_id, video_token_id {large}: outside the vocabulary of {self.vocab_size}")
