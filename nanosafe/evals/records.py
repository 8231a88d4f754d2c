"""records.jsonl: every response of an evaluation, kept as it comes, so that nothing is generated twice.

A record is one response with all that was measured on it, a plain dict and a line of the file:

    benchmark, id, category, sample     which question, and which of its samples
    prompt, response                    messages; the text that is graded, from the thought's opening tag on, be
                                        it the template's, a prefill's or the model's own
    prompt_digest                       of the token ids that the messages were rendered to
    tokens, truncated                   tokens drawn, the one that ends the turn included; whether the limit ended them
    values, judge                       {metric: value} of the grader, and which grader; added when all have ended
    token_ids, entropies                of the first sample of a question: the tokens drawn, and the entropy (nats, at
                                        temperature 1) of the distribution that each was drawn from
    reward, reward_model                where one was asked for: the score of thought and answer, and whose it is

In the file each also has a checksum of all that: a record that was edited is an error.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from nanosafe.io.files import digest, write_atomic
from nanosafe.parallel import Ranks
from nanosafe.text.thoughts import split_thought


def key(record: dict) -> tuple[str, str, int]:
    """Which response of an evaluation a record is."""
    return record["benchmark"], record["id"], record["sample"]


class RecordFile:
    """records.jsonl, read once and appended to; `rows` are its records, the same on every rank.

    Rank 0 writes it. Another rank keeps what it generates in records-rankN.jsonl until the next rewrite.
    """

    def __init__(self, path: Path, ranks: Ranks):
        self.path, self.ranks = path, ranks
        self.append_path = path
        if not ranks.main:
            self.append_path = path.with_name(f"{path.stem}-rank{ranks.rank}.jsonl")
        # A crash may have left a response both in the file and in that of a rank.
        found: dict[tuple, dict] = {}
        if ranks.main:
            for file in (path, *self._rank_files()):
                for row in _read(file):
                    found.setdefault(key(row), row)
        self.rows = ranks.gather(list(found.values()))

    def _rank_files(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}-rank*.jsonl"))

    def append(self, record: dict) -> None:
        """Keep what this rank has generated, also if the process is killed. It joins `rows` with the next rewrite."""
        self.append_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.append_path, "ab") as file:
            file.write(_lines([record]))
            file.flush()
            os.fsync(file.fileno())

    def rewrite(self, records: Sequence[dict]) -> None:
        """Write the file anew, `records` behind all others; every rank calls it with the same ones."""
        keys = {key(record) for record in records}
        self.rows = [row for row in self.rows if key(row) not in keys] + list(records)
        self.ranks.wait()  # after this no rank appends to its own file any more
        if self.ranks.main:
            write_atomic(self.path, _lines(self.rows))
            for file in self._rank_files():
                file.unlink()


def _read(path: Path) -> list[dict]:
    """The records of the complete lines; a last line that a crash tore is cut off."""
    data = path.read_bytes() if path.exists() else b""
    complete = data[: data.rfind(b"\n") + 1]
    if complete != data:
        os.truncate(path, len(complete))
    records = []
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds a line that is no JSON (line {number}, {error}): "
                             "mend or delete the file") from None
        if not isinstance(record, dict) or record.pop("checksum", None) != digest(record):
            raise ValueError(f"{path} holds a record that was edited, or written by another "
                             f"version (line {number}: the checksum does not match): delete that "
                             "line, and its response is generated anew")
        records.append(record)
    return records


def _lines(records: Sequence[dict]) -> bytes:
    lines = []
    for record in records:
        signed = record | {"checksum": digest(record)}
        lines.append(json.dumps(signed, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def write_unitxt(records: Sequence[dict], path: str | Path) -> None:
    """Write attaq's records for unitxt, which computes AttaQ's published metric (docs/evals.md).

    A line {"input", "label", "prediction"} a record: the request, its class, and the answer without its thought.
    """
    lines = []
    for record in records:
        answer = split_thought(record["response"])[1].strip()
        row = {"input": record["prompt"][-1]["content"], "label": record["category"],
               "prediction": answer}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines).encode())
