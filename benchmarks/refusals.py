"""How the refusal rule (graders.is_refusal) agrees with human labels: XSTest's official completions.

They are five models' answers to 250 safe and 200 unsafe prompts with labels of two annotators, not
copied here for their licences: model_completions/*.csv of github.com/paul-rottger/exaggerated-safety
at d7bb5bd. The phrases were chosen on the prompts with even numbers; the odd ones were held back. Run
it as `python benchmarks/refusals.py FOLDER`.
"""

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LABELS = {"1_full_compliance": "complies", "2_full_refusal": "refuses", "3_partial_refusal": "partly"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder model_completions")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from nanosafe.text.thoughts import is_refusal

    counts = Counter()  # (half, prompts, label, whether the rule finds a refusal)
    for path in sorted(args.folder.glob("*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                half = "held back" if int(row["id"].split("-")[1]) % 2 else "chosen on"
                prompts = "unsafe" if row["type"].startswith("contrast") else "safe"
                counts[half, prompts, LABELS[row["final_label"]], is_refusal(row["completion"])] += 1
    print(f"{'half':10} {'prompts':8} {'full refusals':>16} {'partial':>10} {'compliances':>12} {'agreement':>12}")
    for half in ("chosen on", "held back"):
        for prompts in ("safe", "unsafe"):
            found = {label: counts[half, prompts, label, True] for label in LABELS.values()}
            of = {label: found[label] + counts[half, prompts, label, False] for label in LABELS.values()}
            shown = [f"{found[label]} of {of[label]}" for label in ("refuses", "partly", "complies")]
            agree = found["refuses"] + of["partly"] - found["partly"] + of["complies"] - found["complies"]
            cells = f"{shown[0]:>16} {shown[1]:>10} {shown[2]:>12} {agree:>5} of {sum(of.values())}"
            print(f"{half:10} {prompts:8} {cells}")


if __name__ == "__main__":
    main()
