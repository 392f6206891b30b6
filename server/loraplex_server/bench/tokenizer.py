"""A byte-level tokenizer of any vocabulary size for models that have none: every id is a text, every common word one id."""

import json
from itertools import count, product
from pathlib import Path
from string import ascii_lowercase

from loraplex_client.load.plan import WORDS

_BLANK = "Ġ"  # how byte-level vocabularies write the blank before a word
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """tokenizer.json and tokenizer_config.json in ``folder``. The vocabulary needs room for the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    # Words with their blank come first: the earlier a merge, the sooner it is made.
    for word in [*(_BLANK + word for word in WORDS), *WORDS]:
        for end in range(1, len(word)):
            if word[: end + 1] not in vocab and len(vocab) < vocab_size:
                vocab[word[: end + 1]] = len(vocab)
                merges.append((word[:end], word[end]))
    for name in _made_up():
        if len(vocab) >= vocab_size:
            break
        vocab.setdefault(name, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": _TEMPLATE, "eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _made_up() -> "map[str]":
    """Words that no merge makes: they come out of the model, never out of a text."""
    words = ("".join(letters) for length in count(3) for letters in product(ascii_lowercase, repeat=length))
    return map(_BLANK.__add__, words)
