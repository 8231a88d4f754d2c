"""Talk to a checkpoint in a terminal: what `python -m nanosafe.sampler` runs.

    python -m nanosafe.sampler --model qwen3-0.6b
    python -m nanosafe.sampler --model qwen3-0.6b --prompt "Why is the sky blue?" > answer.txt

The answer is printed while it is drawn, its thought (<think> to </think>) dimmed. It alone goes to stdout; settings,
speed and errors go to stderr. A line is a question; /new starts afresh, /quit or Ctrl-D leaves. Ctrl-C stops an answer;
a second one, or one at the prompt, leaves. Where no flag says how to draw, the checkpoint's generation_config.json
does. Simplified: each turn computes the whole conversation again, because chat templates rewrite what came before, most
of them without its thoughts.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

import nanosafe  # noqa: F401  First, for it sets what PyTorch reads when it is imported.
from nanosafe.train.flags import THINKING, positive_int

# In tokens; memory for all 131,072 positions of some models would not fit beside their weights.
DEFAULT_CONTEXT = 8192


def flags() -> ArgumentParser:
    raw = RawDescriptionHelpFormatter  # keeps the lines of the description
    parser = ArgumentParser("python -m nanosafe.sampler", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--model", required=True, help="alias (qwen3-8b), hub id (owner/name[@revision]) or folder")
    add("--prompt", metavar="TEXT", help="answer this one question and exit")
    add("--system", metavar="TEXT", help="system message of every conversation")
    add("--thinking", **THINKING)
    add("--temperature", type=float, help="0 always takes the likeliest token")
    add("--top-p", type=float, help="draw from the fewest tokens that reach this probability")
    add("--top-k", type=int, help="draw from this many likeliest tokens; 0: from all")
    add("--min-p", type=float, help="leave out tokens with less than this share of the likeliest's probability")
    add("--max-new-tokens", type=positive_int, help="of one answer (default: all that is left)")
    add("--max-tokens", type=positive_int, help="of a conversation; memory is set aside for them "
        f"(default: as many as the model has positions, but at most {DEFAULT_CONTEXT})")  # fmt: skip
    add("--seed", type=int, help="the same questions get the same answers (default: a fresh one each time)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="(default: bfloat16 on cuda, float32 on cpu)")
    add("--plain", action="store_true", help="no dimming; also where NO_COLOR is set or stdout is no terminal")
    return parser


if __name__ == "__main__":
    flags().parse_args()  # --help and wrong flags end here, before the seconds that PyTorch takes to load

# isort: split
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from nanosafe import SamplingParams, load_model, load_tokenizer
from nanosafe.io.fields import GENERATION, check
from nanosafe.model.config import ModelConfig
from nanosafe.parallel import Ranks
from nanosafe.sampler.engine import Engine
from nanosafe.sampler.generation import sequence
from nanosafe.sampler.scheduler import Sequence
from nanosafe.sampler.terminal import Console, TextStream
from nanosafe.text.thoughts import THINK
from nanosafe.text.tokenizer import Tokenizer
from nanosafe.train import cli

FILTERS = ("temperature", "top_p", "top_k", "min_p")


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
    positions = config.max_position_embeddings
    limit = args.max_tokens or min(positions, DEFAULT_CONTEXT)
    if limit > positions:
        raise ValueError(f"--max-tokens {limit}: {args.model} has only {positions} positions")
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
            raise ValueError(
                f"the conversation has {len(prompt)} tokens, which leaves no room for an answer "
                f"within --max-tokens {limit}: raise it, or start afresh with /new"
            )
        params = SamplingParams(max_new_tokens=min(args.max_new_tokens or room, room), **settings)
        return print_answer(engine, sequence(model, prompt, params), tokenizer, console)

    if args.prompt is None:
        converse(answer, opening, console)
    else:
        answer([*opening, {"role": "user", "content": args.prompt}])


def sampling_settings(args: Namespace, checkpoint: dict, console: Console, path: Path) -> dict:
    """Fields of SamplingParams by the command line, or else by `checkpoint`, the object in generation_config.json.

    Raises ValueError, which names its `path`, where that asks for what is not computed and no --temperature is given.
    """
    fields = check(checkpoint, GENERATION, path)
    given, defaults = {}, {}
    for name in FILTERS:
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
        elif fields[name] is not None:
            defaults[name] = fields[name]
    if args.temperature is None:
        if not fields["do_sample"]:
            defaults["temperature"] = 0.0  # greedy, whatever temperature the file has
        penalty = fields["repetition_penalty"]
        if penalty != 1:
            raise ValueError(
                f"{path} asks for a repetition_penalty of {penalty}, which is not computed: "
                "set --temperature to draw without it"
            )
    for origin, settings in (("the command line", given), ("generation_config.json", defaults)):
        if settings:
            listed = ", ".join(f"{name} {value}" for name, value in settings.items())
            console.note(f"from {origin}: {listed}")
    return defaults | given


def converse(answer: Callable[[list[dict]], str], opening: list[dict], console: Console) -> None:
    """Answer each line of stdin, given all that was said before it, until they end."""
    with suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  gives input() line editing and a history
    console.note("/help lists the commands")
    history = opening
    while (line := console.ask()) != "/quit":
        if line == "/new":
            history = opening
            console.note("a new conversation")
        elif line == "/help":
            console.note("/new starts afresh, /quit or Ctrl-D leaves; Ctrl-C stops an answer, and twice leaves")
        elif line:
            messages = [*history, {"role": "user", "content": line}]
            try:
                history = [*messages, {"role": "assistant", "content": answer(messages)}]
            except KeyboardInterrupt:
                return
            except ValueError as error:
                # It is too long, or the template refuses it: as if it had not been asked.
                console.note(f"error: {error}")


def print_answer(engine: Engine, request: Sequence, tokenizer: Tokenizer, console: Console) -> str:
    """Run `request` and print its text as it comes, then its speed; Ctrl-C ends it early. Returns the text.

    Where the prompt has opened the thought, the tag is put in front, for the reader and the template of the next turn.
    """
    start, first, shown, stream = time.perf_counter(), None, 0, TextStream(tokenizer)
    text = console.write(f"{THINK}\n" if tokenizer.opens_thought(request.prompt) else "")
    interrupts = []  # Ctrl-C is only noted, for a step of the engine must not end halfway.
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    engine.add(request)
    try:
        while engine.busy:
            engine.step()
            first = first or time.perf_counter()
            new = [token for token in request.token_ids[shown:] if token not in request.stop_ids]
            shown = len(request.token_ids)
            text += console.write("".join(stream.add(token) for token in new))
            if interrupts and engine.busy:
                engine.scheduler.remove(request)
        text += console.write(stream.pending())
    finally:
        signal.signal(signal.SIGINT, handler)
        console.end_answer()
    end = time.perf_counter()
    rate = f", then {(shown - 1) / (end - first):.1f} tokens/s" if shown > 1 else ""
    ends = {"stop": "", "length": ", cut off at the limit", None: ", stopped"}
    speed = f"{end - start:.1f} s: the first after {first - start:.2f} s{rate}"
    console.note(f"{shown} tokens in {speed}{ends[request.finish_reason]}")
    if len(interrupts) > 1:
        raise KeyboardInterrupt
    return text



if __name__ == "__main__":
    main()
