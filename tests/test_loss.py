"""The chunked loss equals PyTorch's cross-entropy, value and gradients, for any chunk size, and never holds all logits."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_compiler
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import target
from pretrain.model.loss import _add_product, chunk_positions, chunk_step, cross_entropy_sums


def inputs(positions: int = 50, rows: int = 128, width: int = 32, vocab_size: int = 97, ignored: float = 0.2, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(positions, width, generator=draw).requires_grad_()
    weight_VD = torch.randn(rows, width, generator=draw).mul_(0.3).requires_grad_()
    labels_N = torch.randint(0, vocab_size, (positions,), generator=draw)
    labels_N[torch.rand(positions, generator=draw) < ignored] = -100
    return hidden_ND, weight_VD, labels_N, vocab_size


def loss_sum_of(*args) -> torch.Tensor:
    return cross_entropy_sums(*args)[0]


def plain(hidden_ND, weight_VD, labels_N, vocab_size):
    return F.cross_entropy(F.linear(hidden_ND, weight_VD[:vocab_size]), labels_N, reduction="sum", ignore_index=-100)


def gradients(loss_sum, *tensors):
    return torch.autograd.grad(loss_sum, tensors)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@pytest.mark.parametrize("vocab_size", [97, 128], ids=["padded", "no padding"])
def test_value_and_gradients_equal_plain_cross_entropy(chunk, vocab_size):
    hidden_ND, weight_VD, labels_N, _ = inputs(vocab_size=vocab_size)
    expected = plain(hidden_ND, weight_VD, labels_N, vocab_size)
    got = loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size, chunk)
    assert got.shape == () and got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients(got, hidden_ND, weight_VD), gradients(expected, hidden_ND, weight_VD), strict=True):
        assert relative(ours, theirs) < 1e-6


@settings(deadline=None, max_examples=40)
@given(
    positions=st.integers(1, 40), chunk=st.integers(1, 45), vocab_size=st.integers(2, 40), padding=st.integers(0, 9),
    ignored=st.sampled_from([0.0, 0.5, 0.95]), size=st.sampled_from([1e-3, 1.0, 30.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_equals_plain_cross_entropy(positions, chunk, vocab_size, padding, ignored, size, seed):
    hidden_ND, weight_VD, labels_N, _ = inputs(positions, vocab_size + padding, 8, vocab_size, ignored, seed)
    hidden_ND = (hidden_ND * size).detach().double().requires_grad_()  # an fp64 reference for logits up to hundreds of nats
    expected = plain(hidden_ND, weight_VD.double(), labels_N, vocab_size)
    hidden32_ND = hidden_ND.detach().float().requires_grad_()
    got = loss_sum_of(hidden32_ND, weight_VD, labels_N, vocab_size, chunk)
    assert got.item() == pytest.approx(expected.item(), rel=2e-6, abs=1e-5 * size * positions)
    ours, theirs = gradients(got, hidden32_ND)[0].double(), gradients(expected, hidden_ND)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(1.0, size))


def test_the_leading_dimensions_do_not_matter():
    hidden_ND, weight_VD, labels_N, vocab_size = inputs()
    flat = loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size, 16)
    shaped = loss_sum_of(hidden_ND.view(5, 10, -1), weight_VD, labels_N.view(5, 10), vocab_size, 16)
    assert flat.item() == shaped.item()


def test_the_loss_of_each_sequence_is_that_of_its_own_labels_and_has_no_gradient():
    """Chunks end inside of sequences; one sequence has no label."""
    hidden_ND, weight_VD, labels_N, vocab_size = inputs()
    labels_N[20:30] = -100
    loss_sum, loss_B = cross_entropy_sums(hidden_ND.view(5, 10, -1), weight_VD, labels_N.view(5, 10), vocab_size, 16)
    expected = [plain(hidden_ND[i : i + 10], weight_VD, labels_N[i : i + 10], vocab_size).item() for i in range(0, 50, 10)]
    assert expected[2] == 0 and loss_B.tolist() == pytest.approx(expected, rel=1e-6)
    assert loss_sum.requires_grad and not loss_B.requires_grad and loss_B.dtype == torch.float32
    assert loss_B.sum().item() == pytest.approx(loss_sum.item(), rel=1e-6)


def test_backward_scales_with_the_incoming_gradient():
    hidden_ND, weight_VD, labels_N, vocab_size = inputs()
    once = gradients(loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size), hidden_ND, weight_VD)
    scaled = gradients(loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size) * 2 / 37, hidden_ND, weight_VD)
    for one, other in zip(once, scaled, strict=True):
        torch.testing.assert_close(other, one * 2 / 37)


def test_without_valid_labels_loss_and_gradients_are_zero():
    hidden_ND, weight_VD, labels_N, vocab_size = inputs(ignored=1.1)
    loss_sum = loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size, 16)
    assert loss_sum.item() == 0.0
    assert not any(gradient.any() for gradient in gradients(loss_sum, hidden_ND, weight_VD))


def test_ignoring_one_position_changes_no_other():
    hidden_ND, weight_VD, labels_N, vocab_size = inputs(ignored=0.0)
    everywhere = gradients(loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size, 16), hidden_ND)[0]
    labels_N[20] = -100
    without = gradients(loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size, 16), hidden_ND)[0]
    assert not without[20].any()
    assert torch.equal(without[torch.arange(50) != 20], everywhere[torch.arange(50) != 20])


def test_nan_reaches_loss_and_gradients():
    hidden_ND, weight_VD, labels_N, vocab_size = inputs(ignored=0.0)
    with torch.no_grad():
        hidden_ND[3] = torch.nan
    loss_sum = loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size, 16)
    assert loss_sum.isnan() and gradients(loss_sum, weight_VD)[0].isnan().any()


def test_logits_beyond_the_range_of_exp_give_an_exact_loss():
    hidden_ND, weight_VD, labels_N, vocab_size = inputs(ignored=0.0)
    hidden_ND = (hidden_ND * 300).detach()
    expected = plain(hidden_ND.double(), weight_VD.double(), labels_N, vocab_size)
    assert expected > 50 * 200
    for with_gradient in (False, True):
        loss_sum = loss_sum_of(hidden_ND.requires_grad_(with_gradient), weight_VD, labels_N, vocab_size)
        assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)


def test_evaluation_gives_the_same_value_and_computes_no_gradient():
    hidden_ND, weight_VD, labels_N, vocab_size = inputs()
    training = loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size, 16)
    with_gradient = []

    def step(*arguments):
        with_gradient.append(arguments[4])
        return chunk_step(*arguments)

    with torch.no_grad():
        evaluation = loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size, 16, step)
    assert evaluation.item() == pytest.approx(training.item(), rel=1e-6)
    assert not evaluation.requires_grad and with_gradient == [False] * 4


def test_no_more_than_one_chunk_of_logits_exists_at_a_time():
    hidden_ND, weight_VD, labels_N, vocab_size = inputs()
    sizes = []

    def step(inputs_nD, *rest):
        sizes.append(len(inputs_nD))
        return chunk_step(inputs_nD, *rest)

    loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size, 16, step)
    assert sizes == [16, 16, 16, 2]
    assert chunk_positions("cuda", 50304) * 50304 * 4 < 1.5 * 2**30 and chunk_positions("cpu", 8192) == 512


@pytest.mark.parametrize("rows", [8192, 32000, 50304, 151936])
def test_chunks_are_equal_multiples_of_128_within_the_limit(rows):
    for device, positions in [("cpu", 2048), ("cuda", 65536), ("cuda", 32768), ("cuda", 33 * 1024), ("cuda", 6144)]:
        chunk = chunk_positions(device, rows, positions)
        assert chunk % 128 == 0 and positions % chunk == 0
        assert chunk_positions(device, rows) / 2 < chunk <= chunk_positions(device, rows) or chunk == positions


@settings(deadline=None)
@given(positions=st.integers(1, 100_000), rows=st.integers(64, 200_000), device=st.sampled_from(["cpu", "cuda"]))
def test_no_number_of_positions_makes_more_chunks_than_twice_the_fewest(positions, rows, device):
    chunk, limit = chunk_positions(device, rows, positions), chunk_positions(device, rows)
    assert -(-positions // chunk) < 2 * -(-positions // limit) and chunk < limit + 128


def test_eager_softmax_and_gradient_are_computed_in_the_memory_of_the_logits():
    hidden_ND, weight_VD, labels_N, vocab_size = (x.detach() if torch.is_tensor(x) else x for x in inputs(64, 256, 8, 250))
    with Largest(64 * 256 * 4) as largest:
        chunk_step(hidden_ND, weight_VD, labels_N, vocab_size, True)
    assert largest.made == 1  # the product


def test_eager_chunks_share_the_memory_of_their_logits():
    hidden_ND, weight_VD, labels_N, vocab_size = inputs(64, 256, 8, 250)
    with Largest(16 * 256 * 4) as largest:
        loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size, 16)
    assert largest.made == 1


class Largest(TorchDispatchMode):
    """Counts tensors of a number of bytes that operators allocate."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.made, self._seen = size, 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **keywords or {})
        if isinstance(result, torch.Tensor) and (storage := result.untyped_storage()).nbytes() == self.size:
            self.made += storage.data_ptr() not in self._seen
            self._seen.add(storage.data_ptr())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab_size", [97, 128], ids=["padded", "no padding"])
def test_the_compiled_step_scatters_nothing_and_equals_the_eager_one(dtype, vocab_size):
    hidden_ND, weight_VD, labels_N, _ = (x.detach() if torch.is_tensor(x) else x for x in inputs(vocab_size=vocab_size))
    hidden_ND, weight_VD, operators = hidden_ND.to(dtype), weight_VD.to(dtype), []

    def look(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(chunk_step, backend=aot_autograd(fw_compiler=make_boxed_compiler(look)), fullgraph=True)
    loss_N, gradient_NV = compiled(hidden_ND, weight_VD, labels_N, vocab_size, True)
    expected_N, expected_NV = chunk_step(hidden_ND, weight_VD, labels_N, vocab_size, True)
    assert operators and not any("scatter_add" in name or "scatter.value" in name for name in operators)
    assert gradient_NV.dtype == dtype
    torch.testing.assert_close(loss_N, expected_N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient_NV, expected_NV, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    evaluated_N, nothing = compiled(hidden_ND, weight_VD, labels_N, vocab_size, False)
    assert nothing is None
    torch.testing.assert_close(evaluated_N, expected_N, rtol=1e-6, atol=1e-6)


def test_on_gpus_products_of_bf16_are_added_in_fp32_without_rounding_them_first(monkeypatch):
    """The operator does not exist on CPUs, so a stand-in with its documented result takes its place."""

    def addmm(total, left, right, *, out_dtype, out):
        assert left.dtype == right.dtype == torch.bfloat16 and out_dtype == out.dtype == torch.float32
        return out.copy_(total + left.float() @ right.float())

    left_Vn, right_nD = (x.bfloat16() for x in torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)))
    exact_VD, errors = left_Vn.double() @ right_nD.double(), []
    monkeypatch.setattr(torch, "addmm", addmm)
    for planned in (target.planned("cuda"), nullcontext()):
        sum_VD = torch.ones(64, 64)
        with planned:
            _add_product(sum_VD, left_Vn, right_nD)
        errors.append(relative(sum_VD.double(), 1 + exact_VD))
    assert errors[0] < 1e-6 and 1e-4 < errors[1] < 1e-2  # on a CPU the product is rounded


def test_a_second_backward_pass_raises_an_error_instead_of_scaling_twice():
    hidden_ND, weight_VD, labels_N, vocab_size = inputs()
    loss_sum = loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size)
    (loss_sum * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        (loss_sum * 2).backward()


def test_autocast_runs_the_products_in_bf16_and_sums_in_fp32():
    hidden_ND, weight_VD, labels_N, vocab_size = inputs(positions=400)
    expected = gradients(plain(hidden_ND, weight_VD, labels_N, vocab_size), hidden_ND, weight_VD)
    seen = []

    def step(inputs_nD, matrix_VD, *rest):
        seen.append((inputs_nD.dtype, matrix_VD.dtype))
        return chunk_step(inputs_nD, matrix_VD, *rest)

    with torch.autocast("cpu", torch.bfloat16):
        loss_sum = loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size, 10, step)
    got = gradients(loss_sum, hidden_ND, weight_VD)
    logits_NV = (hidden_ND.bfloat16() @ weight_VD.bfloat16().T)[:, :vocab_size].float()
    assert loss_sum.item() == pytest.approx(F.cross_entropy(logits_NV, labels_N, reduction="sum").item(), rel=1e-6)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32 and relative(ours, theirs) < 5e-3


@pytest.mark.parametrize("part", ["hidden", "weight"])
def test_bf16_parameters_get_bf16_gradients(part):
    hidden_ND, weight_VD, labels_N, vocab_size = inputs()
    hidden_ND, weight_VD = (x.detach().bfloat16().requires_grad_() for x in (hidden_ND, weight_VD))
    loss_sum = loss_sum_of(hidden_ND, weight_VD, labels_N, vocab_size, 16)
    assert loss_sum.dtype == torch.float32
    assert gradients(loss_sum, {"hidden": hidden_ND, "weight": weight_VD}[part])[0].dtype == torch.bfloat16
