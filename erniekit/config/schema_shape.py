"""Keys of a model's shape, for pretraining from a random start: config.json's own names."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key

_NULL = "not given: as in the model's config.json"


@dataclass(frozen=True, kw_only=True)
class ShapeArgs:
    """The sizes in a model's config.json. With continue_training: false they override that file, or replace it if there
    is none; a run that starts from weights may give them only with the same values.
    """

    group: ClassVar[str] = "shape"

    hidden_size: int | None = key(None, f"Features of a token between layers; {_NULL}.", ge=1)
    intermediate_size: int | None = key(None, f"Width of dense feed-forward layers; {_NULL}.", ge=1)
    num_hidden_layers: int | None = key(None, f"Layers; {_NULL}.", ge=1)
    num_attention_heads: int | None = key(None, f"Query heads; {_NULL}.", ge=1)
    num_key_value_heads: int | None = key(
        None, f"Key and value heads; {_NULL}, and without one as many as query heads.", ge=1
    )
    head_dim: int | None = key(
        None, f"Features of a head; {_NULL}, and without one hidden_size / num_attention_heads.", ge=2
    )
    vocab_size: int | None = key(None, f"Token ids that the model has; {_NULL}.", ge=1)
    tie_word_embeddings: bool | None = key(None, f"The output head is the embedding; {_NULL}, and without one true.")
    use_bias: bool | None = key(None, f"Projections have biases; {_NULL}, and without one false.")
    initializer_range: float | None = key(
        None, f"Standard deviation of a random start; {_NULL}, and without one 0.02.", gt=0
    )
    moe_num_experts: int | None = key(None, f"Experts of a sparse layer; {_NULL}, and without one 0 (dense).", ge=0)
    moe_k: int | None = key(None, f"Experts that a token goes to; {_NULL}.", ge=1)
    moe_intermediate_size: int | None = key(None, f"Width of one expert; {_NULL}.", ge=1)
    moe_num_shared_experts: int | None = key(
        None, f"Experts that every token goes to beside those; {_NULL}, and without one 0.", ge=0
    )
    moe_layer_start_index: int | None = key(
        None, f"The first layer that is sparse; {_NULL}, and without one 1 (the layers before are dense).", ge=0
    )
    moe_layer_end_index: int | None = key(None, "The last layer that may be sparse; -1: the last of all.", ge=0, off=-1)
    moe_layer_interval: int | None = key(
        None, f"One of N layers is sparse; {_NULL}, and without one 1 (all of them).", ge=1
    )


# The keys that a shape without a config.json must give; an expert's sizes too if moe_num_experts is above 0.
NEEDED = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size".split()
NEEDED_OF_EXPERTS = "moe_k moe_intermediate_size".split()
