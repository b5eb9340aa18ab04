"""How a vision-language model begins from the weights of a text model: text parameters are the text model's, vision
transformer, resampler and vision routers start at random, and vision experts from text experts.

ERNIE's training code makes vision expert e of the first channels of text expert e; vision experts are narrower.
"""

import dataclasses
from pathlib import Path

import numpy as np

from erniekit.checkpoint.model_reader import ModelReader
from erniekit.models.config import CONFIG_FILE, ModelConfig
from erniekit.models.weights import Logical, logical_tensors
from erniekit.utils.errors import ConfigError

# What decides about the weights of the text part, with the layers that are sparse.
_SIZES = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim use_bias
    moe_num_experts moe_k moe_intermediate_size moe_num_shared_experts
""".split()


@dataclasses.dataclass(frozen=True)
class VisionStart:
    """`config`: of the vision-language model. `experts_from_text`: vision experts are made of text experts; otherwise
    they start at random. `down_scale` multiplies their second projection.
    """

    config: ModelConfig
    experts_from_text: bool = True
    down_scale: float = 1.0


def config_directory(path: str | Path) -> Path:
    """The directory of the config.json that vision_config_path names, itself or by its directory."""
    path = Path(path)
    return path.parent if path.name == CONFIG_FILE else path


def joined_config(text: ModelConfig, text_dir: Path, vision_config_path: str | Path) -> ModelConfig:
    """The text model of `text_dir` with the vision part of another config.json. ConfigError where the other is not of
    a vision-language model, or has a text part of other sizes.
    """
    directory = config_directory(vision_config_path)
    source = f"vision_config_path: {directory / CONFIG_FILE}"
    other = ModelConfig.from_dir(directory)
    if other.vision is None:
        raise ConfigError(f"{source} is of a model of text alone ({other.model_type}); it needs a vision_config.")
    if text.vision is not None:
        raise ConfigError(
            f"vision_config_path: {text_dir} is a vision-language model already. Leave vision_config_path out to "
            "continue it."
        )
    wrong = [
        f"{key} {vars(other)[key]} ({vars(text)[key]} in {text_dir})"
        for key in _SIZES
        if vars(other)[key] != vars(text)[key]
    ]
    if not wrong and other.layer_types != text.layer_types:
        wrong = [f"other sparse layers than {text_dir}"]
    if wrong:
        raise ConfigError(f"{source}: the text part must be that of the weights: {'; '.join(wrong)}.")
    config = dataclasses.replace(text, model_type=other.model_type, vision=other.vision, num_nextn_predict_layers=0)
    if text.use_bias:
        raise ConfigError(
            f"vision_config_path: {text_dir} has use_bias, and so a bias of the head, which no vision-language model "
            "has."
        )
    # The relations between text and vision are those of any config.json.
    ModelConfig.from_dict(
        config.to_dict("pt"), source=f"{text_dir}/{CONFIG_FILE} with {source}", hint="Change the vision part"
    )
    return config


class TextWeights:
    """The weights of a text model, read as those of the vision-language model that begins with them. `logicals` are
    the units of that model that it has.
    """

    def __init__(self, reader: ModelReader, start: VisionStart) -> None:
        """ConfigError where vision experts are wider than the text experts that they are made of."""
        self.reader, self.start = reader, start
        text, vision = start.config.expert_sizes
        if start.experts_from_text and vision > text:
            raise ConfigError(
                f"vision_experts_from_text: vision experts ({vision} channels) are wider than text experts ({text}). "
                "Set it to False for a random start, or make them narrower in the file of vision_config_path."
            )
        self._units = {(logical.param, logical.index): logical for logical in reader.logicals}
        self.logicals = [unit for unit in logical_tensors(self.config) if self._source(unit) is not None]

    @property
    def config(self) -> ModelConfig:
        """The configuration of the vision-language model, with the text model's own head."""
        tied = self.reader.config.tie_word_embeddings
        return dataclasses.replace(self.start.config, tie_word_embeddings=tied)

    def read(self, logical: Logical, as_fp32: bool = False) -> np.ndarray:
        """Read one unit of the vision-language model; see ModelReader.read."""
        source = self._source(logical)
        assert source is not None, logical.param
        if logical.is_state:
            text = self.reader.read(source, as_fp32)
            return np.concatenate([text, np.zeros_like(text)])  # the vision router's is new
        if logical.text_twin is None:
            return self.reader.read(source, as_fp32)
        whole = self.reader.read(source, as_fp32=True)
        width = self.start.config.expert_sizes[1]
        if len(logical.pt) == 1:  # the second projection; the first is gate and up
            return whole[:width] * np.float32(self.start.down_scale)
        gate, up = np.split(whole, 2, axis=1)
        return np.concatenate([gate[:, :width], up[:, :width]], axis=1)

    def _source(self, logical: Logical) -> Logical | None:
        """The unit of the text model that a unit is made of; None for what starts at random."""
        if logical.text_twin is not None and not self.start.experts_from_text:
            return None
        return self._units.get((logical.text_twin or logical.param, logical.index))
