"""A label is read as it is meant, or refused by name: no form of a number is guessed at."""

from __future__ import annotations

import json

import pytest

from data_prep.sources.labels import parse_label, read_label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("3", 3), ("0", 0), ("000", 0), ("007", 7), ("3.0", 3), ("007.0", 7), ("0.0", 0),
        ("-1", -1),
        ("\ufeff3", 3), (" 3\r\n", 3), ("\u00a03\u2003", 3), ("\t\ufeff 03.0 \n", 3),
        ("0000000000000000000012", 12), ("cat", "cat"), (" a cat ", "a cat"),
        ("n02084071", "n02084071"),
        ("1 2", "1 2"), ("1,5", "1,5"), ("v1.0", "v1.0"), ("1-2", "1-2"), ("\u00b2", "\u00b2"),
        ("3\0", "3\0"), ("12345678901", "12345678901"), ("9" * 5000, "9" * 5000),
        ("0001234567890", "1234567890"), ("1234567890.0", "1234567890"),
        ("0" * 1_000_000 + "x", "0" * 1_000_000 + "x"),  # a second, not a day
    ],
)  # fmt: skip
def test_texts_that_mean_one_thing(text: str, label: int | str) -> None:
    assert parse_label(text) == label
    assert type(parse_label(text)) is type(label)


@pytest.mark.parametrize(
    "text",
    ["1e3", "0x10", "3.5", "-0", "+1", "-01", "3.", ".0", "3.00", "1_000", "\u0661", "\uff13",
     "nan", "inf", "0b1", "1E0", "-1.5", "-00"],
)  # fmt: skip
def test_numbers_of_other_forms_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"could be a number, but is no plain whole one") as caught:
        parse_label(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["", " ", "\ufeff", "\n\u00a0"])
def test_blanks_are_no_label(text: str) -> None:
    with pytest.raises(ValueError, match="it is empty"):
        parse_label(text)


@pytest.mark.parametrize(
    ("told", "key", "label"),
    [
        ({"label": 3}, "", 3),
        ({"class": "cat"}, "", "cat"),
        ({"label": None, "cls": "02"}, "", 2),
        ({"meta": {"id": "5.0"}}, "meta.id", 5),
        ({"meta.id": 6, "meta": {"id": 5}}, "meta.id", 6),
        ({"a": {"b": {"c": "dog"}}}, "a.b.c", "dog"),
        ({"a": {"b.c": 1}}, "a.b.c", 1),
        ({"target": None}, "target", None),
        ({"target": 2.0}, "target", 2),
        ({}, "", None),
        ([3], "", None),
    ],
)
def test_what_a_json_member_states(told: object, key: str, label: int | str | None) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        assert read_label("json", key, mark + json.dumps(told).encode()) == label


def test_a_key_that_is_not_there_is_named_with_those_that_are() -> None:
    blob = json.dumps({"caption": "x", "meta": {"id": 1}}).encode()
    with pytest.raises(ValueError, match="it has no target, only caption, meta"):
        read_label("json", "target", blob)
    with pytest.raises(ValueError, match="it has no name, only id"):
        read_label("json", "meta.name", blob)
    with pytest.raises(ValueError, match="it has no x, but no keys"):
        read_label("json", "x", b"[1]")


def test_text_with_a_byte_order_mark_is_text() -> None:
    assert read_label("cls", "", b"\xef\xbb\xbf12\r\n") == 12
    with pytest.raises(ValueError, match="codec"):
        read_label("cls", "", "12".encode("utf-16"))
