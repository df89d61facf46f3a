"""Who owns which page of the cache, and which pages hold known beginnings of text. No torch.

A full page is known by the identity of the chain of pages before it and by its own tokens. Looking
one up compares the tokens themselves, so that a hash collision can never mix two texts, and the
identity of a chain is a number never used twice, so that a page reused for other text can never be
mistaken for its former self.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import count
from typing import NamedTuple

EMPTY_PREFIX = 0


class CachedPage(NamedTuple):
    """A full page and the identity of the chain that ends with it."""

    page: int
    prefix: int


_Key = tuple[int, tuple[int, ...]]


class BlockPool:
    """Reference-counted pages.

    A page without references is blank, or cached until space is needed.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._references = [0] * num_pages
        self._blank = list(reversed(range(num_pages)))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._cached: dict[_Key, CachedPage] = {}
        self._key_of: dict[int, _Key] = {}
        self._identities = count(EMPTY_PREFIX + 1)

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out, cached ones included."""
        return len(self._blank) + len(self._evictable)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def allocate(self) -> int:
        """Take a page with undefined contents, evicting the least recently used cached one if need
        be.

        Raises IndexError if no page is free: callers look at `num_free` first.
        """
        if not self._blank:
            self._evict()
        page = self._blank.pop()
        self._references[page] = 1
        return page

    def acquire(self, pages: Iterable[int]) -> None:
        """Add a reference to each page of a match."""
        for page in pages:
            self._references[page] += 1
            self._evictable.pop(page, None)

    def release(self, pages: Iterable[int]) -> None:
        """Drop a reference to each page; those without one are free, the last given evicted
        last."""
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                self._set_free(page)

    def match(self, token_ids: Sequence[int], max_pages: int) -> list[CachedPage]:
        """The longest chain of cached pages, at most `max_pages`, that `token_ids` begins with."""
        matched: list[CachedPage] = []
        prefix = EMPTY_PREFIX
        while len(matched) < max_pages:
            found = self._cached.get((prefix, self._tokens_of(token_ids, len(matched))))
            if found is None:
                break
            matched.append(found)
            prefix = found.prefix
        return matched

    def publish(self, page: int, prefix: int, token_ids: Sequence[int], index: int) -> int:
        """Make a full page, the `index`-th of `token_ids`, known as the continuation of `prefix`.

        Returns the identity of the longer chain. Of two pages with equal contents the first stays.
        """
        key = (prefix, self._tokens_of(token_ids, index))
        if key not in self._cached:
            self._cached[key] = CachedPage(page, next(self._identities))
            self._key_of[page] = key
        return self._cached[key].prefix

    def forget(self) -> None:
        """Make every cached page unknown, for when contents cannot be trusted any more."""
        self._blank.extend(self._evictable)
        self._evictable.clear()
        self._cached.clear()
        self._key_of.clear()

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless `holders`, the page lists of all sequences, explain every
        page."""
        held = Counter(page for pages in holders for page in pages)
        references = {page: n for page, n in enumerate(self._references) if n}
        free = [*self._blank, *self._evictable]
        assert references == dict(held), f"references {references} differ from holders {dict(held)}"
        assert sorted([*free, *held]) == list(range(self.num_pages)), "a page is lost or twice free"
        assert set(self._evictable) <= set(self._key_of), "an unknown page is kept as cached"
        assert not set(self._blank) & set(self._key_of), "a blank page is known to the prefix cache"
        known = {page: self._cached[key].page for page, key in self._key_of.items()}
        assert len(known) == len(self._cached), "the prefix cache knows a page it does not hold"
        assert all(page == cached for page, cached in known.items()), "a cached page is mislabelled"

    def _tokens_of(self, token_ids: Sequence[int], index: int) -> tuple[int, ...]:
        return tuple(token_ids[index * self.page_size : (index + 1) * self.page_size])

    def _set_free(self, page: int) -> None:
        if page in self._key_of:
            self._evictable[page] = None
        else:
            self._blank.append(page)

    def _evict(self) -> None:
        if not self._evictable:
            raise IndexError("no page of the cache is free")
        page, _ = self._evictable.popitem(last=False)
        del self._cached[self._key_of.pop(page)]
        self._blank.append(page)
