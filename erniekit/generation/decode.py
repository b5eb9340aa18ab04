"""Answers to a list of prompts: offline batches through the engine, and one prompt token by token.

Several ranks may share the model, in any layout of its mesh (models/stages.py): each of them runs the loop.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from erniekit.generation.choosing import choose_next
from erniekit.generation.engine import Engine
from erniekit.generation.request import Answer, Generation, Limits, Request, check_prompts, report_full
from erniekit.generation.sampling import Sampling
from erniekit.generation.steppers import Stepper, UncachedStepper
from erniekit.models.decoder import CausalLM
from erniekit.models.pictures import PictureTables
from erniekit.models.stages import finish_passes
from erniekit.parallel import comm
from erniekit.parallel.process_group import Group

OnToken = Callable[[int, int], None]  # (row of the prompt, token), as each token is chosen


class PromptTables(Protocol):
    """The images and videos of prompts by the number of the prompt, None for text alone. They may be decoded when they
    are asked for: each is, once, for the batch that its prompt is in.
    """

    def __getitem__(self, row: int, /) -> PictureTables | None: ...


def _ignore(row: int, what: object) -> None:
    """The default callback, which ignores the event."""


def decode(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    sampling: Sampling,
    *,
    batch_size: int = 128,
    use_cache: bool = True,
    on_token: OnToken = _ignore,
    on_answer: Callable[[int, Answer], None] = _ignore,
    pictures: PromptTables | None = None,
) -> list[Answer]:
    """Answer each prompt (token ids, at least one each). The result is in the order of the prompts and does not depend
    on how they share batches, nor on the ranks that hold the model.

    Up to `batch_size` prompts are answered at a time, the longest first; a row that has ended makes room for the next.
    Row i draws from its own random generator, made of (sampling.seed, i). on_token sees each token as it is chosen, the
    end token too; on_answer each finished answer. `pictures`: the images and videos of each prompt. Raises UserError
    for a prompt that does not fit the model.

    Every rank of the model's mesh calls it with the same arguments and gets all answers. Data ranks share the prompts:
    on_token and on_answer see those of this rank. A model in training mode answers in eval mode.
    """
    check_prompts(model, prompts)
    mesh, context = model.mesh, model.config.max_position_embeddings
    by_length = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    share = by_length[mesh.data :: mesh.degrees.data]
    answers = [Answer() for _ in prompts]

    def request(row: int) -> Request:
        tables = None if pictures is None else partial(_tables_of_row, pictures, row)
        return Request(prompts[row], limits, sampling, row, open_pictures=tables)

    def report(row: int, generation: Generation) -> None:
        on_token(row, generation.answer.all_ids[-1])
        if generation.answer.stop:
            answers[row] = generation.answer
            on_answer(row, generation.answer)

    with eval_mode(model):
        if use_cache:
            engine = Engine(model, batch_size)
            rows = {id(generation): row for row in share if (generation := engine.add(request(row)))}
            while not engine.is_idle:
                for generation in engine.step():
                    report(rows[id(generation)], generation)
        else:
            for row in share:
                generation = Generation(request(row), context)
                for _ in _uncached(model, generation):
                    report(row, generation)
        finish_passes(model)
    answers = _from_data_ranks(answers, share, mesh.data_group)
    report_full(answers, model)
    return answers


def _tables_of_row(pictures: PromptTables, row: int, start: int) -> PictureTables | None:
    """The images and videos of one prompt, which is read from its first token on."""
    assert start == 0, "keys and values of pictures are reused for conversations only"
    return pictures[row]


def _uncached(model: CausalLM, generation: Generation) -> Iterator[None]:
    """Answer one request by running the whole sequence for each token."""
    stepper, request = UncachedStepper(model, 1), generation.request
    new, tables = request.prompt, request.open_pictures(0) if request.open_pictures else None
    while not generation.answer.stop:
        new = choose_next(stepper.feed([new], None if tables is None else [tables]), [generation], model.mesh)
        yield


@contextmanager
def eval_mode(model: CausalLM) -> Iterator[None]:
    """Run a block in eval mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def _from_data_ranks(answers: list[Answer], share: Sequence[int], data_group: Group) -> list[Answer]:
    """All answers, of which each data rank has made those of its `share`."""
    if data_group.size == 1:
        return answers
    mine = [(row, answers[row].ids, answers[row].stop, answers[row].stop_id) for row in share]
    for part in comm.gather_objects(mine, data_group):
        for row, ids, stop, stop_id in part:
            answers[row] = Answer(ids, stop, stop_id)
    return answers


def decode_one(
    model: CausalLM,
    prompt: Sequence[int],
    stepper: Stepper,
    num_cached: int,
    limits: Limits,
    sampling: Sampling,
    turn: int = 0,
    pictures: PictureTables | None = None,
) -> Iterator[Answer]:
    """Answer one prompt token by token: yields the growing answer after each token, the last time with `stop` set.

    `stepper` (of one row) has cached the first `num_cached` tokens of the prompt, which are not all of it; `pictures`
    are the images and videos of the others. The random generator is made of (sampling.seed, turn). All ranks of one
    copy of the model call it alike.
    """
    check_prompts(model, [prompt])
    generation = Generation(Request(prompt, limits, sampling, turn), model.config.max_position_embeddings)
    new, new_pictures = prompt[num_cached:], None if pictures is None else [pictures]
    while not generation.answer.stop:
        new = choose_next(stepper.feed([new], new_pictures), [generation], model.mesh)
        new_pictures = None
        yield generation.answer
    report_full([generation.answer], model)
