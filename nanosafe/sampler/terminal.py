"""What chat shows: token ids as text that grows, and a terminal on which thoughts are dimmed."""

import os
import sys

from nanosafe.text.thoughts import END_THINK, THINK
from nanosafe.text.tokenizer import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of bytes that are not yet a character
LONGEST_BROKEN = 32  # tokens; bytes that are no character by then will never be one
# Control characters, all but tab and newline: with them a text can rule a terminal.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], BROKEN)


class TextStream:
    """Token ids to text, one by one and never half a character; only a window is decoded, however long the text is."""

    def __init__(self, tokenizer: Tokenizer):
        self.decode = tokenizer.decode
        # Some decoders drop a space before the very first token, so what was returned last is decoded once more.
        self.before: list[int] = []
        self.new: list[int] = []  # what was not returned yet

    def add(self, token: int) -> str:
        """The text that is now certain; special tokens have none, but for the thought's tags."""
        if self.decode([token]) and not self.decode([token], skip_special_tokens=True):
            return ""
        self.new.append(token)
        text = self.pending()
        if text.endswith(BROKEN) and len(self.new) < LONGEST_BROKEN:
            return ""
        self.before, self.new = self.new, []
        return text

    def pending(self) -> str:
        """The text that was held back."""
        return self.decode(self.before + self.new)[len(self.decode(self.before)) :]


class Console:
    """stdout for answers, stderr for the rest; dims where both are terminals, without `plain` and NO_COLOR."""

    def __init__(self, plain: bool):
        self.terminal = sys.stdout.isatty()
        self.held_back = ""  # the end of what was written, which may become a tag
        plain = plain or os.environ.get("NO_COLOR")
        dims = self.terminal and sys.stderr.isatty() and not plain
        self.dim, self.normal = ("\033[2m", "\033[0m") if dims else ("", "")

    def write(self, piece: str) -> str:
        """Print a piece of an answer, and return it. A tag may be several tokens, so its text is looked for."""
        text = self.held_back + (piece.translate(CONTROLS) if self.terminal else piece)
        held = 0
        for tag in (THINK, END_THINK):
            for length in range(1, len(tag)):
                if text.endswith(tag[:length]):
                    held = max(held, length)
        text, self.held_back = text[: len(text) - held], text[len(text) - held :]
        text = text.replace(THINK, self.dim + THINK).replace(END_THINK, END_THINK + self.normal)
        print(text, end="", flush=True)
        return piece

    def end_answer(self) -> None:
        print(self.held_back + self.normal, flush=True)
        self.held_back = ""

    def note(self, text: str) -> None:
        print(f"{self.dim}{text}{self.normal}", file=sys.stderr, flush=True)

    def ask(self) -> str:
        """A line of stdin, or /quit where it ends and for Ctrl-C."""
        try:
            return input("\n> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            self.note("")
            return "/quit"
