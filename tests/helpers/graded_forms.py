r"""References of MATH-500 in forms that models write, and what math-verify reads, as facts.

FORMS maps a form's name to a function from a reference to a right answer, None where the form does not
apply. MATH_VERIFY holds facts like those that math-verify's own tests state, in other words and
numbers, as (what it is about, reference, right answers, wrong answers); answers are whole texts.
"""

import re

NUMBER = re.compile(r"-?\d+")
SIGNS = {r"\pi": "π", r"\infty": "∞", r"^\circ": "°", r"\cup": "∪", r"\pm": "±", "-": "−", "^2": "²"}


def box(content: str) -> str:
    return rf"\boxed{{{content}}}"


def grouped(reference: str, mark: str) -> str | None:
    """Thousands with `mark` between them, as 10{,}080."""
    parts = re.split(r"((?<![\d.])\d{4,}(?![_\d]))", reference)
    parts[1::2] = [f"{int(digits):,}".replace(",", mark) for digits in parts[1::2]]
    return box("".join(parts)) if len(parts) > 1 else None


def in_unicode(reference: str) -> str | None:
    text = re.sub(r"\\sqrt\{?(\d+)\}?", r"√\1", reference)
    for latex, sign in SIGNS.items():
        text = text.replace(latex, sign)
    return box(text) if text != reference else None


def with_slash(reference: str) -> str | None:
    text = re.sub(r"(?<!\d)\\d?frac\{(\w+)\}\{(\w+)\}", r"\1/\2", reference)
    return box(text) if text != reference else None


def of_number(form: str):
    return lambda reference: box(form.replace("@", reference)) if NUMBER.fullmatch(reference) else None


def named(reference: str) -> str | None:
    return None if re.search(r"=|\\in|text|,", reference) else box(f"x = {reference}")


FORMS = {
    "box": box,
    "display": lambda r: "**Final Answer**\n\n" + rf"\[ {box(r)} \]",
    "inline": lambda r: f"Therefore the answer is ${box(r)}$.",
    "dfrac": lambda r: box(r.replace(r"\frac", r"\dfrac")),
    "tfrac": lambda r: box(r.replace(r"\frac", r"\tfrac")),
    "no spaces": lambda r: box(re.sub(r"(?<!\\)(?<![a-zA-Z]) ", "", r)),
    "spaces": lambda r: box(re.sub("([+=])", r" \1 ", f" {r} ")),
    "full stop": lambda r: box(r + "."),
    "dollars in it": lambda r: box(f"${r}$"),
    "display style": lambda r: box(rf"\displaystyle {r}"),
    "bold": lambda r: box(rf"\boldsymbol{{{r}}}"),
    "text": of_number(r"\text{@}"),
    "name": named,
    "label": lambda r: box(rf"\text{{Answer: }} {r}"),
    "unit": of_number(r"@\text{ units}"),
    "area": of_number(r"@\text{ cm}^2"),
    "bare area": of_number("@ cm^2"),
    "words": of_number("@ square units"),
    "decimal": of_number("@.0"),
    "thousands {,}": lambda r: grouped(r, "{,}"),
    "thousands thin": lambda r: grouped(r, r"\,"),
    "thousands space": lambda r: grouped(r, " "),
    "unicode": in_unicode,
    "slash": with_slash,
    "thin end": lambda r: box(r + r"\,"),
    "twice": lambda r: f"${box(r)}$\n\n**Final Answer**\n{box(r)}",
    "corrected": lambda r: f"First I had ${box('-99')}$. That was a slip. So it is ${box(r)}$.",
    "sentence": lambda r: f"Therefore, the answer is ${r}$.",
    "parentheses": lambda r: rf"So the final answer is \({r}\).",
    "bold word": lambda r: f"**Answer:** ${r}$",
    "formula alone": lambda r: "Hence\n" + rf"\[ {r} \]",
    "I hope": lambda r: f"Final Answer: The final answer is ${r}$. I hope it is correct.",
    "thought": lambda r: f"<think>\nIs it {box('-99')}?\n</think>\n\n${box(r)}$",
    "bmatrix": lambda r: box(r.replace("pmatrix", "bmatrix")) if "pmatrix" in r else None,
}

MATH_VERIFY = [
    ("thousands", "8315000", ["8,315,000", "8 315 000", "8315000.0"], ["8,315", "831500"]),
    ("decimals", "2000.75", ["2,000.75", "$2,000.75", "2,000.75$", "2000,75",
     "It was 20, now it is 2,000.75€"], ["2,000.57", "200.75"]),
    ("decimal comma", "4,31", ["4.31", r"\boxed{4,31}"], ["431", "4"]),
    ("no leading zero", "0.6", [".6", "It is 0.6 m²"], ["6"]),
    ("a number in a word", "7", ["The 7th letter counts, so 7"], ["KLM7N", "X7Y"]),
    ("fractions", "7/5", [r"\frac{7}{5}", r"$\frac75$", r"$\dfrac{7}{5}$", r"$\cfrac{7}{5}$", "7/5"],
     ["5/7"]),
    ("malformed roots", r"$\sqrt{5}$", [r"$\sqrt5 $", r"$ \sqrt{5} $"], [r"$\sqrt{6}$"]),
    ("marks of formulas", "$8$", [r"Answer \[ 8 \]", "Answer $ 8 $", "Answer $$ 8 $$", r"Answer \( 8 \)",
     "Answer \\[ \n 8 \n \\]", r"Answer \( (5+3) \)"], [r"Answer \[ 9 \]"]),
    ("the last equation", "$1/4$", [r"$k = \frac{1}{4}$", r"$a = \frac{2}{8} = \frac{1}{4}$"],
     [r"$k = \frac{1}{2}$"]),
    ("text behind it", "$1/4$", [r"$\frac{1}{4} \text{meters}$", r"$\frac{1}{4}\textbf{ meters}$"], []),
    ("percent", r"$31\%$", ["31 percent", "31 pct", "31 %", "$31$ %", r"$\boxed{31}$ pct",
     r"$\boxed{31 percent}$"], ["32 %"]),
    ("intervals", "$[2,5)$", ["$[2,5)$", r"\boxed{[2,5)}"], ["$(2,5)$", "$[2,5]$", "$[2,4)$"]),
    ("a sign before an interval", "$1$", ["$1$"], ["$-[0,1)$"]),
    ("sets and order", "$4,-3$", [r"$\boxed{-3}$ and $\boxed{4}$", r"\boxed{\{4,-3\}}", "$-3, 4$"], ["$4$", "$4, 3$"]),
    ("lists with words", "$21, 48, and 80$", [r"$21, 48, \text{ and } 80$"], ["$22, 47, and 80$"]),
    ("assignments", "$n=1, 2, 4$", ["$n=1, 2, 4$"], ["$n=1, 2, 3$"]),
    ("plus-minus", r"$\pm 77$", ["${-77, 77}$"], ["$77$"]),
    ("times of day", "$11:30$", ["$11:30$"], ["$1:30$"]),
    ("planes", "$2x+4y-6z+8=0$", ["$-2x-4y+6z-8=0$", "$x+2y-3z+4=0$"], ["$2x+4y-6z-8=0$"]),
    ("identities", r"$\tan^2(t)+1$", [r"$\sec^2(t)$"], [r"$\csc^2(t)$"]),
    ("matrices", r"$\begin{pmatrix}2 & 0 \\ 0 & 2\end{pmatrix}$", [
     r"It is $ \begin{pmatrix}2 & 0 \\ 0 & 2\end{pmatrix} $.", r"$2\begin{pmatrix}1 & 0 \\ 0 & 1\end{pmatrix}$"],
     [r"$\begin{pmatrix}2 & 0 \\ 0 & 1\end{pmatrix}$"]),
    ("inequalities", "$x>3$", ["$3<x$", r"$x \in (3, \infty)$"], ["$x<3$", r"$x \ge 3$"]),
    ("chains", r"$-3 \le x \le 5$", [r"$x \in [-3,5]$"], [r"$x \in (-3,5]$"]),
    ("boxes and words", r"$\boxed{3}$ sheets and $\boxed{4}$ tins", [r"$\boxed{3,4}$"], [r"$\boxed{3}$"]),
    ("boxes with names", "$$k = 12, n = 5$$", [r"$$\boxed{k = 12} \quad \text{and} \quad \boxed{n = 5}$$"],
     [r"$$\boxed{k = 12} \quad \text{and} \quad \boxed{n = 6}$$"]),
    ("boxes with pairs", "$$(2, 7), (3, 9)$$", [r"$$\boxed{(2, 7)} \text{ in case (a) and } \boxed{(3, 9)}$$"],
     [r"$$\boxed{(2, 7)} \text{ and } \boxed{(9, 3)}$$"]),
    ("a later final answer", "$1020$",
     [r"half is $\boxed{20}$. Final Answer: The final answer is $1,020$. I hope it is correct."],
     [r"half is $\boxed{1020}$. Final Answer: The final answer is $20$. I hope it is correct."]),
    ("far from the end", "$35$", ["Final Answer: The final answer is $35$. I hope it is correct. "
     + "Note: all is fine. " * 100], []),
    ("long before the answer", r"$(7,6)$", ["Let us solve for $y$. " * 300 + "So $(x, y)$ is $(7, 6)$."],
     ["Let us solve for $y$. " * 300 + "So $(x, y)$ is $(6, 7)$."]),
    ("words", r"$\text{Dora}$", [r"Therefore, $\boxed{\text{Dora}}$ is right."], [r"$\boxed{\text{Nora}}$"]),
]  # fmt: skip
