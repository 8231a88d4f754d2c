"""records.jsonl: every response of an evaluation, kept as it comes, so that nothing is generated twice.

A record is one response with all that was measured on it, a plain dict and a line of records.jsonl:

    benchmark, id, category, sample     which question, and which of its samples
    prompt, response                    messages; the text that is graded, from the thought's opening tag on, be it the
                                        template's, a prefill's or the model's own
    tokens, truncated                   tokens drawn, the one that ends the turn included; whether the limit ended them
    values                              {metric: value}, the grader's
    token_ids, entropies                of the first sample of a question: the tokens drawn, and the entropy (nats, at
                                        temperature 1) of the distribution that each was drawn from
    reward, reward_model                where one was asked for: the score of thought and answer, and whose it is
"""

import json
import os
from pathlib import Path

from nanosafe.distributed import Ranks
from nanosafe.weights import write_atomic


class RecordFile:
    """records.jsonl, read once and appended to; `rows` are its records, the same on every rank. Rank 0 writes."""

    def __init__(self, path: Path, ranks: Ranks):
        self.path, self.ranks = path, ranks
        self.rows = ranks.gather(self._read() if ranks.main else [])

    def _read(self) -> list[dict]:
        """The complete lines; a last one that a crash tore is cut off."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            os.truncate(self.path, len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(f"{self.path} holds a line that is no JSON ({error}): mend or delete the file") from None

    def append(self, records: list[dict]) -> None:
        self.rows += records
        if self.ranks.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(_lines(records))
                file.flush()
                os.fsync(file.fileno())

    def rewrite(self) -> None:
        """After rows were changed."""
        if self.ranks.main:
            write_atomic(self.path, _lines(self.rows))


def _lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
