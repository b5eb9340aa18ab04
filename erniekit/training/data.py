"""Opens the data of a run: rows of the records that its method reads (data/loader.py)."""

from dataclasses import dataclass

from erniekit.config.schema import Config
from erniekit.data.chat.template import Template
from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.data.loader import Loader, build_loader
from erniekit.data.vision.encode import VisionSpec
from erniekit.parallel.mesh import Mesh
from erniekit.training.batch_warmup import microbatches_per_read


@dataclass(frozen=True)
class DataContext:
    """What data may be opened with. `template`: None for plain text. `vision`: the options for records with pictures;
    None: all records are text.
    """

    cfg: Config
    tokenizer: Tokenizer
    template: Template | None
    mesh: Mesh
    vision: VisionSpec | None = None


def open_rows(context: DataContext) -> Loader:
    """The training data of methods that learn from records. Raises as build_loader does."""
    return _open(context, "train")


def open_evaluation_rows(context: DataContext) -> Loader:
    """The evaluation data of these methods."""
    return _open(context, "eval")


def _open(context: DataContext, split: str) -> Loader:
    return build_loader(
        context.cfg,
        context.tokenizer,
        split,
        context.mesh.batch,
        context.mesh.degrees.batch,
        context.template,
        accumulation=microbatches_per_read(context.cfg),
        vision=context.vision,
    )
