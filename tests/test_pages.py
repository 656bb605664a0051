import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_jax.pages import PageAllocator, page_keys, pages_for


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


@given(num_pages=st.integers(1, 12), data=st.data())
def test_shared_pages_keep_their_content_until_they_are_allocated_anew(num_pages, data):
    """Owners come with a few known prompts, of which each takes what is still there."""
    prompts = [[p // 2, p, *range(10)] for p in range(4)]  # pairs begin alike, pages of 1 token
    allocator = PageAllocator(num_pages, page_size=1)
    content: dict[int, bytes] = {}  # what was last written to a page
    owned: list[list[int]] = []
    for _ in range(data.draw(st.integers(0, 40))):
        if owned and data.draw(st.booleans()):
            allocator.free(owned.pop(data.draw(st.integers(0, len(owned) - 1))))
        else:
            prompt = prompts[data.draw(st.integers(0, 3))][: data.draw(st.integers(1, 6))]
            keys = list(page_keys(prompt, 1))
            shared = allocator.match(keys)
            assert [content[page] for page in shared] == keys[: len(shared)]
            missing = len(keys) - len(shared)
            taken = {page for pages in owned for page in pages} | set(shared)
            assert allocator.can_allocate(missing, shared) == (missing <= num_pages - len(taken))
            if not allocator.can_allocate(missing, shared):
                continue
            allocator.share(shared)
            pages = shared + allocator.allocate(missing)
            assert len(set(pages)) == len(pages)
            assert not set(pages[len(shared) :]) & taken, "a page that somebody reads"
            for page, key in zip(pages, keys, strict=True):
                if page not in shared:
                    content[page] = key
                allocator.register(page, key)
            owned.append(pages)
        allocator.check_integrity([page for pages in owned for page in pages])


def test_the_end_of_what_has_been_idle_for_longest_goes_first():
    allocator = PageAllocator(5, page_size=2)
    keys = {name: list(page_keys(tokens, 2)) for name, tokens in (("a", [1] * 4), ("b", [2] * 4))}
    for name in "ab":
        pages = allocator.allocate(2)
        for page, key in zip(pages, keys[name], strict=True):
            allocator.register(page, key)
        allocator.free(pages)
    allocator.allocate(2)
    assert [len(allocator.match(keys[name])) for name in "ab"] == [1, 2]
    allocator.allocate(2)
    assert [len(allocator.match(keys[name])) for name in "ab"] == [0, 1]


def test_a_key_tells_all_tokens_up_to_its_page():
    one, other = [1, 2, 3, 4, 5, 6, 7], [9, 2, 3, 4, 5, 6]
    keys = list(page_keys(one, 2))
    assert len(keys) == 3
    assert keys == list(page_keys([*one[:6], 99], 2))
    assert not set(keys) & set(page_keys(other, 2)), "the same tokens, but others before them"


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


def test_integrity_check_counts_owners():
    allocator = PageAllocator(3, page_size=1)
    pages = allocator.allocate(2)
    allocator.check_integrity(pages)
    with pytest.raises(AssertionError, match="hold them"):
        allocator.check_integrity([*pages, pages[0]])
