"""Every command and every Python block of the README runs as written, on a tiny model."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from typer.testing import CliRunner

from gradpruner.cli.main import app
from gradpruner.data.encoding import Collator

README = Path(__file__).parents[2] / "README.md"
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "sky", "sea", "is", "blue", "deep", "the", ":"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README's reader has it: a model, and training and test rows."""
    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "my-model")
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "my-model")
    for name, count in (("train", 24), ("test", 8)):
        rows = [
            {"prompt": f"the {thing} {'is ' * (i % 5)}:", "completion": answer}
            for i in range(count // 2)
            for thing, answer in (("sky", "blue"), ("sea", "deep"))
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_the_two_commands_come_first_and_are_make_targets() -> None:
    first = blocks("bash")[0].splitlines()
    assert [line.split()[:2] for line in first] == [["make", "run"], ["make", "test"]]
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in ("run", "test"))
    assert (README.parent / ".ci" / "run").read_text(encoding="utf-8").strip().endswith("make test")


@pytest.fixture(scope="module")
def ran(place: Path) -> list[list[str]]:
    """The commands, carried out in order; a fixture, because tests may run in different processes."""
    found = [command for command in commands() if command[0] == "gradpruner"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for command in found:
            done = CliRunner().invoke(app, command[1:], catch_exceptions=False)
            assert done.exit_code == 0, (command, done.output)
    return found


def test_every_gradpruner_command_runs_in_order(place: Path, ran: list[list[str]]) -> None:
    assert len(ran) >= 6
    for name in ("run.json", "report.html", "manifest.json", "variants/either/model/model.safetensors"):
        assert (place / "runs" / "mine" / name).is_file()


@pytest.mark.parametrize("kind", ["methods", "tasks", "recipes", "rules"])
def test_the_listed_kinds_exist(kind: str) -> None:
    done = CliRunner().invoke(app, ["ls", kind])
    assert done.exit_code == 0 and done.output.strip()


@pytest.mark.usefixtures("ran")
def test_the_python_blocks_run(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(place)
    peft_model = get_peft_model(
        LlamaForCausalLM.from_pretrained("my-model"), LoraConfig(target_modules="all-linear")
    )
    rows = [{"input_ids": [1, 9, 4, 6, 10, 7, 2], "labels": [-100] * 5 + [7, 2]} for _ in range(8)]
    trainer = Trainer(
        model=peft_model,
        args=TrainingArguments(
            str(tmp_path), max_steps=40, use_cpu=True, report_to="none", save_strategy="no",
            per_device_train_batch_size=2, disable_tqdm=True, learning_rate=1e-3,
        ),
        train_dataset=rows,
        data_collator=Collator(),
    )  # fmt: skip
    names: dict[str, Any] = {"trainer": trainer}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    # The first plan for runs/mine prunes two of four layers; what the README plans later has rows of its own.
    assert names["base_model"].config.num_hidden_layers == 4 - len(names["plan"].pruned) == 2
    assert not any("lora" in name for name in names["base_model"].state_dict())
    assert LlamaForCausalLM.from_pretrained("my-model-small").config.num_hidden_layers == 2
