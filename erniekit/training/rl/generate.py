"""Generates the completions of a rollout with the model that is trained."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.data.chat.template import Template
from erniekit.data.prompts import Prompt
from erniekit.generation.decode import eval_mode
from erniekit.generation.engine import Engine
from erniekit.generation.request import Generation, Limits, Request
from erniekit.generation.sampling import Sampling
from erniekit.models.decoder import CausalLM
from erniekit.models.stages import finish_passes
from erniekit.parallel import comm
from erniekit.training.rl.completions import Completion, Group
from erniekit.utils import heartbeat


class Generator:
    """Samples completions. Every rank of the model's mesh calls it alike and gets all completions; data ranks share the
    prompts.

    A completion depends on the weights, its prompt and (seed, step, prompt, number of the sample) alone, not on what
    else is generated, nor on the layout, as far as the scores that it is drawn from are the same to the last bits.
    """

    def __init__(self, cfg: Config, model: CausalLM, template: Template) -> None:
        self._cfg, self._model = cfg, model
        stops = tuple(sorted({*template.stop_ids, *model.end_ids}))
        self._limits = Limits(cfg.max_completion_length, 0, stops)
        self._sampling = Sampling(
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            repetition_penalty=cfg.repetition_penalty,
            seed=cfg.seed if cfg.rollout_seed is None else cfg.rollout_seed,
        )
        self._greedy = Sampling(repetition_penalty=cfg.repetition_penalty)
        allowed = np.ones(model.config.vocab_size, bool)
        allowed[sorted(_never_sampled(model, template) - set(stops))] = False
        self._constraint = None if allowed.all() else _constant(allowed)

    def __call__(self, prompts: Sequence[Prompt], draws: Sequence[Sequence[int]], groups: Sequence[int]) -> list[Group]:
        """The completions of prompts, of prompt i one for each number in draws[i], which is the number of its random
        generator. `groups`: the number of each prompt's group.
        """
        tasks = [(i, draw) for i, of_prompt in enumerate(draws) for draw in of_prompt]
        mesh = self._model.mesh
        mine = [number for number, (i, _) in enumerate(tasks) if i % mesh.degrees.data == mesh.data]
        requests = [self._request(prompts[tasks[number][0]], tasks[number][1]) for number in mine]
        with eval_mode(self._model), _rounded(self._model, self._cfg.rollout_dtype):
            done = self._run(requests)
        found: dict[int, Completion] = {}
        lines = [[number, *_as_json(generation)] for number, generation in zip(mine, done, strict=True)]
        for part in comm.gather_objects(lines, mesh.data_group):
            for number, ids, logps, is_truncated in part:
                index = tasks[number][0]
                found[number] = _completion(index, groups[index], ids, logps, is_truncated)
        result = [Group(i, []) for i in range(len(prompts))]
        for number, (i, _) in enumerate(tasks):
            result[i].completions.append(found[number])
        return result

    def greedy(self, prompts: Sequence[Prompt]) -> list[Group]:
        """The likeliest completion of each prompt, in groups of one."""
        sampled, self._sampling = self._sampling, self._greedy
        try:
            return self(prompts, [[0]] * len(prompts), range(len(prompts)))
        finally:
            self._sampling = sampled

    def _request(self, prompt: Prompt, draw: int) -> Request:
        return Request(
            prompt.ids,
            self._limits,
            self._sampling,
            draw,
            num_scores=0,
            score_temperature=self._sampling.temperature or 1.0,
            constraint=self._constraint,
        )

    def _run(self, requests: Sequence[Request]) -> list[Generation]:
        engine = Engine(self._model, self._cfg.rollout_max_running)
        generations = [engine.add(request) for request in requests]
        while not engine.is_idle:
            heartbeat.waiting(None)
            engine.step()
        finish_passes(self._model)
        return generations


def draw_number(step: int, prompt: int, occurrence: int, sample: int) -> int:
    """The number of the random generator of a sample: that of prompt `prompt` in the rollout that begins at optimizer
    step `step`, in which the prompt is drawn for the `occurrence`-th time.
    """
    return (step << 96) | (prompt << 48) | (occurrence << 24) | sample


def _as_json(generation: Generation) -> tuple[list[int], list[float], bool]:
    answer = generation.answer
    return answer.all_ids, [score.logprob for score in answer.scores], answer.stop_id is None


def _completion(prompt: int, group: int, ids: list[int], logps: list[float], is_truncated: bool) -> Completion:
    return Completion(
        prompt,
        group,
        np.array(ids, np.int32),
        np.ones(len(ids), bool),
        np.array(logps, np.float32),
        is_truncated,
    )


def _never_sampled(model: CausalLM, template: Template) -> set[int]:
    """Ids that no completion contains: padding, and the placeholders of pictures."""
    ids = {template.tokenizer.pad_id}
    if model.config.vision is not None:
        ids |= {token for token in model.config.vision.placeholders if token is not None}
    return {token for token in ids if 0 <= token < model.config.vocab_size}


def _constant(allowed_V: np.ndarray) -> Callable[[Sequence[int]], np.ndarray]:
    return lambda ids: allowed_V


@contextmanager
def _rounded(model: CausalLM, dtype: str | None) -> Iterator[None]:
    """Rounds the weights while completions are generated, and puts them back afterwards."""
    if dtype is None:
        yield
        return
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with paddle.no_grad():
        for parameter in model.parameters():
            parameter.set_value(parameter.astype("bfloat16").astype(parameter.dtype))
    try:
        yield
    finally:
        with paddle.no_grad():
            for name, parameter in model.named_parameters():
                parameter.set_value(kept[name])
