"""A result file that grows row by row: an interrupted benchmark goes on with the rows that are missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import machine

from llmfp4_kernels.errors import BadFile
from llmfp4_kernels.packed import write_beside


class ResultFile:
    """JSON of {section: {"about": …, "rows": {name: row}}}; a row carries its key, its commit and its date.

    The key is a string of all that a row depends on: a row with another key counts as missing.
    """

    def __init__(self, path: Path):
        self.path, self.content = path, {}
        self.commit = machine.commit()  # of the code that is loaded, whatever is committed while it runs
        if path.is_file():
            try:
                self.content = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise BadFile(f"{path} ({path.stat().st_size} bytes) is not JSON: {error}") from error

    def describe(self, section: str, about: dict) -> None:
        """What a section measures. Rows measured on something else are dropped."""
        if self.content.get(section, {}).get("about") != about:
            self.content[section] = {"about": about, "rows": {}}

    def rows(self, section: str) -> dict[str, dict]:
        return self.content[section]["rows"]

    def find(self, section: str, name: str, key: str) -> dict | None:
        row = self.rows(section).get(name)
        return row if row and row["key"] == key else None

    def put(self, section: str, name: str, key: str, row: dict) -> None:
        """Add or replace a row, and write the file beside and rename it."""
        now = machine.machine()
        self.rows(section)[name] = {"key": key, **row, "commit": self.commit, "date": now["date"]}
        self.content |= {"machine": now, "commit": self.commit}
        text = json.dumps(self.content, indent=1, ensure_ascii=False)
        write_beside(self.path, lambda beside: beside.write_text(text))


def lines_of(path: Path) -> list[dict]:
    """The rows of a file of JSON lines; none while it is missing. Raises BadFile for anything but lines of objects."""
    rows = []
    for number, line in enumerate(_text_of(path).splitlines() if path.exists() else [], start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise BadFile(f"line {number} of {path} is no JSON object: {error}") from error
    return rows


def _text_of(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"{path} cannot be read: {error}") from error


def recorder(path: Path | None, show: Callable[[dict], str], **about) -> Callable[[dict], None]:
    """record(row): prints it, and appends it to `path` as a JSON line with the machine, the commit and `about`.

    arguments.result_file has made the folder and seen that the file can be written.
    """
    where = {"machine": machine.machine(), "commit": machine.commit(), **about}

    def record(row: dict) -> None:
        print(show(row), flush=True)
        if path:
            with path.open("a") as file:
                file.write(json.dumps(row | where) + "\n")

    return record
