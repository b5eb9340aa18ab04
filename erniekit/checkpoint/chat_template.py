"""The chat template among the files of a model, so that inference formats conversations as training did."""

from collections.abc import Sequence
from pathlib import Path

from erniekit.checkpoint.model_dir import CHAT_TEMPLATE_FILE, GENERATION_CONFIG_FILE
from erniekit.utils import atomic
from erniekit.utils.errors import CheckpointError
from erniekit.utils.user_files import read_json_object

_PROCESSOR_FILE = "chat_template.json"


def write_chat_template(directory: Path, source: str, end_ids: Sequence[int]) -> None:
    """Write a template as chat_template.jinja into a directory with copies of a model's companion files. A template in
    tokenizer_config.json or chat_template.json is removed: with two, it depends on the reader which one counts. Missing
    `end_ids` are added to generation_config.json, where there is one: with another template an answer may end with
    another token than the base model's, and servers stop at the tokens that this file names.
    """
    (directory / CHAT_TEMPLATE_FILE).write_text(source, encoding="utf-8", newline="")
    (directory / _PROCESSOR_FILE).unlink(missing_ok=True)
    tokenizer = directory / "tokenizer_config.json"
    if tokenizer.is_file():
        settings = read_json_object(tokenizer, CheckpointError)
        if settings.pop("chat_template", None) is not None:
            atomic.write_json(tokenizer, settings)
    generation = directory / GENERATION_CONFIG_FILE
    if generation.is_file():
        settings = read_json_object(generation, CheckpointError)
        known = settings.get("eos_token_id")
        ids = known if isinstance(known, list) else [] if known is None else [known]
        lacking = [i for i in end_ids if i not in ids]
        if ids and lacking:
            atomic.write_json(generation, settings | {"eos_token_id": [*ids, *lacking]})
