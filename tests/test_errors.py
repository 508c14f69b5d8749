"""Values are validated by their type hints; messages about wrong values and unknown names."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from fusedet.config import validate_value
from fusedet.errors import InputError, format_count, make_unknown_error, shorten_list


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (None, float | None, None),
        (2, float | None, 2.0),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ([1, 2], tuple[int, int], (1, 2)),
        ([1, 2], tuple[int, int] | None, (1, 2)),
        ([0.5], Sequence[float], (0.5,)),
        (["a"], list[str], ["a"]),
        ("b", Literal["a", "b"], "b"),
        ({"x": 1}, dict, {"x": 1}),
        ({"x": 1}, Mapping[str, float], {"x": 1.0}),
        ({"x": 1}, int | Mapping[str, int], {"x": 1}),
        (2, int | Mapping[str, int], 2),
        (object, Any, object),
    ],
)
def test_right_values(value: Any, hint: Any, result: Any) -> None:
    assert validate_value(value, hint, "key") == result
    assert type(validate_value(value, hint, "key")) is type(result)


LARGEST = 2**63 - 1


@pytest.mark.parametrize(
    ("value", "hint", "said"),
    [
        ("3", int, "key must be int, got '3'"),
        (True, int, "key must be int, got True"),
        (1.5, int, "key must be int, got 1.5"),
        (True, float, "key must be float, got True"),
        (1, bool, "key must be bool, got 1"),
        ("ab", tuple[str, ...], "key must be a list, such as [ab], got 'ab'"),
        (640, tuple[int, int], "key must be a list, such as [640, 640], got 640"),
        (640, tuple[int, int] | None, "key must be a list, such as [640, 640], got 640"),
        (1, Sequence[float], "key must be a list, such as [1], got 1"),
        ("ab", tuple[int, ...], "key must be a list [int, ...], got 'ab'"),
        ("1x2", tuple[int, int], "key must be a list [int, int], got '1x2'"),
        ([1], tuple[int, int], "key must have 2 items, got [1]"),
        ([], tuple[int], "key must have 1 item, got []"),
        (["x"], list[int], "key.0 must be int, got 'x'"),
        ("x", float | None, "key must be float, got 'x'"),
        (10**400, float, f"key must lie between {-LARGEST} and {LARGEST}, got an integer of 1329 bits"),
        pytest.param(
            -(10**5000),
            int | None,
            f"key must lie between {-LARGEST} and {LARGEST}, got an integer of 16610 bits",
            id="long",
        ),
        (
            [8, 2**63],
            tuple[float, ...] | None,
            f"key.1 must lie between {-LARGEST} and {LARGEST}, got an integer of 64 bits",
        ),
        ({1, 2}, tuple[int, int], "key must be a list [int, int], got {1, 2}"),
        ([1], dict, "key must be dict, got [1]"),
        ([1], dict[str, int], "key must be dict[str, int], got [1]"),
        ({"x": "y"}, Mapping[str, int], "key.x must be int, got 'y'"),
        ({"x": "y"}, int | Mapping[str, int], "key.x must be int, got 'y'"),
        ("x", int | Mapping[str, int], "key must be int | Mapping[str, int], got 'x'"),
    ],
)
def test_wrong_values(value: Any, hint: Any, said: str) -> None:
    with pytest.raises(InputError) as error:
        validate_value(value, hint, "key")
    assert str(error.value) == said


def test_literals_suggest_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'on_input'"):
        validate_value("on_inputs", Literal["max_pool", "on_input"], "model.pyramid.top")


def test_unknown_names() -> None:
    assert (
        str(make_unknown_error("neck", "fpm", ["fpn", "bfp"]))
        == "unknown neck 'fpm': did you mean 'fpn'? Known: bfp, fpn"
    )
    assert str(make_unknown_error("neck", "zzz", [])) == "unknown neck 'zzz'. Known: none"
    assert (
        str(make_unknown_error("key", "a", ["b"], meant=["x.a", "y.a"]))
        == "unknown key 'a': did you mean 'x.a' or 'y.a'? Known: b"
    )
    many = [f"name{i}" for i in range(99)]
    assert str(make_unknown_error("config", "name7", many[8:], lister="this")).endswith("(this lists them)")
    assert len(str(make_unknown_error("config", "name7", many[8:]))) < 120


@pytest.mark.parametrize(("thing", "two"), [("image", "2 images"), ("class", "2 classes"), ("box", "2 boxes")])
def test_plural(thing: str, two: str) -> None:
    assert (format_count(1, thing), format_count(2, thing), format_count(0, thing)) == (
        f"1 {thing}",
        two,
        two.replace("2", "0"),
    )


def test_a_shortened_list_counts_the_rest() -> None:
    assert [shorten_list(range(count), 2) for count in (0, 2, 3)] == ["", "0, 1", "0, 1 and 1 more"]
