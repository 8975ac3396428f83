"""Articles and lists for the instructions of all tasks."""

from collections.abc import Sequence

DETERMINERS = {
    "the", "a", "an", "this", "that", "these", "those", "his", "her", "its", "their", "my", "your", "our", "both",
    "all", "every", "each", "one", "two", "three", "four", "five", "six", "several", "many", "some", "any", "no",
    "another", "either", "neither", "half", "most", "what", "whatever", "whichever",
}  # fmt: skip
PRONOUNS = {
    "he", "she", "it", "they", "him", "them", "i", "we", "us", "you", "who", "whoever", "someone", "anyone",
    "everyone", "something", "anything", "everything", "nothing", "nobody",
}  # fmt: skip
MISLEADING = ("hour", "ufo", "unicorn")  # words of which the first letter or the first sound is a vowel, but not both


def with_the(name: str) -> str:
    """`name` with "the" before it, unless it is a pronoun or starts with a determiner."""
    return name if name.split(maxsplit=1)[0].lower() in DETERMINERS | PRONOUNS else f"the {name}"


def with_a(phrase: str) -> str:
    """`phrase` with "a" or "an"."""
    is_vowel = phrase[0].lower() in "aeiou"
    if phrase.lower().startswith(MISLEADING):
        is_vowel = not is_vowel
    return f"an {phrase}" if is_vowel else f"a {phrase}"


def join_words(words: Sequence[str]) -> str:
    """ "a", "a and b" or "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
