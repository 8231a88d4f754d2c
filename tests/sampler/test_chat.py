"""The chat program as a person meets it: piped, in a terminal, interrupted; its decoder against whole decodings."""

import io
import json
import math
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models
from world import CHATML, write_policy, write_tokenizer

from nanosafe.names import load_model, load_tokenizer
from nanosafe.sampler import __main__ as chat
from nanosafe.sampler.engine import Engine
from nanosafe.sampler.generation import generate, sequence
from nanosafe.sampler.params import SamplingParams
from nanosafe.sampler.terminal import LONGEST_BROKEN, Console, TextStream
from nanosafe.text.tokenizer import Tokenizer

DIM, NORMAL = "\x1b[2m", "\x1b[0m"
ROOT = Path(__file__).parents[2]
THOUGHT, ANSWER = "Wait, but that is not safe: 中文🙂</think>", " How do I bake bréd"
OPENING = CHATML.replace("assistant\n' }}", "assistant<think>\n' }}")  # opens the thought, as R1-Distill's does


def write_scripted(folder: Path, text: str, *, endless: bool = False, template: str = CHATML) -> Path:
    """A policy that always answers `text`, then stops, or if `endless` begins again.

    Its layers add nothing, so that each token decides the next: the tokens of `text` must be distinct.
    """
    write_policy(folder, hidden_size=512, max_position_embeddings=40_000)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    tokenizer = load_tokenizer(folder)
    script = tokenizer.encode(text)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "?"}], add_generation_prompt=True)
    chain = [prompt[-1], *script, script[0] if endless else tokenizer.encode("<|im_end|>")[0]]
    assert len(set(chain)) == len(chain) - endless
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            tensor.zero_()
        elif name == "model.norm.weight":
            tensor.fill_(1)
        elif name == "model.embed_tokens.weight":
            tensor.copy_(torch.eye(*tensor.shape))
    for token, following in pairwise(chain):
        weights["lm_head.weight"][following, token] = 10.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "random": write_policy(root / "random", max_position_embeddings=2048),
        "scripted": write_scripted(root / "scripted", "<think>" + THOUGHT + ANSWER),
        "opened": write_scripted(root / "opened", THOUGHT + ANSWER, template=OPENING),
        "endless": write_scripted(root / "endless", "<think>" + THOUGHT + ANSWER, endless=True),
    }


def command(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "nanosafe.sampler", "--model", str(folder), "--device", "cpu", *flags]


def run(folder: Path, *flags: str, lines: str = "") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the program, piped."""
    done = subprocess.run(command(folder, *flags), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          input=lines.encode(), capture_output=True, timeout=120)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def talk(capsys, monkeypatch):
    """talk(folder, *flags, lines=[...], terminals=...) -> stdout, stderr of the program in this process."""

    def talk(folder: Path, *flags: str, lines: Iterable[str] = (), terminals: str = "") -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(getattr(sys, name), "isatty", lambda name=name: name in terminals)
        chat.talk(chat.flags().parse_args(["--model", str(folder), "--device", "cpu", *flags]))
        return tuple(capsys.readouterr())

    return talk


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def expected(folder: Path, messages: list[dict], *, tokens: int, seed: int = 0, temperature: float = 0.6) -> str:
    """The answer by `generate`, decoded as a whole, with the sampling settings that world.py writes."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype=torch.float32)
    params = SamplingParams(temperature=temperature, top_p=0.95, top_k=20, max_new_tokens=tokens, seed=seed)
    [[completion]] = generate(model, [tokenizer.encode_chat(messages, add_generation_prompt=True)], params)
    return tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_one_question_through_a_pipe(checkpoints):
    code, out, err = run(checkpoints["scripted"], "--prompt", "Hi")
    assert (code, out) == (0, f"<think>{THOUGHT}{ANSWER}\n")
    assert "\x1b" not in err
    assert "from generation_config.json: temperature 0.6, top_p 0.95, top_k 20\n" in err
    count = len(load_tokenizer(checkpoints["scripted"]).encode(f"<think>{THOUGHT}{ANSWER}")) + 1  # the EOS token
    assert re.search(rf"^{count} tokens in \d+\.\d s: the first after \d+\.\d\d s, then \d+\.\d tokens/s\n$", err, re.M)


def test_two_turns_through_a_pipe_remember_what_was_said(checkpoints):
    folder, system = checkpoints["random"], {"role": "system", "content": "Be brief."}
    code, out, _ = run(folder, "--system", "Be brief.", "--seed", "5", "--max-new-tokens", "40",
                       lines="Grüße 🙂\nAnd then?\n")
    first = expected(folder, [system, user("Grüße 🙂")], tokens=40, seed=5)
    second = expected(folder, [system, user("Grüße 🙂"), assistant(first), user("And then?")], tokens=40, seed=5)
    assert (code, out) == (0, f"{first}\n{second}\n")


def test_ctrl_c_stops_an_answer_and_at_the_prompt_leaves(checkpoints):
    terminal, program_end = pty.openpty()
    process = subprocess.Popen(command(checkpoints["endless"]), cwd=ROOT, stdin=program_end, stdout=program_end,
                               stderr=program_end, env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"})
    os.close(program_end)
    seen = ""

    def wait_for(text: str) -> str:
        """What the terminal shows up to `text`, from where the last call ended."""
        nonlocal seen
        while text not in seen:
            assert select.select([terminal], [], [], 60)[0], f"no {text!r} after {seen[-300:]!r}"
            seen += os.read(terminal, 1 << 16).decode(errors="replace")
        before, _, seen = seen.partition(text)
        return before + text

    try:
        for _ in range(2):  # the second answer shows that the first left the engine
            wait_for("> ")
            os.write(terminal, b"Hi\n")
            wait_for(f"{DIM}<think>{THOUGHT}{NORMAL}{ANSWER}{DIM}<think>")
            process.send_signal(signal.SIGINT)
            rest = wait_for("stopped")
            assert f"{NORMAL}\r\n{DIM}" in rest, "the end of a stopped thought must not leave the terminal dim"
            assert "tokens/s" in rest
        wait_for("> ")
        time.sleep(0.5)  # readline shows the prompt a moment before it listens
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


@pytest.mark.parametrize(("name", "opening"), [("scripted", "<think>"), ("opened", "<think>\n")])
def test_the_thought_is_dimmed_in_a_terminal_alone(checkpoints, talk, monkeypatch, name, opening):
    folder, question = checkpoints[name], ("--prompt", "Hi")
    dimmed, err = talk(folder, *question, terminals="stdout stderr")
    assert dimmed.rstrip(f"{NORMAL}\n") == f"{DIM}{opening}{THOUGHT}{NORMAL}{ANSWER}"
    assert err.endswith(f"tokens/s{NORMAL}\n")
    plain = f"{opening}{THOUGHT}{ANSWER}\n"
    cases = [("stdout", "", ""), ("stderr", "", ""), ("stdout stderr", "--plain", ""), ("stdout stderr", "", "1")]
    for terminals, flag, no_color in cases:
        monkeypatch.setenv("NO_COLOR", no_color)
        out, err = talk(folder, *question, *flag.split(), terminals=terminals)
        assert out == plain and "\x1b" not in err


@pytest.mark.parametrize("text", [
    "<think>a</think>b", "a <b </think", "<think><</think>>", "<<think>/</</think>b<think>c", "no tag", "<thin</thoug>"
])
def test_tags_in_pieces(capsys, text):
    dice, console = random.Random(text), Console(plain=True)
    console.dim, console.normal = "[", "]"
    for _ in range(20):
        cuts = sorted(dice.choices(range(len(text) + 1), k=dice.randrange(len(text))))
        for start, end in pairwise([0, *cuts, len(text)]):
            console.write(text[start:end])
        console.end_answer()
        assert capsys.readouterr().out == text.replace("<think>", "[<think>").replace("</think>", "</think>]") + "]\n"


def test_a_terminal_gets_no_control_characters_from_a_model(capsys, monkeypatch):
    for terminal, shown in ((True, "a�b�[2Jc\n\td�\n"), (False, "a\rb\x1b[2Jc\n\td\x9b\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        console = Console(plain=True)
        console.write("a\rb\x1b[2Jc\n\td\x9b")
        console.end_answer()
        assert capsys.readouterr().out == shown


class Recorder:
    """A tokenizer that notes how many tokens it was given to decode."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.lengths = tokenizer, []

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        self.lengths.append(len(ids))
        return self.tokenizer.decode(ids, skip_special_tokens)


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    recorder = Recorder(tokenizer)
    stream = TextStream(recorder)
    pieces = [stream.add(token) for token in ids] + [stream.pending()]
    assert max(recorder.lengths) <= 2 * LONGEST_BROKEN, "a token's cost must not grow with the text"
    return pieces


TEXTS = [
    "plain words,  spaces\n\nand lines", "👩‍👩‍👧‍👦 🇩🇪 👍🏽 ✈️", "漢字とかな、한국어", "e\u0301 n\u0303o a\u0308\u0323",
    "नमस्ते ก็ 𝔘𝔫𝔦",
    "a real \N{REPLACEMENT CHARACTER} and more", "it ends in \N{REPLACEMENT CHARACTER}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text(checkpoints, text):
    tokenizer = load_tokenizer(checkpoints["random"])  # byte-level, and most bytes are tokens of their own
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    if "�" not in text:
        assert "�" not in "".join(pieces)
        assert sum(map(bool, pieces)) > len(text) // 8, "text must come piece by piece"


def test_streamed_text_of_an_official_tokenizer(assets):
    tokenizer = Tokenizer(assets / "tokenizers" / "qwen3")
    ids = tokenizer.encode("<think>\n" + "\n".join(TEXTS) + "</think>\n\nDone.<|im_end|>")
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert pieces[0] == "<think>" and pieces[-2] == "", "a special token is not shown"


def test_streamed_text_of_any_tokens(checkpoints):
    """A poor model draws bytes that are no text; they come out as decoding all of them at once has them."""
    tokenizer, dice = load_tokenizer(checkpoints["random"]), random.Random(0)
    for _ in range(20):
        ids = dice.choices(range(tokenizer.vocab_size), k=200)
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)
    ids = tokenizer.encode("é")[1:] * 500  # never a character
    assert "".join(pieces_of(tokenizer, ids)) == "�" * 500


def test_spaces_survive_where_a_decoder_drops_the_first(tmp_path):
    """Llama 2's decoder: ▁ is a space, dropped at the start of a text; bytes are tokens of their own."""
    words = ["▁Hello", "▁world", "▁", "<0xE4>", "<0xB8>", "<0xAD>", "!"]
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    built = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="!"))
    built.decoder = decoders.Sequence(decoder)
    built.save(str(tmp_path / "tokenizer.json"))
    ids = [0, 1, 2, 3, 4, 5, 1, 2, 0, 6]
    assert "".join(pieces_of(Tokenizer(tmp_path), ids)) == "Hello world 中 world  Hello!"


def test_tags_are_shown_where_they_are_special_tokens(tmp_path):
    flags = {"special": True, "normalized": False}
    tokens = {1 + i: {"content": tag} | flags for i, tag in enumerate(("<think>", "</think>"))}
    write_tokenizer(tmp_path, CHATML, ["<|im_end|>", "<think>", "</think>"], added_tokens_decoder=tokens)
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("<think>bake</think>bread<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>bake</think>bread"
    assert "".join(pieces_of(tokenizer, ids)) == "<think>bake</think>bread"


@pytest.mark.parametrize("eos", ["<|endoftext|>", "r"])
def test_an_answer_ends_at_every_eos_and_shows_none(checkpoints, tmp_path, talk, eos):
    folder = shutil.copytree(checkpoints["scripted"], tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        eos_ids = load_tokenizer(folder).encode(eos)
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {"eos_token_id": eos_ids}))
    out, err = talk(folder, "--prompt", "Hi", "--max-new-tokens", "60")
    # <|endoftext|> is never drawn: the tokenizer's own <|im_end|> ends the answer.
    assert out == f"<think>{THOUGHT}{ANSWER.split(eos)[0]}\n" and "cut off" not in err


def test_an_interrupted_answer_leaves_the_engine(checkpoints, capsys, monkeypatch):
    folder = checkpoints["endless"]
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype=torch.float32)
    engine = Engine(model, max_tokens=500, requests=1)
    step, steps = engine.step, iter(range(8))
    handler = signal.getsignal(signal.SIGINT)  # not Python's own where the tests run in a shell's background

    def step_then_interrupt() -> None:
        step()
        if next(steps) == 7:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(engine, "step", step_then_interrupt)
    prompt = tokenizer.encode_chat([user("Hi")], add_generation_prompt=True)
    request = sequence(model, prompt, SamplingParams(max_new_tokens=400, temperature=0.0))
    assert chat.print_answer(engine, request, tokenizer, Console(plain=True)) == "<think>Wait, but that is not safe"
    assert not engine.busy and engine.scheduler.pool.free == [0]
    assert signal.getsignal(signal.SIGINT) is handler
    assert "8 tokens in" in capsys.readouterr().err


def test_a_second_interrupt_leaves_the_conversation_quietly(checkpoints, talk, monkeypatch):
    step = Engine.step

    def step_then_interrupt_twice(engine) -> None:
        drawn = step(engine)
        if len(drawn[0].token_ids) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return drawn

    monkeypatch.setattr(Engine, "step", step_then_interrupt_twice)
    out, err = talk(checkpoints["endless"], "--max-new-tokens", "40", lines=["Hi", "Hi"])
    assert err.count("tokens in") == 1 and err.rstrip().endswith("stopped"), "the second question is not asked"


def test_seeds_and_flags(checkpoints, talk):
    folder, flags = checkpoints["random"], ("--prompt", "Hi", "--max-new-tokens", "30")
    first, again, other = (talk(folder, *flags, "--seed", seed)[0] for seed in "334")
    assert first == again != other
    assert talk(folder, *flags)[0] != talk(folder, *flags)[0], "without a seed every answer is a new one"
    out, err = talk(folder, *flags, "--temperature", "0")
    assert out == expected(folder, [user("Hi")], tokens=30, temperature=0.0) + "\n"
    assert "from the command line: temperature 0.0\nfrom generation_config.json: top_p 0.95, top_k 20\n" in err
    assert err.endswith("cut off at the limit\n")


def test_how_a_checkpoint_asks_to_be_drawn_from_is_honoured_or_refused(checkpoints, tmp_path, talk):
    folder = shutil.copytree(checkpoints["random"], tmp_path / "model")
    path, flags = folder / "generation_config.json", ("--prompt", "Hi", "--max-new-tokens", "30")
    greedy = expected(folder, [user("Hi")], tokens=30, temperature=0.0)
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.9, "top_k": 20.0}))
    assert talk(folder, *flags)[0] == greedy + "\n", "as in Qwen2.5-Math"
    assert talk(folder, *flags, "--temperature", "1", "--seed", "0")[0] != greedy + "\n"
    path.write_text(json.dumps({"do_sample": True, "repetition_penalty": 1.05}))
    with pytest.raises(ValueError, match="repetition_penalty of 1.05, which is not computed: set --temp"):
        talk(folder, *flags)
    assert talk(folder, *flags, "--temperature", "0")[0] == greedy + "\n"
    for field, value in {"temperature": "0.6", "top_k": -1, "top_p": 0, "min_p": math.nan, "do_sample": 1}.items():
        path.write_text(json.dumps({field: value}))
        with pytest.raises(ValueError, match=f"{path}: field '{field}'"):
            talk(folder, *flags)


def test_new_and_quit(checkpoints, talk):
    flags = ("--seed", "1", "--max-new-tokens", "8")
    out, err = talk(checkpoints["random"], *flags, lines=["Hi", "Hi", "", "/help", "/new", "Hi", "/quit", "Hi"])
    assert "/new starts afresh" in err
    fresh = expected(checkpoints["random"], [user("Hi")], tokens=8, seed=1)
    later = expected(checkpoints["random"], [user("Hi"), assistant(fresh), user("Hi")], tokens=8, seed=1)
    assert fresh != later
    assert out == f"{fresh}\n{later}\n{fresh}\n"


def test_a_conversation_that_is_too_long(checkpoints, talk):
    folder, long = checkpoints["random"], "bread " * 50
    with pytest.raises(ValueError, match="conversation has .* no room for an answer within --max-tokens 60"):
        talk(folder, "--max-tokens", "60", "--prompt", long)
    out, err = talk(folder, "--max-tokens", "60", "--seed", "0", lines=[long, "Hi"])
    assert "error: the conversation has" in err
    tokenizer = load_tokenizer(folder)
    room = 60 - len(tokenizer.encode_chat([user("Hi")], add_generation_prompt=True))
    assert out == expected(folder, [user("Hi")], tokens=room) + "\n", "as if the long line had not been typed"


def test_mistakes_are_reported_before_weights_are_read(checkpoints, tmp_path, talk):
    folder = shutil.copytree(checkpoints["random"], tmp_path / "model", ignore=lambda *_: ["model.safetensors"])
    for flag, value, message in (("--top-p", "3", "top_p must be in"), ("--max-tokens", "2049", "has only 2048")):
        with pytest.raises(ValueError, match=message):
            talk(folder, flag, value)
    (folder / "tokenizer_config.json").write_text("{}")
    code, out, err = run(folder)
    assert (code, out) == (1, "")
    assert "error: " in err and "has no chat template" in err and "Traceback" not in err
