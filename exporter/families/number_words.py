"""Numbers in English words, as SmolVLM2's prompts spell a film's number of frames (num2words)."""

from typing import Final

_SMALL: Final = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS: Final = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number_words(number: int) -> str:
    """Returns `number` as num2words spells it: "one hundred and twenty-three". ValueError outside 0..999 999."""
    if not 0 <= number < 10**6:
        raise ValueError(f"{number} has no words here")
    if number < 20:
        return _SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_SMALL[ones]}" if ones else "")
    unit, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    many, rest = divmod(number, unit)
    # "and" goes before the last two digits; a thousand and hundreds are listed.
    link = " and " if rest < 100 else ", "
    return f"{number_words(many)} {name}" + (link + number_words(rest) if rest else "")
