"""From options to typed settings: what no data set is needed for."""

import pytest

from feats.errors import UsageError
from modeling.command_line.training import parse_class_weights


@pytest.mark.parametrize(
    "spec, match",
    [
        ("neutral=2", "class weights 'neutral=2': 'neutral' is no class .there are a, b, c.; expected none, balanced"),
        ("balance", "'balance' is no class"),
        ("a=two", "'two' of a is no number"),
        ("a=1,b=0", "every weight must be a finite number above 0"),
        ("a=-1", "finite number above 0"),
        ("a=nan", "finite number above 0"),
        ("a=inf", "finite number above 0"),
        ("", "'' is no class"),
    ],
)
def test_class_weights_that_make_no_sense(spec: str, match: str):
    with pytest.raises(UsageError, match=match):
        parse_class_weights(spec, ["a", "b", "c"])


def test_class_weights_of_names_with_commas_and_equals_signs():
    classes = ["a", "a=1,b", "c, d"]
    assert parse_class_weights("c, d=2,a=1,b=3", classes) == {"c, d": 2, "a=1,b": 3}
    assert parse_class_weights("a=1.5,c, d=2", classes) == {"a": 1.5, "c, d": 2}
    with pytest.raises(UsageError, match="'d' is no class"):
        parse_class_weights("c, d=2,d=3", classes)
