"""Join texts with pictures into long documents, for the last step of pretraining at a longer context.

    python tools/join_captions.py CAPTIONS.jsonl OUTPUT.jsonl              # 24 texts a document
    python tools/join_captions.py CAPTIONS.jsonl OUTPUT.jsonl --texts 48

Each line of CAPTIONS.jsonl is a text with tags and its `images` or `videos` (docs/vision-data.md), such as those that
tools/make_vl_demo_data.py draws. Neighbours become one document with all their media in order; media keep their paths,
so OUTPUT.jsonl belongs into the same directory.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEDIA = ("images", "videos")


def joined(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One document of some texts with pictures."""
    document: dict[str, Any] = {"text": "\n".join(record["text"] for record in records)}
    media = {key: [name for record in records for name in record.get(key, [])] for key in MEDIA}
    return document | {key: names for key, names in media.items() if names}


def main() -> None:
    """Parse the arguments and write the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--texts", type=int, default=24, help="texts in a document")
    args = parser.parse_args()
    records = [json.loads(line) for line in args.captions.read_text("utf-8").splitlines() if line.strip()]
    groups = (records[i : i + args.texts] for i in range(0, len(records), args.texts))
    lines = [json.dumps(joined(group), ensure_ascii=False) for group in groups]
    args.output.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    print(f"{args.output}: {len(lines)} documents of {len(records)} texts")


if __name__ == "__main__":
    main()
