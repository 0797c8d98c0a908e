"""The client as a user gets it: a fresh environment with its four dependencies and nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from client_fakes import Fakes

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).parent / "uv"
# typing-extensions comes with grpcio.
DEPENDENCIES = ["blake3", "grpcio", "protobuf", "numpy", "typing-extensions"]
PROGRAM = """
import sys
import tinkerbell
with tinkerbell.TrainerClient(sys.argv[1]) as trainer:
    run = trainer.create_lora_adapter("alice")
    print(run.forward_backward([tinkerbell.Datum([1, 2], [2, 3])]).result().loss)
    try:
        trainer.create_lora_adapter("alice")
    except tinkerbell.AlreadyExistsError as error:
        print(error.reason)
for absent in ("torch", "google.rpc", "rich", "typer", "grpc_health"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    print("found", absent)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of such an environment."""
    folder = tmp_path_factory.mktemp("base-install")
    environment = folder / "venv"

    def uv(*arguments):
        done = subprocess.run([UV, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    uv("venv", "--quiet", "--python", sys.executable, environment)
    into = ["pip", "install", "--quiet", "--no-deps", "--python", environment]
    uv(*into, "--constraints", ROOT / "requirements" / "dev.txt", *DEPENDENCIES)
    packages = next(environment.glob("lib/python*/site-packages"))
    shutil.copytree(ROOT / "client" / "tinkerbell", packages / "tinkerbell")
    return environment / "bin" / "python"


@pytest.mark.slow
def test_base_install_trains_without_torch_googleapis_or_rich(python, tmp_path):
    with Fakes().running() as fakes:
        done = subprocess.run(
            [python, "-I", "-c", PROGRAM, fakes.trainer_address],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2.5\nADAPTER_EXISTS\n", "")


def test_command_without_its_extra_says_what_to_install(python, tmp_path):
    command = "from tinkerbell.cli import main; main()"
    done = subprocess.run([python, "-I", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["the tinkerbell command needs grpc_health: pip install 'tinkerbell[cli]'"]
