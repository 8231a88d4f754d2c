"""records.jsonl: every response of an evaluation, kept as it comes, so that nothing is generated twice.

A record is one response with all that was measured on it, a plain dict and a line of records.jsonl:

    benchmark, id, category, sample     which question, and which of its samples
    prompt, response                    messages; the text that is graded, from the thought's opening tag on, be it the
                                        template's, a prefill's or the model's own
    prompt_digest                       of the token ids that the messages were rendered to
    tokens, truncated                   tokens drawn, the one that ends the turn included; whether the limit ended them
    values, judge                       {metric: value}, the grader's, and which grader's; added when all have ended
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


class RecordFile:
    """records.jsonl, read once and appended to; `rows` are its records, the same on every rank.

    Rank 0 writes it. What another rank has generated it keeps in records-rankN.jsonl until the next rewrite.
    """

    def __init__(self, path: Path, ranks: Ranks):
        self.path, self.ranks = path, ranks
        self.own = path if ranks.main else path.with_name(f"{path.stem}-rank{ranks.rank}.jsonl")
        # A crash may have left a response both here and in a rank's part
        found: dict[tuple, dict] = {}
        for row in [row for file in (path, *self._parts()) for row in _read(file)] if ranks.main else []:
            found.setdefault(_key(row), row)
        self.rows = ranks.gather(list(found.values()))

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}-rank*.jsonl"))

    def append(self, record: dict) -> None:
        """Keep what this rank has generated, also if the process is killed. It joins `rows` with the next rewrite."""
        self.own.parent.mkdir(parents=True, exist_ok=True)
        with open(self.own, "ab") as file:
            file.write(_lines([record]))
            file.flush()
            os.fsync(file.fileno())

    def rewrite(self, records: Sequence[dict]) -> None:
        """The file anew, `records` in their order behind all others; every rank calls it with the same ones."""
        keys = {_key(record) for record in records}
        self.rows = [row for row in self.rows if _key(row) not in keys] + list(records)
        self.ranks.wait()  # nobody is writing a part any more
        if self.ranks.main:
            write_atomic(self.path, _lines(self.rows))
            for part in self._parts():
                part.unlink()


def _key(record: dict) -> tuple[str, str, int]:
    return record["benchmark"], record["id"], record["sample"]


def _read(path: Path) -> list[dict]:
    """The complete lines; a last one that a crash tore is cut off."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    lines = enumerate(whole.splitlines(), 1)
    return [_record(line, f"line {number}", path) for number, line in lines]


def _record(line: bytes, place: str, path: Path) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds a line that is no JSON ({place}, {error}): mend or delete "
                         "the file") from None  # fmt: skip
    if not isinstance(record, dict) or record.pop("checksum", None) != digest(record):
        raise ValueError(f"{path} holds a record that was edited, or written by another version "
                         f"({place}: the checksum does not match): delete that line, and its "
                         "response is generated anew")  # fmt: skip
    return record


def _lines(records: Sequence[dict]) -> bytes:
    lines = []
    for record in records:
        signed = record | {"checksum": digest(record)}
        lines.append(json.dumps(signed, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def write_unitxt(records: Sequence[dict], path: str | Path) -> None:
    """For AttaQ's published metric, whose reward model is no decoder: unitxt computes it (docs/evals.md).

    One line {"input", "label", "prediction"} for each record of attaq, not of its attacked forms: the request, its
    class, and the answer without its thought ("" where there is none).
    """
    lines = []
    for record in records:
        answer = split_thought(record["response"])[1].strip()
        row = {"input": record["prompt"][-1]["content"], "label": record["category"],
               "prediction": answer}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines).encode())
