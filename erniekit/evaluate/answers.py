"""Generates the model's answers to the evaluation questions, and scores them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from erniekit.config import Config
from erniekit.data.records.data_file import Raw
from erniekit.data.records.dataset import Dataset
from erniekit.data.records.errors import BadLine, reading
from erniekit.data.records.formats import parse_record
from erniekit.data.records.readers import load_record
from erniekit.data.records.sample import Sample
from erniekit.data.vision.formats import parse_vision_record
from erniekit.data.vision.media import describe, unwrap
from erniekit.data.vision.parts import media_of
from erniekit.data.vision.plan import MediaPlan, plan_media
from erniekit.data.vision.prompt import PicturePrompt, picture_prompt
from erniekit.data.vision.sequence import MediaTokens
from erniekit.evaluate import text_metrics
from erniekit.evaluate.question_pictures import QuestionPictures
from erniekit.generation.decode import decode
from erniekit.generation.load import ChatModel, PreparedChatModel, sampling_of
from erniekit.generation.request import Answer
from erniekit.generation.thinking import CLOSE, opens_thought, split_thought
from erniekit.generation.tool_calls import read_calls
from erniekit.parallel import comm
from erniekit.rewards.call_answers import call_scores, same_calls
from erniekit.rewards.picture_answers import answer_score, picture_scores
from erniekit.utils import log
from erniekit.utils.wording import count_of

_BATCH = 128  # the number of questions that are answered at a time
_SHOWN = 3  # the number of too long questions that are named; the others are only counted


@dataclass(frozen=True)
class Question:
    """A question of a sample. `prompt_ids` is what the model continues, `prompt` the same as text; `in_thought` says
    that it ends inside a thought; `reference` is the sample's own answer, `where` its "file:line". `calls` are the
    calls of that answer; None in a conversation without tools. `pictures`: the images and videos of the prompt.
    """

    prompt_ids: list[int]
    prompt: str
    in_thought: bool
    reference: str
    where: str
    calls: list[dict[str, Any]] | None = None
    pictures: PicturePrompt | None = None


@dataclass(frozen=True)
class Prediction:
    """A question with the model's answer. `stop` as in decode.Answer, or "prompt too long" or "picture not readable"
    where there is none.
    """

    question: Question
    answer: str
    thought: str
    stop: str

    def record(self) -> dict[str, Any]:
        """The prediction as a line of eval_predictions.jsonl."""
        found: dict[str, Any] = {
            "prompt": self.question.prompt,
            "reference": self.question.reference,
            "prediction": self.answer,
        }
        if self.thought:
            found["thought"] = self.thought
        if self.question.calls is not None:
            calls = read_calls(self.answer).calls
            found |= {"tool_calls": calls, "tool_call_match": same_calls(calls, self.question.calls)}
        if self.question.pictures is not None:
            for kind in ("image", "video"):
                sources = [plan.part[kind] for plan in self.question.pictures.plans if plan.part["type"] == kind]
                found |= {f"{kind}s": [_path(source) for source in sources]} if sources else {}
            kind, value = answer_score(self.answer, self.question.reference)
            found |= {"reference_kind": kind, "score": value}
        correct = self.answer.strip() == self.question.reference.strip()
        return {**found, "exact_match": correct, "stop": self.stop, "source": self.question.where}


def read_questions(cfg: Config, dataset: Dataset, found: PreparedChatModel) -> list[Question]:
    """The last question of each sample, and before it, with what came before, every one whose answer calls tools. In
    the order of the files; of as many samples as max_evaluate_steps batches hold.
    """
    count = len(dataset)
    if cfg.max_evaluate_steps > 0 and cfg.max_evaluate_steps * cfg.batch_size < count:
        count = cfg.max_evaluate_steps * cfg.batch_size
        log.info(f"max_evaluate_steps: answering the first {count} of {len(dataset)} samples")
    questions: list[Question] = []
    skipped = 0
    for number in range(count):
        type_name, raw, where = dataset.record(number)
        try:
            questions += _questions_of(found, type_name, raw, where)
        except BadLine as error:
            if cfg.on_bad_line != "skip":
                raise
            skipped += 1
            if skipped <= _SHOWN:
                log.warning(f"not asked: {error}")
    if skipped:
        log.warning(f"on_bad_line: skip: not asked: {skipped} of {count_of(count, 'sample')}")
    unread = [q.where for q in questions if q.calls and not same_calls(read_calls(q.reference).calls, q.calls)]
    if unread:
        log.warning(
            f"chat template {found.template.name} writes calls otherwise than <tool_call>{{...}}</tool_call> "
            f"({unread[0]}): they are compared as text only"
        )
        questions = [replace(question, calls=None) for question in questions]
    return questions


def _questions_of(found: PreparedChatModel, type_name: str, raw: Raw, where: str) -> list[Question]:
    """The questions of a record. BadLine where it, or the header of one of its pictures, cannot be read."""
    with reading(where):
        record = load_record(raw, where)
        if found.vision is None:
            sample = parse_record(record, type_name, where)
        else:
            sample = parse_vision_record(record, type_name, where, found.vision.formats(where))
        if sample.answers is not None:  # a pair: the question's answer is the first turn of the chosen one
            sample = Sample([*sample.messages, sample.answers[0][0]], tools=sample.tools)
        assert sample.kind == "chat", "config/checks.py refuses plain text"
        plans: list[MediaPlan] = []
        if found.vision is not None:
            vision = found.vision
            reader = vision.formats(where).reader
            plans = plan_media(list(media_of(sample.messages)), reader, vision.settings, vision.video)
        return list(_questions(found, sample, plans, where))


def _questions(found: PreparedChatModel, sample: Sample, plans: list[MediaPlan], where: str) -> Iterator[Question]:
    """A sample's questions: the last, and those whose answers call tools. `plans`: its pictures and videos."""
    tokenizer, template, messages = found.tokenizer, found.template, sample.messages
    has_tools = bool(sample.tools) or any("tool_calls" in message for message in messages)
    for i, message in enumerate(messages):
        if i < len(messages) - 1 and "tool_calls" not in message:
            continue
        ids = template.prompt_ids(messages[:i], sample.tools, found.enable_thinking)
        prompt = tokenizer.decode(ids)
        in_thought = opens_thought(prompt)
        target = template.encode_all(messages[: i + 1], sample.tools)[-1][-1].ids[:-1]  # without its end token
        answer = tokenizer.decode(target)
        # An empty thought is part of the prompt, and the answer then comes without one.
        _, reference = split_thought(answer, in_thought and CLOSE in answer)
        calls = [call["function"] for call in message.get("tool_calls", [])] if has_tools else None
        pictures = None
        seen = plans[: sum(1 for _ in media_of(messages[:i]))] if plans else []
        if seen and found.vision is not None:
            pictures = picture_prompt(ids, seen, MediaTokens.of(tokenizer), found.vision)
            ids = pictures.ids
        yield Question(ids, prompt, in_thought, reference, where, calls, pictures)


def _within_context(questions: Sequence[Question], context: int) -> list[int]:
    """The numbers of the questions that leave room for an answer; a line names the others."""
    too_long = [question.where for question in questions if len(question.prompt_ids) >= context]
    if too_long:
        log.warning(
            f"counted as wrong: {len(too_long)} of {count_of(len(questions), 'question')}, too long for the model's "
            f"context of {context} tokens ({', '.join(too_long[:_SHOWN])}{', ...' if len(too_long) > _SHOWN else ''})"
        )
    return [i for i, question in enumerate(questions) if len(question.prompt_ids) < context]


def answer_questions(cfg: Config, opened: ChatModel, questions: Sequence[Question]) -> list[Prediction]:
    """The model's answers. A question too long for its context is not asked and has the answer "": it counts as wrong,
    and a line says how many there are.
    """
    asked = _within_context(questions, opened.model.config.max_position_embeddings)
    predictions = [Prediction(question, "", "", "prompt too long") for question in questions]
    pictures = QuestionPictures(
        [questions[i].pictures for i in asked], [questions[i].where for i in asked], cfg.on_bad_line == "skip"
    )
    answers = _decode(cfg, opened, [questions[i] for i in asked], pictures)
    failed = {row for rows in comm.gather_objects(pictures.failed, opened.model.mesh.data_group) for row in rows}
    for row, (i, answer) in enumerate(zip(asked, answers, strict=True)):
        if row in failed:
            predictions[i] = replace(predictions[i], stop="picture not readable")
            continue
        thought, text = split_thought(opened.tokenizer.decode(answer.ids), questions[i].in_thought)
        predictions[i] = Prediction(questions[i], text, thought, answer.stop)
    cut = sum(answer.stop == "length" for answer in answers)
    if cut:
        log.info(f"{cut} of {count_of(len(answers), 'answer')} cut at max_new_tokens: {cfg.max_new_tokens}")
    return predictions


def _decode(
    cfg: Config, opened: ChatModel, questions: Sequence[Question], pictures: QuestionPictures
) -> Sequence[Answer]:
    """Generate the answers, with a progress bar."""
    limits, sampling = opened.limits(cfg), sampling_of(cfg)
    how = "the likeliest token (temperature: 0)"
    if not sampling.greedy:
        how = f"drawn tokens (temperature: {cfg.temperature}, seed: {cfg.seed})"
    log.info(
        f"answering {count_of(len(questions), 'question')} with {how}, at most "
        f"{count_of(cfg.max_new_tokens, 'token')} each"
    )
    with progress_bar(cfg) as progress:
        task = progress.add_task("answers", total=len(questions))
        return decode(
            opened.model,
            [question.prompt_ids for question in questions],
            limits,
            sampling,
            batch_size=_BATCH,
            on_answer=lambda row, answer: progress.advance(task, opened.model.mesh.degrees.data),
            pictures=pictures if any(question.pictures for question in questions) else None,
        )


def score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The metrics of text_metrics over all predictions, those of call_answers over the ones that have tools, and those
    of picture_answers over the ones that have pictures.
    """
    found = [prediction.answer for prediction in predictions]
    expected = [prediction.question.reference for prediction in predictions]
    accuracy, macro_f1, num_labels = text_metrics.classification(found, expected)
    bleu, tokenization = text_metrics.bleu(found, expected)
    with_tools = [prediction for prediction in predictions if prediction.question.calls is not None]
    answers = [read_calls(prediction.answer) for prediction in with_tools]
    calls: dict[str, Any] = {}
    if with_tools:
        calls = call_scores([a.calls for a in answers], [p.question.calls or [] for p in with_tools])
        calls["num_unreadable_calls"] = sum(answer.unreadable for answer in answers)
    about_pictures = [prediction for prediction in predictions if prediction.question.pictures is not None]
    pictures = picture_scores([p.answer for p in about_pictures], [p.question.reference for p in about_pictures])
    return (
        {
            "num_answers": len(predictions),
            "exact_match": text_metrics.exact_match(found, expected),
            "accuracy": accuracy,
            "macro_f1": macro_f1,
            "num_labels": num_labels,
            "rouge_l": text_metrics.rouge_l(found, expected),
            "bleu": bleu,
            "bleu_tokenization": tokenization,
        }
        | calls
        | pictures
    )


def _path(source: Any) -> Any:
    """The source of a picture or video as the record names it; a short name of one that the record contains."""
    if isinstance(source, list | tuple):
        return [_path(frame) for frame in source]
    plain = unwrap(source)
    return plain if isinstance(plain, str) and plain[:5].lower() != "data:" else describe(plain)


def progress_bar(cfg: Config) -> Progress:
    """A bar on stderr; nothing where there is no terminal or disable_tqdm says so."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=cfg.disable_tqdm or not console.is_terminal)
