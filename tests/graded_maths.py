r"""Mathematical answers with their verdicts: (source, reference, right answers, wrong answers).

The verdicts were decided by hand before the grader was tuned to any of them, as a mathematician marks an exam whose
question is not in sight: another form of the same value is right, also with a unit, words or a name before it; two
values for one, a weaker statement, another base or another kind of object are wrong. What stands in no \boxed{} and
begins with none of RESPONSE is put into a box. Sources: MATH-500 stands for its reference answers, in forms that
models write; issues are those of the named projects, whose situations are rebuilt here in other numbers.
"""

RESPONSE = ("The ", "So ", "Thus", "Final", "**", "$", "\\[", "\\(", "Answer", "We ", "It ", "There", "Let ", "One ")

MATHS = [
    # Several boxes side by side are one answer, whatever joins them.
    ("MATH-500, boxes side by side", "1,-2", [
        r"\boxed{-2} \quad \text{and} \quad \boxed{1}", r"\boxed{1} \qquad \boxed{-2}", r"\boxed{1},\ \boxed{-2}",
        r"\(\boxed{1}\) and \(\boxed{-2}\)", r"$\boxed{1}$ or $\boxed{-2}$", r"\boxed{x=1} \text{ or } \boxed{x=-2}",
        r"$x = \boxed{1}$ or $x = \boxed{-2}$", r"\boxed{1} \mbox{ and } \boxed{-2}",
        r"\boxed{1} \;\mathrm{and}\; \boxed{-2}", r"\begin{align*} \boxed{1} & \boxed{-2} \end{align*}",
        "1. \\boxed{1}\n2. \\boxed{-2}", "- \\boxed{-2}\n- \\boxed{1}", "(a) $\\boxed{1}$\n(b) $\\boxed{-2}$",
        r"\boxed{1 \text{ and } -2}", r"\boxed{x = 1, x = -2}", r"\boxed{\{-2, 1\}}", r"\boxed{x_1 = 1,\; x_2 = -2}",
        r"\boxed{x \in \{-2, 1\}}", r"\boxed{n=1 \text{ or } n=-2}",
    ], [
        r"\boxed{1}", r"\boxed{-2} \quad \text{and} \quad \boxed{2}", r"\boxed{1} \quad \boxed{2} \quad \boxed{-2}",
        r"$\boxed{1}$ is one root; the other one I do not know", r"\boxed{1 \text{ or } 2}",
    ]),
    ("hedges (Math-Verify issue 57, EasyR1)", "5", [
        r"\boxed{5} \quad \text{or} \quad \boxed{5}", r"First I had \boxed{4}, which forgot a case. Now it is \boxed{5}.",
        r"Is it \boxed{4}? No. Let us count again, with care for the last case, which was left out: \boxed{5}",
        r"The answer is \boxed{5}. So \boxed{5} is right because $2+3=5$.",
    ], [
        r"\boxed{4} \quad \text{or} \quad \boxed{5}", r"\boxed{4} \qquad \boxed{5}", r"\boxed{5} \mbox{ or } \boxed{6}",
        r"\boxed{5}\\ \boxed{6}", r"$x=\boxed{4}$ or $x=\boxed{5}$", r"\boxed{5 \text{ or } 6}", r"\boxed{5 / 6}",
        r"\boxed{4,5}", r"\boxed{4\text{ or }5}", "1. \\boxed{4}\n2. \\boxed{5}", r"\boxed{4 \lor 5}",
    ]),
    ("unfinished or empty last box (marin pull 9163)", "6", [r"\boxed{6}, with \boxed the last command"], [
        r"\boxed{6}. It was worth the work \boxed{",
        r"\boxed{6", r"\boxed{5} is wrong, it is \boxed{6", r"\boxed{6} was wrong, so I correct it to \boxed{\frac{7",
        r"\boxed{6}, or rather \boxed{}", r"\boxed{6} no, \boxed{7",
    ]),
    ("Math-Verify issue 44", "840", [
        "could answer therefore\\boxed{840}.,but let me explain.\n\n**Final Answer**\n\\boxed{840}",
        "So, \\boxed{0840} is the answer.\n\n**Final Answer**\n\\boxed{840}",
    ], ["\\boxed{840} at first.\n\n**Final Answer**\n\\boxed{804}"]),
    ("Math-Verify issue 76", "73", [
        "The number of residents who own all four things is **73**.\n\n---\n\nFinal Answer: **73**",
        "Left: 437 + 468 = 905\n\nThus, the number is **73**.", "**73**", "**Final Answer:** 73", "Answer: **73.**",
    ], ["**Final Answer:** 74", "The answer is **437**, not 73 + 1."]),
    # Numbers
    ("MATH-500 thousands", r"10,\!080", [
        r"10\,080", r"10{,}080", "10 080", r"10,080", "10080", r"10\;080", r"10~080", "10,080.", r"10\ 080", "10080.0",
        r"1.008 \times 10^4", r"N = 10\,080", r"10\,080 \text{ ways}", r"\text{10,080}", "10\u202f080",
    ], ["1080", r"10\,008", "10.08", "10, 80", r"10\,800"]),
    ("MATH-500 thousands", r"11,\! 111,\! 111,\! 100", [
        r"11\,111\,111\,100", "11,111,111,100", r"11{,}111{,}111{,}100", "11 111 111 100",
    ], [r"1\,111\,111\,100", "11,111,111"]),
    ("MATH-500 money", r"\$32,\!348", [
        r"\$32{,}348", r"32{,}348 \text{ dollars}", r"\$32\,348", r"\text{\$32,348}", "32348 dollars", r"\$32,348.00",
    ], [r"\$32.348", r"\$3,234.8", r"\$32,384"]),
    ("MATH-500 money", r"\$18.90", [r"18.90", r"\$18.9", r"18.9\text{ dollars}", r"\text{\$}18.90", "$18.90$"],
     ["18.09", r"\$1.89", "19"]),
    ("MATH-500 mixed numbers", r"137 \frac{1}{2}", [
        "137 1/2", r"137\tfrac{1}{2}", r"\frac{275}{2}", "137.5", "275/2", r"137\frac12", r"137\,\frac{1}{2}",
        "137\u00bd",
    ], [r"\frac{137}{2}", "137", "68.5", "137 1/3"]),
    ("MATH-500 mixed numbers", r"1\frac{4}{5}", ["1 4/5", r"\frac95", r"1 + \frac{4}{5}", "9/5", r"1\dfrac{4}{5}"],
     ["14/5", "4/5", "1.45"]),
    ("MATH-500 decimals", ".0000672", [r"6.72\times10^{-5}", r"6.72 \cdot 10^{-5}", r"\frac{672}{10000000}",
                                       r"6.72 \times 10^{-5} \text{ m}"], [r"6.72\times10^{-4}", r"6.7\times10^{-5}"]),
    ("MATH-500 negatives, unicode", r"-\frac{3}{8}", ["\u22123/8", "-3/8", "-0.375", r"\frac{-3}{8}", r"-\frac38."],
     ["3/8", r"-\frac{8}{3}", r"\pm\frac{3}{8}"]),
    ("MATH-500 roots, unicode", r"11\sqrt2", ["11\u221a2", r"11\sqrt{2}", r"\sqrt{242}", r"11 \cdot \sqrt{2}", "11sqrt(2)",
                                               r"11\sqrt{2}\text{ units}", "11*sqrt(2)"], ["11", "15.56", r"\sqrt{22}"]),
    ("MATH-500 pi, unicode", r"288 \pi", ["288\u03c0", r"288\pi \text{ cubic inches}", r"288\pi\text{ cm}^3",
                                          r"288 \cdot \pi", r"V = 288\pi", r"288\pi.", r"288\,\pi\ \mathrm{cm^3}"],
     ["288", r"28.8\pi", r"288\pi^2", "904.78"]),
    # Units, degrees, full stops, words in front
    ("MATH-500 degrees", r"90^\circ", [
        "90\u00b0", "90", r"90^{\circ}", r"90 \text{ degrees}", r"90\degree", r"90\text{°}", r"90^\circ.",
        r"\angle ABC = 90^\circ", r"\theta = 90^{\circ}", r"90 ^ \circ",
    ], ["9\u00b0", "45\u00b0", r"90^2", "900", r"\frac{\pi}{3}"]),
    ("MATH-500 angle", "145^\\circ", ["145\u00b0", r"x = 145^\circ", r"145\text{ deg}"], ["35\u00b0", "145.5"]),
    ("MATH-500 areas", r"15\mbox{ cm}^2", [
        r"15 cm^2", r"15\text{ cm}^2", r"15\,\text{cm}^2", r"15 \mathrm{~cm}^2", "15", r"15\text{ cm}^{2}",
        r"15\ \text{square centimeters}", r"15\text{ cm²}", "15 cm²", r"15\,\mathrm{cm}^{2}",
    ], ["225", r"15^2", r"1.5\text{ cm}^2"]),
    ("MATH-500 areas", r"864 \mbox{ inches}^2", [r"864 \text{ in}^2", "864 square inches", r"864\,\text{in.}^2",
                                                 r"864\ \text{square inches}"], ["144", r"864^2"]),
    ("MATH-500 cents", r"5.4 \text{ cents}", ["5.4", r"5.4 \text{ cents per egg}", "5.4 cents", r"5.4\text{¢}"],
     ["54", r"\$5.04"]),
    ("units that models add to plain numbers", "12", [
        r"12\text{ km/h}", r"12 \text{ m/s}", r"12\ \mathrm{cm}", "12 cm", r"12 \text{ hours}", "12 units",
        r"12\text{ students}", "12.", r"\text{12 apples}", r"\text{Answer: }12", r"\text{The answer is } 12", r"n = 12",
        r"12\text{ (minutes)}", r"\mathbf{12}", r"\textbf{12}", r"{12}", r"\left(12\right)", r"\text{Area} = 12",
        r"\text{Sum: } 12", r"12 \text{ units}^2", r"\$12", r"12 \pmod{13}", r"\approx 12", r"AB = 12",
        r"\displaystyle 12", r"12~\text{cm}", r"f(3) = 12", r"a+b = 12", r"\boldsymbol{12}", r"\bf 12", r"\color{red}{12}",
        r"\underline{12}", r"12!/11!", r"+12", r"12 \,", r"\ 12",
    ], [
        "12x", "12!", "12 + 1", r"12^2", "1/12", "-12", r"12, 13", "12n", r"\geq 12", r"> 12", r"12 < x", r"x \le 12",
        r"n \equiv 12 \pmod{13}", "12:1", "1:12", "12_8", r"12\sqrt{2}", r"\{12, 13\}", r"(12, 0)", r"12i", r"12\pi",
        r"\neq 12", r"n = 12k", r"|x| = 12", r"\text{at least } 12", r"12\text{ or more}", r"12 \pm 1", r"10\text{ to }12",
    ]),
    ("residues (EVALS notes)", "4", [r"4 \pmod 9", r"4 \pmod{9}", r"4 \bmod 9", r"4\mod 9"],
     [r"n \equiv 4 \pmod 9", r"9 \pmod 4", r"x \equiv 4 \pmod{9}"]),
    ("comparisons taken for values (EVALS notes)", "2", ["2", r"x = 2", r"2.00", r"k=2"],
     [r"\geq 2", r"\ge 2", "x > 2", r"x \neq 2", r"n \equiv 2 \pmod 7", "2:1", r"\leq 2", r"<2", r"x<2"]),
    ("ratios (EVALS notes)", "40", ["40", "40.0"], ["40:1", "1:40", r"40 : 1", r"40 \text{ to } 1"]),
    ("bases (EVALS notes)", "10", ["10", r"10_{10}"], ["10_8", "10_{2}", r"10_{\text{five}}"]),
    ("MATH-500 bases", "52_8", [r"52_{8}", r"(52)_8", r"52_{\text{eight}}", r"52_8.", "52"], ["52_9", "25_8", "42"]),
    ("MATH-500 bases", "4210_{5}", ["4210_5", r"4210_{\text{five}}", r"(4210)_5"], ["4210_6", "421_5"]),
    # Tuples, intervals, sets, equations
    ("MATH-500 pairs", r"\left( 3, \frac{\pi}{2} \right)", [
        r"(3, \frac{\pi}{2})", r"\left(3,\dfrac{\pi}{2}\right)", r"(3, \pi/2)", "(3, \u03c0/2)", r"(3,\tfrac{1}{2}\pi)",
        r"(r,\theta) = \left(3, \frac{\pi}{2}\right)",
    ], [r"(\frac{\pi}{2}, 3)", r"(3, \pi)", r"3", r"(3, \frac{3\pi}{2})"]),
    ("MATH-500 pairs", "(-2,1)", ["(-2, 1)", r"\left(-2, 1\right)", "(x, y) = (-2, 1)", r"x=-2, y=1", "(\u22122, 1)"],
     ["(1,-2)", "(2,1)", "[-2,1]"]),
    ("MATH-500 intervals", r"(2,\infty)", [r"(2, \infty)", r"(2,+\infty)", "(2, \u221e)", r"x \in (2, \infty)", r"x > 2",
                                           r"\left(2, \infty\right)"], [r"[2,\infty)", r"(-\infty,2)", r"x \ge 2"]),
    ("MATH-500 intervals", "(3,4]", ["(3, 4]", r"\left(3,4\right]", r"x\in(3,4]", r"3 < x \le 4", r"3<x\leq 4"],
     ["(3,4)", "[3,4]", "[3,4)", r"3 \le x \le 4"]),
    ("MATH-500 unions", r"(0,9) \cup (9,36)", [r"(0, 9) \cup (9, 36)", "(0,9) \u222a (9,36)", r"(9,36)\cup(0,9)"],
     ["(0,36)", r"(0,9) \cap (9,36)", r"(0,9] \cup (9,36)"]),
    ("MATH-500 domains", r"x \in [-2,7]", ["[-2,7]", r"-2 \le x \le 7", r"-2 \leq x \leq 7", "[-2, 7]"],
     ["(-2,7)", r"-2 < x < 7", r"x \le 7"]),
    ("MATH-500 plus-minus", r"3 \pm 2 \sqrt{2}", [r"3 + 2\sqrt{2}, 3 - 2\sqrt{2}", "3 \u00b1 2\u221a2", r"x = 3 \pm 2\sqrt2",
                                                  r"3+2\sqrt{2} \text{ and } 3-2\sqrt{2}", r"3\pm\sqrt{8}"],
     [r"3 + 2\sqrt{2}", r"-3 \pm 2\sqrt{2}"]),
    ("MATH-500 sets", r"\{1\pm\sqrt{5},-2\}", [r"-2, 1 \pm \sqrt{5}", r"\left\{-2, 1-\sqrt{5}, 1+\sqrt{5}\right\}",
                                               r"1+\sqrt5, 1-\sqrt5, -2"], [r"1 \pm \sqrt{5}", r"-2, 1+\sqrt{5}"]),
    ("MATH-500 lists", "3, 5, 7", [r"3, 5, \text{ and } 7", r"\{3,5,7\}", "7, 5, 3", r"3,\ 5,\ 7", "3 and 5 and 7",
                                   r"3; 5; 7"], ["3, 5", "3, 5, 8", "357"]),
    ("MATH-500 lines", "y = 2x + 3", ["y=2x+3", "2x+3", r"y - 2x = 3", r"2x - y + 3 = 0", r"f(x) = 2x + 3"],
     ["y = 3x + 2", "2x - 3", "y = 2x"]),
    ("MATH-500 planes", "5x - 7y + 11z + 4 = 0", ["5x-7y+11z+4=0", "-5x + 7y - 11z - 4 = 0", "10x-14y+22z+8=0"],
     ["5x - 7y + 11z - 4 = 0", "5x-7y+11z+4", "5x - 7y + 11z = 4"]),
    ("MATH-500 polynomials", "6r^2-4r-24", ["2(3r^2 - 2r - 12)", "6r^{2} - 4r - 24", "-24 - 4r + 6r^2", "6r\u00b2-4r-24"],
     ["6r^2+4r-24", "6r^2-4r", "2r^2 - 4r - 24"]),
    ("MATH-500 polynomials", "x^3+3x-6", ["x^3 + 3x - 6", "p(x) = x^3 + 3x - 6", r"x(x^2+3)-6"], ["x^3+3x+6", "x^3-3x-6"]),
    ("MATH-500 products", "(a+5)(b+2)", ["(b+2)(a+5)", "ab + 2a + 5b + 10", r"(a + 5)(b + 2)"], ["(a+2)(b+5)", "(a-5)(b-2)"]),
    ("MATH-500 complex", "6 - 5i", ["-5i + 6", "6-5i", r"6 - 5 i", r"z = 6 - 5i", r"6 + (-5)i", "6 \u2212 5i"],
     ["6+5i", "-6+5i", "5-6i"]),
    ("MATH-500 fractions", r"\frac{11+9a}{20}", [r"\frac{9a+11}{20}", "(11+9a)/20", r"\dfrac{11}{20} + \dfrac{9a}{20}",
                                                 r"\frac{9}{20}a + \frac{11}{20}"], [r"\frac{11+9a}{2}", "11+9a"]),
    ("MATH-500 fractions", r"\frac43", [r"\frac{4}{3}", "4/3", r"1\frac13", r"\dfrac{4}{3}.", r"1.\overline{3}", r"4 \div 3",
                                        r"{4 \over 3}", r"\frac{4}{3} \approx 1.333"], ["1.33", "3/4", "1.3"]),
    ("MATH-500 surds", r"\frac{\sqrt{3}}{3}", [r"\frac{1}{\sqrt{3}}", r"\sqrt{3}/3", r"\tfrac{\sqrt3}{3}", r"\sqrt{\frac13}",
                                               "\u221a3/3", r"3^{-1/2}"], [r"\sqrt{3}", "0.577", r"\frac{\sqrt{3}}{2}"]),
    ("MATH-500 matrices", r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}", [
        r"\begin{bmatrix} -2 \\ -14 \\ -7 \end{bmatrix}", r"\begin{pmatrix}-2\\-14\\-7\end{pmatrix}",
        r"\mathbf{v} = \begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}",
        r"\left[\begin{array}{c} -2 \\ -14 \\ -7 \end{array}\right]", r"-\begin{pmatrix} 2 \\ 14 \\ 7 \end{pmatrix}",
    ], [r"\begin{pmatrix} -2 & -14 & -7 \end{pmatrix}", r"\begin{pmatrix} -2 \\ -14 \\ 7 \end{pmatrix}"]),
    # Words
    ("MATH-500 words", r"\text{Evelyn}", ["Evelyn", r"\textbf{Evelyn}", r"\text{Evelyn}.", r"\mathrm{Evelyn}",
                                          r"\text{ Evelyn }", r"\textit{Evelyn}"], [r"\text{Angela}", r"\text{Evelyn or Carla}"]),
    ("MATH-500 words", r"\text{even}", ["even", r"\text{Even}", r"\textit{even}", r"\text{even function}"],
     ["odd", r"\text{neither}", r"\text{not even}"]),
    ("MATH-500 words", r"\text{ellipse}", [r"\text{Ellipse}", "ellipse", r"\text{an ellipse}"], ["circle", r"\text{parabola}"]),
    ("MATH-500 choices", r"\text{(C)}", ["C", r"\text{C}", "(C)", r"\textbf{(C)}", r"\text{(C) }14", r"\mathrm{C}"],
     ["B", "(D)", r"\text{(B) }C"]),
    # Without a box
    ("answers without a box", r"\frac{3}{56}", [
        r"The answer is $\frac{3}{56}$.", r"So $p(8) = \frac{3}{56}$.", r"\[p(8) = \frac{3}{56}\]", r"Final answer: 3/56",
        r"The final answer is $\dfrac{3}{56}$. I hope it is correct.", "**Answer:** $\\frac{3}{56}$",
        r"Thus $x=1$ and the sum is \( \frac{3}{56} \).",
    ], [r"The answer is $\frac{3}{65}$.", r"Final answer: 3/5", r"So $p(8)=\frac{3}{56}+1$.", "There is no such number."]),
]
