from fractions import Fraction

import pytest

from lora_one.tasks.answers import flexible_answer, official_answer, strict_answer
from lora_one.tasks.numerals import format_number, parse_number

# reply, strict, flexible, official; a dash means that nothing is read
CASES = """
    #### 18                                          | 18      | 18      | 18
    ####18                                           | 18      | 18      | 18
    ####\\n18                                        | 18      | 18      | 18
    2 + 3 = 5\\n#### 5                               | 5       | 5       | 5
    #### 18.                                         | 18      | 18      | 18
    #### 18.0                                        | 18      | 18      | 18
    #### 18.50                                       | 18.5    | 18.5    | 18
    #### .5                                          | 0.5     | 0.5     | -
    #### 0                                           | 0       | 0       | 0
    #### 007                                         | 7       | 7       | 7
    #### 1,234                                       | 1234    | 1234    | 1
    #### 1,234,567.25                                | 1234567.25 | 1234567.25 | 1
    #### 1234,567                                    | -       | -       | 1234
    #### 1,23                                        | -       | -       | 1
    #### 12,34,567                                   | -       | -       | 12
    #### 3, 4 and 5                                  | 3       | 3       | 3
    #### 1.2.3                                       | -       | -       | 1
    #### 10:30                                       | -       | -       | 10
    #### 1e3                                         | 1000    | 1000    | 1
    #### 1.5e-3                                      | 0.0015  | 0.0015  | 1
    #### 1e999                                       | -       | -       | 1
    #### 1.5 x 10^3                                  | 1500    | 1500    | 1
    #### 2 \\times 10^{4} miles                    | 20000   | 20000   | 2
    #### 10^3                                        | -       | 3       | 10
    #### 2.5 million                                 | 2.5     | 2.5     | 2
    #### 1 234                                       | 1234    | 1234    | 1
    #### 1 234 567.5                                 | 1234567.5 | 1234567.5 | 1
    #### 1\u00a0234                                 | 1234    | 1234    | 1
    #### 1\u202f234,5                               | -       | -       | 1
    #### 1{,}234                                     | 1234    | 1234    | 1
    #### 1\\,234                                   | 1234    | 1234    | 1
    #### 18 20                                       | 18      | 18      | 18
    #### -5                                          | -5      | -5      | -
    #### - 5                                         | -5      | -5      | -
    #### +5                                          | 5       | 5       | -
    #### \u22125                                     | -5      | -5      | -
    #### --5                                         | -       | -5      | -
    #### \uff0d5                                    | -5      | -5      | -
    #### \u20135                                    | -5      | -5      | -
    #### \u2014 5                                   | -       | 5       | -
    #### +$5                                         | 5       | 5       | -
    #### (-5)                                        | -5      | -5      | -
    #### -0                                          | 0       | 0       | -
    #### $18                                         | 18      | 18      | -
    #### $ 18                                        | 18      | 18      | -
    #### -$5                                         | -5      | -5      | -
    #### $-5                                         | -5      | -5      | -
    #### \u20ac7.50                                  | 7.5     | 7.5     | -
    #### USD 18                                      | 18      | 18      | -
    #### US$18                                       | 18      | 18      | -
    #### 18 USD                                      | 18      | 18      | 18
    #### Rs. 500                                     | 500     | 500     | -
    #### 7,50 \u20ac                                | -       | -       | 7
    #### $18.                                        | 18      | 18      | -
    #### $1,234.5                                    | 1234.5  | 1234.5  | -
    #### 5\u00a2                                    | 5       | 5       | 5
    #### \u00a31,000                                 | 1000    | 1000    | -
    #### 20%                                         | 20      | 20      | 20
    #### 20 %                                        | 20      | 20      | 20
    #### 20\\%                                     | 20      | 20      | 20
    #### 0.5%                                        | 0.5     | 0.5     | 0
    #### -12.5 percent                               | -12.5   | -12.5   | -
    #### 18 eggs                                     | 18      | 18      | 18
    #### 18km/h                                      | 18      | 18      | 18
    #### 18/hour                                     | 18      | 18      | 18
    #### 1/2                                         | 0.5     | 0.5     | 1
    #### 1/3                                         | 1/3     | 1/3     | 1
    #### 1 1/2                                       | 1.5     | 1.5     | 1
    #### 1/0                                         | -       | -       | 1
    #### -3/4                                        | -0.75   | -0.75   | -
    #### \u00bd                                     | 0.5     | 0.5     | -
    #### 3\u00bd hours                              | 3.5     | 3.5     | 3
    #### 3 \u00be                                   | 3.75    | 3.75    | 3
    #### \\frac{1}{2}                              | 0.5     | 0.5     | -
    #### -\\frac{3}{4}                             | -0.75   | -0.75   | -
    #### 1\\frac{1}{2}                             | 1.5     | 1.5     | 1
    #### $\\dfrac{22}{7}$                          | 22/7    | 22/7    | -
    so 2 and \\frac{1}{4}                          | -       | 0.25    | -
    #### 3:1                                         | -       | -       | 3
    #### 2 to 1                                      | 2       | 2       | 2
    #### 1/2/2020                                    | -       | -       | 1
    #### **18**                                      | 18      | 18      | -
    #### \\$\\\\boxed{18}$                           | 18      | 18      | -
    #### about 18                                    | -       | 18      | -
    #### ~18                                         | 18      | 18      | -
    #### x = 18                                      | 18      | 18      | -
    #### 10 + 5 = 15                                 | 15      | 15      | 10
    #### 10+5=15 eggs                                | 15      | 15      | 10
    #### $20 - $5 = $15                              | 15      | 15      | -
    #### 3 x 6 = 2 x 9 = 18                          | 18      | 18      | 3
    #### 10 + 5                                      | -       | 5       | 10
    #### 3 x 6                                       | -       | 6       | 3
    #### 3 \\times 6                               | -       | 6       | 3
    #### 2^3                                         | -       | 3       | 2
    #### 5-10                                        | -       | 10      | 5
    #### 5\u201310                                  | -       | 10      | 5
    #### 18 - that is 18 eggs                        | 18      | 18      | 18
    #### 18 (9 x 2 = 18)                             | 18      | 18      | 18
    #### = 18                                        | 18      | 18      | -
    #### A: 18                                       | -       | 18      | -
    #### 18\\n- 3 were left                          | 18      | 18      | 18
    #### 18#### 20                                   | 20      | 20      | 18
    #### 18\\n#### 18\\n#### 18                      | 18      | 18      | 18
    ###18                                            | -       | 18      | -
    ##### 18                                         | 18      | 18      | 18
    ####                                             | -       | -       | -
    7 apples ####                                    | -       | 7       | -
    #### 5\\n#### 7                                  | 7       | 7       | 5
    #### 5\\n####                                    | -       | 5       | 5
    #### 5\\nQ: More?\\nA: #### 7                    | 5       | 5       | 5
    no answer\\nQ: More?\\nA: #### 7                 | -       | -       | -
    #### 5\\nThe answer is: 7                        | 5       | 5       | 5
    The answer is: 7                                 | 7       | 7       | -
    The answer is 18. Check: 18 / 2 = 9              | 18      | 18      | -
    The answer is\u20145                            | -       | 5       | -
    The answer is 5 - 3 = 2 dollars                  | 2       | 2       | -
    The final answer is 7                            | -       | 7       | -
    THE ANSWER IS 7!                                 | 7       | 7       | -
    the answer is 7.                                 | 7       | 7       | -
    The answer is 5. No, the answer is -6            | -6      | -6      | -
    **The answer is:** $1,050.00                     | 1050    | 1050    | -
    The answer is: $\\\\boxed{18}$                   | 18      | 18      | -
    The answer is x = 18                             | 18      | 18      | -
    She earns $18 a day.                             | -       | 18      | -
    10 - 5                                           | -       | 5       | -
    10 -5                                            | -       | 5       | -
    (3+4)-5                                          | -       | 5       | -
    it fell to -5                                    | -       | -5      | -
    it fell to -$5.                                  | -       | -5      | -
    $5-$3                                            | -       | 3       | -
    20/5=4                                           | -       | 4       | -
    and so on...18                                   | -       | 18      | -
    3 boxes in week2                                 | -       | 3       | -
    7 or 1,23                                        | -       | -       | -
    eighteen                                         | -       | -       | -
"""


def _cases():
    for line in CASES.strip().splitlines():
        reply, *wanted = (part.strip() for part in line.rsplit("|", 3))
        reply = reply.replace("\\n", "\n").replace("\\$", "$").replace("\\\\", "\\")
        yield pytest.param(reply, *(None if text == "-" else text for text in wanted), id=reply)
    yield pytest.param("", None, None, None, id="empty")
    yield pytest.param("#### " + "9" * 5000, None, None, None, id="5000 digits")


def _shown(value):
    return None if value is None else format_number(value)


@pytest.mark.parametrize(("reply", "strict", "flexible", "official"), _cases())
def test_reading(reply, strict, flexible, official):
    assert _shown(strict_answer(reply)) == strict
    assert _shown(flexible_answer(reply)) == flexible
    assert _shown(official_answer(reply)) == official


def test_the_table_has_enough_cases():
    assert len(list(_cases())) >= 120


def test_numbers_compare_exactly_and_not_as_floats():
    assert strict_answer("#### 18.0") == strict_answer("#### 18") == 18
    assert strict_answer("\u0130\u0130 the answer is 12") == 12  # longer in lower case
    assert parse_number("0.1") + parse_number("0.2") == parse_number("0.3")
    assert strict_answer("#### 10000000000000001") != strict_answer("#### 10000000000000000")
    assert strict_answer("#### 1/3") == Fraction(1, 3)
    assert strict_answer("#### 0.3333333333333333") != Fraction(1, 3)


@pytest.mark.parametrize(
    "text", ["0", "12", "0.5", "0.0625", "1/3", "22/7", "100000000000000000000"]
)
def test_writing_and_reading_a_number_are_inverse(text):
    assert format_number(parse_number(text)) == text
