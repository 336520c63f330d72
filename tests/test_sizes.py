"""Sizes as people write them."""

import pytest

from fcn_dist.errors import UserError
from fcn_dist.sizes import parse_size, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("200GB", 200_000_000_000),
        ("1.5 TB", 1_500_000_000_000),
        ("64MiB", 64 * 1024 * 1024),
        ("4096", 4096),
        (" 7 kb ", 7000),
        ("0.1GB", 100_000_000),
        ("2pib", 2 * 1024**5),
    ],
)
def test_a_size_is_read_to_the_byte(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "200 Gb/s", "0", "0.2B", "5G", "1,5GB", "nan", "٣GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not understood; a positive number with one of B, KB") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (1_536_000_000, "1.536 GB"), (3 * 10**15, "3 PB")]
)
def test_a_size_is_shown_in_its_largest_unit(size: int, text: str) -> None:
    assert show_size(size) == text
