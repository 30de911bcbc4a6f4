"""A base algorithm of one's own: signSGD with majority vote (Bernstein et al. 2018)."""

from slowmo.base import AllReduce


class SignSGD(AllReduce):
    """x_i <- x_i - γ sign(mean of the workers' signs). A base has a few places to change; slowmo/engine.py lists them."""

    def _start_mean(self, bucket):
        """The last gradient of this bucket has come: instead of itself a worker sends its signs."""
        for segment in bucket.segments:
            segment.grad.sign_()
        return super()._start_mean(bucket)

    def _update(self, bucket):
        """The mean has come: step by its sign."""
        for segment in bucket.segments:
            segment.grad.sign_().mul_(self.replicas.loss_scale)  # which the step divides by
        super()._update(bucket)
