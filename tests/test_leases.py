"""storage.leases: one holder at a time, and a fence that tells a holder who was stopped too long."""

from datetime import timedelta

import pytest

from storage import db, leases

pytestmark = pytest.mark.databases("sqlite", "postgresql")

TERM = timedelta(seconds=60)


@pytest.fixture
def connection(engine):
    with db.writing(engine) as connection:
        yield connection


def test_one_holds_it_and_the_other_waits(connection, now):
    assert leases.acquire(connection, "scheduler", "a", now, TERM) == 1
    assert leases.acquire(connection, "scheduler", "b", now, TERM) is None
    assert leases.acquire(connection, "device", "b", now, TERM) == 1
    assert leases.holder_of(connection, "scheduler", now) == "a"


def test_a_holder_renews_under_the_same_fence(connection, now):
    fence = leases.acquire(connection, "scheduler", "a", now, TERM)
    later = now + TERM / 2
    assert leases.acquire(connection, "scheduler", "a", later, TERM) == fence
    assert leases.holder_of(connection, "scheduler", later + TERM / 2 + timedelta(seconds=1)) == "a"


def test_a_lease_that_ran_out_goes_to_the_next_with_a_greater_fence(connection, now):
    first = leases.acquire(connection, "scheduler", "a", now, TERM)
    assert leases.holder_of(connection, "scheduler", now + TERM) is None
    second = leases.acquire(connection, "scheduler", "b", now + TERM, TERM)
    assert second > first
    assert not leases.renew(connection, "scheduler", "a", first, now + TERM, TERM)
    assert leases.acquire(connection, "scheduler", "a", now + TERM, TERM) is None


def test_a_holder_that_comes_back_to_a_lease_nobody_took_keeps_it(connection, now):
    fence = leases.acquire(connection, "scheduler", "a", now, TERM)
    assert leases.renew(connection, "scheduler", "a", fence, now + 3 * TERM, TERM)
    assert leases.holder_of(connection, "scheduler", now + 3 * TERM) == "a"


def test_what_is_given_back_is_free_at_once_and_only_by_its_holder(connection, now):
    first = leases.acquire(connection, "scheduler", "a", now, TERM)
    leases.release(connection, "scheduler", "b")
    assert leases.holder_of(connection, "scheduler", now) == "a"
    leases.release(connection, "scheduler", "a")
    assert leases.acquire(connection, "scheduler", "b", now, TERM) > first
    assert not leases.renew(connection, "scheduler", "a", first, now, TERM)
