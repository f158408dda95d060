"""Text models from a folder, for `modm trace inspect --embedder FOLDER`: a tiny one with random weights, made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from modm_tasks.errors import InvalidInputError
from orchestrator.traces.vectors import text_vectors
from vector_store.sentence_embedder import SentenceEmbedder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "dog", "house"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("sentences")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8}))
    return folder


def test_a_text_has_the_same_vector_in_any_company(model: Path) -> None:
    """Padding beside a longer text changes nothing, the order is kept, and a text is cut at the model's length."""
    texts = ["a red cat", "a blue dog a red house", "house", "a red cat " * 20]
    together = text_vectors(texts, embeddings=None, embedder=str(model))
    assert together is not None
    assert together.shape == (4, 16)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    alone = np.concatenate([SentenceEmbedder(model).embed_texts([text]) for text in texts])
    assert together == pytest.approx(alone, abs=1e-5)
    assert SentenceEmbedder(model).embed_texts(["a red cat " * 9])[0] == pytest.approx(together[3], abs=1e-5)
    assert together[0] @ together[2] < 0.999


def test_what_is_no_such_model_is_one_line(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"1_Pooling/config\.json"):
        SentenceEmbedder(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(InvalidInputError, match="mean of tokens"):
        SentenceEmbedder(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (tmp_path / "sentence_bert_config.json").write_text("{}")
    with pytest.raises(InvalidInputError):
        SentenceEmbedder(tmp_path)
