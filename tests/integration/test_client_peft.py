"""Adapters to and from PEFT's folders, and merged into the base model, against PEFT itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from client_fakes import FINGERPRINT, LORA, WEIGHTS, Fakes
from typer.testing import CliRunner

import tinkerbell
from service_common.checkpoint import Checkpoint
from tinkerbell import TrainerClient, merge, peft_folder, safetensors_file, tensors
from tinkerbell.cli.commands import app
from tinkerbell.lora import LoraConfig, peft_name
from tinkerbell.v1 import common_pb2

pytestmark = pytest.mark.engine

TOKENS = torch.arange(24).reshape(2, 12) % 64
CONFIG = dict(
    r=4,
    lora_alpha=6,
    target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
    rank_pattern={"layers.1.self_attn.q_proj": 2, r"layers\.\d+\.mlp\.up_proj": 8},
    alpha_pattern={"model.layers.0.mlp.down_proj": 3.0, "v_proj": 5},
)


def base_model(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def base(request, tmp_path_factory) -> Path:
    """The base model in several files, with a file that is no weight and one that holds old weights."""
    folder = tmp_path_factory.mktemp("base")
    base_model(request.param).save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("old weights")
    return folder


def loaded(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def adapted(base: Path, **config) -> peft.PeftModel:
    """A PEFT model whose tensors are short sums of powers of two, so that B A is exact in float32."""
    model = peft.get_peft_model(loaded(base), peft.LoraConfig(**{**CONFIG, **config}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randint(-8, 9, parameter.shape).to(parameter.dtype) / 64
    return model.eval()


@pytest.fixture(params=[False, True], ids=["lora", "rslora"])
def original(request, base) -> peft.PeftModel:
    return adapted(base, use_rslora=request.param)


@pytest.fixture
def fakes():
    with Fakes().running() as running:
        yield running


def scalings(model: peft.PeftModel) -> dict[str, float]:
    return {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


def test_peft_s_folder_comes_in_and_goes_out_as_it_was(fakes, base, original, tmp_path):
    original.save_pretrained(tmp_path / "in")
    with TrainerClient(fakes.trainer_address) as trainer:
        run = trainer.import_adapter_weights("alice", tmp_path / "in")
        manifest, content = fakes.trainer.imported["alice"]
        assert run.adapter.lora == LoraConfig.from_proto(manifest.lora)
        assert manifest.base_model_fingerprint == FINGERPRINT
        fakes.trainer.lora = run.adapter.lora
        fakes.trainer.weights = {
            spec.name: np.frombuffer(content, np.float32, spec.size_bytes // 4, spec.offset).reshape(spec.shape)
            for spec in manifest.tensors
        }
        run.export_peft_folder(tmp_path / "out")
        trainer.export_peft_folder("alice", str(tmp_path / "again"))
    assert fakes.trainer.seq_ids() == [0, 1, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "in", "out"]

    lora = run.adapter.lora
    assert lora.rank_pattern == {
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.0.mlp.up_proj": 8,
        "model.layers.1.mlp.up_proj": 8,
    }
    assert lora.alpha_pattern == {
        "model.layers.0.mlp.down_proj": 3.0,
        "model.layers.0.self_attn.v_proj": 5,
        "model.layers.1.self_attn.v_proj": 5,
    }
    expected = scalings(original)
    assert len(expected) == 8
    assert {path: lora.scale(path) for path in expected} == pytest.approx(expected, rel=1e-15)
    state = peft.get_peft_model_state_dict(original)
    assert set(state) == set(fakes.trainer.weights)
    for name, tensor in state.items():
        np.testing.assert_array_equal(fakes.trainer.weights[name], tensor.float().numpy())

    back = peft.PeftModel.from_pretrained(loaded(base), tmp_path / "out").eval()
    assert scalings(back) == pytest.approx(expected, rel=1e-15)
    assert torch.equal(logits(back), logits(original))
    assert not torch.allclose(logits(back), logits(loaded(base)), atol=1e-3)


def test_merged_model_is_what_peft_merges(fakes, base, original, tmp_path):
    original.save_pretrained(tmp_path / "adapter")
    fakes.trainer.lora, fakes.trainer.weights = peft_folder.read(tmp_path / "adapter")
    fakes.trainer.fingerprint = Checkpoint("base", base).fingerprint
    out = tmp_path / "merged"
    command = ["export", "alice", str(out), "--merge", str(base), "--trainer", fakes.trainer_address]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    files = {path.name for path in out.iterdir()}
    assert files == {path.name for path in base.iterdir()} - {"pytorch_model.bin"}
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged"}

    weights, scale = fakes.trainer.weights, fakes.trainer.lora.scale
    before, after = loaded(base).state_dict(), loaded(out).state_dict()
    for name, tensor in before.items():
        path = name.removesuffix(".weight")
        if peft_name(path, "A") in weights:
            b, a = (torch.tensor(weights[peft_name(path, half)]) for half in "BA")
            expected = tensor.float() + (b @ a) * scale(path)
            assert torch.equal(after[name], expected.to(tensor.dtype)), name
            assert not torch.equal(after[name], tensor)
        else:
            assert torch.equal(after[name], tensor), name
    merged = original.merge_and_unload()
    tolerance = 1e-5 if merged.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(logits(loaded(out)), logits(merged), atol=tolerance, rtol=0)
    if merged.dtype == torch.bfloat16:  # PEFT rounds B A before it adds it: one more rounding, one unit at most
        for name, tensor in merged.state_dict().items():
            steps = after[name].view(torch.int16).int() - tensor.view(torch.int16).int()
            assert (steps.abs() <= 1).float().mean() > 0.99, name


def test_bfloat16_is_rounded_as_torch_rounds_it():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (np.arange(65536, dtype=np.uint32) << 16) | 0x8000
    array = np.concatenate([bits, ties, ties - 1, ties + 1]).view(np.float32)
    rounded = tensors.rounded(array, common_pb2.DATA_TYPE_BFLOAT16)
    expected = torch.from_numpy(array).bfloat16().view(torch.uint16).numpy()
    numbers = ~np.isnan(array)
    np.testing.assert_array_equal(rounded[numbers], expected[numbers])
    widened = (rounded.astype(np.uint32) << 16).view(np.float32)
    assert np.isnan(widened[~numbers]).all()


def test_base_model_s_fingerprint_is_the_services(base):
    assert safetensors_file.checkpoint_fingerprint(base) == Checkpoint("base", base).fingerprint


def write_adapter(folder: Path, change=lambda config, weights: None, fingerprint: str = "") -> Path:
    """A good PEFT folder on q_proj, changed."""
    path = "model.layers.0.self_attn.q_proj"
    weights = {peft_name(path, "A"): np.ones((4, 32), np.float32), peft_name(path, "B"): np.ones((32, 4), np.float32)}
    peft_folder.write(folder, LoraConfig(4, 8, ("q_proj",)), weights, "base", fingerprint)
    config = json.loads((folder / "adapter_config.json").read_text())
    change(config, weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with (folder / "adapter_model.safetensors").open("wb") as stream:
        safetensors_file.write(stream, weights, {"base_model_fingerprint": fingerprint})
    return folder


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda config, _: config.update(use_dora=True), "use_dora = True"),
        (lambda config, _: config.update(bias="lora_only"), "bias = 'lora_only'.*only 'none'"),
        (lambda config, _: config.update(modules_to_save=["lm_head"]), r"modules_to_save = \['lm_head'\]"),
        (lambda config, _: config.update(lora_bias=True), "lora_bias = True"),
        (lambda config, _: config.update(fan_in_fan_out=True), "fan_in_fan_out = True"),
        (lambda config, _: config.update(layer_replication=[[0, 2]]), "layer_replication"),
        (lambda config, _: config.update(trainable_token_indices=[1]), "trainable_token_indices"),
        (lambda config, _: config.update(target_parameters=["experts"]), "target_parameters"),
        (lambda config, _: config.update(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
        (lambda config, _: config.update(peft_type="LOHA"), "peft_type = 'LOHA'"),
        (lambda config, _: config.update(some_new_thing={"on": 1}), "some_new_thing"),
        (lambda config, _: config.pop("r"), "has no r"),
        (lambda config, _: config.update(r=2), rf"{Q_PROJ}.lora_A.weight' has shape \[4, 32\].*with rank 2"),
        (lambda config, _: config.update(rank_pattern={"self_attn": 4, "q_proj": 3}), "with rank 3"),
        (lambda _, weights: weights.pop(f"{Q_PROJ}.lora_B.weight"), "lora_A.weight' lacks its other half, lora_B"),
        (lambda _, weights: weights.pop(f"{Q_PROJ}.lora_A.weight"), "lora_B.weight' lacks its other half, lora_A"),
        (lambda _, weights: weights.clear(), "no tensors"),
        *(
            (
                lambda _, weights, name=name: weights.update({name: np.ones((4, 4), np.float32)}),
                f"{name}' is not.*{why}",
            )
            for name, why in (
                (f"{Q_PROJ}.lora_magnitude_vector", "DoRA"),
                ("base_model.model.model.embed_tokens.lora_embedding_A", "embeddings"),
                ("base_model.model.lm_head.modules_to_save.weight", "own weights"),
                ("base_model.model.lm_head.weight", "no such tensor"),
                (f"{Q_PROJ}.lora_B.bias", "biases"),
                ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "tokens"),
                (f"{Q_PROJ}.lora_A.default.weight", "leave the adapter's name out"),
            )
        ),
    ],
)
def test_what_is_not_lora_on_linear_layers_is_refused_by_name(tmp_path, change, complaint):
    peft_folder.read(write_adapter(tmp_path / "good"))
    with pytest.raises(ValueError, match=complaint):
        peft_folder.read(write_adapter(tmp_path / "bad", change))


def test_what_has_no_effect_is_let_in(tmp_path):
    def everything(config, _):
        config.update({**peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1).to_dict(), "layers_to_transform": [0]})
        config.update(peft_type="LORA", target_modules="all-linear", init_lora_weights="gaussian")

    lora, _ = peft_folder.read(write_adapter(tmp_path / "adapter", everything))
    assert lora == LoraConfig(4, 8, ("q_proj",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_every_float_type_come_in_exactly(tmp_path, dtype):
    from safetensors.torch import save_file  # noqa: PLC0415

    folder = write_adapter(tmp_path / "adapter")
    stored = {
        f"{Q_PROJ}.lora_A.weight": torch.randn(4, 32).to(dtype),
        f"{Q_PROJ}.lora_B.weight": torch.randn(32, 4).to(dtype),
    }
    save_file(stored, folder / "adapter_model.safetensors")
    _, weights = peft_folder.read(folder)
    for name, tensor in stored.items():
        assert weights[name].dtype == np.float32
        np.testing.assert_array_equal(weights[name], tensor.float().numpy())


def test_arrays_come_in_with_their_shape(fakes):
    halves = {name: array.astype(np.float16) for name, array in WEIGHTS.items()}
    with TrainerClient(fakes.trainer_address) as trainer:
        run = trainer.import_adapter_weights(
            "alice", halves, rank=8, alpha=4, use_rslora=True, alpha_pattern={"0.mlp.up_proj": 2}
        )
        assert run.adapter.lora.use_rslora
        assert run.adapter.lora.alpha_pattern == {"model.layers.0.mlp.up_proj": 2}
        assert {spec.dtype for spec in fakes.trainer.imported["alice"][0].tensors} == {common_pb2.DATA_TYPE_FLOAT32}
        assert run.import_adapter_weights(WEIGHTS).result().lora == run.adapter.lora
        assert fakes.trainer.seq_ids() == [0, 1]
        with pytest.raises(ValueError, match="need rank and alpha"):
            trainer.import_adapter_weights("bob", WEIGHTS, rank=8)
        with pytest.raises(ValueError, match="dtype float64"):
            run.import_adapter_weights({f"{Q_PROJ}.lora_A.weight": np.ones((8, 2))})
        with pytest.raises(ValueError, match="dtype int32"):
            run.import_adapter_weights({f"{Q_PROJ}.lora_A.weight": np.ones((8, 2), np.int32)})
        run.optim_step().result()
    assert fakes.trainer.seq_ids() == [0, 1, 2]


def test_folder_says_its_shape_itself(fakes, tmp_path):
    folder = write_adapter(tmp_path / "adapter")
    with TrainerClient(fakes.trainer_address) as trainer, pytest.raises(ValueError, match="says rank and alpha"):
        trainer.import_adapter_weights("alice", folder, rank=4, alpha=8)


async def test_import_and_export_over_asyncio(fakes, tmp_path):
    async with tinkerbell.AsyncTrainerClient(fakes.trainer_address) as trainer:
        run = await trainer.import_adapter_weights("alice", write_adapter(tmp_path / "in"))
        assert (await run.import_adapter_weights(tmp_path / "in")).lora.rank == 4
        await run.export_peft_folder(tmp_path / "out")
    assert fakes.trainer.seq_ids() == [0, 1, 2]
    lora, weights = peft_folder.read(tmp_path / "out")
    assert lora == LORA
    assert list(weights) == list(WEIGHTS)


def test_file_that_is_no_safetensors_file_is_named(tmp_path):
    folder = write_adapter(tmp_path / "adapter")
    for content in (b"", b"12345678", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 16):
        (folder / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a safetensors file"):
            peft_folder.read(folder)


@pytest.mark.parametrize(
    ("fingerprint", "path", "shape", "complaint"),
    [
        ("0" * 64, "model.layers.0.self_attn.q_proj", 32, "the adapter belongs to a base model with 000000000000…"),
        ("", "model.layers.7.self_attn.q_proj", 32, r"no tensor 'model\.layers\.7\.self_attn\.q_proj\.weight'"),
        ("", "model.layers.0.self_attn.q_proj", 8, r"has shape \[32, 32\] in .* and \[8, 32\] in the adapter"),
    ],
)
def test_merge_refuses_another_base_model(base, tmp_path, fingerprint, path, shape, complaint):
    weights = {
        peft_name(path, "A"): np.ones((4, 32), np.float32),
        peft_name(path, "B"): np.ones((shape, 4), np.float32),
    }
    peft_folder.write(tmp_path / "adapter", LoraConfig(4, 8, ("q_proj",)), weights, "base", fingerprint)
    with pytest.raises(ValueError, match=complaint):
        merge.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["adapter"]


def test_merge_that_fails_leaves_nothing(base, tmp_path):
    write_adapter(tmp_path / "adapter")

    def stop(written, total):
        assert 0 < written < total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge.merge(base, tmp_path / "adapter", tmp_path / "out", stop)
    assert [child.name for child in tmp_path.iterdir()] == ["adapter"]


def test_export_names_what_is_in_the_way(fakes, tmp_path):
    shutil.copytree(write_adapter(tmp_path / "one"), tmp_path / "two")
    result = CliRunner().invoke(app, ["export", "alice", str(tmp_path / "two"), "--trainer", fakes.trainer_address])
    assert result.exit_code == 1
    assert "two exists" in result.output
    result = CliRunner().invoke(app, ["export", "alice", str(tmp_path / "new"), "--trainer", fakes.trainer_address])
    assert result.exit_code == 0, result.output
    assert peft_folder.read(tmp_path / "new")[0] == LORA
    assert peft_folder.base_model_fingerprint(tmp_path / "new") == FINGERPRINT
