"""Small tokenizers of the kinds that checkpoints have. ``<s>`` is put in front; ``SPECIAL`` tokens are no text."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from trt_kv.errors import EngineError
from trt_kv.presets import PRESETS
from trt_kv.runtime.text.tokenizer import load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|eot|>"]
BOS, EOS, USER, EOT = 1, 2, 3, 4


def _finished(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def byte_level_tokenizer() -> Tokenizer:
    """As Llama-3's: BPE over bytes; other scripts and emoji fall apart into several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, hello there; Grüße, 日本語 🎉🎊 família"] * 3, trainer)
    return _finished(tokenizer)


_LLAMA_2_PIECES = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁aehlo", "▁a", "▁▁", "▁▁▁", "é", "日"]
_LLAMA_2_MERGES = [("▁", "▁"), ("▁▁", "▁"), ("▁", "a")]
_LLAMA_2_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def _llama_2() -> Tokenizer:
    vocab = {piece: index for index, piece in enumerate(_LLAMA_2_PIECES)}
    return Tokenizer(models.BPE(vocab=vocab, merges=_LLAMA_2_MERGES, byte_fallback=True, unk_token="<unk>", fuse_unk=True))


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama-2's and Mistral's: spaces are part of tokens, unknown characters become byte tokens; decoding drops a space."""
    tokenizer = _llama_2()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(_LLAMA_2_DECODER)
    return _finished(tokenizer)


def metaspace_tokenizer() -> Tokenizer:
    """The same vocabulary as newer files have it, split into words."""
    tokenizer = _llama_2()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return _finished(tokenizer)


def unigram_tokenizer() -> Tokenizer:
    """As T5's: the vocabulary of the model itself has the special tokens."""
    pieces = [(piece, -1.0) for piece in SPECIAL] + [(letter, -3.0) for letter in " aehlo<>/|stuxrknw_"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.decoder = decoders.Fuse()
    return _finished(tokenizer)


TOKENIZERS = {
    "byte-level": byte_level_tokenizer(),
    "byte-fallback": byte_fallback_tokenizer(),
    "metaspace": metaspace_tokenizer(),
    "words": load_tokenizer(PRESETS["llama3"].bundled_folder / "tokenizer.json", error=EngineError),
}
