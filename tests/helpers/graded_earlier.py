"""Cases of the first graders, with verdicts by hand; unlike those of the other graded_*.py, all must hold."""

from nanosafe.text.answers import LONGEST


def in_box(cases):
    return [(gold, rf"\boxed{{{content}}}") for gold, content in cases]


# (reference answer, what is boxed)
RIGHT = in_box([
    # numbers
    ("33", "033"), ("-3", "-3"), ("1,000", "1000"), ("1000", "1{,}000"), ("10,\\!080", "10,080"),
    ("10,\\!080", "10080"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"), ("58,500", "58500"), ("2", "2.0"), ("2", "2."), (".35625", "0.35625"),
    (".35625", r"\frac{57}{160}"), (".0000672", r"6.72 \times 10^{-5}"), (".0000672", "0.0000672"), ("0", "-0"),
    # fractions and mixed numbers
    (r"\frac{1}{2}", r"\dfrac{1}{2}"), (r"\frac{1}{2}", "0.5"), (r"\frac43", "4/3"), ("1/2", r"\frac{1}{2}"),
    (r"-\frac{3}{4}", r"\frac{-3}{4}"), (r"\frac{7}{2}", r"3\frac{1}{2}"), (r"1\frac{4}{5}", r"\frac{9}{5}"),
    (r"1\frac{4}{5}", "1.8"), (r"137 \frac{1}{2}", "137.5"), (r"\frac 34", r"\tfrac{6}{8}"),
    # roots, powers, constants
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"), (r"2\sqrt{2}", r"\sqrt{8}"), (r"3\sqrt{13}", r"\sqrt{117}"),
    (r"2\pi", r"2\pi"), ("2^{10}", "1024"), (r"18+2\pi", r"2(\pi+9)"), (r"11 \sqrt{5} + 11", r"11(1+\sqrt5)"),
    # sets, lists, pairs, intervals, inequalities
    (r"\{1,2,3\}", r"\{3,1,2\}"), ("1,2,3", "3, 2, 1"), ("3, 5, 7", r"3, 5 \text{ and } 7"), ("1,-2", r"x=1, x=-2"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"), (r"\{1\pm\sqrt{5},-2\}", r"-2, 1-\sqrt5, 1+\sqrt5"),
    ("(3,4)", "(3, 4)"), ("(3,4)", "3,4"), (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    ("(6,31,-1)", "(6, 31, -1)"),
    ("[0,1)", "[0,1)"), (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"), (r"x \in [-2,7]", "[-2,7]"),
    (r"\left(\frac{3}{5},\frac{8}{3}\right]", r"(3/5, 8/3]"), ("x>2", "2<x"), ("x>2", r"(2,\infty)"),
    (r"(2,\infty)", "x>2"),
    # units, degrees, currency, percentages, bases
    ("10", r"10\text{ cm}"), ("10", "10 m"), (r"10\text{ inches}", "10"), (r"864 \mbox{ inches}^2", "864"),
    (r"864 \mbox{ inches}^2", r"864 \text{ in}^2"), (r"5.4 \text{ cents}", r"5.4\text{ cents}"), (r"90^\circ", "90"),
    ("90", r"90^{\circ}"), (r"90^\circ", r"90 \text{ degrees}"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ"),
    (r"\$36", "36"), (r"\$18.90", r"\$18.9"), (r"\$32,\!348", "32,348"), (r"\$18.90", r"18.90 \text{ dollars}"),
    (r"50\%", r"50\%"), (r"50\%", "0.5"), (r"50\%", "50"), ("4210_{5}", "4210_5"), ("52_8", "52_{8}"),
    # words, choices, times
    (r"\text{Evelyn}", r"\text{Evelyn}"), (r"\text{Evelyn}", "Evelyn"), (r"\text{even}", r"\textbf{even}"),
    (r"\text{east}", r"\text{east}"), (r"\text{(C)}", r"\text{C}"), (r"\text{(C)}", "C"),
    (r"\text{(C)}", r"\textbf{(C)}"),
    ("6:00", "6:00"),
    # expressions, equations, complex numbers, matrices
    (r"\sqrt{\frac{a+b}{c^{2}}}", r"\sqrt{\frac{a+b}{c^{2}}}"), ("x^2+2x+1", "(x+1)^2"),
    ("6r^2-4r-24", "2(3r^2-2r-12)"),
    ("x^5 - x^4 + x^3 - x^2 + x - 1", "(x-1)(x^4+x^2+1)"), (r"\cot x", r"\frac{\cos x}{\sin x}"), ("2k+2", "2(k+1)"),
    ("3t", "3t"), ("3t", r"\frac{6t}{2}"), ("2ab", "2ba"), ("p - q", "-q + p"), ("5", "x=5"), ("x=5", "5"),
    ("y=2x+1", "y = 2x + 1"),
    ("y = 2x + 3", "2x + 3"), ("5x - 7y + 11z + 4 = 0", "5x - 7y + 11z = -4"), ("3+2i", "2i+3"), ("6 - 5i", "-5i + 6"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} \frac{1}{5} \\ -3.6 \end{pmatrix}"),
    (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"-\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}"),
])  # fmt: skip
RIGHT += [  # whole responses
    ("42", "42"),
    ("42", "So the answer is **42**."),
    ("204", r"The final answer is \boxed{204}."),
    (r"\frac12", "The answer is 2/4."),
    (r"$\frac{1}{2}$", "0.5"),
    (r"\text{even}", r"The function is \boxed{even}."),
    (r"2\pi", r"\[\boxed{2\pi}\]"),
    ("1,-2", r"$\boxed{-2}$ and $\boxed{1}$"),
    ("7", r"At first $\boxed{3}$. That forgets a case. With it the sum is $\boxed{7}$."),
    ("7", "<think>\nMaybe \\boxed{3}?\n</think>\n\nIt is \\boxed{7}."),
    ("7", "\\boxed{7}\n\n**Final answer**\n\n\\boxed{7}"),
    ("7", r"\boxed{7}, since \frac{14}{2} = 7 and not 8."),
    (r"\frac{1}{2}", r"\boxed {\frac{1}{2}} is it"),
    ("5", "\\( a " * 20_000 + "\nThe answer is 5."),  # the whole of it takes math-verify minutes
]
WRONG = in_box([
    (r"\frac{1}{2}", r"\frac{1}{3}"), (r"\frac{1}{2}", "2"), (r"\frac{1}{3}", "0.33"),
    (r"1\frac{4}{5}", r"\frac{4}{5}"),
    (r"137 \frac{1}{2}", r"\frac{137}{2}"), ("-3", "3"), ("3", "-3"), ("1000", "100"), ("10,\\!080", "10.08"),
    ("58,500", "585"), (".0000672", "0.0000668"), (".0000672", "0.000067"), ("2", "1, 2"), ("12", "12!"), ("5", "5x"),
    (r"2\sqrt{2}", "2.82"), (r"2\pi", "2"), (r"8 \pi", "25.13"), (r"1 \pm \sqrt{19}", r"1+\sqrt{19}"),
    (r"\{1,2,3\}", r"\{1,2\}"), ("1,2,3", "1,2,4"), ("5", "5, 6"), ("3, 5, 7", "3, 5"), ("5", r"5 \text{ or } 6"),
    ("[0,1)", "[0,1]"), ("(0,1)", "[0,1]"), ("(3,4)", "(4,3)"), (r"\left( 3, \frac{\pi}{2} \right)", r"(\pi/2, 3)"),
    ("x>2", r"x \ge 2"), ("x>2", "x<2"), (r"(2,\infty)", r"(-\infty,2)"), (r"x \in [-2,7]", "(-2,7)"),
    (r"(2,12) \cup (12,102)", "(2,102)"), ("10", r"11\text{ cm}"), (r"50\%", r"5\%"), (r"50\%", "0.05"),
    (r"\$18.90", r"\$18.09"), (r"90^\circ", r"9^\circ"), ("52_8", "53_8"), ("52_8", "42"),
    (r"\text{Evelyn}", r"\text{Eve}"),
    (r"\text{(C)}", r"\text{(D)}"), (r"\text{yes}", r"\text{no}"), (r"\text{even}", "odd"),
    (r"\text{east}", r"\text{west}"),
    ("6:00", "6:30"), ("x^2+2x+1", "(x-1)^2"), ("y=2x+1", "y=2x-1"), ("2k+2", "2k"), ("2k", "2"), ("5r^5", "5r^4"),
    ("3t", "3"), ("3t", "3s"), ("2ab", "2"), ("2x+3t", "2x+3"), (r"\cot x", r"\tan x"), ("p - q", "q - p"),
    ("3+2i", "3-2i"),
    ("x=5", "x=-5"),
    ("5x - 7y + 11z + 4 = 0", "5x - 7y + 11z - 4 = 0"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1 & 2\end{pmatrix}"),
    ("5", ""), ("5", " "), ("5", "0" * LONGEST + "5"),
])  # fmt: skip
WRONG += [
    (r"\frac{1}{2}", r"\boxed {\frac{1}{2}} is it; \boxed{\frac{1} was never closed"),
    ("5", r"\boxed{4} or \boxed{5}"),  # hedging
    ("5", r"\boxed{4}, \boxed{5}"),
    ("5", r"It was 5, but now \boxed{}"),
    ("5", "There are 5 apples and 7 pears."),  # the last number counts
    ("5", "I do not know."),
    ("5", ""),
    ("3", r"At first $\boxed{3}$. That forgets a case. With it the sum is $\boxed{7}$."),
    ("7", "<think>\nIt is \\boxed{7}.</think>\n\nIt is \\boxed{8}."),
]
# (reference, response)
INTEGER_RIGHT = in_box([
    ("73", "73"), ("73", "073"), ("073", "73"), ("073", "073"), ("5", "005"), ("0", "000"), ("0", "0"), ("999", "999"),
    ("73", " 73 "), ("73", "$73$"), ("73", "73."), ("73", "73.0"), ("73", r"73^\circ"), ("73", r"73^{\circ}"),
    ("73", "73°"),
    ("73", r"\text{073}"), ("73", r"\textbf{73}"), ("73", r"\mathbf{073}"), ("73", "{73}"),
    ("73", r"\textbf{(073) }"), ("73", "+73"), (73, "73"),
    ("73", "m+n = 73"), ("73", "m + n = 70 + 3 = 73"), ("73", "x=073"), ("73", r"73\text{ cm}"), ("73", "73 degrees"),
    ("73", r"73\,"), ("73", r"\,73\text{ square units}"), ("73", r"73.\!"), ("100", "100"),
])  # fmt: skip
INTEGER_RIGHT += [
    ("73", r"The sum is \(m+n = \boxed{073}\)."),
    ("73", r"First \boxed{12}. No, \boxed{73}."),
    ("73", r"$\boxed{\boxed{73}}$"),
    ("73", r"\fbox{73}"),
    ("73", "\\boxed{73}\n\nFinal answer: \\boxed{073}\n\n\\boxed{073}"),
    ("73", r"\boxed{73}, the 5th one"),
    ("73", "<think>\\boxed{12}</think>\nSo \\boxed{73}"),
    ("73", r"With \{1, 2\} it is \boxed{73}."),
    ("73", "The answer is 73, the 5th of 9."),
    ("73", "The answer is 073."),
    ("73", "**Answer:** 73"),
    ("73", "Final Answer: $073$ (see step 4)"),
    ("73", r"The final answer is \(73\) because 2 + 3 = 5."),
    ("73", "The answer is not 70 but 73."),
    ("73", "The first answer is 5. The answer is 73. Check: 80 > 7."),
    ("73", "So there are 73 of them."),
    ("73", "We get $m+n=73$."),
    ("73", "m + n = **073**"),
    ("73", "73"),
    ("0", "None of them, so 0."),
    ("73", "It is 5 times as likely, so (73)!"),
]
INTEGER_WRONG = in_box([
    ("73", "74"), ("73", "37"), ("73", "7"), ("73", "1073"), ("73", "730"), ("73", "-73"), ("73", "73.5"),
    ("73", "7.3"),
    ("73", r"\frac{73}{1}"), ("73", "1/73"), ("73", "7+66"), ("73", "2^{73}"), ("73", "73x"), ("73", "73!"),
    ("73", "72, 73"),
    ("73", "1,073"), ("73", ""), ("73", "seventy"), ("73", r"73 \text{ or } 74"), ("73", "73 = n + 1"), ("0", ""),
    ("1", "0001000"),
    ("73", r"73^2"), ("73", r"x_{73}"), ("0", "1000"),
])  # fmt: skip
INTEGER_WRONG += [
    ("73", r"\boxed{73} and not \boxed{74"),
    ("73", r"\boxed{72} or \boxed{73}"),
    ("4", r"\boxed{4} or \boxed{123}"),
    ("123", r"\boxed{4}, \boxed{123}"),
    ("73", r"The answer is 73: \boxed{74}"),
    ("73", r"\boxed{73}. Wait, it is \boxed{74}."),
    ("73", r"The answer is 73 but it is written \boxed{}"),
    ("73", "<think>\\boxed{73}</think>\nI do not know."),
    ("73", "The answer is 74, which is 73 + 1 = 74 and not 73"),
    ("73", "So 1073 of them."),
    ("73", "So 73.5 of them."),
    ("73", "The answer is 10/73."),
    ("73", "There are 73 of them and 5 more."),
    ("73", "It is A73."),
    ("73", "I do not know."),
]
LETTER_RIGHT = [(letter, f"Some reasoning about options A and B.\n\nAnswer: {letter}") for letter in "ABCD"] + [
    ("C", text) for text in [
        "Answer: C", "answer: c", "ANSWER: C", "Answer:C", "Answer : C", "Answer:\tC", "Answer: $C$", "Answer: $C",
        "Answer: C.",
        "Answer: C, as shown.", "Answer: C) 4.2 kJ/mol", "Answer: C. 4.2 kJ/mol", "Answer: C\n", "The answer: C",
        "Answer: C because A and B fail", "Answer: B\nNo, I made a mistake.\nAnswer: C",
        "Answer: $LETTER is asked.\nAnswer: C",
        "Final Answer: C", "Answer: C and nothing else", "Answer: C, a ketone", "My answer : C - the third",
        "**Answer: C**", "**Answer:** C", "**Answer**: C", "Answer: **C**", "**Answer: (C)**", "Answer: (C)",
        "Answer: $(C)$",
        "Answer: {C}", r"Answer: \text{C}", r"Answer: $\text{C}$", r"Answer: \(C\)", r"Answer: $\boxed{C}$",
        r"\boxed{C}",
        r"\boxed{\text{C}}", r"\boxed{(C)}", r"$\boxed{\mathbf{C}}$", r"\boxed{\text{(C)}}", r"So it is \boxed{C}.",
        r"\boxed{ C }",
        r"\boxed{Answer: C}", "Answer: B was my guess, but it is \\boxed{C}", "\\boxed{B} is wrong.\n\nAnswer: C",
        r"\boxed{\text{C.}}", "The answer is C.", "The correct option is C", "C", "(C)", "**C**",
        "Option C: 4.2 kJ/mol", "Answer:\nC", "Answer C",
        "<think>Answer: A</think>\n\nAnswer: C",
        "<think>\nAnswer: A\nAnswer: B\n</think>\n\nAll in all\n\n**Answer: C**\n",
    ]
]  # fmt: skip
LETTER_WRONG = [
    ("C", text) for text in [
        "Answer: B", "Answer: D", "Answer: C\nNo.\nAnswer: B", "Answer: the third one", "Answer: E", "Answer: Carbon",
        "Answer: CH4",
        "Answer: -", "Answer:", "Answer", "<think>Answer: C</think>\n\nI cannot tell.",
        "<think>Answer: C</think>\n\nAnswer: B",
        "Answer: Certainly the first", r"\boxed{B}", r"\boxed{C} or rather \boxed{B}", r"\boxed{42}",
        r"\boxed{C_2H_6}", r"\boxed{c = 3}",
        "Answer: B or C", "Answer: C or D", "Answer: C, D", "Answer: C/D", "Answer: **C** and **D**",
        "Answer: (C) or (D)",
        r"\boxed{C, D}", "Answer: A, B, C, D",
    ]
]  # fmt: skip
LETTER_WRONG += [("B", "Answer: Both"), ("B", "Answer: because"), ("A", "Answer: All of them"),
("D", "Answer: depends"),
                 ("D", r"\boxed{d}"), ("D", r"\boxed{D = 3}"), ("A", r"\boxed{A + B}")]  # fmt: skip
LETTER_WRONG += [("A", "Answer: a catalyst is missing")]
EARLIER = {
    "math": (RIGHT, WRONG), "integer": (INTEGER_RIGHT, INTEGER_WRONG), "letter": (LETTER_RIGHT, LETTER_WRONG),
}  # fmt: skip
