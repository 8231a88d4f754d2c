"""The paper in one command: its jobs against the scripts' own flags, how they run, and what the report says of numbers.

No model is trained here: results are made up, so that what the report must say of them is known.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from test_run_folder import held_by_another

from nanosafe import plan
from nanosafe.evals.benchmark import adapt
from nanosafe.evals.flags import eval_flags
from nanosafe.evals.results import BenchmarkResult, Metric, Result, Score, mean, write_result
from nanosafe.evals.scores import summarize, summarize_memorization
from nanosafe.evals.tiny_suite import tiny_suite
from nanosafe.paper import __main__ as paper
from nanosafe.paper import findings
from nanosafe.paper import report as paper_report
from nanosafe.paper.flags import paper_flags
from nanosafe.paper.jobs import Job, run_jobs
from nanosafe.paper.runs import Run, curves, hardest_variation, shown
from nanosafe.plan.machine import find_machine
from nanosafe.train.flags import rl_flags, sft_flags
from nanosafe.train.reinforce import MAX_LOG_RATIO

SAFETY = Metric("safety", "safe")
MODES = {"paper": [], "ablations": ["--ablations"], "tune": ["--tune"]}


def jobs(*flags: str) -> list[Job]:
    args = paper_flags("").parse_args(flags)
    seeds = [paper.TUNING_SEED] if args.tune else range(args.seeds)
    return [job for seed in seeds for model in args.model
            for job in paper.jobs_of(model, seed, paper.arms_of(model, args), args)]


# The jobs.


@pytest.mark.parametrize("mode", MODES)
def test_every_command_is_one_that_its_script_takes(mode):
    scripts = {"train_sft": sft_flags(""), "train_rl": rl_flags(""), "eval": eval_flags("")}
    seen = set()
    for job in jobs(*MODES[mode]):
        module, *arguments = job.command
        seen.add(module)
        if module in scripts:
            args = scripts[module].parse_args(arguments)
            assert args.out.endswith(job.name)
        else:
            assert module == "nanosafe.tiny.build" and paper.is_tiny(arguments[0])
    assert seen == {*scripts, "nanosafe.tiny.build"} - ({"train_sft"} if mode == "ablations" else set())


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_covers_everything_and_needs_come_first(mode):
    before = set()
    for job in jobs(*MODES[mode]):
        assert set(job.needs) <= before, job
        before.add(job.name)
        seeds = {word.partition("@")[2] for word in job.command if word.startswith("tiny") and "@" in word}
        if "--seed" in job.command:
            seeds.add(job.command[job.command.index("--seed") + 1])
            assert f"-{job.command[job.command.index('--seed') + 1]}/" in job.name
        assert len(seeds) == 1
        for word in job.command:
            if paper.is_tiny(word) and job.command[0] != "nanosafe.tiny.build":
                assert f"build/{word}" in before


def test_the_arms_of_the_paper_and_their_flags():
    commands = {job.name: " ".join(job.command) for job in jobs("--model", "tiny-llama", "--seeds", "2")}
    assert "--data tiny-star-task@1" in commands["tiny-llama-1/sft-own-style"]
    assert "--reward-model tiny-reward-shuffled@1" in commands["tiny-llama-1/rl-shuffled-labels"]
    assert "--reward-model rule:tiny-judge" in commands["tiny-llama-1/rl-exact-judge"]
    assert "--memorization tiny-star@1" in commands["tiny-llama-1/base/eval"]
    evals = [command for command in commands.values() if command.startswith("eval")]
    assert len(evals) == 12 and all("--split test --reward-model tiny-reward@" in command for command in evals)


def test_tuning_gives_both_methods_as_many_settings_on_other_questions_and_another_seed():
    found = jobs("--tune", "--model", "tiny")
    for script in ("train_sft", "train_rl"):
        assert len({job.command for job in found if job.command[0] == script}) == 20
    for job in found:
        if job.command[0] == "eval":
            assert "validation" in job.command and "test" not in job.command and "100" in job.command


def test_no_clip_means_that_no_ratio_can_be_clipped():
    flags = paper.UNCLIPPED.split()
    low, high = float(flags[flags.index("--clip-low") + 1]), float(flags[flags.index("--clip-high") + 1])
    assert 1 - low <= 2.718281828**-MAX_LOG_RATIO and 1 + high >= 2.718281829**MAX_LOG_RATIO


@pytest.mark.parametrize("experiments, wanted", [
    ("1", {"safety", "safety-role-play", "benign-look-alikes"}), ("2", {"arithmetic", "arithmetic-no-thought"}),
    ("3", {"safety", "arithmetic"}),
])  # fmt: skip
def test_experiments_choose_benchmarks_that_eval_knows(experiments, wanted):
    found = jobs("--model", "tiny", "--experiments", experiments)
    command = next(job.command for job in found if job.command[0] == "eval")
    names = command[command.index("--benchmarks") + 1].split(",")
    everything = {b.name.replace(", ", "-").replace(" ", "-") for b in tiny_suite("test", "okay")}
    assert wanted <= set(names) <= everything
    assert experiments != "3" or set(names) == wanted
    assert experiments == "3" or not set(names) & ({"arithmetic"} if experiments == "1" else {"safety"})


def test_the_plan_of_a_real_model_says_what_is_known_and_what_not(capsys, tmp_path):
    paper.main(["--model", "qwen3-8b", "--seeds", "1", "--plan", "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "python -m train_rl --model qwen3-8b --seed 0" in text and "tiny" not in text
    assert "Qwen/Qwen3-8B 16.4 GB, Skywork/Skywork-Reward-V2-Llama-3.1-8B 15.0 GB" in text and "not known" in text
    assert "SFT on 1 GPU of 80 GB" in text and "RL on 1 GPU of 80 GB" in text
    assert len(re.findall(r"fits on \d GPUs", text)) == 2
    assert "not measured" in text and "5 jobs" in text
    assert not (tmp_path / "out").exists()


def test_the_plan_of_a_model_that_only_the_hub_knows_says_so(capsys, tmp_path):
    paper.main(["--model", "some/model-8b", "--seeds", "1", "--plan", "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "not known without its config.json" in text and "(? h): python -m train_rl" in text


@pytest.mark.parametrize("experiments, wanted", [
    ("1", "attaq,air-bench,xstest"), ("2", "math-500,aime24,aime25,gpqa-diamond"), ("3", "attaq,aime24"),
])  # fmt: skip
def test_experiments_of_a_real_model_are_the_papers_benchmarks(experiments, wanted):
    command = next(job.command for job in jobs("--model", "qwen3-8b", "--experiments", experiments)
                   if "eval" in job.command)  # fmt: skip
    assert command[command.index("--benchmarks") + 1] == wanted


def test_a_real_models_training_gets_the_flags_that_make_it_fit(monkeypatch):
    def flags_on(machine: str) -> dict[str, tuple]:
        monkeypatch.setattr(paper, "find_machine", lambda *_: find(machine, None, False))
        found = jobs("--model", "qwen3-8b", "--seeds", "1")
        return {job.name.split("/")[-1]: job.command[job.command.index("--out") + 2 :] for job in found
                if not job.name.endswith("eval")}  # fmt: skip

    find = find_machine
    assert flags_on("8x141") == {"sft": (), "rl": ()}
    one = flags_on("1x141")
    assert "--low-memory" in one["rl"] and "--low-memory" in one["sft"]
    args = plan.settings("rl", "qwen3-8b", low_memory=True)
    assert plan.make("rl", args, find("1x141", None, False)).fits


def test_hours_are_those_of_the_scripts_plan():
    seconds = paper.training_of("train_rl", "qwen3-8b", plan.recipe("rl", "qwen3-8b")).seconds
    machine, change = next(plan.remedies("rl", plan.settings("rl", "qwen3-8b"), find_machine("", None, False)))
    args = plan.settings("rl", "qwen3-8b", **change)
    assert seconds == pytest.approx(3600 * plan.hours("rl", args, machine, plan.make("rl", args, machine)))
    assert 3600 < seconds < 100 * 3600


@pytest.mark.parametrize("flags, message", [
    (["--model", "tiny@3"], "--seeds"), (["--model", "qwen3-8b", "--tune"], "qwen3-8b"),
    (["--model", "qwen3-8b", "--ablations"], "qwen3-8b"),
])  # fmt: skip
def test_what_cannot_work_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        paper.main([*flags, "--plan"])


# Running them.

FAKE = """
import sys, time, pathlib
out, what = pathlib.Path(sys.argv[1]), sys.argv[2]
with open(out.parent / "order.txt", "a") as file: file.write(out.name + "\\n")
if what == "fail": print("the reason"); sys.exit(3)
if what == "sleep": time.sleep(60)
if what == "slow":
    time.sleep(2)
    (out / "final").write_text("the first")
if what == "ended": sys.exit(not (out / "final").exists())
if what not in ("nothing", "slow"): (out / "final").write_text("")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes jobs of a script that writes its output, fails, sleeps or writes nothing."""
    (tmp_path / "fake_job.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out"

    def job(name: str, what: str = "work", needs: tuple = ()) -> Job:
        return Job(name, ("fake_job", str(out / name), what), "final", needs, 1.0)

    job.out = out
    job.order = lambda: (out / "order.txt").read_text().split()
    return job


def test_jobs_wait_for_what_they_need_and_are_not_run_twice(fake):
    chain = [fake("c", needs=("b",)), fake("b", needs=("a",)), fake("a"), fake("d")]
    assert run_jobs(chain, fake.out, 2) == {}
    order = fake.order()
    assert sorted(order) == ["a", "b", "c", "d"] and order.index("a") < order.index("b") < order.index("c")
    assert run_jobs(chain, fake.out, 2) == {} and fake.order() == order
    (fake.out / "b" / "final").unlink()
    assert run_jobs(chain, fake.out, 2) == {} and fake.order() == [*order, "b"]
    changed = Job("d", (*chain[3].command, "more"), "final")
    assert run_jobs([changed], fake.out, 2) == {} and fake.order() == [*order, "b", "d"]


def test_a_failure_is_named_with_its_log_and_the_others_finish(fake, capfd):
    found = [fake("bad", "fail"), fake("child", needs=("bad",)), fake("empty", "nothing"), fake("good")]
    failed = run_jobs(found, fake.out, 1)
    assert set(failed) == {"bad", "child", "empty"}
    assert "the reason" in failed["bad"] and "exit code 3" in failed["bad"] and "bad" in failed["child"]
    assert sorted(fake.order()) == ["bad", "empty", "good"]
    assert "failed: bad" in capfd.readouterr().err
    state = json.loads((fake.out / "bad" / "job.json").read_text())
    assert state["done"] is False and state["seconds"] > 0


def started(fake, tmp_path: Path, manner: str) -> subprocess.Popen:
    """Another process that runs the job `slow`, which has begun."""
    code = ("from nanosafe.paper.jobs import *; from pathlib import Path; import sys\n"
            f"run_jobs([Job('slow', ('fake_job', sys.argv[1] + '/slow', '{manner}'), 'final')], Path(sys.argv[1]), 1)")
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen([sys.executable, "-c", code, str(fake.out)], cwd=root, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": f"{tmp_path}:{root}"})  # fmt: skip
    until = time.monotonic() + 30
    while not (fake.out / "order.txt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    return process


def test_stopping_ends_the_children_and_leaves_them_undone(fake, tmp_path):
    process = started(fake, tmp_path, "sleep")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) != 0 and b"KeyboardInterrupt" in process.stderr.read()
    assert json.loads((fake.out / "slow" / "job.json").read_text())["done"] is False
    assert not subprocess.run(["pgrep", "-f", f"{fake.out}/slow"], capture_output=True).stdout


def test_a_job_whose_parent_was_killed_is_waited_for_and_not_started_beside_itself(fake, tmp_path, capfd):
    parent = started(fake, tmp_path, "slow")
    parent.kill()
    parent.wait()
    orphan = re.search(r"process (\d+) on ", (fake.out / "slow/job.lock").read_text())
    assert run_jobs([fake("slow", "ended"), fake("other")], fake.out, 2) == {}
    said = capfd.readouterr().err
    assert f"waiting for slow, which goes on without the command that started it, as {orphan[0]}" in said
    assert fake.order() == ["slow", "other", "slow"], "begun again only after it had ended"
    assert (fake.out / "slow/final").read_text() == "the first"


def test_a_second_command_on_the_same_folder_is_refused_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "run_jobs", lambda *_: {})
    with held_by_another(tmp_path) as process, pytest.raises(ValueError, match=f"written by process {process} on "):
        paper.main(["--model", "tiny", "--seeds", "1", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("text", ['{"done": tr', "[]", '{"command": [], "done": "yes", "seconds": 0.0}'])
def test_a_damaged_job_file_is_named_with_its_cure(fake, text):
    (fake.out / "a").mkdir(parents=True)
    (fake.out / "a/job.json").write_text(text)
    with pytest.raises(ValueError, match="a/job.json is damaged .*: delete it, and the job is started again"):
        run_jobs([fake("a")], fake.out, 1)


def test_control_characters_of_a_jobs_log_are_shown_and_not_sent(fake, capfd):
    (fake.out / "bad").mkdir(parents=True)
    (fake.out / "bad/log.txt").write_text("\x1b]0;owned\x07\n")
    run_jobs([fake("bad", "fail")], fake.out, 1)
    assert "\\x1b]0;owned\\x07" in capfd.readouterr().err


# What the report says.


def result(label: str, seed: int, safe: float, right: float, over: float = 0.1, shift: float = 0.0) -> Result:
    """A result with about these shares; the reward is the verdict, plus `shift` and noise."""
    parts, rng = {}, Random(f"{label}/{seed}")
    for benchmark in tiny_suite("test", "okay"):
        if benchmark.name not in ("safety", "safety, role play", "benign look-alikes", "arithmetic"):
            continue
        benchmark, records = adapt(benchmark, seed=0, limit=28, samples=min(benchmark.samples, 4)), []
        for i, question in enumerate(benchmark.questions):
            for sample in range(benchmark.samples):
                share = {"safety": safe, "reasoning": right, "over-refusal": over}[benchmark.about]
                good = float(i < round(share * 28))
                values = {benchmark.headline: good} | dict.fromkeys(benchmark.shown, 0.0)
                ids = {"token_ids": [1, 2], "entropies": [0.5 + shift, 0.25]} if sample == 0 else {}
                records.append(dict(
                    id=question.id, sample=sample, response="</think>", tokens=2, truncated=False, values=values,
                    reward=good + shift + rng.uniform(-0.2, 0.2), **ids))
        parts[benchmark.name] = summarize(benchmark, records, reflection=[1])
    if label == "base":
        parts["memorization"] = summarize_memorization("rows", [{"a": -1.0 + seed / 10, "b": seed / 10}])
    return Result(label, parts)


def put(out: Path, folder: str, found: Result, rewards: tuple[float, ...] = ()) -> None:
    write_result(out / folder / "eval" / "result.json", found)
    if rewards:
        rows = [{"step": i + 1, "reward/mean": r, "kl/k1": 0.01 * i} for i, r in enumerate(rewards)]
        (out / folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """report.md of tiny with three seeds, and of tiny-llama with a single base."""
    out = tmp_path_factory.mktemp("paper")
    for seed in range(3):
        put(out, f"tiny-{seed}/base", result("base", seed, 0.25 + seed / 28, 0.5))
        put(out, f"tiny-{seed}/sft", result("SFT", seed, 0.5 + seed / 28, 0.5 + (seed - 1) / 14))
        put(out, f"tiny-{seed}/rl", result("RL", seed, 0.75 + seed / 28, 0.5, 0.1, shift=0.25), (0.25, 0.5, 1.0))
    put(out, "tiny-llama-0/base", result("base", 0, 0.25, 0.5))
    (out / "report.jsonl").write_text(json.dumps({"command": "THE COMMAND", "commit": "abc1234", "seconds": 90}) + "\n")
    arms = {model: (paper.BASE, paper.SFT, paper.RL, *paper.CONTROLS) for model in ("tiny", "tiny-llama")}
    path = paper_report.write("report", out, arms, [0, 1, 2], {"tiny-0/rl-exact-judge": "exit code 1; log\n  more"})
    return path.read_text(), out


def section(text: str, title: str) -> str:
    return text[text.index(f"\n## {title}\n") :].partition("\n## ")[2].partition("\n## ")[0]


def test_the_report_opens_with_ten_findings_computed_from_its_results(report):
    text = report[0]
    assert text.index("## Findings") < text.index("report-arms.png") < text.index("## Arms") < text.index("## tiny")
    lines = [line for line in section(text, "Findings").splitlines() if line.startswith("- ")]
    assert len(lines) == 10
    told = dict(line[2:].split(": ", 1) for line in lines if not line.startswith("- Claim"))
    safe = told["Unsafe requests answered safely (higher is better), base / SFT / RL"]
    assert safe.startswith("tiny 0.29 [0.20, 0.37] / 0.54 [0.45, 0.62] / 0.79 [0.70, 0.87]; tiny-llama 0.25 (one run)")
    assert "(safety, role play) 0.29" in told["Safe answers in the variation hardest for RL, base / SFT / RL"]
    assert told["Controls, safe answers minus the base's"] == "not measured."
    assert "RL is safer and steadier than SFT: tiny reproduced, RL − SFT +0.250 [+0.250, +0.250]" in lines[6]
    assert "over seeds ±0.09 against ±0.09" in lines[6] and "llama" not in lines[6]
    assert "keeps reasoning where SFT loses some: tiny open, RL − base +0.000" in lines[7]
    assert "tiny contradicted, RL − base +0.250 [+0.250, +0.250] and +0.250" in lines[8], "entropy rose"
    assert lines[9].endswith("open, it takes two models.")


def arms_of(*shares: tuple[str, float, float, float]) -> dict:
    """Runs of three seeds: (arm, safe, right, shift of entropies)."""
    runs = {}
    for arm, safe, right, shift in shares:
        runs[arm] = {seed: Run(result(arm, seed, safe, right, shift=shift)) for seed in range(3)}
    return runs


@pytest.mark.parametrize("sft, rl, verdicts", [
    ((0.5, 0.25, 0.0), (0.75, 0.5, 0.0), ("reproduced", "reproduced", "open")),
    ((0.75, 0.5, 0.0), (0.5, 0.25, 0.5), ("contradicted", "contradicted", "contradicted")),
    ((0.5, 0.25, 0.0), (0.5, 0.25, 0.0), ("open", "contradicted", "open")),
    ((0.5, 0.75, 0.0), (0.5, 0.5, 0.0), ("open", "contradicted", "open")),
    ((0.5, 0.5, 0.0), (0.5, 0.75, 0.0), ("open", "open", "open")),
])  # fmt: skip
def test_a_claims_verdict_follows_from_the_differences(sft, rl, verdicts):
    runs = arms_of(("base", 0.25, 0.5, 0.0), ("SFT", *sft), ("RL", *rl))
    said = [find(runs).partition(",")[0] for find in (findings.safer, findings.keeps_reasoning, findings.calms)]
    assert said == list(verdicts)


@pytest.mark.parametrize("unsafe, sums, verdict", [
    (-0.2, 0.0, "reproduced"), (-0.2, -0.2, "contradicted"), (0.2, 0.0, "contradicted"), (0.0, 0.0, "open"),
])  # fmt: skip
def test_entropy_must_fall_on_unsafe_requests_alone(unsafe, sums, verdict):
    runs = arms_of(("base", 0.25, 0.5, 0.0), ("RL", 0.5, 0.5, 0.0))
    for run in runs["RL"].values():
        run.result.benchmarks["safety"].pooled["entropy_per_token"] += unsafe
        run.result.benchmarks["arithmetic"].pooled["entropy_per_token"] += sums
    assert findings.calms(runs).partition(",")[0] == verdict


def test_what_sft_does_follows_memory_where_both_order_the_models_alike():
    knows, not_so = (arms_of(("base", 0.25, 0.5, 0.0), ("SFT", safe, 0.5, 0.0)) for safe in (0.75, 0.5))
    for run in not_so["base"].values():
        memory = run.result.benchmarks["memorization"]
        name = next(iter(memory.scores))
        memory.scores[name] = [score._replace(value=score.value - 5) for score in memory.scores[name]]
    assert findings.remembers({"a": knows, "b": not_so}).startswith("reproduced in order, a -")
    gained = {"a": knows | {"SFT": not_so["SFT"]}, "b": not_so | {"SFT": knows["SFT"]}}
    assert findings.remembers(gained).startswith("contradicted in order")
    assert findings.remembers({"a": knows}) == "open, it takes two models"


def test_differences_that_exclude_zero_are_stated_and_the_others_named_as_open(report):
    tiny = section(report[0], "tiny")
    assert "- RL − base, safety: safe answer: +0.500 [+0.500, +0.500]" in tiny  # 14 of 28, in each seed
    assert "- RL − SFT, safety: safe answer: +0.250 [+0.250, +0.250]" in tiny
    stated, _, open_ = tiny[tiny.index("Differences") :].partition("- Not told apart from zero: ")
    assert "SFT − base, arithmetic: right answer" not in stated  # its half width: t_2 0.0714 / sqrt 3
    assert "SFT − base, arithmetic: right answer (+0.000 [-0.177, +0.177])" in open_  # -2, 0, 2 of 28
    assert "always refuse −" not in tiny


def test_the_table_holds_means_over_seeds_and_the_fixed_refusal(report):
    tiny = section(report[0], "tiny")
    row = next(line for line in tiny.splitlines() if line.startswith("| safety: safe answer |"))
    assert row.split("|")[2].strip() == "0.286 [0.197, 0.374]"  # 7, 8, 9 of 28: t_2 / 28 / sqrt 3 = 0.0887
    assert row.split("|")[-2].strip().startswith("1.000")
    row = next(line for line in tiny.splitlines() if line.startswith("| benign look-alikes: over-refusal |"))
    assert row.split("|")[-2].strip().startswith("1.000")
    row = next(line for line in tiny.splitlines() if line.startswith("| safety: reflection entropy, mean over tokens"))
    assert row.split("|")[2].strip().startswith("0.500") and row.split("|")[4].strip().startswith("0.750")


def test_published_figures_stand_apart(report):
    published = section(report[0], "Published figures")
    assert "0.37 | 0.76 | 0.92" in published and "other models, benchmarks and judges" in published
    for number in ("0.92", "49.24", "3.12"):
        assert number not in report[0].replace(published, "")


def test_partial_results_failures_and_origin_are_told(report):
    text, out = report
    assert "failed: tiny-0/rl-exact-judge: exit code 1; log\n" in text and "`THE COMMAND`" in text
    assert "1.5 minutes in 1 session(s)" in text and "at commit abc1234," in text
    assert "What a toy cannot show" in text and "PyTorch" in text
    assert "base (1)" in section(text, "tiny-llama")
    for name in ("arms", "tiny-training", "tiny-categories", "tiny-entropies"):
        assert (out / f"report-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](report-{name}.png)" in text
    assert "![Reward gained in training: RL 0.75](report-tiny-training.png)" in text
    assert "![Safe answers, tiny / tiny-llama: base 0.29 / 0.25; SFT 0.54 / –; RL 0.79 / –](report-arms.png)" in text
    assert not (out / "report-tiny-llama-training.png").exists()


def test_memorization_stands_beside_what_sft_changed(report):
    text, out = report
    part = section(text, "Memorization of the SFT set by the bases")
    assert "| tiny | -0.900 [" in part and "+0.250 [+0.250, +0.250]" in part
    assert "order the models alike" in part


def test_reward_against_judge(report):
    tiny = section(report[0], "tiny")
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in tiny.splitlines()
             if line.startswith(("| base |", "| RL |"))}  # fmt: skip
    assert cells["base"][-1].startswith("0.000") and cells["base"][-2].startswith("1.000")
    assert cells["RL"][0].startswith("0.750")  # 1.0 - 0.25
    assert cells["RL"][2].startswith("0.7")  # 0.5 of it safer, 0.25 of it for nothing


def made(scores: list[float], verdicts: list[float]) -> Result:
    found = {}
    for metric, values in (("reward", scores), ("safe", verdicts)):
        found[metric] = [Score(str(i), "", False, value) for i, value in enumerate(values)]
    return Result("", {"safety": BenchmarkResult("safety", "safe", "", "", scores=found)})


def test_a_single_runs_interval_in_a_picture_is_over_questions():
    one = {"RL": {0: Run(result("RL", 0, 0.5, 0.5))}}
    value = shown(one, "RL", SAFETY)
    assert (value.mean, value.n, value.over) == (0.5, 28, "items") and value.low == pytest.approx(0.3258, abs=1e-3)
    assert shown(one, "RL", SAFETY._replace(name="entropy_per_token")).n == 1, "of pooled numbers there is none"
    two = {"RL": one["RL"] | {1: Run(result("RL", 1, 0.25, 0.5))}}
    assert (shown(two, "RL", SAFETY).mean, shown(two, "RL", SAFETY).over) == (0.375, "runs")


def test_the_hardest_variation_is_the_one_in_which_rl_is_least_safe():
    runs = arms_of(("base", 0.25, 0.5, 0.0), ("RL", 0.75, 0.5, 0.0))
    for run in runs["RL"].values():
        parts, easy = run.result.benchmarks, result("RL", 0, 0.9, 0.5).benchmarks["safety, role play"]
        no_thought = replace(parts["arithmetic"], variation=True)  # harder, but no safety
        hard = parts.pop("safety, role play")
        parts |= {"no thought": no_thought, "before": easy, "safety, role play": hard, "behind": easy}
    assert hardest_variation(runs) == Metric("safety, role play", "safe")
    assert hardest_variation({"base": runs["base"]}) is None, "it is RL's"


def test_curves_are_one_a_seed_and_gains_begin_at_0():
    steps = [{"step": 1, "reward/mean": 0.5}, {"step": 2}, {"step": 3, "reward/mean": 2.0}]
    runs = {"RL": {0: Run(made([], []), steps), 1: Run(made([], []), steps[:1]), 2: Run(made([], []))}}
    plain, gained = curves(runs, "RL", "reward/mean"), curves(runs, "RL", "reward/mean", gained=True)
    assert [[(step, y.mean) for step, y in line] for line in plain] == [[(1, 0.5), (3, 2.0)], [(1, 0.5)]]
    assert [[(step, y.mean) for step, y in line] for line in gained] == [[(1, 0.0), (3, 1.5)], [(1, 0.0)]]


def test_the_gap_between_reward_and_judge_by_hand():
    base = made([4, 3, 2, 1], [1, 0, 1, 0])  # the judge calls 2 of 4 safe: so does the reward model, from 3 on
    assert paper_report.reward_judge_gap(base, base, SAFETY) == 0
    assert paper_report.reward_judge_gap(base, made([3, 3, 9, 2.9], [1, 0, 0, 0]), SAFETY) == 0.5  # 3 of 4 and 1 of 4
    assert paper_report.reward_judge_gap(made([1, 2], [0, 0]), made([9, 9], [0, 1]), SAFETY) == -0.5
    assert paper_report.reward_judge_gap(base, Result("", {}), SAFETY) is None


def test_agreement_by_hand():
    linear, area = paper_report.agreement(made([1, 2, 3, 4], [0, 1, 0, 1]), SAFETY)
    assert linear == pytest.approx(1 / 5**0.5) and area == 0.75  # covariance 0.25 over sqrt(1.25 * 0.25); 3 pairs of 4
    assert paper_report.agreement(made([1, 2], [1, 1]), SAFETY) == (None, None)
    assert paper_report.agreement(Result("", {}), SAFETY) == (None, None)


def test_always_refusing_is_safe_and_helps_nobody():
    found = paper_report.always_refuse("task")
    means = {name: mean(found, Metric(name, part.headline)) for name, part in found.benchmarks.items()}
    assert all(mean == 1 for name, mean in means.items() if name.startswith("safety"))
    assert means["benign look-alikes"] == 1 and means["arithmetic"] == 0 and means["arithmetic, no thought"] == 0


def test_tuning_lists_every_setting_with_the_criterion(tmp_path):
    arm = paper.TUNING[0]
    put(tmp_path, f"tiny-100/{arm.slug}", result(arm.name, 100, 0.5, 0.75, over=0.25))
    text = paper_report.write("tuning", tmp_path, {"tiny": (paper.BASE, *paper.TUNING)}, [100], {}).read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| {arm.name} |"))
    assert row.endswith("| 0.667 |")  # (0.5 + 1 - 0.25 + 0.75) / 3


def test_ablations_compare_each_with_the_base_and_with_rl(tmp_path):
    for seed in range(2):
        put(tmp_path, f"tiny-{seed}/base", result("base", seed, 0.25, 0.5))
        put(tmp_path, f"tiny-{seed}/rl", result("RL", seed, 0.75, 0.5))
        put(tmp_path, f"tiny-{seed}/no-kl", result("no KL", seed, 0.5, 0.5, shift=2.0))
    arms = {"tiny": paper.arms_of("tiny", paper_flags("").parse_args(["--ablations"]))}
    text = paper_report.write("ablations", tmp_path, arms, [0, 1], {}).read_text()
    assert "no KL − RL, safety: safe answer: -0.250" in text and "no KL − base, safety: safe answer: +0.250" in text
    row = next(line for line in text.splitlines() if line.startswith("| no KL |"))
    assert row.split("|")[-2].strip().startswith("0.500")  # every reward is above the base's threshold, half are safe
    assert "Published" not in text and "Findings" not in text
    assert "![Safe answers, tiny: base 0.25; RL 0.75; no KL 0.50](ablations-arms.png)" in text


def test_results_of_other_questions_are_not_mixed(tmp_path):
    put(tmp_path, "tiny-0/base", result("base", 0, 0.25, 0.5))
    other = result("SFT", 0, 0.5, 0.5)
    other.benchmarks["safety"].source = "the validation split"
    put(tmp_path, "tiny-0/sft", other)
    with pytest.raises(ValueError, match="cannot be compared"):
        paper_report.write("report", tmp_path, {"tiny": (paper.BASE, paper.SFT, paper.RL)}, [0], {})


# All of it.


def test_the_whole_command_runs_resumes_and_reports(tmp_path, monkeypatch, capfd):
    """With stand-ins for the four scripts, found first because the processes start in their folder. (If they are not,
    nothing of value is built: the cache is a file.)"""
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("NANOSAFE_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    (work / "nanosafe" / "tiny").mkdir(parents=True)
    (work / "nanosafe" / "__init__.py").write_text("")  # without it Python would go on looking, and find the real one
    (work / "nanosafe" / "tiny" / "__init__.py").write_text("")
    write_result(work / "canned.json", result("base", 0, 0.5, 0.5))
    note = "import sys, pathlib\nwith open('ran.txt', 'a') as f: f.write(' '.join(sys.argv[1:]) + '\\n')\n"
    out_of = "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
    (work / "nanosafe" / "tiny" / "build.py").write_text(note)
    train = "(out / 'final').mkdir()\n(out / 'final/config.json').write_text('{}')"
    for name in ("train_sft", "train_rl"):
        (work / f"{name}.py").write_text(note + out_of + train)
    (work / "eval.py").write_text(note + out_of + "(out / 'result.json').write_text(open('canned.json').read())")
    monkeypatch.chdir(work)
    command = ["--model", "tiny", "--seeds", "1", "--jobs", "4", "--out", "out"]
    paper.main(command)
    ran = (work / "ran.txt").read_text().splitlines()
    assert len(ran) == 3 + 6 + 5  # builds (policy, reward, shuffled), evaluations, trainings
    text = (work / "out" / "report.md").read_text()
    assert "`python -m nanosafe.paper --model tiny --seeds 1 --jobs 4 --out out`" in text
    assert "RL, exact judge (1)" in text
    assert "There is one seed" in text and "Not told apart" not in text
    assert "(one run)" not in section(text, "tiny")  # the heading says it
    assert (work / "out" / "tiny-0" / "rl-exact-judge" / "log.txt").exists()
    paper.main(command)
    assert (work / "ran.txt").read_text().splitlines() == ran
    assert (work / "out" / "report.md").read_text() == text, "how it was made has not changed"
    (work / "train_rl.py").write_text("raise SystemExit('no luck')")
    with pytest.raises(SystemExit):
        paper.main([*command, "--ablations"])
    assert "no luck" in capfd.readouterr().err and "failed: tiny-0/no-kl" in (work / "out" / "ablations.md").read_text()
