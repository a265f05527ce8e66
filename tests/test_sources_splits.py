from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletransfer.sources.splits import check_share, held_out, uniform

SEEDS = st.integers(0, 2**31)


def test_the_draw_is_the_sha256_of_seed_and_group() -> None:
    """First 16 digits of `printf '0/00000001' | sha256sum` and `printf '7/patient' | sha256sum`."""
    assert uniform(0, "00000001") == 0xF56AC338617CC1AC / 2**64
    assert uniform(7, "patient") == 0x347B30B1F4B76EE8 / 2**64


@given(group=st.text(), seed=SEEDS, shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_larger_share_holds_out_the_same_groups_and_more(group: str, seed: int, shares: tuple[float, float]) -> None:
    small, large = sorted(shares)
    assert held_out(group, large, seed) or not held_out(group, small, seed)
    assert not held_out(group, 0, seed) and held_out(group, 1, seed)


@given(seed=SEEDS)
def test_about_the_share_is_held_out(seed: int) -> None:
    # 4 standard deviations of a binomial are 0.012; hypothesis tries 100 seeds.
    found = sum(held_out(str(patient), 0.1, seed) for patient in range(10_000))
    assert abs(found / 10_000 - 0.1) < 0.018


@pytest.mark.parametrize("share", [1, 1.5, -0.1, "0.1", True, None, float("nan")])
def test_a_share_is_a_number_from_0_to_below_1(share: object) -> None:
    with pytest.raises(ValueError, match="valid_share must be a number"):
        check_share(share)
    assert check_share(0) == 0.0 and check_share(0.25) == 0.25
