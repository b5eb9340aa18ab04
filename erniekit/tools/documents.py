"""A search in local texts by the words of a query (BM25: Robertson and Zaragoza 2009, "The Probabilistic Relevance
Framework", with k1 1.2 and b 0.75).
"""

import math
import re
from collections import Counter, defaultdict
from pathlib import Path

from erniekit.tools.result import BadCall
from erniekit.utils import log
from erniekit.utils.errors import ConfigError
from erniekit.utils.user_files import read_text

SUFFIXES = (".txt", ".md", ".jsonl", ".csv", ".tsv")
_MAX_DOCUMENTS = 200_000
_K1, _B = 1.2, 0.75
_WORD = re.compile(r"[a-z0-9]+|[\u3400-\u9fff]")


class DocumentSearch:
    """The lines of text files, each a document. They are read at the start."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where there is no text."""
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise ConfigError(
                f"document_search_path: {path} is neither a file nor a directory with {', '.join(SUFFIXES)}."
            )
        lines = [line.strip() for file in files for line in read_text(file, ConfigError).splitlines() if line.strip()]
        self.documents = lines[:_MAX_DOCUMENTS]
        if not lines:
            raise ConfigError(f"document_search_path: {path} holds no text.")
        if len(lines) > _MAX_DOCUMENTS:
            log.warning(f"document_search_path: only the first {_MAX_DOCUMENTS:,} lines of {path} are searched")
        self._lengths: list[int] = []
        self._counts: dict[str, list[tuple[int, int]]] = defaultdict(list)  # word -> (document, how often)
        for number, document in enumerate(self.documents):
            words = _words(document)
            self._lengths.append(len(words))
            for word, count in Counter(words).items():
                self._counts[word].append((number, count))
        self._mean = sum(self._lengths) / len(self._lengths) or 1.0

    def find(self, query: str, count: int = 3) -> list[str]:
        """Up to `count` documents that have words of the query, the best first; equally good ones in their order.
        Raises BadCall for a query without words.
        """
        words = set(_words(query))
        if not words:
            raise BadCall("query has no words to search for")
        scores: dict[int, float] = defaultdict(float)
        for word in sorted(words):
            postings = self._counts.get(word, [])
            rarity = math.log(1 + (len(self.documents) - len(postings) + 0.5) / (len(postings) + 0.5))
            for number, times in postings:
                length = 1 - _B + _B * self._lengths[number] / self._mean
                scores[number] += rarity * times * (_K1 + 1) / (times + _K1 * length)
        best = sorted(scores, key=lambda number: (-scores[number], number))[:count]
        return [self.documents[number] for number in best]


def _words(text: str) -> list[str]:
    """Latin words and numbers in lower case, and single Chinese characters."""
    return _WORD.findall(text.lower())
