"""Writes docs/models.md: what the trainer does with every model family that Megatron-Bridge knows.

    python scripts/model_table.py                  tries each on a tiny random model, in about ten minutes
    python scripts/model_table.py --only ARCH      tries one, prints the outcome and writes nothing

A family "trains and matches PEFT" when, in float32 on the CPU, base logits and the logits of an exported adapter are
within 1e-4 of Hugging Face's and PEFT's, and every adapter gradient within 1e-4 of PEFT's, relative to its norm.
"""

import argparse
import importlib
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import make_models
import numpy as np
import peft
import torch
import transformers

from service_common import checkpoint, lora
from service_common.errors import ServiceError
from tinkerbell import tensors
from tinkerbell.v1 import common_pb2
from trainer_service.adamw import AdamParams
from trainer_service.batch import Datum
from trainer_service.engine import Engine, Limits
from trainer_service.lora.arena import Arena
from trainer_service.losses import Loss, LossConfig
from trainer_service.megatron import families, runtime  # noqa: F401  (runtime makes Megatron importable)
from trainer_service.passes import Part

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
SECONDS = 120
TOLERANCE = 1e-4
LENGTHS = (3, 40, 17, 1)  # 40 is longer than the sliding window of tiny models
RANK, ALPHA = 8, 24.0

MATCHES, NOT_SUPPORTED = "trains and matches PEFT", "not supported"

HEADER = """# Model families

Written by `python scripts/model_table.py`, not by hand: it goes through every architecture that Megatron-Bridge
registers and tries it on a tiny random model, in float32 on the CPU, without Transformer Engine.
With {versions}.

"trains and matches PEFT": base logits and the logits of an exported adapter are within 1e-4 of Hugging Face's and
PEFT's, and the gradient of every adapter tensor is within 1e-4 of PEFT's, relative to its norm. No family just trains:
one whose numbers are not proven is not loaded. "all seven" modules are the projections of attention (q, k, v and o) and
of the MLP (gate, up and down). Of a mixture of experts only the attention takes adapters.

Multimodal and diffusion models are recognised by their names, and models that transformers lacks have nothing to be
compared with: these were not tried. A checkpoint of a family that matches is still refused, by name of what is missing,
where its configuration asks for something that was not built.

{matching} match, {others} are not supported.

| architecture | outcome | adapters on | why not |
|---|---|---|---|
"""

# What reading both implementations says about a difference that was found.
NOTES = {
    "Ernie4_5_MoeForCausalLM": ": Bridge routes by the sigmoid of a router's logits, Hugging Face by their softmax",
    "Gemma4ForCausalLM": "; its layers have heads of two widths, and Megatron's attention has one",
}


@dataclass(frozen=True)
class Outcome:
    """One row."""

    status: str
    modules: tuple[str, ...] = ()
    reason: str = ""


class Mismatch(Exception):
    """The trainer computes something else than the reference does."""


def registered() -> dict[str, str]:
    """Every architecture that a module of Bridge registers; with an ImportError's text where one cannot be imported."""
    import megatron.bridge  # noqa: PLC0415  (after runtime)
    from megatron.bridge.models.conversion import model_bridge  # noqa: PLC0415

    root = Path(megatron.bridge.__file__).parent
    unimportable = {}
    for file in root.rglob("*_bridge.py"):
        source = re.search(r'^@MegatronModelBridge\.register_bridge\(\s*source="?(\w+)', file.read_text(), re.MULTILINE)
        module = ".".join(["megatron.bridge", *file.relative_to(root).with_suffix("").parts])
        if source and module not in sys.modules:
            try:
                importlib.import_module(module)
            except ImportError as cause:
                unimportable[source[1]] = f"{cause} (a diffusion model)" if "diffusion" in module else str(cause)
    known = (kind if isinstance(kind, str) else kind.__name__ for kind in model_bridge.get_model_bridge._exact_types)
    return dict(sorted((dict.fromkeys(known, "") | unimportable).items(), key=lambda item: item[0].lower()))


def attempt(architecture: str) -> Outcome:
    """Tries one family in this process, whose engine can hold one model only."""
    if re.search("ForConditionalGeneration|_VL_|_Omni_", architecture):
        return Outcome(NOT_SUPPORTED, reason="multimodal, and the trainer takes text only")
    if re.search("Diffusion|LLaDA", architecture):
        return Outcome(NOT_SUPPORTED, reason="a diffusion model, and the trainer's losses are of the next token")
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        return Outcome(
            NOT_SUPPORTED,
            reason=f"transformers {transformers.__version__} has no such model; its code comes with the checkpoint, is "
            "not run here, and leaves nothing to compare with",
        )
    families.FAMILIES.setdefault(architecture, families.Family())
    with tempfile.TemporaryDirectory() as folder:
        config = make_models.tiny_config(model_class.config_class)
        make_models.make_tiny(config, Path(folder) / architecture)
        modules = compare(Path(folder) / architecture)
    return Outcome(MATCHES, modules)


def compare(folder: Path) -> tuple[str, ...]:
    """The modules that were adapted. Mismatch, or whatever the model fails with."""
    found = checkpoint.resolve(str(folder))
    engine = Engine(torch.device("cpu"), Limits())
    engine.load_base_model(found, lambda stage: None)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    compare_logits("base logits", engine, None, reference, batch(found, 0))

    modules = lora.adaptable_modules(found)
    engine.create_adapter("tried", common_pb2.LoraConfig(rank=RANK, alpha=ALPHA, target_modules=modules), seed=0)
    # One step moves B away from zero, without which A has no gradient.
    engine.run_pass([training_part(batch(found, 1))])
    engine.optim_step("tried", AdamParams(learning_rate=1e-2))
    arena = engine._adapters["tried"].arena
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(modules), lora_dropout=0.0)
    adapted = peft.get_peft_model(reference, config)
    peft.set_peft_model_state_dict(adapted, exported(engine))
    compare_logits("logits of the exported adapter", engine, arena, adapted, batch(found, 2))

    data = batch(found, 3)
    engine.run_pass([training_part(data)])
    loss(adapted, data).backward()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            ours = arena.view(arena.gradients, name.replace(".default", ""))
            if not (ours - parameter.grad).norm() <= TOLERANCE * parameter.grad.norm():
                raise Mismatch("adapter gradients")
    return modules


def training_part(data: list[Datum]) -> Part:
    """A ForwardBackward."""
    return Part("tried", data, Loss.CROSS_ENTROPY, LossConfig(), backward=True)


def compare_logits(
    what: str, engine: Engine, arena: Arena | None, reference: torch.nn.Module, data: list[Datum]
) -> None:
    """Mismatch, naming `what`, unless all are near."""
    from trainer_service.megatron.model import PackedSequence  # noqa: PLC0415  (after the engine has loaded)

    with torch.no_grad():
        packed = engine._model.logits([PackedSequence(arena, datum.tokens, datum.target_tokens) for datum in data])
        for datum, ours in zip(data, packed.split(LENGTHS), strict=True):
            theirs = reference(torch.from_numpy(datum.tokens)[None]).logits[0]
            if not (ours - theirs).abs().max() <= TOLERANCE:
                raise Mismatch(what)


def exported(engine: Engine) -> dict[str, torch.Tensor]:
    """The adapter as a client gets it."""
    snapshot = engine.snapshot("tried", common_pb2.DATA_TYPE_FLOAT32)
    return {
        spec.name: torch.from_numpy(
            tensors.decode_bytes(
                snapshot.payload[spec.offset : spec.offset + spec.size_bytes], spec.dtype, spec.shape
            ).copy()
        )
        for spec in snapshot.manifest.tensors
    }


def batch(found: checkpoint.Checkpoint, seed: int) -> list[Datum]:
    """Random sequences, one of them longer than the models' sliding windows."""
    rng = np.random.default_rng(seed)
    return [
        Datum(
            tokens=rng.integers(0, found.vocab_size, length),
            target_tokens=rng.integers(0, found.vocab_size, length),
            inputs={"weights": rng.uniform(0, 2, length).astype(np.float32)},
        )
        for length in LENGTHS
    ]


def loss(model: torch.nn.Module, data: list[Datum]) -> torch.Tensor:
    """Weighted cross-entropy, one sequence at a time."""
    total = torch.zeros(())
    for datum in data:
        logprobs = model(torch.from_numpy(datum.tokens)[None]).logits[0].log_softmax(-1)
        chosen = logprobs.gather(1, torch.from_numpy(datum.target_tokens)[:, None])[:, 0]
        total = total - (chosen * torch.from_numpy(datum.inputs["weights"])).sum()
    return total


def in_words(architecture: str, cause: Exception) -> str:
    """The cause as a reader of the table understands it."""
    match cause:
        case Mismatch():
            return f"{cause} differ from the reference's" + NOTES.get(architecture, "")
        case ServiceError():
            return re.sub(r"^\S+ is a \w+; |\S+/(?=\w+)", "", cause.message)
    first_line = str(cause).partition("\n")[0].rstrip(":")
    return f"loading it fails with {type(cause).__name__}: {first_line}" + NOTES.get(architecture, "")


def child(architecture: str, connection, log: Path) -> None:
    """Sends the outcome of `attempt`; what the libraries have to say goes to the log."""
    os.nice(15)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        outcome = attempt(architecture)
    except Exception as cause:
        traceback.print_exc()
        outcome = Outcome(NOT_SUPPORTED, reason=in_words(architecture, cause))
    connection.send(outcome)


def tried(architecture: str) -> Outcome:
    """As `attempt`, in a process of its own and within the time limit."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    log = Path(tempfile.gettempdir()) / f"model_table.{architecture}.log"
    process = multiprocessing.get_context("fork").Process(target=child, args=(architecture, theirs, log))
    process.start()
    theirs.close()
    try:
        if ours.poll(SECONDS):
            return ours.recv()
        return Outcome(NOT_SUPPORTED, reason=f"no answer within {SECONDS} seconds")
    except EOFError:
        return Outcome(NOT_SUPPORTED, reason="the process died")
    finally:
        process.kill()
        process.join()


def page(outcomes: dict[str, Outcome]) -> str:
    """The document."""
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("megatron-bridge", "megatron-core", "torch", "transformers", "peft")
    )
    matching = sum(outcome.status == MATCHES for outcome in outcomes.values())
    rows = "".join(
        f"| {architecture} | {outcome.status} | {adapts(outcome.modules)} | {outcome.reason} |\n"
        for architecture, outcome in sorted(
            outcomes.items(), key=lambda item: (item[1].status != MATCHES, item[0].lower())
        )
    )
    return HEADER.format(versions=versions, matching=matching, others=len(outcomes) - matching) + rows


def adapts(modules: tuple[str, ...]) -> str:
    """A column of the table."""
    known = {(): "", lora.TARGET_MODULES: "all seven", lora.ATTENTION_MODULES: "attention"}
    return known.get(modules) or ", ".join(modules)


def main() -> int:
    """1 when the outcomes contradict what `families` declares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="ARCH", action="append", help="may be given several times")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    outcomes = {}
    for architecture, import_error in registered().items():
        if arguments.only and architecture not in arguments.only:
            continue
        if import_error:
            outcome = Outcome(NOT_SUPPORTED, reason=f"Bridge's module for it cannot be imported: {import_error}")
        else:
            outcome = tried(architecture)
        outcomes[architecture] = outcome
        print(f"{architecture}: {outcome.status}; {adapts(outcome.modules)}{outcome.reason}", flush=True)
    if not arguments.only:
        TABLE.write_text(page(outcomes))
    wrong = [name for name, outcome in outcomes.items() if (outcome.status == MATCHES) != (name in families.FAMILIES)]
    if wrong:
        print(f"families.py says otherwise of {', '.join(wrong)}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
