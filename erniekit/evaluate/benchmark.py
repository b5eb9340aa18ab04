"""`erniekit eval` with `eval_benchmark`: multiple-choice questions with four options (MMLU, C-Eval, CMMLU)."""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from erniekit.config import Config
from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.evaluate.answers import progress_bar
from erniekit.evaluate.benchmark_files import LETTERS, ChoiceQuestion, by_subject, fingerprint, read_split
from erniekit.evaluate.benchmark_prompts import BENCHMARKS, Benchmark
from erniekit.evaluate.continuations import log_likelihoods
from erniekit.generation.decode import decode
from erniekit.generation.load import ChatModel, PreparedChatModel, find_model, sampling_of
from erniekit.generation.thinking import opens_thought, split_thought
from erniekit.join import require_same_files
from erniekit.models.pipeline_layout import chunks_to_use
from erniekit.parallel.agree import all_or_none
from erniekit.parallel.mesh import Mesh
from erniekit.rewards.picture_answers import option_of
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, EvaluationError
from erniekit.utils.wording import count_of

_KEY = "eval_benchmark_path"
_BATCH = 128  # the number of questions that are answered at a time
_SHOWN = 3  # the number of cut prompts that are named; the others are only counted


@dataclass(frozen=True)
class _BenchmarkPrompt:
    """A question as the model sees it: token ids, the same as text, and whether the text ends inside a thought."""

    item: ChoiceQuestion
    ids: list[int]
    prompt: str
    in_thought: bool


@dataclass(frozen=True)
class Choice:
    """A question with what the model chose, 0 to 3; None where its answer names no option. `scores`: the
    log-probabilities of the four letters, or `answer` and `thought`: what the model wrote.
    """

    item: ChoiceQuestion
    chosen: int | None
    scores: tuple[float, ...] = ()
    answer: str | None = None
    thought: str = ""
    exact: bool = False

    @property
    def is_right(self) -> bool:
        """Whether the right option was chosen."""
        return self.chosen == self.item.answer

    def record(self) -> dict[str, Any]:
        """The choice as a line of eval_predictions.jsonl."""
        found: dict[str, Any] = {"subject": self.item.subject, "question": self.item.question}
        found |= {"reference": LETTERS[self.item.answer]}
        found |= {"prediction": None if self.chosen is None else LETTERS[self.chosen]}
        if self.answer is None:
            found["logprobs"] = dict(zip(LETTERS, self.scores, strict=True))
        else:
            found |= {"answer": self.answer, "exact_match": self.exact}
            found |= {"thought": self.thought} if self.thought else {}
        return found | {"correct": self.is_right, "source": self.item.where}


def measure_benchmark(cfg: Config, mesh: Mesh) -> tuple[dict[str, Any], list[Choice]]:
    """The results of the benchmark `eval_benchmark`, and each question with the model's choice; nothing is written.

    With `eval_benchmark_mode: loglikelihood` the model chooses the letter to which it gives the highest probability
    behind the prompt (the first of equal ones), with `generate` the one that its answer names. `accuracy` is the share
    of right choices over all questions, `accuracy_macro` the mean over the subjects, `accuracy_stderr` the standard
    error of `accuracy`, pooled over the subjects (None where no subject has two questions).

    Every rank calls it and gets the same. Raises UserError that names the key, or file and line.
    """
    assert cfg.eval_benchmark is not None and cfg.eval_benchmark_path is not None, "config/checks.py requires both"
    benchmark = BENCHMARKS[cfg.eval_benchmark]
    with all_or_none(mesh.world_group):
        found = find_model(cfg)
        chunks = chunks_to_use(cfg, found.prepared.config, mesh.degrees, mesh.pipe)
        root = Path(cfg.eval_benchmark_path)
        questions = read_split(root, benchmark.split, _KEY)
        examples = _examples(cfg, root, questions)
    read = {_KEY: [fingerprint(questions), *(fingerprint(shown) for shown in examples.values())]}
    require_same_files(found.prepared.path, found.prepared.adapter_dir, read, mesh.world_group)
    asked = [_ask(cfg, found, benchmark, item, examples.get(item.subject, [])) for item in questions]
    generates = cfg.eval_benchmark_mode == "generate"
    reserve = cfg.max_new_tokens if generates else 0
    asked, num_cut = _within_context(asked, found.prepared.config.max_position_embeddings - reserve)
    log.info(
        f"{cfg.eval_benchmark}: {count_of(len(questions), 'question')} of "
        f"{count_of(len(by_subject(questions)), 'subject')}, {count_of(cfg.num_fewshot, 'example')} each, "
        f"{cfg.eval_benchmark_mode}"
    )
    opened = found.load(mesh, chunks)  # keys and data are checked: from here on weights are read
    choices = (_by_generation if generates else _by_likelihood)(cfg, opened, asked)
    results: dict[str, Any] = {
        "model": str(opened.path),
        "benchmark": cfg.eval_benchmark,
        "eval_benchmark_mode": cfg.eval_benchmark_mode,
        "num_fewshot": cfg.num_fewshot,
        "chat_template": found.template.name if cfg.eval_chat_template else None,
        "num_samples": len(choices),
        "num_cut_prompts": num_cut,
    }
    return results | summarise(choices, generates), choices


def summarise(choices: Sequence[Choice], generated: bool) -> dict[str, Any]:
    """The scores of all questions and of each subject."""
    subjects: dict[str, list[Choice]] = {}
    for choice in choices:
        subjects.setdefault(choice.item.subject, []).append(choice)
    sizes = {name: len(group) for name, group in subjects.items()}
    accuracies = {name: sum(choice.is_right for choice in group) / len(group) for name, group in subjects.items()}
    results: dict[str, Any] = {
        "accuracy": sum(choice.is_right for choice in choices) / len(choices),
        "accuracy_stderr": _pooled_error([(accuracies[name], sizes[name]) for name in subjects]),
        "accuracy_macro": sum(accuracies.values()) / len(accuracies),
    }
    if generated:
        results["exact_match"] = sum(choice.exact for choice in choices) / len(choices)
        results["num_without_choice"] = sum(choice.chosen is None for choice in choices)
    results["subjects"] = {
        name: {
            "accuracy": accuracies[name],
            "accuracy_stderr": _pooled_error([(accuracies[name], sizes[name])]),
            "num_samples": sizes[name],
        }
        for name in subjects
    }
    return results


def _pooled_error(subjects: Sequence[tuple[float, int]]) -> float | None:
    """The standard error of the accuracy over all questions from (accuracy, questions) of each subject: the subjects'
    sample variances are pooled, weighted by their degrees of freedom.
    """
    total = sum(size for _, size in subjects)
    freedom = total - len(subjects)
    if not freedom:
        return None
    variance = sum(size * accuracy * (1 - accuracy) for accuracy, size in subjects) / freedom
    return math.sqrt(variance / total)


def print_benchmark(results: dict[str, Any]) -> None:
    """The accuracies as a table on stdout."""
    table = Table()
    for title in ("subject", "questions", "accuracy", "standard error"):
        table.add_column(title, justify="left" if title == "subject" else "right")
    for name, row in results["subjects"].items():
        table.add_row(name, str(row["num_samples"]), f"{row['accuracy']:.2%}", _shown(row["accuracy_stderr"]))
    table.add_section()
    error = _shown(results["accuracy_stderr"])
    table.add_row("all questions (micro)", str(results["num_samples"]), f"{results['accuracy']:.2%}", error)
    table.add_row("mean of the subjects (macro)", "", f"{results['accuracy_macro']:.2%}", "")
    if "exact_match" in results:
        table.add_row("answers that are the letter alone", "", f"{results['exact_match']:.2%}", "")
    console = Console()
    with console.capture() as text:  # printed by us: where nobody reads, a console ends the process by itself
        how = f"{results['benchmark']}, {count_of(results['num_fewshot'], 'example')}, {results['eval_benchmark_mode']}"
        console.print(f"{results['model']}: {how}", markup=False, soft_wrap=True)
        console.print(table)
    print(text.get(), end="", flush=True)


def _shown(error: float | None) -> str:
    return "" if error is None else f"{error:.2%}"


def _examples(cfg: Config, root: Path, questions: Sequence[ChoiceQuestion]) -> dict[str, list[ChoiceQuestion]]:
    """The first `num_fewshot` questions of the split dev of each subject."""
    if not cfg.num_fewshot:
        return {}
    dev = by_subject(read_split(root, "dev", _KEY))
    for subject in by_subject(questions):
        count = len(dev.get(subject, []))
        if count < cfg.num_fewshot:
            raise ConfigError(
                f"num_fewshot: {cfg.num_fewshot}, and the split dev of {subject} in {root} has "
                f"{count_of(count, 'question')}. Set num_fewshot to {count}, or add examples."
            )
    return {subject: dev[subject][: cfg.num_fewshot] for subject in by_subject(questions)}


def _ask(
    cfg: Config, found: PreparedChatModel, benchmark: Benchmark, item: ChoiceQuestion, examples: list[ChoiceQuestion]
) -> _BenchmarkPrompt:
    if not cfg.eval_chat_template:
        prompt = benchmark.prompt(item, examples)
        return _BenchmarkPrompt(item, found.tokenizer.encode_plain(prompt), prompt, in_thought=False)
    ids = found.template.prompt_ids(benchmark.messages(item, examples), None, found.enable_thinking)
    prompt = found.tokenizer.decode(ids)
    return _BenchmarkPrompt(item, ids, prompt, opens_thought(prompt))


def _within_context(asked: Sequence[_BenchmarkPrompt], context: int) -> tuple[list[_BenchmarkPrompt], int]:
    """The questions, of prompts that do not fit only their last `context` tokens, and the number of those."""
    if context < 1:
        raise ConfigError("max_new_tokens: leaves no room for a prompt in the model's context. Lower it.")
    cut = [each.item.where for each in asked if len(each.ids) > context]
    if cut:
        log.warning(
            f"{len(cut)} of {count_of(len(asked), 'prompt')} longer than {context} tokens: the beginning is left out "
            f"({', '.join(cut[:_SHOWN])}{', ...' if len(cut) > _SHOWN else ''}). A smaller num_fewshot avoids it."
        )
    return [replace(each, ids=each.ids[-context:]) for each in asked], len(cut)


def _by_likelihood(cfg: Config, opened: ChatModel, asked: Sequence[_BenchmarkPrompt]) -> list[Choice]:
    """Choose the letters to which the model gives the highest probabilities."""
    pairs = [(each.ids, _letter_ids(opened.tokenizer, each, letter, cfg)) for each in asked for letter in LETTERS]
    with progress_bar(cfg) as progress:
        task = progress.add_task("questions")
        scores = log_likelihoods(
            opened.model, pairs, cfg.batch_size, lambda done, total: progress.update(task, completed=done, total=total)
        )
    if not all(map(math.isfinite, scores)):
        raise EvaluationError(
            f"{opened.path}: a letter's log-probability is not finite: the weights are not finite, or too large. "
            "Evaluate an earlier checkpoint (checkpoint: ...)."
        )
    choices = []
    for number, each in enumerate(asked):
        of_letters = tuple(scores[number * len(LETTERS) : (number + 1) * len(LETTERS)])
        choices.append(Choice(each.item, of_letters.index(max(of_letters)), of_letters))
    return choices


def _letter_ids(tokenizer: Tokenizer, asked: _BenchmarkPrompt, letter: str, cfg: Config) -> list[int]:
    """The tokens of a letter behind the prompt: as they are written there, so a space may be part of them."""
    if cfg.eval_chat_template:
        return tokenizer.encode_plain(letter)
    whole = tokenizer.encode_plain(f"{asked.prompt} {letter}")
    return whole[len(tokenizer.encode_plain(asked.prompt)) :]


def _by_generation(cfg: Config, opened: ChatModel, asked: Sequence[_BenchmarkPrompt]) -> list[Choice]:
    """Let the model write, and read the letters that its answers name. Without a chat template the first line is the
    answer, since the model may continue with a question of its own.
    """
    tokenizer, limits = opened.tokenizer, opened.limits(cfg)
    ends = limits.stop_ids
    if not cfg.eval_chat_template:
        limits = replace(limits, stop_ids=tuple(sorted({*ends, *_line_ends(tokenizer, opened)})))
    prompts, copies = [each.ids for each in asked], opened.model.mesh.degrees.data
    with progress_bar(cfg) as progress:
        task = progress.add_task("answers", total=len(asked))
        answers = decode(
            opened.model,
            prompts,
            limits,
            sampling_of(cfg),
            batch_size=_BATCH,
            on_answer=lambda row, answer: progress.advance(task, copies),
        )
    choices = []
    for each, answer in zip(asked, answers, strict=True):
        written = answer.ids if answer.stop_id in ends or answer.stop_id is None else answer.all_ids
        # Outside of a template special tokens mean nothing; in one they mark the thought.
        text = tokenizer.decode(written, skip_special_tokens=not cfg.eval_chat_template)
        thought, text = split_thought(text, each.in_thought)
        letter = option_of(text)
        chosen = LETTERS.index(letter) if letter is not None and letter in LETTERS else None
        exact = _bare(text) == LETTERS[each.item.answer].lower()
        choices.append(Choice(each.item, chosen, answer=text, thought=thought, exact=exact))
    return choices


def _line_ends(tokenizer: Tokenizer, opened: ChatModel) -> list[int]:
    """The tokens with a line break."""
    return [number for number in range(opened.model.config.vocab_size) if "\n" in tokenizer.decode([number])]


def _bare(text: str) -> str:
    """The first line in lower case, without punctuation and blanks at the ends."""
    line = text.strip().split("\n", 1)[0]
    return line.translate(str.maketrans("", "", string.punctuation)).strip().lower()
