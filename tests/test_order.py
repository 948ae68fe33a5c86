"""The order of samples is frozen, bijective and random enough, and costs nothing to start."""

import math
import time
import tracemalloc

import numpy as np
import pytest

from pretrain.data.order import Blend, Order
from pretrain.data.permutation import Permutation, keys, splitmix64

MASK32, MASK64 = 2**32 - 1, 2**64 - 1
EIGHT = [0.45, 0.2, 0.12, 0.1, 0.06, 0.04, 0.02, 0.01]


def scalar_permutation(n: int, ids: tuple[int, ...], x: int) -> int:
    """A second implementation for large n, in plain Python integers."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    round_keys = [key & MASK32 for key in keys(ids, 6)]
    while True:
        halves, sizes = list(divmod(x, b)), (a, b)
        for i, key in enumerate(round_keys):
            h = halves[1 - i % 2] ^ key
            h ^= h >> 16
            h = h * 0x7FEB352D & MASK32
            h ^= h >> 15
            h = h * 0x846CA68B & MASK32
            h ^= h >> 16
            halves[i % 2] = (halves[i % 2] + (h * sizes[i % 2] >> 32)) % sizes[i % 2]
        x = halves[0] * b + halves[1]
        if x < n:
            return x


def test_keys_have_their_golden_values():
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(np.array([0], dtype=np.uint64))[0] == 0xE220A8397B1DCDAF
    chain = keys((1234, 0, 0), 6)
    assert chain[0] == 0x4CB30A9C2572DE08
    assert [key & MASK32 for key in chain] == [0x2572DE08, 0x574608D2, 0xA4385F88, 0x4595A8D3, 0xF38A2A00, 0x067F4D8E]


@pytest.mark.parametrize(
    ("n", "first"),
    [
        (5, [1, 0, 4, 2, 3]),
        (10, [1, 7, 0, 4, 6, 2, 8, 3, 5, 9]),
        (4096, [465, 2357, 450, 3185, 1801]),
        (4097, [565, 448, 1159, 2680, 510]),
        (10**6, [39838, 947290, 929370, 276533, 347847]),
        (10**9, [500785216, 529593759, 562786344]),
        (10**12, [653733139258, 723611525941, 787085302011]),
    ],
)
def test_permutation_has_its_golden_values(n, first):
    assert Permutation(n, (1234, 0, 0))(np.arange(len(first))).tolist() == first


@pytest.mark.parametrize("n", [*range(1, 130), 1199, 4095, 4096, 4097, 4098, 10007, 65536, 99991, 10**6])
def test_permutation_is_a_bijection_with_its_inverse(n):
    permutation = Permutation(n, (7, n))
    image = permutation(np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))
    assert np.array_equal(permutation.inverse(image), np.arange(n))


@pytest.mark.parametrize("n", [4097, 10**9, 10**12, 2**40 + 12345, 2**61 + 99, 2**62 - 1])
def test_large_permutations_equal_the_plain_implementation_and_invert(n):
    permutation = Permutation(n, (3, 1, 4))
    x = np.array([0, 1, 2, n // 3, n // 2, n - 2, n - 1] + [splitmix64(i) % n for i in range(200)])
    image = permutation(x)
    assert image.tolist() == [scalar_permutation(n, (3, 1, 4), int(i)) for i in x]
    assert np.array_equal(permutation.inverse(image), x)
    assert image.min() >= 0 and image.max() < n


def test_keys_of_neighbouring_seeds_sources_and_epochs_share_nothing():
    x = np.arange(10_000)
    images = [Permutation(10**6, ids)(x) for ids in [(7, 0, 1), (8, 0, 0), (7, 1, 0), (7, 0, 0), (-7, 0, 0)]]
    for i, one in enumerate(images):
        for other in images[:i]:
            assert (one == other).mean() < 0.001


@pytest.mark.parametrize("n", [2**20, 1_000_003])
def test_low_bits_of_the_input_do_not_decide_the_parity_of_the_output(n):
    x = np.arange(200_000)
    parity = Permutation(n, (1,))(x) % 2
    for bits in range(4):
        share = parity[x % 4 == bits].mean()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(50_000)


def test_neighbours_are_independent_at_every_structural_stride():
    n = 10**6
    image = Permutation(n, (5, 0, 2))(np.arange(n)) / n - 0.5
    for stride in (1, 2, 999, 1000, 1001, 2**10, 2**16):
        z = np.corrcoef(image[:-stride], image[stride:])[0, 1] * math.sqrt(n)
        assert abs(z) < 5, stride


def test_tiny_permutations_are_uniform():
    orders = [tuple(Permutation(4, (seed,))(np.arange(4)).tolist()) for seed in range(4800)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 60  # chi-square, 23 degrees of freedom: p = 4e-5


def test_blend_has_its_golden_values():
    blend = Blend([0.6, 0.3, 0.1])
    assert blend.nodes == [(2, 1, 1073741824), (3, 0, 1717986918)]
    sources, indices = blend.locate(np.arange(16))
    assert sources.tolist() == [0, 1, 0, 2, 0, 0, 1, 0, 1, 0, 0, 1, 0, 2, 0, 0]
    assert indices.tolist() == [0, 0, 1, 0, 2, 3, 1, 4, 2, 5, 6, 3, 7, 1, 8, 9]
    assert blend.counts(10**12) == [600000000093, 299999999930, 99999999977]
    sources, indices = Blend(EIGHT).locate(np.arange(16))
    assert sources.tolist() == [1, 0, 2, 0, 5, 0, 3, 0, 1, 4, 0, 2, 0, 1, 0, 3]
    assert indices.tolist() == [0, 0, 0, 1, 0, 2, 0, 3, 1, 0, 4, 1, 5, 2, 6, 1]
    assert Blend(EIGHT).counts(10**9) == [round(weight * 10**9) for weight in EIGHT]


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [3, 1], EIGHT, [1, 1e-5, 0.3, 7, 2], [1 / (i + 1) for i in range(100)]])
def test_every_source_is_drawn_without_gaps_in_proportion_to_its_weight(weights):
    blend, count = Blend(weights), 100_000
    sources, indices = blend.locate(np.arange(count))
    share = np.array(weights) / sum(weights)
    for source in range(len(weights)):
        mine = sources == source
        assert np.array_equal(indices[mine], np.arange(mine.sum()))
        error = np.cumsum(mine) - share[source] * np.arange(1, count + 1)
        assert np.abs(error).max() < 1.2
    assert blend.counts(count) == np.bincount(sources, minlength=len(weights)).tolist()


def test_a_slice_of_the_blend_continues_it_at_any_position():
    blend = Blend(EIGHT)
    for start in (0, 12345, 10**12):
        sources, indices = blend.locate(np.arange(start, start + 1000))
        later = blend.locate(np.arange(start + 400, start + 1000))
        assert np.array_equal(sources[400:], later[0]) and np.array_equal(indices[400:], later[1])
        counts = np.array(blend.counts(start))
        assert np.array_equal(counts[sources[:1]], indices[:1])
        assert (counts + np.bincount(sources, minlength=8)).tolist() == blend.counts(start + 1000)
        for row in range(0, 1000, 97):
            assert blend.position(int(sources[row]), int(indices[row])) == start + row


@pytest.mark.parametrize("weights", [[1, 1], [1, 1, 1, 1], [3, 1], [1, 3], [1e-9, 1], [0.2, 0.3, 0.5]])
def test_position_is_the_inverse_of_locate_even_if_rounding_causes_ties(weights):
    blend = Blend(weights)
    for start in (0, 2**32 - 100, 2**50):
        sources, indices = blend.locate(np.arange(start, start + 500, dtype=np.uint64))
        found = [blend.position(source, index) for source, index in zip(sources.tolist(), indices.tolist(), strict=True)]
        assert found == list(range(start, start + 500))


@pytest.mark.parametrize("weights", [[], [0.0], [1, -1], [1, math.nan], [math.inf]])
def test_unusable_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        Blend(weights)


def test_every_sample_is_shown_once_per_epoch_in_a_new_order_each_time():
    sizes = [5, 7000, 300]
    order = Order(sizes, [0.001, 0.9, 0.099], seed=1)
    sources, epochs, samples, _ = order.locate(0, 30_000)
    for source, size in enumerate(sizes):
        of_source = sources == source
        for epoch in range(int(epochs[of_source].max())):  # the last epoch may be incomplete
            shown = samples[of_source & (epochs == epoch)]
            assert np.array_equal(np.sort(shown), np.arange(size))
        assert np.all(np.diff(epochs[of_source]) >= 0)
    first, second = (samples[(sources == 1) & (epochs == epoch)] for epoch in (0, 1))
    assert (first == second).mean() < 0.01


def test_position_is_the_inverse_of_locate_for_samples():
    order = Order([5, 7000, 300], [0.001, 0.9, 0.099], seed=1)
    for start in (0, 29_000, 10**11):
        for offset, sample in enumerate(zip(*(ids.tolist() for ids in order.locate(start, 40)), strict=True)):
            assert order.positions(*sample[:2], np.array(sample[2:3])).tolist() == [start + offset]


def test_any_split_of_the_positions_gives_the_same_samples():
    order = Order([11, 977], [1, 2], seed=9)
    complete = np.stack(order.locate(500, 96))
    for size in (1, 2, 3, 32, 96):
        parts = [np.stack(order.locate(500 + start, size)) for start in range(0, 96, size)]
        assert np.array_equal(np.concatenate(parts, axis=1), complete)
    assert np.stack(order.locate(500, 0)).shape == (4, 0)
    with pytest.raises(ValueError, match="position"):
        order.locate(-1, 1)


def test_a_trillion_samples_cost_neither_time_nor_memory():
    tracemalloc.start()
    started = time.process_time()
    order = Order([10**12, 10**11], [10, 1], seed=1)
    order.locate(5 * 10**11, 512)
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 5  # milliseconds; a table of the order would take hours
    assert peak < 1 << 20
