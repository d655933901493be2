"""A tiny random model with a byte tokenizer, saved as a model directory, and a way to run commands on it."""

from pathlib import Path

import torch
import transformers as tr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner, Result

from attnsieve.cli import app


def save_tiny_model(folder: Path, *, layers: int = 2, heads: int = 4, head_dim: int = 8, positions: int = 512) -> Path:
    """A Llama of two layers with random weights; one token per byte."""
    torch.manual_seed(0)
    config = tr.LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=head_dim,
        max_position_embeddings=positions,
        bos_token_id=256,
        eos_token_id=None,
    )
    tr.LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {"<s>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tr.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return folder


def attnsieve(*arguments: object) -> Result:
    """Run one command. Exceptions other than exits are raised."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def refused(*arguments: object) -> str:
    """What a command that must fail says: one sentence on stderr, exit code 2, nothing on stdout."""
    done = attnsieve(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    # transformers shows a progress bar where a model had to be loaded first.
    sentences = [line for line in done.stderr.splitlines() if "Loading weights" not in line and line]
    assert len(sentences) == 1, done.stderr
    assert sentences[0].startswith("attnsieve: ")
    return sentences[0]


def make_folder(folder: Path) -> Path:
    """`folder` with a model, a profile of it and a plan from that, made by the commands themselves."""
    save_tiny_model(folder / "model")
    (folder / "text.txt").write_text("All that is gold does not glitter, not all those who wander are lost. " * 20)
    (folder / "empty.txt").write_text(" \n")
    common = ["--pcl", 16, "--lengths", "32", "--documents", 3]
    made = attnsieve("profile", folder / "model", "--data", folder / "text.txt", *common, "--out", folder / "profile")
    assert made.exit_code == 0, made.output
    made = attnsieve("fit", folder / "profile", "--preset", "paper", "--tau", 0.35, "--out", folder / "plan")
    assert made.exit_code == 0, made.output
    return folder
