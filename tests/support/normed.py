"""A task with BatchNorm and dropout whose data are a function of (step, worker): what evaluations could disturb."""

import torch


class Normed(torch.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.dropout = torch.nn.Dropout(dropout)
        self.last = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.dropout(torch.tanh(self.norm(self.first(x)))))


class Normal:
    """Keeps the state of every model it evaluates, and draws random numbers while it does, as a careless task might."""

    seed = 0

    def __init__(self, dropout=0.5, samples=6):
        self.dropout, self.seen = dropout, []
        self.x = self.draw(999, 0, samples)

    def draw(self, step, worker, size=5):
        generator = torch.Generator().manual_seed(1000 * step + worker)
        return torch.randn(size, 3, dtype=torch.float64, generator=generator) * (1 + worker) + worker

    def model(self):
        torch.manual_seed(1)
        return Normed(self.dropout).double()

    def batches(self, step, workers, part):
        return [self.draw(step, i) for i in workers]

    def loss(self, model, batch):
        return (model(batch).squeeze(1) - batch.sum(1)).square().mean()

    def evaluate(self, model, part):
        torch.rand(3)
        assert not model.training
        self.seen.append({name: value.clone() for name, value in model.state_dict().items()})
        x = self.x[part[0] :: part[1]]
        return {"count": len(x), "validation_loss": float((model(x).squeeze(1) - x.sum(1)).square().sum())}
