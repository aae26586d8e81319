"""Small tokenizers of every kind that there is a model for; each knows a few words, and any text."""

import transformers as tr
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = ("one", "two", "three", "hell", "o", "on", "ne", "th", "re", "tw", "12", "ab", "cd")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
SENTENCEPIECE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def _merged(
    characters: list[str], words: tuple[str, ...], marks: tuple[str, ...]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary in which words are merged character by character, alone and behind a mark."""
    vocabulary = {piece: i for i, piece in enumerate(characters)}
    merges: list[tuple[str, str]] = []
    for word in (mark + word for mark in (*marks, "") for word in words):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
            if word[end - 1] not in vocabulary:
                vocabulary[word[end - 1]] = len(vocabulary)
            if (word[: end - 1], word[end - 1]) not in merges:
                merges.append((word[: end - 1], word[end - 1]))
    return vocabulary, merges


def _wrapped(core: Tokenizer, begins: bool, ends: bool) -> tr.PreTrainedTokenizerFast:
    for content in SPECIAL:
        core.add_special_tokens([AddedToken(content, special=True, normalized=False)])
    ids = {content: core.token_to_id(content) for content in SPECIAL}
    if begins or ends:
        core.post_processor = processors.TemplateProcessing(
            single=("<s> " if begins else "") + "$A" + (" </s>" if ends else ""),
            special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])],
        )
    wrapped = tr.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[reply]{% endif %}"
    )
    return wrapped


def sentencepiece(
    scheme: str, *, begins: bool = True, ends: bool = False, split: bool = False
) -> tr.PreTrainedTokenizerFast:
    """Llama's and Mistral's kind: `▁` before a word, put before the first one too, or only there, or not at all."""
    vocabulary, merges = _merged([*SPECIAL, *BYTES, "▁"], WORDS, ("▁",))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "normalizer":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    core.decoder = decoders.Sequence(SENTENCEPIECE)
    return _wrapped(core, begins, ends)


def unigram() -> tr.PreTrainedTokenizerFast:
    """T5's kind: it ends every text."""
    pieces = [(piece, -9.0) for piece in [*SPECIAL, *BYTES, "▁"]]
    pieces += [(mark + word, -1.0 - i) for i, word in enumerate(WORDS) for mark in ("", "▁")]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return _wrapped(core, begins=False, ends=True)


def byte_level(*, prefix: bool, begins: bool = False, trim: bool = False) -> tr.PreTrainedTokenizerFast:
    """GPT-2's kind."""
    vocabulary, merges = _merged(sorted(pre_tokenizers.ByteLevel.alphabet()), WORDS, ("Ġ",))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    wrapped = _wrapped(core, begins, ends=False)
    if trim:
        core.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=True), *([core.post_processor] if begins else [])]
        )
    return wrapped


def word_piece() -> tr.PreTrainedTokenizerFast:
    """BERT's kind: a token before, and one after."""
    pieces = [*SPECIAL, *WORDS, *(f"##{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz0123456789.,!?"]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return _wrapped(core, begins=True, ends=True)


def stripping() -> tr.PreTrainedTokenizerFast:
    """One whose special tokens take the spaces around them."""
    words = sentencepiece("first")
    words.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<sep>", lstrip=True, rstrip=True, special=True, normalized=False)]}
    )
    return words


KINDS = {
    "first": lambda: sentencepiece("first"),
    "first, split": lambda: sentencepiece("first", split=True),
    "first, begins and ends": lambda: sentencepiece("first", ends=True),
    "always": lambda: sentencepiece("always"),
    "never": lambda: sentencepiece("never"),
    "normalizer": lambda: sentencepiece("normalizer"),
    "nothing added": lambda: sentencepiece("first", begins=False),
    "unigram": unigram,
    "byte level": lambda: byte_level(prefix=False),
    "byte level, begins": lambda: byte_level(prefix=False, begins=True, trim=True),
    "byte level, prefix space": lambda: byte_level(prefix=True, begins=True, trim=True),
    "word piece": word_piece,
    "stripping": stripping,
}
