"""Compares generated answers with reference answers: exact match, labels, ROUGE-L, BLEU. Plain Python on strings.

BLEU and ROUGE-L are written out here, because the libraries that define their usual form (sacrebleu, rouge-score) would
bring fifteen packages; the tests hold both to those libraries' numbers.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

BLEU_ORDER = 4
# Scripts written without spaces, with their punctuation and full-width forms: the ranges of sacrebleu's `zh`, and kana.
_CJK = (
    "\u2600-\u27bf\u2e80-\u2fdf\u2ff0-\u30ff\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u4db5\u4e00-\u9fff"
    "\uf900-\ufaff\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0002a6df\U0002f800-\U0002fa1d"
)
_CJK_CHARACTER = re.compile(f"([{_CJK}])")
_WORD = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+")
# mteval-v13a: ASCII symbols but ' - , . stand alone; . and , unless between digits; - after a digit. (Its passes one
# after the other leave some rows of marks such as "..,9" whole, which are not imitated.)
_STANDS_ALONE = re.compile(r"[!-&(-+/:-@\[-`{-~]|(?<=[^0-9])[.,]|[.,](?=[^0-9])|(?<=[0-9])-")

_BLEU_REPLACED = (("<skipped>", ""), ("-\n", ""), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that equal their reference, but for blank space at the ends."""
    return _mean([a.strip() == b.strip() for a, b in zip(predictions, references, strict=True)])


def label_of(text: str) -> str:
    """An answer as a class label: compatibility forms, letter case, and blank space and punctuation at the ends do not
    count ("Positive." is "positive", "１" is "1").
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    start, end = 0, len(text)
    while start < end and _is_edge(text[start]):
        start += 1
    while end > start and _is_edge(text[end - 1]):
        end -= 1
    return text[start:end] or text.strip()  # an answer of punctuation only is itself


def classification(predictions: Sequence[str], references: Sequence[str]) -> tuple[float, float, int]:
    """(accuracy, macro F1, number of labels) of answers seen as class labels (see label_of).

    The labels are the distinct reference labels. Accuracy is the share of predictions with the reference's label. Macro
    F1 is the unweighted mean over the labels of 2 TP / (2 TP + FP + FN); a prediction that is no label at all is a miss
    for its reference's label. With free-form answers, nearly all different, both come close to the exact match.
    """
    pairs = [(label_of(a), label_of(b)) for a, b in zip(predictions, references, strict=True)]
    true = Counter(expected for found, expected in pairs if found == expected)
    found, expected = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    f1 = [2 * true[label] / (found[label] + expected[label]) for label in expected]
    return _mean([a == b for a, b in pairs]), _mean(f1), len(expected)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of the longest common subsequence of words (ROUGE-L, Lin 2004, "ROUGE: a package for automatic evaluation
    of summaries", section 3, with precision and recall weighed alike), 0 to 1.

    Words are runs of letters and digits, without regard to case; each Chinese or Japanese character is a word. Where
    neither text has a word, the score is 1 if they are equal.
    """
    return _mean([_rouge_l(a, b) for a, b in zip(predictions, references, strict=True)])


def bleu(predictions: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """(corpus BLEU 0 to 100, tokenisation) against one reference each (Papineni et al. 2002).

    As sacrebleu computes it with effective order and exponential smoothing: n-grams up to 4, as far as any prediction
    has them. The tokenisation is mteval's "13a", or "zh", where Chinese and Japanese characters stand alone, if any
    reference has one.
    """
    chinese = any(_CJK_CHARACTER.search(text) for text in references)
    matches, totals, lengths = [0] * BLEU_ORDER, [0] * BLEU_ORDER, [0, 0]
    for prediction, reference in zip(predictions, references, strict=True):
        found, expected = _bleu_tokens(prediction, chinese), _bleu_tokens(reference, chinese)
        lengths[0] += len(found)
        lengths[1] += len(expected)
        for order in range(BLEU_ORDER):
            grams = _ngrams(found, order + 1)
            matches[order] += (grams & _ngrams(expected, order + 1)).total()
            totals[order] += grams.total()
    return _bleu_score(matches, totals, lengths[0], lengths[1]), "zh" if chinese else "13a"


def _bleu_score(matches: Sequence[int], totals: Sequence[int], found: int, expected: int) -> float:
    if not any(matches):
        return 0.0
    logs, smooth = [], 1.0
    for match, total in zip(matches, totals, strict=True):
        if total == 0:
            break
        if match == 0:
            smooth *= 2
        logs.append(math.log(100 * match / total if match else 100 / (smooth * total)))
    brevity = 1.0 if found >= expected else math.exp(1 - expected / found)
    return brevity * math.exp(sum(logs) / len(logs))


def _bleu_tokens(text: str, chinese: bool) -> list[str]:
    if chinese:
        text = _CJK_CHARACTER.sub(r" \1 ", text.strip())
    else:
        for written, meant in _BLEU_REPLACED:
            text = text.replace(written, meant)
        text = f" {text} "
    return _STANDS_ALONE.sub(r" \g<0> ", text).split()


def _ngrams(tokens: Sequence[str], order: int) -> "Counter[tuple[str, ...]]":
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def _rouge_l(prediction: str, reference: str) -> float:
    found, expected = (_WORD.findall(text.casefold()) for text in (prediction, reference))
    if not found and not expected:
        return float(prediction.strip() == reference.strip())
    common = longest_common_subsequence(found, expected)
    return 2 * common / (len(found) + len(expected))


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a machine word of `a` at a time (Hyyrö 2004, "Bit-parallel LCS-length
    computation revisited").
    """
    places: dict[str, int] = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    full = (1 << len(a)) - 1
    state = full  # the zero bits are the steps of the table's row
    for item in b:
        match = state & places.get(item, 0)
        state = (state + match | state - match) & full
    return len(a) - state.bit_count()


def _is_edge(character: str) -> bool:
    return character.isspace() or unicodedata.category(character).startswith("P")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
