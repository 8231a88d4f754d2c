"""Talk to a checkpoint in a terminal: what `python -m nanosafe.sampler` runs.

    python -m nanosafe.sampler --model qwen3-0.6b
    python -m nanosafe.sampler --model qwen3-0.6b --prompt "Why is the sky blue?" > answer.txt

The answer is printed while it is drawn, its thought (<think> to </think>) dimmed. It alone goes to stdout; settings,
speed and errors go to stderr. A line is a question; /new starts afresh, /quit or Ctrl-D leaves, Ctrl-C stops an answer
and, at the prompt, leaves. Simplified: each turn computes the whole conversation again, because chat templates rewrite
what came before, most of them without its thoughts.
"""

import os
import signal
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from nanosafe import script
from nanosafe.config import ModelConfig
from nanosafe.data import END_THINK, THINK, opens_thought
from nanosafe.distributed import Ranks
from nanosafe.engine import Engine, Sequence
from nanosafe.sampler import SamplingParams, sequence
from nanosafe.tokenizer import Tokenizer, load_tokenizer
from nanosafe.weights import load_model

DEFAULT_CONTEXT = 8192  # tokens; memory for all 131,072 positions of some models would not fit beside their weights
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of bytes that are not, or not yet, a character
LONGEST_BROKEN = 32  # tokens; bytes that are no character by then will never be one
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], BROKEN)  # by which text could rule a terminal


def flags() -> ArgumentParser:
    parser = ArgumentParser("python -m nanosafe.sampler", description=__doc__,
                            formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="alias (qwen3-8b), hub id (owner/name, owner/name@revision) or folder")
    add("--prompt", metavar="TEXT", help="answer this one question and exit")
    add("--system", metavar="TEXT", help="system message of every conversation")
    # Not given: what the checkpoint's generation_config.json says, else what SamplingParams does.
    add("--temperature", type=float, help="0 always takes the likeliest token (default: the checkpoint's own, or 1)")
    add("--top-p", type=float, help="draw from the fewest tokens that reach this probability (default: the same, or 1)")
    add("--top-k", type=int, help="draw from this many likeliest tokens (default: the same, or 0: from all)")
    add("--min-p", type=float, help="leave out tokens this much less likely than the first (default: the same, or 0)")
    add("--max-new-tokens", type=script.positive_int, help="of one answer (default: all that --max-tokens leaves)")
    add("--max-tokens", type=script.positive_int, help="of a conversation; memory is set aside for them (default: as "
        f"many as the model has positions, but at most {DEFAULT_CONTEXT})")
    add("--seed", type=int, help="with it the same questions get the same answers (default: a fresh one each time)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="bfloat16 takes half the memory and is often faster (default: bfloat16 on cuda, float32 on cpu)")
    add("--plain", action="store_true", help="no dimming; also where NO_COLOR is set or the output is no terminal")
    return parser


def main(argv: list[str] | None = None) -> None:
    with script.readable_errors():
        talk(flags().parse_args(argv))


def talk(args: Namespace) -> None:
    """Load the checkpoint, then answer one question or hold a conversation; raises ValueError for a user's mistakes."""
    console, tokenizer = Console(args.plain), load_tokenizer(args.model)
    opening = [{"role": "system", "content": args.system}] if args.system else []
    # Mistakes that need no weights to be seen come before the weights are read.
    tokenizer.render([*opening, {"role": "user", "content": "?"}])
    config = ModelConfig.from_folder(tokenizer.folder)
    limit = args.max_tokens or min(config.max_position_embeddings, DEFAULT_CONTEXT)
    if limit > config.max_position_embeddings:
        raise ValueError(f"--max-tokens {limit}: {args.model} has only {config.max_position_embeddings} positions")
    settings = sampling_settings(args, config.generation or {}, console)
    settings |= dict(seed=args.seed, stop_token_ids=tokenizer.eos_ids)
    SamplingParams(**settings)

    device = Ranks(args.device).device
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model = load_model(args.model, device=device, dtype=getattr(torch, dtype))
    try:
        engine = Engine(model, max_tokens=limit, requests=1)
    except ValueError as error:
        raise ValueError(f"--max-tokens {limit} is more than fits: {error}") from None
    console.note(f"{args.model} in {dtype} on {device.type}, up to {limit} tokens a conversation")

    def answer(messages: list[dict]) -> str:
        prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)
        room = limit - len(prompt)
        if room < 1:
            raise ValueError(f"the conversation has {len(prompt)} tokens, which leaves no room for an answer within "
                             f"--max-tokens {limit}: raise it, or start afresh with /new")
        params = SamplingParams(max_new_tokens=min(args.max_new_tokens or room, room), **settings)
        return stream(engine, sequence(model, prompt, params), tokenizer, console)

    if args.prompt is None:
        converse(answer, opening, console)
    else:
        answer([*opening, {"role": "user", "content": args.prompt}])


def sampling_settings(args: Namespace, checkpoint: dict, console: "Console") -> dict:
    """Fields of SamplingParams that the command line sets, or else `checkpoint`, its generation_config.json."""
    names = ("temperature", "top_p", "top_k", "min_p")
    ours = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    theirs = {name: checkpoint[name] for name in names if checkpoint.get(name) is not None and name not in ours}
    for origin, values in (("the command line", ours), ("generation_config.json", theirs)):
        if values:
            console.note(f"from {origin}: {', '.join(f'{name} {value}' for name, value in values.items())}")
    return theirs | ours


def converse(answer: Callable[[list[dict]], str], opening: list[dict], console: "Console") -> None:
    """Answer each line of stdin, given all that was said before it, until they end."""
    with suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  gives input() line editing and a history
    console.note("/new starts afresh, /quit leaves, Ctrl-C stops an answer")
    history = list(opening)
    while (line := console.ask()) != "/quit":
        if line == "/new":
            history = list(opening)
        elif line:
            messages = [*history, {"role": "user", "content": line}]
            try:
                history = [*messages, {"role": "assistant", "content": answer(messages)}]
            except ValueError as error:  # too long, or not to the template's liking: as if it had not been asked
                console.note(f"error: {error}")


def stream(engine: Engine, request: Sequence, tokenizer: Tokenizer, console: "Console") -> str:
    """Run `request` and print its text as it comes, then its speed; Ctrl-C ends it early. Returns the text.

    Where the prompt has opened the thought, the tag is put in front: it is for the reader and the template to see.
    """
    text = f"{THINK}\n" if opens_thought(tokenizer, request.prompt) else ""
    decoder, shown, times = TextStream(tokenizer), 0, [time.perf_counter()]
    console.write(text)
    engine.add(request)
    try:
        with noted_interrupts() as interrupts:
            while engine.busy:
                engine.step()
                piece = "".join(decoder.add(t) for t in request.token_ids[shown:] if t not in request.stop_ids)
                console.write(piece)
                text, shown = text + piece, len(request.token_ids)
                times += [time.perf_counter()] * bool(shown)
                if interrupts and engine.busy:
                    engine.scheduler.remove(request)
        console.write(decoder.pending())
    finally:
        console.end_answer()
    start, first, *_, end = times + times[-1:]
    rate = f", then {(shown - 1) / (end - first):.1f} tokens/s" if shown > 1 else ""
    ending = {"stop": "", "length": ", cut off at the limit", None: ", stopped"}[request.finish_reason]
    console.note(f"{shown} tokens in {end - start:.1f} s: the first after {first - start:.2f} s{rate}{ending}")
    return text + decoder.pending()


@contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Within the block Ctrl-C adds to the list it gives, so that no step of an engine is cut short; a second raises."""

    def note(number: int, frame: object) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    noted, before = [], signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


class TextStream:
    """Token ids to text, one by one and never half a character; only a window is decoded, however long the text is."""

    def __init__(self, tokenizer: Tokenizer):
        self.decode = tokenizer.decode
        self.before: list[int] = []  # what was returned last; some decoders drop a space before the very first token
        self.new: list[int] = []  # what was not returned yet

    def add(self, token: int) -> str:
        """The text that is now certain; special tokens have none, but for the thought's tags."""
        if not self.decode([token], skip_special_tokens=True) and self.decode([token]) not in ("", THINK, END_THINK):
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
        self.terminal, self.held = sys.stdout.isatty(), ""
        dims = self.terminal and sys.stderr.isatty() and not plain and not os.environ.get("NO_COLOR")
        self.dim, self.normal = ("\033[2m", "\033[0m") if dims else ("", "")

    def write(self, piece: str) -> None:
        """Print a piece of an answer, but for an end that may be the beginning of a tag: that waits for the next."""
        text = self.held + (piece.translate(CONTROLS) if self.terminal else piece)
        held = max(n for tag in (THINK, END_THINK) for n in range(len(tag)) if text.endswith(tag[:n]))
        text, self.held = text[: len(text) - held], text[len(text) - held :]
        text = text.replace(THINK, self.dim + THINK).replace(END_THINK, END_THINK + self.normal)
        print(text, end="", flush=True)

    def end_answer(self) -> None:
        print(self.held + self.normal, flush=True)
        self.held = ""

    def note(self, text: str) -> None:
        print(f"{self.dim}{text}{self.normal}", file=sys.stderr, flush=True)

    def ask(self) -> str:
        """A line of stdin, or /quit at its end and for Ctrl-C."""
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            self.note("")
            return "/quit"
