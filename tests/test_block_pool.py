"""Pages: exact accounting, and a prefix cache that never serves the wrong text."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qserve.engine.block_pool import EMPTY_PREFIX, BlockPool

PAGE_SIZE = 4


def publish_all(pool: BlockPool, tokens: list[int], num_pages: int) -> list[int]:
    pages = [pool.allocate() for _ in range(num_pages)]
    prefix = EMPTY_PREFIX
    for index, page in enumerate(pages):
        prefix = pool.publish(page, prefix, tokens, index)
    return pages


def matched_pages(pool: BlockPool, tokens: list[int], max_pages: int = 99) -> list[int]:
    return [cached.page for cached in pool.match(tokens, max_pages)]


class PoolMachine(RuleBasedStateMachine):
    """Sequences come and go; `contents` plays the memory that the pages stand for."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int) -> None:
        self.pool = BlockPool(num_pages, PAGE_SIZE)
        self.contents: dict[int, list[int] | None] = dict.fromkeys(range(num_pages))
        self.sequences: list[list[int]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=PAGE_SIZE, max_size=5 * PAGE_SIZE))
    def admit(self, tokens: list[int]) -> None:
        num_full = len(tokens) // PAGE_SIZE
        matched = self.pool.match(tokens, num_full)
        pages = [cached.page for cached in matched]
        for index, page in enumerate(pages):
            assert self.contents[page] == tokens[: (index + 1) * PAGE_SIZE]
        self.pool.acquire(pages)
        prefix = matched[-1].prefix if matched else EMPTY_PREFIX
        for index in range(len(pages), num_full):
            if not self.pool.num_free:
                break
            pages.append(self.pool.allocate())
            self.contents[pages[-1]] = tokens[: (index + 1) * PAGE_SIZE]
            prefix = self.pool.publish(pages[-1], prefix, tokens, index)
        self.sequences.append(pages)

    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        if self.sequences:
            pages = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
            self.pool.release(reversed(pages))

    @rule()
    def forget(self) -> None:
        self.pool.forget()

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity(self.sequences)
            used = {page for pages in self.sequences for page in pages}
            assert self.pool.num_used == len(used)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_equal_beginnings_share_pages_and_unequal_ones_do_not() -> None:
    pool = BlockPool(8, PAGE_SIZE)
    pages = publish_all(pool, list(range(12)), 3)
    assert matched_pages(pool, list(range(12))) == pages
    assert matched_pages(pool, list(range(11))) == pages[:2]
    assert matched_pages(pool, list(range(12)), 1) == pages[:1]
    assert matched_pages(pool, [0, 1, 2, 3, 9, 9, 9, 9]) == pages[:1]
    assert matched_pages(pool, [9, 1, 2, 3, 4, 5, 6, 7]) == []
    assert matched_pages(pool, list(range(4, 12))) == []


def test_tokens_with_colliding_hashes_are_told_apart() -> None:
    pool = BlockPool(4, PAGE_SIZE)
    alias = 2**61 - 1  # Python hashes integers modulo this prime
    assert hash((0,) * PAGE_SIZE) == hash((alias,) * PAGE_SIZE)
    publish_all(pool, [0] * PAGE_SIZE + [1] * PAGE_SIZE, 2)
    assert matched_pages(pool, [alias] * PAGE_SIZE) == []
    other = publish_all(pool, [alias] * PAGE_SIZE, 1)
    assert matched_pages(pool, [alias] * PAGE_SIZE + [1] * PAGE_SIZE) == other


def test_least_recently_used_is_evicted_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4, PAGE_SIZE)
    old, new = list(range(8)), list(range(100, 108))
    old_pages, new_pages = publish_all(pool, old, 2), publish_all(pool, new, 2)
    pool.release(reversed(old_pages))
    pool.release(reversed(new_pages))
    pool.acquire(matched_pages(pool, old))
    pool.release(reversed(old_pages))
    evicted = [pool.allocate() for _ in range(3)]
    assert evicted == [new_pages[1], new_pages[0], old_pages[1]]
    assert matched_pages(pool, old) == [old_pages[0]]
    assert matched_pages(pool, new) == []


def test_a_page_reused_for_other_text_is_not_found_under_its_old_name() -> None:
    pool = BlockPool(2, PAGE_SIZE)
    pages = publish_all(pool, list(range(8)), 2)
    pool.release(pages)  # the beginning goes first here, so the chain loses its root
    replacement = pool.allocate()
    assert replacement == pages[0]
    pool.publish(replacement, EMPTY_PREFIX, [7] * 4, 0)
    assert matched_pages(pool, [*[7] * 4, 4, 5, 6, 7]) == [replacement]
    pool.release([replacement])


def test_shared_pages_are_freed_by_the_last_holder() -> None:
    pool = BlockPool(2, PAGE_SIZE)
    pages = publish_all(pool, list(range(8)), 2)
    pool.acquire(pages)
    pool.release(pages)
    assert pool.num_free == 0
    pool.release(pages)
    assert pool.num_free == 2
    with pytest.raises(IndexError, match="no page"):
        [pool.allocate() for _ in range(3)]


def test_integrity_check_sees_leaks_and_foreign_holders() -> None:
    pool = BlockPool(3, PAGE_SIZE)
    page = pool.allocate()
    pool.check_integrity([[page]])
    for holders in ([], [[page], [page]], [[page], [(page + 1) % 3]]):
        with pytest.raises(AssertionError):
            pool.check_integrity(holders)
    pool.release([page])
    pool._blank.pop()
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity([])
