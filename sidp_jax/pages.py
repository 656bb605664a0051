"""The page allocator of one replica's KV cache (no jax)."""

from collections.abc import Collection


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold the K and V of `num_tokens` tokens."""
    return -(-num_tokens // page_size)


class PageAllocator:
    """Hands out the pages 0..num_pages-1, each to one owner at a time.

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
        self._allocated: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def num_allocated(self) -> int:
        """Pages that somebody owns."""
        return len(self._allocated)

    def can_allocate(self, n: int) -> bool:
        """Whether `n` pages are free."""
        return n <= len(self._free)

    def allocate(self, n: int) -> list[int]:
        """Take `n` free pages.

        Raises:
            ValueError: fewer than `n` are free; nothing is taken then.
        """
        if not 0 <= n <= len(self._free):
            raise ValueError(f"cannot allocate {n} pages: {len(self._free)} are free")
        split = len(self._free) - n
        pages = self._free[split:]
        del self._free[split:]
        self._allocated.update(pages)
        return pages

    def free(self, pages: Collection[int]) -> None:
        """Give `pages` back.

        Raises:
            ValueError: a page is not allocated, or is there twice; nothing is freed then.
        """
        unique = set(pages)
        if len(unique) != len(pages) or not unique <= self._allocated:
            raise ValueError(f"cannot free {list(pages)}: not allocated, or freed twice")
        self._allocated -= unique
        self._free.extend(pages)

    def check_integrity(self) -> None:
        """Assert that every page is either free or allocated, once."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        assert free.isdisjoint(self._allocated), f"both: {free & self._allocated}"
        assert free | self._allocated == set(range(self.num_pages)), "a page was lost"
