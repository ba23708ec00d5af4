"""The model card: what the hub's own parser reads of it, and that nothing in it was made up."""

from huggingface_hub import ModelCard

from gradpruner.models.card import Base, Figure, Results, base_of, model_card
from gradpruner.plans.layer_plan import PruningPlan

PLAN = PruningPlan.from_keep(3, [0, 2])
RESULTS = Results(
    task="banking77",
    rows="data/test.jsonl",
    num_rows=480,
    trained_on="data/train.jsonl",
    figures=(Figure("exact_match", 0.90625, 0.879, 0.931, dense=0.933), Figure("rouge_l", 0.5)),
    versions={"torch": "2.13.0"},
    prompt="Question: what?\nAnswer:",
    repo="me/small",
)


def test_the_hub_reads_the_figures_as_they_were_measured() -> None:
    base = Base("org/base", "org/base", {"license": "apache-2.0", "language": ["en"]})
    card = ModelCard(model_card(base, PLAN, {}, RESULTS))
    data = card.data
    assert (data.base_model, data.license, data.language) == ("org/base", "apache-2.0", ["en"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    first, second = data.eval_results
    assert (data.model_name, first.metric_type, first.metric_value) == ("me/small", "exact_match", 0.90625)
    assert (first.dataset_name, first.dataset_split) == ("banking77", "test")
    assert first.dataset_args == {"rows": 480, "source": "data/test.jsonl"}
    assert second.metric_value == 0.5
    assert "| exact match | 90.6% | 87.9% to 93.1% | 93.3% |" in card.text
    assert "| rouge l | 50.0% | not measured | not measured |" in card.text
    assert "1 of 3 decoder layers were removed: 1." in card.text and "torch 2.13.0" in card.text
    snippet = card.text.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert "from_pretrained('me/small')" in snippet and "Answer:" in snippet


def test_a_folder_that_is_not_measured_has_no_figures_and_an_open_licence() -> None:
    card = ModelCard(model_card(Base("/home/me/tuned"), PLAN, {}))
    assert card.data.eval_results is None and card.data.base_model is None
    assert card.data.license == "unknown" and "look it up" in card.text
    assert "/home/me" not in card.text


def test_licence_and_name_are_taken_over_from_the_base(tmp_path) -> None:
    assert base_of("org/base").hub_id == "org/base"
    assert base_of("./tuned").hub_id is None
    cached = tmp_path / "models--org--base" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    (cached / "README.md").write_text(
        "---\nlicense: gemma\nlicense_link: https://x\ntags: [a]\n---\n# Base\n"
    )
    found = base_of("org/base", cached)
    assert (found.hub_id, found.metadata) == ("org/base", {"license": "gemma", "license_link": "https://x"})
    # What is made from something we made goes back to what that was made from.
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "README.md").write_text(model_card(found, PLAN, {}))
    again = base_of(str(ours), ours)
    assert (again.hub_id, again.metadata) == ("org/base", found.metadata)
    (ours / "README.md").write_text("---\n: [broken\n---\n")
    assert base_of(str(ours), ours).metadata == {}
