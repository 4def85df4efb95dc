"""Items as token ids, and answers as text, with a model's tokenizer."""

from collections.abc import Collection, Sequence
from functools import cached_property

from tokenizers import Tokenizer

from benchmarks.quality.real.answering import Question
from benchmarks.quality.real.items import Item


class Asker:
    """Makes token ids of items. Parts are encoded apart, as in kvpress, so that a context has the same tokens in every mode."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a part of a prompt."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def question(self, item: Item, mode: str) -> Question:
        """The token ids of an item. What is read before tokens are evicted is its context, in mode "aware" its question too, in
        mode "primed" also the first words of the answer.
        """
        context = self._tokenizer.encode(item.context, add_special_tokens=False)
        read, given = [*self._start, *context.ids], self.encode(item.said)
        question, prefix = self.encode(item.question), self.encode(item.prefix)
        for part, modes in ((question, ("aware", "primed")), (prefix, ("primed",))):
            (read if mode in modes else given).extend(part)
        start = len(self._start)
        fact: tuple[int, ...] = ()
        for reference in item.references if item.marking == "share" else ():
            at = item.context.rfind(reference)
            tokens = {context.char_to_token(place) for place in range(at, at + len(reference))} if at >= 0 else set()
            fact += tuple(sorted(start + token for token in tokens if token is not None))
        stops = {item.stop} if item.stop else set()
        return Question(
            prompt=tuple(read),
            given=tuple(given),
            n_new=item.n_new,
            ends=lambda said: said[-1] in self._end_ids or any(stop in self._pieces[said[-1]] for stop in stops),
            fact=fact,
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self._tokenizer.decode(list(tokens))

    def text(self, item: Item, tokens: Sequence[int]) -> str:
        """What was answered, with what was given of it, without what ended it, unless that is part of it ("]")."""
        text = item.begun + self._tokenizer.decode([token for token in tokens if token not in self._end_ids])
        if item.stop and item.stop in text:
            text = text[: text.index(item.stop)] + item.stop
        return text

    @cached_property
    def _start(self) -> list[int]:
        """What the tokenizer puts in front of a whole prompt."""
        return list(self._tokenizer.encode("").ids)

    @cached_property
    def _pieces(self) -> list[str]:
        """The text of every token."""
        return [self._tokenizer.decode([token]) for token in range(self._tokenizer.get_vocab_size())]
