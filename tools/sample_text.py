"""English text that every Python ships (the help topics of `pydoc`), as a JSONL of {"text"} rows."""

import json
from pathlib import Path
from pydoc_data.topics import topics


def write_rows(path: Path, rows: int, characters: int) -> None:
    """Writes `rows` rows of `characters` characters each."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    if len(text) < rows * characters:
        raise SystemExit(f"error: the sample text has {len(text)} characters, {rows * characters} are needed")
    chunks = (text[index * characters : (index + 1) * characters] for index in range(rows))
    path.write_text("".join(json.dumps({"text": chunk}) + "\n" for chunk in chunks), encoding="utf-8")
