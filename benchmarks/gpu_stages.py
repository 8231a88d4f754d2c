"""The stages of gpu.py, each run in a process of its own: `python benchmarks/gpu_stages.py STAGE`.

A stage imports torch and then waits for the end of its standard input, which is its turn. Every result is a line of
JSON. What fails inside a stage is such a line too, and the stage goes on; in the end it exits with 1.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
LARGE = 120e9  # bytes of a card that takes the 8B stages whole
PEAK_FLOPS = 989e12  # bfloat16 of H100 and H200, by data sheet
TINY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, vocab_size=640)  # of --smoke
# Of the training runs: a step has two updates, so that clipping acts, and no checkpoint is written.
RL = ["--random-weights", "--kl-coef", "0.01", "--low-memory", "--minibatches", "2", "--steps", "3", "--save-every",
      "1000000", "--dtype", "bfloat16"]  # fmt: skip
REWARD_MODEL = "skywork-v2-qwen3-0.6b"  # of `rl`
REPORTED = ("time/", "memory/", "mismatch/", "policy/grad_norm", "policy/skipped")  # of a row of metrics


@dataclass
class Stage:
    """What a stage is told, and how it measures and reports."""

    name: str
    device: torch.device
    smoke: bool  # tiny shapes
    scratch: Path  # folder of weights and runs
    failures: list = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def say(self, **values) -> None:
        print(json.dumps({"stage": self.name, **values}), flush=True)

    @contextmanager
    def attempt(self, **case):
        """What fails inside is said beside its case, and the next case runs."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failures.append(case)
            self.say(**case, error=f"{type(error).__name__}: {error}"[:300])
        if self.on_gpu:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def once(self, run) -> float:
        """Seconds of one run."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def seconds(self, run, repeats: int = 5) -> float:
        """Median of `repeats` runs, after two that are not counted."""
        times = [self.once(run) for _ in range(repeats + 2)]
        return sorted(times[2:])[repeats // 2]

    def graphed(self, run):
        """`run` as a CUDA graph, or itself on a CPU."""
        if not self.on_gpu:
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # sets libraries up
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def kernels(self, run, top: int = 14) -> list:
        """[name, launches, microseconds] of the kernels that take most of one run, and of all together."""
        if not self.on_gpu:
            return []
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as record:
            self.once(run)
        rows = []
        for event in record.key_averages():
            if event.self_device_time_total:
                rows.append([event.key[:70], event.count, round(event.self_device_time_total)])
        rows.sort(key=lambda row: -row[2])
        return [*rows[:top], ["all", sum(row[1] for row in rows), sum(row[2] for row in rows)]]

    def read_bandwidth(self) -> float:
        """Bytes per second at which a large tensor is read."""
        large = torch.randn(2**20 if self.smoke else 2**30, device=self.device)
        return large.nbytes / self.seconds(large.sum)

    def shape(self, alias: str, layers: int | None = None) -> dict:
        """The config of an alias, perhaps with fewer layers; tiny in --smoke."""
        from nanosafe.plan.shapes import SHAPES

        if self.smoke:
            return SHAPES[alias] | TINY
        return SHAPES[alias] | ({"num_hidden_layers": layers} if layers else {})

    def model_name(self, alias: str) -> str:
        """The alias, or in --smoke a folder with a config.json of the same family."""
        if not self.smoke:
            return alias
        folder = self.scratch / f"{alias}-shape"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.shape(alias)))
        return str(folder)

    def is_large(self) -> bool:
        """Whether the card takes the 8B stages whole.

        Asked of the driver's tool, for a process that prepares weights should not take memory on the card.
        """
        if not self.on_gpu:
            return False
        question = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(question, capture_output=True, text=True).stdout
            return float(answer.split()[0]) * 2**20 > LARGE
        except (OSError, IndexError, ValueError):
            return torch.cuda.get_device_properties(0).total_memory > LARGE


# Correctness.


def tests(stage: Stage) -> None:
    """Kernels against their plain twins, and everything that runs only on CUDA, in eight processes."""
    files = sorted((ROOT / "tests" / "helpers").glob("interpreted_*.py")) + [ROOT / "tests" / "test_cuda.py"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "--durations=8"]
    if stage.smoke:  # without a GPU the interpreter would need minutes
        command += [str(files[-1]), "-k", "refuses or nccl"]
    else:
        command += ["-n", "8", *map(str, files)]
    environment = os.environ | {"NANOSAFE_TEST_GPU": "1", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr, file=sys.stderr)
    lines = done.stdout.splitlines()
    broken = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    counts = [line for line in lines if re.search(r"\d+ (passed|failed|error)", line)]
    stage.say(ok=done.returncode == 0, summary=counts[-1:], failed=broken[:20])
    if done.returncode:
        stage.failures.append("tests")


def logits(stage: Stage) -> None:
    """Ours and transformers' on the same weights: in float32, then the errors of both in bfloat16."""
    from tiny_models import decoder_like, random_reference, tiny_raw

    from nanosafe.plan.shapes import SHAPES

    torch.backends.cudnn.allow_tf32 = False  # transformers' convolutions
    shapes = {"qwen3-0.6b": 8, "r1-qwen-1.5b": 4, "llama-3.1-8b": 2, "granite-4.0-tiny": 6}
    families = dict(zip(shapes, ("qwen3", "qwen2", "llama", "granite4"), strict=True))
    for alias, layers in shapes.items():
        with stage.attempt(model=alias):
            raw = SHAPES[alias] | dict(num_hidden_layers=layers, vocab_size=8192, torch_dtype="float32")
            if "layer_types" in raw:
                raw["layer_types"] = raw["layer_types"][:layers]
            if stage.smoke:
                raw = tiny_raw(families[alias])
            reference = random_reference(raw)
            ours, theirs = decoder_like(reference, raw).to(stage.device), reference.to(stage.device)
            ids = torch.randint(raw["vocab_size"], (2, 64 if stage.smoke else 512), device=stage.device)
            with torch.no_grad():
                truth = theirs(ids).logits
                exact = relative_errors(ours(ids), truth).max().item()
                # The median, for rounding sends a few tokens to other experts, in either model.
                rounded = relative_errors(ours.bfloat16()(ids), truth).median().item()
                allowed = relative_errors(theirs.bfloat16()(ids).logits, truth).median().item()
            good = exact < 1e-4 and rounded < 1.3 * allowed
            stage.say(model=alias, layers=layers, ok=good, float32=exact, bf16_ours=rounded, bf16_transformers=allowed)
            if not good:
                stage.failures.append(alias)


def relative_errors(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Of each token, [B, T]."""
    return (found.float() - truth).norm(dim=-1) / truth.norm(dim=-1)


# Speed.


def card(stage: Stage) -> None:
    """The limits of this card, and products in the shapes of the 8B's decode step, of weights that no cache holds."""
    properties = torch.cuda.get_device_properties(0) if stage.on_gpu else None
    stage.say(torch=torch.__version__, name=properties.name if properties else "cpu",
              memory_gb=round(properties.total_memory / 1e9, 1) if properties else None)
    stage.say(read_gb_s=round(stage.read_bandwidth() / 1e9, 1))
    source = torch.randn(2**20 if stage.smoke else 2**30, device=stage.device)
    target = torch.empty_like(source)
    stage.say(copy_gb_s=round(2 * source.nbytes / stage.seconds(partial(target.copy_, source)) / 1e9, 1))
    del source, target
    size = 64 if stage.smoke else 8192
    a, b = (torch.randn(size, size, device=stage.device, dtype=stage.dtype) for _ in range(2))
    stage.say(tflops=round(2 * size**3 / stage.seconds(partial(torch.mm, a, b)) / 1e12, 3))
    launches = stage.graphed(partial(add_ones, torch.zeros(64, device=stage.device), 500))
    stage.say(us_per_kernel_in_a_graph=round(stage.seconds(launches) / 500 * 1e6, 2))
    shapes = dict(q=(4096, 4096), k=(1024, 4096), qkv=(6144, 4096), gate=(12288, 4096), gate_up=(24576, 4096),
                  down=(4096, 12288), head=(151936, 4096))  # fmt: skip
    for name, (out, width) in shapes.items():
        if stage.smoke:
            out, width = out // 64, width // 64
        sets = max(2, min(40, 2**29 // (2 * out * width)))
        weights = [torch.randn(out, width, device=stage.device, dtype=stage.dtype) for _ in range(sets)]
        row = {}
        for B in (1, 16, 256):
            x = torch.randn(B, width, device=stage.device, dtype=stage.dtype)
            each = stage.seconds(stage.graphed(partial(multiply, x, weights))) / sets
            row[B] = [round(each * 1e6, 1), round(weights[0].nbytes / each / 1e9)]
        stage.say(product=name, us_and_gb_s=row)
        del weights


def add_ones(x: torch.Tensor, times: int) -> None:
    for _ in range(times):
        x.add_(1)


def multiply(x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        F.linear(x, weight)


def decode(stage: Stage) -> None:
    import sampler

    from nanosafe import SamplingParams, generate
    from nanosafe.kernels import row_product
    from nanosafe.model import decode as decoding

    context = 32 if stage.smoke else 1024
    model = sampler.random_model(stage.shape("qwen3-8b"), stage.device, stage.dtype)
    bandwidth, steps = stage.read_bandwidth(), 4 if stage.smoke else 16
    # The code as it is; then, of one sequence, the sides of what is off in it.
    shipped = decoding.ROW_PRODUCTS, row_product.DEPENDENT_LAUNCH
    cases = [(B, *shipped) for B in ((1, 16) if stage.smoke else (1, 16, 256))]
    for B, rows, early in [*cases, (1, True, False), (1, True, True)]:
        decoding.ROW_PRODUCTS, row_product.DEPENDENT_LAUNCH = rows, early
        case = dict(batch=B, row_products=rows, dependent_launch=early)
        with stage.attempt(**case):
            start = time.perf_counter()
            run = sampler.decode_steps(model, B, context)
            stage.synchronize()
            ready = time.perf_counter() - start
            each = stage.seconds(partial(run, steps)) / steps
            floor = sampler.step_bytes(model, B, context) / bandwidth
            stage.say(**case, context=context, ms=round(1e3 * each, 3), tokens_s=round(B / each),
                      floor_ms=round(1e3 * floor, 3), share=round(floor / each, 3), read_gb_s=round(bandwidth / 1e9),
                      cache_and_capture_s=round(ready, 2))
            stage.say(**case, kernels=stage.kernels(partial(run, 1)))
            del run  # with it goes the cache
    decoding.ROW_PRODUCTS, row_product.DEPENDENT_LAUNCH = shipped
    params = SamplingParams(max_new_tokens=8 if stage.smoke else 256, ignore_eos=True, seed=0)
    for B in (1, 64):
        with stage.attempt(whole_generate=B):
            prompts = [[5 + i % 7] * 128 for i in range(B)]
            took = stage.once(partial(generate, model, prompts, params))
            stage.say(whole_generate=B, new_tokens=params.max_new_tokens, seconds=round(took, 2),
                      tokens_s=round(B * params.max_new_tokens / took))


def train(stage: Stage) -> None:
    import sampler

    import train_sft
    from nanosafe.parallel import Ranks
    from nanosafe.plan import memory
    from nanosafe.text.data import Document
    from nanosafe.train.optim import Optimizer

    whole = stage.on_gpu and torch.cuda.get_device_properties(0).total_memory > LARGE
    model = sampler.random_model(stage.shape("qwen3-8b", None if whole else 10), stage.device, torch.bfloat16)
    model.requires_grad_(True)
    ranks, optimizer = Ranks(stage.device.type, alone=True), Optimizer(model, low_memory=True)
    config, size, length = model.config, memory.sizes(model.config), 64 if stage.smoke else 2048
    heads = config.num_attention_heads * config.head_dim
    resident = sum(memory.training_state(size, 2, 1, True).values()) + memory.gradients(size, 1)
    for tokens, recompute in ((16384, "layer"), (16384, "some"), (8192, "none")):
        with stage.attempt(tokens=tokens, recompute=recompute):
            tokens = tokens // 64 if stage.smoke else tokens
            model.recompute(recompute)
            prompt, response = [7] * (length // 16), [5 + i % 11 for i in range(length - length // 16)]
            documents = [Document(prompt, response)] * (tokens // length)
            run = partial(train_sft.backward, model, documents, tokens, ranks)
            if stage.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            each = stage.seconds(run, repeats=1 if stage.smoke else 2)
            peak = torch.cuda.max_memory_allocated() if stage.on_gpu else 0
            # Forward and backward of the model are 6 FLOP a parameter and token; of causal attention, 6 a pair of
            # positions and dimension of the query heads, for a token sees half of its document. What is recomputed
            # is not counted: that is the convention of MFU.
            flops = 6 * (size.total - size.root + size.head) * tokens
            flops += 6 * config.num_hidden_layers * heads * length * tokens
            planned = resident + memory.training_activations(config, size, 2, tokens, recompute, 1)
            stage.say(layers=config.num_hidden_layers, tokens=tokens, recompute=recompute, seconds=round(each, 3),
                      tokens_s=round(tokens / each), mfu=round(flops / each / PEAK_FLOPS, 3),
                      peak_gb=round(peak / 1e9, 2), plan_gb=round(planned / 1e9, 2))
            stage.say(tokens=tokens, recompute=recompute, kernels=stage.kernels(run, 20))
    for number in (1, 2):  # the first step compiles
        with stage.attempt(optimizer_step=number):
            train_sft.backward(model, [Document([7], [5, 6])], 64, ranks)
            took = stage.once(partial(optimizer.step, 1e-6))
            stage.say(optimizer_step=number, seconds=round(took, 3), parameters=size.total)


def head(stage: Stage) -> None:
    import head as benchmark

    for tokens, vocab, columns in ((8192, 131072, 16384), (8192, 151936, 16384), (16384, 151936, 8192),
                                   (16384, 151936, 4096)):
        with stage.attempt(tokens=tokens, vocab=vocab, columns=columns):
            sizes = dict(tokens=tokens, dim=4096, vocab=vocab, columns=columns)
            if stage.smoke:
                sizes = dict(tokens=64, dim=64, vocab=vocab // 256, columns=columns // 256)
            kind = str(stage.dtype).removeprefix("torch.")
            case = benchmark.Case(argparse.Namespace(device=str(stage.device), dtype=kind, **sizes))
            ours, products, row = case.function("nanosafe"), case.function("products"), {}
            for name, backward in (("forward", False), ("both", True)):
                took = stage.seconds(partial(case.run, ours, backward))
                floor = stage.seconds(partial(case.run, products, backward))
                row[name] = {"ms": round(1e3 * took, 2), "to_products": round(took / floor, 3)}
            stage.say(tokens=tokens, vocab=vocab, columns=columns, **row)
            kernels = stage.kernels(partial(case.run, ours, True), 8)
            stage.say(tokens=tokens, vocab=vocab, columns=columns, kernels=kernels)


# Whole runs.


def prepare(stage: Stage) -> None:
    """Random weights for `rl` and `rl8b`, which find them in the cache."""
    from nanosafe.plan.random_weights import random_checkpoint

    for alias in ("qwen3-0.6b", REWARD_MODEL, "qwen3-8b"):
        start = time.monotonic()
        random_checkpoint(stage.model_name(alias))
        stage.say(model=alias, seconds=round(time.monotonic() - start, 1))


def rl(stage: Stage) -> None:
    prompts, tokens = ("4", "16") if stage.smoke else ("64", "256")
    run_rl(stage, "qwen3-0.6b", ["--prompts-per-step", prompts, "--max-response-tokens", tokens,
                                 "--reward-model", stage.model_name(REWARD_MODEL)])  # fmt: skip


def rl8b(stage: Stage) -> None:
    """All parameters where the card has 120 GB, else adapters."""
    prompts, tokens = ("4", "16") if stage.smoke else ("32", "512")
    trained = ["--offload"] if stage.is_large() else ["--lora-rank", "32"]
    run_rl(stage, "qwen3-8b", [*trained, "--prompts-per-step", prompts, "--max-response-tokens", tokens,
                               "--reward-model", "rule:refusal"])  # fmt: skip


def run_rl(stage: Stage, alias: str, flags: list[str]) -> None:
    """train_rl.py until its second row of metrics; the peak of a step beside the plan's."""
    from nanosafe import plan
    from nanosafe.plan.machine import find_machine
    from nanosafe.train.flags import rl_flags

    out, name = stage.scratch / f"run-{alias}", stage.model_name(alias)
    flags = ["--model", name, *RL, "--device", stage.device.type, "--out", str(out), *flags]
    given = vars(rl_flags("").parse_args(flags))
    settings = plan.settings("rl", name, **{k: v for k, v in given.items() if v is not None and k != "model"})
    planned = plan.make("rl", settings, find_machine("", stage.device.type, tiny=False)).peak
    with open(stage.scratch / f"{alias}.log", "w") as log:
        process = subprocess.Popen([sys.executable, str(ROOT / "train_rl.py"), *flags], cwd=ROOT, stdout=log,
                                   stderr=subprocess.STDOUT)
    metrics, seen, ended = out / "metrics.jsonl", 0, False
    while seen < 2 and not ended:
        ended = process.poll() is not None  # asked first: what stands in the file after its end is all there is
        lines = metrics.read_text().split("\n")[:-1][:2] if metrics.exists() else []  # whole ones
        for line in lines[seen:]:
            row = {key: value for key, value in json.loads(line).items() if key.startswith(REPORTED)}
            stage.say(model=alias, plan_gb=round(planned / 1e9, 2), **row)
        seen = len(lines)
        time.sleep(0.2)
    if not ended:
        process.kill()  # before it saves a checkpoint
        process.wait()
    stage.say(model=alias, ok=seen >= 2, tail=Path(log.name).read_text().splitlines()[-8:])
    if seen < 2:
        stage.failures.append(alias)


STAGES = {run.__name__: run for run in (card, tests, logits, decode, train, head, prepare, rl, rl8b)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for weights and runs")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    args = parser.parse_args()
    sys.stdin.read()
    chosen = Stage(args.stage, torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu"), args.smoke,
                   args.scratch)
    STAGES[args.stage](chosen)
    raise SystemExit(bool(chosen.failures))
