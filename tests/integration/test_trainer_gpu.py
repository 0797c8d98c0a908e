"""The trainer on a GPU, bfloat16: passes that are CUDA graphs there, against the same passes launched kernel by kernel,
and the base model's log-probabilities against Hugging Face's in float32.

Tolerance: 1e-2 relative between the two, whose matrix products differ in shape, and against float32.
"""

import numpy as np
import pytest
import torch
import transformers
from engine_calls import arena_of, forward_backward, part, random_datum
from processes import made_model

from service_common import checkpoint
from tinkerbell.v1 import common_pb2
from trainer_service.adamw import AdamParams
from trainer_service.batch import Datum
from trainer_service.engine import Engine, Limits
from trainer_service.megatron import layer_spec
from trainer_service.passes import PartResult

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TENANTS = {"ada": (8, []), "bob": (1, ["q_proj", "down_proj"]), "cy": (20, ["k_proj", "o_proj", "up_proj"])}
# Shorter and longer than a tile of the kernels, and than tiny-mistral's window.
LENGTHS = {"ada": [3, 70], "bob": [1], "cy": [130, 20, 5], "": [9]}


def loaded(model: str) -> Engine:
    engine = Engine(torch.device("cuda", 0), Limits())
    engine.load_base_model(
        checkpoint.resolve(str(made_model(model, "tiny", model.removeprefix("tiny-")))), lambda stage: None
    )
    for number, (name, (rank, modules)) in enumerate(TENANTS.items()):
        config = common_pb2.LoraConfig(rank=rank, alpha=2 * rank, target_modules=modules)
        engine.create_adapter(name, config, seed=number)
        weights = arena_of(engine, name).weights
        noise = torch.empty(weights.shape).normal_(0, 0.03, generator=torch.Generator().manual_seed(number))
        weights += noise.to(weights.device)
    return engine


def data(engine: Engine, seed: int, lengths: dict[str, list[int]] = LENGTHS) -> dict[str, list[Datum]]:
    rng = np.random.default_rng(seed)
    assert engine.checkpoint is not None
    vocab_size = engine.checkpoint.vocab_size
    return {name: [random_datum(rng, length, vocab_size) for length in of_part] for name, of_part in lengths.items()}


def run(
    engine: Engine, seed: int, lengths: dict[str, list[int]] = LENGTHS
) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Log-probabilities of a pass that all tenants share, and the gradients that it leaves; they are cleared."""
    parts = [part(name, batch, backward=bool(name)) for name, batch in data(engine, seed, lengths).items()]
    results: list[PartResult] = engine.run_pass(parts)
    gradients = {name: arena_of(engine, name).gradients.cpu().clone() for name in TENANTS}
    for name in TENANTS:
        engine.optim_step(name, AdamParams(learning_rate=0.0))
    return np.concatenate([values for result in results for values in result.logprobs]), gradients


def launched(
    engine: Engine, seed: int, lengths: dict[str, list[int]] = LENGTHS
) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """As `run`, without graphs."""
    assert engine._model is not None
    graphs, engine._model._graphs = engine._model._graphs, None
    try:
        return run(engine, seed, lengths)
    finally:
        engine._model._graphs = graphs


def assert_close(ours, theirs, tolerance: float) -> None:
    for one, other in zip((ours[0], *ours[1].values()), (theirs[0], *theirs[1].values()), strict=True):
        difference, scale = (float(np.linalg.norm(np.asarray(values))) for values in (one - other, other))
        assert scale > 0
        assert difference <= tolerance * scale, difference / scale


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-qwen3", "tiny-mistral"])
def test_a_graph_computes_what_its_kernels_do_one_by_one(model: str) -> None:
    engine = loaded(model)
    assert engine._model is not None
    assert engine._model._graphs is not None
    for seed in range(3):  # the first pass records
        graphed = run(engine, seed)
        assert_close(graphed, launched(engine, seed), 1e-2)
    assert len(engine._model._graphs._recordings) == 1


@pytest.mark.parametrize("num_sequences", [64, 127])
def test_a_graph_takes_many_short_sequences(num_sequences: int) -> None:
    engine = loaded("tiny-llama")
    names = np.random.default_rng(0).choice(list(TENANTS), num_sequences)
    lengths = {name: [1 + index % 60 for index in np.flatnonzero(names == name)] for name in TENANTS}
    assert_close(run(engine, 0, lengths), launched(engine, 0, lengths), 1e-2)
    assert engine._model is not None
    assert engine._model._graphs is not None
    assert len(engine._model._graphs._recordings) == 1


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-qwen3", "tiny-mistral"])
def test_the_base_models_logprobs_are_hugging_faces(model: str) -> None:
    engine = loaded(model)
    assert engine.checkpoint is not None
    reference = transformers.AutoModelForCausalLM.from_pretrained(engine.checkpoint.folder, dtype=torch.float32).eval()
    batch = [random_datum(np.random.default_rng(1), length, 400) for length in (3, 130)]
    for datum, ours in zip(batch, forward_backward(engine, "", batch, backward=False).logprobs, strict=True):
        with torch.no_grad():
            theirs = reference(torch.from_numpy(datum.tokens)[None]).logits[0].log_softmax(-1)
        theirs = theirs.gather(1, torch.from_numpy(datum.target_tokens)[:, None])[:, 0].numpy()
        assert np.linalg.norm(ours - theirs) <= 1e-2 * np.linalg.norm(theirs)


def test_graphs_of_several_shapes_share_their_memory_and_do_not_disturb_each_other() -> None:
    engine = loaded("tiny-llama")
    rng = np.random.default_rng(0)
    batches = [[random_datum(rng, length, 400)] for length in (700, 20, 300)]
    for _ in range(2):
        for batch in batches:
            graphed = (
                forward_backward(engine, "ada", batch).logprobs[0],
                {"ada": arena_of(engine, "ada").gradients.cpu().clone()},
            )
            engine.optim_step("ada", AdamParams(learning_rate=0.0))
            assert engine._model is not None
            graphs, engine._model._graphs = engine._model._graphs, None
            plain = (
                forward_backward(engine, "ada", batch).logprobs[0],
                {"ada": arena_of(engine, "ada").gradients.cpu().clone()},
            )
            engine.optim_step("ada", AdamParams(learning_rate=0.0))
            engine._model._graphs = graphs
            assert_close(graphed, plain, 1e-2)


def test_sequences_of_one_length_are_a_batch_and_see_what_they_see_one_by_one(monkeypatch) -> None:
    engine = loaded("tiny-llama")
    assert engine._model is not None
    rng = np.random.default_rng(0)
    batch = [random_datum(rng, 1024, 400) for _ in range(2)]

    def passed() -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        logprobs = np.concatenate(forward_backward(engine, "ada", batch).logprobs)
        gradients = {"ada": arena_of(engine, "ada").gradients.cpu().clone()}
        engine.optim_step("ada", AdamParams(learning_rate=0.0))
        return logprobs, gradients

    batched = passed()
    monkeypatch.setattr(layer_spec, "_LEAST_BATCH_LENGTH", 1025)
    assert_close(batched, passed(), 1e-2)
    assert len(engine._model._graphs._recordings) == 2


def test_a_tenant_that_is_not_finite_leaves_the_others_gradients_alone() -> None:
    engine = loaded("tiny-llama")
    _, before = run(engine, 1)
    arena_of(engine, "bob").weights.fill_(torch.nan)
    parts = [part(name, batch, backward=bool(name)) for name, batch in data(engine, 1).items()]
    results = engine.run_pass(parts)
    assert [result.refusal is not None for result in results] == [False, True, False, False]
    for name in ("ada", "cy"):
        assert torch.equal(arena_of(engine, name).gradients.cpu(), before[name]), name
    assert not arena_of(engine, "bob").gradients.any()
