"""The tasks. Each gives a model, batches, a loss and an evaluation; the sums of the last are validation_loss and, if any, nll, accuracy.

model() -> nn.Module                          one worker's model, on the task's device and in its dtype
batches(step, workers, part) -> iterable      a batch for each of `workers`; part = (l, g): the l-th of g parts of it. A batch of
                                              several `pieces` comes as its pieces l, l + g, l + 2 g, ..., worker after worker
loss(model, batch) -> scalar                  the mean loss of the batch, for backward; over the pieces of a part these add up, and
                                              the mean over parts is the loss of the batch
evaluate(model, part) -> dict                 sums over the part's share of the validation set, and
                                              their `count`
steps_per_epoch                               inner steps in a pass over the training set
there() -> bool, found() -> str               whether a plan rests on the data themselves; where they are, or what is not there
"""


class Task:
    """What most tasks have in common.

    final: whether a run writes all its iterates to final.npz. fingerprint: of an input file that changes the outcome, or None.
    pieces: parts of a worker's batch that go through its model one after another. loss_scale: see slowmo/replicas.py.
    same_shapes: whether all batches have the same shapes.
    """

    final = False
    fingerprint = None
    pieces = 1
    loss_scale = 1.0
    same_shapes = True

    def there(self) -> bool:
        return True

    def found(self) -> str:
        return ""

    def finish(self, models: list, cluster) -> dict:
        """What result.json says besides, found after the last step by all processes. models: files of the last averaged models."""
        return {}

    def close(self) -> None:
        """The run has ended, in whatever way; in a sweep another follows in this process."""
