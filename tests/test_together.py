"""All replicas in one computation: the same losses, gradients and buffers as one after another, or not at all."""

import copy

import pytest
import torch
from torch.nn import functional as F

import slowmo
from experiments.cifar10 import ResNet
from slowmo import together

N = 3


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def replicas(model, spread=0.01):
    """Rows that differ, each with its own buffers."""
    torch.manual_seed(1)
    made = slowmo.Replicas(model, slowmo.Cluster(N))
    made.rows.detach().add_(spread * torch.randn_like(made.rows))
    made.load_buffers(torch.cat([made.buffers()[:1] + k for k in range(N)]))
    return made


def batches(dtype, size=8):
    torch.manual_seed(2)
    return [(torch.randn(4, 3, size, size, dtype=dtype), torch.randint(0, 10, (4,)), None) for _ in range(N)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_the_same_as_one_after_another(dtype, tolerance, layout):
    torch.manual_seed(0)
    model = ResNet([1, 1, 0, 0], 4).to(dtype, memory_format=layout)
    one, all_ = replicas(copy.deepcopy(model)), replicas(model)
    found = together.where_it_pays(all_, loss, lambda: batches(dtype))
    torch.testing.assert_close(all_.buffers(), one.buffers(), rtol=0, atol=0)  # trying it out left nothing
    assert not all_.rows.grad.any()
    for _ in range(2):  # gradients add up, buffers go on
        losses = found(loss, batches(dtype))
        expected = [loss(model, batch) for model, batch in zip(one.models, batches(dtype))]
        for value in expected:
            value.backward()
        torch.testing.assert_close(losses, torch.stack(expected).detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(all_.rows.grad, one.rows.grad, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(all_.buffers(), one.buffers(), rtol=tolerance, atol=tolerance)
    assert (all_.rows.grad[0] - all_.rows.grad[1]).abs().max() > 1e-3  # each its own


def test_tied_and_unused_parameters():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.unused = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.Linear(2, 2)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).tanh())

    torch.manual_seed(0)
    model = Tied().double()
    one, all_ = replicas(copy.deepcopy(model)), replicas(model)
    square = lambda model, x: model(x).square().mean()
    inputs = [torch.randn(5, 6, dtype=torch.float64) for _ in range(N)]
    together.where_it_pays(all_, square, lambda: inputs)(square, inputs)
    for replica, x in zip(one.models, inputs):
        square(replica, x).backward()
    torch.testing.assert_close(all_.rows.grad, one.rows.grad, rtol=1e-13, atol=1e-13)


class Replaces(torch.nn.Module):
    """Its buffer is replaced, not written: no stack sees that."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 64, 10)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("model", [
    torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(3 * 64, 10)),  # every worker draws its own numbers
    Replaces(),
    ResNet([2, 2, 2, 2], 64),  # the loop is faster
], ids=["dropout", "replaced buffer", "large"])  # fmt: skip
def test_one_after_another_where_it_must_be(model):
    made = replicas(model, 0.0)
    before = made.buffers()
    assert together.where_it_pays(made, loss, lambda: batches(torch.float32, 32 if isinstance(model, ResNet) else 8)) is None
    assert made.buffers().equal(before) and not made.rows.grad.any()


def test_batches_that_do_not_stack_are_refused():
    made = replicas(ResNet([1, 0, 0, 0], 4))
    found = together.where_it_pays(made, loss, lambda: batches(torch.float32))
    short = batches(torch.float32)
    short[1] = tuple(part if part is None else part[:2] for part in short[1])
    with pytest.raises(RuntimeError):
        found(loss, short)
    with pytest.raises(ValueError, match="do not stack"):
        found(loss, [(x, y, k) for k, (x, y, _) in enumerate(batches(torch.float32))])


def test_one_replica_or_several_pieces_go_one_by_one():
    draw = lambda: batches(torch.float32)
    assert together.where_it_pays(slowmo.Replicas(ResNet([1, 0, 0, 0], 4)), loss, draw) is None
    assert together.where_it_pays(slowmo.Replicas(ResNet([1, 0, 0, 0], 4), slowmo.Cluster(2), accumulate=2), loss, draw) is None
