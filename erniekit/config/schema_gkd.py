"""Keys of the stage GKD."""

from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key


@dataclass(frozen=True, kw_only=True)
class GkdArgs:
    """Distillation from a teacher, also on the model's own answers (docs/preference.md)."""

    group: ClassVar[str] = "distillation from a teacher"

    teacher_model_name_or_path: str | None = key(
        None, "The teacher: a model directory or a name, with the tokenizer of the model that is trained.", path=True
    )
    gkd_beta: float = key(
        0.5,
        "The divergence from the teacher: 0 is KL(teacher || model), 1 is KL(model || teacher), between them the "
        "generalised Jensen-Shannon divergence.",
        ge=0,
        le=1,
    )
    lmbda: float = key(
        0.5,
        "The share of steps whose answers the model generates itself, from the prompts of the data; in the others they "
        "are those of the data.",
        ge=0,
        le=1,
    )
