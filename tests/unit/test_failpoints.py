"""Failpoints: those in the code are those that the tests use and the docs list."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def failpoints_in_code() -> set[str]:
    names = set()
    for package in ("trainer_service", "sampler_service"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "failpoints.reached":
                    names.add(node.args[0].value)
    return names


def test_every_failpoint_is_documented_and_killed_at() -> None:
    named = re.compile(r"`((?:push|sync)\.[a-z]+)`")
    assert set(named.findall((ROOT / "docs/faults.md").read_text())) == failpoints_in_code()
    used = set(re.findall(r'"((?:push|sync)\.[a-z]+)": \d', (ROOT / "tests/faults/test_kills.py").read_text()))
    assert used == failpoints_in_code()
