"""Which parameters of a model are trained and saved: all of them, or adapters only (fine_tuning: LoRA)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import paddle

from erniekit import lora
from erniekit.checkpoint.adapter_origin import say_if_base_differs
from erniekit.checkpoint.chat_template import write_chat_template
from erniekit.checkpoint.fingerprint import fingerprint
from erniekit.checkpoint.model_dir import TOKENIZER_FILES, copy_companions
from erniekit.checkpoint.model_io import load_weights, model_rank_files, named_tensors, write_model_configs
from erniekit.checkpoint.peft_attach import load_adapter
from erniekit.checkpoint.peft_write import adapter_parameters, write_adapter
from erniekit.checkpoint.processor import write_processor
from erniekit.checkpoint.product_state import load_product_state, product_rank_files
from erniekit.checkpoint.rank_files import RankFiles
from erniekit.checkpoint.reshard import Shares
from erniekit.config.schema import Config
from erniekit.data.chat.template import Template
from erniekit.data.vision.processor_files import ProcessorSettings
from erniekit.models.config import Format
from erniekit.models.decoder import CausalLM
from erniekit.models.products import num_elements, product_state
from erniekit.nn.roles import FP32_ROLES, named_roles
from erniekit.nn.shard import WHOLE
from erniekit.utils import log


def describe_lora(model: CausalLM, cfg: Config, model_dir: Path) -> None:
    """Record in a model's new adapter which base it is for, and log what is trained."""
    state = lora.state_of(model)
    assert state is not None, "the model has no adapter"
    start = "new"
    if cfg.lora_path:
        log.info(f"lora_path: {cfg.lora_path}: rank, scaling and targets are those of this adapter")
        start = "continues lora_path"
        say_if_base_differs(Path(cfg.lora_path), cfg)
    state.base, state.base_fingerprint = cfg.model_name_or_path, fingerprint(model_dir)
    total = num_elements(model)
    trained = sum(int(np.prod(p.shape)) for p in model.parameters() if not p.stop_gradient)
    here = "" if model.shard == WHOLE else " on this rank"
    log.info(
        f"LoRA ({start}): {lora.describe(state)}; {trained:,} of {total:,} parameters{here} are trained "
        f"({trained / total:.2%})"
    )


def trained_tensors(model: CausalLM) -> dict[str, paddle.Tensor]:
    """This process's tensors that belong into a checkpoint: all parameters and buffers, or those of the adapter and of
    the products. A divided weight is a DividedTensor.
    """
    state, tensors = lora.state_of(model), _present_tensors(model)
    if state is None:
        return tensors
    return {name: tensors[name] for name in (*adapter_parameters(state), *product_state(model)) if name in tensors}


def _present_tensors(model: CausalLM) -> dict[str, paddle.Tensor]:
    tensors = named_tensors(model)
    return tensors if model.units is None else tensors | cast(dict[str, paddle.Tensor], model.units.values)


def load_trained(model: CausalLM, directory: Path, into: Mapping[str, paddle.Tensor] | None = None) -> None:
    """Set what a run trains, or tensors `into` under the same names, to what its checkpoint holds. Of divided weights
    one at a time is whole.
    """
    if into is None and model.units is not None:
        into = _present_tensors(model)
    if lora.state_of(model) is None:
        load_weights(model, directory, into=into)
    else:
        load_adapter(model, directory, into)
    load_product_state(model, directory, into)


def prepare_save(
    model: CausalLM,
    tensors: Mapping[str, paddle.Tensor],
    shares: Shares,
    format: Format,
    sources: tuple[Path, Path],
    template: Template | None,
    processor: ProcessorSettings,
    directory: str = "",
) -> tuple[list[RankFiles], Callable[[Path], None]]:
    """How to save `tensors` (see `trained_tensors`) in `directory` below a checkpoint: this rank's weight files, and
    what its first rank adds: config.json and tokenizer files, so that other tools load it as it is; or the adapter in
    PEFT's format, which is put together now, and the tokenizer files. `sources`: the directories of the model and of
    the tokenizer. The chat template is `template`, if conversations are trained, or else the tokenizer's own;
    `processor`: how a vision-language model's pictures are prepared. All ranks call it.
    """

    def add_processor(checkpoint: Path) -> None:
        """The chat template, and how pictures are prepared: a model is used as it was trained."""
        write_processor(checkpoint / directory, model.config, processor)
        if template is not None:
            write_chat_template(checkpoint / directory, template.source, template.trained_end_ids)

    model_dir, tokenizer_dir = sources
    state, products = lora.state_of(model), product_rank_files(model, tensors, shares, directory)
    if state is None:
        header = _header_of(model, tensors)
        weights = model_rank_files(model, shares, format, tensors, directory, header)

        def add_files(checkpoint: Path) -> None:
            write_model_configs(model, checkpoint / directory, format, header)
            copy_companions(model_dir, checkpoint / directory, with_tokenizer=False)
            copy_companions(tokenizer_dir, checkpoint / directory, names=TOKENIZER_FILES)
            add_processor(checkpoint)

        return [weights, products], add_files
    is_first = shares.mesh.world_group.index == 0
    whole = [array if is_first else None for array in shares.collect(tensors, adapter_parameters(state))]

    def add_adapter(checkpoint: Path) -> None:
        (checkpoint / directory).mkdir(parents=True, exist_ok=True)
        write_adapter(checkpoint / directory, state, model.config, (array for array in whole if array is not None))
        copy_companions(tokenizer_dir, checkpoint / directory, names=TOKENIZER_FILES)
        add_processor(checkpoint)

    return [products], add_adapter


def _header_of(model: CausalLM, tensors: Mapping[str, paddle.Tensor]) -> str:
    """The dtype of weight files that lose nothing: that of the weights, whose fp32 masters go with the optimizer."""
    roles = named_roles(model)
    kept = {tensor.dtype for name, tensor in tensors.items() if roles[name] not in FP32_ROLES}
    return {frozenset([paddle.bfloat16]): "BF16", frozenset([paddle.float16]): "F16"}.get(frozenset(kept), "F32")
