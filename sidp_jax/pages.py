"""The page allocator of one replica's KV cache, and the prefix cache in it (no jax).

A page whose tokens and all that precede them are known may be registered under a key of them. Who
needs the same tokens shares it. When nobody owns it any more its content stays until the page is
needed: of such pages the one that has been idle for longest goes first.
(Sharing of prefixes by hashed blocks: vLLM's automatic prefix caching.)
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from hashlib import blake2b

import numpy as np


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold the K and V of `num_tokens` tokens."""
    return -(-num_tokens // page_size)


def page_keys(tokens: Sequence[int], page_size: int) -> Iterator[bytes]:
    """A key for each whole page of some tokens: a digest of its tokens and of all before them."""
    values = np.asarray(tokens, np.int32)
    key = b""
    for start in range(0, len(values) - page_size + 1, page_size):
        key = blake2b(values[start : start + page_size].tobytes(), digest_size=16, key=key).digest()
        yield key


def leading(keys: Sequence[bytes], known: Callable[[bytes], bool]) -> int:
    """How many keys, from the first on, are known, found by bisection.

    Where one is known those before it nearly always are, too: owners of a page own those before it.
    An exception, of which there are some where the same was computed twice, makes the number wrong.
    """
    return bisect_left(range(len(keys)), True, key=lambda place: not known(keys[place]))


class PageAllocator:
    """Hands out the pages 0..num_pages-1; a registered one may have several owners.

    Args:
        num_pages: pages in the cache.
        page_size: tokens per page.
    """

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"{num_pages=} and {page_size=} must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the next page is the last
        self._owners: dict[int, int] = {}  # how many each allocated page has
        self._keys: dict[int, bytes] = {}  # of the registered pages
        self._pages: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # registered, without an owner

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free) + len(self._idle)

    @property
    def num_allocated(self) -> int:
        """Pages that somebody owns."""
        return len(self._owners)

    def can_allocate(self, n: int, shared: Collection[int] = ()) -> bool:
        """Whether `n` pages are free, besides those that are to be shared."""
        return n + sum(page in self._idle for page in shared) <= self.num_free

    def allocate(self, n: int) -> list[int]:
        """Take `n` free pages.

        Raises:
            ValueError: fewer than `n` are free; nothing is taken then.
        """
        if not 0 <= n <= self.num_free:
            raise ValueError(f"cannot allocate {n} pages: {self.num_free} are free")
        for _ in range(n - len(self._free)):
            page, _ = self._idle.popitem(last=False)
            del self._pages[self._keys.pop(page)]
            self._free.append(page)
        split = len(self._free) - n
        pages = self._free[split:]
        del self._free[split:]
        self._owners.update(dict.fromkeys(pages, 1))
        return pages

    def free(self, pages: Collection[int]) -> None:
        """Give `pages` back; of those that are registered, the last ones are the first to go.

        Raises:
            ValueError: a page is not allocated, or is there twice; nothing is freed then.
        """
        unique = set(pages)
        if len(unique) != len(pages) or not unique <= self._owners.keys():
            raise ValueError(f"cannot free {list(pages)}: not allocated, or freed twice")
        for page in reversed(pages):
            self._owners[page] -= 1
            if self._owners[page]:
                continue
            del self._owners[page]
            if page in self._keys:
                self._idle[page] = None
            else:
                self._free.append(page)

    def register(self, page: int, key: bytes) -> None:
        """Let others find an allocated page, whose content is now settled, by its key.

        If another page is known by that key, this one stays its owner's alone.
        """
        if key not in self._pages and page not in self._keys:
            self._pages[key] = page
            self._keys[page] = key

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest run of keys, from the first on, that are known."""
        pages = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def knows(self, key: bytes) -> bool:
        """Whether a page is registered under a key."""
        return key in self._pages

    def about(self, keys: Sequence[bytes]) -> int:
        """About how many pages `match` finds, in few steps."""
        return leading(keys, self.knows)

    def share(self, pages: Collection[int]) -> None:
        """Become one more owner of registered pages."""
        for page in pages:
            self._idle.pop(page, None)
            self._owners[page] = self._owners.get(page, 0) + 1

    def check_integrity(self, owned: Collection[int] | None = None) -> None:
        """Assert that every page is either free or allocated, once, or registered and idle.

        Args:
            owned: the pages of all owners together; of nobody else's are any then.
        """
        parts = (set(self._free), set(self._owners), set(self._idle))
        assert len(parts[0]) == len(self._free), "a page is free twice"
        assert sum(map(len, parts)) == len(set().union(*parts)), f"a page in two states: {parts}"
        assert set().union(*parts) == set(range(self.num_pages)), "a page was lost"
        assert {page: key for key, page in self._pages.items()} == self._keys, "keys without pages"
        assert set(self._idle) <= self._keys.keys() <= set(self._idle) | self._owners.keys()
        if owned is not None:
            counted = dict.fromkeys(self._owners, 0)
            for page in owned:
                counted[page] = counted.get(page, 0) + 1
            assert counted == self._owners, f"owners {self._owners}, but {counted} hold them"
