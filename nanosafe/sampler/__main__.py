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
from pathlib import Path

import torch

from nanosafe import SamplingParams, load_model, load_tokenizer
from nanosafe.io.fields import GENERATION, check
from nanosafe.model.config import ModelConfig
from nanosafe.parallel import Ranks
from nanosafe.sampler import sequence
from nanosafe.sampler.engine import Engine
from nanosafe.sampler.scheduler import Sequence
from nanosafe.text.thoughts import END_THINK, THINK
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train import cli

DEFAULT_CONTEXT = 8192  # tokens; memory for all 131,072 positions of some models would not fit beside their weights
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of bytes that are not, or not yet, a character
LONGEST_BROKEN = 32  # tokens; bytes that are no character by then will never be one
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], BROKEN)  # with them a text can rule a terminal


def flags() -> ArgumentParser:
    parser = ArgumentParser("python -m nanosafe.sampler", description=__doc__,
                            formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="alias (qwen3-8b), hub id (owner/name, owner/name@revision) or folder")
    add("--prompt", metavar="TEXT", help="answer this one question and exit")
    add("--system", metavar="TEXT", help="system message of every conversation")
    add("--thinking", **cli.THINKING)
    add("--temperature", type=float, help="0 always takes the likeliest token (default: the checkpoint's own, or 1)")
    add("--top-p", type=float, help="draw from the fewest tokens that reach this probability (default: the same, or 1)")
    add("--top-k", type=int, help="draw from this many likeliest tokens (default: the same, or 0: from all)")
    add("--min-p", type=float, help="leave out tokens less likely than this share of the likeliest one's probability "
        "(default: the same, or 0)")
    add("--max-new-tokens", type=cli.positive_int, help="of one answer (default: all that --max-tokens leaves)")
    add("--max-tokens", type=cli.positive_int, help="of a conversation; memory is set aside for them (default: as "
        f"many as the model has positions, but at most {DEFAULT_CONTEXT})")
    add("--seed", type=int, help="with it the same questions get the same answers (default: a fresh one each time)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="bfloat16 takes half the memory and is often faster (default: bfloat16 on cuda, float32 on cpu)")
    add("--plain", action="store_true", help="no dimming; also where NO_COLOR is set or the output is no terminal")
    return parser


def main(argv: list[str] | None = None) -> None:
    with cli.readable_errors():
        talk(flags().parse_args(argv))


def talk(args: Namespace) -> None:
    """Load the checkpoint, then answer one question or hold a conversation; raises ValueError for a user's mistakes."""
    console, tokenizer = Console(args.plain), load_tokenizer(args.model)
    tokenizer.think(args.thinking == "on")
    opening = [{"role": "system", "content": args.system}] if args.system else []
    # Mistakes that show without the weights are reported before these are read.
    tokenizer.render([*opening, {"role": "user", "content": "?"}])
    config = ModelConfig.from_folder(tokenizer.folder)
    limit = args.max_tokens or min(config.max_position_embeddings, DEFAULT_CONTEXT)
    if limit > config.max_position_embeddings:
        raise ValueError(f"--max-tokens {limit}: {args.model} has only {config.max_position_embeddings} positions")
    path = tokenizer.folder / "generation_config.json"
    settings = sampling_settings(args, config.generation or {}, console, path)
    settings |= dict(seed=args.seed, stop_token_ids=tokenizer.eos_ids)
    SamplingParams(**settings)

    device = Ranks(args.device).device
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    console.note(f"{args.model} in {dtype} on {device.type}, {limit} tokens at most (--max-tokens)")
    model = load_model(args.model, device=device, dtype=getattr(torch, dtype))
    engine = Engine(model, max_tokens=limit, requests=1)
    # The first tokens compile kernels and capture CUDA graphs, which is not to count as an answer's time.
    engine.add(sequence(model, [0], SamplingParams(max_new_tokens=2, ignore_eos=True)))
    while engine.busy:
        engine.step()

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


def sampling_settings(args: Namespace, checkpoint: dict, console: "Console",
                      path: str | Path = "generation_config.json") -> dict:
    """Fields of SamplingParams by the command line, or else by `checkpoint`, the object in `path`.

    Raises ValueError where that asks for what is not computed and no --temperature is given.
    """
    names = ("temperature", "top_p", "top_k", "min_p")
    ours = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    fields = check(checkpoint, GENERATION, path)
    theirs = {name: fields[name] for name in names if fields[name] is not None and name not in ours}
    if args.temperature is None:
        if not fields["do_sample"]:
            theirs["temperature"] = 0.0  # greedy, whatever temperature the file has
        if fields["repetition_penalty"] != 1:
            penalty = f"a repetition_penalty of {fields['repetition_penalty']}"
            raise ValueError(f"{path} asks for {penalty}, which is not computed: "
                             "set --temperature to draw without it")
    for origin, values in (("the command line", ours), ("generation_config.json", theirs)):
        if values:
            console.note(f"from {origin}: {', '.join(f'{name} {value}' for name, value in values.items())}")
    return theirs | ours


def converse(answer: Callable[[list[dict]], str], opening: list[dict], console: "Console") -> None:
    """Answer each line of stdin, given all that was said before it, until they end."""
    with suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  gives input() line editing and a history
    console.note("/new starts afresh, /quit leaves, Ctrl-C stops an answer")
    history = opening
    while (line := console.ask()) != "/quit":
        if line == "/new":
            history = opening
            console.note("a new conversation")
        elif line:
            messages = [*history, {"role": "user", "content": line}]
            try:
                history = [*messages, {"role": "assistant", "content": answer(messages)}]
            except ValueError as error:  # too long, or not to the template's liking: as if it had not been asked
                console.note(f"error: {error}")


def stream(engine: Engine, request: Sequence, tokenizer: Tokenizer, console: "Console") -> str:
    """Run `request` and print its text as it comes, then its speed; Ctrl-C ends it early. Returns the text.

    Where the prompt has opened the thought, the tag is put in front, for the reader and the template of the next turn.
    """
    start, decoder, drawn = time.perf_counter(), TextStream(tokenizer), 0
    text = console.write(f"{THINK}\n" if tokenizer.opens_thought(request.prompt) else "")
    engine.add(request)
    try:
        with noted_interrupts() as interrupts:
            while engine.busy:
                engine.step()
                if not drawn:
                    first = time.perf_counter()
                new, drawn = request.token_ids[drawn:], len(request.token_ids)
                text += console.write("".join(decoder.add(token) for token in new if token not in request.stop_ids))
                if interrupts and engine.busy:
                    engine.scheduler.remove(request)
        text += console.write(decoder.pending())
    finally:
        console.end_answer()
    end = time.perf_counter()
    rate = f", then {(drawn - 1) / (end - first):.1f} tokens/s" if drawn > 1 else ""
    reason = {"stop": "", "length": ", cut off at the limit", None: ", stopped"}[request.finish_reason]
    console.note(f"{drawn} tokens in {end - start:.1f} s: the first after {first - start:.2f} s{rate}{reason}")
    return text


@contextmanager
def noted_interrupts() -> Iterator[list[bool]]:
    """In the block Ctrl-C only adds to the list, for a step of the engine must not end halfway; a second one raises."""
    noted: list[bool] = []
    before = signal.signal(
        signal.SIGINT, lambda *event: signal.default_int_handler(*event) if noted else noted.append(True))
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
        self.terminal, self.held = sys.stdout.isatty(), ""
        dims = self.terminal and sys.stderr.isatty() and not plain and not os.environ.get("NO_COLOR")
        self.dim, self.normal = ("\033[2m", "\033[0m") if dims else ("", "")

    def write(self, piece: str) -> str:
        """Print a piece of an answer, and return it; an end that may become a tag is held back until the next."""
        text = self.held + (piece.translate(CONTROLS) if self.terminal else piece)
        held = max(n for tag in (THINK, END_THINK) for n in range(len(tag)) if text.endswith(tag[:n]))
        text, self.held = text[: len(text) - held], text[len(text) - held :]
        text = text.replace(THINK, self.dim + THINK).replace(END_THINK, END_THINK + self.normal)
        print(text, end="", flush=True)
        return piece

    def end_answer(self) -> None:
        print(self.held + self.normal, flush=True)
        self.held = ""

    def note(self, text: str) -> None:
        print(f"{self.dim}{text}{self.normal}", file=sys.stderr, flush=True)

    def ask(self) -> str:
        """A line of stdin, or /quit where it ends and for Ctrl-C."""
        try:
            return input("\n> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            self.note("")
            return "/quit"


if __name__ == "__main__":
    main()
