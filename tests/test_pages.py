import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_jax.pages import PageAllocator, pages_for


@given(num_tokens=st.integers(0, 200), page_size=st.integers(1, 40))
def test_pages_for_counts_like_brute_force(num_tokens, page_size):
    pages = {token // page_size for token in range(num_tokens)}
    assert pages_for(num_tokens, page_size) == len(pages)


@given(num_pages=st.integers(1, 30), data=st.data())
def test_allocator_against_sets(num_pages, data):
    allocator = PageAllocator(num_pages, page_size=4)
    free, owned = set(range(num_pages)), []
    for _ in range(data.draw(st.integers(0, 30))):
        if owned and data.draw(st.booleans()):
            pages = owned.pop(data.draw(st.integers(0, len(owned) - 1)))
            allocator.free(pages)
            free |= set(pages)
        else:
            n = data.draw(st.integers(0, num_pages))
            assert allocator.can_allocate(n) == (n <= len(free))
            if n <= len(free):
                pages = allocator.allocate(n)
                assert len(pages) == n
                assert set(pages) <= free
                free -= set(pages)
                owned.append(pages)
        assert allocator.num_free == len(free)
        assert allocator.num_allocated == num_pages - len(free)
        allocator.check_integrity()


def test_misuse_is_an_error_and_changes_nothing():
    allocator = PageAllocator(4, page_size=8)
    pages = allocator.allocate(3)
    with pytest.raises(ValueError, match="cannot allocate 2 pages: 1 are free"):
        allocator.allocate(2)
    for wrong in ([pages[0], pages[0]], [3], [99], [pages[0], 3]):
        with pytest.raises(ValueError, match="cannot free"):
            allocator.free(wrong)
    assert allocator.num_free == 1
    allocator.check_integrity()
    allocator.free(pages)
    assert allocator.num_free == 4


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 1), (1, 0)])
def test_sizes_are_checked(num_pages, page_size):
    with pytest.raises(ValueError, match="must be at least 1"):
        PageAllocator(num_pages, page_size)


def test_integrity_check_finds_a_lost_page():
    allocator = PageAllocator(3, page_size=1)
    allocator._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        allocator.check_integrity()
