import pytest

from instructdiffusion_pipeline.tasks.wording import a, is_plural, listing, the


@pytest.mark.parametrize(
    "name",
    [
        "cats", "two men on the left", "both dogs", "people", "cat and dog", "wine glasses", "buses", "skis",
        "the man and the woman", "the girls carrying a bag", "them", "several dogs", "zebras w stripes",
        "police", "the cattle on the left",
    ],
)  # fmt: skip
def test_plural(name):
    assert is_plural(name)


@pytest.mark.parametrize(
    "name",
    [
        "cat", "bus", "the man with glasses", "grass", "a glass of drinks", "person holding skis", "cactus", "纯红",
        "?", "black and white cat", "salt and pepper shaker", "the girl carrying bags", "man playing frisbees", "him",
        "guy w glasses", "canvas", "news",
    ],
)  # fmt: skip
def test_singular(name):
    assert not is_plural(name)


@pytest.mark.parametrize("name", ["the cat", "His hat", "two cats", "some people", "him", "everything blue", "no one"])
def test_a_determiner_is_not_doubled(name):
    assert the(name) == name


def test_articles():
    assert the("cat") == "the cat" and a("red disc") == "a red disc" and a("orange one") == "an orange one"


def test_lists():
    assert [listing(list("abc")[:count]) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
