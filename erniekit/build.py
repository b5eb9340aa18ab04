"""Builds a model from a model directory. This is the only place that defines the order of the steps:

lazy model -> products -> random initialisation or weight files -> precision -> parallelize -> adapter -> activation
checkpointing. The order is the same for training, evaluation, generation, reference models and `erniekit.load_model`.

`prepare_model` opens the directory and checks everything that can be checked without reading weights, so that a wrong
key is found within seconds, however large the model is. `PreparedModel.build` reads the weights.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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
from erniekit.config.schema import Config
from erniekit.models import activation_checkpoint
from erniekit.models.activation_checkpoint import RecomputeOptions
from erniekit.models.config import ModelConfig
from erniekit.models.config_rope import scaled_positions
from erniekit.models.decoder import CausalLM
from erniekit.models.fp8 import adapted_layers, attach_fp8, describe_fp8
from erniekit.models.init import init_weights
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
class Overrides:
    """The changes that a configuration makes to a model's config.json. The defaults change nothing.

    `min_positions`: max_position_embeddings is raised to this value, and with `rope_scaling` positions are scaled to
    it. `mtp_depths`: the minimum number of blocks of
    multi-token prediction; blocks that the weights lack are initialised at random. `score_head`: whether the model is a
    reward model, whose head starts at random where the weights have none; None: as it is.
    """

    rope_theta: float | None = None
    rope_scaling: str = ""
    min_positions: int = 0
    group_experts: bool = False
    capacity_factor: float | None = None
    mtp_depths: int = 0
    score_head: bool | None = None

    def apply(self, model_config: ModelConfig) -> ModelConfig:
        """The model's configuration with these changes, each of which is logged."""
        changes: dict[str, Any] = {}
        if self.rope_theta is not None and self.rope_theta != model_config.rope_theta:
            before = f"{model_config.rope_theta:g}"
            log.info(f"rope_theta: {before} in the model's config.json, {self.rope_theta:g} from here on")
            changes["rope_theta"] = self.rope_theta
        changes |= self._scaling(model_config)
        # Dynamic positions are scaled beyond max_position_embeddings, which therefore stays.
        is_dynamic = self.rope_scaling == "dynamic"
        if self.min_positions > model_config.max_position_embeddings and not is_dynamic:
            before = f"{model_config.max_position_embeddings}"
            log.info(f"max_position_embeddings: {before} before, {self.min_positions} from here on")
            changes["max_position_embeddings"] = self.min_positions
        if self.mtp_depths > model_config.num_nextn_predict_layers:
            changes["num_nextn_predict_layers"] = self.mtp_depths
        if model_config.moe_num_experts:
            changes["moe_capacity_factor"] = self.capacity_factor
            if self.group_experts and not model_config.moe_group_experts:
                log.warning(
                    "moe_group_experts: other tools know only plain top-k; this model has to be used with erniekit"
                )
                changes["moe_group_experts"] = True
        if self.score_head is not None and self.score_head != model_config.has_score_head:
            changes |= _with_score_head(model_config)
        return dataclasses.replace(model_config, **changes)

    def _scaling(self, model_config: ModelConfig) -> dict[str, Any]:
        """The change that `rope_scaling` makes; none where the model's positions are scaled so already."""
        now, length = model_config.rope_scaling, model_config.max_position_embeddings
        if not self.rope_scaling or (now is not None and now.kind == self.rope_scaling):
            return {}
        if now is not None:
            raise ConfigError(
                f"rope_scaling: {self.rope_scaling}: the positions of this model are scaled already (rope_type "
                f"{now.kind} in its config.json). Leave the key out, or set {now.kind}"
            )
        if self.min_positions <= length:
            log.info(f"rope_scaling: {self.rope_scaling}: no effect: the model has {length} positions (max_seq_len)")
            return {}
        scaling = scaled_positions(self.rope_scaling, length, self.min_positions)
        log.info(f"rope_scaling: {scaling.kind} by {scaling.factor:g}, from {length} to {self.min_positions} positions")
        return {"rope_scaling": scaling}


def _with_score_head(model_config: ModelConfig) -> dict[str, Any]:
    """The changes that make a reward model of a language model. ConfigError the other way round."""
    if model_config.has_score_head:
        raise ConfigError(
            "model_name_or_path: this is a reward model (stage: RM), which gives a text one number and generates none. "
            "Name a language model, or set stage: RM"
        )
    if model_config.vision is not None:
        raise ConfigError(
            "stage: RM: reward models of vision-language models are not built. Name a model of text alone"
        )
    log.info("the model becomes a reward model: its output head is replaced by a score head, which starts at random")
    return {"has_score_head": True}


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
    overrides: Overrides = Overrides()
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
        overrides=dataclasses.replace(
            overrides_of(cfg),
            min_positions=cfg.max_seq_len,
            capacity_factor=cfg.moe_capacity_factor,
            mtp_depths=cfg.mtp_depths,
        ),
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
    precision = policy.choose(cfg.compute_type, here, emulates)
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


def overrides_of(cfg: Config) -> Overrides:
    """The changes that the configuration makes to its model, in every command that uses the model."""
    return Overrides(
        rope_theta=cfg.rope_theta,
        rope_scaling=cfg.rope_scaling,
        # The default of max_seq_len is just the length of a training row, so it must not change the model's context.
        min_positions=cfg.max_seq_len if "max_seq_len" in cfg.given else 0,
        group_experts=cfg.moe_group_experts,
        score_head=cfg.method.scores,
    )


def check_lora(cfg: Config, model_config: ModelConfig) -> None:
    """Raise ConfigError if lora_target_modules or modules_to_save name modules that the model does not have, or if
    lora_rank can only be a mistake.
    """
    if cfg.fine_tuning == "LoRA" and not cfg.lora_path:
        _check_adapter(lora_options(cfg), model_config)


def _check_adapter(options: lora.LoraOptions, config: ModelConfig) -> None:
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
                "beside which each projection is a product of its own"
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
            f"context_parallel_degree: {mesh.degrees.context}: the ring (cp_comm_type: p2p) is built for CPUs. On GPUs "
            "set cp_comm_type: a2a"
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
    weight is read, and none can be. `adapter`: a saved one; None: that of the options, if any.
    """
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
            _say_quantised(text, options)
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
        if options.divides_weights and adapter.options.dora:
            raise ConfigError(
                f"sharding: stage3 is not built for the columns' lengths of DoRA, which the adapter of lora_path: "
                f"{options.adapter.path} has. Set sharding: stage2"
            )
    elif options.adapter is not None:
        _check_adapter(options.adapter, model_config)
    return PreparedModel(path, options, model_config, reader, adapter, read_generation_config(path, model_config))


def _without_qat(options: ModelOptions) -> ModelOptions:
    """The options for using weights that are quantised: their codes would be rounded again, to other ones."""
    if options.training or options.precision.qat is None:
        return options
    log.info(f"qat: {options.precision.qat.name}: no effect on weights that are quantised already")
    return dataclasses.replace(options, precision=dataclasses.replace(options.precision, qat=None))


def _say_quantised(reader: ModelReader, options: ModelOptions) -> None:
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
    directory = None if adapter is None else AdapterDirectory(Path(adapter))
    return prepare_model(path, ModelOptions(precision, adapter=directory)).build()
