"""What is planned: a configuration, a model's shape and a cluster. Text and numbers only; Paddle is not imported.

`Job` keeps the configuration whole and derives everything else from it, so that a changed job (`Job.changed`) is what
`erniekit train` would do with the changed keys.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from erniekit.config import checks, pointless_rl
from erniekit.config.schema import Config
from erniekit.config.schema_kto import KtoArgs
from erniekit.config.schema_parallel import ZERO_STAGES
from erniekit.config.schema_preference import PreferenceArgs, wants_reference
from erniekit.config.schema_rl import RLArgs
from erniekit.models.config import ModelConfig
from erniekit.models.pipeline_layout import assign_layers, check_layout, schedule_of
from erniekit.parallel.mesh import ParallelDims
from erniekit.parallel.pipeline_schedule import Compute, compute_order
from erniekit.utils.errors import ConfigError

# logits and tokens at one time, as in losses/lm.py
_CHUNK_ELEMENTS, _CHUNK_TOKENS, _GPU_CHUNK_ELEMENTS = 1 << 24, 1 << 11, 1 << 28
CPU = "cpu"  # the name of the device on which nothing is in 16 bits


@dataclass(frozen=True)
class Cluster:
    """The processors: `gpus` of them in all, of the model `gpu` (a name of the hardware table, or "cpu"),
    `gpus_per_node` in each host.
    """

    gpus: int
    gpu: str
    gpus_per_node: int

    @property
    def nodes(self) -> int:
        """Number of hosts; the last one may be used in part."""
        return -(-self.gpus // self.gpus_per_node)


@dataclass(frozen=True)
class Job:
    """One training run on one cluster. Made by `make_job`, which checks that the parts fit together.

    `model`: the shape that is trained, with the blocks for multi-token prediction that the run adds. `degrees`: the
    ranks of each axis, all GPUs of the cluster.
    `document_tokens`: the length of the documents in a row, to which attention is confined; None: a row is one
    document. `picture_tokens`: the tokens of a row that stand for images or video frames. `supervised_share`: the share
    of the tokens that have a label.
    """

    cfg: Config
    model: ModelConfig
    degrees: ParallelDims
    cluster: Cluster
    document_tokens: int | None = None
    picture_tokens: int = 0
    supervised_share: float = 1.0

    # Degrees

    @property
    def zero_stage(self) -> int:
        """0: optimizer state is whole on every data rank; 1: divided; 2: gradients as well; 3: also weights."""
        return ZERO_STAGES[self.cfg.sharding]

    @property
    def divides_layers(self) -> bool:
        """Whether the weights of a layer, those of its experts too, are divided between uses, and its gradients sent
        when its backward pass is done.
        """
        experts = self.degrees.expert if self.model.moe_num_experts else 1
        return self.zero_stage == 3 and self.degrees.sharding > experts

    @property
    def sequence_parallel(self) -> bool:
        """Whether tensor ranks share the tokens between projections."""
        return self.cfg.sequence_parallel and self.degrees.tensor > 1

    # Pipeline

    @property
    def schedule(self) -> str:
        """The name of the pipeline's schedule, see parallel/pipeline_schedule.py."""
        return schedule_of(self.cfg)

    @property
    def num_chunks(self) -> int:
        """Chunks of the model on each stage."""
        return max(self.cfg.virtual_pp_degree, 1)

    @cached_property
    def stages(self) -> list[list[tuple[int, ...]]]:
        """The layer numbers of each chunk of each stage: stages[stage][chunk]."""
        return assign_layers(self.cfg, self.model, self.degrees.pipeline)

    def passes(self, stage: int, most: int) -> list[Compute]:
        """The forward and backward passes of a stage in one step of at most `most` microbatches, in their order.
        Transfers do not change it.
        """
        number = min(self.num_microbatches, most)
        return compute_order(self.schedule, stage, self.degrees.pipeline, number, self.num_chunks)

    # Batch

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step on each data rank."""
        return self.cfg.num_microbatches(self.degrees.batch)

    @property
    def row_tokens(self) -> int:
        """Tokens of one row, which is assumed to be full."""
        return self.cfg.max_seq_len

    @property
    def document_lengths(self) -> list[int]:
        """The lengths of the documents in one row."""
        length = min(self.document_tokens or self.row_tokens, self.row_tokens)
        whole, rest = divmod(self.row_tokens, length)
        return [length] * whole + [rest] * (rest > 0)

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of one microbatch on one data rank: all ranks that share the model together."""
        return self.cfg.batch_size * self.row_tokens

    @property
    def step_tokens(self) -> int:
        """Tokens of one step over all data ranks."""
        return self.microbatch_tokens * self.num_microbatches * self.degrees.batch

    @property
    def rank_tokens(self) -> int:
        """Tokens of one microbatch on one context rank, all tensor ranks together."""
        return -(-self.microbatch_tokens // self.degrees.context)

    @property
    def labelled_tokens(self) -> float:
        """Tokens of one microbatch on one context rank that have a label."""
        return self.rank_tokens * self.supervised_share

    @property
    def head_rows(self) -> float:
        """Tokens whose logits are in memory at a time."""
        vocabulary = self.model.vocab_size // self.degrees.tensor
        if self.on_cpu:
            room = min(_CHUNK_ELEMENTS // vocabulary, _CHUNK_TOKENS)
        else:
            room = _GPU_CHUNK_ELEMENTS // vocabulary
        return max(1.0, min(self.labelled_tokens, self.cfg.loss_subbatch_seqlen, room))

    # Precision

    @property
    def on_cpu(self) -> bool:
        """Whether the plain code path for a CPU computes, in fp32."""
        return self.cluster.gpu == CPU

    @property
    def element_bytes(self) -> int:
        """Bytes of one number of the weights (unless quantized) and of the activations."""
        in_fp32 = self.on_cpu and not self.cfg.emulate_precision
        return 4 if in_fp32 or self.cfg.compute_type == "fp32" else 2

    @property
    def offloads_state(self) -> bool:
        """Whether the optimizer's state waits in host memory; on a CPU that is where it is anyway."""
        return not self.on_cpu and (self.cfg.offload_optim or self.cfg.tensorwise_offload_optimizer)

    @property
    def offloads_activations(self) -> bool:
        """Whether inputs of recomputed modules wait in host memory; on a CPU they would only be copied."""
        return not self.on_cpu and self.cfg.offload_activations and self.cfg.recompute

    @property
    def quantized_base(self) -> bool:
        """Whether frozen weights are kept in 8 or 4 bits."""
        return self.cfg.compute_type in ("wint8", "wint4", "wint4/8", "nf4")

    # Method

    @property
    def is_lora(self) -> bool:
        """Whether adapters are trained on frozen weights."""
        return self.cfg.fine_tuning == "LoRA"

    @property
    def has_pairs(self) -> bool:
        """Whether a document is a prompt with a preferred and another answer."""
        return PreferenceArgs in self.cfg.method.options

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with a reference model or a teacher, which costs a forward pass more."""
        cfg = self.cfg
        if self.is_distilled or KtoArgs in cfg.method.options:
            return True
        if RLArgs in cfg.method.options:
            return pointless_rl.has_reference(cfg)
        return self.has_pairs and wants_reference(cfg)

    @property
    def passes_ahead(self) -> float:
        """Forward passes without gradients over as many tokens as a step has, before it: of a reference; KTO's over
        mismatched pairs, of the policy and of the reference; reinforcement learning's, once for each rollout, and that
        for entropies once for each step.
        """
        cfg, options = self.cfg, self.cfg.method.options
        if RLArgs in options:
            count = self.has_reference + pointless_rl.wants_old_log_probs(cfg)
            return count / cfg.num_iterations + (cfg.top_entropy_quantile < 1)
        return self.has_reference + 2 * (KtoArgs in options and cfg.kto_loss_type == "kto")

    @property
    def is_distilled(self) -> bool:
        """Whether the loss has a teacher: the model before training, without quantisation, or another one, which is
        counted as large as the model that is trained.
        """
        cfg = self.cfg
        if cfg.method.reads("teacher_model_name_or_path"):
            return True
        return cfg.qat != "none" and cfg.qat_distill_weight > 0 and cfg.method.reads("qat_distill_weight")

    @property
    def has_second_model(self) -> bool:
        """Whether that reference is a second copy of the model in memory."""
        is_cached = bool(self.cfg.ref_logps_cache) and self.cfg.method.reads("ref_logps_cache")
        return self.is_distilled or (self.has_reference and not self.is_lora and not is_cached)

    @property
    def mtp_depths(self) -> int:
        """Blocks of multi-token prediction that are trained."""
        return self.cfg.mtp_depths

    def changed(self, cluster: Cluster | None = None, **keys: Any) -> "Job":
        """The same run with other values of these keys, or on another cluster.

        Raises:
            ConfigError: the keys contradict one another, or the degrees do not fit the cluster or the model.
        """
        cfg = dataclasses.replace(self.cfg, **keys)
        problems = checks.problems(cfg, "train")
        if problems:
            raise ConfigError(problems[0])
        return make_job(
            cfg,
            self.model,
            cluster or self.cluster,
            self.document_tokens,
            self.picture_tokens,
            self.supervised_share,
        )


def make_job(
    cfg: Config,
    model: ModelConfig,
    cluster: Cluster,
    document_tokens: int | None = None,
    picture_tokens: int = 0,
    supervised_share: float = 1.0,
) -> Job:
    """The job of a configuration on a cluster. Rows are full by default, and one document each.

    Raises:
        ConfigError: the degrees do not multiply to the cluster's GPUs, or do not divide the model.
    """
    if min(cluster.gpus, cluster.gpus_per_node) < 1:
        raise ConfigError(f"gpus: {cluster.gpus} in hosts of {cluster.gpus_per_node}: give at least 1 of each")
    degrees = ParallelDims.from_config(cfg, cluster.gpus)
    if cluster.gpu != CPU:  # a card has the types itself
        cfg = dataclasses.replace(cfg, emulate_precision=False)
    depths = max(cfg.mtp_depths, model.num_nextn_predict_layers)
    model = dataclasses.replace(model, num_nextn_predict_layers=depths)
    check_layout(cfg, degrees, model)
    return Job(cfg, model, degrees, cluster, document_tokens, picture_tokens, supervised_share)
