"""Records as the model gets them, as JSON: each token with whether it is trained, and the pictures."""

import base64
import io
from typing import Any

from erniekit.cli.check.contact_sheet import Tile, draw
from erniekit.data.chat.tokenizer import StreamDecoder, Tokenizer
from erniekit.data.packed_batch import IGNORE, Document
from erniekit.data.vision.template import PLACEHOLDERS

MAX_TOKENS = 8192  # written of a document


def record_json(split: str, where: str, dropped: str, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """A record: its split and place, why there is nothing of it ("" if there is), its documents."""
    return {"split": split, "where": where, "dropped": dropped, "documents": documents}


def document_json(document: Document, sizes: str, tiles: list[Tile], tokenizer: Tokenizer) -> dict[str, Any]:
    """A document: `sizes` as text; `tokens`, [text, trained 0 or 1, times] each, where a run of placeholders is one
    entry that stands for several; how many tokens are `left_out` at its end; `pictures` as PNG in base64.
    """
    decoder = StreamDecoder(tokenizer)
    placeholders = set(PLACEHOLDERS.values())
    tokens: list[list[Any]] = []
    for place, number in enumerate(document.ids[:MAX_TOKENS].tolist()):
        is_trained = place > 0 and int(document.labels[place - 1]) != IGNORE
        text = decoder.push(int(document.labels[place - 1]) if is_trained else number)
        if tokens and text in placeholders and tokens[-1][:2] == [text, int(is_trained)]:
            tokens[-1][2] += 1
        else:
            tokens.append([text, int(is_trained), 1])
    return {
        "sizes": sizes,
        "tokens": tokens,
        "left_out": max(0, len(document.ids) - MAX_TOKENS),
        "pictures": [_png(tile) for tile in tiles],
    }


def _png(tile: Tile) -> str:
    data = io.BytesIO()
    draw(tile).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()
