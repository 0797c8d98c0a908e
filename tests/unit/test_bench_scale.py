"""What the scale benchmark measures at the same time."""

import pytest

from benchmarks.scale_plan import measurements, waves


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 4, 6, 8])
def test_every_layout_that_fits_has_gpus_of_its_own(num_gpus: int) -> None:
    wanted = [each for each in measurements(num_gpus, quick=False) if each.num_gpus <= num_gpus]
    found = waves(wanted, num_gpus)
    for wave in found:
        assert sum(world[0].num_gpus for world in wave) <= num_gpus
        assert all(len({each.num_gpus for each in world}) == 1 for world in wave)
    measured = [each for wave in found for world in wave for each in world]
    assert sorted(each.name for each in measured) == sorted(each.name for each in wanted)


def test_smaller_worlds_share_a_wave() -> None:
    found = waves(measurements(8, quick=False), 8)
    assert [[world[0].num_gpus for world in wave] for wave in found] == [[8], [4, 2, 1]]
