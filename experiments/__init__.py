"""The tasks. Each gives a model, batches, a loss and an evaluation; the sums of the last are validation_loss and, if any, nll, accuracy.

    model() -> nn.Module                          one worker's model, on the task's device and in its dtype
    batches(step, workers, part) -> iterable      a batch for each of `workers`; part = (l, g): the l-th of g parts of it
    loss(model, batch) -> scalar                  the mean loss of the batch, for backward
    evaluate(model, part, samples) -> dict        sums over the part's share of the validation set, and their `count`
    steps_per_epoch                               inner steps in a pass over the training set
    final                                         whether a run writes all its iterates to final.npz
    fingerprint                                   of an input file that changes the outcome, or None
"""
