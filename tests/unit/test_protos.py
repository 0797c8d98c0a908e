"""The contract and the stubs made from it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUF = Path(sys.executable).with_name("buf")


def test_committed_stubs_are_what_protos_generate(tmp_path):
    subprocess.run([ROOT / "scripts/generate_stubs.sh", tmp_path], check=True)
    committed = ROOT / "client/tinkerbell/v1"
    generated = {file.name: file.read_text() for file in (tmp_path / "tinkerbell/v1").iterdir()}
    assert generated, "the script wrote nothing"
    assert {file.name for file in committed.glob("*_pb2*")} == set(generated), "run `make protos`"
    stale = [name for name, text in generated.items() if (committed / name).read_text() != text]
    assert not stale, "run `make protos`"


def test_buf_finds_nothing():
    for command in (["lint"], ["format", "--diff", "--exit-code"]):
        result = subprocess.run([BUF, *command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
