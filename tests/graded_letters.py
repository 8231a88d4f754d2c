r"""Answers to questions with four options with their verdicts: (source, reference, right answers, wrong answers).

The verdicts were decided by hand before the grader was tuned to any of them, by one rule: the last place that commits
to exactly one letter counts; a choice of two, a denial, a symbol or a word that begins with the letter commits to none.
Sources: GPQA's prompt asks for "Answer: $LETTER"; the other forms are those that models write all the same, by the
named issues and pulls, rebuilt here in other words.
"""

LETTERS = [
    ("simple-evals' form", "B", [
        "Answer: B", "answer: B", "ANSWER: B", "Answer : B", "Answer:B", "Answer: $B$", "Answer: $B", "Answer: B.",
        "Answer: b", "Both seem possible.\n\nAnswer: B", "Answer: A\n\nI must correct that.\n\nAnswer: B",
        "Answer: B\n\n", "Answer: B) 4.2 kJ/mol", "Answer: B, since A has the wrong sign", "Answer: B (4.2 kJ)", "Answer: B: 4.2",
    ], [
        "Answer: A", "Answer: B\n\nNo, that is wrong.\n\nAnswer: A", "Answer: E", "Answer:", "Answer: $LETTER", "Answer: 4.2 kJ",
        "Answer: Both", "Answer: Boron", "Answer: because of the sign", "Answer: None of A, B, C and D",
    ]),
    ("markdown around it (sia pull 57)", "B", [
        "**Answer: B**", "**Answer:** B", "**Answer**: B", "Answer: **B**", "*Answer: B*", "__Answer: B__", "Answer: `B`",
        "### Answer: B", "**Final Answer: B**", "**Final Answer:** **B**", "> Answer: B", "- Answer: B", "**B**", "**(B)**",
        "**B.**", "**B)** 4.2 kJ/mol", "So the right option is **B**.", "## Final Answer\n\n**B**", "**Answer:**\n\nB",
        "**B: 4.2 kJ/mol**", "*B*", "***B***", "**Answer: (B) 4.2 kJ/mol**", "Final answer - B",
    ], ["**A**", "**Answer: A**", "**Because** of that, **A**", "**B is wrong**, so **A**"]),
    ("brackets", "B", ["Answer: (B)", "Answer: [B]", "Answer: {B}", "Answer: <B>", "Answer: ($B$)", "Answer: \\(B\\)",
                       "Answer: (B", "(B)", "[B]", "(B) 4.2 kJ/mol", "B) 4.2 kJ/mol", "<answer>B</answer>", "B", "B."],
     ["Answer: [A]", "(A)", "A", "<answer>A</answer>", "(B) is wrong.\n\n(A)"]),
    ("boxes (Gym pull 1844, Soup issue 357, AISBench issue 545)", "B", [
        r"\boxed{B}", r"\boxed{\text{B}}", r"\boxed{(B)}", r"\boxed{\text{(B)}}", r"\boxed{\mathbf{B}}", r"\boxed{\textbf{B}}",
        r"\boxed{\mathrm{B}}", r"\boxed{B.}", r"\boxed{B)}", r"\boxed{\text{B: 4.2 kJ}}", r"\boxed{B: 4.2\text{ kJ}}",
        r"\boxed{\text{B) 4.2 kJ}}", r"\boxed{\text{B. } 4.2}", r"\boxed{\text{Option B}}", r"\boxed{\text{Answer: B}}",
        r"\boxed{\textbf{(B) } 4.2}", r"\fbox{B}", r"\framebox{B}", r"$\boxed{B}$", r"\[\boxed{B}\]", r"Answer: \boxed{B}",
        r"Answer: $\boxed{\text{B}}$", r"\boxed{\boxed{B}}", r"\boxed{ B }", r"\boxed{\text{ B }}", r"The answer is \boxed{B}.",
        r"\boxed{A} is too small. \boxed{B}", r"\boxed{A}? The sign is wrong. So it must be \boxed{B}", r"\boxed{\bf B}",
        r"\boxed{B}, which is 4.2 kJ", r"\boxed{\text{B - 4.2 kJ}}", r"\boxed{\Large B}", r"\boxed{\text{The answer is B}}",
        r"\boxed{\langle H \rangle \ll \Delta E} holds." + "\n\n**Answer: B**",
        r"\boxed{4.2\text{ kJ}}" + "\n\nAnswer: B",
    ], [
        r"\boxed{A}", r"\boxed{4.2}", r"\boxed{B \text{ or } C}", r"\boxed{B, C}", r"\boxed{A \text{ and } B}",
        r"\boxed{B+C}", r"\boxed{B^+}", r"\boxed{B^2}", r"\boxed{B_2}", r"\boxed{B = 4}", r"\boxed{BC}", r"\boxed{\text{Both}}",
        r"\boxed{B-C}", r"\boxed{\frac{B}{C}}", r"\boxed{2B}", r"\boxed{B} or \boxed{C}", r"\boxed{B} \quad \text{or} \quad \boxed{A}",
        r"\boxed{B", r"\boxed{}", r"\boxed{B} was wrong. \boxed{C}", r"\boxed{\text{B-decay}}", r"\boxed{\Delta B}", r"\boxed{B'}",
        r"\boxed{B(x)}", r"\boxed{\text{not B}}", r"\boxed{\text{neither A nor B}}",
    ]),
    ("sentences", "B", [
        "The answer is B.", "The answer is B", "The correct answer is B.", "The answer is (B).", "The correct answer is (B) 4.2 kJ.",
        "The correct option is B.", "So the correct choice is B.", "The final answer is **B**.", "The answer is **B**.",
        "The answer is option B.", "Thus, the answer is $B$.", "The correct answer is: B", "The correct answer is B: 4.2 kJ/mol.",
        "The answer is $\\text{B}$.", "The best answer is B, because A is too small.", "Therefore, option B is correct.",
        "Option B is correct.", "Option B", "Option (B)", "option B is the right one.", "I choose B.", "I would choose option B.",
        "Hence the correct option is (B).", "The answer should be B.", "The answer must be B.", "My answer is B.",
        "Choice B is correct.", "The answer is therefore B.", "B is the correct answer.", "B is correct.", "So the answer is B!",
        "**Option B**", "Option B: 4.2 kJ/mol", "Correct answer: B", "Correct option: B", "Final answer: B", "The answer is \"B\".",
        "The answer is 'B'.", "The answer is B, not A.", "The answer is option **B**.", "Answer is B", "Ans: B", "Choice: B",
    ], [
        "The answer is A.", "The answer is not B.", "The answer is A or B.", "The answer is either A or B.", "The answer is B or C.",
        "B is wrong, so the answer is A.", "Option B is wrong.", "Option B is not correct.", "The answer is B-decay.",
        "The answer is B^+.", "The answer is B+C.", "The answer is both A and B.", "The answer is a base.", "The answer is a B-decay.",
        "I do not know whether it is A, B, C or D.", "It could be B.\n\nThe answer is A.", "The answer is unclear.",
        "The answer is Boron.", "The answer is BCl3.", "The answer is B = 4 T.", "Options B and C are correct.",
        "Option B cannot be right.", "The answer cannot be B.", "The answer isn't B.",
    ]),
    ("denials and second thoughts", "C", [
        "Answer: B is wrong, C is right", "Answer: B is wrong.\n\nAnswer: C", "A is out, B is out, D is out. The answer is C.",
        "At first I thought B. But the answer is C.", "The answer is not B but C.", "Answer: not B but C",
        "Option A is wrong. Option B is wrong. Option C is correct. Option D is wrong.", "Answer: C (not B)", "Answer: C, not B",
        "The answer is C rather than B.", "<think>\nAnswer: B\n</think>\n\nAnswer: C", "<think>B? C?</think>\nC",
        "Answer: C\n\nNote that option B has the wrong sign.", "Answer: C\n\nA: too small\nB: too large\nD: wrong unit",
    ], [
        "Answer: B is right, C is wrong", "Answer: C is wrong, B is right", "<think>\nAnswer: C\n</think>\n\nI am not sure.",
        "<think>\nAnswer: C", "Answer: not C", "Answer: C? No.\n\nAnswer: D", "The answer is not C but B.", "Answer: C or D",
        "Answer: C/D", "Answer: C, D", "Answer: C and D", "Answer: C & D", "Answer: (C) or (D)", "Answer: **C** or **D**",
        "Answer: C or maybe D", "Answer: either C or D", "Answer: neither C nor D", "C, D", "C or D", "A, B, C, D",
    ]),
    ("letters that are no options", "A", ["Answer: A", "Answer: A) a catalyst", "The answer is A."], [
        "Answer: a catalyst", "A catalyst is missing.", "Answer: A catalyst is missing.", "The answer is a catalyst.",
        "A solution of NaCl forms.", "Answer: All of them", "The answer is an acid.", "Answer: A+", "Answer: A-B", "Answer: A*B*C",
        "A is the mass number.", "Let A be the area.", "The answer is A level.",
    ]),
    ("symbols", "D", ["Answer: D", r"Answer: $\mathbf{D}$", r"Answer: $\text{(D)}$", r"Answer: \textbf{D}"],
     ["Answer: D-glucose", "Answer: D2O", "Answer: $D = 3$", "Answer: D_2", "Answer: dS/dt", r"Answer: $\Delta D$",
      "Answer: D'", "The diffusion constant is D.", "Answer: 3D", "Answer: delta"]),
]
