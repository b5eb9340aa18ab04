"""Keys about text that is trained beside data with pictures."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key, list_of
from erniekit.config.schema_data import DATASET_TYPES


@dataclass(frozen=True, kw_only=True)
class MixtureArgs:
    """Text that is trained by turns with data that have pictures (docs/vision-data.md)."""

    group: ClassVar[str] = "text beside pictures"

    text_dataset_path: tuple[str, ...] = list_of(
        str,
        "Training sources of text alone, which are repeated as often as needed beside train_dataset_path; empty: none.",
        path=True,
    )
    text_dataset_type: tuple[str, ...] = list_of(
        str, "Format of each source of text; empty: erniekit.", choices=DATASET_TYPES
    )
    text_dataset_prob: tuple[float, ...] = list_of(
        float, "Share of each source of text, summing to 1; empty: equal shares.", gt=0
    )
    modality_ratio: tuple[int, ...] = list_of(
        int,
        "How often train_dataset_path, and how often text_dataset_path, has its turn in a cycle; empty: 1,1.",
        ge=1,
    )
    modality_interleave: str = key(
        "acc",
        "What a turn is: a microbatch of all ranks (acc), an optimizer step (batch), or a row, so that microbatches "
        "hold both (mixed).",
        choices=("acc", "batch", "mixed"),
        words={"global_batch": "batch"},
    )
