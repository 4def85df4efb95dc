"""A checkpoint opens only if everything in its folder fits together; what does not fit is named."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.checkpoints import SAMPLES, edit_config, read_config, write_checkpoint
from tests.engines import build_for_test
from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.base import QuantizedBlocks
from trt_kv.export.checkpoints.huggingface import INDEX_FILE, SINGLE_FILE, open_huggingface
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.checkpoints.tensor_matching import EMBEDDING, OUTPUT
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.export.engine import EngineRequest, build_engine
from trt_kv.manifest import load_manifest
from trt_kv.model_config import ModelConfig
from trt_kv.policies import policy_from_name
from trt_kv.presets import preset

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def masters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One single-file and one sharded copy of the same model, not to be written to."""
    folder = tmp_path_factory.mktemp("masters")
    return {
        "single": write_checkpoint(folder / "single"),
        "sharded": write_checkpoint(folder / "sharded", shard_size="40KB"),
        "tied": write_checkpoint(folder / "tied", "llama-tied"),
    }


@pytest.fixture
def single(masters: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(masters["single"], tmp_path / "single"))


@pytest.fixture
def sharded(masters: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(masters["sharded"], tmp_path / "sharded"))


@pytest.fixture
def tied(masters: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(masters["tied"], tmp_path / "tied"))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    edit(tensors)
    save_file(tensors, folder / SINGLE_FILE)


def refusal(folder: Path) -> CheckpointError:
    """The error that opening ``folder`` ends in; it says what was expected."""
    with pytest.raises(CheckpointError) as caught:
        open_huggingface(folder)
    assert caught.value.expected is not None
    return caught.value


def test_tensors_are_those_that_were_saved_in_their_dtype(single: Path) -> None:
    checkpoint = open_huggingface(single)
    saved = load_file(single / SINGLE_FILE)
    assert set(checkpoint.tensor_names) == set(saved)
    for name in checkpoint.tensor_names:
        torch.testing.assert_close(checkpoint.tensor(name), saved[name], atol=0.0, rtol=0.0)


def test_sharding_changes_neither_tensors_nor_digest(single: Path, sharded: Path) -> None:
    one, many = open_huggingface(single), open_huggingface(sharded)
    assert len({tensor.path for tensor in many.stored.values()}) > 2
    assert one.digest == many.digest
    assert all(torch.equal(one.tensor(name), many.tensor(name)) for name in one.tensor_names)


def test_the_digest_is_of_known_form_and_stable_for_the_bundled_checkpoint() -> None:
    checkpoint = open_huggingface(preset("llama3").bundled_folder)
    assert checkpoint.digest.startswith("sha256:")
    assert len(checkpoint.digest) == len("sha256:") + hashlib.sha256().digest_size * 2
    assert checkpoint.name == "llama3-tiny"


def test_the_digest_changes_with_any_weight_and_with_the_arithmetic_but_not_with_labels(single: Path) -> None:
    digests = [open_huggingface(single).digest]
    edit_config(single, eos_token_id=5, torch_dtype="bfloat16")
    assert open_huggingface(single).digest == digests[0]
    edit_config(single, rms_norm_eps=1e-4)
    digests.append(open_huggingface(single).digest)
    edit_tensors(single, lambda tensors: tensors[Q_PROJ].view(-1)[-1].add_(1.0))
    digests.append(open_huggingface(single).digest)
    assert len(set(digests)) == 3


def test_end_tokens_of_both_configs_are_joined(single: Path) -> None:
    (single / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2, 4]}))
    assert open_huggingface(single).eos_token_ids == (2, 9, 4)
    (single / "generation_config.json").unlink()
    assert open_huggingface(single).eos_token_ids == (2,)


def test_tokenizer_files_are_listed_as_far_as_they_exist(single: Path) -> None:
    (single / "additional_chat_templates").mkdir()
    templates = {"chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"}
    for name in templates:
        (single / name).touch()
    names = set(open_huggingface(single).tokenizer_files)
    assert names == templates | {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_hub_snapshot_is_named_after_its_repository(single: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some-org--some--model" / "snapshots" / "abc123"
    shutil.copytree(single, snapshot)
    assert open_huggingface(snapshot).name == "some-org/some--model"


BUFFERS = {
    "model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 8, 4),
    "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    "model.layers.0.attn.masked_bias": torch.tensor(-1e9),
    "model.layers.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_old_buffers_are_ignored_whatever_their_type(name: str, tied: Path) -> None:
    digest = open_huggingface(tied).digest
    edit_tensors(tied, lambda tensors: tensors.update({name: BUFFERS[name]}))
    assert open_huggingface(tied).digest == digest


@pytest.mark.parametrize(
    ("embedding", "head"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_a_copy_of_the_tied_embedding_may_have_another_type(embedding: torch.dtype, head: torch.dtype, tied: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EMBEDDING] = tensors[EMBEDDING].to(embedding)
        tensors[OUTPUT] = tensors[EMBEDDING].to(head, copy=True)

    edit_tensors(tied, add)
    assert OUTPUT not in open_huggingface(tied).tensor_names
    edit_tensors(tied, lambda tensors: tensors[OUTPUT].view(-1)[-1].add_(1.0))
    error = refusal(tied)
    assert "also has another output matrix" in error.what
    assert f"{OUTPUT} with other values than {EMBEDDING}" in str(error.got)
    edit_tensors(tied, lambda tensors: tensors.update({OUTPUT: torch.ones(3, 48)}))
    assert "another shape ([3, 48], not [269, 48])" in str(refusal(tied).got)


def test_weights_in_float64_are_read(single: Path) -> None:
    edit_tensors(single, lambda tensors: tensors.update({name: tensor.double() for name, tensor in tensors.items()}))
    checkpoint = open_huggingface(single)
    assert decoder_from_checkpoint(checkpoint).state_dict()[Q_PROJ].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_other_types_are_refused(dtype: torch.dtype, single: Path) -> None:
    edit_tensors(single, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(dtype)}))
    error = refusal(single)
    assert f"{Q_PROJ!r}" in error.what
    assert "unquantised" in str(error.fix)


def test_a_tied_model_saved_without_its_head_is_read(tied: Path) -> None:
    """Its names lack a prefix; transformers adds it."""
    digest = open_huggingface(tied).digest
    saved = load_file(tied / SINGLE_FILE)
    edit_config(tied, architectures=["LlamaModel"])
    save_file({name.removeprefix("model."): tensor for name, tensor in saved.items()}, tied / SINGLE_FILE)
    checkpoint = open_huggingface(tied)
    assert checkpoint.digest == digest
    torch.testing.assert_close(checkpoint.tensor(Q_PROJ), saved[Q_PROJ], atol=0.0, rtol=0.0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tied)
    torch.testing.assert_close(theirs.state_dict()[Q_PROJ], saved[Q_PROJ], atol=0.0, rtol=0.0)
    edit_config(tied, tie_word_embeddings=False)
    assert '"tie_word_embeddings": true' in str(refusal(tied).fix)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_the_names_of_a_wrapped_model_are_refused_with_their_prefix(prefix: str, single: Path) -> None:
    saved = load_file(single / SINGLE_FILE)
    save_file({prefix + name: tensor for name, tensor in saved.items()}, single / SINGLE_FILE)
    assert f"the names begin with {prefix!r}" in str(refusal(single).fix)


def test_weights_under_another_name_are_told(single: Path) -> None:
    (single / SINGLE_FILE).rename(single / "consolidated.safetensors")
    assert "consolidated.safetensors" in str(refusal(single).got)


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_sample_opens(sample: str, tmp_path: Path) -> None:
    assert open_huggingface(write_checkpoint(tmp_path, sample)).config.vocab_size == 269


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").got == str(tmp_path / "nowhere")


def test_a_missing_config(single: Path) -> None:
    (single / "config.json").unlink()
    assert "config.json is missing" in refusal(single).what


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_damaged_json_file_is_named(single: Path, name: str, text: str) -> None:
    (single / name).write_bytes(text.encode("latin-1"))
    assert name in refusal(single).what


def test_missing_weights(single: Path) -> None:
    (single / SINGLE_FILE).unlink()
    error = refusal(single)
    assert "safetensors only" in str(error.expected)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_and_never_opened(single: Path, name: str) -> None:
    (single / SINGLE_FILE).unlink()
    (single / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    error = refusal(single)
    assert name in str(error.got)
    assert "safetensors only" in str(error.expected)
    assert "save_pretrained" in str(error.fix)


def test_a_damaged_weight_file_is_named(single: Path) -> None:
    path = single / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(single).what == f"{path} is truncated or damaged"


def test_a_missing_tensor_is_named(single: Path) -> None:
    edit_tensors(single, lambda tensors: tensors.pop(Q_PROJ))
    assert f"missing {Q_PROJ}; left over nothing" in str(refusal(single).got)


def test_a_left_over_tensor_is_named(single: Path) -> None:
    edit_tensors(single, lambda tensors: tensors.update({"model.layers.3.more": torch.ones(1)}))
    assert "missing nothing; left over model.layers.3.more" in str(refusal(single).got)


def test_a_tensor_of_the_wrong_shape_is_named(single: Path) -> None:
    edit_tensors(single, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].T.contiguous()}))
    error = refusal(single)
    assert Q_PROJ in error.what
    assert (error.got, error.expected) == ([48, 96], [96, 48])


def test_a_config_of_another_vocabulary_is_refused(single: Path) -> None:
    edit_config(single, vocab_size=300)
    error = refusal(single)
    assert "model.embed_tokens.weight" in error.what
    assert (error.got, error.expected) == ([269, 48], [300, 48])


def test_a_config_of_more_layers_is_refused(single: Path) -> None:
    edit_config(single, num_hidden_layers=4)
    assert "missing model.layers.3.input_layernorm.weight" in str(refusal(single).got)


def test_a_config_that_unties_a_tied_model_is_refused(tied: Path) -> None:
    edit_config(tied, tie_word_embeddings=False)
    assert "missing lm_head.weight" in str(refusal(tied).got)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(single: Path) -> None:
    tokenizer = json.loads((single / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 269})
    (single / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = refusal(single)
    assert "larger vocabulary" in error.what
    assert error.got == "token ids up to 269"


def test_generation_config_with_an_end_token_outside_the_vocabulary_is_refused(single: Path) -> None:
    (single / "generation_config.json").write_text('{"eos_token_id": [2, 269]}')
    assert refusal(single).got == [269]


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_missing_shards_are_named(sharded: Path) -> None:
    gone = shards_of(sharded)[1]
    gone.unlink()
    assert f"missing {gone.name}" in str(refusal(sharded).got)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = shards_of(sharded)[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refusal(sharded).what == f"{shard} is truncated or damaged"


def test_swapped_shards_are_refused(sharded: Path) -> None:
    first, second = shards_of(sharded)[:2]
    first.rename(sharded / "aside")
    second.rename(first)
    (sharded / "aside").rename(second)
    error = refusal(sharded)
    assert f"{first} is not the shard" in error.what
    assert "swapped" in str(error.fix)


def test_an_index_that_lists_a_tensor_its_shard_does_not_hold_is_refused(sharded: Path) -> None:
    edit_index(sharded, lambda shard_of: shard_of.update({"model.more": shards_of(sharded)[0].name}))
    assert "model.more not in the file" in str(refusal(sharded).got)


def test_an_index_may_leave_out_tensors_of_its_shards(sharded: Path) -> None:
    """As in transformers, which reads whole shards: a weight is found, anything else does not matter."""
    digest = open_huggingface(sharded).digest
    edit_index(sharded, lambda shard_of: shard_of.pop(Q_PROJ))
    shard = shards_of(sharded)[0]
    save_file({**load_file(shard), "model.more": torch.ones(1)}, shard)
    assert open_huggingface(sharded).digest == digest


def test_of_two_copies_the_index_decides(sharded: Path) -> None:
    digest = open_huggingface(sharded).digest
    shard = next(path for path in shards_of(sharded) if Q_PROJ not in load_file(path))
    save_file({**load_file(shard), Q_PROJ: torch.zeros(96, 48)}, shard)
    assert open_huggingface(sharded).digest == digest


@pytest.mark.parametrize("shard", ["../outside.safetensors", 3, ".."])
def test_an_index_that_points_out_of_the_folder_is_refused(sharded: Path, shard: object) -> None:
    edit_index(sharded, lambda shard_of: shard_of.update({Q_PROJ: shard}))  # type: ignore[dict-item]
    error = refusal(sharded)
    assert INDEX_FILE in error.what or "cannot read" in error.what


def test_an_index_without_a_weight_map_is_refused(sharded: Path) -> None:
    (sharded / INDEX_FILE).write_text("{}")
    assert "no usable weight_map" in refusal(sharded).what


def test_a_config_from_another_checkpoint_is_refused(single: Path, tied: Path) -> None:
    (single / "config.json").write_text(json.dumps(read_config(tied)))
    assert "from the same checkpoint" in str(refusal(single).fix)


def test_a_file_that_changes_after_opening_is_an_error_and_not_a_crash(single: Path) -> None:
    checkpoint = open_huggingface(single)
    (single / SINGLE_FILE).write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot read tensor"):
        checkpoint.tensor(Q_PROJ)
    with pytest.raises(CheckpointError, match="became shorter"):
        assert checkpoint.digest


@dataclass(frozen=True, kw_only=True)
class CheckpointInMemory:
    """What the protocol ``Checkpoint`` asks for and nothing else, as another format would have it."""

    location: Path
    name: str
    config: ModelConfig
    eos_token_ids: tuple[int, ...]
    tokenizer_file: Path
    tokenizer_files: Mapping[str, Path]
    digest: str
    tensors: Mapping[str, torch.Tensor]

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def scheme(self, name: str) -> str | None:
        return None

    def quantized(self, name: str) -> QuantizedBlocks | None:
        return None


def test_an_engine_is_built_from_whatever_fulfils_the_protocol(small_checkpoint_folder: Path, tmp_path: Path) -> None:
    stored = open_checkpoint(small_checkpoint_folder)
    in_memory = CheckpointInMemory(
        location=tmp_path / "weights",
        name=stored.name,
        config=stored.config,
        eos_token_ids=stored.eos_token_ids,
        tokenizer_file=stored.tokenizer_file,
        tokenizer_files=stored.tokenizer_files,
        digest=stored.digest,
        tensors={name: stored.tensor(name).clone() for name in stored.tensor_names},
    )
    policy = policy_from_name("full")
    build_for_test(EngineRequest(checkpoint=stored, policy=policy), tmp_path / "stored")
    build_engine(EngineRequest(checkpoint=in_memory, policy=policy), tmp_path / "in_memory")
    assert load_manifest(tmp_path / "in_memory") == load_manifest(tmp_path / "stored")
