import copy
import json
import logging
import warnings

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from gradpruner.common.errors import ConfigError, DataError, NonFiniteError, ResourceError
from gradpruner.data.encoding import Collator, encode, encode_all
from gradpruner.data.examples import Example, Message
from gradpruner.evaluation.metrics import Interval
from gradpruner.evaluation.quality import evaluate
from gradpruner.evaluation.questions import Questions

TEXT = "the cat sat on a mat dog ran in fog is it true yes no not sure user assistant"
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "<turn>", *TEXT.split()]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} <turn> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def example(number, prompt, answer, choices=("yes", "no", "not sure")):
    return Example(id=f"t:{number}", prompt=prompt, answer=answer, choices=choices)


EXAMPLES = [
    example(0, "the cat sat on a mat", "yes"),
    example(1, "the dog ran", "no"),
    example(2, "is it true", "not sure"),
    example(3, "a cat ran in the fog on a mat is it", "no"),
    example(4, "dog", "yes"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # For models this small, waiting for other threads takes longer than the work.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = FastTokenizer(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<turn>"],
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def llama(**changes):
    torch.manual_seed(0)
    fields = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # Wide enough for a random model to have preferences.
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(fields | changes))).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


def teach(model, tokenizer, examples, steps=60):
    batch = Collator(tokenizer)(list(encode_all(tokenizer, examples, 64)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def taught(tokenizer):
    return teach(llama(), tokenizer, EXAMPLES)


def greedy_by_hand(model, ids, num_tokens, end=2):
    """Greedy decoding without batch, padding or cache."""
    new = []
    with torch.no_grad():
        for _ in range(num_tokens):
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == end:
                break
            new.append(token)
    return new


def likelihood_by_hand(model, prompt, target):
    with torch.no_grad():
        log_probabilities = model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
    return sum(float(log_probabilities[len(prompt) + i - 1, t]) for i, t in enumerate(target))


def test_a_model_that_learned_the_task(taught, tokenizer):
    result = evaluate(taught, tokenizer, EXAMPLES, batch_size=2)
    assert result.metrics["exact_match"] == Interval(value=1.0, low=1.0, high=1.0, n=5)
    assert result.metrics["choice_accuracy"].value == 1.0
    assert [output.generated for output in result.outputs] == [e.answer for e in EXAMPLES]
    assert all(output.finished for output in result.outputs)
    assert [output.id for output in result.outputs] == ["t:0", "t:1", "t:2", "t:3", "t:4"]
    assert result.outputs[1].prompt_tail == "<s> the dog ran"
    assert result.seconds > 0
    assert result.tokens_per_second > 0
    assert result.peak_memory_bytes > 0


def test_a_mix_of_right_and_wrong_answers(taught, tokenizer):
    swapped = [example(0, "the dog ran", "yes"), *EXAMPLES[:3]]
    result = evaluate(taught, tokenizer, swapped)
    assert result.metrics["exact_match"].value == 0.75
    assert result.metrics["choice_accuracy"].value == 0.75
    assert result.metrics["exact_match"].low < 0.75
    wrong = result.outputs[0]
    assert (wrong.correct, wrong.generated, wrong.chosen, wrong.choice_correct) == (
        False,
        "no",
        "no",
        False,
    )


@pytest.mark.parametrize("make", [llama, gpt2])
def test_agrees_with_one_at_a_time(make, tokenizer):
    """With GPT-2's absolute positions, a wrong mask or position would change the answers."""
    model = make()
    result = evaluate(model, tokenizer, EXAMPLES, batch_size=4, max_new_tokens=5)
    for output, asked in zip(result.outputs, EXAMPLES, strict=True):
        prompt = tokenizer.encode(asked.prompt)
        by_hand = greedy_by_hand(model, prompt, 5)
        assert output.generated == tokenizer.decode(by_hand, skip_special_tokens=True)
        assert output.finished == (len(by_hand) < 5)
        targets = [[*tokenizer.encode(choice, add_special_tokens=False), 2] for choice in asked.choices]
        scores = [likelihood_by_hand(model, prompt, target) for target in targets]
        assert output.choice_scores == pytest.approx(scores, abs=1e-4)
        assert output.chosen == asked.choices[scores.index(max(scores))]
        per_character = [score / len(c) for score, c in zip(scores, asked.choices, strict=True)]
        best = asked.choices[per_character.index(max(per_character))]
        assert output.normalised_correct == (best == asked.answer)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_neither_batch_size_nor_padding_side_matters(make, tokenizer):
    model = make()
    results = []
    for side, batch_size in [("left", 1), ("right", 3), ("left", 32)]:
        tokenizer.padding_side = side
        results.append(evaluate(model, tokenizer, EXAMPLES, batch_size=batch_size).outputs)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one.generated == two.generated
            assert one.choice_scores == pytest.approx(two.choice_scores, abs=1e-4)


def test_the_models_own_generation_config_is_ignored(taught, tokenizer):
    own = taught.generation_config
    saved = own.to_dict()
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    own.update(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=5.0, min_new_tokens=3)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = evaluate(taught, tokenizer, EXAMPLES, metrics=["exact_match"])
        assert taught.generation_config is own
        assert own.temperature == 0.6
    finally:
        logging.getLogger("transformers").removeHandler(handler)
        taught.generation_config = type(own).from_dict(saved)
    assert result.metrics["exact_match"].value == 1.0
    assert [record.getMessage() for record in records] == []


def test_training_mode_is_restored_for_every_module(tokenizer):
    model = llama(attention_dropout=0.9)
    model.train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    twice = [evaluate(model, tokenizer, EXAMPLES).outputs for _ in range(2)]
    assert twice[0] == twice[1]  # No dropout while evaluating.
    assert [module.training for module in model.modules()] == modes
    model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()


def test_training_mode_is_restored_after_an_error(tokenizer):
    model = llama()
    model.train()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN"):
        evaluate(model, tokenizer, EXAMPLES, metrics=["choice_likelihood"])
    assert all(module.training for module in model.modules())


def test_adapters(taught, tokenizer):
    peft = pytest.importorskip("peft")
    plain = evaluate(taught, tokenizer, EXAMPLES).outputs
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(taught), config)
    with adapted.disable_adapter():
        assert [o.generated for o in evaluate(adapted, tokenizer, EXAMPLES).outputs] == [
            o.generated for o in plain
        ]
    changed = evaluate(adapted, tokenizer, EXAMPLES).outputs
    prompt = tokenizer.encode(EXAMPLES[0].prompt)
    yes = [VOCABULARY.index("yes"), 2]
    assert changed[0].choice_scores[0] == pytest.approx(likelihood_by_hand(adapted, prompt, yes), abs=1e-4)
    assert changed[0].choice_scores != pytest.approx(plain[0].choice_scores, abs=1e-2)


def test_a_model_without_logits_to_keep(taught, tokenizer):
    class Plain(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    plain = Plain(taught.config)
    plain.load_state_dict(taught.state_dict())
    few, all_ = (
        evaluate(model, tokenizer, EXAMPLES, metrics=["choice_likelihood"]).outputs
        for model in (taught, plain)
    )
    for one, two in zip(few, all_, strict=True):
        assert one.choice_scores == pytest.approx(two.choice_scores, abs=1e-4)


def test_a_long_prompt_is_cut_as_in_training(taught, tokenizer):
    long = example(9, "fog " * 200 + "the dog ran", "no", ("yes", "no"))
    options = Questions(tokenizer, [long], max_length=64).option_set(0)
    rows = [options.prompt + target for target in options.targets]
    assert rows == [
        encode(tokenizer, example(9, long.prompt, choice), 64).input_ids for choice in ("yes", "no")
    ]
    assert len(rows[0]) == 64  # The model's positions.
    assert rows[0][0] == 1  # The start token stays.
    output = evaluate(taught, tokenizer, [long], max_new_tokens=4).outputs[0]
    prompt = tokenizer.encode(long.prompt)
    cut = [1, *prompt[-59:]]
    assert output.generated == tokenizer.decode(greedy_by_hand(taught, cut, 4))
    assert output.choice_scores[1] == pytest.approx(
        likelihood_by_hand(taught, rows[1][:62], rows[1][62:]), abs=1e-4
    )


def test_questions_serve_evaluations_of_any_length_and_are_tokenised_once(taught, tokenizer, monkeypatch):
    examples = [*EXAMPLES, example(9, "fog " * 200 + "the dog ran", "no")]
    asked = Questions(tokenizer, examples, max_length=500)
    changes = [{"max_length": 40}, {"max_length": 40, "score_ends": False}, {"max_length": 64}]
    anew = [evaluate(taught, tokenizer, examples, **change).outputs for change in changes]
    monkeypatch.setattr("gradpruner.evaluation.questions.prompt_ids", None)
    assert [evaluate(taught, tokenizer, asked, **change).outputs for change in changes] == anew
    assert asked.max_length == 500 and asked.score_ends


def test_no_room_for_the_prompt(taught, tokenizer):
    with pytest.raises(ConfigError, match=r"80 tokens .* 64 tokens"):
        evaluate(taught, tokenizer, EXAMPLES, max_new_tokens=80)


def test_conversations_end_where_the_template_says(tokenizer):
    def chat(number, question, answer):
        turns = (Message("user", question), Message("assistant", answer))
        return Example(f"c:{number}", "", answer, ("yes", "no", "not sure"), turns)

    chats = [chat(0, "the cat sat", "yes"), chat(1, "the dog ran", "not sure")]
    model = teach(llama(), tokenizer, chats)
    result = evaluate(model, tokenizer, chats)
    assert [output.generated for output in result.outputs] == ["yes", "not sure"]
    assert result.metrics["exact_match"].value == 1.0
    assert all(output.finished for output in result.outputs)
    assert result.metrics["choice_accuracy"].value == 1.0
    prompt = tokenizer.encode("user the cat sat <turn> assistant", add_special_tokens=False)
    yes = [VOCABULARY.index("yes"), VOCABULARY.index("<turn>")]
    assert result.outputs[0].choice_scores[0] == pytest.approx(
        likelihood_by_hand(model, prompt, yes), abs=1e-4
    )


def test_an_option_that_is_a_prefix_of_another_is_scored_as_complete(tokenizer):
    choices = ("not", "not sure")
    longer = [example(0, "is it true", "not sure", choices)]
    output = evaluate(teach(llama(), tokenizer, longer), tokenizer, longer).outputs[0]
    # Without the end token "not" could never score below "not sure".
    assert output.chosen == "not sure"


def test_unfinished_answers_are_marked(taught, tokenizer):
    output = evaluate(taught, tokenizer, [EXAMPLES[2]], max_new_tokens=1).outputs[0]
    assert (output.generated, output.finished, output.correct) == ("not", False, False)


def test_options_are_scored_only_if_every_example_has_them(taught, tokenizer):
    mixed = [*EXAMPLES, example(5, "the dog ran", "no", ())]
    result = evaluate(taught, tokenizer, mixed)
    assert list(result.metrics) == ["exact_match"]
    assert result.outputs[0].choice_scores is None
    with pytest.raises(ConfigError, match="options"):
        evaluate(taught, tokenizer, mixed, metrics=["choice_likelihood"])


def test_choice_likelihood_alone_generates_nothing(taught, tokenizer):
    result = evaluate(taught, tokenizer, EXAMPLES, metrics=["choice_likelihood"])
    assert list(result.metrics) == ["choice_accuracy", "choice_accuracy_normalised"]
    assert result.tokens_per_second is None
    assert result.outputs[0].generated is None


def test_a_tokenizer_without_padding_token(taught, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert evaluate(taught, bare, EXAMPLES).metrics["exact_match"].value == 1.0


def test_summary_and_examples_on_disk(taught, tokenizer, tmp_path):
    result = evaluate(taught, tokenizer, EXAMPLES)
    summary = json.loads(json.dumps(result.summary("variants/dense/examples.jsonl")))
    assert list(summary) == [
        "metrics",
        "seconds",
        "tokens_per_second",
        "peak_memory_bytes",
        "per_example",
        "details",
    ]
    assert set(summary["metrics"]["exact_match"]) == {"value", "low", "high", "n"}
    path = tmp_path / "new" / "examples.jsonl"
    result.write_examples(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == [e.id for e in EXAMPLES]
    assert rows[2]["generated"] == "not sure"
    assert len(rows[2]["choice_scores"]) == 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"examples": []}, DataError, "no examples"),
        ({"metrics": ["exact_mach"]}, ConfigError, r"metrics\.0: .*'exact_match'"),
        ({"batch_size": 0}, ConfigError, r"batch_size: .*equal to 1 \(given: 0\)"),
        ({"examples": [example(3, "dog", "maybe")]}, DataError, "t:3"),
    ],
)
def test_bad_requests(taught, tokenizer, changes, error, message):
    arguments = {"examples": EXAMPLES} | changes
    with pytest.raises(error, match=message):
        evaluate(taught, tokenizer, **arguments)


def test_empty_prompt(taught, tokenizer, monkeypatch):
    monkeypatch.setattr("gradpruner.evaluation.questions.prompt_ids", lambda *_: [])
    with pytest.raises(DataError, match="t:0, t:1, t:2"):
        evaluate(taught, tokenizer, EXAMPLES)


def test_running_out_of_memory(taught, tokenizer, monkeypatch):
    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(taught, "generate", fail)
    with pytest.raises(ResourceError, match="batch size of 7"):
        evaluate(taught, tokenizer, EXAMPLES, batch_size=7)
