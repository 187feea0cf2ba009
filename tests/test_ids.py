"""Identifiers are ULIDs, sort by time, and name the same thing the same way."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from storage import ids

TIMES = st.datetimes(min_value=datetime(2001, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


def decode(ulid: str) -> int:
    number = 0
    for letter in ulid:
        number = number * 32 + ids.CROCKFORD.index(letter)
    return number


@given(TIMES, st.text())
def test_a_ulid_holds_its_milliseconds_and_fits_128_bits(at: datetime, about: str) -> None:
    ulid = ids.make_ulid(at, about)
    assert len(ulid) == 26
    assert decode(ulid) < 1 << 128
    assert decode(ulid) >> 80 == int(at.timestamp() * 1000)


@given(TIMES, st.text(), st.text())
def test_the_same_thing_has_the_same_name_and_a_later_one_sorts_after(at: datetime, one: str, other: str) -> None:
    assert ids.make_ulid(at, one) == ids.make_ulid(at, one)
    assert (ids.make_ulid(at, one) == ids.make_ulid(at, other)) == (one == other)
    assert ids.make_ulid(at, one) < ids.make_ulid(at + timedelta(milliseconds=1), other)


def test_parts_are_kept_apart() -> None:
    at = datetime(2026, 3, 2, tzinfo=UTC)
    assert ids.make_ulid(at, "ab", "c") != ids.make_ulid(at, "a", "bc")
