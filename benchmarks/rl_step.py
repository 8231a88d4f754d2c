"""One whole RL step on CPU, rollout to update, beside TRL's GRPOTrainer on the same job. Needs `pip install trl`.

Both load the same folders of random weights: a Qwen3-shaped policy of 42M parameters (12 layers, hidden size 512,
vocabulary 8192) and a reward model of two such layers. A step samples 32 responses of 128 tokens to prompts of 40
words, scores them, takes the reference model's log-probs for the KL and makes one AdamW update. nanosafe's times are
those that train_rl.main logs, with micro-batches of 4,096 tokens, the tiny models' default; TRL has one batch of all
rollouts, no gradient checkpointing and no vLLM. Runs alternate, each in a process of its own, and the first step of
each is a warm-up. The last line is one JSON object.

Every word is one token, so all prompts are equally long and TRL pads nothing. The EOS id lies one past the model's
vocabulary: it can never be drawn, and every response has all its tokens. The steps differ where the algorithms do:
nanosafe also computes the policy's log-probs before the update, which TRL takes from the update's own forward. In
bfloat16 nanosafe updates float32 masters, TRL the bfloat16 weights themselves.

With --stored nothing is sampled: both are handed the same responses, of evenly many lengths from an eighth of
--new-tokens to all of them, as rollouts have them; TRL pads these, nanosafe packs them. Then "update" and "logprobs"
(the reference's, in nanosafe the policy's too) are the training step, and its tokens/s count prompts and responses.
Peak memory is that of the whole process (VmHWM; Linux).

    python benchmarks/rl_step.py
    python benchmarks/rl_step.py --stored --caches dynamic
    python benchmarks/rl_step.py --layers 2 --rollouts 8 --new-tokens 8 --rounds 1 --steps 1     # to try it
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tokenizers
import torch

from nanosafe import load_model, save_model
from nanosafe.io.machine import cpu_name
from nanosafe.model.config import ModelConfig
from nanosafe.model.decoder import Decoder

SHAPE = dict(model_type="qwen3", hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=4,
             head_dim=64, vocab_size=8192, rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=4096,
             tie_word_embeddings=True, pad_token_id=0, eos_token_id=8192)
POLICY = SHAPE | dict(architectures=["Qwen3ForCausalLM"])
REWARD = SHAPE | dict(architectures=["Qwen3ForSequenceClassification"], num_hidden_layers=2, id2label={"0": "reward"})
SPECIALS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHASES = ("rollout", "reward", "logprobs", "update")  # time/... of train_rl's metrics
KL_COEF, LEARNING_RATE = 0.01, 5e-7


def write_model(folder: Path, config: dict, dtype: torch.dtype) -> None:
    """A random model in the official layout, and a tokenizer whose every token but the special ones is a word."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig.from_dict(config)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
    save_model(model, folder)
    words = [*SPECIALS, "user", "assistant", *(f"w{i}" for i in range(5, config["vocab_size"])), "<|eos|>"]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*SPECIALS, "<|eos|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|pad|>", "eos_token": "<|eos|>",
                "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def stored_responses(args: argparse.Namespace) -> list[list[int]]:
    """Random words, in lengths that are spread evenly over new_tokens / 8 to new_tokens and come in random order."""
    rng, longest = random.Random(1), args.new_tokens
    lengths = [longest - (longest - longest // 8) * i // max(1, args.rollouts - 1) for i in range(args.rollouts)]
    return [rng.choices(range(100, SHAPE["vocab_size"]), k=n) for n in rng.sample(lengths, len(lengths))]


def peak_gb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def run_nanosafe(folder: Path, out: str, args: argparse.Namespace) -> dict:
    import train_rl
    from nanosafe.names import load_rows, load_tokenizer
    from nanosafe.sampler.params import Completion
    from nanosafe.text.data import encode_prompts

    if args.stored:
        train_rl.generate_over_ranks = lambda *given, **options: [
            [Completion(ids, [0.0] * len(ids), "length")] for ids in stored_responses(args)]

    settings = {
        "model": folder / "policy", "reward-model": folder / "reward", "prompts": folder / "rows.jsonl", "out": out,
        "device": "cpu", "dtype": args.dtype, "steps": 1 + args.steps, "minibatches": 1, "save-every": 1 + args.steps,
        "prompts-per-step": args.rollouts // args.samples_per_prompt, "samples-per-prompt": args.samples_per_prompt,
        "max-response-tokens": args.new_tokens, "kl-coef": KL_COEF, "lr": LEARNING_RATE,
        "max-prompt-tokens": 4096, "tokens-per-microbatch": 4096,
    }
    train_rl.main([part for name, value in settings.items() for part in (f"--{name}", str(value))])
    rows = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
    prompts, _ = encode_prompts(load_rows(str(folder / "rows.jsonl")), load_tokenizer(folder / "policy"), 4096)
    return {"steps": [{phase: row[f"time/{phase}"] for phase in PHASES} for row in rows],
            "tokens": [row["response/tokens"] for row in rows], "rewards": [row["reward/mean"] for row in rows],
            "prompts": sorted(ids for _, ids in prompts), "peak_gb": peak_gb(),
            "parameters": sum(p.numel() for p in load_model(folder / "policy").parameters())}


def run_trl(folder: Path, out: str, args: argparse.Namespace, cache: str) -> dict:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    steps, outputs = [], {phase: [] for phase in PHASES}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            steps.append(dict.fromkeys(PHASES, 0.0))
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            steps[-1]["update"] = time.perf_counter() - self.start - sum(steps[-1].values())

    rows = [json.loads(line)["prompt"] for line in open(folder / "rows.jsonl")]
    trainer = GRPOTrainer(
        str(folder / "policy"),
        str(folder / "reward"),
        GRPOConfig(
            out, use_cpu=True, bf16=args.dtype == "bfloat16", model_init_kwargs={"dtype": args.dtype},
            max_steps=1 + args.steps, per_device_train_batch_size=args.rollouts, gradient_accumulation_steps=1,
            num_generations=args.samples_per_prompt, max_completion_length=args.new_tokens, beta=KL_COEF,
            learning_rate=LEARNING_RATE, gradient_checkpointing=False, cache_implementation=cache,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        ),
        Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in rows]),
        callbacks=[Clock()],
    )

    def timed(phase: str, function):
        def call(*given, **named):
            start = time.perf_counter()
            outputs[phase].append(function(*given, **named))
            steps[-1][phase] = time.perf_counter() - start
            return outputs[phase][-1]

        return call

    if args.stored:
        trainer._generate_single_turn = lambda *given: (stored_responses(args), None)
    logprobs = trainer._get_per_token_logps_and_entropies
    reference = timed("logprobs", logprobs)
    trainer._generate = timed("rollout", trainer._generate)
    trainer._calculate_rewards = timed("reward", trainer._calculate_rewards)
    trainer._get_per_token_logps_and_entropies = lambda model, *given, **named: (
        reference if model is trainer.ref_model else logprobs)(model, *given, **named)  # the update calls it too
    trainer.train()
    prompts = {tuple(ids) for prompts, *_ in outputs["rollout"] for ids in prompts}
    return {"steps": steps, "tokens": [sum(map(len, responses)) for _, responses, *_ in outputs["rollout"]],
            "rewards": [rewards.mean().item() for rewards in outputs["reward"]],
            "prompts": sorted(prompts), "peak_gb": peak_gb(), "parameters": trainer.model.num_parameters()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layers", type=int, default=12, help="of the policy")
    parser.add_argument("--rollouts", type=int, default=32, help="responses per step")
    parser.add_argument("--samples-per-prompt", type=int, default=8, help="at least 2: TRL compares them")
    parser.add_argument("--words", type=int, default=40, help="of a prompt; its template adds 5 tokens")
    parser.add_argument("--new-tokens", type=int, default=128, help="of a response")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a run, after one that is not counted")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each")
    parser.add_argument("--stored", action="store_true", help="train on stored responses of many lengths; sample none")
    parser.add_argument("--caches", nargs="+", default=["dynamic", "static"], help="of TRL; its best counts")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run in this process: nanosafe, or a cache of TRL
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        with tempfile.TemporaryDirectory(dir=args.folder) as out:
            run = run_nanosafe if args.run == "nanosafe" else lambda *given: run_trl(*given, args.run)
            return print(json.dumps(run(args.folder, out, args)))
    try:
        versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    except PackageNotFoundError as error:
        sys.exit(f"this benchmark measures TRL beside nanosafe, and {error.name} is not installed: pip install trl")
    if args.rollouts % args.samples_per_prompt or args.samples_per_prompt < 2:
        sys.exit("--rollouts must be a multiple of --samples-per-prompt, which must be at least 2")

    generator, runs = random.Random(0), {peer: [] for peer in ("nanosafe", *args.caches)}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder, "policy"), POLICY | dict(num_hidden_layers=args.layers), getattr(torch, args.dtype))
        write_model(Path(folder, "reward"), REWARD, getattr(torch, args.dtype))
        with open(Path(folder, "rows.jsonl"), "w") as file:  # one step's prompts: every step answers all of them
            for _ in range(args.rollouts // args.samples_per_prompt):
                text = " ".join(f"w{generator.randrange(100, SHAPE['vocab_size'])}" for _ in range(args.words))
                print(json.dumps({"prompt": text}), file=file)
        for _ in range(args.rounds):
            for peer, results in runs.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--run", peer, "--folder", folder]
                done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"the run of {peer} failed:\n{done.stderr}")
                results.append(json.loads(done.stdout.splitlines()[-1]))

    everything = [result for results in runs.values() for result in results]
    prompts, parameters = everything[0]["prompts"], everything[0]["parameters"]
    tokens = sum(map(len, stored_responses(args))) if args.stored else args.rollouts * args.new_tokens
    for result in everything:
        assert result["prompts"] == prompts and result["parameters"] == parameters, "the job is not the same"
        assert result["tokens"] == [tokens] * (1 + args.steps), f"{result['tokens']} tokens, not {tokens} in every step"
    print(f"{parameters / 1e6:.1f}M parameters, {args.dtype}; in every step of both, {args.rollouts} prompts of "
          f"{len(prompts[0])} tokens and {tokens} tokens of responses")
    summary = {"benchmark": "rl_step", "machine": cpu_name(),
               "threads": torch.get_num_threads(), **versions, "parameters": parameters, "dtype": args.dtype,
               "rollouts": args.rollouts, "prompt_tokens": len(prompts[0]), "new_tokens": args.new_tokens,
               "response_tokens": tokens, "stored": args.stored, "steps": args.rounds * args.steps}
    for peer, results in runs.items():
        measured = [step for result in results for step in result["steps"][1:]]
        seconds = [sum(step.values()) for step in measured]
        row = {phase: round(statistics.median(step[phase] for step in measured), 3) for phase in PHASES}
        row |= {"step": round(statistics.median(seconds), 3), "range": [round(f(seconds), 3) for f in (min, max)],
                "reward_mean": round(statistics.mean(r for result in results for r in result["rewards"]), 4)}
        trained = statistics.median(step["logprobs"] + step["update"] for step in measured)
        row |= {"train_tokens_per_s": round((tokens + args.rollouts * len(prompts[0])) / trained),
                "peak_gb": round(max(result["peak_gb"] for result in results), 2)}
        name = peer if peer == "nanosafe" else f"trl {peer}"
        summary[name] = row
        print(f"{name:12} {row['step']:8.3f} s a step ({row['range'][0]:.3f}-{row['range'][1]:.3f}): "
              + ", ".join(f"{phase} {row[phase]:.3f}" for phase in PHASES)
              + f"; training {row['train_tokens_per_s']} tokens/s, peak {row['peak_gb']} GB")
    peers = [summary[f"trl {cache}"] for cache in args.caches]
    summary["ratio"] = round(min(peer["step"] for peer in peers) / summary["nanosafe"]["step"], 2)
    summary["train_ratio"] = round(
        summary["nanosafe"]["train_tokens_per_s"] / max(peer["train_tokens_per_s"] for peer in peers), 2)
    print(f"TRL's best to nanosafe: the step {summary['ratio']}, the training step {summary['train_ratio']}")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
