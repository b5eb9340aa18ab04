"""Generalised knowledge distillation: the model follows a teacher's predictions, on the answers of the data and on its
own (Agarwal et al. 2023, arXiv 2306.13649).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import paddle

from erniekit.build import PreparedModel, prepare_model
from erniekit.checkpoint.model_dir import require_model, require_weights
from erniekit.config.schema import Config
from erniekit.data.chat.tokenizer import Tokenizer, load_tokenizer
from erniekit.data.packed_batch import IGNORE, Document, PackedBatch, join_rows, make_row
from erniekit.data.sampler import random_bits
from erniekit.generation.decode import decode
from erniekit.generation.request import Limits
from erniekit.generation.sampling import Sampling
from erniekit.hub import resolve_model
from erniekit.join import require_same_files
from erniekit.losses.distillation import Divergence
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.models.overrides import Overrides
from erniekit.models.pipeline_layout import assign_layers
from erniekit.models.sharded_blocks import whole_weights
from erniekit.parallel import comm
from erniekit.parallel.mesh import ParallelDims, check_model
from erniekit.training.recipes.base import Recipe, RecipeContext, Term
from erniekit.training.recipes.distilled import Teacher
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, UserError

_KEY = 71  # tells this draw from others of the same seed


def _has_same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether every id stands for the same text; files may differ, since toolkits write further ones beside them."""
    if one.fingerprint == other.fingerprint:
        return True
    ids = range(one.vocab_size)
    return one.vocab_size == other.vocab_size and all(one.decode([i]) == other.decode([i]) for i in ids)


def require_teacher(cfg: Config, prepared: PreparedModel, tokenizer: Tokenizer, degrees: ParallelDims) -> None:
    """Raise ConfigError if the teacher is not a model with weights and with the vocabulary of the trained one, or if
    the degrees do not divide it.
    """
    try:
        path = resolve_model(_name(cfg), cfg.download_hub)
        require_model(path)
        require_weights(path, "A teacher cannot start at random: train it first, or name another model.")
    except UserError as error:  # these speak of the key of the trained model
        raise type(error)(str(error).replace("model_name_or_path", "teacher_model_name_or_path", 1)) from None
    theirs = load_tokenizer(path)
    teacher = prepared_teacher(cfg, prepared)
    if not _has_same_tokens(theirs, tokenizer) or teacher.config.vocab_size != prepared.config.vocab_size:
        raise ConfigError(
            f"teacher_model_name_or_path: {path} has another vocabulary ({teacher.config.vocab_size} rows, "
            f"{theirs.vocab_size} tokens) than the model ({prepared.config.vocab_size} rows, {tokenizer.vocab_size} "
            "tokens), so their predictions cannot be compared. Choose a teacher with the same tokenizer."
        )
    try:
        teacher_chunks(cfg, teacher.config, degrees)
    except ConfigError as error:
        raise ConfigError(f"teacher_model_name_or_path: {path} is divided as the trained model is: {error}") from None


def _name(cfg: Config) -> str:
    assert cfg.teacher_model_name_or_path is not None, "config/checks.py requires it"
    return cfg.teacher_model_name_or_path


def teacher_chunks(cfg: Config, teacher: ModelConfig, degrees: ParallelDims) -> list[list[tuple[int, ...]]]:
    """The layers of each chunk of each stage of the teacher; ConfigError where the degrees do not divide it. A list in
    pp_seg_method has the numbers of the trained model's layers.
    """
    # Without experts, the ranks that share experts each hold all of it.
    check_model(degrees if teacher.moe_num_experts else replace(degrees, expert=1), teacher)
    named = isinstance(cfg.pp_seg_method, str)
    return assign_layers(cfg if named else replace(cfg, pp_seg_method="balanced"), teacher, degrees.pipeline)


def prepared_teacher(cfg: Config, prepared: PreparedModel) -> PreparedModel:
    """The teacher as its config.json has it: keys that change the trained model, such as rope_theta, do not concern
    it, beside the length of rows.
    """
    precision = replace(prepared.options.precision, qat=None)
    options = replace(
        prepared.options,
        overrides=Overrides(min_positions=cfg.max_seq_len, score_head=False),
        precision=precision,
        adapter=None,
        recompute=None,
        training=False,
        random_start=False,
        vision_start=None,
    )
    return prepare_model(resolve_model(_name(cfg), cfg.download_hub), options)


class GkdRecipe(Recipe):
    """The mean over answer tokens of the divergence of the model's predictions from the teacher's.

    A step is on-policy with the probability lmbda, decided by the seed and the step: then the prompts of its documents
    (what stands before their last answer) are answered by the model, with the run's sampling keys, and these
    answers take the place of those of the data. `temperature` is that of the samples and of the divergence.
    """

    def __init__(self, cfg: Config, policy: CausalLM, teacher: Teacher, stop_ids: Sequence[int]):
        self.cfg, self._policy, self._teacher = cfg, policy, teacher
        stops = tuple(sorted({*stop_ids, *policy.end_ids}))
        self._limits = Limits(cfg.max_new_tokens, 0, stops)
        self._kind = Divergence(cfg.gkd_beta, cfg.temperature)
        self._step = 0
        self._has_full_prompt = False  # a document was seen whose prompt leaves no room for an answer

    @classmethod
    def build(cls, context: RecipeContext) -> "GkdRecipe":
        """The recipe of a run, with its teacher."""
        cfg, model = context.cfg, context.model
        prepared = prepared_teacher(cfg, context.prepared)
        chunks = teacher_chunks(cfg, prepared.config, model.mesh.degrees)[model.mesh.pipe]
        require_same_files(prepared.path, None, {}, model.mesh.world_group, "teacher_model_name_or_path")
        teacher = Teacher(prepared.build(model.mesh, chunks))
        log.info(f"teacher: {prepared.path}")
        stops = [context.tokenizer.eos_id] if context.template is None else context.template.stop_ids
        return cls(cfg, model, teacher, stops)

    def before_step(self, step: int) -> None:
        """See Recipe."""
        self._step = step

    def is_on_policy(self, step: int) -> bool:
        """Whether the answers of a step are the model's own."""
        draw = int(random_bits((self.cfg.seed, _KEY), step, step + 1)[0])
        return (draw >> 11) * 2.0**-53 < self.cfg.lmbda

    def prepare(self, microbatches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The step's microbatches, or those with the model's own answers; and the teacher's pass over them."""
        prepared = self._answered(microbatches) if self.is_on_policy(self._step) else list(microbatches)
        self._teacher.observe(prepared)
        return prepared

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Supervised tokens, all tokens."""
        return {"gkd": float(len(batch.supervised)), "tokens": float(batch.num_tokens)}

    def head_terms(
        self, model: CausalLM, x_TD: paddle.Tensor, inputs: ModelInputs, batch: PackedBatch
    ) -> dict[str, Term]:
        """The term "gkd", and whether the answers are the model's own."""
        total = self._teacher.divergence(model, x_TD, batch, self.cfg.loss_subbatch_seqlen, self._kind)
        on_policy = float(self.is_on_policy(self._step)) * len(batch.supervised)
        return {
            "gkd": Term(total, "gkd"),
            "on_policy": Term(paddle.full([], on_policy, "float32"), "gkd", None),
        }

    def _answered(self, microbatches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The documents of the microbatches with answers of the model, each in its own row. All ranks know the answers
        to all prompts, so that these do not depend on the layout.
        """
        cfg, mesh = self.cfg, self._policy.mesh
        documents = [_documents(batch) for batch in microbatches]
        own = [[_prompt_of(document) for document in of_batch] for of_batch in documents]
        ranks = comm.gather_objects(own, mesh.data_group)
        order = [
            (m, rank, i)
            for m in range(len(own))
            for rank, of in enumerate(ranks)
            for i in range(len(of[m]))
            if len(of[m][i]) < self._policy.config.max_position_embeddings
        ]
        prompts = [ranks[rank][m][i] for m, rank, i in order]
        # Each step draws from a seed of its own, each prompt from its place in the global batch.
        seed = int(random_bits((cfg.seed, _KEY + 1), self._step, self._step + 1)[0] >> 33)
        sampling = Sampling(
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            repetition_penalty=cfg.repetition_penalty,
            seed=seed,
        )
        with whole_weights(self._policy):
            answers = dict(zip(order, decode(self._policy, prompts, self._limits, sampling), strict=True))
        result = []
        for m, of_batch in enumerate(own):
            rows = []
            for i, prompt in enumerate(of_batch):
                answer, document = answers.get((m, mesh.data, i)), documents[m][i]
                if answer is not None:
                    document = _answered_document(prompt, answer.all_ids, cfg.max_seq_len)
                elif not self._has_full_prompt:
                    self._has_full_prompt = True
                    log.warning(
                        f"{microbatches[m].sources[i]}: the question fills the model's context, so that the model "
                        "cannot answer it: the answer of the data is kept, here and in further such documents"
                    )
                rows.append(make_row([document], [microbatches[m].sources[i]]))
            result.append(join_rows(rows))
        return result


def _documents(batch: PackedBatch) -> list[Document]:
    """The documents of a batch."""
    bounds = np.concatenate([[0], np.cumsum(batch.segment_lengths)])
    return [
        Document(batch.input_ids[start:stop].astype(np.int32), batch.labels[start:stop].astype(np.int32))
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ]


def _prompt_of(document: Document) -> list[int]:
    """The ids of a document up to the token that predicts the first one of its last answer."""
    supervised = np.flatnonzero(document.labels != IGNORE)
    begins = supervised[np.append(True, np.diff(supervised) > 1)]  # of each answer
    return document.ids[: int(begins[-1]) + 1].tolist()


def _answered_document(prompt: list[int], answer: list[int], max_seq_len: int) -> Document:
    ids = np.array(prompt + answer, np.int32)
    labels = np.array([IGNORE] * (len(prompt) - 1) + answer + [IGNORE], np.int32)
    length = max(max_seq_len, len(prompt) + 1)
    return Document(ids[:length], labels[:length])
