import pytest

from instructdiffusion_pipeline.tasks.wording import is_plural, listing, the


@pytest.mark.parametrize(
    "name", ["cats", "two men on the left", "both dogs", "people", "cat and dog", "wine glasses", "buses"]
)
def test_plural(name):
    assert is_plural(name)


@pytest.mark.parametrize(
    "name",
    ["cat", "bus", "the man with glasses", "grass", "a glass of drinks", "person holding skis", "cactus", "纯红"],
)
def test_singular(name):
    assert not is_plural(name)


@pytest.mark.parametrize(
    "name, phrase", [("cat", "the cat"), ("the cat", "the cat"), ("His hat", "His hat"), ("two cats", "two cats")]
)
def test_the_article_is_not_doubled(name, phrase):
    assert the(name) == phrase


def test_lists():
    assert [listing(list("abc")[:count]) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
