import pytest

from instructdiffusion_pipeline.tasks.wording import join_words, with_a, with_the


@pytest.mark.parametrize("name", ["the cat", "His hat", "two cats", "some people", "him", "everything blue", "no one"])
def test_names_with_a_determiner_get_no_article(name):
    assert with_the(name) == name


def test_articles():
    assert with_the("cat") == "the cat"
    assert with_a("red disc") == "a red disc" and with_a("orange one") == "an orange one"
    assert with_a("unicorn") == "a unicorn" and with_a("hourglass") == "an hourglass"
    assert with_a("umbrella") == "an umbrella" and with_a("house") == "a house"


def test_lists():
    assert [join_words(list("abc")[:count]) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
