import pytest
from tests.unit.scheduler.queue_driver import PROPERTIES

from lathe_scheduler.platform_key import PlatformProperties, PropertyKind
from lathe_shared.errors import InvalidArgumentError


def test_equal_wishes_in_another_order_are_one_key() -> None:
    one = PROPERTIES.key([("cpu_count", "2"), ("OSFamily", "linux"), ("pool", "fast")])
    other = PROPERTIES.key([("pool", "fast"), ("OSFamily", "linux"), ("cpu_count", "02")])
    assert one == other
    assert hash(one) == hash(other)


def test_ignored_properties_and_zero_amounts_are_no_wishes() -> None:
    assert PROPERTIES.key([("note", "x"), ("cpu_count", "0")]) == PROPERTIES.key([])


def test_an_unknown_property_is_refused_with_its_name_and_the_known_ones() -> None:
    with pytest.raises(InvalidArgumentError, match=r"unknown platform property 'gpu'.*OSFamily, cpu_count"):
        PROPERTIES.key([("gpu", "1")])


@pytest.mark.parametrize("value", ["", "two", "-1", "1.5", " 1", "1 ", "9" * 17, "٣", str(2**53 + 1)])
def test_an_amount_that_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(InvalidArgumentError, match="cpu_count="):
        PROPERTIES.key([("cpu_count", value)])


def test_of_repeated_amounts_the_largest_counts_and_repeated_values_are_all_wanted() -> None:
    key = PROPERTIES.key([("cpu_count", "1"), ("cpu_count", "3"), ("OSFamily", "a"), ("OSFamily", "b")])
    assert key.minimums == (("cpu_count", 3),)
    assert PROPERTIES.offer([("cpu_count", "4"), ("OSFamily", "a"), ("OSFamily", "b")]).serves(key)
    assert not PROPERTIES.offer([("cpu_count", "4"), ("OSFamily", "a")]).serves(key)


def test_too_many_properties_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="more than 64"):
        PROPERTIES.key([("OSFamily", str(number)) for number in range(65)])


def test_a_worker_serves_what_it_has_enough_of() -> None:
    offer = PROPERTIES.offer([("cpu_count", "4"), ("OSFamily", "linux"), ("anything", "else")])
    assert offer.serves(PROPERTIES.key([("cpu_count", "4")]))
    assert offer.serves(PROPERTIES.key([("pool", "fast")]))
    assert offer.serves(PROPERTIES.key([]))
    assert not offer.serves(PROPERTIES.key([("cpu_count", "5")]))
    assert not offer.serves(PROPERTIES.key([("memory_gb", "1")]))
    assert not offer.serves(PROPERTIES.key([("OSFamily", "windows")]))


def test_preferences_that_a_worker_meets_are_counted() -> None:
    key = PROPERTIES.key([("pool", "fast")])
    assert PROPERTIES.offer([("pool", "fast")]).preference_count(key) == 1
    assert PROPERTIES.offer([("pool", "slow")]).preference_count(key) == 0


def test_a_worker_with_a_malformed_amount_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="register"):
        PROPERTIES.offer([("cpu_count", "many")], "register.properties")


def test_without_known_properties_the_error_says_so() -> None:
    with pytest.raises(InvalidArgumentError, match="knows: none"):
        PlatformProperties({}).key([("cpu_count", "1")])
    assert PropertyKind("minimum") is PropertyKind.MINIMUM
