"""The records of .json, .jsonl, .csv and .parquet files, each with its place ("FILE, line 3") for messages to the user.

What a record may hold is in forms.py.
"""

import csv
import io
import json
from pathlib import Path

from nanosafe.io.hub import DATA_SUFFIXES


def read_records(path: Path) -> list[tuple[dict, str]]:
    """The records of a file, at least one, each with its place. Raises ValueError naming the place."""
    records = _parse(path)
    if not records:
        raise ValueError(f"{path} holds no rows")
    for record, source in records:
        if not isinstance(record, dict):
            raise ValueError(f"{source}: a row must be a JSON object, found {type(record).__name__}")
    return records


def _parse(path: Path) -> list[tuple[object, str]]:
    if path.suffix not in DATA_SUFFIXES:
        raise ValueError(f"{path}: data must be a {', '.join(DATA_SUFFIXES)} file")
    if path.suffix == ".parquet":
        return _numbered(path, _read_parquet(path))
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin a CSV file with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None
    if path.suffix == ".csv":
        return _parse_csv(path, text)
    if path.suffix == ".jsonl" or text.lstrip().startswith("{"):
        return _parse_json_lines(path, text)
    records = _parse_json(text, str(path))
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a JSON list of rows, or one JSON object per line")
    return _numbered(path, records)


def _numbered(path: Path, records: list) -> list[tuple[object, str]]:
    return [(record, f"{path}, row {number}") for number, record in enumerate(records, 1)]


def _read_parquet(path: Path) -> list[dict]:
    try:
        import pyarrow.parquet  # optional
    except ImportError:
        raise ValueError(f"{path} is a parquet file: pip install pyarrow") from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is no parquet file ({error}): download it again") from None


def _parse_json_lines(path: Path, text: str) -> list[tuple[object, str]]:
    records = []
    # Not splitlines, because U+2028 may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            source = f"{path}, line {number}"
            records.append((_parse_json(line, source), source))
    return records


def _parse_json(text: str, source: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # also for a number of over 4,300 digits
        raise ValueError(f"{source}: not valid JSON ({error})") from None


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object's fields. Of a name given twice the json module alone would keep the last."""
    fields = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"field {name!r} stands twice in one object")
        fields[name] = value
    return fields


def _parse_csv(path: Path, text: str) -> list[tuple[dict, str]]:
    """Strict, for a quote that is never closed would take row after row into its field."""
    csv.field_size_limit(len(text) + 1)  # a long thought passes the default of 131,072 characters
    reader = csv.DictReader(io.StringIO(text), strict=True)
    records, line = [], 1
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        named = [name for name in reader.fieldnames if name]
        if len(set(named)) < len(named):
            raise ValueError(f"{path}: the header has a name twice: {', '.join(named)}")
        line = reader.line_num + 1
        for record in reader:
            source = f"{path}, row {len(records) + 1}"
            # The csv module puts None where a field is missing, and over those that are left.
            if None in record or None in record.values():
                more = "more" if None in record else "fewer"
                raise ValueError(f"{source}: {more} fields than the header has (from line {line}); "
                                 "quote fields that hold a comma, and close every quote")
            records.append((record, source))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, row {len(records) + 1} (from line {line}): {error}; a field "
                         'with quotes stands in quotes, and has "" for each') from None
    return records
