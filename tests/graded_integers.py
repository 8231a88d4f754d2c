r"""Answers to AIME's problems with their verdicts: (source, reference, right answers, wrong answers).

The verdicts were decided by hand before the grader was tuned to any of them: the answer must commit to one integer,
whatever is written around it; a formula that has still to be worked out, a range, a comparison or two numbers do not.
Sources: AIME 2024
and 2025 (answers 204, 25, 73, 33 and others) in forms that models write; issues and pulls of the named projects.
"""

INTEGERS = [
    ("AIME 2024 I 1, numbers in a box", "204", [
        r"\boxed{204}", r"\boxed{0204}", r"\boxed{204.0}", r"\boxed{204.00}", r"\boxed{204.}", r"\boxed{+204}",
        r"\boxed{ 204 }", r"\boxed{(204)}", r"\boxed{{204}}", r"\boxed{\left(204\right)}", r"\boxed{$204$}",
        r"\boxed{\(204\)}", r"\boxed{\,204\,}", r"\boxed{204\!}", r"\boxed{204~}", r"\boxed{\ 204}", r"\boxed{\quad 204}",
        r"\boxed {204}", r"\boxed{\boxed{204}}", r"\fbox{204}", r"\framebox{204}", r"\boxed{204;}",
    ], [
        r"\boxed{203}", r"\boxed{20.4}", r"\boxed{204.5}", r"\boxed{2040}", r"\boxed{1204}", r"\boxed{-204}", r"\boxed{402}",
        r"\boxed{204!}", r"\boxed{2 0 4 5}", r"\boxed{}", r"\boxed{?}", r"\boxed{20\,4}",
    ]),
    ("AIME 2024 I 1, fonts and colours", "204", [
        r"\boxed{\textbf{204}}", r"\boxed{\mathbf{204}}", r"\boxed{\text{204}}", r"\boxed{\mathrm{204}}", r"\boxed{\bf 204}",
        r"\boxed{\textbf{(204)}}", r"\boxed{\boldsymbol{204}}", r"\boxed{\Large 204}", r"\boxed{\color{red}{204}}",
        r"\boxed{\textcolor{blue}{204}}", r"\boxed{\displaystyle 204}", r"\boxed{\mathbf{\textbf{204}}}", r"\boxed{\it{204}}",
        r"\boxed{\underline{204}}", r"\textbf{\boxed{204}}", r"$\mathbf{\boxed{204}}$", r"\boxed{\tt 204}", r"\boxed{\bm{204}}",
    ], [r"\boxed{\textbf{240}}", r"\boxed{\overline{204}}", r"\boxed{\sqrt{204}}", r"\boxed{\frac{204}{2}}"]),
    ("AIME 2024 I 1, units and words in the box", "204", [
        r"\boxed{204\text{ minutes}}", r"\boxed{204 \text{ min}}", r"\boxed{204\ \text{minutes}}", r"\boxed{204 minutes}",
        r"\boxed{204\,\mathrm{min}}", r"\boxed{\text{204 minutes}}", r"\boxed{204 \text{ (minutes)}}", r"\boxed{204~\text{min}}",
        r"\boxed{204 \text{ minutes.}}", r"\boxed{\text{The answer is } 204}", r"\boxed{\text{Answer: } 204}", r"\boxed{t = 204}",
        r"\boxed{204 \mbox{ minutes}}", r"\boxed{204\text{ square units}}", r"\boxed{204 \text{ cm}^2}",
        r"\boxed{204\text{ units}^3}", r"\boxed{\text{Total: } 204}", r"\boxed{204\text{ ways}}",
    ], [
        r"\boxed{204n}", r"\boxed{204\pi}", r"\boxed{204x}", r"\boxed{204^2}", r"\boxed{204i}", r"\boxed{\text{about } 200}",
        r"\boxed{\text{at least } 204}", r"\boxed{204 \text{ or } 205}", r"\boxed{204 \text{ and } 3}",
        r"\boxed{204\text{ hours } 3\text{ min}}", r"\boxed{\text{not } 204}",
    ]),
    ("AIME 2025 I 2, sums spelled out", "588", [
        r"\boxed{m+n=588}", r"\boxed{m + n = 588}", r"\boxed{p+q=588}", r"\boxed{m+n = 500+88 = 588}", r"\boxed{A = 588}",
        r"\boxed{m+n+p=588}", r"\boxed{N = 588}", r"\boxed{[ABCD] = 588}", r"\boxed{f(3) = 588}", r"\boxed{a \cdot b = 588}",
        r"\boxed{x_1 + x_2 = 588}", r"$m+n = \boxed{588}$", r"\boxed{\text{Area} = 588}", r"\boxed{S = 588\text{ units}^2}",
    ], [
        r"\boxed{500+88}", r"\boxed{588+n}", r"\boxed{588 = n + 1}", r"\boxed{2 \cdot 294}", r"\boxed{m+n=587}", r"\boxed{588/1}",
        r"\boxed{\frac{588}{1}}", r"\boxed{588-1}", r"\boxed{588 = m - n + 3}", r"\boxed{600-12}", r"\boxed{588\sqrt{1}}",
    ]),
    ("AIME, residues", "204", [
        r"\boxed{204 \pmod{1000}}", r"\boxed{204 \bmod 1000}", r"\boxed{N \equiv 204 \pmod{1000}}", r"\boxed{204 \mod 1000}",
        r"\boxed{\equiv 204 \pmod{1000}}", r"\boxed{204 (\text{mod } 1000)}", r"\boxed{204\ (\mathrm{mod}\ 1000)}",
    ], [r"\boxed{1205 \pmod{1000}}", r"\boxed{1000 \pmod{204}}", r"\boxed{205 \pmod{1000}}"]),
    ("AIME, comparisons and ranges", "33", [r"\boxed{33}"], [
        r"\boxed{\geq 33}", r"\boxed{> 33}", r"\boxed{n \ge 33}", r"\boxed{x < 33}", r"\boxed{33 < x}", r"\boxed{33\text{-}34}",
        r"\boxed{33-34}", r"\boxed{[33, 34]}", r"\boxed{33 \le n \le 34}", r"\boxed{33, 34}", r"\boxed{\{33, 34\}}",
        r"\boxed{33 \pm 1}", r"\boxed{\pm 33}", r"\boxed{33:1}", r"\boxed{(33, 1)}", r"\boxed{33_8}", r"\boxed{\neq 33}",
        r"\boxed{33 \text{ to } 35}", r"\boxed{n \neq 33}", r"\boxed{\approx 34}",
    ]),
    ("AIME, degrees", "106", [r"\boxed{106^\circ}", r"\boxed{106^{\circ}}", "\\boxed{106\u00b0}", r"\boxed{106 \text{ degrees}}",
                              r"\boxed{106\degree}", r"\boxed{\theta = 106^\circ}"], [r"\boxed{106^\circ, 74^\circ}"]),
    ("AIME 2025 II, zeros in front (NVIDIA Skills pull 1074)", "16", [
        r"\boxed{016}", r"\boxed{16}", r"\boxed{0016}", r"The answer is \boxed{016}.", "**016**", "The answer is 016.",
    ], [r"\boxed{160}", r"\boxed{0.16}", r"\boxed{106}", r"\boxed{1.6}"]),
    ("a reference with zeros in front", "025", [r"\boxed{25}", r"\boxed{025}", "The answer is $25$."],
     [r"\boxed{250}", r"\boxed{2.5}"]),
    ("one digit and none", "0", [r"\boxed{0}", r"\boxed{000}", r"\boxed{0.0}", r"The answer is \(0\)."],
     [r"\boxed{}", r"\boxed{\text{none}}", r"\boxed{\emptyset}", "There is no solution.", r"\boxed{10}"]),
    ("numbers above 999 and thousands", "80", [r"\boxed{80}"], [r"\boxed{1{,}080}", r"\boxed{10\,080}", r"\boxed{1,080}",
                                                               r"\boxed{1080}", r"\boxed{80,000}"]),
    ("boxes side by side", "73", [
        r"\boxed{73} or \boxed{073}", r"\boxed{73} \quad \text{and} \quad \boxed{73}", r"\boxed{73}, \boxed{073}",
        r"First \boxed{72}. But that counts one case twice; without it there are \boxed{73}.",
        "\\boxed{73}\n\n**Final Answer**\n\\boxed{73}", r"\(\boxed{73}\).\(\boxed{73}\)",
        r"Is it \boxed{37}? No, the digits are the other way round. \boxed{73}",
        r"$x = \boxed{37}$ is the inradius. Hence the answer is $\boxed{73}$.",
    ], [
        r"\boxed{72} \quad \text{or} \quad \boxed{73}", r"\boxed{73} \quad \text{or} \quad \boxed{72}",
        r"\boxed{72} \qquad \boxed{73}", r"$\boxed{72}$ and $\boxed{73}$", "1. \\boxed{72}\n2. \\boxed{73}",
        r"\boxed{72} \mbox{ or } \boxed{73}", r"$m = \boxed{70}$, $n = \boxed{73}$", r"\boxed{73}\\\boxed{72}",
    ]),
    ("unfinished last box (marin pull 9163)", "73", [r"\boxed{73}"], [
        r"\boxed{73", r"\boxed{73} was wrong; the answer is \boxed{7", r"\boxed{72} and not \boxed{73",
        r"\boxed{73}, I mean \boxed{", r"\boxed{\textbf{73}",
    ]),
    ("without a box", "73", [
        "The answer is 73.", "**Answer: 73**", "Answer: 73", "**73**", "The final answer is **73**.", "So the answer is $73$.",
        "Final Answer: 73", "**Final Answer**\n\n73", "Thus, the number of such residents is **73**.", "m + n = 73",
        r"\[ m+n = 73 \]", "The final answer is: $73$", "Therefore m + n = 64 + 9 = 73.", "The answer is: 073",
        "Answer:\n73", "The answer is\n\n$$73.$$", "The requested sum is 64+9=73", "The answer is $m+n=73$.",
        "ANSWER: 73", "The remainder is 73", "# Answer\n73", "The answer is equal to 73.", "Hence the answer is therefore 73.",
        "<think>\nI get 72 or 73.\n</think>\n\nThe answer is 73.",
    ], [
        "The answer is 72.", "The answer is 7.3.", "The answer is 1,073.", "Answer: 73/2", "The answer is between 70 and 73.",
        "The answer is 73 or 74.", "<think>\nIt is 73.\n</think>\n\nThe answer is 72.", "The answer is 72, not 73.",
        "I could not finish.", "The answer is $\\frac{73}{2}$.", "m + n = 73 + p", "The answer is 73^2.",
        "<think>\nThe answer is 73.", "The answer is 730.",
    ]),
    ("skylight issue 34", "117", [r"The sum is \(\boxed{117}\).</answer>", r"<answer>\boxed{117}</answer>"], []),
    ("trailing remarks", "385", [
        r"\boxed{385}" + "\n\nThis uses the 12th theorem of section 3.", r"The answer is $\boxed{385}$. Let me know if you want 2 proofs!",
        r"\boxed{385}" + "\n\nCheck: 384 + 1 = 385.", r"\[\boxed{385}\] (see problem 12 of 2024)",
    ], [r"\boxed{384}" + "\n\nOthers got 385."]),
]
