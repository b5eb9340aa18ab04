"""The prompts of the multiple-choice benchmarks, word for word those of lm-evaluation-harness (its tasks `mmlu`,
`ceval-valid` and `cmmlu`), so that scores can be compared: a prompt is part of a benchmark's definition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from erniekit.evaluate.benchmark_files import LETTERS, ChoiceQuestion
from erniekit.evaluate.benchmark_subjects import CEVAL, CMMLU


@dataclass(frozen=True)
class Benchmark:
    """What defines a benchmark beside its questions: the split that is scored, the sentence before the questions with
    the place of the subject, the word that asks for the answer, and what its subjects are called in that sentence.
    """

    split: str
    description: str
    ask: str
    subjects: dict[str, str]

    def introduction(self, subject: str) -> str:
        """The sentence before the questions of a subject, without the empty line that follows it. A subject that the
        benchmark does not have is called by its own name.
        """
        return self.description.format(self.subjects.get(subject, subject.replace("_", " ")))

    def question(self, item: ChoiceQuestion) -> str:
        """A question with its options, up to where the answer's letter follows."""
        options = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, item.options, strict=True))
        return f"{item.question}\n{options}{self.ask}"

    def prompt(self, item: ChoiceQuestion, examples: Sequence[ChoiceQuestion]) -> str:
        """The whole prompt of a question as plain text; the letter follows after a space."""
        shown = "".join(f"{self.question(example)} {LETTERS[example.answer]}\n\n" for example in examples)
        return f"{self.introduction(item.subject)}\n\n{shown}{self.question(item)}"

    def messages(self, item: ChoiceQuestion, examples: Sequence[ChoiceQuestion]) -> list[dict[str, str]]:
        """The same as a conversation: the introduction as system message, a turn for each example."""
        messages = [{"role": "system", "content": self.introduction(item.subject)}]
        for example in examples:
            messages.append({"role": "user", "content": self.question(example)})
            messages.append({"role": "assistant", "content": LETTERS[example.answer]})
        return [*messages, {"role": "user", "content": self.question(item)}]


BENCHMARKS = {
    "mmlu": Benchmark(
        "test", "The following are multiple choice questions (with answers) about {}.", "Answer:", subjects={}
    ),
    "ceval": Benchmark("val", "以下是中国关于{}的单项选择题，请选出其中的正确答案。", "答案：", CEVAL),
    "cmmlu": Benchmark("test", "以下是关于{}的单项选择题，请直接给出正确答案的选项。", "答案：", CMMLU),
}
