"""Options that share a prompt get the same scores as alone, or they do not share it."""

import pytest
import torch
from families import make_family_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from gradpruner.evaluation.likelihood import OptionScorer, OptionSet, Rows

SETS = [
    OptionSet([5, 9, 3, 7], [[4, 6, 2], [8, 2], [11, 12, 13, 2]]),
    OptionSet([9, 3], [[4, 2], [5, 6, 7, 8, 2]]),
    OptionSet([1, 2, 3, 4, 5, 6, 7, 8], [[9], [10]]),
]


def one_by_one(model, sets):
    scores = []
    for one in sets:
        scores.append([])
        for target in one.targets:
            with torch.no_grad():
                logits = model(torch.tensor([one.prompt + target])).logits[0].log_softmax(-1)
            places = range(len(one.prompt) - 1, len(one.prompt) + len(target) - 1)
            scores[-1].append(sum(float(logits[p, t]) for p, t in zip(places, target, strict=True)))
    return scores


def scored(model, sets, batch_size=32):
    scorer = OptionScorer(model, 0, batch_size)
    found = {}
    for batch, scores in scorer.score(sets):
        found |= dict(zip(batch, scores, strict=True))
    return scorer, [found[i] for i in range(len(sets))]


def flat(scores):
    return [value for row in scores for value in row]


def test_the_layout_of_one_example():
    rows = Rows([OptionSet([5, 6], [[7, 8, 2], [9, 2]]), OptionSet([4], [[3]])], pad_id=0)
    assert rows.ids.tolist() == [[5, 6, 7, 8, 9], [4, 0, 0, 0, 0]]
    assert rows.positions.tolist()[0] == [0, 1, 2, 3, 2]
    assert rows.segments.tolist() == [[0, 0, 1, 1, 2], [0, -1, -1, -1, -1]]
    assert rows.visible()[0].long().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],  # the second option sees the prompt and itself
    ]


def test_sums_take_the_logits_before_each_token():
    rows = Rows([OptionSet([1, 2], [[3, 4], [5]])], pad_id=0)
    logits = torch.zeros(1, 3, 6)
    logits[0, 1, 3], logits[0, 1, 5], logits[0, 2, 4] = 1.0, 2.0, 3.0
    after_prompt = torch.logsumexp(logits[0, 1], 0)
    first = (1.0 - after_prompt) + (3.0 - torch.logsumexp(logits[0, 2], 0))
    assert rows.sum_targets(logits)[0] == pytest.approx([float(first), float(2.0 - after_prompt)], abs=1e-6)
    # Without the first position, as with logits_to_keep.
    assert rows.sum_targets(logits[:, 1:])[0] == pytest.approx(rows.sum_targets(logits)[0])


WIDE = {
    "gemma2": {"sliding_window": 64},
    "qwen2": {"use_sliding_window": False},
    "phi3": {"sliding_window": 64},
}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "phi3", "mixtral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_families_share_prompts(model_type, attention):
    model = make_family_model(model_type, seed=1, **WIDE.get(model_type, {})).eval()
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers has no sdpa for it")
    model.set_attn_implementation(attention)
    scorer, scores = scored(model, SETS)
    assert scorer.shares_prompts
    assert flat(scores) == pytest.approx(flat(one_by_one(model, SETS)), abs=1e-4)


@pytest.mark.parametrize("model_type", ["bloom", "qwen3_next", "jamba", "lfm2"])
def test_models_that_cannot_share_do_not(model_type):
    """Models without position ids (ALiBi), and layers whose state carries over to the next option."""
    model = make_family_model(model_type, seed=1).eval()
    scorer, scores = scored(model, SETS)
    assert scorer.shares_prompts is False
    assert flat(scores) == pytest.approx(flat(one_by_one(model, SETS)), abs=1e-3)


def test_options_share_a_row_only_within_the_sliding_window():
    model = make_family_model("mistral", seed=1, sliding_window=4).eval()
    long = [OptionSet([5, 9, 3, 7, 8, 6], [[4, 6, 2], [8, 2]])]
    _, scores = scored(model, [OptionSet([5], [[4, 2], [3, 2]]), *long])
    assert scores[1] == pytest.approx(one_by_one(model, long)[0], abs=1e-4)


def test_options_do_not_share_a_row_if_layers_count_a_window_along_it():
    config = GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, window_size=16, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], intermediate_size=48, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    long = OptionSet([5, 9, 3, 7, 8, 6, 4, 2], [[4, 6, 2, 8, 7, 2]] * 3 + [[8, 2, 9, 4, 5, 2]])
    sets = [OptionSet([5], [[4, 2, 6], [3, 2, 7]]), long]
    scorer, scores = scored(model, sets)
    assert scorer.shares_prompts is False
    assert flat(scores) == pytest.approx(flat(one_by_one(model, sets)), abs=1e-4)


def test_options_do_not_see_each_other():
    model = make_family_model("llama", seed=1).eval()
    _, scores = scored(model, [OptionSet([5, 9], [[4, 6, 2], [8, 7, 2]])])
    _, changed = scored(model, [OptionSet([5, 9], [[10, 11, 2], [8, 7, 2]])])
    assert scores[0][1] == pytest.approx(changed[0][1], abs=1e-6)
    assert abs(scores[0][0] - changed[0][0]) > 1e-3


tokens = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@given(
    sets=st.lists(
        st.builds(OptionSet, tokens, st.lists(tokens, min_size=1, max_size=4)), min_size=1, max_size=5
    ),
    batch_size=st.integers(1, 9),
)
@settings(max_examples=12, deadline=None)
def test_scores_do_not_depend_on_batches(sets, batch_size):
    model = _llama()
    _, scores = scored(model, sets, batch_size)
    assert flat(scores) == pytest.approx(flat(one_by_one(model, sets)), abs=1e-3)


def _llama(cache=[]):  # noqa: B006 - one model for all examples of hypothesis
    if not cache:
        cache.append(make_family_model("llama", seed=1).eval())
    return cache[0]
