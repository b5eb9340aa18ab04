"""Continuous batching: requests join and leave a running batch, one model pass at a time.

Each step first continues every running answer by one token, then gives waiting prompts to the model, at most
`prefill_tokens` of them, so that a long prompt does not hold up the answers. A prompt that has been read whole joins
the running batch. What a prompt has in common with one that was read before, and whose keys and values are still kept,
is not computed again; equal prompts that wait together are read once.

An answer does not depend on what else runs: its draws follow from (seed, draw) and its own position. Scores may differ
in their last bit with the number of rows of a matrix product, so two tokens that tie to within rounding may be chosen
otherwise.

All ranks of one copy of the model make the same calls in the same order. One thread owns an engine.
"""

import bisect
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from erniekit.generation.choosing import choose_next
from erniekit.generation.pictures import PromptPictures, num_shared
from erniekit.generation.request import Generation, Request, check_prompts
from erniekit.generation.speculative import Drafting
from erniekit.generation.steppers import CachedStepper
from erniekit.lora.several import adapter_set_of, rows_of
from erniekit.models.decoder import CausalLM
from erniekit.nn.kv_cache import KVCache
from erniekit.utils.errors import UserError

PREFILL_TOKENS = 16384  # tokens of prompts that go through the model at once


@dataclass
class _Prompts:
    """Prompts that are being read. `members[i]` are the generations that continue row i of the stepper; `rest[i]` are
    the tokens of that row that have not been fed, of which each pass takes the first `count`.
    """

    members: list[list[Generation]]
    stepper: CachedStepper
    rest: list[Sequence[int]]
    pictures: PromptPictures | None
    fed: int = 0


@dataclass(eq=False)
class _Kept:
    """The keys and values of a conversation that has ended; `ids` are the tokens that they belong to. Equal to itself
    alone: requests hold arrays.
    """

    ids: list[int]
    request: Request
    cache: KVCache


class Engine:
    """Answers requests with one model, up to `max_running` at a time, in the order in which they came; those of several
    owners by turns, so that many requests of one do not hold up the others.

    Memory: keys and values of `max_running` + `num_kept` conversations of up to the model's context, and a copy of the
    running ones while they need more room. `num_kept`: conversations that are kept after their end, so that prompts
    that begin with them are read faster; the one that was used least recently goes first.

    drafts: whether the model's prediction block drafts tokens, so that a step may bring two (generation.speculative).
    records_experts: whether an answer that has ended says which experts its tokens were sent to (Generation.experts).

    num_reused: prompt tokens so far that did not have to be computed.
    """

    def __init__(
        self,
        model: CausalLM,
        max_running: int = 16,
        prefill_tokens: int = PREFILL_TOKENS,
        num_kept: int = 0,
        drafts: bool = False,
        records_experts: bool = False,
    ) -> None:
        assert max_running > 0 and prefill_tokens > 0, (max_running, prefill_tokens)
        self.model = model
        self.max_running, self.prefill_tokens, self.num_kept = max_running, prefill_tokens, num_kept
        self.num_reused, self.records_experts = 0, records_experts
        self.drafting = Drafting(model) if drafts else None
        self._waiting: deque[Generation] = deque()  # in the order of their turns
        self._turn, self._turns = 0, dict[str, int]()  # of the last request that was admitted; of each owner's last one
        self._reading: _Prompts | None = None
        self._running: list[Generation] = []
        self._stepper: CachedStepper | None = None  # of the running rows
        self._kept: list[_Kept] = []  # least recently used first

    @property
    def num_waiting(self) -> int:
        """Requests of which no token has been read."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that are read or answered."""
        return len(self._running) + (sum(map(len, self._reading.members)) if self._reading else 0)

    @property
    def num_cached(self) -> int:
        """Tokens of the running answers and their prompts whose keys and values are kept."""
        return 0 if self._stepper is None else int(self._stepper.cache.lengths.sum())

    @property
    def is_idle(self) -> bool:
        """Whether every request has ended."""
        return not (self._waiting or self._reading or self._running)

    def add(self, request: Request) -> Generation:
        """Queue a request. Its answer grows as `step` is called. Raises UserError for a prompt that does not fit."""
        check_prompts(self.model, [request.prompt])
        if request.adapter is not None:
            adapters = adapter_set_of(self.model)
            if adapters is None or request.adapter not in adapters.names:
                raise UserError(f"adapter: the model has no adapter {request.adapter!r}.")
        generation = Generation(request, self.model.config.max_position_embeddings)
        turn = self._turns[request.owner] = max(self._turn, self._turns.get(request.owner, -1) + 1)
        generation.turn = turn
        bisect.insort(self._waiting, generation, key=lambda other: other.turn)
        return generation

    def forget_adapter(self, name: str) -> None:
        """Drop what is kept of conversations with an adapter. Raises UserError while a request uses it."""
        read = [member for members in self._reading.members for member in members] if self._reading else []
        if any(other.request.adapter == name for other in (*self._waiting, *read, *self._running)):
            raise UserError(f"{name}: answers with this adapter are being generated. Wait for them.")
        self._kept = [kept for kept in self._kept if kept.request.adapter != name]

    def cancel(self, generation: Generation, reason: str = "cancelled") -> None:
        """End a request that has not ended, wherever it is. `reason` becomes its answer's `stop`."""
        if generation.answer.stop:
            return
        generation.answer.stop = reason
        if generation in self._waiting:
            self._waiting.remove(generation)
        elif generation in self._running:
            self._remove_ended()
        elif self._reading is not None:
            for members in self._reading.members:
                if generation in members:
                    members.remove(generation)
            if not any(self._reading.members):
                self._reading = None

    def step(self) -> list[Generation]:
        """Continue every running answer by one token, or by two with drafts, and read waiting prompts -> the requests
        with new tokens (Generation.new_events), of which those with a `stop` have ended.
        """
        advanced = self._continue_running()
        self._remove_ended()
        if self._reading is None:
            self._reading = self._next_prompts()
        if self._reading is not None:
            advanced += self._read(self._reading)
            self._remove_ended()
        return advanced

    def _continue_running(self) -> list[Generation]:
        if not self._running:
            return []
        assert self._stepper is not None, "running rows have a cache"
        rows = list(self._running)
        with rows_of(self.model, [row.request.adapter for row in rows]):
            if self.drafting is not None:
                self.drafting.continue_rows(self._stepper, rows)
                return rows
            scores = self._stepper.extend([[row.answer.ids[-1]] for row in rows])
        choose_next(scores, rows, self.model.mesh)
        return rows

    def _next_prompts(self) -> _Prompts | None:
        """The next waiting prompts that are read together, if there is room for them."""
        room = self.max_running - len(self._running)
        groups: list[list[Generation]] = []
        widest = 0
        while self._waiting and room:
            first = self._waiting[0]
            widest = max(widest, len(first.request.prompt))
            if groups and (len(groups) + 1) * widest > self.prefill_tokens:
                break
            self._turn = first.turn
            members = [first]
            for other in list(self._waiting)[1:]:
                if len(members) < room and _has_same_prompt(first.request, other.request):
                    members.append(other)
            for member in members:
                self._waiting.remove(member)
            groups.append(members)
            room -= len(members)
        if not self._waiting:
            self._turns = {}
        return self._opened(groups) if groups else None

    def _opened(self, groups: list[list[Generation]]) -> _Prompts:
        beginnings: list[tuple[KVCache, int] | None] = []
        rest, tables = [], []
        for members in groups:
            request = members[0].request
            beginning = self._reusable(request)
            reused = 0 if beginning is None else beginning[1]
            self.num_reused += reused * len(members) + (len(request.prompt) - reused) * (len(members) - 1)
            for place, member in enumerate(members):
                member.num_reused = len(request.prompt) if place else reused
                member.began = time.monotonic()
            beginnings.append(beginning)
            rest.append(request.prompt[reused:])
            tables.append(request.open_pictures(reused) if request.open_pictures else None)
        stepper = CachedStepper(self.model, len(groups), records_experts=self.records_experts)
        if any(beginnings):
            stepper.cache.begin_with(beginnings, max(len(members[0].request.prompt) for members in groups))
        has_pictures = any(table is not None for table in tables)
        return _Prompts(groups, stepper, rest, PromptPictures(self.model, tables) if has_pictures else None)

    def _reusable(self, request: Request) -> tuple[KVCache, int] | None:
        """(the kept keys and values of the longest known beginning of a prompt, its length); None: nothing is known."""
        best, length = None, 0
        for kept in self._kept:
            common = _num_common(kept, request)
            if common > length:
                best, length = kept, common
        if best is None:
            return None
        self._kept.remove(best)
        self._kept.append(best)
        if self.drafting is not None:  # what the prediction block keeps of a token depends on the one behind it
            length -= 1
        return (best.cache, length) if length else None

    def _read(self, prompts: _Prompts) -> list[Generation]:
        """Give the model the next tokens of `prompts` -> the requests whose prompt is now read whole."""
        is_single = len(prompts.rest) == 1
        longest = min(self.prefill_tokens, prompts.stepper.piece_tokens)
        pieces = [rest[:longest] if is_single else rest for rest in prompts.rest]
        rest = [rest[len(piece) :] for rest, piece in zip(prompts.rest, pieces, strict=True)]
        scores, states = self._feed(prompts, pieces, rest)
        prompts.fed += len(pieces[0]) if is_single else 0
        prompts.rest = rest
        if any(len(rest) for rest in prompts.rest):
            return []
        self._reading = None
        return self._begin_answers(prompts, scores, states)

    def _feed(self, prompts: _Prompts, pieces: list[Sequence[int]], rest: list[Sequence[int]]) -> tuple[Any, Any]:
        """Feed a piece of each prompt -> (scores of the next tokens, hidden states for the drafts)."""
        with rows_of(self.model, [members[0].request.adapter if members else None for members in prompts.members]):
            if self.drafting is None:
                return prompts.stepper.extend(pieces, prompts.pictures, prompts.fed), None
            return self.drafting.read(prompts.stepper, pieces, [next(iter(row), None) for row in rest])

    def _begin_answers(self, prompts: _Prompts, scores: Any, states: Any) -> list[Generation]:
        """Choose the first token of prompts that are read whole; their rows join the running ones."""
        rows = [member for members in prompts.members for member in members]
        places = [place for place, members in enumerate(prompts.members) for _ in members]
        if places != list(range(len(prompts.members))):
            prompts.stepper.keep(places)
            scores, states = (None if each is None else each[places] for each in (scores, states))
        choose_next(scores, rows, self.model.mesh)
        if self.drafting is not None:
            with rows_of(self.model, [row.request.adapter for row in rows]):
                self.drafting.draft_first(prompts.stepper, states, rows)
        self._join(prompts.stepper, rows)
        return rows

    def _join(self, stepper: CachedStepper, rows: list[Generation]) -> None:
        if self._running:
            assert self._stepper is not None, "running rows have a cache"
            self._stepper.cache.add_rows(stepper.cache, self.max_running)
        else:
            self._stepper = stepper
        self._running += rows

    def _remove_ended(self) -> None:
        """Ended rows leave the batch; their keys and values may be kept."""
        going = [place for place, row in enumerate(self._running) if not row.answer.stop]
        if len(going) == len(self._running):
            return
        assert self._stepper is not None, "running rows have a cache"
        self._keep([place for place, row in enumerate(self._running) if row.answer.stop])
        # The last rows fill the gaps, so that few change their places.
        behind = [place for place in going if place >= len(going)]
        is_going = set(going)
        going = [place if place in is_going else behind.pop() for place in range(len(going))]
        self._running = [self._running[place] for place in going]
        if going:
            self._stepper.keep(going)
        else:
            self._stepper = None

    def _keep(self, places: list[int]) -> None:
        """Keep what is wanted of rows that have ended: their experts, their keys and values."""
        assert self._stepper is not None
        if self.records_experts:
            for place in places:
                self._running[place].experts = self._stepper.cache.notes_of(place)
        if not self.num_kept:
            return
        for place in [place for place in places if not self._running[place].error][-self.num_kept :]:
            row, cache = self._running[place], self._stepper.cache.copy([place])
            ids = [*row.request.prompt, *row.answer.ids][: int(cache.lengths[0])]
            self._kept.append(_Kept(ids, row.request, cache))
        del self._kept[: -self.num_kept]


def _has_same_prompt(one: Request, other: Request) -> bool:
    """Whether two requests can share the reading of their prompt."""
    return (
        (one.adapter, one.owner) == (other.adapter, other.owner)
        and one.picture_prompt is other.picture_prompt
        and one.open_pictures is other.open_pictures
        and len(one.prompt) == len(other.prompt)
        and list(one.prompt) == list(other.prompt)
    )


def _num_common(kept: _Kept, request: Request) -> int:
    """How many of the first tokens of a request's prompt, at most all but the last, a kept conversation begins with."""
    if (kept.request.adapter, kept.request.owner) != (request.adapter, request.owner):
        return 0
    common = 0
    for old, new in zip(kept.ids, request.prompt[:-1], strict=False):
        if old != new:
            break
        common += 1
    if request.picture_prompt is not None:
        return num_shared(kept.request.picture_prompt, request.picture_prompt, common)
    has_pictures = request.open_pictures is not None or kept.request.open_pictures is not None
    return 0 if has_pictures else common
