"""SGD_AGC against a float64 reference written here, torch's SGD, timm's clipping, and cut into arbitrary pieces."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from scaletransfer.optim import FLOOR, SGD_AGC, split_head
from scaletransfer.units import Segment, UnitPlan, flat

SHAPES: tuple[tuple[int, ...], ...] = ((), (7,), (1, 5), (6, 3), (4, 3, 2), (5, 2, 3, 3), (3, 2, 2, 1, 2))
"""0-D to 5-D. Rows of the same tensor get weights and gradients of very different norms, see `draw`."""

Group = dict[str, Any]
DEFAULTS: Group = {
    "lr": 0.1,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "clipping": 1e-2,
    "eps": 1e-3,
}


def rows_of(values: np.ndarray) -> np.ndarray:
    """[units, elements of a unit]: rows of the first dimension, or the whole of a vector or scalar."""
    return values.reshape(values.shape[0] if values.ndim >= 2 else 1, -1)


def reference_step(weights: np.ndarray, gradient: np.ndarray, buffer: np.ndarray | None, group: Group) -> np.ndarray:
    """One step in float64, in place on ``weights``; returns the momentum buffer. From the paper's equation 3."""
    g = gradient.astype(np.float64).copy()
    if group["clipping"] is not None:
        w_rows, g_rows = rows_of(weights), rows_of(g)
        for unit in range(len(g_rows)):
            norm = math.sqrt(float((g_rows[unit] ** 2).sum()))
            limit = group["clipping"] * max(math.sqrt(float((w_rows[unit] ** 2).sum())), group["eps"])
            if norm > limit:
                g_rows[unit] *= limit / max(norm, 1e-6)
        g = g_rows.reshape(weights.shape)
    g = g + group["weight_decay"] * weights
    if group["momentum"]:
        buffer = g.copy() if buffer is None else group["momentum"] * buffer + (1 - group["dampening"]) * g
        g = g + group["momentum"] * buffer if group["nesterov"] else buffer
    weights -= group["lr"] * g
    return np.array([]) if buffer is None else buffer


def draw(shape: tuple[int, ...], rng: np.random.Generator, scale: float) -> np.ndarray:
    """float64 values whose units have norms from 1e-3 to 10 times ``scale``."""
    values = rng.normal(size=shape)
    rows = rows_of(np.asarray(values))
    return (rows * 10 ** rng.uniform(-3, 1, size=(len(rows), 1)) * scale).reshape(shape)


def compare(groups: Sequence[Group], given: Sequence[Sequence[int]], steps: int = 5, **common: Any) -> list[float]:
    """Trains SHAPES[i] for i in ``given[group]`` by SGD_AGC and by the reference; returns the shares of clipped units.

    Raises AssertionError where they differ by more than 1e-12.
    """
    rng = np.random.default_rng(3)
    start = {i: draw(SHAPES[i], rng, 1.0) for members in given for i in members}
    start[next(iter(start))][...] = 0.0  # zero-initialised weights move by eps alone
    params = {i: nn.Parameter(torch.tensor(value)) for i, value in start.items()}
    optimizer = SGD_AGC(
        [{"params": [params[i] for i in members], **group} for members, group in zip(given, groups, strict=True)],
        **{"lr": 0.1, **common},
    )
    buffers: dict[int, np.ndarray | None] = dict.fromkeys(start)
    shares = []
    for _ in range(steps):
        for members, group in zip(given, groups, strict=True):
            full = {**DEFAULTS, **common, **group}
            for i in members:
                gradient = draw(SHAPES[i], rng, 0.05)
                params[i].grad = torch.tensor(gradient)
                found = reference_step(start[i], gradient, buffers[i], full)
                buffers[i] = found if full["momentum"] else None
        optimizer.step()
        stats = optimizer.pop_stats()
        assert stats is not None
        shares.append(int(stats.clipped) / max(1, stats.units))
        for i, param in params.items():
            np.testing.assert_allclose(param.detach().numpy(), start[i], rtol=1e-12, atol=1e-12, err_msg=str(SHAPES[i]))
    return shares


ALL = [list(range(len(SHAPES)))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.05},
        {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
        {"momentum": 0.8, "dampening": 0.3},
        {"weight_decay": 0.2, "clipping": 0.3, "eps": 0.5},
        {"momentum": 0.9, "clipping": 1e-5, "eps": 1e-9},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "plain",
)
def test_it_equals_the_reference(options: Group) -> None:
    shares = compare([{}], ALL, **options)
    assert all(share > 0 for share in shares)
    if options.get("clipping", 1e-2) >= 1e-2:
        assert all(share < 1 for share in shares), "the test must see clipped and unclipped units"


def test_groups_have_their_own_hyper_parameters() -> None:
    groups: list[Group] = [
        {},
        {"clipping": None, "momentum": 0.5},
        {"lr": 0.01, "clipping": 0.2, "eps": 0.1, "weight_decay": 0.3, "nesterov": True},
    ]
    compare(groups, [[0, 2, 4], [1, 3], [5, 6]], momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize("wrong", ["decay before clipping", "no floor", "whole tensor", "columns", "first buffer zero"])
def test_the_comparison_sees_a_wrong_rule(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plausible misreading of the rule is told from the right one, so the tests above can fail."""
    right = reference_step

    def faulty(w: np.ndarray, g: np.ndarray, buffer: np.ndarray | None, group: Group) -> np.ndarray:
        if wrong == "decay before clipping":
            return right(w, g + group["weight_decay"] * w, buffer, {**group, "weight_decay": 0.0})
        if wrong == "no floor":
            return right(w, g, buffer, {**group, "eps": 0.0})
        if wrong == "first buffer zero":
            buffer = np.zeros_like(w) if buffer is None else buffer
            return right(w, g, buffer, {**group, "dampening": 0.5})
        turned = np.moveaxis(w, 0, -1) if wrong == "columns" and w.ndim > 1 else w.reshape(-1)
        g_turned = np.moveaxis(g, 0, -1) if wrong == "columns" and w.ndim > 1 else g.reshape(-1)
        mine = np.ascontiguousarray(turned)
        flat_buffer = None if buffer is None else np.ascontiguousarray(buffer.reshape(mine.shape))
        found = right(mine, np.ascontiguousarray(g_turned), flat_buffer, group)
        w[...] = np.moveaxis(mine, -1, 0) if mine.ndim > 1 else mine.reshape(w.shape)
        return found

    monkeypatch.setitem(globals(), "reference_step", faulty)
    with pytest.raises(AssertionError):
        compare([{}], ALL, steps=3, momentum=0.9, weight_decay=0.05)


def test_a_norm_below_the_floor_is_divided_by_the_floor() -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    gradient = torch.tensor([6e-8, 0.0, 8e-8], dtype=torch.float64)  # norm 1e-7, limit 1e-5 * 1e-3 = 1e-8
    param.grad = gradient.clone()
    SGD_AGC([param], lr=1.0, clipping=1e-5).step()
    torch.testing.assert_close(param.detach(), -gradient * (1e-8 / FLOOR), rtol=1e-12, atol=0)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    used, unused = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = SGD_AGC([used, unused], lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(2):
        used.grad = torch.ones(4, 2)
        optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(3, 2))
    assert not optimizer.state.get(unused)
    assert not torch.equal(used.detach(), torch.ones(4, 2))
    SGD_AGC([unused], lr=0.1).step()  # a step without any gradient is a step


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.7, "dampening": 0.2},
    ],
    ids=str,
)
def test_without_clipping_it_is_torch_sgd_bit_by_bit(options: Group) -> None:
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(shape)) for shape in (*SHAPES, (64,), (131, 77), (128, 33, 3, 3))]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    ours, sgd = SGD_AGC(mine, lr=0.1, clipping=None, **options), torch.optim.SGD(theirs, lr=0.1, **options)
    for _ in range(4):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        ours.step()
        sgd.step()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("clipping", [1e-2, 0.1])
def test_it_agrees_with_timm_clipping_and_torch_sgd(clipping: float) -> None:
    """Timm's units are ours for 0-D, 1-D, 2-D and 4-D tensors (its rule for 3-D and 5-D is the first dimension too)."""
    agc = pytest.importorskip("timm.utils.agc")
    torch.manual_seed(1)
    shapes = [(7,), (6, 3), (4, 3, 2), (5, 2, 3, 3), (3, 2, 2, 1, 2)]
    mine = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    options: Group = {"momentum": 0.9, "weight_decay": 0.01}
    ours, sgd = SGD_AGC(mine, lr=0.1, clipping=clipping, **options), torch.optim.SGD(theirs, lr=0.1, **options)
    for _ in range(4):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape, dtype=torch.float64) * 0.05
            b.grad = a.grad.clone()
        ours.step()
        agc.adaptive_clip_grad(theirs, clip_factor=clipping, eps=1e-3)
        sgd.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_state_can_be_saved_and_restored() -> None:
    torch.manual_seed(2)
    first = [nn.Parameter(torch.randn(4, 3))]
    gradients = torch.randn(4, 4, 3)

    def run(params: list[nn.Parameter], optimizer: SGD_AGC, steps: Iterable[int]) -> None:
        for step in steps:
            params[0].grad = gradients[step].clone()
            optimizer.step()

    optimizer = SGD_AGC(first, lr=0.1, momentum=0.9)
    run(first, optimizer, range(2))
    second = [nn.Parameter(first[0].detach().clone())]
    again = SGD_AGC(second, lr=0.1, momentum=0.9)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(first, optimizer, range(2, 4))
    run(second, again, range(2, 4))
    assert torch.equal(first[0], second[0])


def test_a_closure_is_called_and_channels_last_gives_the_same() -> None:
    torch.manual_seed(3)
    value, gradient = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    results = []
    for memory in (torch.contiguous_format, torch.channels_last):
        param = nn.Parameter(value.clone().to(memory_format=memory))

        def closure(param: nn.Parameter = param) -> Tensor:
            loss = (param * gradient).sum()
            loss.backward()
            return loss

        loss = SGD_AGC([param], lr=0.1).step(closure)
        torch.testing.assert_close(loss, (value * gradient).sum())
        results.append(param.detach().contiguous())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-7)


def test_statistics_are_those_before_clipping() -> None:
    params = [nn.Parameter(torch.ones(4, 2, dtype=torch.float64)), nn.Parameter(torch.ones(6, dtype=torch.float64))]
    optimizer = SGD_AGC([{"params": params[:1]}, {"params": params[1:], "clipping": None}], lr=0.1, clipping=0.1)
    params[0].grad = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-3, 0.0], [1.0, 0.0]], dtype=torch.float64)
    params[1].grad = torch.full((6,), 2.0, dtype=torch.float64)
    optimizer.step()
    stats = optimizer.pop_stats()
    assert stats is not None
    assert (int(stats.clipped), stats.units) == (2, 4)
    assert float(stats.square_norm) == pytest.approx(25 + 1e-6 + 1 + 24)
    assert optimizer.pop_stats() is None


# --- the head --------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """A network of 256 classes in which another convolution has the head's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.wide = nn.Conv2d(16, 256, 1)
        self.narrow = nn.Conv2d(256, 16, 1)
        self.head = nn.Module()
        self.head.conv = nn.Conv2d(16, 256, 1)


Split = Callable[[Iterable[tuple[str, Tensor]], str, str | None, str], list[Group]]


def unclipped(split: Split, exempt: str) -> set[str]:
    """Names of the parameters that a step with huge gradients moves by exactly lr * gradient."""
    torch.manual_seed(4)
    model = Wide()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = SGD_AGC(split(model.named_parameters(), "head.conv.weight", "head.conv.bias", exempt), lr=1.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    return {
        name for name, p in model.named_parameters() if torch.allclose(before[name] - p.detach(), torch.tensor(3.0))
    }


def check_head(split: Split) -> None:
    assert unclipped(split, "corrected") == {"head.conv.weight", "head.conv.bias"}
    assert unclipped(split, "paper") == {"head.conv.weight"}


def by_shape(named: Iterable[tuple[str, Tensor]], head_weight: str, head_bias: str | None, exempt: str) -> list[Group]:
    """The published code's mistake: whatever has as many rows as there are classes is taken for the head."""
    params = dict(named)
    classes = params[head_weight].shape[0]
    dims = (1, 2, 3, 4) if exempt == "corrected" else (2, 3, 4)
    head = [p for p in params.values() if p.shape[0] == classes and p.dim() in dims]
    body = [p for p in params.values() if all(p is not h for h in head)]
    return [{"params": body}, {"params": head, "clipping": None}]


def test_the_head_is_exempt_by_name_also_with_256_classes() -> None:
    check_head(split_head)
    with pytest.raises(AssertionError):
        check_head(by_shape)


def test_split_head_keeps_every_parameter_once_and_refuses_an_unknown_head() -> None:
    model = Wide()
    for bias in ("head.conv.bias", None):
        groups = split_head(model.named_parameters(), "head.conv.weight", bias, "corrected")
        listed = [id(p) for group in groups for p in group["params"]]
        assert sorted(listed) == sorted(id(p) for p in model.parameters())
    with pytest.raises(ValueError, match=r"no parameter 'fc\.weight'"):
        split_head(model.named_parameters(), "fc.weight", None, "corrected")


# --- pieces ----------------------------------------------------------------------------------------------------------

small_shapes = st.lists(st.integers(1, 5), min_size=0, max_size=5).map(tuple)
# Whose rows, or all of which, are reduced in blocks together with their neighbours.
wide_shapes = st.one_of(
    st.tuples(st.integers(1, 6), st.sampled_from([16, 48, 64, 80, 128, 144])),
    st.tuples(st.integers(1, 3), st.just(32), st.integers(1, 3), st.just(3)),
    st.tuples(st.sampled_from([16, 64, 128, 192, 200])),
)
shapes = st.one_of(small_shapes, wide_shapes)


@st.composite
def cut_tensors(draw_from: st.DrawFn) -> tuple[list[tuple[int, ...]], list[list[int]], int]:
    """Shapes of some parameters, and for each the places where it is cut into one range a rank."""
    ranks = draw_from(st.integers(1, 4))
    chosen = draw_from(st.lists(shapes, min_size=1, max_size=5))
    cuts = []
    for shape in chosen:
        size = math.prod(shape)
        row = size // shape[0] if shape else 1
        inner = st.one_of(st.integers(0, size), st.integers(0, size // row).map(lambda n, row=row: n * row))
        cuts.append([0, *sorted(draw_from(st.lists(inner, min_size=ranks - 1, max_size=ranks - 1))), size])
    return chosen, cuts, ranks


Cut = tuple[list[tuple[int, ...]], list[list[int]], int]


def segments_of(cut: Cut, rank: int) -> list[Segment]:
    """A rank's pieces one after the other in a flat tensor, behind one element that belongs to nobody."""
    mine, offset = [], 1
    for shape, where in zip(cut[0], cut[1], strict=True):
        mine.append(Segment(shape, where[rank], where[rank + 1], offset))
        offset += where[rank + 1] - where[rank]
    return mine


def holder_of(wholes: Sequence[np.ndarray], mine: Sequence[Segment], dtype: torch.dtype) -> Tensor:
    """The flat tensor of such a rank: 100 stands before and behind what belongs to somebody."""
    parts = [whole.reshape(-1)[segment.start : segment.stop] for whole, segment in zip(wholes, mine, strict=True)]
    return torch.tensor(np.concatenate([[100.0], *parts, [100.0]]), dtype=dtype)


@settings(max_examples=200, deadline=None)
@given(cut_tensors(), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_pieces_of_any_cut_give_the_sums_and_scales_of_the_whole(
    cut: Cut, seed: int, dtype: torch.dtype, apart: bool
) -> None:
    """Every simulated rank holds its pieces in one flat tensor; sums over ranks are those of the whole tensors."""
    chosen, _, ranks = cut
    rng = np.random.default_rng(seed)
    wholes = [rng.normal(size=shape) for shape in chosen]
    rows = [rows_of(np.asarray(whole)) for whole in wholes]
    units = [len(row) if apart else 1 for row in rows]
    scale = rng.uniform(0.1, 1, sum(units))
    factors = [
        np.repeat(part if apart else 1.0, row.size // len(part))
        for part, row in zip(np.split(scale, np.cumsum(units)[:-1]), rows, strict=True)
    ]
    scaled = [whole.reshape(-1) * factor for whole, factor in zip(wholes, factors, strict=True)]
    total = np.zeros(sum(units))
    for rank in range(ranks):
        mine = segments_of(cut, rank)
        for segment, row in zip(mine, rows, strict=True):
            runs = list(segment.runs())
            assert (segment.units, segment.unit_size) == row.shape
            assert [begin for begin, *_ in runs] == [0, *(end for _, end, *_ in runs)][: len(runs)]
            assert sum(end - begin for begin, end, *_ in runs) == segment.stop - segment.start
            assert len(runs) <= 3
        holder = holder_of(wholes, mine, dtype)
        plan = UnitPlan([holder], [mine], [apart])
        assert (plan.units, plan.first) == (sum(units), [0, sum(units)])
        sums, missing = torch.zeros(2, sum(units), dtype=dtype)
        plan.square_sums([holder], sums)
        plan.square_sums([None], missing)
        assert not missing.any()
        total += sums.numpy()
        plan.scale([None], torch.from_numpy(scale))
        plan.scale([holder], torch.from_numpy(scale))
        wanted = holder_of(scaled, mine, dtype).numpy()
        np.testing.assert_allclose(holder.numpy(), wanted, rtol=3e-7 if dtype == torch.float32 else 1e-15)
    expected = np.concatenate([(row**2).sum(axis=1 if apart else None, keepdims=not apart).reshape(-1) for row in rows])
    np.testing.assert_allclose(total, expected, rtol=2e-6 if dtype == torch.float32 else 1e-12)


class Ranks:
    """As many threads as ranks, and the sum over them: what the optimizer takes for the process group."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.given: list[Tensor] = []
        self.calls = 0

    def all_reduce(self, tensor: Tensor, group: object) -> None:
        assert group is self
        self.given.append(tensor)
        self.calls += 1
        self.barrier.wait()
        total = torch.stack(self.given).sum(dim=0)
        self.barrier.wait()
        tensor.copy_(total)
        self.given.clear()
        self.barrier.wait()

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        with mock.patch.object(dist, "all_reduce", self.all_reduce), ThreadPoolExecutor(self.barrier.parties) as pool:
            return list(pool.map(work, range(self.barrier.parties)))


@settings(max_examples=60, deadline=None)
@given(cut_tensors(), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]))
def test_ranks_with_any_cut_are_stepped_like_the_reference(cut: Cut, seed: int, dtype: torch.dtype) -> None:
    """Units over several ranks, ranks that hold nothing, clipped and plain groups: three steps, one reduction each."""
    chosen, _, ranks = cut
    rng = np.random.default_rng(seed)
    whole = [draw(shape, rng, 1.0).astype(np.float32).astype(np.float64) for shape in chosen]
    gradients = [[draw(shape, rng, 0.05).astype(np.float32) for shape in chosen] for _ in range(3)]
    plain = len(chosen) // 2  # parameters from here on are not clipped
    common: Group = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "clipping": 0.02}
    group = Ranks(ranks)

    def work(rank: int) -> tuple[list[Segment], list[Tensor], list[int]]:
        mine = segments_of(cut, rank)
        holders = [nn.Parameter(holder_of(whole, mine, dtype)) for _ in range(2)]
        parts = [mine[:plain], mine[plain:]]
        optimizer = SGD_AGC([{"params": [holders[0]]}, {"params": [holders[1]], "clipping": None}], **common)
        optimizer.set_layout(dict(zip(holders, parts, strict=True)), group)  # type: ignore[arg-type]
        clipped = []
        for step in gradients:
            for holder in holders:
                holder.grad = holder_of(step, mine, dtype)
            optimizer.step()
            stats = optimizer.pop_stats()
            assert stats is not None
            np.testing.assert_allclose(
                float(stats.square_norm), sum((g.astype(float) ** 2).sum() for g in step), rtol=1e-5
            )
            clipped.append(int(stats.clipped))
        return mine, [holder.detach() for holder in holders], clipped

    found = group.run(work)
    assert group.calls == 3 * ranks
    buffers: list[np.ndarray | None] = [None] * len(chosen)
    wanted = [np.array(value) for value in whole]
    for step in gradients:
        for number, gradient in enumerate(step):
            options = {**DEFAULTS, **common, **({"clipping": None} if number >= plain else {})}
            buffers[number] = reference_step(wanted[number], gradient, buffers[number], options)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for mine, holders, clipped in found:
        assert clipped == found[0][2]
        for number, (segment, value) in enumerate(zip(mine, wanted, strict=True)):
            held = holders[number >= plain][segment.offset : segment.offset + segment.stop - segment.start]
            expected = value.reshape(-1)[segment.start : segment.stop]
            scale = max(1e-3, float(np.abs(value).max(initial=0)))
            np.testing.assert_allclose(held.numpy(), expected, rtol=0, atol=tolerance * scale, err_msg=str(segment))


@settings(max_examples=60, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=4), st.integers(0, 2**31), st.booleans())
def test_a_flat_tensor_with_a_layout_is_stepped_like_its_parameters(
    chosen: list[tuple[int, ...]], seed: int, padded: bool
) -> None:
    """What ZeRO on one rank does: the parameters one after the other in a flat tensor, padding at its end."""
    rng = np.random.default_rng(seed)
    apart = [nn.Parameter(torch.tensor(draw(shape, rng, 1.0))) for shape in chosen]
    together = nn.Parameter(torch.cat([*(p.detach().reshape(-1) for p in apart), torch.zeros(3 if padded else 0)]))
    layout, offset = [], 0
    for p in apart:
        layout.append(Segment(tuple(p.shape), 0, p.numel(), offset))
        offset += p.numel()
    options: Group = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    one, other = SGD_AGC(apart, **options), SGD_AGC([together], **options)
    other.set_layout({together: layout}, None)
    for _ in range(3):
        for p in apart:
            p.grad = torch.tensor(draw(tuple(p.shape), rng, 0.1))
        grads = [p.grad.reshape(-1) for p in apart if p.grad is not None]
        together.grad = torch.cat([*grads, torch.zeros(3 if padded else 0)])
        one.step()
        other.step()
        a, b = one.pop_stats(), other.pop_stats()
        assert a is not None and b is not None
        assert (int(a.clipped), a.units) == (int(b.clipped), b.units)
        torch.testing.assert_close(a.square_norm, b.square_norm, rtol=1e-12, atol=0)
    torch.testing.assert_close(together[:offset], torch.cat([p.reshape(-1) for p in apart]), rtol=1e-12, atol=1e-15)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -0.1}, "lr=-0.1"),
        ({"lr": math.nan}, "lr=nan"),
        ({"momentum": -1.0}, "momentum=-1.0"),
        ({"dampening": -1.0}, "dampening"),
        ({"weight_decay": -1e-4}, "weight_decay"),
        ({"eps": -1e-3}, "eps"),
        ({"clipping": 0.0}, "clipping=0.0"),
        ({"clipping": -1e-2}, "clipping"),
        ({"clipping": math.nan}, "clipping"),
        ({"nesterov": True}, "nesterov"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov"),
    ],
    ids=str,
)
def test_hyper_parameters_out_of_range_are_refused(options: Group, named: str) -> None:
    param = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=named):
        SGD_AGC([param], **{"lr": 0.1, **options})
    with pytest.raises(ValueError, match=named):  # also in a group
        SGD_AGC([{"params": [param], **options}], lr=0.1)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_dtensor_without_a_layout_is_refused() -> None:
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (1,)), [Shard(0)]))
    sharded.grad = torch.ones_like(sharded)
    optimizer = SGD_AGC([sharded], lr=0.1)
    with pytest.raises(ValueError, match="unknown layout"):
        optimizer.step()
    optimizer.set_layout({sharded: [Segment((4, 2), 0, 8, 0)]}, dist.group.WORLD)
    optimizer.step()
    assert flat(sharded).max() < 1


def test_a_flat_tensor_put_in_the_place_of_the_parameters_is_refused() -> None:
    """What DeepSpeed does with any optimizer: without a layout a partition would be clipped as one vector."""
    given_params = [nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(3))]
    optimizer = SGD_AGC(given_params, lr=0.1)
    partition = nn.Parameter(torch.ones(11))
    partition.grad = torch.ones(11)
    optimizer.param_groups[0]["params"] = [partition]
    with pytest.raises(ValueError, match="unknown layout"):
        optimizer.step()
    assert torch.equal(partition.detach(), torch.ones(11)), "refused before anything changed"


def test_a_tensor_that_the_layout_does_not_know_is_refused() -> None:
    known, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = SGD_AGC([known, other], lr=0.1)
    optimizer.set_layout({known: [Segment((2, 2), 0, 4, 0)]}, None)
    known.grad, other.grad = torch.ones(4), torch.ones(4)
    with pytest.raises(ValueError, match="unknown layout"):
        optimizer.step()


@pytest.mark.parametrize("flat_partition", [False, True])
@pytest.mark.parametrize("clipping", [1e-2, None])
@pytest.mark.parametrize("most", [1, 100, 1000, 5000])
def test_chunks_of_any_size_give_the_same(
    most: int, clipping: float | None, flat_partition: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(3,), (40, 7), (5, 130), (16, 8, 3, 3), (1, 70), (64,), (9, 64)]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    drawn = [[torch.randn(shape, generator=generator) * 10 ** float(n % 3 - 1) for shape in shapes] for n in range(3)]
    results = []
    for chosen in (most, 10**9):
        monkeypatch.setattr("scaletransfer.optim.CACHED", chosen)
        if flat_partition:
            joined = nn.Parameter(torch.cat([value.flatten() for value in values]))
            offsets = np.cumsum([0, *(value.numel() for value in values)])
            layout = [Segment(s, 0, math.prod(s), int(o)) for s, o in zip(shapes, offsets, strict=False)]
            parameters = [joined]
        else:
            parameters = [nn.Parameter(value.clone()) for value in values]
        groups = [{"params": parameters[:-1] or parameters}, {"params": parameters[-1:], "clipping": None}]
        optimizer = SGD_AGC(
            groups[:1] if flat_partition else groups, lr=0.1, momentum=0.9, weight_decay=1e-3, clipping=clipping
        )
        if flat_partition:
            optimizer.set_layout({joined: layout}, None)
        told = []
        for step in drawn:
            gradients = [torch.cat([g.flatten() for g in step])] if flat_partition else step
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
            stats = optimizer.pop_stats()
            assert stats is not None
            told.append((int(stats.clipped), stats.units, pytest.approx(float(stats.square_norm), rel=1e-5)))
        results.append((parameters, told))
    (few, told_few), (one, told_one) = results
    assert told_few == told_one and (clipping is None or told_one[0][0] > 10)
    for a, b in zip(few, one, strict=True):
        assert torch.equal(a, b) if clipping is None else torch.allclose(a, b, rtol=1e-5, atol=1e-7)
