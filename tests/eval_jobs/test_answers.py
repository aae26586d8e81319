"""The default way of reading: many ways of writing an answer, each with what a careful reader would read."""

import random
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_jobs.answers import read_answer
from eval_jobs.exact_numbers import canonical
from eval_jobs.quantities import same_quantity

LABELS = [
    ("Answer: 42", "42"),
    ("answer:42", "42"),
    ("ANSWER: 42", "42"),
    ("It is 6 * 7.\nAnswer: 42 eggs", "42"),
    ("**Answer:** 42", "42"),
    ("**Answer**: 42", "42"),
    ("**Answer: 42**", "42"),
    ("*Answer:* *42*", "42"),
    ("__Answer:__ 42", "42"),
    ("> Answer : [42]", "42"),
    ("- Answer: 42", "42"),
    ("`Answer: 42`", "42"),
    ("Final answer: 42", "42"),
    ("FINAL ANSWER: 42", "42"),
    ("**Final Answer:** 42", "42"),
    ("**Final Answer**: $42$", "42"),
    ("**Final Answer**\n\n42", "42"),
    ("### Final Answer\n\n**42**", "42"),
    ("### Final Answer: 42 eggs", "42"),
    ("## Answer\n42", "42"),
    ("# Answer:\n\n42 eggs.", "42"),
    ("Answer\n------\n42", "42"),
    ("Answer:\n42", "42"),
    ("Answer:\n\n42", "42"),
    ("Answer:\n\n- 42", "42"),
    ("Answer:\n```\n42\n```", "42"),
    ("**Answer:**\n\\[\n\\boxed{42}\n\\]", "42"),
    ("**Answer:**\n$$\n42\n$$", "42"),
    ("Answer：42", "42"),
    ("Answer : 42", "42"),
    ("Answer = 42", "42"),
    ("Answer -> 42", "42"),
    ("Answer → 42", "42"),
    ("Answer — 42", "42"),
    ("Answer 42", "42"),
    ("Answer is 42", "42"),
    ("ans: 42", "42"),
    ("Ans. = 42", "42"),
    ("Step 1: 6 * 7 = 42. Answer: 42", "42"),
    ("That makes 42. Answer: 42.", "42"),
    ("We find 42 eggs, so the final answer is 42.", "42"),
    ("The answer is 42", "42"),
    ("The answer is: 42.", "42"),
    ("The answer is **42**.", "42"),
    ("The correct answer is 42 eggs.", "42"),
    ("So the answer is $42.", "42"),
    ("So the answer is $\\boxed{42}$.", "42"),
    ("Therefore, the answer would be 42.", "42"),
    ("The answer to the question is 42.", "42"),
    ("The answer should be 42 in total", "42"),
    ("My answer: 42", "42"),
    ("Answer (in dollars): 42", "42"),
    ("Answer in minutes: 42", "42"),
    ("| Answer | 42 |", "42"),
    ('{"reasoning": "6 * 7", "answer": 42}', "42"),
    ('{"answer": "42"}', "42"),
    ("<answer>42</answer>", "42"),
    ("<answer>\n42 eggs\n</answer>", "42"),
    ("<answer> The total is $42 </answer>", "42"),
    ("答案：42", "42"),
    ("最终答案：42", "42"),
    ("答案是 42。", "42"),
    ("Antwort: 42", "42"),
    ("Respuesta: 42", "42"),
    ("Réponse : 42", "42"),
    ("Ответ: 42", "42"),
    ("الإجابة: ٤٢", "42"),
    ("#### 42", "42"),
    ("####42", "42"),
    ("so #### 42", "42"),
    ("#### **42**", "42"),
    ("#### $42.00", "42"),
    ("#### 42 eggs in 7 baskets", "42"),
    ("#### \\boxed{42}", "42"),
    ("#### Step 1\n6 * 7 = 42\n#### 42", "42"),
    ("#### 1. Count the eggs\n6 * 7 = 42\n\nAnswer: 42", "42"),
    ("\\boxed{42}", "42"),
    ("\\boxed 42", "42"),
    ("\\fbox{42}", "42"),
    ("So it is $\\boxed{42}$ eggs.", "42"),
    ("\\boxed{\\text{42 eggs}}", "42"),
    ("\\boxed{42 \\text{ eggs}}", "42"),
    ("\\boxed{\\textbf{42}}", "42"),
    ("\\boxed{\\$42}", "42"),
    ("\\boxed{n = 42}", "42"),
    ("\\boxed{42", None),
    ("Answer:", None),
    ("Answer: ", None),
    ("Answer: [number]", None),
    ("Answer: [number]\nAnswer: 42", "42"),
    ("Answer: <your answer>\n\nAnswer: 42", "42"),
    ("Answer: ?", None),
    ("Answer: unknown", None),
    ("Answer: there is not enough information (see problem 42)", None),
    ("Answer: I cannot say, as step 42 is missing", None),
    ("The answer is not 42.", None),
    ("The answer isn't 42.", None),
    ("unanswered: 42", None),
    ("", None),
    ("I do not know.", None),
    ("…", None),
]

NUMBERS = [
    ("1,234", "1234"),
    ("1,234,567.50", "1234567.5"),
    ("$1,234.50", "1234.5"),
    ("12,34,567", "1234567"),
    ("12 500", "12500"),
    ("12\u00a0500", "12500"),
    ("12\u2009500", "12500"),
    ("12\u202f500", "12500"),
    ("1\u00a0234\u00a0567", "1234567"),
    ("12'500", "12500"),
    ("12’500.50", "12500.5"),
    ("1.234.567", "1234567"),
    ("1.234,50", "1234.5"),
    ("12_500", "12500"),
    ("1{,}800", "1800"),
    ("1\\,800", "1800"),
    ("1,\\!800", "1800"),
    ("$1{,}800$", "1800"),
    ("1,23", None),
    ("1,2345", None),
    ("0,5", "0.5"),
    ("€18,50", "18.5"),
    ("018", "18"),
    ("18.", "18"),
    ("18.0", "18"),
    ("18.50", "18.5"),
    (".5", "0.5"),
    ("0.50", "0.5"),
    ("-7", "-7"),
    ("−7", "-7"),
    ("–7", "-7"),
    ("-$7", "-7"),
    ("$-7", "-7"),
    ("($7)", "7"),
    ("(-7)", "-7"),
    ("minus 7", "-7"),
    ("negative seven", "-7"),
    ("+7", "7"),
    ("-0", "0"),
    ("１８", "18"),
    ("٣٦", "36"),
    ("۳۶", "36"),
    ("१८", "18"),
    ("٣٫٥", "3.5"),
    ("١٬٢٣٤", "1234"),
    ("1\u200b8", "18"),
    ("1/2", "0.5"),
    ("36/2", "18"),
    ("2/3", "2/3"),
    ("-1/2", "-0.5"),
    ("1 / 2", "0.5"),
    ("1⁄2", "0.5"),
    ("½", "0.5"),
    ("1½", "1.5"),
    ("1 ½", "1.5"),
    ("1 1/2", "1.5"),
    ("1-1/2", "1.5"),
    ("1 and 1/2", "1.5"),
    ("-1 1/2", "-1.5"),
    ("1 3/2", None),
    ("\\frac{3}{4}", "0.75"),
    ("$\\dfrac{3}{4}$", "0.75"),
    ("\\tfrac34", "0.75"),
    ("-\\frac{1}{2}", "-0.5"),
    ("1\\frac{1}{2}", "1.5"),
    ("$2\\frac{1}{3}$", "7/3"),
    ("\\frac{3 \\times 6}{2}", "9"),
    ("\\frac{1,800}{2}", "900"),
    ("12/05/2024", None),
    ("1e3", "1000"),
    ("1.5E3", "1500"),
    ("2e-3", "0.002"),
    ("2 × 10^3", "2000"),
    ("2 \\times 10^{3}", "2000"),
    ("2·10³", "2000"),
    ("2^3", "8"),
    ("2**3", "8"),
    ("2³", "8"),
    ("3 * 6", "18"),
    ("3 × 6", "18"),
    ("$2 million", "2000000"),
    ("2.5 million dollars", "2500000"),
    ("$2M", "2000000"),
    ("$1.5bn", "1500000000"),
    ("1.5k", "1500"),
    ("15K", "15000"),
    ("3 thousand", "3000"),
    ("5 hundred", "500"),
    ("2 million 500 thousand", "2500000"),
    ("3 dozen", "3 dozen"),
    ("18 km", "18"),
    ("18km", "18"),
    ("18m", "18"),
    ("18 m²", "18"),
    ("18 m^2", "18"),
    ("18°", "18"),
    ("18^\\circ", "18"),
    ("18 °C", "18"),
    ("18th", "18"),
    ("18 USD", "18"),
    ("USD 18", "18"),
    ("US$18", "18"),
    ("Rs. 18", "18"),
    ("€18", "18"),
    ("18€", "18"),
    ("£18.50", "18.5"),
    ("1800$", "1800"),
    ("\\$18", "18"),
    ("18%", "18%"),
    ("18 %", "18%"),
    ("18\\%", "18%"),
    ("18 percent", "18%"),
    ("$5/hour", "5"),
    ("1,800/month", "1800"),
    ("5 per day", "5"),
    ("18 apples in 3 bags", "18"),
    ("18 apples (6 in each of 3 bags)", "18"),
    ("18 out of 20", "18"),
    ("18!", "18"),
    ("18?", "18"),
    ("about 18", "18"),
    ("approximately $18", "18"),
    ("≈ 18", "18"),
    ("~18", "18"),
    ("exactly 18 apples", "18"),
    ("at least 18", "18"),
    ("[18]", "18"),
    ("{18}", "18"),
    ("'18'", "18"),
    ('"18 apples"', "18"),
    ("<b>18</b>", "18"),
    ("(C) 18", "18"),
    ("B. 18", "18"),
    ("~~17~~ 18", "18"),
    ("eighteen", "18"),
    ("Eighteen apples", "18"),
    ("eighteen (18)", "18"),
    ("18 (eighteen)", "18"),
    ("twenty-five", "25"),
    ("one hundred and five", "105"),
    ("two thousand three hundred", "2300"),
    ("two and a half", "2.5"),
    ("three quarters", "0.75"),
    ("a dozen", "12"),
    ("zero", "0"),
    ("Each one gets eighteen.", "18"),
    ("x = 18", "18"),
    ("$x = 18$", "18"),
    ("= 18", "18"),
    ("18 = 3 * 6", "18"),
    ("3 * 6 = 18", "18"),
    ("3*6=18 apples", "18"),
    ("3 \\times 6 = 18", "18"),
    ("20 - 2 = 18", "18"),
    ("20 - 2", "18"),
    ("2 * 3 = 6, 6 * 3 = 18", "18"),
    ("9 * 2 = $18 every day", "18"),
    ("Total = $18", "18"),
    ("18.333 ≈ 18.33", "18.33"),
    ("36/2 = 18", "18"),
    ("18 = 18", "18"),
    ("18, because 3 * 6 = 18.", "18"),
    ("18, since there are 3 bags of 6", "18"),
    ("18. (3 bags of 6 make 18.)", "18"),
    ("Tom has 3 bags of 6, so 18 apples.", "18"),
    ("Tom has 3 bags. So he has 18 apples.", "18"),
    ("In 3 days she picks 18 apples.", "18"),
    ("The total cost of 3 shirts is $18.", "18"),
    ("She makes a total of 18 dollars in 3 days", "18"),
    ("Tom has 18 apples.", "18"),
    ("18 apples, not 20", "18"),
    ("18 rather than 20", "18"),
    ("2 hours 30 minutes", "2 hours 30 minutes"),
    ("2 hours and 30 minutes", "2 hours 30 minutes"),
    ("2h30m", "2 hours 30 minutes"),
    ("5 dollars and 50 cents", "5 dollars 50 cents"),
    ("5 feet, 6 inches", "5 feet 6 inches"),
    ("550 cents", "550 cents"),
    ("50¢", "50 cents"),
    ("90 minutes", "90"),
    ("each of the 3 kids gets 18 apples", "18"),
    ("After 3 weeks he will have $18.", "18"),
    ("3 bags of 6 is 18", "18"),
    ("18 km/h", "18"),
    ("6 ft 2 in", "6 feet 2 inches"),
    ("2 kg 500 g", "2 kilograms 500 grams"),
    ("18 mil", "18000000"),
    ("5 hours and a half", "5.5"),
    ("18.4, rounded to 18", "18"),
    ("75% of 24 = 18", "18"),
    ("− 18", "-18"),
    ("18,-", "18"),
    ("```18```", "18"),
    ("18&nbsp;apples", "18"),
    ("[18](http://x.org/20)", "18"),
    ("18 ✅", "18"),
    ("1️⃣8️⃣", "18"),
    ("1e400", None),
    # More than one reading:
    ("75% of 24", None),
    ("3/4 of 24", None),
    ("24 * 75%", None),
    ("half of 36", None),
    ("18 divided by 2", None),
    ("18--20", None),
    ("18 K", None),
    ("0.\\overline{3}", None),
    ("3(6)", None),
    ("Let x = 3. Then 6x = 18.", None),
    ("probably 18, but could be 20", None),
    ("18-20", None),
    ("18–20", None),
    ("18 - 20", None),
    ("18 to 20", None),
    ("18 to 20 apples", None),
    ("$18-$20", None),
    ("between 18 and 20", None),
    ("from 18 to 20", None),
    ("18 or 20", None),
    ("18 (or 20)", None),
    ("either 18 or 20", None),
    ("18 and 20", None),
    ("18, 20", None),
    ("18,20", None),
    ("18; 20", None),
    ("3, 6", None),
    ("3, 6, and 9", None),
    ("18 apples and 20 pears", None),
    ("18 apples, 20 pears", None),
    ("x = 3, y = 6", None),
    ("x = 3 or x = 6", None),
    ("12 = 18", None),
    ("±3", None),
    ("x > 18", None),
    ("more than 18", None),
    ("18:30", None),
    ("3:1", None),
    ("18 + x", None),
    ("3x", None),
    ("18\\sqrt{2}", None),
    ("18π", None),
    ("2 hours 30", None),
    ("18 apples 3 bags", None),
    ("9^9^9", None),
    ("3 * 6 =", None),
    ("1/0", None),
    ("XDY2K", None),
]
"""What stands after `Answer:`, and what is to be read."""

WHICH_COUNTS = [
    # The reasoning is no answer.
    ("<think>Answer: 12</think>\nAnswer: 18", "18"),
    ("Maybe 12. Answer: 12\n</think>\n\nAnswer: 18", "18"),
    ("<think>\nThe answer is 18\n</think>", None),
    ("<think>\nAnswer: 18\nbut wait", None),
    ("<think>a</think>Answer: 12<think>b</think>Answer: 18", "18"),
    ("<thinking>Answer: 12</thinking>18", "18"),
    ("[THINK]Answer: 12[/THINK]Answer: 18", "18"),
    ("<|channel|>analysis<|message|>Answer: 12<|end|><|start|>assistant<|channel|>final<|message|>Answer: 18", "18"),
    ("Answer: 18\n<think>or is it 12", "18"),
    # A new problem and its answer.
    ("Answer: 18\n\nQuestion: What is 2 + 2?\nAnswer: 4", "18"),
    ("Answer: 18\n\nProblem: What is 2 + 2?\n2 + 2 = 4.\nAnswer: 4", "18"),
    ("Answer: 18\n\nProblem 2: What is 2 + 2?\nFinal Answer: 4", "18"),
    ("Answer: 18\n\n**Question:** What is 2 + 2?\n**Final Answer:** 4", "18"),
    ("Answer: 18\n\n### Problem 2\nWhat is 2 + 2?\n\\boxed{4}", "18"),
    ("3 * 6 = 18.\n\nQ: What is 2 + 2?\nA: The answer is 4.", "18"),
    ("The answer is 18.\n\nQ: What is 2 + 2?\nA: 2 + 2 = 4. The answer is 4.", "18"),
    ("#### 18\n\nQuestion: What is 2 + 2?\n#### 4", "18"),
    ("18\n\nQuestion: What is 2 + 2?\nAnswer: 4", "18"),
    ("Answer: 18\nHuman: and 2 + 2?\nAssistant: Answer: 4", "18"),
    ("Answer: 18\nUser: and 2 + 2?\nFinal answer: 4", "18"),
    ("Answer: 18<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\nFinal answer: 4", "18"),
    ("Answer: 18</s>[INST] 2 + 2? [/INST] Final answer: 4", "18"),
    ("Answer: 18<|eot_id|>Final answer: 4", "18"),
    ("Answer: 18<|endoftext|>Final answer: 4", "18"),
    ("Answer: 18\n### Instruction:\n2 + 2?\n### Response:\nFinal answer: 4", "18"),
    ("Answer: 18\n\nExample 2: What is 2 + 2?\nFinal answer: 4", "18"),
    ("Answer: 18\n\nNow let's try.\nNext problem: 2 + 2?\nFinal answer: 4", "18"),
    ("Answer: 18\n\nLet's try another problem. What is 2 + 2? Final answer: 4", "18"),
    ("Answer: 18\n问题：2 + 2?\n最终答案：4", "18"),
    ("Answer: 18 Question: What is 2 + 2? Answer: 4", "18"),
    ("Answer: 18\n\n2. What is 2 + 2?\nFinal Answer: 4", "18"),
    ("Answer: 18\n\nJohn has 4 apples. How many are left?\n\nFinal Answer: 4", "18"),
    ("Answer: 18\n\nYou are an AI assistant. Here is a task.\nFinal Answer: 4", "18"),
    ("I am not sure. So it is open.\n\nQuestion: What is 2 + 2?\nAnswer: 4", None),
    ("Problem: Tom has 3 bags of 6.\nSolution: 3 * 6 = 18\nAnswer: 18", "18"),
    ("Question: How many?\n\nAnswer: 18", "18"),
    ("Let's restate it.\nQuestion: how many are 3 bags of 6?\nAnswer: 18", "18"),
    # The first counts.
    ("Answer: 18\n\nTom has 2 more. 18 + 2 = 20.\n\nAnswer: 20", "18"),
    ("Answer: 18\n\nAnswer: 20", "18"),
    ("#### 18\n#### 4", "18"),
    ("\\boxed{18}. Each bag holds \\boxed{6}.", "18"),
    ("Answer: 18\nAnswer: 18", "18"),
    # The stronger mark counts.
    ("The answer to the first part is 3.\n\nFinal answer: 18", "18"),
    ("Step 1 answer: 3\nFinal Answer: 18", "18"),
    ("The intermediate answer is 3.\nAnswer: 18", "18"),
    ("Each bag holds \\boxed{6}.\n\n**Final Answer:** \\boxed{18}", "18"),
    ("Answer: Let's think step by step.\nShe has 3 bags of 6.\n3 * 6 = 18\n#### 18", "18"),
    ("Answer: She has 3 bags.\nEach holds 6 apples.\n3 * 6 = 18.", "18"),
    ("Answer:\nShe has 3 bags.\n3 * 6 = 18.\nSo she has 18 apples.", "18"),
    ("Answer 1: 3\nAnswer 2: 6\nFinal answer: 18", "18"),
    # The block corrects itself.
    ("Answer: 12? No, 18.", "18"),
    ("Answer: 12. Wait, 3 * 6 = 18.", "18"),
    ("Answer: 12, no wait, 18", "18"),
    ("Answer: 12... actually 18", "18"),
    ("Answer: 12\nWait.\nAnswer: 18", "18"),
    ("Answer: 12\nSorry, I made a mistake.\nAnswer: 18", "18"),
    ("Answer: 12\n\nWait, that is wrong: 3 * 6 = 18.\n\nAnswer: 18", "18"),
    ("The answer is 12. Hold on, I forgot a bag. The answer is 18.", "18"),
    ("Answer: 12? no", None),
    ("Answer: 12. That is wrong.", None),
    ("Answer: actually 18", "18"),
    ("Answer: 18 (no tax)", "18"),
    ("Answer: 18 minutes of wait", "18"),
    ("Answer: 18\n\nLet me verify: 18 / 6 = 3. Correct.", "18"),
    ("Answer: 18 or 20\nAnswer: 18", "18"),
    ("Answer: 18\nExplanation: wait times are 3 minutes.", "18"),
    ("Answer: 18\nRecheck: 18 / 6 = 3. Good.", "18"),
    ("Answer: 20\n\nActually, the answer is 18.", "18"),
    ("Answer: 20\n\nLet me re-check: 3 * 6 = 18. The answer is 18.", "18"),
    ("Answer: 20 (I made a mistake, it should be 18)", "18"),
    ("The answer is 18 and the answer is 20", None),
    ("Answer: - 18", None),
    ("Answer:\n- 18", "18"),
    # No mark, and one reading.
    ("18", "18"),
    ("**18**", "18"),
    ("18 apples", "18"),
    ("She has 18 apples.", "18"),
    ("3 * 6 = 18", "18"),
    ("She has 3 bags of 6.\nSo 18 apples. I counted 2 times.", "18"),
    ("First 16 - 3 = 13.\nThen 13 + 5 = 18.", "18"),
    ("She has 3 bags of 6.\n\n18", "18"),
    ("She sells 16 - 3 - 4 = 9 eggs a day.\nShe makes 9 * 2 = $18 every day.", "18"),
    # No mark, and no or several readings.
    ("She has 3 bags of 6", None),
    ("She has 18 apples and 20 pears.", None),
    ("She has 3 bags. Each bag holds 6 apples. I need to", None),
    ("3 * 6 = 18, then she", None),
]


def ways(cases: list[tuple[str, str | None]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("text", "answer"), cases)


@ways(LABELS + WHICH_COUNTS)
def test_which_part_is_the_answer(text: str, answer: str | None) -> None:
    assert read_answer(text) == answer


@ways(NUMBERS)
def test_a_quantity_is_read_whole_or_not_at_all(text: str, answer: str | None) -> None:
    assert read_answer(f"Three bags of six.\nAnswer: {text}") == answer
    assert read_answer(f"**Final Answer:**\n{text}") == answer


STYLES = [
    "Answer: {}", "**Answer:** {}", "**Final Answer:** {}", "### Final Answer\n\n{}", "The answer is {}.", "So it is {}.\nAnswer: {}",
    "#### {}", "<answer>{}</answer>", "\\boxed{{{}}}", "Answer: $\\boxed{{{}}}$", "Answer: ${}$", "Answer: \\({}\\)", "Answer: {} eggs",
    "Answer: [{}]", "<think>Answer: 0</think>\nAnswer: {}", "Answer: {}\n\nQuestion: 1 + 1?\nAnswer: 2", "Answer: x = {}", "Answer: **{}**",
    "Answer: \\text{{{}}}", "{}", "Answer: {}<|im_end|>", '{{"answer": "{}"}}', "Answer: about {}", "最终答案：{}",
]  # fmt: skip


def spelled(value: Decimal) -> list[str]:
    """Spellings of a number that leave no doubt."""
    plain = f"{value:f}"
    grouped = f"{value:,f}"
    spellings = [plain, plain.replace("-", "\u2212"), grouped, grouped.replace(",", "{,}"), grouped.replace(",", "'")]
    spellings += [grouped.replace(",", space) for space in ("\u00a0", "\u2009", "\u202f", "\\,")]
    spellings += [
        f"-${plain[1:]}" if value < 0 else f"${plain}",
        plain.translate({48 + n: 0xFF10 + n for n in range(10)}),
    ]
    spellings += [plain.translate({48 + n: 0x0660 + n for n in range(10)})]
    over, under = abs(value).as_integer_ratio()
    spellings += [f"{'-' * (value < 0)}{over}/{under}", f"{'-' * (value < 0)}\\frac{{{over}}}{{{under}}}"]
    return spellings


@settings(deadline=None)
@given(st.decimals(-(10**9), 10**9, places=2), st.sampled_from(STYLES), st.randoms(use_true_random=False))
def test_a_number_in_any_style_reads_back(number: Decimal, style: str, choose: random.Random) -> None:
    number = number if number else Decimal("0.00")
    for spelling in choose.sample(spelled(number), 4):
        text = style.replace("{}", spelling).replace("{{", "{").replace("}}", "}")
        found = read_answer(text)
        assert found is not None, text
        assert same_quantity(found, str(number)), (text, found)
        assert not same_quantity(found, str(number + 1)), (text, found)


@settings(deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("0123456789.,$-−–#\\{}[]()<>|*/^=%: \nAnswer"))))
def test_no_text_breaks_the_reading_and_what_is_read_reads_back(text: str) -> None:
    for written in (text, f"Answer: {text}", f"\\boxed{{{text}}}", f"#### {text}"):
        found = read_answer(written)
        assert found is None or same_quantity(found, found), (written, found)


@settings(deadline=None)
@given(st.fractions(max_denominator=10**6))
def test_values_are_spelled_in_one_way(value: Fraction) -> None:
    assert Fraction(canonical(value)) == value
    assert same_quantity(f"{value.numerator * 3}/{value.denominator * 3}", canonical(value))


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("18", "18.0", True), ("18", "1,8", False), ("1234", "1,234", True), ("0.5", "1/2", True), ("1/3", "0.333", False),
        ("0.1000000000000000000000000000000001", "0.1", False), ("12345678901234567891", "12345678901234567890", False),
        ("50%", "50", True), ("50%", "0.5", True), ("0.5", "50", False), ("0.5", "50%", True), ("50%", "5", False),
        ("550 cents", "550", True), ("550 cents", "5.5", True), ("5.5", "550", False), ("3 dozen", "36", True), ("3 dozen", "3", True),
        ("2 hours 30 minutes", "150", True), ("2 hours 30 minutes", "2.5", True), ("2 hours 30 minutes", "2", False),
        ("5 dollars 50 cents", "5.5", True), ("5 dollars 50 cents", "5", False), ("18", "$18.00", True), ("18", "18 apples", True),
        ("18", "blue", False), ("18", "", False),
    ],
)  # fmt: skip
def test_values_are_compared_exactly(answer: str, gold: str, same: bool) -> None:
    assert same_quantity(answer, gold) is same


PIECES = [
    "Answer: ", "Answer: 18\n", "Answer: [number]\n", "answer is ", "#### ", "#### 1\n", "\\boxed{", "\\boxed{1}", "{", "(", "1 + ", "1,", "1 000 ", "1/2 ",
    "so 18, ", "so ", "\\frac{1}{2}", "\\frac", "<think>", "</think>", "Question: ", "\n", "\n\n", " ", "**", "- ", "wait, no, ", "Wait.\nAnswer: 1\n",
    "2 hours 30 minutes ", "two hundred and ", "= ", "x = 3, ", "٣", "½", "$", "<answer>", "How many?\n\n", "7", "~~", "\\text{", "e9", ". ", "^2", "¢5",
]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_time_is_linear(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    for written in (text, "Answer: " + text, text + "\nAnswer: 18", "Answer: 18\n" + text):
        started = time.process_time()
        read_answer(written)
        assert time.process_time() - started < 2
