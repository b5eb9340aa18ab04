"""Generates the completions of a rollout with the model that is trained."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import paddle

from erniekit.config.schema import Config
from erniekit.data.chat.template import Template
from erniekit.data.prompts import Prompt
from erniekit.generation.decode import eval_mode
from erniekit.generation.engine import Engine
from erniekit.generation.pictures import tables_of
from erniekit.generation.ranks import from_leader, leads
from erniekit.generation.request import Generation, Limits, Request
from erniekit.generation.sampling import Sampling
from erniekit.models.decoder import CausalLM
from erniekit.models.sharded_blocks import whole_weights
from erniekit.models.stages import finish_passes
from erniekit.parallel import comm
from erniekit.training.rl.completions import Completion, Group
from erniekit.training.rl.expert_record import add_experts
from erniekit.training.rl.tools import Continuation, Dialogue, ToolLoop
from erniekit.training.rl.track import Track, completion_of
from erniekit.utils import heartbeat


class Generator:
    """Samples completions. Every rank of the model's mesh calls it alike and gets all completions; data ranks share the
    prompts.

    A completion depends on the weights, its prompt and (seed, step, prompt, number of the sample) alone, not on what
    else is generated, nor on the layout, as far as the scores that it is drawn from are the same to the last bits.
    """

    def __init__(
        self, cfg: Config, model: CausalLM, template: Template, tools: ToolLoop | None = None, is_greedy: bool = False
    ) -> None:
        """`tools`: what the model may call; None: every completion is one turn. `is_greedy`: for the likeliest
        completions, of which no experts are recorded, instead of samples.
        """
        self._cfg, self._model, self._tools = cfg, model, tools
        stops = stop_ids(model, template)
        self._limits = Limits(cfg.max_completion_length, 0, stops)
        self._sampling = Sampling(
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            repetition_penalty=cfg.repetition_penalty,
            seed=cfg.seed if cfg.rollout_seed is None else cfg.rollout_seed,
        )
        if is_greedy:
            self._sampling = Sampling(repetition_penalty=cfg.repetition_penalty)
        self._never = tuple(sorted(never_sampled(model, template) - set(stops)))
        self._records_experts = cfg.router_replay != "none" and not is_greedy

    def begin_rollout(self, step: int) -> None:
        """Nothing: the model that generates is the one that is trained."""

    def __call__(self, prompts: Sequence[Prompt], draws: Sequence[Sequence[int]], groups: Sequence[int]) -> list[Group]:
        """The completions of prompts, of prompt i one for each number in draws[i], which is the number of its random
        generator. `groups`: the number of each prompt's group.
        """
        tasks = [(i, draw) for i, of_prompt in enumerate(draws) for draw in of_prompt]
        mesh = self._model.mesh
        mine = [number for number, (i, _) in enumerate(tasks) if i % mesh.degrees.data == mesh.data]
        tracks = [Track.begin(prompts[tasks[number][0]], tasks[number][1], self._tools) for number in mine]
        with whole_weights(self._model), eval_mode(self._model), _rounded(self._model, self._cfg.rollout_dtype):
            self._run(tracks)
        found: dict[int, Completion] = {}
        lines = [[number, track.finished()] for number, track in zip(mine, tracks, strict=True)]
        for part in comm.gather_objects(lines, mesh.data_group):
            for number, columns in part:
                index = tasks[number][0]
                found[number] = completion_of(index, groups[index], columns)
        if self._records_experts:
            parts = {number: track.experts for number, track in zip(mine, tracks, strict=True)}
            add_experts(self._model, [prompts[i] for i, _ in tasks], found, parts)
        for number, track in zip(mine, tracks, strict=True):
            found[number].plans, found[number].short_inputs = tuple(track.plans), tuple(track.short)
        result = [Group(i, []) for i in range(len(prompts))]
        for number, (i, _) in enumerate(tasks):
            result[i].completions.append(found[number])
        return result

    def _request(self, track: Track) -> Request:
        """The next turn of a completion."""
        pictures = track.sequence()
        return Request(
            [*track.prompt.ids, *track.inputs],
            replace(self._limits, max_new_tokens=self._cfg.max_completion_length - len(track.ids)),
            self._sampling,
            track.random_draw,
            picture_prompt=pictures,
            open_pictures=None if pictures is None else partial(tables_of, pictures),
            num_scores=0,
            score_temperature=self._sampling.temperature or 1.0,
            never=self._never,
        )

    def _run(self, tracks: Sequence[Track]) -> None:
        """Generate until every completion is over. With tools a turn's keys and values are kept for the next one."""
        engine = Engine(
            self._model,
            self._cfg.rollout_max_running,
            num_kept=0 if self._tools is None else _KEPT,
            records_experts=self._records_experts,
        )
        after_turn = None if self._tools is None else self._after_turn
        running = {id(generation): (generation, track) for track in tracks for generation in [self._add(engine, track)]}
        while not engine.is_idle:
            heartbeat.waiting(None)
            for generation in engine.step():
                if not generation.answer.stop:
                    continue
                _, track = running.pop(id(generation))
                answer, track.experts = generation.answer, generation.experts
                track.add_turn(answer.ids, answer.stop_id, [score.logprob for score in answer.scores])
                if has_next_turn(self._cfg, self._model, after_turn, track, answer.ids, answer.stop_id):
                    following = self._add(engine, track)
                    running[id(following)] = following, track
        finish_passes(self._model)

    def _add(self, engine: Engine, track: Track) -> Generation:
        return engine.add(self._request(track))

    def _after_turn(self, dialogue: Dialogue, ids: Sequence[int], ended: bool) -> Continuation | None:
        """What follows a turn. Of the ranks that share the model one executes the calls and sends the others their
        results. Their dialogues stay as they began: only the completions of the one that executes are scored.
        """
        mesh, tools, result = self._model.mesh, self._tools, None
        assert tools is not None
        if leads(mesh):
            result = tools.after_turn(dialogue, ids, ended)
        if mesh.degrees.tensor * mesh.degrees.pipeline == 1:
            return result
        assert result is None or not result.plans, "pictures are not sent"
        sent = from_leader(None if result is None else [result.ids, result.end_input], mesh)
        return None if sent is None else Continuation(*sent)


AfterTurn = Callable[[Dialogue, Sequence[int], bool], Continuation | None]


def has_next_turn(
    cfg: Config, model: CausalLM, after_turn: AfterTurn | None, track: Track, ids: Sequence[int], stop_id: int | None
) -> bool:
    """Add the results of the calls of a turn, which its completion has got, to it; whether another turn follows.
    `after_turn`: as ToolLoop.after_turn; None: there are no tools. ids: of the turn without its end token, stop_id.
    """
    if after_turn is None or track.dialogue is None:
        return False
    continuation = after_turn(track.dialogue, ids, stop_id is not None)
    if continuation is None:
        return False
    room = min(
        cfg.max_completion_length - len(track.ids),
        model.config.max_position_embeddings - len(track.prompt.ids) - len(track.ids),
    )
    if track.length_of(continuation) >= room:  # no token would be left for the next turn
        track.is_truncated = True
        return False
    track.add_results(continuation)
    return True


_KEPT = 64  # conversations whose keys and values wait for their next turn


def draw_number(step: int, prompt: int, occurrence: int, sample: int) -> int:
    """The number of the random generator of a sample: that of prompt `prompt` in the rollout that begins at optimizer
    step `step`, in which the prompt is drawn for the `occurrence`-th time.
    """
    return (step << 96) | (prompt << 48) | (occurrence << 24) | sample


def stop_ids(model: CausalLM, template: Template) -> tuple[int, ...]:
    """The end tokens of the template and of the model."""
    return tuple(sorted({*template.stop_ids, *model.end_ids}))


def never_sampled(model: CausalLM, template: Template) -> set[int]:
    """Ids that no completion contains: padding, and the placeholders of pictures."""
    ids = {template.tokenizer.pad_id}
    if model.config.vision is not None:
        ids |= {token for token in model.config.vision.placeholders if token is not None}
    return {token for token in ids if 0 <= token < model.config.vocab_size}


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
