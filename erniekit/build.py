"""Builds a model from a model directory. This is the only place that defines the order of the steps:

lazy model -> products -> random initialisation or weight files -> precision -> parallelize -> adapter -> activation
checkpointing. The order is the same for training, evaluation, generation, reference models and `erniekit.load_model`.

`prepare_model` opens the directory and checks everything that can be checked without reading weights, so that a wrong
key is found within seconds, however large the model is. `PreparedModel.build` reads the weights.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import paddle

from erniekit import lora
from erniekit.checkpoint import dtypes
from erniekit.checkpoint.generation_config import GenerationConfig, read_generation_config
from erniekit.checkpoint.model_io import fill_weights
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.peft_attach import attach_stored
from erniekit.checkpoint.peft_read import StoredAdapter, read_adapter
from erniekit.checkpoint.product_state import load_product_state
from erniekit.checkpoint.vision_start import TextWeights, VisionStart
from erniekit.config.rl_keys import generates
from erniekit.config.schema import Config
from erniekit.models import activation_checkpoint
from erniekit.models.activation_checkpoint import RecomputeOptions
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.fp8 import adapted_layers, attach_fp8, describe_fp8
from erniekit.models.init import init_weights
from erniekit.models.overrides import Overrides, overrides_of, training_overrides
from erniekit.models.parallelize import parallelize, rank_shard_of
from erniekit.models.products import attach_products, describe
from erniekit.models.qat import attach_qat, describe_qat
from erniekit.models.sharded_blocks import WeightTaker, divide
from erniekit.models.weights import our_shapes
from erniekit.nn import fused
from erniekit.nn.linear import ProductFactory
from erniekit.parallel.context import Exchange
from erniekit.parallel.mesh import Mesh
from erniekit.precision import policy
from erniekit.precision.fp8 import choose_fp8
from erniekit.precision.policy import Policy
from erniekit.precision.qat import choose_qat
from erniekit.precision.quantized_weight import QuantizedWeights
from erniekit.utils import log, runtime
from erniekit.utils.errors import ConfigError


@dataclass(frozen=True)
class AdapterDirectory:
    """A saved adapter to attach. `dropout`: the dropout in training; None: as saved with the adapter."""

    path: Path
    dropout: float | None = None


@dataclass(frozen=True)
class ModelOptions:
    """The options of building a model.

    `random_start`: parameters are drawn from `seed` and their names, and no weight file is read. `vision_start`: the
    directory has a text model, to which vision is added. `adapter`: a new one, a saved one, or none.
    `sequence_parallel`: tensor ranks share the tokens. `balance_pictures`: data ranks divide the
    vision transformer's work evenly. `context_exchange`: what context ranks exchange. `training`: the mode that the
    model is returned in. `fused`: use Paddle's fused operators where they apply, in this process. `divides_weights`:
    ranks divide the weights of the blocks (ZeRO stage 3); a copy of the model that is built with the same options is
    divided, too.
    """

    precision: Policy
    random_start: bool = False
    vision_start: VisionStart | None = None
    seed: int = 42
    overrides: Overrides = field(default_factory=Overrides)
    adapter: lora.LoraOptions | AdapterDirectory | None = None
    recompute: RecomputeOptions | None = None
    sequence_parallel: bool = False
    balance_pictures: bool = False
    context_exchange: Exchange = "p2p"
    training: bool = False
    fused: bool = True
    divides_weights: bool = False


def training_options(cfg: Config, device: str | None = None) -> ModelOptions:
    """The options with which `erniekit train` builds its model. `device`: "cpu" or "gpu:0"; None: the one in use.
    Raises ConfigError.
    """
    adapter: lora.LoraOptions | AdapterDirectory | None = None
    if cfg.fine_tuning == "LoRA":
        adapter = AdapterDirectory(Path(cfg.lora_path), cfg.lora_dropout) if cfg.lora_path else lora_options(cfg)
    return ModelOptions(
        precision=_training_precision(cfg, device),
        random_start=not cfg.continue_training,
        seed=cfg.seed,
        overrides=training_overrides(cfg),
        adapter=adapter,
        recompute=_recompute_options(cfg) if cfg.recompute else None,
        sequence_parallel=cfg.sequence_parallel,
        balance_pictures=cfg.balance_pictures and cfg.method.vision,
        context_exchange=cast(Exchange, cfg.cp_comm_type),
        training=True,
        fused=cfg.fused_operators,
        divides_weights=cfg.sharding == "stage3",
    )


def _training_precision(cfg: Config, device: str | None) -> Policy:
    """The policy of a run; `device`: one that is assumed and not asked what it can do. A GPU emulates FP8 if need be,
    and has the 16-bit types itself.
    """
    here = device or paddle.get_device()
    fp8 = choose_fp8(cfg, here, is_assumed=device is not None)
    emulates = cfg.emulate_precision and (fp8 is None or here == "cpu")
    precision = policy.choose(cfg.compute_type, here, emulates if emulates or not generates(cfg) else None)
    if device is None:
        policy.computable(precision, cfg.compute_type)
    return dataclasses.replace(precision, fp8=fp8, qat=choose_qat(cfg))


def inference_options(cfg: Config, adapter_dir: Path | None = None, random_start: bool = False) -> ModelOptions:
    """The options with which evaluation and generation build the model that `erniekit train` starts from, or has
    trained, with the same configuration.
    """
    precision = policy.computable(policy.choose(cfg.compute_type, paddle.get_device()), cfg.compute_type)
    return ModelOptions(
        precision=dataclasses.replace(precision, qat=choose_qat(cfg)),
        random_start=random_start,
        seed=cfg.seed,
        overrides=overrides_of(cfg),
        adapter=None if adapter_dir is None else AdapterDirectory(adapter_dir),
        sequence_parallel=cfg.sequence_parallel,
        fused=cfg.fused_operators,
        balance_pictures=cfg.balance_pictures and cfg.method.vision,
        context_exchange=cast(Exchange, cfg.cp_comm_type),
    )


def lora_options(cfg: Config) -> lora.LoraOptions:
    """The LoRA keys of the configuration."""
    alpha = cfg.lora_alpha
    if alpha < 0:
        alpha = 4.0 if cfg.rslora else 2.0 * cfg.lora_rank
    return lora.LoraOptions(
        rank=cfg.lora_rank,
        alpha=alpha,
        dropout=cfg.lora_dropout,
        rslora=cfg.rslora,
        dora=cfg.use_dora,
        targets=cfg.lora_target_modules,
        modules_to_save=(*cfg.modules_to_save, *(("score",) if cfg.method.scores else ())),
        seed=cfg.seed,
    )


def _check_adapter(options: lora.LoraOptions, config: ModelConfig) -> None:
    """ConfigError where a new adapter names modules that the model does not have, asks for what some of them cannot
    have, or has a rank that can only be a mistake.
    """
    shapes = our_shapes(config)
    slots, _ = lora.choose_slots(shapes, options, config.tie_word_embeddings)
    lora.check_rank(options.rank, slots, shapes)


def _recompute_options(cfg: Config) -> RecomputeOptions:
    return RecomputeOptions(
        cfg.recomputed_modules,
        cfg.use_recompute_mtp,
        set(cfg.no_recompute_layers),
        draws_noise=cfg.lora_dropout > 0.0 or cfg.attention_probs_dropout_prob > 0.0,
        offloads=cfg.offload_activations,
    )


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready to be built: only its weights have not been read.

    `config`: of the model as it will be. `reader`: the weights; None for a random start. `adapter`: the saved
    adapter, read. `generation`: the directory's generation_config.json.
    """

    path: Path
    options: ModelOptions
    config: ModelConfig
    reader: ModelReader | TextWeights | None
    adapter: StoredAdapter | None
    generation: GenerationConfig

    @property
    def adapter_dir(self) -> Path | None:
        """The directory of the saved adapter, if there is one."""
        return None if self.adapter is None else self.adapter.path

    def build(self, mesh: Mesh | None = None, chunks: Sequence[Sequence[int]] | None = None) -> CausalLM:
        """Build the part of the model that belongs to this process; without a mesh, the whole model.

        Args:
            mesh: the ranks that share the model.
            chunks: the layers of each chunk of this process's pipeline stage; None: one chunk with all layers.
        """
        runtime.ensure_threads()
        fused.enable(self.options.fused)
        options, precision = self.options, self.options.precision
        mesh = Mesh.single() if mesh is None else mesh
        _check_ring(mesh, options)
        _check_columns(mesh, self.adapter or options.adapter)
        layers = [tuple(range(self.config.num_hidden_layers))] if chunks is None else chunks
        # Each parameter is allocated when its weight is read, and directly in its final dtype.
        model = _lazy_model(self.config, precision, mesh, layers)
        taker = WeightTaker(model, mesh, self._saved()) if options.divides_weights else None
        self._fill(model, taker)
        policy.apply(model, precision)
        self._report_products(model)
        parallelize(model, mesh, options.sequence_parallel, layers, options.balance_pictures, options.context_exchange)
        self._attach_adapter(model)
        if precision.fp8 is not None and (adapted := adapted_layers(model, precision.fp8)):
            log.info(
                f"fp8_recompute_up_gate_layers: {adapted}: no effect: the experts of these layers have adapters, "
                "and are therefore computed projection by projection"
            )
        if options.recompute is not None:
            activation_checkpoint.apply(model.model, options.recompute)
            if options.recompute.offloads:
                log.info(activation_checkpoint.offload_line())
        if taker is not None:
            divide(model, mesh, taker.values)
        model.end_ids, model.fill_id = self.generation.end_ids, self.generation.fill_id
        model.directory = None if self.reader is None else self.path
        if options.training:
            model.train()
        else:
            model.eval()
        return model

    def _attach_adapter(self, model: CausalLM) -> None:
        adapter = self.options.adapter
        if isinstance(adapter, AdapterDirectory):
            assert self.adapter is not None
            attach_stored(model, self.adapter, adapter.dropout)
            load_product_state(model, self.adapter.path)  # trained with the adapter, such as the ranges of qat
        elif adapter is not None:
            tied = self.config.tie_word_embeddings
            lora.attach(model, adapter, our_shapes(self.config), tied, share=model.shard.share)

    def _fill(self, model: CausalLM, taker: WeightTaker | None) -> None:
        """Draw and read the values of a model's parameters. `taker` divides each."""
        stored = set() if self.reader is None else {logical.param for logical in self.reader.logicals}
        on_set = (lambda name, tensor: None) if taker is None else taker
        init_weights(model, self.options.seed, lambda name: name not in stored, on_set)
        if self.reader is not None:
            fill_weights(model, self.reader, self.options.precision.rounded_to, on_set=on_set)
            load_product_state(model, self.path)

    def _saved(self) -> tuple[str, ...]:
        """The parameters that an adapter trains whole."""
        adapter = self.options.adapter
        if isinstance(adapter, lora.LoraOptions):
            return lora.choose_slots(our_shapes(self.config), adapter, self.config.tie_word_embeddings)[1]
        return () if self.adapter is None else self.adapter.saved

    def _report_products(self, model: CausalLM) -> None:
        """Log lines about the products that compute with other weights than the model's own."""
        precision = self.options.precision
        if precision.product is not None:
            log.info(f"{self.path}: {describe(model)}")
        if precision.fp8 is not None:
            log.info(describe_fp8(model, precision.fp8))
        if precision.qat is not None:
            log.info(describe_qat(model, precision.qat))


def _check_ring(mesh: Mesh, options: ModelOptions) -> None:
    """ConfigError where context ranks would need a ring between GPUs."""
    if mesh.degrees.context > 1 and options.context_exchange == "p2p" and paddle.get_device() != "cpu":
        raise ConfigError(
            f"context_parallel_degree: {mesh.degrees.context}: the ring (cp_comm_type: p2p) runs on CPUs only. On GPUs "
            "set cp_comm_type: a2a"
        )


def _check_stored(adapter: StoredAdapter, options: ModelOptions, has_head: bool) -> None:
    """ConfigError where a saved adapter does not go together with the options. `has_head`: whether base and adapter
    together need no score head, or the base has a trained one.
    """
    if options.divides_weights and adapter.options.dora:
        raise ConfigError(
            f"sharding: stage3 does not shard the magnitudes of DoRA, which the adapter {adapter.path} has. "
            "Set sharding: stage2"
        )
    if options.precision.qat is not None and adapter.options.dora:
        raise ConfigError(
            f"qat: {options.precision.qat.name}: weights with a DoRA adapter in them, such as {adapter.path}, are not "
            "quantised here. Set qat: none, or export the adapter and use the merged model"
        )
    if not has_head and "score.weight" not in adapter.saved:
        raise ConfigError(
            f"stage: RM: {adapter.path} is the adapter of a language model: it has no score head, and none would be "
            "trained with it. Export it, and name the merged model in model_name_or_path"
        )


def _check_columns(mesh: Mesh, adapter: lora.LoraOptions | StoredAdapter | AdapterDirectory | None) -> None:
    """ConfigError where tensor ranks would divide the columns whose lengths DoRA trains."""
    options = adapter.options if isinstance(adapter, StoredAdapter) else adapter
    if mesh.degrees.tensor > 1 and isinstance(options, lora.LoraOptions) and options.dora:
        named = f"the adapter {adapter.path}" if isinstance(adapter, StoredAdapter) else "use_dora"
        raise ConfigError(
            f"tensor_parallel_degree: {mesh.degrees.tensor}: not with the DoRA of {named}: no rank has whole columns "
            "of all weights. Use data or pipeline parallelism, or export the adapter and use the merged model"
        )


def _lazy_model(config: ModelConfig, precision: Policy, mesh: Mesh, layers: Sequence[Sequence[int]]) -> CausalLM:
    """One process's part of a model, with its products, but without memory and initial values."""
    with policy.default_dtype(precision), paddle.LazyGuard():
        model = CausalLM(config, rank_shard_of(mesh, layers))
    if precision.product is not None:
        attach_products(model, precision.product)
    if precision.fp8 is not None:
        attach_fp8(model, precision.fp8)
    if precision.qat is not None:
        attach_qat(model, precision.qat)
    return model


def outline(
    config: ModelConfig,
    options: ModelOptions,
    mesh: Mesh,
    chunks: Sequence[Sequence[int]],
    adapter: StoredAdapter | None = None,
) -> CausalLM:
    """What `PreparedModel.build` makes, with every parameter's name, shape, dtype and place, but without memory: no
    weight is read, and none can be. `adapter`: a saved one; None: that of the options, if any. ConfigError as `build`.
    """
    _check_columns(mesh, adapter or options.adapter)
    model = _lazy_model(config, options.precision, mesh, chunks)
    parallelize(model, mesh, options.sequence_parallel, chunks)
    with paddle.LazyGuard():
        if adapter is not None:
            lora.attach_slots(model, adapter.options, adapter.slots, adapter.saved, values=False)
        elif isinstance(options.adapter, lora.LoraOptions):
            chosen = lora.choose_slots(our_shapes(config), options.adapter, config.tie_word_embeddings)
            lora.attach_slots(model, options.adapter, *chosen, values=False)
    return model


def prepare_model(model_dir: str | Path, options: ModelOptions, shape: ModelConfig | None = None) -> PreparedModel:
    """Open a model directory and check the options against it. No weights are read, except those by which an adapter
    identifies its base, and those that are compared to check a tied head.

    Args:
        model_dir: a directory with config.json and, unless the start is random, weights.
        options: how the model is built.
        shape: the model's configuration for a random start, instead of the directory's config.json.

    Raises:
        CheckpointError: the directory, or the adapter's, does not fit the options (see `ModelReader` and
            `read_adapter`).
        ConfigError: an option does not fit the model.
    """
    path = Path(model_dir)
    reader: ModelReader | TextWeights | None
    if options.random_start:
        stored, reader = ModelConfig.from_dir(path) if shape is None else shape, None
        log.info(f"continue_training: false: {path} starts at random (seed {options.seed})")
    else:
        text = ModelReader(path)
        reader = text if options.vision_start is None else TextWeights(text, options.vision_start)
        stored = reader.config
        if text.quantised:
            _log_quantised(text, options)
            options = _without_qat(options)
    model_config = options.overrides.apply(stored)
    depths = model_config.num_nextn_predict_layers
    if reader is not None and depths > stored.num_nextn_predict_layers:
        log.info(
            f"num_nextn_predict_layers: {depths}, of which the model has {stored.num_nextn_predict_layers}: the others "
            "start at random"
        )
    adapter = None
    if isinstance(options.adapter, AdapterDirectory):
        adapter = read_adapter(options.adapter.path, model_config, path)
        _check_stored(adapter, options, has_head=stored.has_score_head or not model_config.has_score_head)
    elif options.adapter is not None:
        _check_adapter(options.adapter, model_config)
    return PreparedModel(path, options, model_config, reader, adapter, read_generation_config(path, model_config))


def _without_qat(options: ModelOptions) -> ModelOptions:
    """The options for using weights that are quantised: their codes would be rounded again, to other ones."""
    if options.training or options.precision.qat is None:
        return options
    log.info(f"qat: {options.precision.qat.name}: no effect on weights that are quantised already")
    return dataclasses.replace(options, precision=dataclasses.replace(options.precision, qat=None))


def _log_quantised(reader: ModelReader, options: ModelOptions) -> None:
    """Log that quantised weights are used as what their codes stand for, and whether they are rounded again."""
    what = f"{reader.path}: quantised weights ({reader.quantised}) are used as the numbers that their codes stand for"
    if options.training:
        log.warning(f"{what}; training from the checkpoint that was quantised would start from better weights")
    else:
        log.info(f"{what}, in the memory of a model that is not quantised; activations are not quantised")
    if isinstance(options.precision.product, QuantizedWeights):
        schemes = options.precision.product.schemes
        names = " and ".join(dict.fromkeys((schemes.projections.name, schemes.experts.name)))
        log.warning(
            f"compute_type: these weights are rounded a second time, to {names}, which adds an error that the files do "
            "not have. Set compute_type: bf16 for the model as it is"
        )


def load_model(
    path: str | Path, dtype: str = "float32", adapter: str | Path | None = None, product: ProductFactory | None = None
) -> CausalLM:
    """The model in directory `path`, in eval mode.

    `dtype`: "float32", "bfloat16" or "float16" of the parameters; router and correction bias stay float32. On a CPU,
    where Paddle cannot multiply the short types, the weights are rounded to them and stored in float32.
    `product`: how the projections of the layers multiply instead (see nn.product), such as QuantizedWeights.
    `adapter`: a directory with an adapter in PEFT's format, attached to the model.
    Raises CheckpointError (see `ModelReader`, `read_adapter`).
    """
    name = dtypes.LONG_NAMES[dtypes.header_name(dtype)]
    precision = policy.of_weights(name, paddle.get_device(), product)
    directory = None if adapter is None else AdapterDirectory(Path(adapter).expanduser())
    return prepare_model(Path(path).expanduser(), ModelOptions(precision, adapter=directory)).build()
