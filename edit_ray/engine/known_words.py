"""Tokenizers that look up whole words, and what such a model says about the others."""

from __future__ import annotations

from tokenizers import Tokenizer

MAX_KNOWN_NAMED, MAX_UNKNOWN_NAMED = 100, 20


def vocabulary_of(tokenizer: Tokenizer) -> frozenset[str]:
    """The words that the tokenizer knows."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return frozenset(tokenizer.get_vocab()) - special


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """The text in the words that the tokenizer looks up."""
    normalizer, splitter = tokenizer.normalizer, tokenizer.pre_tokenizer
    text = text if normalizer is None else normalizer.normalize_str(text)
    return text.split() if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]


def unknown_words(tokenizer: Tokenizer, text: str) -> str | None:
    """What is to be said of a text with words that the tokenizer does not know; None if it knows them all."""
    vocabulary = vocabulary_of(tokenizer)
    unknown = list(dict.fromkeys(word for word in words_of(tokenizer, text) if word not in vocabulary))
    if not unknown:
        return None
    known = sorted(vocabulary, key=lambda word: (not word[:1].isalpha(), word))  # punctuation last
    named = _listed([word if word[:1].isalpha() else repr(word) for word in known], MAX_KNOWN_NAMED)
    words = _listed(list(map(repr, unknown)), MAX_UNKNOWN_NAMED)
    return f"has words that this model does not know: {words}; it knows: {named}."


def _listed(words: list[str], most: int) -> str:
    return ", ".join(words[:most]) + (", …" if len(words) > most else "")
