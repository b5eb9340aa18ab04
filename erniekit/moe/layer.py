"""The sparse feed-forward layer: router, dispatch, experts, combine, shared experts; for one modality or for two.

With two modalities (ERNIE 4.5 technical report, "modality-isolated routing") a token's modality decides its router and
its group of experts. Shared experts serve both modalities. Legend: T tokens, D model, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import paddle
from paddle import nn

from erniekit.moe import device_dispatch, dispatch, few_tokens
from erniekit.moe.all_to_all import ExpertRanks
from erniekit.moe.choices import RecordedChoices, num_changed
from erniekit.moe.experts import Experts
from erniekit.moe.router import Gate, RouterOptions, RouterStatics, Routing, route, within_capacity
from erniekit.nn.mlp import SwiGLU
from erniekit.nn.narrow import add, concat, gather
from erniekit.nn.roles import Component
from erniekit.parallel.process_group import Group
from erniekit.utils import heartbeat

TEXT, VISION = 0, 1
Finish = Callable[[], paddle.Tensor]
# (experts [T, K] that were chosen, the numbers of these tokens or None for all, the number of all tokens)
OnRouting = Callable[[np.ndarray, np.ndarray | None, int], None]
# (number of the layer, experts [T, K] that were chosen, the numbers of these tokens or None for all)
NoteChoice = Callable[[int, np.ndarray, np.ndarray | None], None]


@dataclass(frozen=True)
class MoESizes:
    """The sizes of a sparse layer.

    `intermediate_sizes`: the width of one expert, for text and, where there is a second entry, for vision.
    `num_shared` experts of the text width process every token; 0 means none. These are the whole layer's; this process
    has one of `expert_shares` shards of the experts and one of `tensor_degree` shards of the shared ones.
    """

    hidden_size: int
    intermediate_sizes: tuple[int, ...]
    num_experts: int
    num_shared: int
    bias: bool
    init_std: float
    expert_shares: int = 1
    tensor_degree: int = 1

    @property
    def num_local_experts(self) -> int:
        """The number of experts of this process."""
        return self.num_experts // self.expert_shares


@dataclass(frozen=True)
class TokenInfo:
    """What a sparse layer needs to know about T tokens: `row_lengths` (sums to T) of the packed rows, over which load
    and capacity are counted; `modality` [T], 0 text and 1 vision, None for all text. `shares`: where these are a part
    of the rows' tokens, what is known of the whole rows. `recorded`: the experts that they were sent to before; `note`:
    keeps those of this pass.
    """

    row_lengths: list[int]
    modality: np.ndarray | None = None
    shares: "RowShares | None" = None
    recorded: RecordedChoices | None = None
    note: NoteChoice | None = None

    def of_modality(self, modality: int) -> tuple[np.ndarray, list[int]]:
        """The numbers of a modality's tokens, and how many each row has (rows without any are left out, unless another
        rank has some).
        """
        numbers = self.count_modality(modality)
        listed = numbers if self.shares is None else self.shares.whole.count_modality(modality)
        return np.flatnonzero(self.modality == modality), [n for n, known in zip(numbers, listed, strict=True) if known]

    @cached_property
    def places(self) -> tuple[list[paddle.Tensor], paddle.Tensor]:
        """The numbers of each modality's tokens, on the device, and where each token is once they lie one modality
        behind the other. Uploaded once, for all layers.
        """
        numbers = [np.flatnonzero(self.modality == modality) for modality in (TEXT, VISION)]
        return [paddle.to_tensor(each) for each in numbers], paddle.to_tensor(np.argsort(np.concatenate(numbers)))

    def count_modality(self, modality: int) -> list[int]:
        """How many tokens of a modality each row has."""
        assert self.modality is not None
        rows = np.repeat(np.arange(len(self.row_lengths)), self.row_lengths)
        return np.bincount(rows[self.modality == modality], minlength=len(self.row_lengths)).tolist()


@dataclass(frozen=True)
class RowShares:
    """What a context rank knows of the rows that its group shares: `whole` has all of their tokens."""

    group: Group
    whole: TokenInfo

    def lengths(self, modality: int) -> list[int]:
        """The tokens of a modality in each row that has some; of all text, in each row."""
        if self.whole.modality is None:
            return self.whole.row_lengths
        return [n for n in self.whole.count_modality(modality) if n]


class Routed(NamedTuple):
    """A router's decision with what was counted on the host: `usage` [E], the number of tokens that were sent to each
    expert; `dropped`, the pairs beyond the capacity; `row_lengths` of the routed tokens. Where choices were recorded
    before, `changed` counts the tokens that were sent to other experts, and `disagreeing` those for which the router by
    itself would choose others; None: there was no record. `share`: of whole rows, where context ranks have parts of
    them.
    """

    routing: Routing
    usage: np.ndarray
    dropped: int
    row_lengths: list[int]
    changed: int | None = None
    disagreeing: int | None = None
    share: "RowShare | None" = None


class RowShare(NamedTuple):
    """The rows that context ranks share, and how many tokens of the router's modality each has on all of them."""

    group: Group
    row_lengths: list[int]


class MoELayer(nn.Layer):
    """y = sum_k w_k Expert_k(x) + Shared(x)."""

    def __init__(self, sizes: MoESizes, options: RouterOptions) -> None:
        super().__init__()
        self.sizes, self.options = sizes, options
        modalities = len(sizes.intermediate_sizes)
        self.gate = Gate(sizes.hidden_size, sizes.num_experts, modalities, sizes.init_std)
        self.moe_statics = RouterStatics(modalities, sizes.num_experts)
        self.ranks: ExpertRanks | None = None  # set by parallelize() where the experts are sharded over processes
        self.on_routing: OnRouting | None = None  # called with each choice of experts, where it is set
        widths = sizes.intermediate_sizes
        self.experts = Experts(sizes.num_local_experts, sizes.hidden_size, widths[TEXT], sizes.init_std)
        if modalities == 2:
            self.vision_experts = Experts(sizes.num_local_experts, sizes.hidden_size, widths[VISION], sizes.init_std)
            self.vision_experts.component = Component.VISION_EXPERTS
        self.shared_experts = None
        if sizes.num_shared:
            width = widths[TEXT] * sizes.num_shared // sizes.tensor_degree
            self.shared_experts = SwiGLU(sizes.hidden_size, width, bias=sizes.bias, init_std=sizes.init_std)

    def all_experts(self) -> list[Experts]:
        """The routed experts of each modality."""
        return [self.experts] if len(self.sizes.intermediate_sizes) == 1 else [self.experts, self.vision_experts]

    @property
    def correction_bias(self) -> paddle.Tensor:
        """The routers' correction biases [modalities, E], fp32: the tensor itself, for in-place updates."""
        return self.moe_statics.e_score_correction_bias

    def bias_of(self, modality: int) -> paddle.Tensor:
        """The correction bias [E] of a modality's router."""
        return self.correction_bias[modality]

    def router_of(self, modality: int) -> paddle.Tensor:
        """The matrix [D, E] of a modality's router."""
        return self.gate.matrix(modality)

    def forward(
        self, x_TD: paddle.Tensor, tokens: TokenInfo, number: int = -1
    ) -> tuple[paddle.Tensor, dict[int, Routed]]:
        """[T, D] -> ([T, D], what each modality's router decided; nothing in a decoding step, which counts nothing).
        `number`: of the layer, by which choices are recorded and found again.
        """
        if self._has_few(x_TD, tokens):
            return self._of_few(x_TD, tokens, number), {}
        all_TD = x_TD if self.ranks is None else self.ranks.enter(x_TD)
        num_rows, num_tokens = all_TD.shape[0], sum(tokens.row_lengths)
        all_TD = all_TD if num_rows == num_tokens else all_TD[:num_tokens]
        if tokens.modality is None:
            finish, routed = self._start(all_TD, TEXT, tokens.row_lengths, None, _Choosing(tokens, number))
            decisions = {TEXT: _with_share(routed, tokens, TEXT)}
        else:
            finish, decisions = self._by_modality(all_TD, tokens, number)
        # The shared experts run between start and finish, while tokens are sent to the routed ones.
        shared = None if self.shared_experts is None else self.shared_experts(x_TD)
        y = finish()
        if num_rows != num_tokens:
            y = concat([y, paddle.zeros([num_rows - num_tokens, y.shape[1]], dtype=y.dtype)])
        if self.ranks is not None:
            y = self.ranks.leave(y)
        return y if shared is None else add(y, shared), decisions

    def _has_few(self, x_TD: paddle.Tensor, tokens: TokenInfo) -> bool:
        """Whether these are a few tokens of text, of a decoding step in one process."""
        is_text = tokens.modality is None or not tokens.modality.any()
        return self.ranks is None and is_text and few_tokens.applies(x_TD)

    def _of_few(self, x_TD: paddle.Tensor, tokens: TokenInfo, number: int) -> paddle.Tensor:
        logits, bias = (np.from_dlpack(each) for each in (self.gate(x_TD, TEXT), self.correction_bias))
        chosen, weights = few_tokens.route(logits, bias[TEXT], self.options)
        if self.on_routing is not None:
            self.on_routing(chosen, None, len(chosen))
        if tokens.note is not None:
            tokens.note(number, chosen, None)
        y = few_tokens.run(x_TD, self.experts, chosen, weights)
        return y if self.shared_experts is None else add(y, self.shared_experts(x_TD))

    def _by_modality(self, x_TD: paddle.Tensor, tokens: TokenInfo, number: int) -> tuple[Finish, dict[int, Routed]]:
        """Run each modality's tokens through its own router and experts. Vision is skipped where it has no tokens,
        unless other ranks may need its experts.
        """
        finishes, decisions = [], {}
        numbers, back = tokens.places
        needed = self.ranks is not None and self.ranks.expert.size > 1
        for modality in (TEXT, VISION):
            where, row_lengths = tokens.of_modality(modality)
            # Context ranks count the loads of their rows together, also those that have none of a row's tokens.
            counted = len(where) or (tokens.shares is not None and row_lengths)
            if modality == TEXT or counted or needed:
                selected = gather(x_TD, numbers[modality])
                finish, routed = self._start(selected, modality, row_lengths, where, _Choosing(tokens, number))
                finishes.append(finish)
                if counted:
                    decisions[modality] = _with_share(routed, tokens, modality)
        return lambda: gather(concat([finish() for finish in finishes]), back), decisions

    def _logits(self, x_TD: paddle.Tensor, modality: int) -> paddle.Tensor:
        """The router's scores [T, E] before softmax or sigmoid."""
        # The text router always runs: a rank without tokens has the graph of the others, and gradients of zero. The
        # vision router has no gradient without tokens, as in a process that skips it.
        if modality == TEXT or x_TD.shape[0] > 0:
            return self.gate(x_TD, modality)
        logits = paddle.zeros([0, self.sizes.num_experts])
        # Ranks that exchange routing weights must all exchange the gradients of these, or none of them.
        logits.stop_gradient = x_TD.stop_gradient and self.router_of(modality).stop_gradient
        return logits

    def _start(
        self,
        x_TD: paddle.Tensor,
        modality: int,
        row_lengths: list[int],
        where: np.ndarray | None,
        choosing: "_Choosing",
    ) -> tuple[Finish, Routed]:
        """Route the tokens and start to send them; the function that is returned gives the weighted sum [T, D].
        `where`: their numbers among those of the pass; None: they are all of them.
        """
        num_experts = self.sizes.num_experts
        agree = None if self.ranks is None else self.ranks.agree
        logits = self._logits(x_TD, modality)
        recorded = choosing.recorded(where)
        replayed = recorded if choosing.replays else None
        given = None if replayed is None else paddle.to_tensor(replayed)
        routing = route(logits, self.bias_of(modality), self.options, agree, given)
        # The one read of a sparse layer: products of dropless experts have sizes that depend on the choice.
        with heartbeat.device_read():
            preferred = (routing.experts if routing.preferred is None else routing.preferred).numpy()
        chosen = preferred if replayed is None else replayed
        choosing.note(chosen, where)
        usage = np.bincount(chosen.reshape(-1), minlength=num_experts)
        keep, dropped = None, 0
        if self.options.capacity is not None and self.training:
            keep = within_capacity(chosen, num_experts, self.options.capacity, row_lengths)
            dropped = int((~keep).sum())
        experts = self.experts if modality == TEXT else self.vision_experts
        weights = routing.weights
        if self.ranks is not None:
            local = self.ranks.local_pairs(chosen, self.sizes.num_local_experts)
            keep = local if keep is None else keep & local
            x_TD, weights = self.ranks.copy(x_TD), self.ranks.copy(weights)
        rows, of_rows, counts, add_up = _dispatch(
            x_TD, weights, routing.experts, chosen, num_experts, keep, experts.takes_weights, self.on_routing is None
        )
        done = None if self.ranks is None else self.ranks.start(experts, rows, of_rows, counts, len(chosen))

        def finish() -> paddle.Tensor:
            if self.on_routing is not None:
                self.on_routing(chosen, where, choosing.num_tokens)
            return add_up(experts(rows, counts, of_rows) if done is None else done())

        if recorded is None:
            return finish, Routed(routing, usage, dropped, row_lengths)
        changed, disagreeing = num_changed(chosen, recorded), num_changed(preferred, recorded)
        return finish, Routed(routing, usage, dropped, row_lengths, changed, disagreeing)


@dataclass(frozen=True)
class _Choosing:
    """What a pass says of the choices of layer `number`."""

    tokens: TokenInfo
    number: int

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens.row_lengths)

    @property
    def replays(self) -> bool:
        return self.tokens.recorded is not None and self.tokens.recorded.replays

    def recorded(self, where: np.ndarray | None) -> np.ndarray | None:
        return None if self.tokens.recorded is None else self.tokens.recorded.of(self.number, where)

    def note(self, chosen_TK: np.ndarray, where: np.ndarray | None) -> None:
        if self.tokens.note is not None:
            self.tokens.note(self.number, chosen_TK, where)


def _with_share(routed: Routed, tokens: TokenInfo, modality: int) -> Routed:
    """The decision with what is known of whole rows."""
    shares = tokens.shares
    return routed if shares is None else routed._replace(share=RowShare(shares.group, shares.lengths(modality)))


def _dispatch(
    x_TD: paddle.Tensor,
    weights_TK: paddle.Tensor,
    experts_TK: paddle.Tensor,
    on_host_TK: np.ndarray,
    num_experts: int,
    keep_TK: np.ndarray | None,
    weigh_rows: bool,
    may_sort_on_device: bool,
) -> tuple[paddle.Tensor, paddle.Tensor | None, list[int], Callable[[paddle.Tensor], paddle.Tensor]]:
    """The tokens' copies sorted by expert [R, D]; their routing weights [R, 1], if the experts take these
    (`weigh_rows`); the number of each expert's rows; and the function that sums the experts' outputs [R, D] -> [T, D],
    weighing them unless the experts do. Where the rows are sorted on the host, tokens of one expert keep their order.
    """
    num_pairs = on_host_TK.size if keep_TK is None else int(keep_TK.sum())
    # Both modules have the same functions.
    on_device = may_sort_on_device and device_dispatch.applies(x_TD, num_pairs, num_experts, on_host_TK.shape[1])
    by: ModuleType = device_dispatch if on_device else dispatch
    if on_device:
        pairs: Any = device_dispatch.assign(experts_TK, weights_TK, on_host_TK, num_experts, keep_TK)
    else:
        pairs = dispatch.assign(on_host_TK, num_experts, keep_TK)
    rows = by.dispatch(x_TD, pairs)
    if weigh_rows:
        return rows, by.row_weights(weights_TK, pairs), pairs.counts, lambda made: by.sum_rows(made, pairs)
    return rows, None, pairs.counts, lambda made: by.combine(made, weights_TK, pairs)
