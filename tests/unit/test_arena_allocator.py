"""Extents: none overlap, what is freed merges at once, and best fit wastes little where sizes are few."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from edit_ray.cache.stores.allocator import ALIGNMENT, Extent, ExtentAllocator, room_of, rounded

PAGES = 24


class AgainstPages(RuleBasedStateMachine):
    """The allocator against a list that says of every page whose it is."""

    extents = Bundle("extents")

    def __init__(self):
        super().__init__()
        self.allocator = ExtentAllocator(PAGES * ALIGNMENT + 100)
        self.owner = [None] * PAGES
        self.number = 0

    def free_runs(self):
        runs, start = [], None
        for page, owner in enumerate([*self.owner, "end"]):
            if owner is None and start is None:
                start = page
            elif owner is not None and start is not None:
                runs.append((start, page - start))
                start = None
        return runs

    @rule(target=extents, size=st.integers(0, 9 * ALIGNMENT))
    def allocate(self, size):
        pages = max(1, -(-size // ALIGNMENT))
        fitting = [run for run in self.free_runs() if run[1] >= pages]
        extent = self.allocator.allocate(size)
        if extent is None:
            assert not fitting
            return Extent(-1, 0)
        first = min(fitting, key=lambda run: (run[1], run[0]))[0]
        assert extent == (first * ALIGNMENT, pages * ALIGNMENT)
        self.number += 1
        self.owner[first : first + pages] = [self.number] * pages
        return extent

    @rule(extent=consumes(extents))
    def free(self, extent):
        if extent.size:
            self.allocator.free(extent)
            first = extent.offset // ALIGNMENT
            self.owner[first : first + extent.size // ALIGNMENT] = [None] * (extent.size // ALIGNMENT)
        with pytest.raises(ValueError, match="is not given out"):
            self.allocator.free(extent)

    @invariant()
    def free_ranges_are_the_runs_of_free_pages(self):
        runs = self.free_runs()
        assert self.allocator.free_ranges() == [(start * ALIGNMENT, pages * ALIGNMENT) for start, pages in runs]
        assert self.allocator.free_bytes == self.owner.count(None) * ALIGNMENT


AgainstPages.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAgainstPages = AgainstPages.TestCase


def test_sizes_are_rounded_to_pages_and_nothing_is_too_small_for_one():
    assert [rounded(size) for size in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
    assert [room_of(size) for size in (0, 1, 4096, 4097)] == [4096, 4096, 4096, 8192]
    with pytest.raises(ValueError, match="size_bytes is 4095; valid is 4096 or more"):
        ExtentAllocator(4095)


def test_an_extent_that_was_not_given_out_is_not_taken_back():
    allocator = ExtentAllocator(10 * ALIGNMENT)
    extent = allocator.allocate(3 * ALIGNMENT)
    for wrong in (Extent(0, ALIGNMENT), Extent(ALIGNMENT, 2 * ALIGNMENT), Extent(5 * ALIGNMENT, ALIGNMENT)):
        with pytest.raises(ValueError, match="is not given out"):
            allocator.free(wrong)
    assert allocator.free_bytes == 7 * ALIGNMENT
    allocator.free(extent)
    assert allocator.free_ranges() == [Extent(0, 10 * ALIGNMENT)]


@pytest.mark.parametrize(("pages", "waste"), [([3], 0.0), ([3, 6], 0.02), ([3, 11, 1], 0.05), ([3, 7, 10, 25], 0.1)])
def test_little_is_wasted_with_the_few_sizes_of_residuals(pages, waste):
    """At random ages, the share of the arena that is free when an extent cannot be had, over 20,000 of them."""
    chosen, total = random.Random(0), 1200
    allocator, held, wasted = ExtentAllocator(total * ALIGNMENT), [], []
    for _ in range(20_000):
        size = chosen.choice(pages)
        while (extent := allocator.allocate(size * ALIGNMENT)) is None:
            left_over = allocator.free_bytes / ALIGNMENT - size + 1  # free pages beyond those that are too few anyway
            wasted.append(max(0.0, left_over) / total)
            index = chosen.randrange(len(held))
            held[index], held[-1] = held[-1], held[index]
            allocator.free(held.pop())
        held.append(extent)
    assert len(wasted) > 1000
    assert sum(wasted) / len(wasted) <= waste
    for extent in held:
        allocator.free(extent)
    assert allocator.free_ranges() == [Extent(0, total * ALIGNMENT)]
