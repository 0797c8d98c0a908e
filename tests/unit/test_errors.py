"""Errors on their way from a domain module to a client."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from google.rpc import error_details_pb2

from service_common import errors
from service_common.rpc import status_of

ROOT = Path(__file__).parents[2]
CONSTRUCTORS = {
    name
    for name, value in vars(errors).items()
    if inspect.isfunction(value) and inspect.signature(value).return_annotation is errors.ServiceError
}


def reasons_in_code() -> set[str]:
    found = set()
    for package in ("service_common", "trainer_service", "sampler_service"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in CONSTRUCTORS:
                    first = node.args[0] if node.args else None
                    if isinstance(first, ast.Constant):
                        found.add(first.value)
    return found


def test_docs_list_every_reason_and_no_other() -> None:
    table = (ROOT / "docs/errors.md").read_text().partition("| reason |")[2]
    first_columns = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([A-Z_]+)`", " ".join(first_columns))) == reasons_in_code()


@pytest.mark.parametrize("constructor", sorted(CONSTRUCTORS))
def test_every_constructor_makes_the_status_of_its_name(constructor: str) -> None:
    error = getattr(errors, constructor)("REASON", "what to do", value=3)
    status = status_of(error)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert error.code.name == constructor.upper()
    assert (status.message, info.reason, dict(info.metadata)) == ("what to do", "REASON", {"value": "3"})


def test_a_field_to_blame_becomes_a_bad_request() -> None:
    status = status_of(errors.invalid_argument("REASON", "rank 0 is too small", field="lora.rank", rank=0))
    bad_request = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad_request)
    assert bad_request.field_violations[0].field == "lora.rank"


def test_a_delay_becomes_a_retry_info() -> None:
    status = status_of(errors.resource_exhausted("REASON", "come back", retry_seconds=1.5).within("requests[2]"))
    bad_request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(bad_request)
    assert status.details[2].Unpack(retry)
    assert (status.message, bad_request.field_violations[0].field) == ("requests[2]: come back", "requests[2]")
    assert retry.retry_delay.ToTimedelta().total_seconds() == 1.5


def test_of_many_names_a_message_has_the_first_and_says_how_many_more() -> None:
    assert errors.listed([]) == "none"
    assert errors.listed(["b", "a"]) == "a, b"
    many = errors.listed(f"{number:064}" for number in range(1000))
    assert many.endswith(f"{9:064} and 990 more")
    assert len(many) < 1000
