"""docs/models.md and the families that the trainer declares say the same."""

import re
from pathlib import Path

from trainer_service.megatron.families import FAMILIES

TABLE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_declared_families_are_those_that_match() -> None:
    matching = re.findall(r"^\| (\w+) \| trains and matches PEFT \|", TABLE.read_text(), re.MULTILINE)
    assert sorted(matching) == sorted(FAMILIES)


def test_every_other_family_has_a_reason() -> None:
    reasons = re.findall(r"^\| \w+ \| not supported \|  \| (.*) \|$", TABLE.read_text(), re.MULTILINE)
    assert len(reasons) > 30
    assert all(reasons)
