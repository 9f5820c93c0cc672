import pytest
from jinja2 import UndefinedError

from dynaroute.errors import DynarouteError
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.pages import ENVIRONMENT


def render(text: str, **values) -> str:
    return ENVIRONMENT.from_string(text).render(values)


@pytest.mark.parametrize("name", ENVIRONMENT.list_templates())
def test_every_template_compiles(name):
    ENVIRONMENT.get_template(name)


def test_a_value_that_was_not_passed_is_an_error():
    with pytest.raises(UndefinedError, match="loss"):
        render("Loss: {{ loss }}.")


def test_a_key_that_a_file_lacks_names_the_file():
    with pytest.raises(DynarouteError, match=r"^a\.json: lacks 'loss'"):
        render("Loss: {{ training.loss }}.", training=Record({}, "a.json"))


def test_a_sentence_that_does_not_apply_leaves_no_blank_line():
    assert render("One.\n{% if no %}\nTwo.\n{% endif %}\nThree.\n", no=False) == "One.\nThree.\n"


def test_numbers_are_formatted_in_the_template():
    text = "{{ 3.14159 | fmt('.2f') }}, {{ 2048 | fmt }}, {{ none | fmt }}, {{ 2048 | size }}, {{ 1 | count('run') }}"
    assert render(text) == "3.14, 2,048, –, 2.00 KiB, 1 run"


def test_a_block_of_a_template_is_quoted_as_published():
    text = "{% filter published %}\nOne.\n\n| a |\n{% endfilter %}\n"
    assert render(text).splitlines() == ["> **Published.** One.", ">", "> | a |"]
