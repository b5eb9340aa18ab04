"""The sizes of a model that the arithmetic of parallel layouts needs."""

from typing import Protocol


class VisionSizes(Protocol):
    """The sizes in a `models.vision_config.VisionConfig`."""

    @property
    def depth(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def patch_features(self) -> int: ...

    @property
    def merged_size(self) -> int: ...

    @property
    def spatial_merge_size(self) -> int: ...

    @property
    def temporal_merge_size(self) -> int: ...


class ModelSizes(Protocol):
    """The sizes in a `models.config.ModelConfig`, which lies in a layer above; see there what they mean."""

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def moe_num_experts(self) -> int: ...

    @property
    def moe_k(self) -> int: ...

    @property
    def moe_intermediate_size(self) -> int: ...

    @property
    def moe_num_shared_experts(self) -> int: ...

    @property
    def num_nextn_predict_layers(self) -> int: ...

    @property
    def vision(self) -> VisionSizes | None: ...

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) has experts."""
        ...
